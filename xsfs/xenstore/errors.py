"""The errors that a client of Xenstore can meet.  Only the file system turns them into errno."""

from __future__ import annotations

from typing import Final

from xsfs.xenstore.protocol import Request

DEFAULT_TIMEOUT: Final = 10.0
"""The time limit of one request in seconds, unless the caller names another."""


class StoreError(Exception):
    """Any failure of a request to Xenstore."""

    during_outage = False
    """Whether the request was not even sent, because the circuit breaker was open."""


class XenstoreError(StoreError):
    """The store's own reply to one request was an error.

    `name` is the errno name that the store sent, such as `ENOENT` or `EQUOTA`.  It need not be one that
    this system's errno.h has.
    """

    def __init__(self, name: str, request: Request) -> None:
        super().__init__(name, request)
        self.name = name
        self.request = request

    def __str__(self) -> str:
        path = self.request.path.decode("ascii", "backslashreplace")
        op = getattr(self.request.op, "name", self.request.op)
        return f"{self.name}: {op} {path}"


class RequestTimeout(StoreError):
    """No reply came within the time limit.  The store may still carry out the request."""


class ConnectionLost(StoreError):
    """The connection ended before the reply.  Whether a change was carried out is unknown."""

    is_local = False
    """Whether this process has no descriptor left for a connection, which says nothing about Xenstore."""


class TransactionEnded(StoreError):
    """The transaction was committed, rolled back, or lost with its connection."""


class StoreUnavailable(StoreError):
    """Xenstore cannot be reached at all.  `hint` says what the user can do about it."""

    def __init__(self, reason: str, hint: str, *, denied: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.denied = denied
