"""The mount's own files, whose content is made when they are read."""

from __future__ import annotations

import errno
import os
from abc import abstractmethod

from pyfuse3 import EntryAttributes

from xsfs.fs.inodes import Caller, Handle, Node, refuse


class TextFile(Node):
    """A file of the mount's own, whose content is made anew at each opening."""

    __slots__ = ()

    @abstractmethod
    def content(self) -> bytes:
        """What the file holds now."""

    async def getattr(self) -> EntryAttributes:
        return self.entry(len(self.content()), write=False)

    async def open(self, flags: int, caller: Caller) -> TextHandle:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            refuse(errno.EACCES)
        return TextHandle(self)


class TextHandle(Handle):
    __slots__ = ("content",)

    node: TextFile

    def __init__(self, node: TextFile) -> None:
        super().__init__(node)
        self.content: bytes | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or self.content is None:
            self.content = self.node.content()
        return self.content[offset : offset + size]


class DomidFile(TextFile):
    """`.domid`: the number of the domain whose rights the mount has."""

    __slots__ = ()

    def content(self) -> bytes:
        return b"%d\n" % self.view.domid


class StatsFile(TextFile):
    """`.stats`: which store this is, and counters, one `name value` a line."""

    __slots__ = ()

    def content(self) -> bytes:
        counters = self.tree.counters()
        return os.fsencode("".join(f"{name} {value}\n" for name, value in counters.items()))
