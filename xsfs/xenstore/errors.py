"""What a client of Xenstore can meet.  Only the file system turns these into errno."""

from __future__ import annotations

from typing import Final

from xsfs.xenstore.protocol import Request

DEFAULT_TIMEOUT: Final = 10.0
"""The time limit of a request, in seconds, where nobody names another."""


class StoreError(Exception):
    """Any failure of a request to Xenstore."""

    asked = True
    """False: it was not even tried, during an outage that others have met."""


class XenstoreError(StoreError):
    """The store's own verdict on one request: an ERROR reply.

    `name` is the errno name that it sent, such as `ENOENT` or `EQUOTA`; it need not be one that
    this system's errno.h has.
    """

    def __init__(self, name: str, request: Request) -> None:
        super().__init__(name, request)
        self.name = name
        self.request = request

    def __str__(self) -> str:
        path = self.request.path.decode("ascii", "backslashreplace")
        return f"{self.name}: {self.request.op.name} {path}"


class RequestTimeout(StoreError):
    """No reply came within the time limit.  What was asked may still be carried out."""


class ConnectionLost(StoreError):
    """The connection ended before the reply.  Whether a change was carried out is unknown."""


class TransactionEnded(StoreError):
    """The transaction was committed, rolled back, or lost with its connection."""


class StoreUnavailable(StoreError):
    """Xenstore cannot be reached at all.  `hint` says what the user can do about it."""

    def __init__(self, reason: str, hint: str, *, denied: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.denied = denied
