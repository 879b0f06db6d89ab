"""Listings: the names in a directory, and the kinds of the children, in as few round trips as possible.

`View.list_directory` fetches all names at the OPENDIR.  If they do not fit one reply, `Commands.list` fetches
them in parts.  The kinds follow while the kernel reads on, FETCH_WINDOW children at a time.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, InodeT

from xsfs.fs.nodes import Caller, Handle, Node, refuse
from xsfs.fs.quotas import Share
from xsfs.view.names import VALUE_NAME
from xsfs.view.view import EMPTY_NODE, FETCH_WINDOW, LEAF, NodeState

if TYPE_CHECKING:
    from xsfs.fs.directories import Directory

SELF_AND_PARENT: Final = (b".", b"..")

ENTRY_BYTES: Final = 80
"""The memory of a name in a listing, beyond its bytes."""


class DirectoryHandle(Handle):
    """An open directory: its children's names as they were when it was opened, or last rewound."""

    __slots__ = ("_entries", "_kinds", "_own", "_scratch", "_share", "_was_read")

    node: Directory
    _entries: list[bytes]
    _kinds: dict[bytes, NodeState | None]
    _own: dict[bytes, type[Node]]
    _scratch: frozenset[bytes]

    def __init__(self, node: Directory, caller: Caller) -> None:
        self.node = node
        self._share = Share(node.table.listing_bytes, caller)
        self._was_read = False

    async def fetch(self) -> NodeState:
        """Fetch the names, and the state of the directory.  Fails with ENFILE if the open listings would
        take too much memory."""
        node = self.node
        node.require()
        path = node.path
        shown_before = self._always_shown(path)
        listing = await node.view.list_directory(path)
        if await node.is_elsewhere(path, listing.state):
            return await self.fetch()
        state = await node.require_directory(listing.state)
        if not state.readable:
            refuse(errno.EACCES)
        own = node.listed_own()
        if node.view.has_dot_value(path, state):
            own[VALUE_NAME] = node.own[VALUE_NAME]
        scratch = node.open_files.scratch_names(node.path)  # it may have been renamed
        entries = dict.fromkeys((*SELF_AND_PARENT, *own, *scratch, *listing.names))
        for name in self._always_shown(path):
            if name not in entries:
                entries[name] = None
                listing.kinds[name] = EMPTY_NODE
        # A creation that was carried out meanwhile may be too late for the listing.
        entries.update(dict.fromkeys(shown_before))
        self._share.resize(sum(map(len, entries)) + ENTRY_BYTES * len(entries))
        self._entries = list(entries)
        self._kinds = listing.kinds
        self._own = own
        self._scratch = frozenset(scratch)
        return state

    def _always_shown(self, path: bytes) -> list[bytes]:
        """The names of children that the mount shows even if they do not exist."""
        node = self.node
        return [*node.open_files.created_in(path), *node.view.always_there_below(path)]

    async def release(self) -> None:
        self._share.resize(0)

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        if start == 0 and self._was_read:
            await self.fetch()
        self._was_read = True
        remembered: list[Node] = []
        try:
            await self._reply(start, token, remembered)
        except BaseException:
            # The kernel gets an error, and nothing of the reply.
            for node in remembered:
                self.node.table.forget(node.inode, 1)
            raise

    async def _reply(self, start: int, token: pyfuse3.ReaddirToken, remembered: list[Node]) -> None:
        """Put entries into the reply until it is full, and their nodes into `remembered`."""
        directory, table = self.node, self.node.table
        of_self = directory.entry(0) if start < len(SELF_AND_PARENT) else None
        of_leaf: EntryAttributes | None = None
        for position in range(start, len(self._entries)):
            name = self._entries[position]
            if of_self is not None and position < len(SELF_AND_PARENT):
                if not pyfuse3.readdir_reply(token, name, of_self, position + 1):
                    return
                continue
            if name in self._own or name in self._scratch:
                found = await self._node_and_entry(name)
                if found is None:
                    continue  # it has vanished meanwhile
                node, entry = found
            else:
                if name not in self._kinds:
                    await self._fetch_kinds(position)
                if (state := self._kinds[name]) is None:
                    continue
                child = directory.child(name, state)
                if state is not LEAF:
                    entry = child.attributes(state)
                elif of_leaf is None:
                    entry = of_leaf = child.attributes(LEAF)
                else:  # most children, which differ in their inodes
                    entry = of_leaf
                    entry.st_ino = InodeT(child.inode)
                node = child
            if not pyfuse3.readdir_reply(token, table.file_name(name), entry, position + 1):
                return
            table.remember(node)
            remembered.append(node)

    async def _node_and_entry(self, name: bytes) -> tuple[Node, EntryAttributes] | None:
        """One of xsfs's own names, or a scratch file; None if it has vanished."""
        directory = self.node
        if (kind := self._own.get(name)) is not None:
            try:
                return await directory.own_entry(kind, name)
            except FUSEError:
                return None
        if (found := directory.scratch_file(name)) is None:
            return None
        return found[0], found[0].attributes_in_memory()

    async def _fetch_kinds(self, position: int) -> None:
        """Fetch the kinds of the entries from `position` on.  Those of the entries before are dropped."""
        view, path = self.node.view, self.node.path
        entries = self._entries[position : position + FETCH_WINDOW]
        # Xenstore has no nodes of xsfs's own names.
        window = [name for name in entries if name not in self._own and name not in self._scratch]
        shown_before = self._always_shown(path)
        self._kinds = await view.kinds(path, window)
        for name in (*shown_before, *self._always_shown(path)):
            if name in self._kinds and self._kinds[name] is None:
                self._kinds[name] = EMPTY_NODE
