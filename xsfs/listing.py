"""Listings: the names in a directory, and what they are, asked in as few bursts as will do."""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Collection
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, InodeT

from xsfs.looks import LEAF, NOTHING, Look
from xsfs.names import NAME_MAX, VALUE_NAME
from xsfs.node import Handle, refuse
from xsfs.view import LOOK_WINDOW, Digest
from xsfs.xattrs import XenstoreNode

OWN_ENTRIES: Final = (b".", b"..")


class ListedNode(XenstoreNode):
    """What a listing needs of a directory."""

    __slots__ = ()

    @abstractmethod
    def still(self, look: Look | None) -> Look:
        """What was seen of the node, if it is still a directory; else ESTALE."""

    @abstractmethod
    def child(self, name: bytes, look: Look) -> XenstoreNode:
        """The node for a child that looks so, or for `.value`."""

    def lasting_children(self) -> Collection[bytes]:
        """The names of directories that are there even while their nodes are not."""
        return ()

    async def opendir(self) -> Handle:
        handle = DirectoryHandle(self)
        await handle.fetch()
        return handle


class DirectoryHandle(Handle):
    """An open directory: its children's names as they were when it was opened, or last rewound.

    What the children are is asked as the listing goes on, LOOK_WINDOW of them in one burst.  Of those
    whose names could be guessed it was asked with the names.
    """

    __slots__ = (
        "digest",
        "doubtful",
        "entries",
        "look",
        "looks",
        "made",
        "of_leaf",
        "path",
        "used",
    )

    node: ListedNode

    def __init__(self, node: ListedNode) -> None:
        super().__init__(node)
        self.path = b""
        """The node's, at the last request: to ask for it is to walk up the tree."""
        self.entries: list[bytes] = []
        self.looks: dict[bytes, Look | None] = {}
        """What some of them are."""
        self.made: dict[bytes, tuple[XenstoreNode, EntryAttributes]] = {}
        """The nodes of some of those, made before they are read, and their attributes."""
        self.of_leaf: EntryAttributes | None = None
        """The attributes of all that are mere leaves: they are alike but for the inode."""
        self.doubtful: list[bytes] = []
        """Those that must be asked for once more."""
        self.look = NOTHING
        """What the directory itself is."""
        self.digest: Digest | None = None
        """The store's answers, until entries are made of them."""
        self.used = False

    async def fetch(self) -> None:
        """Ask for the names."""
        node = self.node
        node.require()
        self.path = node.path
        seen, digest = await node.view.look_into(self.path)
        look = node.still(seen)
        if look.hidden:
            refuse(errno.EACCES)
        self.look, self.digest = look, digest

    def prepare(self) -> None:
        """Make entries of the answers.  `.value` is among them if there is a value."""
        if self.digest is None:
            return
        node = self.node
        names, kinds, self.doubtful = self.digest()
        looks: dict[bytes, Look | None] = {}
        made: dict[bytes, tuple[XenstoreNode, EntryAttributes]] = {}
        self.looks, self.made = looks, made
        self.entries = list(dict.fromkeys((*names, *node.lasting_children())))
        if node.view.has_dot_value(self.path, self.look):
            self.entries.insert(0, VALUE_NAME)
            looks[VALUE_NAME] = self.look
        # The store is at work on the next while one is made: nothing is left to the end.
        for name, look in kinds:
            looks[name] = look
            if look is not None:
                made[name] = self._make(name, look)
        self.digest = None

    def _make(self, name: bytes, look: Look) -> tuple[XenstoreNode, EntryAttributes]:
        node = self.node.child(name, look)
        if look is not LEAF:
            return node, node.attributes(look)
        if self.of_leaf is None:
            self.of_leaf = node.attributes(look)
        return node, self.of_leaf

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        if self.used and start >= len(OWN_ENTRIES) + len(self.entries):
            return  # the end, which whoever reads is told once more
        if start == 0 and self.used:
            await self.fetch()
        self.used = True
        try:
            self.prepare()
        finally:
            # An error is met once: from the start on it is asked again.
            self.digest = None
        if start < len(OWN_ENTRIES) and not self._reply_own(token, start):
            return
        first = max(0, start - len(OWN_ENTRIES))
        if first >= len(self.entries):
            return
        self.path = self.node.path
        if self.doubtful:
            self.looks |= await self.node.view.look_closer(self.path, self.doubtful)
            self.doubtful = []
        directory = self.node
        tree = directory.tree
        for index in range(first, len(self.entries)):
            name = self.entries[index]
            if name not in self.looks:
                await self._look_from(index)
            look = self.looks[name]
            if look is None:
                if name not in directory.lasting_children():
                    continue  # vanished meanwhile
                look = NOTHING
            made = self.made.get(name)
            if made is None or not tree.stands(made[0], directory, name):
                made = self._make(name, look)
            node, entry = made
            entry.st_ino = InodeT(node.inode)
            next_id = len(OWN_ENTRIES) + index + 1
            shown = name if len(name) <= NAME_MAX else tree.aliases.file_name(name)
            if not pyfuse3.readdir_reply(token, shown, entry, next_id):
                return  # it is full
            tree.remember(node)

    def _reply_own(self, token: pyfuse3.ReaddirToken, start: int) -> bool:
        """Put the directory's own entries from `start` on into the reply; False if it is full."""
        own = self.node.entry(0)
        for next_id, name in enumerate(OWN_ENTRIES[start:], start + 1):
            if not pyfuse3.readdir_reply(token, name, own, next_id):
                return False
        return True

    async def _look_from(self, index: int) -> None:
        """Ask what they are from one on; what is known of those before is given up."""
        self.made = {}
        own = self.looks.get(VALUE_NAME)
        window = self.entries[index : index + LOOK_WINDOW]
        children = [name for name in window if name != VALUE_NAME]
        self.looks = await self.node.view.look_at_children(self.path, children)
        self.looks[VALUE_NAME] = own
