"""The least that a file can be in pyfuse3:
`python3 -m tests.benchmarks.bare CONTENT [SOCKET NODE] MOUNTPOINT`.

One file with that content, whatever its name.  As in xsfs the kernel keeps no entry of it, so that
each open begins with a lookup, and reads with direct_io; and there is nothing else.  What opening
it, reading it and closing it takes is the floor under every file system on pyfuse3.

With a Xenstore's socket each lookup asks, and waits for the answer, what xsfs must know: the node's
value and children.  That is the floor under every Xenstore file system on pyfuse3.
"""

from __future__ import annotations

import errno
import stat
import sys
from collections.abc import Sequence
from typing import Final

import pyfuse3
import trio
from pyfuse3 import (
    ROOT_INODE,
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    RequestContext,
)

from xsfs.xenstore import protocol

from .question import Asker, Question

FILE: Final = InodeT(ROOT_INODE + 1)
HANDLE: Final = FileHandleT(1)
OPTIONS: Final = {"fsname=bare", "ro", "nosuid", "nodev", "noexec"}


class Least(pyfuse3.Operations):
    """What is no work where nothing is kept."""

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        pass

    async def flush(self, fh: FileHandleT) -> None:
        # The kernel does not ask again.
        raise FUSEError(errno.ENOSYS)

    async def release(self, fh: FileHandleT) -> None:
        pass

    async def releasedir(self, fh: FileHandleT) -> None:
        pass


class Bare(Least):
    def __init__(self, content: bytes, question: Question | None) -> None:
        super().__init__()
        self.content = content
        self.question = question

    def attributes(self, inode: InodeT) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        if inode == FILE:
            entry.st_mode = stat.S_IFREG | 0o444
            entry.st_size = len(self.content)
        else:
            entry.st_mode = stat.S_IFDIR | 0o555
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        if self.question is not None:
            self.question.ask()
        return self.attributes(FILE)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self.attributes(inode)

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=HANDLE, direct_io=True, keep_cache=False)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self.content[off : off + size]


def serve(operations: pyfuse3.Operations, mountpoint: str) -> None:
    """Mount it, and answer until it is unmounted."""
    pyfuse3.init(operations, mountpoint, OPTIONS)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


def main(content: str, *store: str) -> None:
    *where, mountpoint = store
    question = None
    if where:
        path, node = where[0], where[1].encode()
        question = Asker(path).question((protocol.read(node), protocol.directory(node)))
    serve(Bare(content.encode(), question), mountpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
