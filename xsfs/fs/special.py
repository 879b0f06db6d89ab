"""Files and directories whose content xsfs makes: the bases of all of them, `.domid`, `.stats`, and the
mirror's link."""

from __future__ import annotations

import errno
import os
import stat
from abc import abstractmethod

from pyfuse3 import EntryAttributes

from xsfs.fs.nodes import DIRECTORY_ENTRY_TIMEOUT, Caller, Handle, Node, refuse
from xsfs.view.names import join


class TextFile(Node):
    """A file whose content is generated whenever it is read from the start."""

    __slots__ = ()

    @abstractmethod
    def content(self) -> bytes:
        """The present content of the file."""

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


class GeneratedDirectory(Node):
    """A directory that is no Xenstore node: nobody can make files in it, or rename them."""

    __slots__ = ()

    kind = stat.S_IFDIR
    entry_timeout = DIRECTORY_ENTRY_TIMEOUT

    @property
    def label(self) -> bytes:
        return join(super().label, self.name)

    async def create(
        self, name: bytes, flags: int, caller: Caller
    ) -> tuple[Handle, EntryAttributes]:
        refuse(errno.EPERM)

    async def make_file(self, name: bytes, caller: Caller) -> EntryAttributes:
        refuse(errno.EPERM)

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        refuse(errno.EPERM)

    async def unlink(self, name: bytes) -> None:
        refuse(errno.EPERM)

    async def rmdir(self, name: bytes) -> None:
        refuse(errno.EPERM)

    async def rename(
        self, name: bytes, target: Node, target_name: bytes, flags: int, caller: Caller
    ) -> None:
        refuse(errno.EPERM)


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
