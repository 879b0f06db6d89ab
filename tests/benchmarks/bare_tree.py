"""The least that a tree can be in pyfuse3:
`python3 -m tests.benchmarks.bare_tree SOCKET TOP MOUNTPOINT`.

The names and values of all nodes below TOP, read when it starts.  As in xsfs the kernel looks each file
up each time, and may believe attributes for a tick.  Each lookup, stat and listing asks Xenstore in one
pipeline for what xsfs must know of the node and of the children that are listed.  The replies are only
counted, and the loop of FUSE requests is xsfs's.  That is the floor under every Xenstore file system on
pyfuse3.
"""

from __future__ import annotations

import errno
import stat
import sys

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

from tests.support.xenstored.harness import XsClient
from xsfs.fs.fuse_loop import KernelDescriptor, install
from xsfs.fs.nodes import ATTRIBUTES_TIMEOUT, DIRECTORY_ENTRY_TIMEOUT
from xsfs.xenstore import protocol

from .bare import Least, serve
from .question import Asker, Question


class Node:
    def __init__(self, path: bytes, inode: int) -> None:
        self.path = path
        self.inode = InodeT(inode)
        self.value = b""
        self.children: dict[bytes, Node] = {}


class BareTree(Least):
    def __init__(self, socket: str, top: str) -> None:
        super().__init__()
        self.nodes: dict[int, Node] = {}
        with XsClient(socket) as client:
            self._read(client, top.encode())
        asker = Asker(socket)
        self.states: dict[int, Question] = {}
        self.listings: dict[int, Question] = {}
        for node in self.nodes.values():
            state = protocol.read(node.path), protocol.directory(node.path)
            kinds = [protocol.directory(child.path) for child in node.children.values()]
            self.states[node.inode] = asker.question(state)
            self.listings[node.inode] = asker.question((*state, *kinds))

    def _read(self, client: XsClient, path: bytes) -> Node:
        node = Node(path, ROOT_INODE + len(self.nodes))
        self.nodes[node.inode] = node
        node.value = client.read(path.decode())
        for name in client.ls(path.decode()):
            child = path.rstrip(b"/") + b"/" + name.encode()
            node.children[name.encode()] = self._read(client, child)
        return node

    def attributes(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.inode
        entry.st_mode = stat.S_IFDIR | 0o700 if node.children else stat.S_IFREG | 0o600
        entry.entry_timeout = DIRECTORY_ENTRY_TIMEOUT if node.children else 0
        entry.attr_timeout = ATTRIBUTES_TIMEOUT
        return entry

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        child = self.nodes[parent_inode].children.get(name)
        if child is None:
            raise FUSEError(errno.ENOENT)
        self.states[child.inode].ask()
        return self.attributes(child)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        self.states[inode].ask()
        return self.attributes(self.nodes[inode])

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        self.listings[inode].ask()
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        children = list(self.nodes[fh].children.items())
        for number, (name, child) in enumerate(children[start_id:], start_id):
            if not pyfuse3.readdir_reply(token, name, self.attributes(child), number + 1):
                return

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=FileHandleT(inode), direct_io=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        value = self.nodes[fh].value
        return (value + b"\n" if value else b"")[off : off + size]


def main(socket: str, top: str, mountpoint: str) -> None:
    operations = BareTree(socket, top)
    install(KernelDescriptor())
    serve(operations, mountpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
