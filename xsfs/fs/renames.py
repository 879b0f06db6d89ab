"""Renames: of nodes, of scratch files, and of one to the other.

Xenstore has no rename.  A node is written by its new name, with all below it, and removed by the old one.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from functools import partial
from typing import Final

import pyfuse3

from xsfs.fs.directories import Directory
from xsfs.fs.files import ValueFile
from xsfs.fs.memory_content import MemoryContent
from xsfs.fs.nodes import Caller, Node, refuse
from xsfs.view.names import VALUE_NAME, join
from xsfs.view.view import NodeState
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout
from xsfs.xenstore.permissions import decode_perms, set_perms
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.store import Transaction

RENAME_NODES_MAX: Final = 100_000
"""How many nodes one rename may move: its transaction holds the daemon's memory and time."""

NodeCopy = tuple[bytes, bytes, bytes]
"""(path, value, reply to GET_PERMS)"""


async def rename(
    source: Node, name: bytes, target: Node, target_name: bytes, flags: int, caller: Caller
) -> None:
    """rename(2).  Fails with the errno of POSIX."""
    if not isinstance(source, Directory):
        refuse(errno.EPERM)
    if flags & ~pyfuse3.RENAME_NOREPLACE:
        refuse(errno.EINVAL)
    if not isinstance(target, Directory) or target.view is not source.view:
        refuse(errno.EXDEV)
    if VALUE_NAME in (name, target_name):
        refuse(errno.EXDEV)
    source.require()
    replace = not flags & pyfuse3.RENAME_NOREPLACE
    if target.is_scratch(target_name):
        await target.require_present()
        if not replace and target.scratch_file(target_name) is not None:
            refuse(errno.EEXIST)
        if source.is_scratch(name):
            _rename_scratch(source, name, target, target_name)
        else:
            await _rename_to_scratch(source, name, target, target_name, caller)
    elif source.is_scratch(name):
        await _rename_to_node(source, name, target, target_name, replace)
    else:
        await _rename_node(source, name, target, target_name, replace)


async def _rename_node(
    source: Directory, name: bytes, target: Directory, target_name: bytes, replace: bool
) -> None:
    child = await source.child_name(name)
    new_child = await target.child_name(target_name, new=True)
    paths = partial(source.path_below, child), partial(target.path_below, new_child)
    is_directory = False
    replaced: MemoryContent | None = None

    async def work(commands: Commands) -> None:
        nonlocal is_directory, replaced
        moved, present = await source.view.fetch((source_path, target_path), commands)
        if moved is None:
            refuse(errno.ENOENT)
        is_directory = source.open_files.is_directory(source_path, moved)
        replaced = await _replaced(
            target, commands, target_path, present, by_directory=is_directory, replace=replace
        )
        await _write(commands, await _subtree(commands, source_path, target_path))
        await commands.call(protocol.rm(source_path))

    async with source.open_files.changing_below(*paths) as (source_path, target_path):
        if source_path == target_path:
            _lose(Directory, target, new_child)
            return
        if target_path.startswith(source_path + b"/"):
            refuse(errno.EINVAL)
        before = source.open_files.at_and_below(target_path)
        await source.view.atomically_apart(work)
        if replaced is not None:
            target.was_removed(Directory if is_directory else ValueFile, target_path, replaced)
        for lost in before:
            source.open_files.retire(lost)
        for moved_kind in (Directory, ValueFile):
            _lose(moved_kind, target, new_child)
            if (node := source.table.find(moved_kind, source, child)) is not None:
                source.table.move(node, target, new_child)
        source.was_written()
        source.open_files.move(source_path, target_path)
        source.view.sticky.move(source_path, target_path)
        if is_directory:
            # The old name may have made it a directory by convention, and the new one does not.
            source.view.sticky.add(target_path)


async def _replaced(
    directory: Directory,
    commands: Commands,
    path: bytes,
    state: NodeState | None,
    *,
    by_directory: bool,
    replace: bool,
) -> MemoryContent | None:
    """The content of the node that a rename replaces, if there is one.

    Fails with EEXIST unless it may `replace` one, and with ESTALE if the directory is missing.
    """
    if state is not None:
        if not replace:
            refuse(errno.EEXIST)
        return await directory.to_remove(commands, path, state, directory=by_directory)
    if not (directory.always_there or await commands.exists(directory.path)):
        refuse(errno.ESTALE)
    return None


async def _write(commands: Commands, nodes: Sequence[NodeCopy]) -> None:
    """Write nodes with their permissions.

    All changes are sent before the commit: a commit succeeds even if a request sent with it fails.
    """
    for path, value, _ in nodes:
        if len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        if len(value) > protocol.value_max(path, commands.payload_max):
            refuse(errno.EFBIG)
    await commands.call_all([protocol.write(path, value) for path, value, _ in nodes])
    # A guest may not set the permissions of another domain's node, but they may be right already.
    inherited = await commands.call_all([protocol.get_perms(path) for path, _, _ in nodes])
    requests = [
        set_perms(path, decode_perms(perms))
        for (path, _, perms), present in zip(nodes, inherited, strict=True)
        if present != perms
    ]
    if any(len(request.payload) > commands.payload_max for request in requests):
        refuse(errno.E2BIG)
    await commands.call_all(requests)


async def _subtree(commands: Commands, source: bytes, target: bytes) -> list[NodeCopy]:
    """Each node at and below `source`, parents first, by its path at and below `target`.  One pipeline for
    each level."""
    found: list[NodeCopy] = []
    level = [source]
    while level:
        if len(found) + len(level) > RENAME_NODES_MAX:
            refuse(errno.EFBIG)
        asked = [ask(path) for path in level for ask in (protocol.read, protocol.get_perms)]
        replies = iter(await commands.call_all(asked))
        targets = [target + path[len(source) :] for path in level]
        found += zip(targets, replies, replies, strict=True)
        level = [
            join(path, name)
            for path, children in zip(level, await commands.list_all(level), strict=True)
            for name in children
        ]
    return found


def _lose(kind: type[Node], directory: Directory, name: bytes) -> None:
    """For the kernel the inode of a new name is dead after the rename, even if its node did not exist."""
    if (node := directory.table.find(kind, directory, name)) is not None:
        node.gone = True


def _rename_scratch(source: Directory, name: bytes, target: Directory, target_name: bytes) -> None:
    node, file = source.present_scratch(name)
    if (present := target.scratch_file(target_name)) is not None:
        replaced_node, replaced = present
        if replaced is file:
            return
        source.open_files.unlink(replaced, replaced_node)
    if node.lookups:
        source.table.move(node, target, target_name)
    source.open_files.move(file.path, join(target.path, target_name))


async def _rename_to_node(
    source: Directory, name: bytes, target: Directory, target_name: bytes, replace: bool
) -> None:
    """Rename a scratch file to a node: one WRITE of its content."""
    new = partial(target.path_below, await target.child_name(target_name, new=True))
    node, file = source.present_scratch(name)
    async with source.open_files.changing_below(lambda: file.path, new) as (_, path):
        if source.open_files.get(file.path) is not file or file.memory is None:
            refuse(errno.ENOENT)
        if (mode := file.memory.mode) is not None:
            # The node cannot have any other mode, and to drop this one could let other users in.
            node.require_mode(mode, source.table.ownership.mode(stat.S_IFREG, True, True))
        perms, value = file.memory.perms, source.view.value_format.parse(file.memory.data)
        if len(value) > protocol.value_max(path, source.view.commands.payload_max):
            refuse(errno.EFBIG)
        replaced: MemoryContent | None = None

        async def work(commands: Commands) -> Request | None:
            nonlocal replaced
            (state,) = await source.view.fetch((path,), commands)
            replaced = await _replaced(
                target, commands, path, state, by_directory=False, replace=replace
            )
            if perms is None:
                return protocol.write(path, value)
            await _write(commands, [(path, value, perms)])
            return None

        before = source.open_files.get(path)
        await source.view.atomically(work)
        if replaced is not None:
            target.was_removed(ValueFile, path, replaced)
        source.open_files.retire(before)
        source.view.sticky.discard(path)
        source.was_written()
        source.open_files.move_to_store(file, node, path)


async def _rename_to_scratch(
    source: Directory, name: bytes, target: Directory, target_name: bytes, caller: Caller
) -> None:
    """Rename a file's node to a temporary name, with its value and permissions."""
    child = await source.child_name(name)
    file = await source.open_files.new_scratch(caller)
    memory = file.memory
    assert memory is not None
    taken_in: Transaction | None = None

    async def work(commands: Commands) -> Request:
        nonlocal taken_in
        (state,) = await source.view.fetch((path,), commands)
        if state is not None and source.open_files.is_directory(path, state):
            refuse(errno.EINVAL)
        taken = await source.to_remove(commands, path, state, directory=False)
        if taken.perms is None:
            refuse(errno.EACCES)  # the permissions would be lost
        memory.perms = taken.perms
        await source.open_files.set_data(file, memory, taken.data)
        assert isinstance(commands, Transaction)
        taken_in = commands
        return protocol.rm(path)

    try:
        async with source.open_files.changing_below(partial(source.path_below, child)) as (path,):
            await source.view.atomically(work)
            node = source.table.find(ValueFile, source, child)
            source.view.sticky.discard(path)
            source.was_written()
            source.open_files.move_to_scratch(path, node, join(target.path, target_name), file)
    except (ConnectionLost, RequestTimeout):
        if taken_in is not None and not taken_in.has_ended:
            # If the transaction was committed after all, the value is nowhere else.
            source.open_files.link(file, join(target.path, target_name))
        raise
    finally:
        source.open_files.release(file)
