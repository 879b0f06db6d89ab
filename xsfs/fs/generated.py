"""Generated files, directories and links: their bases, and `.domid`, `.stats` and `.mirror`."""

from __future__ import annotations

import errno
import os
import stat
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError

from xsfs.fs.nodes import DIRECTORY_ENTRY_TIMEOUT, Caller, Handle, Node, refuse
from xsfs.view.names import NAME_MAX


async def look_up(kind: type[Node], parent: Node, name: bytes, pid: int) -> EntryAttributes:
    """A LOOKUP of a name that xsfs itself gives to a node."""
    table = parent.table
    entry = await table.node(kind, parent, name).looked_up(pid)
    node = table.node(kind, parent, name)  # another task may have created it meanwhile
    entry.st_ino = node.inode
    table.remember(node)
    return entry


class TextFile(Node):
    """A file whose content is generated whenever it is read from the start."""

    writable: ClassVar[bool] = False

    @abstractmethod
    def content(self) -> bytes:
        """The present content of the file."""

    async def accept(self, data: bytes) -> None:
        """Something is written to the file, which is `writable`."""

    async def getattr(self) -> EntryAttributes:
        return self.entry(len(self.content()), write=self.writable)

    async def truncate(self, size: int) -> None:
        """A shell truncates before it writes."""
        if not self.writable:
            refuse(errno.EACCES)

    async def open(self, flags: int, caller: Caller) -> TextHandle:
        if flags & os.O_ACCMODE != os.O_RDONLY and not self.writable:
            refuse(errno.EACCES)
        return TextHandle(self)


class TextHandle(Handle):
    node: TextFile
    _content: bytes | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or self._content is None:
            self._content = self.node.content()
        return self._content[offset : offset + size]

    async def truncate(self, size: int) -> None:
        await self.node.truncate(size)

    async def write(self, offset: int, data: bytes) -> int:
        await self.node.accept(data)
        return len(data)


class GeneratedDirectory(Node):
    """A directory that is no Xenstore node: nobody can make files in it, or rename them.

    child_kind  what its children are; one that does not exist cannot be made, or has no attributes
    """

    kind = stat.S_IFDIR
    entry_timeout = DIRECTORY_ENTRY_TIMEOUT
    writable: ClassVar[bool] = False
    child_kind: ClassVar[type[Node]]

    @abstractmethod
    async def names(self) -> Sequence[bytes]:
        """The present names of the children."""

    async def getattr(self) -> EntryAttributes:
        return self.entry(0, write=self.writable)

    async def lookup(self, name: bytes, pid: int) -> EntryAttributes:
        if len(name) > NAME_MAX:
            refuse(errno.ENAMETOOLONG)
        return await look_up(self.child_kind, self, name, pid)

    async def opendir(self, caller: Caller) -> Handle:
        return GeneratedDirectoryHandle(self)


class GeneratedDirectoryHandle(Handle):
    """The names that existed when the directory was last read from its start."""

    node: GeneratedDirectory
    _names: Sequence[bytes] = ()

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        directory, table = self.node, self.node.table
        if start == 0:
            self._names = (b".", b"..", *await directory.names())
        for next_id, name in enumerate(self._names[start:], start + 1):
            node: Node = directory
            if next_id > 2:  # after `.` and `..`
                try:
                    node = table.node(directory.child_kind, directory, name)
                except FUSEError:
                    continue  # it has vanished meanwhile
            entry = node.entry(0)
            entry.attr_timeout = 0  # the kernel asks before a program sees the size
            if not pyfuse3.readdir_reply(token, name, entry, next_id):
                return
            if node is not directory:
                table.remember(node)


class SymbolicLink(Node):
    """A symbolic link whose target xsfs makes.  Its `readlink` fails with ENOENT if there is none."""

    kind = stat.S_IFLNK

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
