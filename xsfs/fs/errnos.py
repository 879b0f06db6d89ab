"""Error translation: what an exception of an operation is to the kernel, an errno, and to the log.

The client raises StoreError, whose errno xenstore/errors.py decides.  The kinds of files raise pyfuse3's
FUSEError.  Any other exception that left an operation would end the mount, so it is logged with its traceback
and becomes EIO.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from pyfuse3 import FUSEError

from xsfs.xenstore.errors import StoreError, XenstoreError
from xsfs.xenstore.protocol import ERRORS, WireError

log = logging.getLogger(__name__)


def translate(
    operation: str, error: Exception, drop_connection: Callable[[str], None]
) -> FUSEError:
    """The FUSEError for an exception that an operation raised.  If a reply was nonsense, this calls
    `drop_connection`."""
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, XenstoreError):
        if error.name not in ERRORS:
            log.error("Xenstore sent an unknown error: %s", error)
        # After ENOSYS the kernel would turn the operation off until the mount ends.
        return FUSEError(errno.EOPNOTSUPP if error.errno == errno.ENOSYS else error.errno)
    if isinstance(error, StoreError):
        level = logging.DEBUG if error.during_outage else logging.WARNING
        log.log(level, "%s: %s", operation, error)
        return FUSEError(error.errno)
    if isinstance(error, WireError):
        log.error("%s: Xenstore broke the protocol: %s", operation, error)
        drop_connection(str(error))
    else:
        log.error("%s failed", operation, exc_info=error)
    return FUSEError(errno.EIO)
