"""Listings: the names in a directory, and the kinds of the children, in as few round trips as possible.

`View.list_directory` fetches all names at the OPENDIR.  If they do not fit one reply, `Commands.list` fetches
them in parts.  The kinds follow while the kernel reads on, FETCH_WINDOW children at a time.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pyfuse3
from pyfuse3 import EntryAttributes

from xsfs.fs.files import ScratchFile
from xsfs.fs.nodes import Caller, Handle, Node, refuse
from xsfs.fs.quotas import Share
from xsfs.view.names import NAME_MAX, VALUE_NAME
from xsfs.view.view import EMPTY_NODE, FETCH_WINDOW, LEAF, NodeState

if TYPE_CHECKING:
    from xsfs.fs.directories import Directory

SELF_AND_PARENT: Final = (b".", b"..")

ENTRY_BYTES: Final = 80
"""The memory of a name in a listing, beyond its bytes."""


class DirectoryHandle(Handle):
    """An open directory: its children's names as they were when it was opened, or last rewound.

    _entries    all names; the children start at `_children_at`
    _shown      children that the mount shows even if they do not exist
    _kinds      states of some children
    _writable   whether the directory's own value may be written
    """

    __slots__ = ("_children_at", "_entries", "_kinds", "_share", "_shown", "_was_read", "_writable")

    node: Directory

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
        shown = node.open_files.created_in(path)
        listing = await node.view.list_directory(path)
        if await node.is_elsewhere(path, listing.state):
            return await self.fetch()
        state = node.require_directory(listing.state)
        if not state.readable:
            refuse(errno.EACCES)
        scratch = node.open_files.scratch_names(node.path)  # it may have been renamed
        others = (*SELF_AND_PARENT, *node.listed_own(state), *scratch)
        # A creation that was carried out meanwhile may be too late for the listing.
        shown += (*node.open_files.created_in(path), *node.view.always_there_below(path))
        names = dict.fromkeys(listing.names)
        for name in shown:
            if name not in names:
                names[name] = None
                listing.kinds[name] = EMPTY_NODE
        entries = [*others, *names]
        self._share.resize(sum(map(len, entries)) + ENTRY_BYTES * len(entries))
        self._entries, self._children_at, self._shown = entries, len(others), shown
        self._kinds, self._writable = listing.kinds, state.writable
        return state

    async def release(self) -> None:
        self._share.resize(0)

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        """Put entries into the reply until it is full.

        The reply ends before it would wait for kinds.  If that failed, the kernel would learn of no entry.
        """
        directory, table = self.node, self.node.table
        if start == 0 and self._was_read:
            await self.fetch()
        self._was_read = True
        of_leaf: EntryAttributes | None = None
        is_begun = False
        for position in range(start, len(self._entries)):
            name = self._entries[position]
            node: Node
            if position < self._children_at:
                node, entry = self._other_entry(name)
            else:
                if name not in self._kinds:
                    if is_begun:
                        return
                    window = self._entries[position : position + FETCH_WINDOW]
                    self._kinds = await directory.view.kinds(directory.path, window)
                state = self._kinds[name] or (EMPTY_NODE if name in self._shown else None)
                if state is None:
                    continue
                node = directory.child(name, state)
                if state is not LEAF:
                    entry = node.attributes(state)
                elif of_leaf is None:
                    entry = of_leaf = node.attributes(LEAF)
                else:  # most children, which differ in their inodes
                    entry = of_leaf
                    entry.st_ino = node.inode
            shown = name if len(name) <= NAME_MAX else table.alias(name)
            if not pyfuse3.readdir_reply(token, shown, entry, position + 1):
                return
            if node is not directory:
                table.remember(node)
                is_begun = True

    def _other_entry(self, name: bytes) -> tuple[Node, EntryAttributes]:
        """One of xsfs's own names, or a scratch file, without its size: the kernel asks before a program
        sees it."""
        directory = self.node
        if name in SELF_AND_PARENT:
            return directory, directory.entry(0)
        node = directory.table.node(directory.own.get(name, ScratchFile), directory, name)
        entry = node.entry(0, write=self._writable or name != VALUE_NAME)
        entry.attr_timeout = 0
        return node, entry
