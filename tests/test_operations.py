"""Ring: the operations in process, over the embedded store, without a kernel.

Here are the facts that a kernel hides: how many requests an operation costs, how a listing is asked
for, and what becomes of an exception.
"""

from __future__ import annotations

import errno
import logging
from typing import Any, cast

import pyfuse3
import pytest
from pyfuse3 import FUSEError

from tests.operating import (
    APPEND,
    EXCL,
    RDONLY,
    ROOT,
    TRUNC,
    WRONLY,
    World,
    ctx,
    entries_of,
    in_world,
    listed,
    refused,
)
from xsfs.directories import Directory
from xsfs.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreUnavailable,
    TransactionEnded,
    XenstoreError,
)
from xsfs.known import KNOWN_MAX, KnownDirectories
from xsfs.listing import DirectoryHandle
from xsfs.looks import Look
from xsfs.names import join
from xsfs.node import FORGOTTEN
from xsfs.verdicts import errno_of
from xsfs.view import Children
from xsfs.wire import WireError, directory, read, watch, write

# ------------------------------------------------------------------------------------ round trips


@in_world
async def test_open_read_close_asks_once(w: World) -> None:
    async def cat() -> None:
        entry = await w.lookup(b"name")
        handle = await w.operations.open(entry.st_ino, RDONLY, ctx())
        assert await w.operations.read(handle.fh, 0, 4096) == b"Domain-0\n"
        assert await w.operations.read(handle.fh, 9, 4096) == b""
        await w.operations.release(handle.fh)

    assert await w.costs(cat) == 2  # READ and DIRECTORY, in one burst
    assert len(w.operations) == 0


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


@in_world
async def test_a_listing_asks_one_burst_for_the_names(w: World) -> None:
    assert await w.costs(lambda: w.operations.opendir(ROOT, ctx())) == 2


@in_world
async def test_a_listing_asks_for_values_only_where_the_kind_depends_on_them(w: World) -> None:
    await w.store.write("data/file", b"value")
    await w.store.mkdir("device")
    looks: dict[bytes, Look | None] = {}

    async def look(path: bytes, *names: bytes) -> None:
        looks.update(await w.view.look_at_children(path, names))

    home = w.view.home
    assert await w.costs(lambda: look(home + b"/data", b"file")) == 1
    # What has children is a directory, whatever its value.
    assert await w.costs(lambda: look(home, b"data")) == 1
    # What is empty may be one by custom, or because it was one.
    assert await w.costs(lambda: look(home, b"device", b"data")) == 4
    await w.store.delete("data/file")
    assert await w.costs(lambda: look(home, b"data")) == 3
    shown = {
        name: look is not None and w.view.is_directory(join(home, name), look)
        for name, look in looks.items()
    }
    assert shown == {b"file": False, b"device": True, b"data": True}


@in_world
async def test_it_makes_no_difference_when_the_answers_are_looked_at(w: World) -> None:
    """While the next request is awaited, or when it comes; where a guess was right, wrong, or none."""
    await w.store.write("data/file", b"value")
    await w.store.write("data/directory/x", b"value")
    data = (await w.lookup(b"data")).st_ino
    await w.operations.mkdir(data, b"empty", cast(Any, 0), ctx())
    expected = {b".": True, b"..": True, b"file": False, b"directory": True, b"empty": True}

    async def opened(*, early: bool) -> pyfuse3.FileHandleT:
        fh = await w.operations.opendir(data, ctx())
        if early:
            w.operations._handles.get(fh).prepare()
        return fh

    for early in (True, False):
        for _ in range(2):
            assert await listed(w, await opened(early=early)) == expected
        await w.store.write("data/new", b"value")
        with_new = await opened(early=early)
        await w.store.delete("data/new")
        # Its name came too late for a guess: it is asked for when it is read, and has gone.
        assert await listed(w, with_new) == expected
        assert await listed(w, await opened(early=early)) == expected


@in_world
async def test_a_directory_that_is_renamed_before_it_is_read(w: World) -> None:
    await w.store.write("data/d/file", b"value")
    await w.store.write("data/d/full/x", b"value")
    data = (await w.lookup(b"data")).st_ino
    before = (await w.lookup(b"data", b"d")).st_ino
    await w.operations.mkdir(before, b"empty", cast(Any, 0), ctx())
    expected = {b".": True, b"..": True, b"file": False, b"full": True, b"empty": True}
    assert await listed(w, await w.operations.opendir(before, ctx())) == expected

    fh = await w.operations.opendir(before, ctx())
    w.operations.waiter.do_chore()
    await w.operations.rename(data, b"d", data, b"e", cast(Any, 0), ctx())
    assert await listed(w, fh) == expected
    assert await listed(w, fh) == expected, "after a rewind"


async def prepared(
    w: World, directory: pyfuse3.InodeT, child: bytes = b"file"
) -> pyfuse3.FileHandleT:
    """A listing with this child that is made, but has not been read."""
    await listed(w, await w.operations.opendir(directory, ctx()))
    fh = await w.operations.opendir(directory, ctx())
    w.operations.waiter.do_chore()
    handle = w.operations._handles.get(fh)
    assert isinstance(handle, DirectoryHandle)
    assert child in handle.made
    return fh


@in_world
async def test_a_child_that_is_looked_up_before_it_is_read(w: World) -> None:
    await w.store.write("data/file", b"value")
    data = (await w.lookup(b"data")).st_ino
    fh = await prepared(w, data)
    handle = w.operations._handles.get(fh)
    assert isinstance(handle, DirectoryHandle)
    found = handle.made[b"file"]
    assert found is not None
    made = found[1]
    await w.operations.forget([(made.inode, made.lookups)])
    file = (await w.lookup(b"data", b"file")).st_ino
    known = w.tree.get(file)
    assert known is not made
    await listed(w, fh)
    assert w.tree.get(file) is known
    assert known.lookups == 2
    assert made.lookups == FORGOTTEN


async def forget(w: World, inode: pyfuse3.InodeT) -> None:
    """The kernel forgets the node."""
    await w.operations.forget([(inode, w.tree.get(inode).lookups)])
    assert w.tree.peek(inode) is None


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_child_that_is_renamed_before_it_is_read(*, forgotten: bool) -> None:
    @in_world
    async def run(w: World) -> None:
        await w.store.write("data/file", b"value")
        data = (await w.lookup(b"data")).st_ino
        fh = await prepared(w, data)
        file = (await w.lookup(b"data", b"file")).st_ino
        await w.operations.rename(data, b"file", data, b"new", cast(Any, 0), ctx())
        if forgotten:
            await forget(w, file)
        inode, _ = (await entries_of(w, fh))[b"file"]
        assert w.tree.get(inode).path == b"/local/domain/0/data/file"
        if not forgotten:
            assert w.tree.get(file).path == b"/local/domain/0/data/new"

    run()


@in_world
async def test_a_directory_that_was_renamed_and_is_forgotten_before_it_is_read(w: World) -> None:
    """It comes back under the number of the place where it is, so that it is found when it moves on."""
    await w.store.write("data/old/x", b"1")
    data = (await w.lookup(b"data")).st_ino
    old = (await w.lookup(b"data", b"old")).st_ino
    await w.operations.rename(data, b"old", data, b"new", cast(Any, 0), ctx())
    fh = await prepared(w, data, b"new")
    await forget(w, old)
    inode, _ = (await entries_of(w, fh))[b"new"]
    assert inode != old
    await w.operations.rename(data, b"new", data, b"third", cast(Any, 0), ctx())
    assert w.tree.get(inode).path == b"/local/domain/0/data/third"


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_child_that_is_replaced_before_it_is_read(*, forgotten: bool) -> None:
    @in_world
    async def run(w: World) -> None:
        await w.store.write("data/file", b"value")
        await w.store.write("data/other", b"value")
        data = (await w.lookup(b"data")).st_ino
        fh = await prepared(w, data)
        other = (await w.lookup(b"data", b"other")).st_ino
        file = (await w.lookup(b"data", b"file")).st_ino
        if forgotten:
            await forget(w, file)
        await w.operations.rename(data, b"other", data, b"file", cast(Any, 0), ctx())
        assert (await entries_of(w, fh))[b"file"][0] == other, "what is there now"

    run()


@in_world
async def test_a_rewind_that_is_refused_changes_nothing(w: World) -> None:
    await w.store.write("data/d/file", b"value")
    directory = (await w.lookup(b"data", b"d")).st_ino
    expected = {b".": True, b"..": True, b"file": False}
    fh = await w.operations.opendir(directory, ctx())
    assert await listed(w, fh) == expected
    await w.store.delete("data/d")
    await refused(errno.ESTALE, listed(w, fh))
    assert list(await listed(w, fh, 1)) == [b"..", b"file"]
    await w.store.write("data/d/file", b"value")
    assert await listed(w, fh) == expected


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


@in_world
async def test_a_listing_that_makes_no_sense_is_met_by_who_reads_it(w: World) -> None:
    data = (await w.lookup(b"data")).st_ino

    def nonsense() -> Children:
        raise WireError("a listing that makes no sense")

    fh = await w.operations.opendir(data, ctx())
    handle = w.operations._handles.get(fh)
    assert isinstance(handle, DirectoryHandle)
    handle.digest = nonsense
    w.operations.waiter.do_chore()
    await refused(errno.EIO, listed(w, fh))
    # It was met; from the start on it is asked again.
    assert await listed(w, fh, 1) == {b"..": True}
    assert await listed(w, fh) == {b".": True, b"..": True}


def test_known_directories_are_bounded() -> None:
    known = KnownDirectories()
    for number in range(KNOWN_MAX + 10):
        known.add(b"/%d" % number)
    assert known.get(b"/9") is None
    assert known.get(b"/10") is False
    known.add(b"/10", with_value=True)
    known.add(b"/10")
    assert known.get(b"/10") is True


# ------------------------------------------------------------------------------------------ errors


def test_verdicts() -> None:
    for name in ("ENOENT", "EACCES", "EPERM", "ENOSPC", "EAGAIN", "EEXIST", "EROFS", "EBUSY"):
        assert errno_of(XenstoreError(name, read(b"/x"))) == getattr(errno, name)
    assert errno_of(XenstoreError("EQUOTA", write(b"/x", b""))) == errno.EDQUOT
    assert errno_of(XenstoreError("E2BIG", write(b"/x", b""))) == errno.EFBIG
    assert errno_of(XenstoreError("E2BIG", directory(b"/x"))) == errno.E2BIG
    assert errno_of(XenstoreError("E2BIG", watch(b"/x", b"t"))) == errno.ENOSPC
    assert errno_of(XenstoreError("EINVAL", read(b"/x"))) == errno.EINVAL
    assert errno_of(XenstoreError("EINVAL", read(b"/" + b"x" * 2048))) == errno.ENAMETOOLONG
    assert errno_of(XenstoreError("EINVAL", watch(b"/x", b"t"))) == errno.EDQUOT
    assert errno_of(XenstoreError("EINVAL", watch(b"/" + b"x" * 2048, b"t"))) == errno.ENAMETOOLONG
    assert errno_of(XenstoreError("EWHATEVER", read(b"/x"))) == errno.EIO


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
    error: Exception, number: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a handler is EIO and a logged traceback, never a dead mount."""

    async def fail(self: Directory, name: bytes, pid: int) -> pyfuse3.EntryAttributes:
        raise error

    @in_world
    async def test(w: World) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "lookup", fail)
            await refused(number, w.operations.lookup(ROOT, b"name", ctx()))
            w.operations.traces = True
            await refused(number, w.operations.lookup(ROOT, b"name", ctx()))
            w.operations.traces = False
        assert (await w.lookup(b"name")).st_size == 9

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
    await w.operations.end()
    assert await w.store.read("data/x") == b""
    assert await w.store.read("data/touched") == b""
    assert len(w.operations) == 0


@in_world
async def test_exclusive_creation(w: World) -> None:
    data = await w.lookup(b"data")
    await w.operations.create(data.st_ino, b"lock", 0o644, WRONLY | EXCL, ctx())
    # Whoever looked before it was there, and comes later.
    await refused(
        errno.EEXIST, w.operations.create(data.st_ino, b"lock", 0o644, WRONLY | EXCL, ctx())
    )
    await refused(errno.EEXIST, w.operations.mkdir(data.st_ino, b"lock", 0o755, ctx()))
