"""Ring: the operations in process: what a LOOKUP makes ready for the OPEN that follows it."""

from __future__ import annotations

import errno
import stat
from collections.abc import Awaitable, Callable

import pyfuse3
import pytest
import trio
from pyfuse3 import FUSEError

from tests.operating import (
    LIMIT,
    RDONLY,
    WRONLY,
    World,
    ctx,
    entries_of,
    in_world,
    refused,
    world,
)
from xsfs import prefetched
from xsfs.client import open_store
from xsfs.handles import Handles
from xsfs.node import Node
from xsfs.operations import Operations
from xsfs.values import DotValue, ValueFile

RDWR = 2


@in_world
async def test_a_file_is_one_node_however_many_look_it_up_at_once(w: World) -> None:
    """Each of them has made it before the store answers."""
    await w.store.write("data/x", "value")
    data = await w.lookup(b"data")
    opened: list[pyfuse3.FileInfo] = []
    inodes = set()

    async def open_it(pid: int) -> None:
        entry = await w.operations.lookup(data.st_ino, b"x", ctx(pid))
        assert entry.st_size == len("value\n")
        inodes.add(entry.st_ino)
        opened.append(await w.operations.open(entry.st_ino, RDONLY, ctx(pid)))

    async with trio.open_nursery() as nursery:
        for pid in range(20):
            nursery.start_soon(open_it, pid)
    (inode,) = inodes
    assert w.tree.get(inode).lookups == 20
    nodes = {id(w.operations._handles.get(info.fh).node) for info in opened}
    assert nodes == {id(w.tree.get(inode))}


@in_world
async def test_a_file_that_is_renamed_while_it_is_looked_up(w: World) -> None:
    await w.store.write("data/x", "value")
    data = await w.lookup(b"data")
    first = await w.lookup(b"data", b"x")
    entries: list[pyfuse3.EntryAttributes] = []

    async def look() -> None:
        entries.append(await w.operations.lookup(data.st_ino, b"x", ctx(2)))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await w.asked()
            w.tree.move(w.tree.get(first.st_ino), w.tree.get(data.st_ino), b"y")
    assert entries[0].st_ino != first.st_ino
    assert w.tree.get(entries[0].st_ino).path == b"/local/domain/0/data/x"
    assert w.tree.get(first.st_ino).path == b"/local/domain/0/data/y"


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
    """Whether or not its LOOKUP has made all ready."""

    def fail(self: Handles, uid: int) -> bool:
        raise error

    @in_world
    async def test(w: World) -> None:
        entry = await w.lookup(b"name", pid=1 if looked_up else 2)
        with monkeypatch.context() as patch:
            patch.setattr(Handles, "admit", fail)
            await refused(number, w.operations.open(entry.st_ino, RDONLY, ctx(1)))
        assert len(w.operations) == 0
        info = await w.operations.open(entry.st_ino, RDONLY, ctx(1))
        assert await w.operations.read(info.fh, 0, 4096) == b"Domain-0\n"

    test()
    assert ("Traceback" in caplog.text) is isinstance(error, KeyError)


@in_world
async def test_what_a_lookup_has_made_ready_is_all_that_is_opened(
    w: World,
) -> None:
    async def slow(self: Operations, *args: object) -> pyfuse3.FileInfo:
        raise AssertionError("nothing had been made ready")

    entry = await w.lookup(b"name")
    answered = w.operations.answered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operations, "_open", slow)
        info = await w.operations.open(entry.st_ino, RDONLY, ctx())
    assert w.operations.answered == answered + 1
    assert await w.operations.read(info.fh, 0, 4096) == b"Domain-0\n"


@in_world
async def test_what_was_made_ready_is_good_for_a_moment(w: World) -> None:
    entry = await w.lookup(b"name")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetched, "PREFETCH_SECONDS", -1.0)
        entry = await w.lookup(b"name")
    assert await w.costs(lambda: w.operations.open(entry.st_ino, RDONLY, ctx())) == 2


def test_a_guest_opens_what_he_may() -> None:
    """The kernel is not asked for permissions: it is xsfs that must refuse."""

    async def run() -> None:
        async with world(domid=5) as w:
            await furnish(w)
            entry = await w.lookup(b"data", b"readable")
            assert stat.S_IMODE(entry.st_mode) == 0o400
            entry = await w.lookup(b"data", b"own")
            assert stat.S_IMODE(entry.st_mode) == 0o600
            for _ in range(2):
                entry = await w.lookup(b"data", b"secret.d", b".value")
                await refused(errno.EACCES, w.operations.open(entry.st_ino, RDONLY, ctx()))
                entry = await w.lookup(b"data", b"secret.d", b".value")
                await refused(errno.EACCES, w.operations.open(entry.st_ino, RDWR, ctx()))
            assert len(w.operations) == 0

    async def furnish(w: World) -> None:
        async with open_store(connect=w.connect_as(0)) as dom0:
            for name, perms in (("own", "n5"), ("readable", "r0"), ("secret", "n0")):
                await dom0.write(f"/local/domain/5/data/{name}", "value")
                await dom0.set_perms(f"/local/domain/5/data/{name}", perms)
            for path in ("/local/domain/5", "/local/domain/5/data"):
                await dom0.set_perms(path, "n5")

    async def bounded() -> None:
        with trio.fail_after(LIMIT):
            await run()

    trio.run(bounded)


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
async def test_a_value_is_opened_as_the_node_that_the_tree_has(w: World) -> None:
    await w.store.write("data/x", "value")
    await w.store.write("data/x/child", "value")
    entry = await w.lookup(b"data", b"x", b".value")
    info = await w.operations.open(entry.st_ino, RDONLY, ctx())
    assert w.operations._handles.get(info.fh).node is w.tree.get(entry.st_ino)


# ----------------------------------------------------------------------- numbers that are given again


@in_world
async def test_a_file_is_found_when_the_one_before_it_is_forgotten(w: World) -> None:
    """It was removed while it was open, and made again: the new one has the next number."""
    await w.store.write("data/x", "old")
    data = await w.lookup(b"data")
    old = await w.lookup(b"data", b"x")
    await w.operations.unlink(data.st_ino, b"x", ctx())
    await w.store.write("data/x", "new")
    new = await w.lookup(b"data", b"x")
    assert new.st_ino != old.st_ino
    await w.operations.forget([(old.st_ino, 1)])
    again = await w.lookup(b"data", b"x")
    assert again.st_ino == new.st_ino
    assert w.tree.get(new.st_ino).lookups == 2
    await w.operations.forget([(new.st_ino, 2)])
    assert (await w.lookup(b"data", b"x")).st_ino == old.st_ino


@in_world
async def test_a_number_that_gets_free_while_a_file_is_looked_up(w: World) -> None:
    await w.store.write("data/x", "old")
    data = await w.lookup(b"data")
    old = await w.lookup(b"data", b"x")
    await w.operations.unlink(data.st_ino, b"x", ctx())
    await w.store.write("data/x", "new")
    entries: list[pyfuse3.EntryAttributes] = []

    async def look() -> None:
        entries.append(await w.operations.lookup(data.st_ino, b"x", ctx(2)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await w.asked()
        await w.operations.forget([(old.st_ino, 1)])
        _, made = await w.operations.create(data.st_ino, b"x", 0o644, WRONLY, ctx(3))
    assert entries[0].st_ino == made.st_ino
    assert w.tree.get(made.st_ino).lookups == 2


@pytest.mark.parametrize(("kind", "name"), [(ValueFile, b"x"), (DotValue, b".value")])
def test_a_number_that_is_taken_while_a_file_is_looked_up(kind: type[Node], name: bytes) -> None:
    """By one that was made and removed meanwhile, and that the kernel still knows."""

    @in_world
    async def test(w: World) -> None:
        await w.store.write("data", "value")
        await w.store.write("data/x", "value")
        data = await w.lookup(b"data")
        entries: list[pyfuse3.EntryAttributes] = []

        async def look() -> None:
            entries.append(await w.operations.lookup(data.st_ino, name, ctx(2)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await w.asked()
            other = w.tree.node(kind, w.tree.get(data.st_ino), name)
            w.tree.remember(other)
            other.gone = True
        assert w.tree.get(other.inode) is other
        assert entries[0].st_ino != other.inode
        found = w.tree.get(entries[0].st_ino)
        assert (type(found), found.lookups, found.gone) == (kind, 1, False)

    test()


@in_world
async def test_a_listing_that_is_begun_at_its_end(w: World) -> None:
    """What was made since is there after a rewind."""
    await w.store.write("data/a", "1")
    data = await w.lookup(b"data")
    fh = await w.operations.opendir(data.st_ino, ctx())
    assert await entries_of(w, fh, 1000) == {}
    await w.store.write("data/b", "1")
    assert set(await entries_of(w, fh)) == {b".", b"..", b"a", b"b"}
    assert await entries_of(w, fh, 1000) == {}
