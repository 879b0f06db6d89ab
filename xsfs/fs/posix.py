"""The changes that POSIX defines, made of the requests that Xenstore has: the work of short transactions.

Xenstore's own commands are laxer than POSIX: MKDIR succeeds on a node that exists, WRITE creates missing
parents, RM removes everything below, and there is no rename.  So each function here reads first, in the same
transaction, and fails with the errno of POSIX.  It returns the one last request, which goes out with the
commit (see View.atomically).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from xsfs.fs.memory_content import MemoryContent
from xsfs.fs.nodes import refuse
from xsfs.fs.open_files import OpenFiles, is_missing
from xsfs.view.names import join, parent_path
from xsfs.view.view import NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import perms_text, set_perms_as_shown
from xsfs.xenstore.protocol import Request

RENAME_NODES_MAX: Final = 100_000
"""How many nodes one rename may move: its transaction holds the daemon's memory and time."""


async def make(
    commands: Commands, path: bytes, *, directory: bool, missing_parent: int | None
) -> Request:
    """Create a node that must not exist.

    missing_parent  the errno if its parent does not exist; None if it need not
    """
    parent, present = await commands.pipeline(
        (protocol.read(parent_path(path)), protocol.read(path))
    )
    if missing_parent is not None and is_missing(parent):
        refuse(missing_parent)
    if not is_missing(present):
        # A node that may not be read exists as well.
        if isinstance(present, XenstoreError) and present.name != "EACCES":
            raise present
        refuse(errno.EEXIST)
    return protocol.mkdir(path) if directory else protocol.write(path, b"")


async def _removed(view: View, commands: Commands, path: bytes, state: NodeState) -> MemoryContent:
    """The content of a node that is to be removed or replaced, for the handles that have it open."""
    (reply,) = await commands.pipeline((protocol.get_perms(path),))
    if isinstance(reply, XenstoreError) and reply.name != "EACCES":
        raise reply
    perms = None if isinstance(reply, XenstoreError) else reply
    perms_text(perms or b"")  # raises WireError before anything is changed
    return orphan_content(view, path, state.value or b"", perms)


def orphan_content(view: View, path: bytes, value: bytes, perms: bytes | None) -> MemoryContent:
    """A content that may become as large as the longest value of the node, and a newline."""
    size_max = protocol.value_max(path, view.commands.payload_max) + 1
    return MemoryContent(view.value_format.render(value), perms, size_max)


def _check_empty(state: NodeState) -> None:
    """Whether a directory may be removed.  Fails with EACCES, ENOTEMPTY."""
    if not state.readable:
        refuse(errno.EACCES)
    if state.has_children or state.value:
        refuse(errno.ENOTEMPTY)


async def removed(
    open_files: OpenFiles,
    commands: Commands,
    path: bytes,
    *,
    directory: bool = False,
    if_directory: int = errno.EISDIR,
) -> MemoryContent:
    """A node that is to be removed.  Fails with ENOENT, ENOTDIR or `if_directory`, EACCES, ENOTEMPTY."""
    (state,) = await open_files.view.fetch((path,), commands)
    if state is None:
        refuse(errno.ENOENT)
    if open_files.is_directory(path, state) != directory:
        refuse(errno.ENOTDIR if directory else if_directory)
    if directory:
        _check_empty(state)
    return await _removed(open_files.view, commands, path, state)


async def replaced(
    open_files: OpenFiles,
    commands: Commands,
    path: bytes,
    state: NodeState | None,
    *,
    by_directory: bool,
    replace: bool,
    needs_parent: bool,
) -> MemoryContent | None:
    """The node at `path`, of this state, that a rename to `path` replaces.

    Fails with EEXIST, EISDIR, ENOTDIR, EACCES, ENOTEMPTY, ESTALE.

    needs_parent    whether the parent must exist
    """
    if state is None:
        if needs_parent and not await commands.exists(parent_path(path)):
            refuse(errno.ESTALE)
        return None
    if not replace:
        refuse(errno.EEXIST)
    if open_files.is_directory(path, state):
        if not by_directory:
            refuse(errno.EISDIR)
        _check_empty(state)
    elif by_directory:
        refuse(errno.ENOTDIR)
    return await _removed(open_files.view, commands, path, state)


async def write_with_perms(
    commands: Commands, path: bytes, value: bytes, perms: bytes | None
) -> Request | None:
    """Write a value.  The node keeps its permissions if `perms`, a reply to GET_PERMS, is None."""
    write = protocol.write(path, value)
    if perms is None:
        return write
    set_perms = set_perms_as_shown(path, perms)
    if len(set_perms.payload) > commands.payload_max:
        refuse(errno.E2BIG)
    _, present = await _call_all(commands, (write, protocol.get_perms(path)))
    # A guest may not set the permissions of another domain's node, but they may be right already.
    if present != perms:
        await commands.call(set_perms)
    return None


async def rename(
    open_files: OpenFiles,
    commands: Commands,
    source: bytes,
    target: bytes,
    *,
    replace: bool,
    needs_parent: bool,
) -> tuple[bool, MemoryContent | None]:
    """Move a node and all below it, with values and permissions.  Returns whether it is a directory, and the
    node that it replaces.

    needs_parent    whether the target's parent must exist

    All changes are sent before the commit: a commit succeeds even if a request sent with it fails.
    """
    moved, target_state = await open_files.view.fetch((source, target), commands)
    if moved is None:
        refuse(errno.ENOENT)
    is_directory = open_files.is_directory(source, moved)
    gone = await replaced(
        *(open_files, commands, target, target_state),
        by_directory=is_directory,
        replace=replace,
        needs_parent=needs_parent,
    )
    nodes = await _subtree(commands, source)
    moves = [(target + path[len(source) :], value, perms) for path, value, perms in nodes]
    for path, value, _ in moves:
        if len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        if len(value) > protocol.value_max(path, commands.payload_max):
            refuse(errno.EFBIG)
    await _call_all(commands, [protocol.write(path, value) for path, value, _ in moves])
    inherited = await _call_all(commands, [protocol.get_perms(path) for path, _, _ in moves])
    await _call_all(
        commands,
        [
            set_perms_as_shown(path, perms)
            for (path, _, perms), present in zip(moves, inherited, strict=True)
            if present != perms
        ],
    )
    await commands.call(protocol.rm(source))
    return is_directory, gone


async def _subtree(commands: Commands, top: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Each node at and below `top`, parents first: (path, value, reply to GET_PERMS).  One pipeline for
    each level."""
    found: list[tuple[bytes, bytes, bytes]] = []
    level = [top]
    while level:
        if len(found) + len(level) > RENAME_NODES_MAX:
            refuse(errno.EFBIG)
        asked = [ask(path) for path in level for ask in (protocol.read, protocol.get_perms)]
        replies = iter(await _call_all(commands, asked))
        found += zip(level, replies, replies, strict=True)
        level = [
            join(path, name)
            for path, children in zip(level, await commands.list_all(level), strict=True)
            for name in children
        ]
    return found


async def _call_all(commands: Commands, requests: Sequence[Request]) -> list[bytes]:
    """Send them together.  Raises the first error among the replies."""
    replies = []
    for reply in await commands.pipeline(requests):
        if isinstance(reply, XenstoreError):
            raise reply
        replies.append(reply)
    return replies
