"""Listings: the names in a directory, and the kinds of the children, in as few round trips as possible."""

from __future__ import annotations

import errno
from abc import abstractmethod
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, InodeT

from xsfs.fs.inodes import LISTING_BYTES_MAX
from xsfs.fs.nodes import Caller, Handle, Node, refuse
from xsfs.fs.scratch import ScratchFile
from xsfs.fs.xattrs import XenstoreNode
from xsfs.view.names import VALUE_NAME
from xsfs.view.view import EMPTY_NODE, FETCH_WINDOW, LEAF, NodeState

SELF_AND_PARENT: Final = (b".", b"..")

ENTRY_BYTES: Final = 80
"""The memory of a name in a listing, beyond its bytes."""


class ListedDirectory(XenstoreNode):
    """The part of a directory that a listing needs."""

    __slots__ = ()

    @abstractmethod
    def require_directory(self, state: NodeState | None) -> NodeState:
        """The state of the node if it still is a directory.  Fails with ESTALE if not."""

    @abstractmethod
    def child(self, name: bytes, state: NodeState) -> XenstoreNode:
        """The node for a child of this state, or for `.value`."""

    @abstractmethod
    def scratch_names(self) -> list[bytes]:
        """The names of the scratch files in it."""

    @abstractmethod
    def scratch_file(self, name: bytes) -> ScratchFile | None:
        """The node for the scratch file of this name, if there is one."""

    @abstractmethod
    def own_nodes(self) -> list[Node]:
        """The nodes for xsfs's own names that a listing shows."""

    async def opendir(self, caller: Caller) -> Handle:
        handle = DirectoryHandle(self, is_unprivileged=caller.unprivileged)
        await handle.fetch()
        return handle


class DirectoryHandle(Handle):
    """An open directory: its children's names as they were when it was opened, or last rewound.

    The kinds of the children are fetched as the listing goes on, FETCH_WINDOW of them at a time.
    """

    __slots__ = (
        *("_bytes", "_entries", "_is_unprivileged", "_kinds", "_leaf_entry", "_own", "_path"),
        *("_scratch", "_was_read"),
    )

    node: ListedDirectory

    def __init__(self, node: ListedDirectory, *, is_unprivileged: bool) -> None:
        super().__init__(node)
        self._is_unprivileged = is_unprivileged
        self._path = b""
        """The path when the names were fetched.  A rename may have changed it since."""
        self._entries: list[bytes] = []
        self._kinds: dict[bytes, NodeState | None] = {}
        self._own: dict[bytes, Node] = {}
        self._scratch: frozenset[bytes] = frozenset()
        self._leaf_entry: EntryAttributes | None = None
        """The attributes of each file about whose value nothing was asked, except for the inode."""
        self._was_read = False
        self._bytes = 0

    async def fetch(self) -> None:
        """Fetch the names."""
        node = self.node
        node.require()
        path = self._path = node.path
        listing = await node.view.list_directory(path)
        if await node.is_elsewhere(path, listing.state):
            return await self.fetch()
        state = node.require_directory(listing.state)
        if not state.readable:
            refuse(errno.EACCES)
        kinds = self._kinds = listing.kinds
        created = node.open_files.created_in(path)
        for name in (*created, *node.view.always_there_below(path)):
            if kinds.get(name) is None:
                kinds[name] = EMPTY_NODE
        own = {each.name: each for each in node.own_nodes()}
        if node.view.has_dot_value(path, state):
            own[VALUE_NAME] = node.child(VALUE_NAME, state)
        self._own = own
        self._scratch = frozenset(node.scratch_names())
        always_there = node.view.always_there_below(path)
        names = (*own, *self._scratch, *listing.names, *created, *always_there)
        self._account(sum(map(len, names)) + ENTRY_BYTES * len(names))
        self._entries = list(dict.fromkeys(names))

    def _account(self, size: int) -> None:
        """Fails with ENFILE if the open listings would take too much memory."""
        table, more = self.node.table, size - self._bytes
        is_full = table.listing_bytes + more > LISTING_BYTES_MAX
        if self._is_unprivileged:
            half = LISTING_BYTES_MAX // 2
            is_full = is_full or table.unprivileged_listing_bytes + more > half
        if is_full and more > 0:
            refuse(errno.ENFILE)
        table.listing_bytes += more
        if self._is_unprivileged:
            table.unprivileged_listing_bytes += more
        self._bytes = size

    async def release(self) -> None:
        self._account(0)

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        if start == 0 and self._was_read:
            await self.fetch()
        self._was_read = True
        told: list[Node] = []
        try:
            await self._reply(start, token, told)
        except BaseException:
            # The kernel gets an error, and nothing of the reply.
            for node in told:
                self.node.table.forget(node.inode, 1)
            raise

    async def _reply(self, start: int, token: pyfuse3.ReaddirToken, told: list[Node]) -> None:
        """Put entries into the reply until it is full, and their nodes into `told`."""
        directory, table = self.node, self.node.table
        for position in range(start, len(SELF_AND_PARENT) + len(self._entries)):
            next_id = position + 1
            if position < len(SELF_AND_PARENT):
                own = directory.entry(0)
                if not pyfuse3.readdir_reply(token, SELF_AND_PARENT[position], own, next_id):
                    return
                continue
            index = position - len(SELF_AND_PARENT)
            name = self._entries[index]
            if name not in self._kinds and not self._is_of_xsfs(name):
                await self._fetch_kinds(index)
            if self._kinds.get(name) is LEAF:
                node, entry = self._leaf(name)
            else:
                found = await self._node_and_entry(name)
                if found is None:
                    continue  # it has vanished meanwhile
                node, entry = found
            if not pyfuse3.readdir_reply(token, table.file_name(name), entry, next_id):
                return
            table.remember(node)
            told.append(node)

    def _leaf(self, name: bytes) -> tuple[Node, EntryAttributes]:
        """The node of a file, whose attributes the kernel asks for before anybody sees them."""
        node = self.node.child(name, LEAF)
        if self._leaf_entry is None:
            self._leaf_entry = node.attributes(LEAF)
        self._leaf_entry.st_ino = InodeT(node.inode)
        return node, self._leaf_entry

    async def _node_and_entry(self, name: bytes) -> tuple[Node, EntryAttributes] | None:
        directory = self.node
        if (own := self._own.get(name)) is not None:
            if not directory.table.is_current(own, directory, name):
                own = directory.table.node(type(own), directory, name)
            try:
                return own, await own.getattr()
            except FUSEError:
                return None
        if name in self._scratch:
            scratch = directory.scratch_file(name)
            return None if scratch is None else (scratch, scratch.attributes())
        state = self._kinds[name]
        if state is None:
            return None
        child = directory.child(name, state)
        return child, child.attributes(state)

    def _is_of_xsfs(self, name: bytes) -> bool:
        """Whether Xenstore has no node of this name."""
        return name in self._own or name in self._scratch

    async def _fetch_kinds(self, index: int) -> None:
        """Fetch the kinds of the entries from `index` on.  Those of the entries before are dropped."""
        window = [
            name
            for name in self._entries[index : index + FETCH_WINDOW]
            if not self._is_of_xsfs(name)
        ]
        view, path = self.node.view, self.node.path
        self._kinds = await view.kinds(path, window)
        for name in (*self.node.open_files.created_in(path), *view.always_there_below(path)):
            if name in window and self._kinds.get(name) is None:
                self._kinds[name] = EMPTY_NODE
