"""The operations in process, over both daemons: replies that come late, and replies that would do harm."""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pyfuse3
import pytest
import trio
from pyfuse3 import EntryAttributes, FUSEError
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.support.lying_store import HangUp, LyingStore, Talk, on, says
from tests.support.messages import Message
from tests.support.operating import EXCL, RDONLY, ROOT, WRONLY, ctx, operations_on
from tests.support.xenstored.harness import DAEMONS, RealXenstored
from xsfs.fs import inodes
from xsfs.fs.operations import Operations
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT
from xsfs.view.view import View
from xsfs.xenstore.background import open_background
from xsfs.xenstore.protocol import Op, encode
from xsfs.xenstore.store import Store, open_store

LIMIT = 60.0
LEAVES = (b"a", b"b", b"c")


@pytest.fixture(scope="module", params=sorted(DAEMONS))
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon:
        yield daemon


@pytest.fixture
def liar(daemon: RealXenstored, tmp_path: Path) -> Iterator[LyingStore]:
    with daemon.client() as dom0:
        for name in LEAVES:
            dom0.write(f"/top/{name.decode()}", "value")
    with LyingStore(tmp_path / "sock", daemon.socket) as liar:
        yield liar


@asynccontextmanager
async def operating(liar: LyingStore) -> AsyncIterator[tuple[Operations, Store]]:
    with trio.fail_after(LIMIT):
        async with open_store(liar.path, timeout=LIMIT) as store, open_background() as nursery:
            view = View(store, 0, b"/top", TEXT, StickyDirectories())
            yield operations_on(view, nursery), store


class Held:
    """A lie that keeps the requests for one path back until `let_go`, and relays all others."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._held: list[tuple[Talk, Message]] = []
        self._arrived = threading.Semaphore(0)

    def __call__(self, talk: Talk, request: Message) -> bool:
        if not request.payload.startswith(self._path + b"\0"):
            return False
        self._held.append((talk, request))
        self._arrived.release()
        return True

    async def arrived(self, count: int = 1) -> None:
        """Return when so many are held."""
        while len(self._held) < count:
            assert await trio.to_thread.run_sync(self._arrived.acquire, True, LIMIT)

    async def let_go(self) -> None:
        await self.arrived()
        for talk, request in self._held:
            talk.upstream.sendall(encode(*request))


@trio_test
async def test_a_late_reply_to_a_lookup_is_as_good_as_an_early_one(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inodes, "HANDOVER_SECONDS", LIMIT)  # however busy the machine is
    async with operating(liar) as (operations, store):
        early = await operations.lookup(ROOT, b"a", ctx(7))
        held = liar.lie = Held(b"/top/a")
        entries: list[EntryAttributes] = []

        async def wait() -> None:
            entries.append(await operations.lookup(ROOT, b"a", ctx(1)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await held.arrived()
            await wait_all_tasks_blocked()
            assert entries == []
            await held.let_go()
        liar.behave()
        assert entries[0].st_size == early.st_size == len(b"value\n")
        assert entries[0].st_ino == early.st_ino
        before = store.requests
        info = await operations.open(entries[0].st_ino, RDONLY, ctx(1))
        assert await operations.read(info.fh, 0, 100) == b"value\n"
        assert store.requests == before, "the value is handed over as after an early reply"


@trio_test
async def test_a_late_reply_to_a_listing_is_as_good_as_an_early_one(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[bytes] = []

    def reply(token: object, name: bytes, entry: EntryAttributes, next_id: int) -> bool:
        names.append(name)
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    async with operating(liar) as (operations, _):
        for late in (False, True, True):  # from the second on, with hints
            held = Held(b"/top")
            handles: list[pyfuse3.FileHandleT] = []

            async def wait(handles: list[pyfuse3.FileHandleT]) -> None:
                handles.append(await operations.opendir(ROOT, ctx()))

            async with trio.open_nursery() as nursery:
                if late:
                    liar.lie = held
                nursery.start_soon(wait, handles)
                if late:
                    await held.arrived()
                    await wait_all_tasks_blocked()
                    assert handles == []
                    await held.let_go()
            liar.behave()
            names.clear()
            await operations.readdir(handles[0], 0, cast(Any, None))
            assert sorted(names) == sorted((b".", b"..", *LEAVES))
            await operations.releasedir(handles[0])
            await operations.getattr(ROOT, ctx())


@trio_test
async def test_a_name_that_is_looked_up_while_it_is_listed_is_one_node(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda token, name, entry, next_id: True)
    async with operating(liar) as (operations, store):
        await store.write("/top", b"value of the directory")
        fh = await operations.opendir(ROOT, ctx())
        held = liar.lie = Held(b"/top")
        entries: list[EntryAttributes] = []

        async def look_up() -> None:
            entries.append(await operations.lookup(ROOT, b".value", ctx()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_up)
            await held.arrived()
            await operations.readdir(fh, 0, cast(Any, None))
            assert entries == []
            await held.let_go()
            liar.behave()
        node = operations.table.peek(entries[0].st_ino)
        assert node is not None
        assert node.lookups == 2


@trio_test
async def test_only_requests_that_wait_are_under_way(liar: LyingStore) -> None:
    """No worker polls for the kernel while a reply would have to wait for it."""
    async with operating(liar) as (operations, _):
        held = liar.lie = Held(b"/top/a")
        answered = operations.answered
        async with trio.open_nursery() as nursery:
            nursery.start_soon(operations.lookup, ROOT, b"a", ctx())
            await held.arrived()
            assert operations.kernel.under_way == 1
            await held.let_go()
        assert operations.kernel.under_way == 0
        with pytest.raises(FUSEError) as refused:
            await operations.read(pyfuse3.FileHandleT(4711), 0, 1)
        assert refused.value.errno == errno.EIO
        assert operations.kernel.under_way == 0
        assert operations.answered == answered + 2


@trio_test
async def test_a_walk_is_not_under_way(liar: LyingStore) -> None:
    """A worker polls for the next request of a reader beside the walk."""
    async with operating(liar) as (operations, _):
        entry = await operations.lookup(ROOT, b".ls", ctx())
        held = liar.lie = Held(b"/top/a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(operations.open, entry.st_ino, RDONLY, ctx())
            await held.arrived()
            assert operations.kernel.under_way == 0
            await held.let_go()
        assert operations.kernel.under_way == 0


@trio_test
async def test_a_value_survives_a_rename_whose_commit_is_uncertain(liar: LyingStore) -> None:
    """Its node may be gone by then, and the scratch file is all that is left of it."""

    def commit_and_hang_up(talk: Talk, request: Message) -> bool:
        talk.ask(request)
        raise HangUp

    async with operating(liar) as (operations, store):
        liar.lie = on(Op.TRANSACTION_END, commit_and_hang_up)
        with pytest.raises(FUSEError):
            await operations.rename(ROOT, b"a", ROOT, b"a~", cast(Any, 0), ctx())
        liar.behave()
        assert not await store.exists("/top/a")
        await operations.rename(ROOT, b"a~", ROOT, b"a", cast(Any, 0), ctx())
        assert await store.read("/top/a") == b"value"


@trio_test
async def test_a_rename_that_fails_after_a_conflict_leaves_both_files(
    daemon: RealXenstored, liar: LyingStore
) -> None:
    """The conflict is certain, so a connection that is lost later leaves no doubt."""
    starts = 0

    def conflict_and_hang_up(talk: Talk, request: Message) -> bool:
        nonlocal starts
        if request.op == Op.TRANSACTION_START:
            starts += 1
            if starts > 1:
                raise HangUp
        elif request.op == Op.TRANSACTION_END:
            with daemon.client() as dom0:
                dom0.write("/top/a", "another")
        return False

    async with operating(liar) as (operations, store):
        mode = cast(Any, 0o644)
        info, _ = await operations.create(ROOT, b"a~", mode, cast(Any, WRONLY), ctx())
        await operations.write(info.fh, 0, b"kept\n")
        await operations.release(info.fh)
        liar.lie = conflict_and_hang_up
        with pytest.raises(FUSEError):
            await operations.rename(ROOT, b"a", ROOT, b"a~", cast(Any, 0), ctx())
        liar.behave()
        assert starts > 1
        assert await store.read("/top/a") == b"another"
        entry = await operations.lookup(ROOT, b"a~", ctx())
        info = await operations.open(entry.st_ino, RDONLY, ctx())
        assert await operations.read(info.fh, 0, 100) == b"kept\n"


@trio_test
async def test_a_scratch_file_that_becomes_a_node_keeps_no_other_name(liar: LyingStore) -> None:
    """Another program may rename it, by another path, while the commit is under way."""
    async with operating(liar) as (operations, store):
        inode = ROOT
        for name in (b".root", b"top"):
            inode = (await operations.lookup(inode, name, ctx())).st_ino
        info, _ = await operations.create(
            ROOT, b".x.tmp", cast(Any, 0o644), cast(Any, WRONLY), ctx()
        )
        await operations.write(info.fh, 0, b"new")
        held = liar.lie = Held(b"T")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(operations.rename, ROOT, b".x.tmp", ROOT, b"x", cast(Any, 0), ctx())
            await held.arrived()
            await operations.rename(inode, b".x.tmp", inode, b".y.tmp", cast(Any, 0), ctx())
            await held.let_go()
        liar.behave()
        assert await store.read("/top/x") == b"new"
        for name in (b".x.tmp", b".y.tmp"):
            with pytest.raises(FUSEError) as refused:
                await operations.lookup(ROOT, name, ctx())
            assert refused.value.errno == errno.ENOENT
        await operations.release(info.fh)


async def reading(operations: Operations) -> None:
    entry = await operations.lookup(ROOT, b"a", ctx())
    await operations.open(entry.st_ino, RDONLY, ctx(2))


async def listing(operations: Operations) -> None:
    await operations.opendir(ROOT, ctx())


async def writing(operations: Operations) -> None:
    entry = await operations.lookup(ROOT, b"a", ctx())
    info = await operations.open(entry.st_ino, WRONLY, ctx())
    await operations.setattr(
        entry.st_ino, pyfuse3.EntryAttributes(), cast(Any, SizeOnly()), info.fh, ctx()
    )


class SizeOnly:
    """The fields of a truncation."""

    update_size = True
    update_mode = update_uid = update_gid = False


async def creating(operations: Operations) -> None:
    await operations.create(ROOT, b"new", cast(Any, 0), cast(Any, WRONLY | EXCL), ctx())


async def making(operations: Operations) -> None:
    await operations.mkdir(ROOT, b"new", cast(Any, 0), ctx())


async def removing(operations: Operations) -> None:
    await operations.unlink(ROOT, b"a", ctx())


async def renaming(operations: Operations) -> None:
    await operations.rename(ROOT, b"a", ROOT, b"new", cast(Any, 0), ctx())


async def getting_perms(operations: Operations) -> None:
    entry = await operations.lookup(ROOT, b"a", ctx())
    await operations.getxattr(entry.st_ino, cast(Any, b"user.xs.perms"), ctx())


async def setting_perms(operations: Operations) -> None:
    entry = await operations.lookup(ROOT, b"a", ctx())
    await operations.setxattr(entry.st_ino, cast(Any, b"user.xs.perms"), b"n0", ctx())


@pytest.mark.parametrize(
    ("operation", "op"),
    [
        (reading, Op.READ),
        (listing, Op.DIRECTORY),
        (writing, Op.TRANSACTION_START),
        (writing, Op.WRITE),
        (creating, Op.TRANSACTION_START),
        (creating, Op.WRITE),
        (making, Op.MKDIR),
        (removing, Op.RM),
        (renaming, Op.GET_PERMS),
        (renaming, Op.WRITE),
        (getting_perms, Op.GET_PERMS),
        (setting_perms, Op.SET_PERMS),
    ],
)
def test_enosys_of_the_store_never_reaches_the_kernel(
    liar: LyingStore, operation: Callable[[Operations], Awaitable[None]], op: Op
) -> None:
    """After one ENOSYS the kernel would not send this operation again until the mount ends."""

    async def run() -> None:
        async with operating(liar) as (operations, _):
            liar.lie = on(op, says(b"ENOSYS\0", Op.ERROR))
            with pytest.raises(FUSEError) as refused:
                await operation(operations)
            assert refused.value.errno == errno.EOPNOTSUPP
            liar.behave()
            entry = await operations.lookup(ROOT, b"a", ctx())
            assert entry.st_size == len(b"value\n")

    trio.run(run)
