"""Ring: the operations in process: what a LOOKUP makes ready for the OPEN that follows it."""

from __future__ import annotations

import errno
import stat
from collections.abc import Awaitable, Callable

import pyfuse3
import pytest
from pyfuse3 import FUSEError
from xsfs.fs.handles import Handles

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
from xsfs.fs import prefetched
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
async def test_what_a_lookup_has_made_ready_is_all_that_is_opened(w: World) -> None:
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetched, "PREFETCH_SECONDS", -1.0)
        entry = await w.lookup(b"name")
    assert await w.costs(lambda: w.operations.open(entry.st_ino, RDONLY, ctx())) == 2


async def furnish(w: World) -> None:
    """Nodes of the guest, which he may read and write, read, or neither."""
    async with open_store(connect=w.connect_as(0)) as dom0:
        for name, perms in (("own", "n5"), ("readable", "r0"), ("secret", "n0")):
            await dom0.write(f"/local/domain/5/data/{name}", "value")
            await dom0.set_perms(f"/local/domain/5/data/{name}", perms)
        for path in ("/local/domain/5", "/local/domain/5/data"):
            await dom0.set_perms(path, "n5")


@in_world_of(5)
async def test_a_guest_opens_what_he_may(w: World) -> None:
    """The kernel is not asked for permissions: it is xsfs that must refuse."""
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
async def test_a_value_is_opened_as_the_node_that_the_tree_has(w: World) -> None:
    await w.store.write("data/x", "value")
    await w.store.write("data/x/child", "value")
    entry = await w.lookup(b"data", b"x", b".value")
    info = await w.operations.open(entry.st_ino, RDONLY, ctx())
    assert w.operations._handles.get(info.fh).node is w.tree.get(entry.st_ino)
