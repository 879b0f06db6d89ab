"""The owner and the modes of the files of a mount.  Xenstore has no users."""

from __future__ import annotations

import stat
from typing import NamedTuple


class Ownership(NamedTuple):
    """The owner of all files, and the permission bits that are removed from their modes."""

    uid: int
    gid: int
    umask: int

    def mode(self, kind: int, read: bool, write: bool) -> int:
        """The mode of a file of this kind (S_IFDIR, ...) that this domain may read, and write."""
        if kind == stat.S_IFLNK:
            return kind | 0o777
        bits = (0o444 if read else 0) | (0o222 if write else 0)
        if kind == stat.S_IFDIR:
            bits |= 0o111
        return kind | (bits & ~self.umask)
