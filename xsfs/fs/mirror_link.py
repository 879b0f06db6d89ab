"""`.mirror`: the way from the mount to its live copy."""

from __future__ import annotations

import errno
import stat

from pyfuse3 import EntryAttributes

from xsfs.fs.inodes import Node, refuse


class MirrorLink(Node):
    """A symbolic link, which is not there while the copy can't be true."""

    __slots__ = ()

    kind = stat.S_IFLNK

    async def getattr(self) -> EntryAttributes:
        entry = self.entry(len(await self.readlink()))
        entry.st_mode = stat.S_IFLNK | 0o777
        return entry

    async def readlink(self) -> bytes:
        mirror = self.tree.mirror
        if mirror is None or not mirror.is_current:
            refuse(errno.ENOENT)
        return mirror.directory
