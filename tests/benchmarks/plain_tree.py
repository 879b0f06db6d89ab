"""The least that a tree can be in pyfuse3 that believes what Xenstore answers, and serves several
programs: `python3 -m tests.benchmarks.plain_tree SOCKET TOP MOUNTPOINT`.

It asks what the bare tree asks, in the same order, and is made of the answers: names, which of them
are directories, values.  What is open has a handle, what the kernel forgets goes, and what fails is
an errno.  But it only reads, in domain 0, and while the store does not answer it stands still; there
are no rights, transactions, watches, long names, restarts or limits.  That is the floor under every
truthful Xenstore file system in Python.
"""

from __future__ import annotations

import errno
import stat
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import count

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
from xsfs.fs.prefetched import PREFETCH_MAX, PREFETCH_SECONDS

from xsfs.fs.fuse_loop import install
from xsfs.fs.inodes import ATTRIBUTES_TIMEOUT, DIRECTORY_ENTRY_TIMEOUT
from xsfs.view.kinds import is_container
from xsfs.xenstore.protocol import Op, decode_names

from .bare import Least, serve
from .connection import Asked, Connection

READ, DIRECTORY = int(Op.READ), int(Op.DIRECTORY)

Answers = Sequence[bytes | None]
"""None: an error."""


class Node:
    __slots__ = ("inode", "listing", "lookups", "path")

    def __init__(self, path: bytes, inode: int) -> None:
        self.path = path
        """Of / nothing."""
        self.inode = InodeT(inode)
        self.lookups = 0
        self.listing = b""
        """What it had in it when its parent was listed."""


class OpenDirectory:
    __slots__ = ("behind", "children", "names", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.names: list[bytes] = []
        self.behind: Asked = range(0)
        """What was asked of the children behind the opening, until its answers are taken."""
        self.children: Answers = ()
        """What they have for children."""


def failure(error: Exception) -> FUSEError:
    return error if isinstance(error, FUSEError) else FUSEError(errno.EIO)


def attributes(inode: InodeT, value: bytes, *, directory: bool) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = inode
    entry.st_mode = stat.S_IFDIR | 0o700 if directory else stat.S_IFREG | 0o600
    entry.st_size = len(value) + 1 if value else 0
    entry.entry_timeout = DIRECTORY_ENTRY_TIMEOUT if directory else 0
    entry.attr_timeout = ATTRIBUTES_TIMEOUT
    return entry


LEAF = attributes(InodeT(0), b"", directory=False)
PARENT = attributes(InodeT(0), b"", directory=True)


class PlainTree(Least):
    connection: Connection

    def __init__(self, top: str) -> None:
        super().__init__()
        root = Node(top.rstrip("/").encode(), ROOT_INODE)
        self.nodes = {root.inode: root}
        self.by_path = {root.path: root}
        self.inodes = count(ROOT_INODE + 1)
        self.files: dict[int, bytes] = {}
        """The contents of those that are open."""
        self.directories: dict[int, OpenDirectory] = {}
        self.handles = count(1)
        self.ready: dict[int, tuple[InodeT, bytes, float]] = {}
        """What LOOKUPs have found for the OPEN of the same thread: the inode, the value, until when."""
        self.waiter = install()

    # ------------------------------------------------------------------------- what the store is asked

    async def ask(self, path: bytes) -> Answers:
        """A node's value and children."""
        return self.connection.replies(self.connection.ask(((READ, path), (DIRECTORY, path))))

    async def ask_and(self, opened: OpenDirectory, names: list[bytes]) -> Answers:
        """The same; and behind it, not waited for, the children of some children."""
        path = opened.node.path
        asked = self.connection.ask(((READ, path), (DIRECTORY, path)))
        if names:
            opened.behind = self.connection.ask([(DIRECTORY, b"%s/%s" % (path, n)) for n in names])
        return self.connection.replies(asked)

    def take(self, opened: OpenDirectory) -> None:
        """Read the latter's answers, in the time that the one who opens takes until he lists."""
        behind, opened.behind = opened.behind, range(0)
        opened.children = self.connection.replies(behind)

    async def ask_children(self, path: bytes, names: list[bytes]) -> Answers:
        """The children of a node's children."""
        asked = self.connection.ask([(DIRECTORY, b"%s/%s" % (path, name)) for name in names])
        return self.connection.replies(asked)

    # -------------------------------------------------------------------------------------- inodes

    def node(self, path: bytes) -> Node:
        return self.by_path.get(path) or Node(path, next(self.inodes))

    def remember(self, node: Node) -> None:
        node.lookups += 1
        self.nodes[node.inode] = self.by_path[node.path] = node

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            node = self.nodes[inode]
            node.lookups -= lookups
            if node.lookups <= 0 and inode != ROOT_INODE:
                del self.nodes[inode], self.by_path[node.path]

    async def look(self, path: bytes, missing: int) -> tuple[Node, bytes, EntryAttributes]:
        value, children = await self.ask(path)
        if value is None or children is None:
            raise FUSEError(missing)
        node = self.node(path)
        directory = bool(children) or (not value and is_container(path))
        return node, value, attributes(node.inode, value, directory=directory)

    # ---------------------------------------------------------------------------------- operations

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        try:
            path = b"%s/%s" % (self.nodes[parent_inode].path, name)
            node, value, entry = await self.look(path, errno.ENOENT)
            self.remember(node)
            self.ready[ctx.pid] = node.inode, value, time.monotonic() + PREFETCH_SECONDS
            if len(self.ready) > PREFETCH_MAX:
                del self.ready[next(iter(self.ready))]
            return entry
        except Exception as error:
            raise failure(error) from None

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        try:
            return (await self.look(self.nodes[inode].path, errno.ESTALE))[2]
        except Exception as error:
            raise failure(error) from None

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        try:
            opened = OpenDirectory(self.nodes[inode])
            guess = decode_names(opened.node.listing)
            value, children = await self.ask_and(opened, guess)
            if value is None or children is None:
                raise FUSEError(errno.ESTALE)
            opened.names = decode_names(children)
            if guess and guess == opened.names:
                self.waiter.put_off(partial(self.take, opened))
            elif guess:
                self.take(opened)
                opened.children = ()
            fh = next(self.handles)
            self.directories[fh] = opened
            return FileHandleT(fh)
        except Exception as error:
            raise failure(error) from None

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        try:
            opened = self.directories[fh]
            names = opened.names
            if start_id >= len(names):
                return
            path = opened.node.path
            children = opened.children
            if len(children) < len(names):
                children = opened.children = await self.ask_children(path, names)
            custom = is_container(path or b"/")
            for number, name in enumerate(names[start_id:], start_id):
                child = children[number]
                if child is None:
                    continue
                node = self.node(b"%s/%s" % (path, name))
                node.listing = child
                entry = PARENT if child or (custom and is_container(node.path)) else LEAF
                entry.st_ino = node.inode
                if not pyfuse3.readdir_reply(token, name, entry, number + 1):
                    return
                self.remember(node)
        except Exception as error:
            raise failure(error) from None

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        try:
            looked_up, value, until = self.ready.pop(ctx.pid, (None, b"", 0.0))
            if looked_up != inode or until < time.monotonic():
                _, value, _ = await self.look(self.nodes[inode].path, errno.ESTALE)
            fh = next(self.handles)
            self.files[fh] = value + b"\n" if value else b""
            return FileInfo(fh=FileHandleT(fh), direct_io=True)
        except Exception as error:
            raise failure(error) from None

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        try:
            return self.files[fh][off : off + size]
        except Exception as error:
            raise failure(error) from None

    async def release(self, fh: FileHandleT) -> None:
        self.files.pop(fh, None)

    async def releasedir(self, fh: FileHandleT) -> None:
        self.directories.pop(fh, None)


def main(socket: str, top: str, mountpoint: str) -> None:
    operations = PlainTree(top)
    operations.connection = Connection(socket)
    serve(operations, mountpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
