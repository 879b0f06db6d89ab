"""What POSIX wants of a change, made of what Xenstore can do: the work of short transactions.

Xenstore's own commands are laxer than POSIX: MKDIR succeeds on what exists, WRITE makes missing
parents, RM takes all that is below, and there is no rename.  So each function here reads first, in the
same transaction, and raises FUSEError where POSIX says so; it returns the one last change, to be sent
with the commit (see View.atomically).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from xsfs.fs.inodes import refuse
from xsfs.view.names import join, parent_path
from xsfs.view.view import View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Replies, Session
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import Permissions, decode_perms, set_perms
from xsfs.xenstore.protocol import Request

RENAME_NODES_MAX: Final = 100_000
"""How many nodes one rename may move: its transaction holds the daemon's memory and time."""


async def make(session: Session, path: bytes, *, directory: bool, in_present: bool) -> Request:
    """Make a node that must not exist, in a parent that must, too, if `in_present`."""
    parent, present = await session.burst((protocol.read(parent_path(path)), protocol.read(path)))
    if in_present and _is_missing(parent):
        refuse(errno.ESTALE)
    if not _is_missing(present):
        # One that may not be read exists as well.
        if isinstance(present, XenstoreError) and present.name != "EACCES":
            raise present
        refuse(errno.EEXIST)
    return protocol.mkdir(path) if directory else protocol.write(path, b"")


async def remove_file(view: View, session: Session, path: bytes) -> Request:
    (look,) = await view.look_through(session, (path,))
    if look is None:
        refuse(errno.ENOENT)
    if view.is_directory(path, look):
        refuse(errno.EISDIR)
    return protocol.rm(path)


async def remove_directory(view: View, session: Session, path: bytes) -> Request:
    (look,) = await view.look_through(session, (path,))
    if look is None:
        refuse(errno.ENOENT)
    if not view.is_directory(path, look):
        refuse(errno.ENOTDIR)
    if look.hidden:
        refuse(errno.EACCES)
    if look.has_children or look.value:
        refuse(errno.ENOTEMPTY)
    return protocol.rm(path)


async def splice(
    session: Session, path: bytes, change: Callable[[bytes], bytes], limit: int
) -> Request:
    """Replace the node's value by what `change` makes of it; a missing node counts as empty."""
    (reply,) = await session.burst((protocol.read(path),))
    if isinstance(reply, XenstoreError):
        if reply.name != "ENOENT":
            raise reply
        reply = b""
    value = change(reply)
    if len(value) > limit:
        refuse(errno.EFBIG)
    return protocol.write(path, value)


async def rename(
    view: View,
    session: Session,
    source: bytes,
    target: bytes,
    *,
    replace: bool,
    in_present: bool,
) -> bool:
    """Move a node and all below it, with values and permissions; whether it is a directory.

    The last change is not left to the commit: a commit is carried out even where it fails.
    """
    moved, replaced = await view.look_through(session, (source, target))
    if moved is None:
        refuse(errno.ENOENT)
    if replaced is not None:
        if not replace:
            refuse(errno.EEXIST)
        if view.is_directory(target, replaced):
            if not view.is_directory(source, moved):
                refuse(errno.EISDIR)
            if replaced.hidden:
                refuse(errno.EACCES)
            if replaced.has_children or replaced.value:
                refuse(errno.ENOTEMPTY)
        elif view.is_directory(source, moved):
            refuse(errno.ENOTDIR)
    elif in_present and not await session.exists(parent_path(target)):
        refuse(errno.ESTALE)
    nodes = await _subtree(session, source)
    moves = [(target + path[len(source) :], value, perms) for path, value, perms in nodes]
    for path, value, _ in moves:
        if len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        if len(value) > protocol.value_max(path, session.payload_max):
            refuse(errno.EFBIG)
    _raise_first(await session.burst([protocol.write(path, value) for path, value, _ in moves]))
    inherited = await session.burst([protocol.get_perms(path) for path, _, _ in moves])
    _raise_first(inherited)
    _raise_first(
        await session.burst(
            [
                set_perms(path, perms)
                for (path, _, perms), reply in zip(moves, inherited, strict=True)
                if isinstance(reply, bytes) and decode_perms(reply) != perms
            ]
        )
    )
    _raise_first(await session.burst((protocol.rm(source),)))
    return view.is_directory(source, moved)


async def _subtree(session: Session, top: bytes) -> list[tuple[bytes, bytes, Permissions]]:
    """Each node at and below `top`, parents first: (path, value, permissions).  A burst a level."""
    found = []
    level = [top]
    while level:
        replies = await session.burst(
            [ask(path) for path in level for ask in (protocol.read, protocol.get_perms)]
        )
        _raise_first(replies)
        for index, path in enumerate(level):
            value, perms = replies[2 * index], replies[2 * index + 1]
            assert isinstance(value, bytes)
            assert isinstance(perms, bytes)
            found.append((path, value, decode_perms(perms)))
        if len(found) > RENAME_NODES_MAX:
            refuse(errno.EFBIG)
        level = [
            join(path, name)
            for path, children in zip(level, await session.list_all(level), strict=True)
            for name in children
        ]
    return found


def _is_missing(reply: bytes | XenstoreError) -> bool:
    return isinstance(reply, XenstoreError) and reply.name == "ENOENT"


def _raise_first(replies: Replies) -> None:
    for reply in replies:
        if isinstance(reply, XenstoreError):
            raise reply
