"""The errors that a client of Xenstore can meet.  Each is an OSError with an errno of POSIX."""

from __future__ import annotations

import errno
import os
from typing import Final

from xsfs.xenstore.protocol import ERRORS, Op, Request

DEFAULT_TIMEOUT: Final = 10.0
"""The time limit of one request in seconds, unless the caller names another."""

LONGEST_SURE_PATH: Final = 1024
"""Every daemon accepts paths up to this length.  Past it, EINVAL for a well-formed path means its length."""

_NUMBERS: Final[dict[str, int]] = {
    name: getattr(errno, "EDQUOT" if name == "EQUOTA" else name) for name in ERRORS
}
_NUMBERS_OF_REQUESTS: Final = {
    # oxenstored limits a value to 2048 bytes, and reports that the argument list is too long.
    ("E2BIG", Op.WRITE): errno.EFBIG,
    # C xenstored before Xen 4.22, for a full quota of watches.
    ("E2BIG", Op.WATCH): errno.ENOSPC,
    # oxenstored's EQUOTA over the kernel's device: Linux makes EINVAL of an unknown name.
    ("EINVAL", Op.WATCH): errno.EDQUOT,
}


def _number_of(name: str, request: Request) -> int:
    """The errno for an error reply of the store.  EIO for a name that no known daemon sends."""
    if name == "EINVAL" and len(request.path) >= LONGEST_SURE_PATH:
        return errno.ENAMETOOLONG
    return _NUMBERS_OF_REQUESTS.get((name, request.op)) or _NUMBERS.get(name, errno.EIO)


class StoreError(OSError):
    """Any failure of a request to Xenstore.

    errno           what the failure means: a number of the module `errno`
    strerror        what has happened, in words
    unsent          whether nothing of the request was sent, so that it can be sent again
    during_outage   whether xsfs sent nothing, because Xenstore has not answered earlier requests
    """

    errno: int = errno.EIO
    unsent = False
    during_outage = False

    def __init__(self, message: str, *, unsent: bool = False) -> None:
        super().__init__(message)
        self.strerror = message
        self.unsent = unsent


class XenstoreError(StoreError):
    """A request failed with one of Xenstore's errors.

    It is the store's reply, or the one that the client knows the store would give.

    `XenstoreError(name, request)` makes an object of the subclass that fits the name.

    name        the name that the store sent, such as `ENOENT` or `EQUOTA`
    request     the request to which the store replied
    errno       what the name means for this request: `EDQUOT` for `EQUOTA`, `EIO` for an unknown name
    """

    def __new__(cls, name: str, request: Request) -> XenstoreError:
        number = _number_of(name, request)
        error = super().__new__(_CLASS_BY_ERRNO.get(number, cls), name, request)
        error.errno = number
        return error

    def __init__(self, name: str, request: Request) -> None:
        self.name = name
        self.request = request
        self.strerror = os.strerror(self.errno)

    def __str__(self) -> str:
        path = self.request.path.decode("ascii", "backslashreplace")
        op = getattr(self.request.op, "name", self.request.op)
        return f"{self.name}: {op} {path}"


class NotFound(XenstoreError, FileNotFoundError):
    """The node does not exist: `ENOENT`."""


class PermissionDenied(XenstoreError, PermissionError):
    """This domain may not do that: `EACCES`, `EPERM`."""


class Conflict(XenstoreError):
    """Something else has changed what the transaction saw, so nothing was changed: `EAGAIN`.  Start again."""


class QuotaExceeded(XenstoreError):
    """This domain has as many nodes, watches or transactions as it may have: `EQUOTA`, `ENOSPC`."""


class NotSupported(XenstoreError):
    """The daemon does not know the request: `ENOSYS`."""


_CLASS_BY_ERRNO: Final[dict[int, type[XenstoreError]]] = {
    errno.ENOENT: NotFound,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EAGAIN: Conflict,
    errno.EDQUOT: QuotaExceeded,
    errno.ENOSPC: QuotaExceeded,
    errno.ENOSYS: NotSupported,
}


class RequestTimeout(StoreError, TimeoutError):
    """No reply came within the time limit.  The store may still carry out the request."""

    errno = errno.ETIMEDOUT


class ConnectionLost(StoreError):
    """The connection ended before the reply.  Whether a change was carried out is unknown."""

    is_local = False
    """Whether this process has no descriptor left for a connection, which says nothing about Xenstore."""


class TransactionEnded(StoreError):
    """The transaction was committed, rolled back, or lost with its connection."""

    errno = errno.ESTALE


class StoreUnavailable(StoreError):
    """Xenstore cannot be reached at all.

    hint        what the user can do about it
    denied      whether this process lacks the permission
    """

    def __init__(self, reason: str, hint: str, *, denied: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.denied = denied
