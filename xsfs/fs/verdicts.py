"""The store's verdicts, as this system's errno has them.  Pure tables."""

from __future__ import annotations

import errno
import logging
from typing import Final, cast

from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.protocol import ERRORS, Op

log = logging.getLogger(__name__)

_VERDICTS: Final = {
    "EQUOTA": errno.EDQUOT,
}
"""Names of the store's that this system spells in another way."""

_VERDICTS_BY_OP: Final = {
    # oxenstored limits a value to 2048 bytes, and says that the argument list is too long.
    (Op.WRITE, "E2BIG"): errno.EFBIG,
    # A full quota of watches, by C xenstored.
    (Op.WATCH, "E2BIG"): errno.ENOSPC,
}

LONGEST_SURE_PATH: Final = 1024
"""Paths up to here every daemon takes.  Past it EINVAL for a path of good letters means its length."""


def errno_of(error: XenstoreError) -> int:
    """The errno for the store's verdict; EIO, and a line in the log, for one nobody knows."""
    request = error.request
    number = _VERDICTS_BY_OP.get((request.op, error.name)) or _VERDICTS.get(error.name)
    if number is None and error.name in ERRORS:
        number = cast(int, getattr(errno, error.name))
    if number is None:
        log.error("Xenstore gave an unknown error: %s", error)
        return errno.EIO
    if number == errno.EINVAL and len(request.path) >= LONGEST_SURE_PATH:
        return errno.ENAMETOOLONG
    if number == errno.EINVAL and request.op == Op.WATCH:
        # oxenstored's EQUOTA, by the kernel's device: Linux makes EINVAL of what it does not know.
        return errno.EDQUOT
    return number
