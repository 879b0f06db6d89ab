"""Contents in memory: of scratch files, and of files that were removed or replaced while they are open.

vim, rsync, patch, `sed -i.bak` and many others make a file of another name first and then rename it.
Xenstore cannot hold these names (see view.names.is_scratch_name), so xsfs keeps these *scratch files* in
memory.  Their number and bytes are bounded for the mount, and for each unprivileged user.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

FILE_MAX: Final = 1 << 20
"""The size of one file, in bytes.  vim's swap file of a value has some 12 KiB."""

FILES_MAX: Final = 1024
BYTES_MAX: Final = 64 << 20
"""The scratch files of one mount together."""

EACH_UNPRIVILEGED_FILES_MAX: Final = FILES_MAX // 8
EACH_UNPRIVILEGED_BYTES_MAX: Final = BYTES_MAX // 8
"""The scratch files of one user who is neither root nor the mounting user."""


@dataclass(slots=True, eq=False)
class MemoryContent:
    """The content of a file that is not in the store, and its attributes.

    perms       a reply to GET_PERMS; None if they are unknown, or were never set
    size_max    in bytes
    owner       the user whose share it takes; None for root and the mounting user
    mode        the permission bits that chmod(2) has set; None before
    """

    data: bytes = b""
    perms: bytes | None = None
    size_max: int = FILE_MAX
    owner: int | None = None
    mode: int | None = None
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    ctime_ns: int = field(default_factory=time.time_ns)

    def write(self, data: bytes) -> None:
        self.data = data
        self.mtime_ns = self.ctime_ns = time.time_ns()

    def set_mode(self, mode: int) -> None:
        self.mode = mode
        self.ctime_ns = time.time_ns()

    def set_times(self, atime_ns: int | None, mtime_ns: int | None) -> None:
        self.atime_ns = self.atime_ns if atime_ns is None else atime_ns
        self.mtime_ns = self.mtime_ns if mtime_ns is None else mtime_ns
        self.ctime_ns = time.time_ns()

    def set_perms(self, perms: bytes | None) -> None:
        self.perms = perms
        self.ctime_ns = time.time_ns()


def shortage(others: Collection[MemoryContent], owner: int | None, size: int) -> int:
    """The errno if a scratch file of `size` bytes has no room beside the others; 0 if it has."""
    sizes = [len(each.data) for each in others]
    if len(sizes) >= FILES_MAX or sum(sizes) + size > BYTES_MAX:
        return errno.ENOSPC
    if owner is not None:
        sizes = [len(each.data) for each in others if each.owner == owner]
        is_full = len(sizes) >= EACH_UNPRIVILEGED_FILES_MAX
        if is_full or sum(sizes) + size > EACH_UNPRIVILEGED_BYTES_MAX:
            return errno.EDQUOT
    return 0
