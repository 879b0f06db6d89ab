"""Error translation: the one place where exceptions become errno.

The client raises StoreError, the kinds of files raise pyfuse3's FUSEError.  Any other exception that left an
operation would end the mount, so it is logged with its traceback and becomes EIO.  ENOSYS of the store
becomes EOPNOTSUPP: the kernel would turn the operation off until the mount ends.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Final, cast

from pyfuse3 import FUSEError

from xsfs.xenstore.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreError,
    StoreUnavailable,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.protocol import ERRORS, Op, WireError

log = logging.getLogger(__name__)

_FAILURES: Final[Sequence[tuple[type[StoreError], int]]] = (
    (TransactionEnded, errno.ESTALE),
    (RequestTimeout, errno.ETIMEDOUT),
    (ConnectionLost, errno.EIO),
    (StoreUnavailable, errno.EIO),
)

_NAMES: Final = {
    "EQUOTA": errno.EDQUOT,
    "ENOSYS": errno.EOPNOTSUPP,
}
"""Names that do not become the errno of that name."""

_NAMES_BY_OP: Final = {
    # oxenstored limits a value to 2048 bytes, and reports that the argument list is too long.
    (Op.WRITE, "E2BIG"): errno.EFBIG,
    # C xenstored before Xen 4.22, for a full quota of watches.
    (Op.WATCH, "E2BIG"): errno.ENOSPC,
}

LONGEST_SURE_PATH: Final = 1024
"""Every daemon accepts paths up to this length.  Past it, EINVAL for a well-formed path means its length."""


def errno_of(error: XenstoreError) -> int:
    """The errno for an error reply of the store.  An unknown name is EIO, and logged."""
    request = error.request
    number = _NAMES_BY_OP.get((request.op, error.name)) or _NAMES.get(error.name)
    if number is None and error.name in ERRORS:
        number = cast(int, getattr(errno, error.name))
    if number is None:
        log.error("Xenstore sent an unknown error: %s", error)
        return errno.EIO
    if number == errno.EINVAL and len(request.path) >= LONGEST_SURE_PATH:
        return errno.ENAMETOOLONG
    if number == errno.EINVAL and request.op == Op.WATCH:
        # oxenstored's EQUOTA over the kernel's device: Linux makes EINVAL of an unknown name.
        return errno.EDQUOT
    return number


def translate(
    operation: str, error: Exception, drop_connection: Callable[[str], None]
) -> FUSEError:
    """The FUSEError for an exception that an operation raised.

    drop_connection     called if a reply turns out to be nonsense
    """
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, XenstoreError):
        return FUSEError(errno_of(error))
    for kind, number in _FAILURES:
        if isinstance(error, kind):
            level = logging.DEBUG if error.during_outage else logging.WARNING
            log.log(level, "%s: %s", operation, error)
            return FUSEError(number)
    if isinstance(error, WireError):
        log.error("%s: Xenstore broke the protocol: %s", operation, error)
        drop_connection(str(error))
    else:
        log.error("%s failed", operation, exc_info=error)
    return FUSEError(errno.EIO)
