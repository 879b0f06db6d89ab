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
    view: View, commands: Commands, path: bytes, *, directory: bool, missing_parent: int
) -> Request:
    """Create a node that must not exist.  Fails with EEXIST, or `missing_parent`."""
    parent, present = await commands.pipeline(
        (protocol.read(parent_path(path)), protocol.read(path))
    )
    if is_missing(parent) and not view.is_always_there(parent_path(path)):
        refuse(missing_parent)
    if is_missing(present):
        return protocol.mkdir(path) if directory else protocol.write(path, b"")
    # A node that may not be read exists as well.
    if isinstance(present, XenstoreError) and present.name != "EACCES":
        raise present
    refuse(errno.EEXIST)


def orphan_content(view: View, path: bytes, value: bytes, perms: bytes | None) -> MemoryContent:
    """A content that may become as large as the longest value of the node, and a newline."""
    size_max = protocol.value_max(path, view.commands.payload_max) + 1
    return MemoryContent(view.value_format.render(value), perms, size_max)


async def removed(
    open_files: OpenFiles,
    commands: Commands,
    path: bytes,
    state: NodeState | None,
    *,
    directory: bool,
) -> MemoryContent:
    """The content of a file, or empty directory, that is to be removed, for the handles that have it open.

    Fails with ENOENT, EISDIR or ENOTDIR, EACCES, ENOTEMPTY.
    """
    if state is None:
        refuse(errno.ENOENT)
    if open_files.is_directory(path, state) != directory:
        refuse(errno.ENOTDIR if directory else errno.EISDIR)
    if directory and not state.readable:
        refuse(errno.EACCES)
    if directory and (state.has_children or state.value or open_files.scratch_names(path)):
        refuse(errno.ENOTEMPTY)
    (reply,) = await commands.pipeline((protocol.get_perms(path),))
    if isinstance(reply, XenstoreError) and reply.name != "EACCES":
        raise reply
    perms = None if isinstance(reply, XenstoreError) else reply
    perms_text(perms or b"")  # raises WireError before anything is changed
    return orphan_content(open_files.view, path, state.value or b"", perms)


async def replaced(
    open_files: OpenFiles,
    commands: Commands,
    path: bytes,
    state: NodeState | None,
    *,
    by_directory: bool,
    replace: bool,
) -> MemoryContent | None:
    """As `removed`, of the node that a rename replaces, if there is one.

    Fails with EEXIST unless it may `replace` one, and with ESTALE if the parent is missing.
    """
    if state is not None:
        if not replace:
            refuse(errno.EEXIST)
        return await removed(open_files, commands, path, state, directory=by_directory)
    parent = parent_path(path)
    if not (open_files.view.is_always_there(parent) or await commands.exists(parent)):
        refuse(errno.ESTALE)
    return None


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
    open_files: OpenFiles, commands: Commands, source: bytes, target: bytes, *, replace: bool
) -> tuple[bool, MemoryContent | None]:
    """Move a node and all below it, with values and permissions.  Returns whether it is a directory, and the
    node that it replaces.

    All changes are sent before the commit: a commit succeeds even if a request sent with it fails.
    """
    moved, present = await open_files.view.fetch((source, target), commands)
    if moved is None:
        refuse(errno.ENOENT)
    is_directory = open_files.is_directory(source, moved)
    gone = await replaced(
        open_files, commands, target, present, by_directory=is_directory, replace=replace
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
