"""The operations in process, over the embedded store, without a kernel."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pyfuse3
import pytest
import trio
from pyfuse3 import FUSEError, RequestContext

from xsfs.embedded.server import EmbeddedStore
from xsfs.fs.inodes import InodeTable
from xsfs.fs.operations import Operations
from xsfs.fs.transaction_dirs import MountRoot
from xsfs.fs.transactions import Transactions
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT
from xsfs.view.ownership import Ownership
from xsfs.view.view import View
from xsfs.xenstore.background import open_background
from xsfs.xenstore.store import Store, open_store
from xsfs.xenstore.transport import SocketTransport

ROOT = pyfuse3.ROOT_INODE
LIMIT = 60.0
IDLE_SECONDS = 60.0
RDONLY, WRONLY, RDWR, TRUNC, APPEND, EXCL = (
    os.O_RDONLY,
    os.O_WRONLY,
    os.O_RDWR,
    os.O_TRUNC,
    os.O_APPEND,
    os.O_EXCL,
)


def ctx(pid: int = 1, uid: int = 0) -> RequestContext:
    return cast(RequestContext, SimpleNamespace(pid=pid, uid=uid, gid=uid, umask=0))


class World:
    """Operations over a store of their own."""

    def __init__(
        self, embedded: EmbeddedStore, operations: Operations, store: Store, view: View
    ) -> None:
        self.embedded = embedded
        self.operations = operations
        self.store = store
        self.view = view
        self.table = operations.table

    async def lookup(self, *names: bytes, pid: int = 1) -> pyfuse3.EntryAttributes:
        inode = ROOT
        for name in names:
            entry = await self.operations.lookup(inode, name, ctx(pid))
            inode = entry.st_ino
        return entry

    def connect_as(self, domid: int) -> Callable[[], SocketTransport]:
        """How a domain connects to the same store."""
        return lambda: SocketTransport(self.embedded.connect(domid), same_loop=True)

    @asynccontextmanager
    async def looking_up(
        self, directory: pyfuse3.EntryAttributes, name: bytes
    ) -> AsyncIterator[list[pyfuse3.EntryAttributes]]:
        """Another thread's LOOKUP: the block runs while the store has not replied yet.  The attributes that
        the thread gets are in the list after the block."""
        entries: list[pyfuse3.EntryAttributes] = []
        connection = self.store._main.current
        assert connection is not None

        async def look() -> None:
            entries.append(await self.operations.lookup(directory.st_ino, name, ctx(2)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            while not connection._in_flight:
                await trio.lowlevel.checkpoint()
            yield entries

    async def costs(self, action: Callable[[], Awaitable[Any]]) -> int:
        """How many requests the action sends to the store."""
        before = self.store.requests
        await action()
        return self.store.requests - before


def operations_on(view: View, nursery: trio.Nursery) -> Operations:
    """Those of a mount that shows this."""
    table = InodeTable(Ownership(0, 0, 0o077), lambda: {"requests": view.store.requests})
    table.add_root(MountRoot(table, view, Transactions(nursery, view, IDLE_SECONDS)))
    return Operations(table, view.store.drop_connection)


@asynccontextmanager
async def world(domid: int = 0) -> AsyncIterator[World]:
    async with open_background() as nursery:
        embedded = EmbeddedStore(nursery)

        def connect() -> SocketTransport:
            return SocketTransport(embedded.connect(domid), same_loop=True)

        async with open_store(connect=connect) as store:
            view = View(store, domid, b"/local/domain/%d" % domid, TEXT, StickyDirectories())
            yield World(embedded, operations_on(view, nursery), store, view)


Test = Callable[[World], Awaitable[None]]


def in_world_of(domid: int) -> Callable[[Test], Callable[[], None]]:
    """A test of operations that are a domain's."""

    def decorate(test: Test) -> Callable[[], None]:
        @wraps(test)
        def run() -> None:
            async def bounded() -> None:
                with trio.fail_after(LIMIT):
                    async with world(domid) as a_world:
                        await test(a_world)

            trio.run(bounded)

        # pytest would take the argument for a fixture.
        del run.__wrapped__
        return run

    return decorate


in_world = in_world_of(0)


async def refused(number: int, operation: Awaitable[object]) -> None:
    with pytest.raises(FUSEError) as caught:
        await operation
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


async def listed(w: World, fh: pyfuse3.FileHandleT, start: int = 0) -> dict[bytes, bool]:
    """The names that reading the directory gives from there on, and whether each is a directory."""
    entries = await entries_of(w, fh, start)
    return {name: stat.S_ISDIR(entry.mode) for name, entry in entries.items()}


class Entry(NamedTuple):
    """The reply to the kernel about a name in a directory."""

    inode: int
    mode: int
    timeout: float
    next_id: int


async def entries_of(
    w: World, fh: pyfuse3.FileHandleT, start: int = 0, most: int = 1_000_000
) -> dict[bytes, Entry]:
    """The names and the whole replies to the kernel, `most` of them at most.

    Like the kernel, it goes on after the last entry until a reply is empty or full.
    """
    entries: dict[bytes, Entry] = {}
    is_full = False

    def reply(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        nonlocal is_full
        is_full = len(entries) == most
        if is_full:
            return False
        entries[name] = Entry(entry.st_ino, entry.st_mode, entry.entry_timeout, next_id)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyfuse3, "readdir_reply", reply)
        while not is_full:
            before = len(entries)
            await w.operations.readdir(fh, start, cast(Any, None))
            if len(entries) == before:
                break
            start = list(entries.values())[-1].next_id
    return entries
