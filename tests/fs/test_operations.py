"""Ring: the operations in process, over the embedded store, without a kernel.

Here are the facts that a kernel hides: how many requests an operation costs, and what becomes of an
exception.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast
from unittest.mock import Mock

import pyfuse3
import pytest
import trio
from pyfuse3 import FUSEError
from trio.testing import wait_all_tasks_blocked

from tests.support.operating import (
    APPEND,
    EXCL,
    RDONLY,
    RDWR,
    ROOT,
    TRUNC,
    WRONLY,
    World,
    ctx,
    in_world,
    listed,
    refused,
)
from xsfs.fs import dumps, files, inodes, listing, open_files
from xsfs.fs.directories import Directory
from xsfs.fs.errnos import translate
from xsfs.view.kinds import STICKY_MAX, StickyDirectories
from xsfs.view.names import OWN_NAMES, file_name
from xsfs.view.view import Work
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreUnavailable,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.protocol import Op, Request, WireError, read

OTHER_NAME = (b".root", b"local", b"domain", b"0", b"data")
"""The path to `data` by the other of its names."""


async def opened(w: World, flags: int, *names: bytes) -> pyfuse3.FileHandleT:
    entry = await w.lookup(*names)
    return (await w.operations.open(entry.st_ino, cast(Any, flags), ctx())).fh


async def content_of(w: World, *names: bytes) -> bytes:
    handle = await opened(w, RDONLY, *names)
    try:
        return await w.operations.read(handle, 0, 4096)
    finally:
        await w.operations.release(handle)


async def fill(w: World, directory: pyfuse3.InodeT, name: bytes, data: bytes) -> None:
    """Create a file with this content."""
    mode, flags = cast(Any, 0o644), cast(Any, WRONLY)
    created = await w.operations.create(directory, cast(Any, name), mode, flags, ctx())
    handle = created[0].fh
    await w.operations.write(handle, 0, data)
    await w.operations.release(handle)


# ------------------------------------------------------------------------------------ round trips


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetched value serves for long, so that a busy machine does not change the number of requests."""
    monkeypatch.setattr(inodes, "HANDOVER_SECONDS", 1000.0)
    for module in (files, open_files):
        monkeypatch.setattr(module, "FRESH_SECONDS", 1000.0)


@pytest.mark.usefixtures("unhurried")
@in_world
async def test_open_read_close_is_one_round_trip(w: World) -> None:
    async def cat() -> None:
        entry = await w.lookup(b"name")
        handle = await w.operations.open(entry.st_ino, RDONLY, ctx())
        assert await w.operations.read(handle.fh, 0, 4096) == b"Domain-0\n"
        assert await w.operations.read(handle.fh, 9, 4096) == b""
        await w.operations.release(handle.fh)

    assert await w.costs(cat) == 2  # READ and DIRECTORY, in one pipeline
    assert len(w.operations) == 0


@pytest.mark.usefixtures("unhurried")
@in_world
async def test_an_open_by_another_thread_asks_itself(w: World) -> None:
    entry = await w.lookup(b"name", pid=1)

    async def open_it() -> None:
        await w.operations.open(entry.st_ino, RDONLY, ctx(2))

    assert await w.costs(open_it) == 2
    # And a value is given once.
    assert await w.costs(lambda: w.operations.open(entry.st_ino, RDONLY, ctx(1))) == 0
    assert await w.costs(lambda: w.operations.open(entry.st_ino, RDONLY, ctx(1))) == 2


@in_world
async def test_a_write_drops_what_was_fetched_before(w: World) -> None:
    await w.store.write("data/x", "old")
    entry = await w.lookup(b"data", b"x")
    writer = await w.operations.open(entry.st_ino, WRONLY | TRUNC, ctx(2))
    await w.operations.write(writer.fh, 0, b"new\n")
    reader = await w.operations.open(entry.st_ino, RDONLY, ctx(1))
    assert await w.operations.read(reader.fh, 0, 4096) == b"new\n"


@pytest.mark.usefixtures("unhurried")
@in_world
async def test_echo_is_one_request(w: World) -> None:
    await w.store.write("data/x", "old")
    entry = await w.lookup(b"data", b"x")

    async def echo() -> None:
        handle = await w.operations.open(entry.st_ino, WRONLY | TRUNC, ctx())
        await w.operations.write(handle.fh, 0, b"42\n")
        await w.operations.release(handle.fh)

    assert await w.costs(echo) == 1

    async def echo_to_a_new_one() -> None:
        data = await w.lookup(b"data")
        before = w.store.requests
        info, _ = await w.operations.create(data.st_ino, b"new", 0o644, WRONLY | TRUNC, ctx())
        await w.operations.write(info.fh, 0, b"42\n")
        await w.operations.release(info.fh)
        assert w.store.requests - before == 1

    await echo_to_a_new_one()
    assert await w.store.read("data/new") == b"42"


# ------------------------------------------------------------- replies that are outdated when they come


def around_request(
    monkeypatch: pytest.MonkeyPatch,
    w: World,
    op: Op,
    before: Callable[[], Awaitable[object]],
    after: Callable[[], Awaitable[object]],
) -> None:
    """Run `before` and `after` around the store's reply to the next request of this type, while the task
    that sent the request waits."""
    pipeline = w.store.pipeline
    is_due = True

    async def outdated(requests: Sequence[Request], **options: Any) -> list[Reply]:
        nonlocal is_due
        if not is_due or all(request.op != op for request in requests):
            return await pipeline(requests, **options)
        is_due = False
        await before()
        replies = await pipeline(requests, **options)
        await after()
        return replies

    monkeypatch.setattr(w.store, "pipeline", outdated)


def test_a_listing_shows_a_file_whose_creation_is_carried_out_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @in_world
    async def test(w: World) -> None:
        data = (await w.lookup(b"data")).st_ino
        info, _ = await w.operations.create(data, b"new", 0o644, WRONLY, ctx())
        assert not await w.store.exists("data/new")
        around_request(
            *(monkeypatch, w, Op.DIRECTORY),
            before=trio.lowlevel.checkpoint,
            after=lambda: w.operations.release(info.fh),
        )
        found = await listed(w, await w.operations.opendir(data, ctx()))
        assert await w.store.exists("data/new")
        assert found[b"new"] is False

    test()


def test_the_kind_of_a_file_whose_creation_is_carried_out_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long listing asks for the kinds of its names once more, window by window."""

    @in_world
    async def test(w: World) -> None:
        monkeypatch.setattr(listing, "FETCH_WINDOW", 1)
        await w.store.write("data/a", "1")
        data = (await w.lookup(b"data")).st_ino
        info, _ = await w.operations.create(data, b"new", 0o644, WRONLY, ctx())
        fh = await w.operations.opendir(data, ctx())

        async def carry_out_at_the_second() -> None:
            around_request(
                *(monkeypatch, w, Op.DIRECTORY),
                before=trio.lowlevel.checkpoint,
                after=lambda: w.operations.release(info.fh),
            )

        around_request(
            *(monkeypatch, w, Op.DIRECTORY),
            before=trio.lowlevel.checkpoint,
            after=carry_out_at_the_second,
        )
        assert (await listed(w, fh))[b"new"] is False
        assert await w.store.exists("data/new")

    test()


def test_a_listing_of_a_directory_that_is_renamed_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @in_world
    async def test(w: World) -> None:
        data = (await w.lookup(b"data")).st_ino
        name, mode = cast(Any, b"d"), cast(Any, 0o755)
        directory = (await w.operations.mkdir(data, name, mode, ctx())).st_ino
        await fill(w, directory, b".x", b"1")
        around_request(
            *(monkeypatch, w, Op.DIRECTORY),
            before=trio.lowlevel.checkpoint,
            after=lambda: w.operations.rename(data, b"d", data, b"e", cast(Any, 0), ctx()),
        )
        assert b".x" in await listed(w, await w.operations.opendir(directory, ctx()))

    test()


@pytest.mark.parametrize("by_other_name", [False, True])
@pytest.mark.parametrize("operation", ["look up", "stat", "list", "read its nodes", "make a file"])
def test_a_directory_that_is_renamed_there_and_back_meanwhile(
    operation: str, by_other_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/d/x", "1")
        directory = (await w.lookup(b"data", b"d")).st_ino
        above = (await w.lookup(*(OTHER_NAME if by_other_name else (b"data",)))).st_ino
        await w.operations.lookup(above, cast(Any, b"d"), ctx())
        nodes = (await w.lookup(b"data", b"d", b".ls")).st_ino
        name, mode = cast(Any, b".x"), cast(Any, 0o600 | stat.S_IFREG)
        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "look up": lambda: w.operations.lookup(directory, cast(Any, b"x"), ctx()),
            "stat": lambda: w.operations.getattr(directory, ctx()),
            "list": lambda: w.operations.opendir(directory, ctx()),
            "read its nodes": lambda: w.operations.open(nodes, RDONLY, ctx()),
            "make a file": lambda: w.operations.mknod(directory, name, mode, 0, ctx()),
        }
        around_request(
            *(monkeypatch, w, Op.DIRECTORY if operation in ("stat", "list") else Op.READ),
            before=lambda: renaming(w, above, b"d", b"e"),
            after=lambda: renaming(w, above, b"e", b"d"),
        )
        await operations[operation]()

    test()


@pytest.mark.parametrize("operation", ["read", "stat"])
def test_an_open_file_that_is_renamed_there_and_back_meanwhile(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/f", "1")
        data = (await w.lookup(b"data")).st_ino
        file = (await w.lookup(b"data", b"f")).st_ino
        info = await w.operations.open(file, RDWR, ctx())

        def rename(old: bytes, new: bytes) -> Awaitable[None]:
            return w.operations.rename(data, old, data, new, cast(Any, 0), ctx())

        around_request(
            *(monkeypatch, w, Op.READ),
            before=lambda: rename(b"f", b"g"),
            after=lambda: rename(b"g", b"f"),
        )
        if operation == "read":
            assert await w.operations.read(info.fh, 0, 4096) == b"1\n"
        else:
            assert (await w.operations.getattr(file, ctx())).st_size == 2

    test()


@pytest.mark.parametrize("when", ["before the rename", "after it"])
@pytest.mark.parametrize("operation", ["lookup", "stat", "look up a file", "create a file"])
def test_scratch_files_of_a_directory_that_is_renamed_meanwhile(
    operation: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has no node of the old name any more, and the mount still knows the directory by it, or
    knows the new name already."""

    @in_world
    async def test(w: World) -> None:
        data = (await w.lookup(b"data")).st_ino
        mode = cast(Any, 0o755)
        directory = (await w.operations.mkdir(data, cast(Any, b"d"), mode, ctx())).st_ino
        await fill(w, directory, b".x", b"1")
        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "lookup": lambda: w.operations.lookup(data, cast(Any, b"d"), ctx()),
            "stat": lambda: w.operations.getattr(directory, ctx()),
            "look up a file": lambda: w.operations.lookup(directory, cast(Any, b".x"), ctx()),
            "create a file": lambda: fill(w, directory, b".y", b""),
        }
        operate = operations[operation]

        async def try_it() -> None:
            with suppress(FUSEError):
                await operate()

        def rename() -> Awaitable[None]:
            return w.operations.rename(data, b"d", data, b"e", cast(Any, 0), ctx())

        if when == "before the rename":
            op = Op.DIRECTORY if operation in ("lookup", "stat") else Op.READ
            around_request(monkeypatch, w, op, before=rename, after=trio.lowlevel.checkpoint)
            await try_it()
        else:
            apart = w.view.atomically_apart

            async with trio.open_nursery() as nursery:

                async def late(work: Callable[[Commands], Awaitable[None]]) -> None:
                    await apart(work)
                    nursery.start_soon(try_it)
                    await wait_all_tasks_blocked()

                monkeypatch.setattr(w.view, "atomically_apart", late)
                await rename()
        assert await content_of(w, b"data", b"e", b".x") == b"1"

    test()


@in_world
async def test_a_value_of_a_directory_that_was_renamed_by_another_name(w: World) -> None:
    """A write to it does not make the old name a directory."""
    await w.store.write("data/d", "1")
    await w.store.write("data/d/child", "1")
    data = (await w.lookup(b"data")).st_ino
    await w.lookup(b"data", b"d")
    names = (b".root", b"local", b"domain", b"0", b"data", b"d", b".value")
    handle = await opened(w, WRONLY, *names)
    await w.operations.rename(data, b"d", data, b"e", cast(Any, 0), ctx())
    await w.operations.write(handle, 0, b"2\n")
    assert await w.store.read("data/e") == b"2"
    await w.store.write("data/d", "1")
    assert (await listed(w, await w.operations.opendir(data, ctx())))[b"d"] is False


def renaming(w: World, directory: pyfuse3.InodeT, old: bytes, new: bytes) -> Awaitable[None]:
    names = cast(Any, old), cast(Any, new)
    return w.operations.rename(directory, names[0], directory, names[1], cast(Any, 0), ctx())


@contextmanager
def beside_the_commit(
    w: World, before: Callable[[], Awaitable[object]], after: Callable[[], Awaitable[object]]
) -> Iterator[None]:
    """Run `before` when the next transaction has done its work, and `after` when it is committed, before the
    task that waits for the commit goes on."""
    names = "atomically", "atomically_apart"
    is_due = True

    def late(run: Callable[[Work], Awaitable[None]]) -> Callable[[Work], Awaitable[None]]:
        async def atomically(work: Work) -> None:
            nonlocal is_due
            if not is_due:
                return await run(work)
            is_due = False

            async def work_and_more(commands: Commands) -> Request | None:
                last = await work(commands)
                await before()
                return last

            await run(work_and_more)
            await after()

        return atomically

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(w.view, name, late(getattr(w.view, name)))
        yield


@pytest.mark.parametrize("flags", [RDWR, RDWR | TRUNC, RDWR | APPEND])
@pytest.mark.parametrize(
    ("new", "found"), [(b"g", "data/g"), (b"g~", None), (None, None)], ids=["node", "scratch", "rm"]
)
def test_a_file_that_is_opened_while_its_rename_or_removal_is_committed(
    flags: int, new: bytes | None, found: str | None
) -> None:
    """A write reaches the file, and never makes the old name again."""

    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/f", "1")
        data = (await w.lookup(b"data")).st_ino
        handles: list[pyfuse3.FileHandleT] = []

        async def open_it() -> None:
            handles.append(await opened(w, flags, b"data", b"f"))

        async with trio.open_nursery() as nursery:

            async def write_it() -> None:
                nursery.start_soon(w.operations.write, handles[0], 0, b"2\n")
                await wait_all_tasks_blocked()

            with beside_the_commit(w, open_it, write_it):
                if new is None:
                    await w.operations.unlink(data, cast(Any, b"f"), ctx())
                else:
                    await renaming(w, data, b"f", new)
        assert not await w.store.exists("data/f")
        written = b"1\n2\n" if flags & APPEND else b"2\n"
        assert await w.operations.read(handles[0], 0, 4096) == written
        if found is not None:
            assert await w.store.read(found) + b"\n" == written
        await w.operations.release(handles[0])
        assert not await w.store.exists("data/f")

    test()


@pytest.mark.parametrize("when", ["before the commit", "after it"])
@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("source", [b"f", b"f~"])
def test_a_file_that_is_opened_by_the_new_name_of_a_rename_meanwhile(
    source: bytes, is_open: bool, when: str
) -> None:
    """As by another name of the directory, which the kernel does not hold for the rename."""

    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/x", "")
        data = (await w.lookup(b"data")).st_ino
        await fill(w, data, source, b"1\n")
        if is_open:
            present = await opened(w, RDWR, b"data", source)
        handles: list[pyfuse3.FileHandleT] = []

        async def open_it() -> None:
            info, _ = await w.operations.create(data, cast(Any, b"g"), 0o644, WRONLY, ctx(2))
            handles.append(info.fh)

        async with trio.open_nursery() as nursery:

            async def operate() -> None:
                nursery.start_soon(open_it)
                await wait_all_tasks_blocked()

            idle = trio.lowlevel.checkpoint
            is_before = when == "before the commit"
            with beside_the_commit(
                w, operate if is_before else idle, idle if is_before else operate
            ):
                await renaming(w, data, source, b"g")
        await w.operations.write(handles[0], 0, b"2\n")
        if is_open:
            assert await w.operations.read(present, 0, 4096) == b"2\n"
            await w.operations.release(present)
        await w.operations.release(handles[0])
        assert await w.store.read("data/g") == b"2"
        assert not len(w.operations)

    test()


@pytest.mark.parametrize(
    "operation",
    [
        *("look up", "look up as a directory", "look up a long name", "stat", "list", "create"),
        *("stat its watch file", "read its nodes"),
        *("unlink", "rmdir", "mkdir", "rename", "rename away", "aside"),
    ],
)
def test_a_name_in_a_directory_that_is_renamed_meanwhile(operation: str) -> None:
    """As by a program that has the directory open."""

    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/d/x", "1")
        await w.store.mkdir("data/d/y")
        long_name = b"l" * 300
        await w.store.write(b"data/d/" + long_name, "1")
        data = (await w.lookup(b"data")).st_ino
        directory = (await w.lookup(b"data", b"d")).st_ino
        w.view.sticky.add(b"/local/domain/0/data/d/y")
        watch = (await w.lookup(b"data", b"d", b".watch")).st_ino
        nodes = (await w.lookup(b"data", b"d", b".ls")).st_ino
        name, mode = cast(Any, b"x"), cast(Any, 0o755)
        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "look up": lambda: w.operations.lookup(directory, name, ctx()),
            "look up as a directory": lambda: w.operations.lookup(
                directory, cast(Any, b"x.d"), ctx()
            ),
            "look up a long name": lambda: w.operations.lookup(
                directory, cast(Any, file_name(long_name)), ctx()
            ),
            "stat": lambda: w.operations.getattr(directory, ctx()),
            "list": lambda: w.operations.opendir(directory, ctx()),
            "create": lambda: fill(w, directory, b"z", b"1\n"),
            "stat its watch file": lambda: w.operations.getattr(watch, ctx()),
            "read its nodes": lambda: w.operations.open(nodes, RDONLY, ctx()),
            "unlink": lambda: w.operations.unlink(directory, name, ctx()),
            "rmdir": lambda: w.operations.rmdir(directory, cast(Any, b"y"), ctx()),
            "mkdir": lambda: w.operations.mkdir(directory, cast(Any, b"z"), mode, ctx()),
            "rename": lambda: renaming(w, directory, b"x", b"z"),
            "rename away": lambda: w.operations.rename(
                directory, name, data, cast(Any, b"z"), cast(Any, 0), ctx()
            ),
            "aside": lambda: renaming(w, directory, b"x", b"x~"),
        }
        async with trio.open_nursery() as nursery:

            async def operate() -> None:
                nursery.start_soon(operations[operation])
                await wait_all_tasks_blocked()

            with beside_the_commit(w, trio.lowlevel.checkpoint, operate):
                await renaming(w, data, b"d", b"e")
        changed = {
            "create": {b"x", b"y", b"z"},
            "unlink": {b"y"},
            "rmdir": {b"x"},
            "mkdir": {b"x", b"y", b"z"},
            "rename": {b"y", b"z"},
            "rename away": {b"y"},
            "aside": {b"y"},
        }
        left = changed.get(operation, {b"x", b"y"}) | {long_name}
        assert set(await w.store.list("data/e")) == left
        moved = {b"z"} if operation == "rename away" else set()
        assert set(await w.store.list("data")) == {b"e"} | moved
        if operation == "aside":
            assert await content_of(w, b"data", b"e", b"x~") == b"1\n"

    test()


@pytest.mark.parametrize("operation", ["get", "set", "remove"])
@pytest.mark.parametrize("new", [(b"d", b"e"), (b"f", b"g"), (b"f", b"f~"), (b"f", None)])
def test_an_attribute_of_an_open_file_that_is_renamed_or_removed_meanwhile(
    operation: str, new: tuple[bytes, bytes | None]
) -> None:
    """As by fgetxattr(2) and its like, after which the kernel looks nothing up again."""

    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/d/f", "1")
        data = (await w.lookup(b"data")).st_ino
        directory = (await w.lookup(b"data", b"d")).st_ino
        file = (await w.lookup(b"data", b"d", b"f")).st_ino
        info = await w.operations.open(file, RDWR, ctx())
        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "get": lambda: w.operations.getxattr(file, cast(Any, b"user.xs.perms"), ctx()),
            "set": lambda: w.operations.setxattr(file, cast(Any, b"user.xs.value"), b"2", ctx()),
            "remove": lambda: w.operations.removexattr(file, cast(Any, b"user.xs.perms"), ctx()),
        }
        old, wanted = new
        async with trio.open_nursery() as nursery:

            async def operate() -> None:
                nursery.start_soon(operations[operation])
                await wait_all_tasks_blocked()

            with beside_the_commit(w, trio.lowlevel.checkpoint, operate):
                if wanted is None:
                    await w.operations.unlink(directory, cast(Any, old), ctx())
                else:
                    await renaming(w, data if old == b"d" else directory, old, wanted)
        written = b"2\n" if operation == "set" else b"1\n"
        assert await w.operations.read(info.fh, 0, 4096) == written

    test()


@in_world
async def test_a_dump_that_is_written_while_its_directory_is_removed(w: World) -> None:
    data = (await w.lookup(b"data")).st_ino
    await w.operations.mkdir(data, cast(Any, b"d"), cast(Any, 0o755), ctx())
    handle = await opened(w, WRONLY, b"data", b"d", b".dump")

    async with trio.open_nursery() as nursery:

        async def write() -> None:
            line = b'{"path": "x", "value": "1"}\n'
            nursery.start_soon(refused, errno.ESTALE, w.operations.write(handle, 0, line))
            await wait_all_tasks_blocked()

        with beside_the_commit(w, write, trio.lowlevel.checkpoint):
            await w.operations.rmdir(data, cast(Any, b"d"), ctx())
    assert not await w.store.exists("data/d")


@in_world
async def test_a_file_that_is_created_by_another_name_while_its_directory_is_removed(
    w: World,
) -> None:
    data = (await w.lookup(b"data")).st_ino
    await w.operations.mkdir(data, cast(Any, b"d"), cast(Any, 0o755), ctx())
    other = (await w.lookup(b".root", b"local", b"domain", b"0", b"data", b"d")).st_ino

    async with trio.open_nursery() as nursery:

        async def create() -> None:
            name, mode, flags = cast(Any, b"x"), cast(Any, 0o644), cast(Any, WRONLY)
            info, _ = await w.operations.create(other, name, mode, flags, ctx())
            write = w.operations.write(info.fh, 0, b"1\n")
            nursery.start_soon(refused, errno.ESTALE, write)
            await wait_all_tasks_blocked()

        with beside_the_commit(w, create, trio.lowlevel.checkpoint):
            await w.operations.rmdir(data, cast(Any, b"d"), ctx())
    assert not await w.store.exists("data/d")


@in_world
async def test_an_open_file_that_is_renamed_while_its_old_name_is_created(w: World) -> None:
    """Its handles stay with it."""
    await w.store.write("data/f", "1")
    data = (await w.lookup(b"data")).st_ino
    handle = await opened(w, RDWR, b"data", b"f")
    mode, flags = cast(Any, 0o644), cast(Any, WRONLY | EXCL)

    async with trio.open_nursery() as nursery:

        async def create() -> None:
            nursery.start_soon(w.operations.create, data, b"f", mode, flags, ctx())
            await wait_all_tasks_blocked()

        with beside_the_commit(w, trio.lowlevel.checkpoint, create):
            await renaming(w, data, b"f", b"g")
    await w.operations.write(handle, 0, b"2\n")
    assert await w.store.read("data/g") == b"2"
    assert await w.store.read("data/f") == b""


@pytest.mark.parametrize("flags", [WRONLY, WRONLY | APPEND, RDWR, WRONLY | TRUNC])
@pytest.mark.parametrize("by_other_name", [False, True])
@pytest.mark.parametrize("when", ["looked up", "opened"])
def test_a_file_that_is_removed_while_it_is(
    when: str, by_other_name: bool, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The open fails with ESTALE, and the kernel looks the path up again; or the handle's writes succeed.
    They never bring the file back."""

    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/f", "1")
        data = (await w.lookup(b"data")).st_ino
        above = (await w.lookup(*OTHER_NAME)).st_ino if by_other_name else data
        if when == "opened":
            file = (await w.lookup(b"data", b"f")).st_ino
            w.table.handover.clear()
        around_request(
            *(monkeypatch, w, Op.READ),
            before=trio.lowlevel.checkpoint,
            after=lambda: w.operations.unlink(above, cast(Any, b"f"), ctx()),
        )
        if when == "looked up":
            file = (await w.operations.lookup(data, cast(Any, b"f"), ctx())).st_ino
            await refused(errno.ESTALE, w.operations.open(file, cast(Any, flags), ctx()))
        else:
            handle = (await w.operations.open(file, cast(Any, flags), ctx())).fh
            await w.operations.write(handle, 0, b"2\n")
            await w.operations.release(handle)
        assert not await w.store.exists("data/f")
        assert not w.table.open_files_of(w.view).at_and_below(b"/")

    test()


@in_world
async def test_a_file_that_is_removed_by_its_other_name_before_the_open(w: World) -> None:
    await w.store.write("data/f", "1")
    file = (await w.lookup(b"data", b"f")).st_ino
    await w.operations.unlink((await w.lookup(*OTHER_NAME)).st_ino, cast(Any, b"f"), ctx())
    await refused(errno.ESTALE, w.operations.open(file, cast(Any, WRONLY | APPEND), ctx()))


@in_world
async def test_inodes_that_the_kernel_has_forgotten_are_not_kept(w: World) -> None:
    """A file may be open by one name while others come and go."""
    await w.store.write("data/f", "1")
    handle = await opened(w, RDONLY, b".root", b"local", b"domain", b"0", b"data", b"f")
    file = w.table.open_files_of(w.view).get(b"/local/domain/0/data/f")
    assert file is not None
    for _ in range(20):
        entry = await w.lookup(b"data", b"f")
        info = await w.operations.open(entry.st_ino, RDONLY, ctx())
        await w.operations.release(info.fh)
        await w.operations.forget([(entry.st_ino, 1)])
    assert len(file.nodes) <= 2
    await w.operations.release(handle)


@pytest.mark.parametrize("flags", [WRONLY, WRONLY | EXCL])
@pytest.mark.parametrize("operation", ["unlink", "rename", "aside", "replace"])
def test_an_open_empty_file_of_the_name_of_a_container(operation: str, flags: int) -> None:
    """It stays a file as long as it is open."""

    @in_world
    async def test(w: World) -> None:
        home = b"/local/domain/0"
        name, mode = cast(Any, b"device"), cast(Any, 0o644)
        fh = (await w.operations.create(ROOT, name, mode, cast(Any, flags), ctx()))[0].fh
        if operation == "replace":
            await w.operations.mkdir(ROOT, cast(Any, b"other"), mode, ctx())
            await refused(errno.ENOTDIR, renaming(w, ROOT, b"other", name))
            await w.operations.rmdir(ROOT, cast(Any, b"other"), ctx())
        elif operation == "unlink":
            await w.operations.unlink(ROOT, name, ctx())
            await w.operations.release(fh)
            assert not await w.store.exists(home + b"/device")
            return
        elif operation == "rename":
            await renaming(w, ROOT, name, b"plain")
            assert not stat.S_ISDIR((await w.lookup(b"plain")).st_mode)
        else:
            await renaming(w, ROOT, name, b"device~")
            assert await content_of(w, b"device~") == b""
        await w.operations.write(fh, 0, b"1\n")
        await w.operations.release(fh)

    test()


@pytest.mark.parametrize("exists", [True, False])
def test_a_late_write_needs_no_transaction(exists: bool) -> None:
    """A guest has ten, and others may have taken them."""

    @in_world
    async def test(w: World) -> None:
        data = (await w.lookup(b"data")).st_ino
        if exists:
            await w.store.write("data/f", "1")
            handle = await opened(w, WRONLY | TRUNC, b"data", b"f")
        else:
            mode, flags = cast(Any, 0o644), cast(Any, WRONLY)
            handle = (await w.operations.create(data, b"f", mode, flags, ctx()))[0].fh
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(open_files, "FRESH_SECONDS", -1.0)
            full = XenstoreError("EQUOTA", Request(Op.TRANSACTION_START, b"\0"))
            patch.setattr(w.view, "atomically", Mock(side_effect=full))
            await w.operations.write(handle, 0, b"2\n")
            assert await w.store.read("data/f") == b"2"
            await w.operations.release(handle)

    test()


# --------------------------------------------------------- files that other clients remove or change


@in_world
async def test_a_directory_that_replaces_one_that_another_client_removed(w: World) -> None:
    """Nothing of the old one is in it, and no handle of the old one reaches its files."""
    await w.store.write("data/d/f", "new")
    await w.store.write("data/e/f", "old")
    data = (await w.lookup(b"data")).st_ino
    source, target = [(await w.lookup(b"data", name)).st_ino for name in (b"d", b"e")]
    await fill(w, source, b".x", b"new")
    for name in (b".x", b".y"):
        await fill(w, target, name, b"old")
    handle = await opened(w, RDWR, b"data", b"e", b"f")
    await w.store.delete("data/e")
    await w.operations.rename(data, b"d", data, b"e", cast(Any, 0), ctx())
    assert await content_of(w, b"data", b"e", b".x") == b"new"
    await refused(errno.ENOENT, w.lookup(b"data", b"e", b".y"))
    assert len(w.table.open_files_of(w.view)._scratch) == 1
    await refused(errno.ESTALE, w.operations.read(handle, 0, 4096))
    await refused(errno.ESTALE, w.operations.write(handle, 0, b"lost"))
    assert await w.store.read("data/e/f") == b"new"


@in_world
async def test_a_directory_that_is_renamed_to_a_name_that_another_client_removed(w: World) -> None:
    """For the kernel it replaces the inode that it has for the name.  That inode is dead, and must not come
    back."""
    await w.store.write("data/d/f", "1")
    await w.store.write("data/e/f", "1")
    data = (await w.lookup(b"data")).st_ino
    dead = (await w.lookup(b"data", b"e")).st_ino
    await w.lookup(b"data", b"d")
    await w.store.delete("data/e")
    await renaming(w, data, b"d", b"e")
    assert (await w.lookup(b"data", b"e")).st_ino != dead
    await renaming(w, data, b"e", b"d")
    await w.store.write("data/e/f", "1")
    assert (await w.lookup(b"data", b"e")).st_ino != dead


@in_world
async def test_a_directory_that_is_renamed_to_its_other_name(w: World) -> None:
    """For the kernel these are two directories, and the second is dead."""
    await w.store.write("data/d/f", "1")
    data = (await w.lookup(b"data")).st_ino
    other_name = (b".root", b"local", b"domain", b"0", b"data")
    other = (await w.lookup(*other_name)).st_ino
    dead = (await w.lookup(*other_name, b"d")).st_ino
    name, flags = cast(Any, b"d"), cast(Any, 0)
    await w.operations.rename(data, name, other, name, flags, ctx())
    assert (await w.lookup(*other_name, b"d")).st_ino != dead


@pytest.mark.parametrize("flags", [RDWR, RDWR | TRUNC])
def test_a_file_that_is_created_where_another_client_removed_an_open_one(flags: int) -> None:
    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/f", "1")
        data = (await w.lookup(b"data")).st_ino
        old = await opened(w, flags, b"data", b"f")
        await w.store.delete("data/f")
        await refused(errno.ENOENT, w.lookup(b"data", b"f"))
        mode, fl = cast(Any, 0o644), cast(Any, WRONLY)
        new = (await w.operations.create(data, b"f", mode, fl, ctx()))[0].fh
        assert await content_of(w, b"data", b"f") == b""
        await w.operations.write(new, 0, b"new\n")
        await w.operations.release(new)
        await refused(errno.ESTALE, w.operations.write(old, 0, b"old\n"))
        await w.operations.release(old)
        assert await w.store.read("data/f") == b"new"

    test()


@pytest.mark.parametrize("meanwhile", ["another value", "a refused write"])
def test_a_truncation_beside_an_older_one(meanwhile: str) -> None:
    @in_world
    async def test(w: World) -> None:
        await w.store.write("data/f", "1")
        first = await opened(w, WRONLY | TRUNC, b"data", b"f")
        if meanwhile == "another value":
            await w.store.write("data/f", "2")
        else:
            await refused(errno.EFBIG, w.operations.write(first, 0, b"x" * 5000))
        second = await opened(w, WRONLY | TRUNC, b"data", b"f")
        assert await content_of(w, b"data", b"f") == b""
        await w.operations.release(second)
        assert await w.store.read("data/f") == b""
        await w.operations.release(first)

    test()


@in_world
async def test_a_truncated_file_keeps_another_value_when_it_is_removed(w: World) -> None:
    await w.store.write("data/f", "1")
    data = (await w.lookup(b"data")).st_ino
    handle = await opened(w, RDWR | TRUNC, b"data", b"f")
    await w.store.write("data/f", "2")
    assert await w.operations.read(handle, 0, 4096) == b"2\n"
    await w.operations.unlink(data, b"f", ctx())
    assert await w.operations.read(handle, 0, 4096) == b"2\n"


def test_sticky_directories_are_bounded() -> None:
    sticky = StickyDirectories()
    for number in range(STICKY_MAX + 10):
        sticky.add(b"/%d" % number)
    assert b"/9" not in sticky
    assert b"/10" in sticky
    assert not sticky.has_value(b"/10")
    sticky.add(b"/10", with_value=True)
    sticky.add(b"/10")
    assert sticky.has_value(b"/10")


# ------------------------------------------------------------------------------------------ errors


def test_errnos_of_replies(caplog: pytest.LogCaptureFixture) -> None:
    def errno_of(name: str) -> int:
        return translate("read", XenstoreError(name, read(b"/x")), pytest.fail).errno

    assert errno_of("EQUOTA") == errno.EDQUOT
    # ENOSYS would turn the operation off.
    assert errno_of("ENOSYS") == errno.EOPNOTSUPP
    assert caplog.text == ""
    assert errno_of("EWHATEVER") == errno.EIO
    assert "EWHATEVER" in caplog.text


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FUSEError(errno.ENOTDIR), errno.ENOTDIR),
        (XenstoreError("EAGAIN", read(b"/x")), errno.EAGAIN),
        (ConnectionLost("gone"), errno.EIO),
        (RequestTimeout("late"), errno.ETIMEDOUT),
        (TransactionEnded("ended"), errno.ESTALE),
        (StoreUnavailable("none", "hint"), errno.EIO),
        (WireError("nonsense"), errno.EIO),
        (KeyError("a bug"), errno.EIO),
        (AssertionError("a bug"), errno.EIO),
    ],
)
def test_every_exception_becomes_an_errno(
    error: Exception,
    number: int,
    at_once: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception in a handler is EIO and a logged traceback, never a dead mount."""

    def fail_at_once(self: Directory, name: bytes, pid: int) -> pyfuse3.EntryAttributes:
        raise error

    async def fail_later(self: Directory, name: bytes, pid: int) -> pyfuse3.EntryAttributes:
        raise error

    fail = fail_at_once if at_once else fail_later

    @in_world
    async def test(w: World) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "lookup", fail)
            await refused(number, w.operations.lookup(ROOT, b"name", ctx()))
            w.operations.traces = True
            await refused(number, w.operations.lookup(ROOT, b"name", ctx()))
            w.operations.traces = False
        answered = w.operations.answered
        assert (await w.lookup(b"name")).st_size == 9
        assert w.operations.answered == answered + 1
        assert w.operations.kernel.under_way == 0

    with caplog.at_level(logging.WARNING):
        test()
    bug = isinstance(error, KeyError | AssertionError)
    assert ("Traceback" in caplog.text) is bug


@in_world
async def test_handles_that_are_not_open(w: World) -> None:
    await refused(errno.EIO, w.operations.read(4711, 0, 10))
    await refused(errno.EIO, w.operations.release(4711))


@in_world
async def test_what_is_due_at_the_end_is_written(w: World) -> None:
    await w.store.write("data/x", "old")
    entry = await w.lookup(b"data", b"x")
    await w.operations.open(entry.st_ino, WRONLY | TRUNC, ctx())
    data = await w.lookup(b"data")
    await w.operations.create(data.st_ino, b"touched", 0o644, WRONLY | APPEND, ctx())
    assert await w.store.read("data/x") == b"old"
    await w.operations.end(w.view)
    assert await w.store.read("data/x") == b""
    assert await w.store.read("data/touched") == b""
    assert len(w.operations) == 0


@in_world
async def test_data_that_does_not_exist_is_a_directory_by_both_of_its_names(w: World) -> None:
    await w.store.delete("data")
    for name in (b"data", b"data.d"):
        assert stat.S_ISDIR((await w.lookup(name)).st_mode)


@in_world
async def test_exclusive_creation(w: World) -> None:
    data = await w.lookup(b"data")
    await w.operations.create(data.st_ino, b"lock", 0o644, WRONLY | EXCL, ctx())
    # A caller that looked it up before it existed, and comes later.
    await refused(
        errno.EEXIST, w.operations.create(data.st_ino, b"lock", 0o644, WRONLY | EXCL, ctx())
    )
    await refused(errno.EEXIST, w.operations.mkdir(data.st_ino, b"lock", 0o755, ctx()))


def test_no_scratch_file_can_have_an_own_name_of_any_directory() -> None:
    def classes(base: type[Directory]) -> Iterator[type[Directory]]:
        yield base
        for derived in base.__subclasses__():
            yield from classes(derived)

    names: set[bytes] = set()
    for directory in classes(Directory):
        names.update(directory.own)
    assert names == OWN_NAMES


@in_world
async def test_an_open_scratch_file_has_the_attributes_of_the_node_that_it_became(w: World) -> None:
    info, entry = await w.operations.create(
        ROOT, b".x.tmp", cast(Any, 0o644), cast(Any, WRONLY), ctx()
    )
    assert await w.operations.listxattr(entry.st_ino, ctx()) == []
    await w.operations.rename(ROOT, b".x.tmp", ROOT, b"x", cast(Any, 0), ctx())
    assert await w.operations.listxattr(entry.st_ino, ctx()) == [b"user.xs.perms"]
    perms = await w.operations.getxattr(entry.st_ino, cast(Any, b"user.xs.perms"), ctx())
    assert perms == b"n0"
    await w.operations.release(info.fh)


# -------------------------------------------------------------------------------------- subtrees


@in_world
async def test_a_text_that_gets_too_long(w: World) -> None:
    for number in range(100):
        await w.store.write(f"data/{number}", b"v" * 100)
    text = await w.lookup(b"data", b".ls")

    async def open_as(uid: int) -> int:
        return (await w.operations.open(text.st_ino, RDONLY, ctx(uid=uid))).fh

    one = await open_as(0)
    size = len(await w.operations.read(one, 0, 1 << 20))
    assert w.table.text_bytes.used == size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dumps, "TEXT_MAX", size - 1)
        await refused(errno.EFBIG, open_as(0))
        patch.setattr(dumps, "TEXT_MAX", size)
        patch.setattr(w.table.text_bytes, "limit", 3 * size - 1)
        two = await open_as(0)
        await refused(errno.ENFILE, open_as(0))
        await w.operations.release(one)
        await w.operations.release(two)
        # Users who are neither root nor the one who mounted share half of it.
        other = await open_as(1000)
        await refused(errno.ENFILE, open_as(1001))
        await w.operations.release(other)
    assert w.table.text_bytes.used == w.table.text_bytes.used_by_unprivileged == 0


@pytest.mark.parametrize(("flags", "number"), [(0, errno.ESTALE), (EXCL, errno.EEXIST)])
def test_two_tasks_that_create_one_scratch_file(flags: int, number: int) -> None:
    """After ESTALE the kernel looks the name up again, and opens the file of the other task."""

    @in_world
    async def test(w: World) -> None:
        data = (await w.lookup(b"data")).st_ino
        name, mode = cast(Any, b"x~"), cast(Any, 0o100600)
        await w.operations.create(data, name, mode, cast(Any, WRONLY), ctx())
        with pytest.raises(FUSEError) as refused:
            await w.operations.create(data, name, mode, cast(Any, WRONLY | flags), ctx(2))
        assert refused.value.errno == number

    test()
