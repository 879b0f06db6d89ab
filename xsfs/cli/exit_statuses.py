"""The exit statuses of the command `xsfs`, and the error that carries one of them."""

from __future__ import annotations

from typing import Final

EXIT_MOUNTED: Final = 0
EXIT_BUG: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_STORE: Final = 3
EXIT_DENIED: Final = 4
EXIT_MOUNTPOINT: Final = 5
EXIT_FUSE: Final = 6
EXIT_MIRROR: Final = 7
EXIT_INTERRUPTED: Final = 8

STATUSES: Final = {
    EXIT_MOUNTED: "mounted",
    EXIT_BUG: "internal error",
    EXIT_USAGE: "usage error",
    EXIT_NO_STORE: "cannot reach Xenstore",
    EXIT_DENIED: "permission denied",
    EXIT_MOUNTPOINT: "unusable mountpoint",
    EXIT_FUSE: "FUSE failed",
    EXIT_MIRROR: "mirror failed",
    EXIT_INTERRUPTED: "interrupted before the mount",
}


class MountError(Exception):
    """Nothing can be mounted.  The text is one line: the reason, and a hint in brackets.

    status      the exit status of the command
    """

    def __init__(self, status: int, reason: str, hint: str) -> None:
        super().__init__(f"{reason} ({hint})")
        self.status = status
