"""xsfs's own files in the root of a mount: text that is made when it is read, and the mirror's link."""

from __future__ import annotations

import errno
import os
import stat
from abc import abstractmethod

from pyfuse3 import EntryAttributes

from xsfs.fs.nodes import Caller, Handle, Node, refuse


class TextFile(Node):
    """A file whose content is made at each opening."""

    __slots__ = ()

    @abstractmethod
    def content(self) -> bytes:
        """What the file contains now."""

    async def getattr(self) -> EntryAttributes:
        return self.entry(len(self.content()), write=False)

    async def open(self, flags: int, caller: Caller) -> TextHandle:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            refuse(errno.EACCES)
        return TextHandle(self)


class TextHandle(Handle):
    __slots__ = ("_content",)

    node: TextFile

    def __init__(self, node: TextFile) -> None:
        super().__init__(node)
        self._content: bytes | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or self._content is None:
            self._content = self.node.content()
        return self._content[offset : offset + size]


class DomidFile(TextFile):
    """`.domid`: the number of the domain whose rights the mount has."""

    __slots__ = ()

    def content(self) -> bytes:
        return b"%d\n" % self.view.domid


class StatsFile(TextFile):
    """`.stats`: counters, one `name value` a line."""

    __slots__ = ()

    def content(self) -> bytes:
        counters = self.table.counters()
        return "".join(f"{name} {value}\n" for name, value in counters.items()).encode()


class MirrorLink(Node):
    """`.mirror`: a symbolic link to the mirror, which does not exist while the mirror is not current."""

    __slots__ = ()

    kind = stat.S_IFLNK

    async def getattr(self) -> EntryAttributes:
        entry = self.entry(len(await self.readlink()))
        entry.st_mode = stat.S_IFLNK | 0o777
        return entry

    async def readlink(self) -> bytes:
        mirror = self.table.mirror
        if mirror is None or not mirror.is_current:
            refuse(errno.ENOENT)
        return mirror.directory
