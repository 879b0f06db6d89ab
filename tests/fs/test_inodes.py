"""Ring: the operations in process: which number a node has, and that it is one node.

Nodes are looked up by several threads, and renamed, removed or forgotten meanwhile.
"""

from __future__ import annotations

import errno
import stat
from typing import Any, cast

import pyfuse3
import pytest
import trio

from tests.support.operating import RDONLY, ROOT, WRONLY, World, ctx, in_world, refused
from xsfs.fs.files import DotValue, ValueFile
from xsfs.fs.inodes import PATHS_MAX
from xsfs.fs.nodes import Node


@in_world
async def test_numbers_are_the_same_after_a_forget(w: World) -> None:
    first = await w.lookup(b"name")
    again = await w.lookup(b"name")
    assert first.st_ino == again.st_ino
    assert len(w.table) == 2
    await w.operations.forget([(first.st_ino, 1)])
    assert len(w.table) == 2
    await w.operations.forget([(first.st_ino, 1)])
    assert len(w.table) == 1
    await refused(errno.ESTALE, w.operations.getattr(first.st_ino, ctx()))
    assert (await w.lookup(b"name")).st_ino == first.st_ino
    await w.operations.forget([(ROOT, 1000), (12345, 1)])
    assert stat.S_ISDIR((await w.operations.getattr(ROOT, ctx())).st_mode)


@in_world
async def test_a_file_and_a_directory_at_one_place_differ(w: World) -> None:
    await w.store.write("data/x", "1")
    file = await w.lookup(b"data", b"x")
    await w.store.write("data/x/y", "2")
    directory_entry = await w.lookup(b"data", b"x")
    assert file.st_ino != directory_entry.st_ino
    assert stat.S_ISREG(file.st_mode)
    assert stat.S_ISDIR(directory_entry.st_mode)
    await refused(errno.ESTALE, w.operations.getattr(file.st_ino, ctx()))
    # The same node by three ways is three inodes: the kernel would move one directory's entry about.
    forced = await w.lookup(b"data", b"x.d")
    other = await w.lookup(b".root", b"local", b"domain", b"0", b"data", b"x")
    assert len({directory_entry.st_ino, forced.st_ino, other.st_ino}) == 3


@in_world
async def test_numbers_that_collide(w: World) -> None:
    data = await w.lookup(b"data")
    parent = w.table.get(data.st_ino)
    await w.store.write("data/x", "1")
    expected = w.table.node(ValueFile, parent, b"x").inode
    squatter = w.table.node(ValueFile, parent, b"squatter")
    squatter.inode = expected
    w.table.remember(squatter)
    entry = await w.lookup(b"data", b"x")
    assert entry.st_ino == expected + 1
    assert (await w.lookup(b"data", b"x")).st_ino == expected + 1


@in_world
async def test_a_renamed_node_keeps_its_number(w: World) -> None:
    await w.store.write("data/d/x", "1")
    data = await w.lookup(b"data")
    d = await w.lookup(b"data", b"d")
    x = await w.lookup(b"data", b"d", b"x")
    await w.operations.rename(data.st_ino, b"d", data.st_ino, b"e", 0, ctx())
    assert w.table.get(x.st_ino).path == b"/local/domain/0/data/e/x"
    assert (await w.lookup(b"data", b"e")).st_ino == d.st_ino
    assert (await w.operations.getattr(x.st_ino, ctx())).st_size == 2
    made = await w.operations.mkdir(data.st_ino, b"d", 0o755, ctx())
    assert made.st_ino != d.st_ino
    await w.operations.rmdir(data.st_ino, b"d", ctx())
    await refused(errno.ESTALE, w.operations.getattr(made.st_ino, ctx()))


@in_world
async def test_what_is_in_a_renamed_directory_has_a_new_path(w: World) -> None:
    await w.store.write("data/d/inner/x", "1")
    data, d = await w.lookup(b"data"), await w.lookup(b"data", b"d")
    inner = await w.lookup(b"data", b"d", b"inner")
    x = await w.lookup(b"data", b"d", b"inner", b"x")  # all paths have been asked for
    await w.operations.rename(data.st_ino, b"d", data.st_ino, b"e", 0, ctx())
    assert w.table.get(inner.st_ino).path == b"/local/domain/0/data/e/inner"
    assert (await w.operations.lookup(inner.st_ino, b"x", ctx())).st_ino == x.st_ino
    await w.store.write("data/d/inner/x", "another")
    assert await w.operations.getxattr(x.st_ino, b"user.xs.value", ctx()) == b"1"
    await w.operations.rename(d.st_ino, b"inner", data.st_ino, b"outer", 0, ctx())
    assert w.table.get(x.st_ino).path == b"/local/domain/0/data/outer/x"


@in_world
async def test_paths_of_more_directories_than_are_kept(w: World) -> None:
    for number in range(PATHS_MAX + 10):
        await w.store.write(f"data/{number}/x", "1")
    for _ in range(2):
        for number in range(PATHS_MAX + 10):
            entry = await w.lookup(b"data", b"%d" % number, b"x")
            assert w.table.get(entry.st_ino).path == b"/local/domain/0/data/%d/x" % number
            assert len(w.table.paths) <= PATHS_MAX


@in_world
async def test_a_path_of_a_thousand_levels(w: World) -> None:
    names = [b"a"] * 1000
    await w.store.write(b"data/" + b"/".join(names), "end")
    deepest = await w.lookup(b"data", *names[:-1])
    w.table.paths.clear()
    assert stat.S_ISDIR((await w.operations.getattr(deepest.st_ino, ctx())).st_mode)
    w.table.paths.clear()
    path = b"/local/domain/0/data" + b"/a" * 999
    assert w.table.get(deepest.st_ino).label == path
    w.table.paths.clear()
    assert w.table.get((await w.lookup(b"data", *names)).st_ino).path == path + b"/a"


@in_world
async def test_timeouts(w: World) -> None:
    file, data = await w.lookup(b"name"), await w.lookup(b"data")
    assert file.entry_timeout == 0
    assert data.entry_timeout > 0.1
    assert max(file.attr_timeout, data.attr_timeout) <= 0.01


@in_world
async def test_many_lookups_at_once_make_one_node(w: World) -> None:
    entries: list[pyfuse3.EntryAttributes] = []

    async def look(pid: int) -> None:
        entries.append(await w.lookup(b"data.d", b".value", pid=pid))

    async with trio.open_nursery() as nursery:
        for pid in range(20):
            nursery.start_soon(look, pid)
    assert len({entry.st_ino for entry in entries}) == 1
    assert w.table.get(entries[0].st_ino).lookups == 20


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
    assert w.table.get(inode).lookups == 20
    nodes = {id(w.operations._handles[info.fh].node) for info in opened}
    assert nodes == {id(w.table.get(inode))}


@in_world
async def test_a_file_that_is_renamed_while_it_is_looked_up(w: World) -> None:
    await w.store.write("data/x", "value")
    data = await w.lookup(b"data")
    first = await w.lookup(b"data", b"x")
    async with w.looking_up(data, b"x") as entries:
        w.table.move(w.table.get(first.st_ino), w.table.get(data.st_ino), b"y")
    assert entries[0].st_ino != first.st_ino
    assert w.table.get(entries[0].st_ino).path == b"/local/domain/0/data/x"
    assert w.table.get(first.st_ino).path == b"/local/domain/0/data/y"


async def remade(w: World) -> tuple[pyfuse3.EntryAttributes, pyfuse3.EntryAttributes]:
    """A directory, and a file in it that was removed, and made again, while the kernel knows it."""
    await w.store.write("data/x", "old")
    data = await w.lookup(b"data")
    old = await w.lookup(b"data", b"x")
    await w.operations.unlink(data.st_ino, b"x", ctx())
    await w.store.write("data/x", "new")
    return data, old


@in_world
async def test_a_file_is_found_when_the_one_before_it_is_forgotten(w: World) -> None:
    """The one that was made again has the next number."""
    _, old = await remade(w)
    new = await w.lookup(b"data", b"x")
    assert new.st_ino != old.st_ino
    await w.operations.forget([(old.st_ino, 1)])
    again = await w.lookup(b"data", b"x")
    assert again.st_ino == new.st_ino
    assert w.table.get(new.st_ino).lookups == 2
    await w.operations.forget([(new.st_ino, 2)])
    assert (await w.lookup(b"data", b"x")).st_ino == old.st_ino


@in_world
async def test_a_number_that_gets_free_while_a_file_is_looked_up(w: World) -> None:
    data, old = await remade(w)
    async with w.looking_up(data, b"x") as entries:
        await w.operations.forget([(old.st_ino, 1)])
        _, made = await w.operations.create(data.st_ino, b"x", 0o644, WRONLY, ctx(3))
    assert entries[0].st_ino == made.st_ino
    assert w.table.get(made.st_ino).lookups == 2


@pytest.mark.parametrize(("kind", "name"), [(ValueFile, b"x"), (DotValue, b".value")])
def test_a_number_that_is_taken_while_a_file_is_looked_up(kind: type[Node], name: bytes) -> None:
    """By one that was made and removed meanwhile, and that the kernel still knows."""

    @in_world
    async def test(w: World) -> None:
        await w.store.write("data", "value")
        await w.store.write("data/x", "value")
        data = await w.lookup(b"data")
        async with w.looking_up(data, name) as entries:
            other = w.table.node(kind, w.table.get(data.st_ino), name)
            w.table.remember(other)
            other.gone = True
        assert w.table.get(other.inode) is other
        assert entries[0].st_ino != other.inode
        found = w.table.get(entries[0].st_ino)
        assert (type(found), found.lookups, found.gone) == (kind, 1, False)

    test()


@in_world
async def test_a_transaction_whose_name_comes_back_is_another_inode(w: World) -> None:
    """The kernel may still know the one that has ended."""
    directory = (await w.lookup(b".transaction")).st_ino
    first = await w.operations.mkdir(directory, b"t", cast(Any, 0), ctx())
    await w.operations.rmdir(directory, b"t", ctx())
    assert (await w.operations.mkdir(directory, b"t", cast(Any, 0), ctx())).st_ino != first.st_ino


@in_world
async def test_an_empty_directory_by_custom_is_there_for_stat(w: World) -> None:
    await w.store.mkdir("device")
    device = await w.lookup(b"device")
    assert (await w.operations.getattr(device.st_ino, ctx())).st_mode == device.st_mode
