"""The operations in process: the value that a LOOKUP hands over to the OPEN of the same open(2)."""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

import pytest
import trio
from pyfuse3 import FUSEError
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.support.mounting import LIMIT
from tests.support.operating import (
    RDONLY,
    RDWR,
    WRONLY,
    World,
    ctx,
    in_world,
    in_world_of,
    refused,
)
from xsfs.fs import inodes
from xsfs.fs.nodes import Caller
from xsfs.fs.open_files import OpenFile
from xsfs.fs.operations import Operations
from xsfs.xenstore.store import open_store


@pytest.mark.parametrize(
    ("error", "number"), [(FUSEError(errno.ENFILE), errno.ENFILE), (KeyError("a bug"), errno.EIO)]
)
@pytest.mark.parametrize("looked_up", [True, False])
def test_an_open_that_fails(
    error: Exception,
    number: int,
    looked_up: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether or not its LOOKUP has handed a value over."""

    def fail(self: Operations, caller: Caller) -> None:
        raise error

    @in_world
    async def test(w: World) -> None:
        entry = await w.lookup(b"name", pid=1 if looked_up else 2)
        with monkeypatch.context() as patch:
            patch.setattr(Operations, "_admit", fail)
            await refused(number, w.operations.open(entry.st_ino, RDONLY, ctx(1)))
        assert len(w.operations) == 0
        info = await w.operations.open(entry.st_ino, RDONLY, ctx(1))
        assert await w.operations.read(info.fh, 0, 4096) == b"Domain-0\n"

    test()
    assert ("Traceback" in caplog.text) is isinstance(error, KeyError)


@in_world
async def test_a_value_is_handed_over_for_its_own_inode_only(w: World) -> None:
    await w.store.write("data/x", "other")
    other = await w.lookup(b"data", b"x", pid=1)
    await w.lookup(b"name", pid=1)
    info = await w.operations.open(other.st_ino, RDONLY, ctx(1))
    assert await w.operations.read(info.fh, 0, 4096) == b"other\n"


@in_world
async def test_a_value_is_handed_over_within_a_millisecond(w: World) -> None:
    """stat(2) of a file, and an open(2) by /proc/self/fd/N later, are not one system call."""
    assert inodes.HANDOVER_SECONDS <= 0.001
    await w.store.write("data/x", "old")
    entry = await w.lookup(b"data", b"x")
    await w.store.write("data/x", "new")
    end = time.monotonic() + inodes.HANDOVER_SECONDS
    while time.monotonic() <= end:
        pass
    info = await w.operations.open(entry.st_ino, RDONLY, ctx())
    assert await w.operations.read(info.fh, 0, 4096) == b"new\n"


@in_world
async def test_the_hand_over_is_bounded(w: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inodes, "HANDOVER_SECONDS", 1000.0)
        for pid in range(inodes.HANDOVERS_MAX + 1):
            entry = await w.lookup(b"name", pid=pid)
        assert await w.costs(lambda: w.operations.open(entry.st_ino, RDONLY, ctx(0))) == 2
        assert await w.costs(lambda: w.operations.open(entry.st_ino, RDONLY, ctx(pid))) == 0


@in_world
async def test_what_a_write_made_outdated_is_not_handed_over(w: World) -> None:
    """Whatever changed it: a write, an extended attribute, a removal."""
    await w.store.write("data/x", "old")
    data = (await w.lookup(b"data")).st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inodes, "HANDOVER_SECONDS", 1000.0)
        entry = await w.lookup(b"data", b"x")
        await w.operations.setxattr(entry.st_ino, b"user.xs.value", b"new", ctx())
        info = await w.operations.open(entry.st_ino, RDONLY, ctx())
        assert await w.operations.read(info.fh, 0, 4096) == b"new\n"
        entry = await w.lookup(b"data", b"x")
        await w.operations.unlink(data, b"x", ctx(2))
        await w.store.write("data/x", "another")
        info = await w.operations.open((await w.lookup(b"data", b"x")).st_ino, RDONLY, ctx())
        assert await w.operations.read(info.fh, 0, 4096) == b"another\n"


@in_world
async def test_a_directory_that_was_just_opened_is_not_fetched_for_fstat(w: World) -> None:
    """Once, for the thread that has opened it, and not if the mount has changed it since."""
    await w.store.write("data/x", "1")
    data = (await w.lookup(b"data")).st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inodes, "HANDOVER_SECONDS", 1000.0)
        for pid, requests in ((1, 0), (2, 1)):
            listing = await w.operations.opendir(data, ctx(1))
            assert await w.costs(partial(w.operations.getattr, data, ctx(pid))) == requests
            assert await w.costs(lambda: w.operations.getattr(data, ctx(2))) == 1
            await w.operations.releasedir(listing)
        before = await w.operations.getattr(data, ctx(2))
        await w.operations.opendir(data, ctx(1))
        same = await w.operations.getattr(data, ctx(1))
        assert (same.st_mode, same.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
        await w.operations.opendir(data, ctx(1))
        await w.operations.mknod(data, b"y", 0o100644, 0, ctx(2))
        assert (await w.operations.getattr(data, ctx(1))).st_mtime_ns > before.st_mtime_ns


@in_world
async def test_a_transactions_directory_looks_alike_right_after_its_open(w: World) -> None:
    transactions = (await w.lookup(b".transaction")).st_ino
    entry = await w.operations.mkdir(transactions, cast(Any, b"t"), cast(Any, 0o755), ctx())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inodes, "HANDOVER_SECONDS", 1000.0)
        await w.operations.opendir(entry.st_ino, ctx())
        seen = await w.operations.getattr(entry.st_ino, ctx())
        later = await w.operations.getattr(entry.st_ino, ctx())
    assert (seen.st_mode, seen.st_mtime_ns) == (later.st_mode, later.st_mtime_ns)


async def furnish(w: World) -> None:
    """Nodes of the guest, which it may read and write, read, or neither."""
    async with open_store(connect=w.connect_as(0)) as dom0:
        for name, perms in (("own", "n5"), ("readable", "r0"), ("secret", "n0")):
            await dom0.write(f"/local/domain/5/data/{name}", "value")
            await dom0.set_perms(f"/local/domain/5/data/{name}", perms)
        for path in ("/local/domain/5", "/local/domain/5/data"):
            await dom0.set_perms(path, "n5")


@in_world_of(5)
async def test_a_guest_opens_what_its_permissions_allow(w: World) -> None:
    """The kernel is not asked for permissions: so xsfs must refuse."""
    await furnish(w)
    entry = await w.lookup(b"data", b"readable")
    assert stat.S_IMODE(entry.st_mode) == 0o400
    entry = await w.lookup(b"data", b"own")
    assert stat.S_IMODE(entry.st_mode) == 0o600
    for flags in (RDONLY, RDWR, RDONLY, RDWR):
        entry = await w.lookup(b"data", b"secret.d", b".value")
        await refused(errno.EACCES, w.operations.open(entry.st_ino, flags, ctx()))
    assert len(w.operations) == 0


async def rollback(w: World) -> None:
    control = await w.lookup(b".transaction", b"t", b".control", pid=9)
    handle = await w.operations.open(control.st_ino, WRONLY, ctx(9))
    await w.operations.write(handle.fh, 0, b"rollback\n")


async def remove(w: World) -> None:
    directory = await w.lookup(b".transaction")
    await w.operations.rmdir(directory.st_ino, b"t", ctx(9))


@pytest.mark.parametrize("end", [rollback, remove])
def test_nothing_of_an_ended_transaction_is_opened(end: Callable[[World], Awaitable[None]]) -> None:
    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/x", "value")
        directory = await w.lookup(b".transaction")
        await w.operations.mkdir(directory.st_ino, b"t", 0o755, ctx())
        entry = await w.lookup(b".transaction", b"t", b"data", b"x")
        await end(w)
        await refused(errno.ESTALE, w.operations.open(entry.st_ino, RDONLY, ctx()))

    test()


@in_world
async def test_a_value_is_opened_as_the_node_that_the_table_has(w: World) -> None:
    await w.store.write("data/x", "value")
    await w.store.write("data/x/child", "value")
    entry = await w.lookup(b"data", b"x", b".value")
    info = await w.operations.open(entry.st_ino, RDONLY, ctx())
    assert w.operations._handles[info.fh].node is w.table.get(entry.st_ino)


@trio_test
async def test_a_task_that_waits_for_a_file_comes_before_one_that_asks_later() -> None:
    """A removal ends, even if a program writes to the file without end."""
    file = OpenFile(b"/x")
    order: list[str] = []

    async def wait(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with file.changing():
                await trio.lowlevel.checkpoint_if_cancelled()
                order.append(name)

    scopes = [trio.CancelScope() for _ in range(4)]
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            async with file.changing():
                for number, scope in enumerate(scopes):
                    nursery.start_soon(wait, str(number), scope)
                    await wait_all_tasks_blocked()
                scopes[0].cancel()  # before it has its turn
            scopes[1].cancel()  # the lock is its own already, unless the first has it
            async with file.changing():
                order.append("later")
    assert order[-3:] == ["2", "3", "later"]
    assert not file.lock or not file.lock._is_taken
