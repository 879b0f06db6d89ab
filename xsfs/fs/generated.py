"""Generated files, directories and links: their bases, and `.domid`, `.stats` and `.mirror`."""

from __future__ import annotations

import errno
import os
import stat
from abc import abstractmethod
from typing import ClassVar

import pyfuse3
from pyfuse3 import EntryAttributes, InodeT

from xsfs.fs.nodes import DIRECTORY_ENTRY_TIMEOUT, Caller, Handle, Node, refuse


async def look_up(kind: type[Node], parent: Node, name: bytes, pid: int) -> EntryAttributes:
    """A LOOKUP of a name that xsfs itself gives to a node."""
    table = parent.table
    entry = await table.node(kind, parent, name).looked_up(pid)
    node = table.node(kind, parent, name)  # another task may have created it meanwhile
    entry.st_ino = InodeT(node.inode)
    table.remember(node)
    return entry


class TextFile(Node):
    """A file whose content is generated whenever it is read from the start."""

    writable: ClassVar[bool] = False

    @abstractmethod
    def content(self) -> bytes:
        """The present content of the file."""

    async def getattr(self) -> EntryAttributes:
        return self.entry(len(self.content()), write=self.writable)

    async def open(self, flags: int, caller: Caller) -> TextHandle:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            refuse(errno.EACCES)
        return TextHandle(self)


class TextHandle(Handle):
    node: TextFile

    def __init__(self, node: TextFile) -> None:
        super().__init__(node)
        self._content: bytes | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or self._content is None:
            self._content = self.node.content()
        return self._content[offset : offset + size]


class GeneratedDirectory(Node):
    """A directory that is no Xenstore node: nobody can make files in it, or rename them."""

    kind = stat.S_IFDIR
    entry_timeout = DIRECTORY_ENTRY_TIMEOUT
    writable: ClassVar[bool] = False

    @abstractmethod
    async def children(self) -> list[tuple[bytes, int]]:
        """The present names, and the sizes of their files."""

    @abstractmethod
    def child(self, name: bytes) -> Node | None:
        """The node of a name from `children`; None if it has vanished meanwhile."""

    async def getattr(self) -> EntryAttributes:
        return self.entry(0, write=self.writable)

    async def opendir(self, caller: Caller) -> Handle:
        return GeneratedDirectoryHandle(self)


class GeneratedDirectoryHandle(Handle):
    """The names that existed when the directory was last read from its start."""

    node: GeneratedDirectory

    def __init__(self, node: GeneratedDirectory) -> None:
        super().__init__(node)
        self._children: list[tuple[bytes, int]] = []

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        if start == 0:
            self._children = [(b".", 0), (b"..", 0), *await self.node.children()]
        for position in range(start, len(self._children)):
            name, size = self._children[position]
            node = self.node if position < 2 else self.node.child(name)
            if node is None:
                continue
            if not pyfuse3.readdir_reply(token, name, node.entry(size), position + 1):
                return
            if node is not self.node:
                node.table.remember(node)


class SymbolicLink(Node):
    """A symbolic link whose target xsfs makes."""

    kind = stat.S_IFLNK

    @abstractmethod
    async def readlink(self) -> bytes:
        """The present target.  Fails with ENOENT if there is none."""

    async def getattr(self) -> EntryAttributes:
        return self.entry(len(await self.readlink()))


class DomidFile(TextFile):
    """`.domid`: the number of the domain whose rights the mount has."""

    def content(self) -> bytes:
        return b"%d\n" % self.view.domid


class StatsFile(TextFile):
    """`.stats`: counters, one `name value` a line."""

    def content(self) -> bytes:
        counters = self.table.counters()
        return "".join(f"{name} {value}\n" for name, value in counters.items()).encode()


class MirrorLink(SymbolicLink):
    """`.mirror`: a symbolic link to the mirror, which does not exist while the mirror is not current."""

    async def readlink(self) -> bytes:
        mirror = self.table.mirror
        if mirror is None or not mirror.is_current:
            refuse(errno.ENOENT)
        return mirror.directory
