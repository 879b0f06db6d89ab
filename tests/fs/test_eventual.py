"""Ring: the operations in process, over both daemons: what is answered at once, and what late.

The daemons are behind a store that lies, since whether an answer is there at once is a question of
microseconds.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import CoroutineType
from typing import TypeVar, cast

import pyfuse3
import pytest
import trio
from pyfuse3 import EntryAttributes, FUSEError
from trio.testing import trio_test, wait_all_tasks_blocked
from xsfs.xenstore.eventual import Eventual, result_of

from tests.support.lying_store import LyingStore
from tests.support.operating import RDONLY, ROOT, ctx, operations_on
from tests.support.xenstored.harness import DAEMONS, RealXenstored
from tests.xenstore.test_behind import LIMIT, Held, opened
from xsfs.fs.files import ReadHandle
from xsfs.fs.inodes import Handle, Node
from xsfs.fs.listing import DirectoryHandle
from xsfs.fs.operations import Operations
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT
from xsfs.view.view import View
from xsfs.xenstore import connection as module
from xsfs.xenstore.background import open_background
from xsfs.xenstore.store import Store

R = TypeVar("R")

TOKEN = cast(pyfuse3.ReaddirToken, None)
LEAVES = (b"a", b"b", b"c")


@pytest.fixture(scope="module", params=sorted(DAEMONS))
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon:
        with daemon.client() as dom0:
            for name in LEAVES:
                dom0.write(f"/top/{name.decode()}", "value")
        yield daemon


@pytest.fixture
def liar(daemon: RealXenstored, tmp_path: Path) -> Iterator[LyingStore]:
    with LyingStore(tmp_path / "sock", daemon.socket) as liar:
        yield liar


@asynccontextmanager
async def operating(liar: LyingStore) -> AsyncIterator[tuple[Operations, Store]]:
    async with opened(liar) as store, open_background() as nursery:
        yield operations_on(View(store, 0, b"/top", TEXT, StickyDirectories()), nursery), store


async def at_once(store: Store, ask: Callable[[], Eventual[R]]) -> R:
    """What is told without a coroutine, by a daemon that is quick, if not each time."""
    while True:
        assert store._link.connection is not None
        store._link.connection._skip_prompt = store._link.connection._skips = 0
        answer = ask()
        if type(answer) is not CoroutineType:
            return await result_of(answer)
        await answer


def root_of(operations: Operations) -> Node:
    return operations.tree.get(ROOT)


@trio_test
async def test_a_quick_store_is_asked_without_coroutines(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROMPT_SECONDS", LIMIT)
    names: list[bytes] = []

    def reply(token: object, name: bytes, entry: EntryAttributes, next_id: int) -> bool:
        names.append(name)
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    async with operating(liar) as (operations, store):
        root = root_of(operations)
        entry = await at_once(store, lambda: root.lookup(b"a", 1))
        assert entry.st_size == len(b"value\n")
        info = await operations.open(entry.st_ino, RDONLY, ctx())
        handle = operations._handles.get(info.fh)
        assert handle.read(0, 100) == b"value\n"
        assert handle.read(6, 100) == b""
        assert handle.release() is None

        directory = await at_once(store, root.opendir)
        directory.prepare()
        await result_of(directory.readdir(0, TOKEN))
        assert sorted(names) == sorted((b".", b"..", *LEAVES))
        # Its children are known by now: they are asked for together with it.
        reading: Eventual[None] = result_of(None)
        while reading is not None:
            await reading
            names.clear()
            directory = await at_once(store, root.opendir)
            directory.prepare()
            reading = directory.readdir(0, TOKEN)
        assert sorted(names) == sorted((b".", b"..", *LEAVES))
        assert directory.release() is None


@trio_test
async def test_what_comes_late_is_the_same(liar: LyingStore) -> None:
    async with operating(liar) as (operations, _):
        root = root_of(operations)
        held = liar.lie = Held(b"/top/a")
        answer = root.lookup(b"a", 1)
        assert type(answer) is CoroutineType
        entries: list[EntryAttributes] = []

        async def wait() -> None:
            entries.append(await result_of(answer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert entries == []
            held.let_go()
        assert entries[0].st_size == len(b"value\n")
        handle = operations.tree.prefetched.take(1, entries[0].st_ino)
        assert isinstance(handle, ReadHandle)
        assert handle.read(0, 100) == b"value\n"


@trio_test
async def test_a_directory_that_comes_late_is_the_same(liar: LyingStore) -> None:
    async with operating(liar) as (operations, _):
        root = root_of(operations)
        held = liar.lie = Held(b"/top")
        answer = root.opendir()
        assert type(answer) is CoroutineType
        handles: list[Handle] = []

        async def wait() -> None:
            handles.append(await result_of(answer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert handles == []
            held.let_go()
        (handle,) = handles
        assert isinstance(handle, DirectoryHandle)
        assert handle.look.has_children
        handle.prepare()
        assert sorted(handle.entries) == sorted(LEAVES)


@trio_test
async def test_only_what_is_waited_for_is_under_way(liar: LyingStore) -> None:
    """Nobody lingers for the kernel while a reply would have to wait for it."""
    async with operating(liar) as (operations, _):
        held = liar.lie = Held(b"/top/a")
        answered = operations.answered
        async with trio.open_nursery() as nursery:
            nursery.start_soon(operations.lookup, ROOT, b"a", ctx())
            await wait_all_tasks_blocked()
            held.arrived()
            assert operations.waiter.under_way == 1
            held.let_go()
        assert operations.waiter.under_way == 0
        with pytest.raises(FUSEError) as refused:
            await operations.read(pyfuse3.FileHandleT(4711), 0, 1)
        assert refused.value.errno == errno.EIO
        assert operations.waiter.under_way == 0
        assert operations.answered == answered + 2


@trio_test
async def test_a_result_is_itself() -> None:
    async def later() -> bytes:
        await trio.lowlevel.checkpoint()
        return b"result"

    assert await result_of(b"result") == b"result"
    assert await result_of(later()) == b"result"
