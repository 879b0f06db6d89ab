"""The least that a tree can be in pyfuse3 that believes what Xenstore answers:
`python3 -m tests.benchmarks.plain_tree SOCKET TOP MOUNTPOINT`.

It asks what the bare tree asks, in the same order, and is made of the answers: names, which of them
are directories, values.  It is for one program at a time, which only reads, in domain 0, while the
store always answers at once: no rights, transactions, watches, long names, restarts or limits, no
inode that is ever forgotten.  That is the floor under every truthful Xenstore file system in Python.
"""

from __future__ import annotations

import errno
import stat
import sys
from collections.abc import Sequence

import pyfuse3
from pyfuse3 import (
    ROOT_INODE,
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ReaddirToken,
    RequestContext,
)

from xsfs.containers import is_container
from xsfs.node import ATTRIBUTES_TIMEOUT, DIRECTORY_ENTRY_TIMEOUT
from xsfs.session_loop import install
from xsfs.wire import Op

from .bare import Least, serve
from .connection import Connection, message

Answers = Sequence[bytes | None]
"""None: an error."""


class PlainTree(Least):
    connection: Connection

    def __init__(self, top: str) -> None:
        super().__init__()
        self.paths = {ROOT_INODE: top.rstrip("/").encode()}
        """Of / nothing."""
        self.inodes: dict[bytes, int] = {}
        self.listings: dict[int, bytes] = {}
        """What directories had in them when their parents were listed."""
        self.values: dict[int, bytes] = {}
        """Of the files that are open."""
        self.looked_up = (0, b"")
        self.names: list[bytes] = []
        """Of the children of the directory that was opened."""
        self.behind: list[bytes] = []
        """Those that were asked for with it, and whose answers are not read yet."""
        self.children: Answers = ()
        """What they have for children."""
        self.waiter = install()

    def inode(self, path: bytes) -> int:
        inode = self.inodes.get(path)
        if inode is None:
            inode = self.inodes[path] = ROOT_INODE + 1 + len(self.inodes)
            self.paths[inode] = path
        return inode

    def attributes(self, inode: int, value: bytes, *, directory: bool) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(inode)
        entry.st_mode = stat.S_IFDIR | 0o700 if directory else stat.S_IFREG | 0o600
        entry.st_size = len(value) + 1 if value else 0
        entry.entry_timeout = DIRECTORY_ENTRY_TIMEOUT if directory else 0
        entry.attr_timeout = ATTRIBUTES_TIMEOUT
        return entry

    async def ask(self, path: bytes, behind: list[bytes]) -> Answers:
        """A node's value and children; and behind them, not waited for, those of some children."""
        connection = self.connection
        if self.behind:
            connection.replies(len(self.behind))
        connection.send(message(Op.READ, path) + message(Op.DIRECTORY, path))
        self.behind = behind
        if behind:
            connection.send(self.questions(path, behind))
        return connection.replies(2)

    def prepare(self) -> None:
        """Read the latter, in the time that the one who opens takes until he lists."""
        if self.behind and self.behind == self.names:
            self.children = self.connection.replies(len(self.behind))
            self.behind = []

    async def ask_children(self, path: bytes, names: list[bytes]) -> Answers:
        """The same where not all of them were guessed."""
        connection = self.connection
        connection.replies(len(self.behind))
        self.behind = []
        connection.send(self.questions(path, names))
        return connection.replies(len(names))

    def questions(self, path: bytes, names: list[bytes]) -> bytes:
        below = path + b"/"
        return b"".join([message(Op.DIRECTORY, below + name) for name in names])

    async def look(self, inode: int, path: bytes) -> tuple[bytes, EntryAttributes]:
        value, children = await self.ask(path, [])
        if value is None or children is None:
            raise FUSEError(errno.ENOENT)
        directory = bool(children) or (not value and is_container(path))
        return value, self.attributes(inode, value, directory=directory)

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        path = self.paths[parent_inode] + b"/" + name
        inode = self.inode(path)
        value, entry = await self.look(inode, path)
        self.looked_up = inode, value
        return entry

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return (await self.look(inode, self.paths[inode]))[1]

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        guess = self.listings.get(inode)
        names = guess[:-1].split(b"\0") if guess else []
        value, children = await self.ask(self.paths[inode], names)
        if value is None or children is None:
            raise FUSEError(errno.ESTALE)
        self.names = children[:-1].split(b"\0") if children else []
        self.children = ()
        self.waiter.put_off(self.prepare)
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        names = self.names
        if start_id >= len(names):
            return
        path = self.paths[fh]
        below = path + b"/"
        custom = is_container(path or b"/")
        children = self.children
        if len(children) < len(names):
            children = self.children = await self.ask_children(path, names)
        leaf = self.attributes(0, b"", directory=False)
        parent = self.attributes(0, b"", directory=True)
        for number, name in enumerate(names[start_id:], start_id):
            child = children[number]
            if child is None:
                continue
            above = child or (custom and is_container(below + name))
            entry = parent if above else leaf
            entry.st_ino = InodeT(self.inode(below + name))
            if child:
                self.listings[entry.st_ino] = child
            if not pyfuse3.readdir_reply(token, name, entry, number + 1):
                return

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        looked_up, value = self.looked_up
        if looked_up != inode:
            value, _ = await self.look(inode, self.paths[inode])
        self.values[inode] = value + b"\n" if value else b""
        return FileInfo(fh=FileHandleT(inode), direct_io=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self.values[fh][off : off + size]

    async def release(self, fh: FileHandleT) -> None:
        self.values.pop(fh, None)


def main(socket: str, top: str, mountpoint: str) -> None:
    operations = PlainTree(top)
    operations.connection = Connection(socket)
    serve(operations, mountpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
