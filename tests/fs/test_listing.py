"""Listings in process, over the embedded store, without a kernel.

The tests look at the requests, and at the replies to the kernel.  A directory can change between its
opening, the parts in which it is read, and a rewind.
"""

from __future__ import annotations

import errno
import stat
import tracemalloc
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import pyfuse3
import pytest
from pyfuse3 import RequestContext

from tests.support.operating import (
    EXCL,
    ROOT,
    WRONLY,
    World,
    ctx,
    entries_of,
    in_world,
    in_world_of,
    listed,
    refused,
)
from xsfs.fs.inodes import LISTING_BYTES_MAX
from xsfs.fs.nodes import FORGOTTEN
from xsfs.view.names import join
from xsfs.view.view import FETCH_WINDOW, HINT_SIZE_MAX, HINTS_MAX, NodeState
from xsfs.xenstore.errors import ConnectionLost
from xsfs.xenstore.protocol import write
from xsfs.xenstore.store import open_store


@in_world
async def test_a_listing_is_one_pipeline(w: World) -> None:
    assert await w.costs(lambda: w.operations.opendir(ROOT, ctx())) == 2


@in_world
async def test_a_stat_hints_the_names(w: World) -> None:
    await w.store.write("data/d/x", b"1")
    directory = (await w.lookup(b"data", b"d")).st_ino
    assert await w.costs(lambda: w.operations.getattr(directory, ctx())) == 1
    assert await w.costs(lambda: w.operations.opendir(directory, ctx())) == 2 + 1
    assert await w.costs(lambda: w.operations.opendir(directory, ctx())) == 2, "used once"


@in_world
async def test_a_broken_listing_is_no_hint_and_hints_are_bounded(w: World) -> None:
    hints = w.view.hints
    w.view._saw_children(b"/x", b"a\0")
    assert hints[b"/x"] == b"a\0"
    w.view._saw_children(b"/x", b"a\0b")
    assert b"/x" not in hints
    for number in range(HINTS_MAX + 1):
        w.view._saw_children(b"/%d" % number, b"a\0")
    assert len(hints) == HINTS_MAX
    assert b"/0" not in hints


@in_world
async def test_a_long_listing_is_no_hint(w: World) -> None:
    """A wrong hint costs as many requests as it has names."""
    longest = "x" * (HINT_SIZE_MAX - 1)
    await w.store.write(f"data/short/{longest}", b"1")
    await w.store.write(f"data/long/{longest}x", b"1")
    for name, expected in ((b"short", 2 + 1), (b"long", 2)):
        directory = (await w.lookup(b"data", name)).st_ino
        await w.operations.getattr(directory, ctx())
        assert await w.costs(partial(w.operations.opendir, directory, ctx())) == expected


@in_world
async def test_a_listing_asks_for_values_only_where_the_kind_depends_on_them(w: World) -> None:
    await w.store.write("data/file", b"value")
    await w.store.mkdir("device")
    states: dict[bytes, NodeState | None] = {}

    async def fetch(path: bytes, *names: bytes) -> None:
        states.update(await w.view.kinds(path, names))

    home = w.view.home
    assert await w.costs(lambda: fetch(home + b"/data", b"file")) == 1
    # A node with children is a directory, whatever its value.
    assert await w.costs(lambda: fetch(home, b"data")) == 1
    # An empty node may be one by convention, or because it was one.
    assert await w.costs(lambda: fetch(home, b"device", b"data")) == 4
    await w.store.delete("data/file")
    assert await w.costs(lambda: fetch(home, b"data")) == 3
    shown = {
        name: state is not None and w.view.is_directory(join(home, name), state)
        for name, state in states.items()
    }
    assert shown == {b"file": False, b"device": True, b"data": True}


@in_world
async def test_hints_that_are_right_wrong_or_missing_give_one_listing(w: World) -> None:
    await w.store.write("data/file", b"value")
    await w.store.write("data/directory/x", b"value")
    data = (await w.lookup(b"data")).st_ino
    await w.operations.mkdir(data, b"empty", cast(Any, 0), ctx())
    expected = {b".": True, b"..": True, b"file": False, b"directory": True, b"empty": True}

    assert await listed(w, await w.operations.opendir(data, ctx())) == expected
    await w.operations.getattr(data, ctx())
    assert await listed(w, await w.operations.opendir(data, ctx())) == expected
    await w.operations.getattr(data, ctx())
    await w.store.write("data/new", b"value")
    with_new = await w.operations.opendir(data, ctx())
    await w.store.delete("data/new")
    # Its name was not hinted: its kind is fetched when the listing is read, and it has gone.
    assert await listed(w, with_new) == expected
    assert await listed(w, await w.operations.opendir(data, ctx())) == expected


@in_world
async def test_a_listing_with_hints_is_one_round_trip(w: World) -> None:
    for number in range(5):
        await w.store.write(f"data/{number}", b"value")
    data = (await w.lookup(b"data")).st_ino
    await w.operations.getattr(data, ctx())
    handles: list[pyfuse3.FileHandleT] = []

    async def open_it() -> None:
        handles.append(await w.operations.opendir(data, ctx()))

    assert await w.costs(open_it) == 2 + 5
    assert await w.costs(lambda: listed(w, handles[0])) == 0


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
    await w.operations.rename(data, b"d", data, b"e", cast(Any, 0), ctx())
    assert await listed(w, fh) == expected
    assert await listed(w, fh) == expected, "after a rewind"


async def prepared(w: World, directory: pyfuse3.InodeT) -> pyfuse3.FileHandleT:
    """An open listing whose children's kinds are fetched, and that has not been read."""
    await w.operations.getattr(directory, ctx())  # a hint
    return await w.operations.opendir(directory, ctx())


@in_world
async def test_a_child_that_is_looked_up_before_it_is_read(w: World) -> None:
    await w.store.write("data/file", b"value")
    data = (await w.lookup(b"data")).st_ino
    fh = await prepared(w, data)
    listed_before = w.table.get((await w.lookup(b"data", b"file")).st_ino)
    await forget(w, listed_before.inode)
    file = (await w.lookup(b"data", b"file")).st_ino
    known = w.table.get(file)
    assert known is not listed_before
    assert (await entries_of(w, fh))[b"file"].inode == file
    assert w.table.get(file) is known
    assert known.lookups == 2
    assert listed_before.lookups == FORGOTTEN


async def forget(w: World, inode: pyfuse3.InodeT) -> None:
    """The kernel forgets the node."""
    await w.operations.forget([(inode, w.table.get(inode).lookups)])
    assert w.table.peek(inode) is None


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
        inode = (await entries_of(w, fh))[b"file"].inode
        assert w.table.get(inode).path == b"/local/domain/0/data/file"
        if not forgotten:
            assert w.table.get(file).path == b"/local/domain/0/data/new"

    run()


@in_world
async def test_a_directory_that_was_renamed_and_is_forgotten_before_it_is_read(w: World) -> None:
    """It comes back under the number of the place where it is, so that it is found when it moves on."""
    await w.store.write("data/old/x", b"1")
    data = (await w.lookup(b"data")).st_ino
    old = (await w.lookup(b"data", b"old")).st_ino
    await w.operations.rename(data, b"old", data, b"new", cast(Any, 0), ctx())
    fh = await prepared(w, data)
    await forget(w, old)
    inode = (await entries_of(w, fh))[b"new"].inode
    assert inode != old
    await w.operations.rename(data, b"new", data, b"third", cast(Any, 0), ctx())
    assert w.table.get(inode).path == b"/local/domain/0/data/third"


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
        assert (await entries_of(w, fh))[b"file"].inode == other, "what is there now"

    run()


@in_world
async def test_a_child_that_is_moved_to_another_directory_before_it_is_read(w: World) -> None:
    await w.store.write("data/file", b"value")
    await w.store.write("data/other/x", b"value")
    data = (await w.lookup(b"data")).st_ino
    other = (await w.lookup(b"data", b"other")).st_ino
    fh = await prepared(w, data)
    file = (await w.lookup(b"data", b"file")).st_ino
    await w.operations.rename(data, b"file", other, b"file", cast(Any, 0), ctx())
    inode = (await entries_of(w, fh))[b"file"].inode
    assert w.table.get(inode).path == b"/local/domain/0/data/file"
    assert w.table.get(file).path == b"/local/domain/0/data/other/file"


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_an_empty_directory_that_goes_before_it_is_read(how: str) -> None:
    """Inode, mode and timeout of an entry fit each other, or the kernel would take the inode for broken."""

    @in_world
    async def run(w: World) -> None:
        await w.store.write("data/a", b"v")
        data = (await w.lookup(b"data")).st_ino
        await w.operations.mkdir(data, b"empty", cast(Any, 0), ctx())
        fh = await w.operations.opendir(data, ctx())
        told = await entries_of(w, fh, 0, 3)
        assert list(told) == [b".", b"..", b"a"]
        if how == "renamed":
            await w.operations.rename(data, b"empty", data, b"new", cast(Any, 0), ctx())
        else:
            await w.operations.rmdir(data, b"empty", ctx())
        if how == "replaced":
            await w.store.write("data/empty", b"a file")
        told = await entries_of(w, fh, told[b"a"].next_id)
        assert list(told) == [b"empty"]
        for entry in told.values():
            node = w.table.get(entry.inode)
            assert stat.S_IFMT(entry.mode) == node.kind
            assert entry.timeout == node.entry_timeout

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
    """A rewind shows a child that was made since."""
    await w.store.write("data/a", "1")
    data = await w.lookup(b"data")
    fh = await w.operations.opendir(data.st_ino, ctx())
    assert await entries_of(w, fh, 1000) == {}
    await w.store.write("data/b", "1")
    assert set(await entries_of(w, fh)) == {b".", b"..", b"a", b"b"}
    assert await entries_of(w, fh, 1000) == {}
    await w.operations.mkdir(data.st_ino, b"c", cast(Any, 0), ctx())
    await listed(w, await w.operations.opendir(data.st_ino, ctx()))
    fh = await w.operations.opendir(data.st_ino, ctx())
    assert await w.costs(lambda: entries_of(w, fh, 1000)) == 0, "though c is in doubt"


@in_world
async def test_a_listing_in_parts(w: World) -> None:
    """The kernel knows the entries that it got, and no more.  Each position gives one and the same entry."""
    await w.store.write("data", b"value")
    for number in range(4):
        await w.store.write(f"data/{number}", b"1")
    data = (await w.lookup(b"data")).st_ino
    fh = await w.operations.opendir(data, ctx())
    first = await entries_of(w, fh, 0, 5)
    assert list(first) == [b".", b"..", b".value", b"0", b"1"]
    known = {entry.inode for entry in first.values()}
    assert [w.table.get(inode).lookups for inode in known - {data}] == [1, 1, 1]
    assert len(w.table) == 2 + 3, "the root and data, and what was listed"
    rest = await entries_of(w, fh, first[b"1"].next_id)
    assert list(rest) == [b"2", b"3"]
    assert await entries_of(w, fh, 2) == {
        name: entry for name, entry in (first | rest).items() if name not in (b".", b"..")
    }
    assert first[b"."].inode == first[b".."].inode == data


@in_world
async def test_a_reply_fails_as_a_whole(w: World) -> None:
    """It ends before it would have to wait for more kinds.  If it failed in its middle, the kernel would not
    learn of its nodes."""
    for number in range(FETCH_WINDOW + 50):
        await w.store.write(f"data/{number}", b"1")
    data = (await w.lookup(b"data")).st_ino
    known = await w.lookup(b"data", b"7")
    kinds = w.view.kinds
    replies: list[bytes] = []

    async def failing(path: bytes, names: Sequence[bytes]) -> dict[bytes, NodeState | None]:
        if len(replies) > 2:
            raise ConnectionLost("between two windows")
        return await kinds(path, names)

    def reply(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        replies.append(name)
        return True

    fh = await w.operations.opendir(data, ctx())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.view, "kinds", failing)
        patch.setattr(pyfuse3, "readdir_reply", reply)
        await w.operations.readdir(fh, 0, cast(Any, None))
        assert len(replies) == 2 + FETCH_WINDOW
        for _ in range(2):
            await refused(errno.EIO, w.operations.readdir(fh, len(replies), cast(Any, None)))
            assert len(replies) == 2 + FETCH_WINDOW
            assert b"7" in replies
            assert len(w.table) == 2 + FETCH_WINDOW, "the root, data, and what was listed"
            assert w.table.get(known.st_ino).lookups == 2
    assert len(await listed(w, fh)) == 2 + FETCH_WINDOW + 50


@in_world
async def test_a_directory_that_is_renamed_between_two_parts(w: World) -> None:
    for number in range(FETCH_WINDOW + 50):
        await w.store.write(f"data/d/{number}", b"1")
    data = (await w.lookup(b"data")).st_ino
    fh = await w.operations.opendir((await w.lookup(b"data", b"d")).st_ino, ctx())
    first = await entries_of(w, fh, 0, 100)
    await w.operations.rename(data, b"d", data, b"e", cast(Any, 0), ctx())
    last = list(first.values())[-1]
    rest = await entries_of(w, fh, last.next_id)
    assert len(first) + len(rest) == FETCH_WINDOW + 50 + 2


@in_world
async def test_an_alias_whose_node_has_gone(w: World) -> None:
    """xsfs still knows the name behind it.  Nothing can be created by an alias."""
    long = "n" * 300
    await w.store.write(f"data/{long}", b"value")
    data = (await w.lookup(b"data")).st_ino
    (alias,) = set(await listed(w, await w.operations.opendir(data, ctx()))) - {b".", b".."}
    assert (await w.lookup(b"data", alias)).st_size == len("value\n")
    await w.store.delete(f"data/{long}")
    await refused(errno.ENOENT, w.lookup(b"data", alias))
    await refused(errno.ENOENT, w.operations.unlink(data, cast(Any, alias), ctx()))
    name, mode = cast(Any, alias), cast(Any, 0o644)
    await refused(errno.EINVAL, w.operations.mkdir(data, name, mode, ctx()))
    for flags in (WRONLY, WRONLY | EXCL):
        await refused(errno.EINVAL, w.operations.create(data, name, mode, cast(Any, flags), ctx()))
    assert await w.store.list("data") == []


@in_world
async def test_a_value_of_a_directory_is_listed_as_the_file_that_it_is(w: World) -> None:
    await w.store.write("data/d", b"value")
    await w.store.write("data/d/x", b"1")
    directory = await w.lookup(b"data", b"d")
    value = await w.lookup(b"data", b"d", b".value")
    told = await entries_of(w, await w.operations.opendir(directory.st_ino, ctx()))
    assert told[b".value"][:2] == (value.st_ino, value.st_mode)


@in_world_of(5)
async def test_what_a_guest_may_only_read_is_listed_so(w: World) -> None:
    home = "/local/domain/5"
    async with open_store(connect=w.connect_as(0)) as dom0:
        await dom0.write(f"{home}/data/d", "value")
        await dom0.write(f"{home}/data/d/x", "value")
        for path, perms in (
            *((home, "n5"), (f"{home}/data", "n5")),
            *((f"{home}/data/d", "r0"), (f"{home}/data/d/x", "r0")),
        ):
            await dom0.set_perms(path, perms)
    directory = (await w.lookup(b"data", b"d")).st_ino
    told = await entries_of(w, await w.operations.opendir(directory, ctx()))
    assert told[b".value"].mode == told[b"x"].mode == stat.S_IFREG | 0o400


@in_world
async def test_what_was_listed_as_a_directory_stays_one_without_children(w: World) -> None:
    await w.store.write("data/d/x", b"1")
    data = (await w.lookup(b"data")).st_ino
    await listed(w, await w.operations.opendir(data, ctx()))
    await w.store.delete("data/d/x")
    assert stat.S_ISDIR((await w.lookup(b"data", b"d")).st_mode)
    assert (await listed(w, await w.operations.opendir(data, ctx())))[b"d"]


@in_world
async def test_the_directory_data_is_listed_while_it_is_not_there(w: World) -> None:
    await w.store.delete("data")
    for _ in range(2):  # the second time it is among the names that are guessed, and is not
        assert (await listed(w, await w.operations.opendir(ROOT, ctx())))[b"data"]


async def write_children(w: World, count: int) -> None:
    home = w.view.home
    await w.store.pipeline([write(b"%s/data/%d" % (home, number), b"") for number in range(count)])


@in_world
async def test_the_memory_of_open_listings_is_bounded(w: World) -> None:
    await write_children(w, 5000)
    await w.store.write("other/x", b"")
    data = (await w.lookup(b"data")).st_ino
    other = (await w.lookup(b"other")).st_ino
    nobody, root = ctx(uid=65534), ctx()

    async def open_all(caller: RequestContext) -> list[pyfuse3.FileHandleT]:
        handles: list[pyfuse3.FileHandleT] = []

        async def open_1000() -> None:
            for _ in range(1000):
                handles.append(await w.operations.opendir(data, caller))
                await entries_of(w, handles[-1], 0, FETCH_WINDOW)

        await refused(errno.ENFILE, open_1000())
        return handles

    await w.operations.releasedir(await w.operations.opendir(data, root))
    assert LISTING_BYTES_MAX == 64 << 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.table.listing_bytes, "limit", 8 << 20)  # the test is quicker so
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            by_nobody = await open_all(nobody)
            by_root = await open_all(root)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before <= 8 << 20
        assert len(by_nobody) >= 5
        assert len(by_root) >= 5

        # One that is closed makes room for another, of any user.
        await w.operations.releasedir(by_root.pop())
        assert set(await listed(w, await w.operations.opendir(other, root))) == {b".", b"..", b"x"}
        for fh in (*by_nobody, *by_root):
            await w.operations.releasedir(fh)
        assert len(await open_all(nobody)) == len(by_nobody)


@in_world
async def test_listings_of_others_work_while_one_user_has_all_that_are_for_users(w: World) -> None:
    await write_children(w, 5000)
    data = (await w.lookup(b"data")).st_ino

    async def open_1000() -> None:
        for _ in range(1000):
            await w.operations.opendir(data, ctx(uid=65534))

    await refused(errno.ENFILE, open_1000())
    assert len(await listed(w, await w.operations.opendir(data, ctx()))) == 5002


@in_world
async def test_a_file_whose_creation_is_owed_is_listed(w: World) -> None:
    data = (await w.lookup(b"data")).st_ino
    info, _ = await w.operations.create(data, b"new", cast(Any, 0o644), cast(Any, WRONLY), ctx())
    expected = {b".": True, b"..": True, b"new": False}
    for _ in range(2):
        assert await listed(w, await w.operations.opendir(data, ctx())) == expected
    by_root = (await w.lookup(b".root", b"local", b"domain", b"0", b"data")).st_ino
    assert await listed(w, await w.operations.opendir(by_root, ctx())) == expected
    await refused(errno.ENOTEMPTY, w.operations.rmdir(ROOT, b"data", ctx()))
    await w.operations.release(info.fh)
    assert await w.store.read("data/new") == b""


@in_world
async def test_a_listing_leaves_the_time_of_a_directory_that_is_always_shown(w: World) -> None:
    for name in await w.store.list(w.view.home):
        await w.store.delete(f"{w.view.home.decode()}/{name.decode()}")
    await w.store.write("data/x", b"1")
    seen = (await w.lookup(b"data")).st_mtime_ns
    times: list[int] = []

    def reply(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        if name == b"data":
            times.append(entry.st_mtime_ns)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyfuse3, "readdir_reply", reply)
        fh = await w.operations.opendir(ROOT, ctx())
        await w.operations.readdir(fh, 0, cast(Any, None))
    assert [*times, (await w.lookup(b"data")).st_mtime_ns] == [seen, seen]
