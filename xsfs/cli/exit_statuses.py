"""What the command's exit status says: one table, for the command, its help and the manual."""

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
    EXIT_BUG: "a bug",
    EXIT_USAGE: "usage",
    EXIT_NO_STORE: "no Xenstore that answers",
    EXIT_DENIED: "no right to use it",
    EXIT_MOUNTPOINT: "unusable mountpoint",
    EXIT_FUSE: "FUSE failed",
    EXIT_MIRROR: "no mirror can be kept",
    EXIT_INTERRUPTED: "ended by a signal before the mount",
}
