"""The owner and the modes of the files of a mount.  Xenstore has no users."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from functools import cache


@dataclass(slots=True, frozen=True)
class Ownership:
    """The owner of all files, and the permission bits that are removed from their modes."""

    uid: int
    gid: int
    umask: int

    def mode(self, kind: int, read: bool, write: bool) -> int:
        return _mode(kind, read, write, self.umask)


@cache
def _mode(kind: int, read: bool, write: bool, umask: int) -> int:
    bits = (0o444 if read else 0) | (0o222 if write else 0)
    if kind == stat.S_IFDIR:
        bits |= 0o111
    return kind | (bits & ~umask)
