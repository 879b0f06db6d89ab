"""Listings: the names in a directory, and what they are, asked in as few bursts as will do."""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, InodeT

from xsfs.fs.inodes import Handle, refuse
from xsfs.fs.xattrs import XenstoreNode
from xsfs.view.children import LookInside
from xsfs.view.looks import LEAF, NOTHING, PARENT, Look
from xsfs.view.names import NAME_MAX, VALUE_NAME
from xsfs.view.view import LOOK_WINDOW
from xsfs.xenstore.eventual import Eventual, result_of

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

    @abstractmethod
    def leaves(self) -> Callable[[bytes], XenstoreNode]:
        """What `child` does for a LEAF, as most are, with fewer steps for each."""

    def lasting_children(self) -> Collection[bytes]:
        """The names of directories that are there even while their nodes are not."""
        return ()

    def alike(self) -> tuple[EntryAttributes, EntryAttributes]:
        """The attributes of each child that is LEAF, and of each that is PARENT, but for the inode.

        They depend on nothing but the mount.  To be given away before anything else is done.
        """
        tree = self.tree
        if tree.alike is None:
            leaf, parent = self.child(b"leaf", LEAF), self.child(b"parent", PARENT)
            tree.alike = leaf.attributes(LEAF), parent.attributes(PARENT)
        return tree.alike

    def opendir(self) -> Eventual[Handle]:
        handle = DirectoryHandle(self)
        fetching = handle.fetch()
        return handle if fetching is None else self._opendir(handle, fetching)

    async def _opendir(self, handle: Handle, fetching: Eventual[None]) -> Handle:
        await result_of(fetching)
        return handle


Made = tuple[Look, XenstoreNode, EntryAttributes]
"""What a child is, its node, and its attributes but for the inode: they may be those of `alike`."""


class DirectoryHandle(Handle):
    """An open directory: its children's names as they were when it was opened, or last rewound.

    What the children are is asked as the listing goes on, LOOK_WINDOW of them in one burst.  Of those
    whose names could be guessed it was asked with the names.  `fetch` comes before all else.
    """

    __slots__ = ("doubtful", "entries", "inside", "look", "made", "path", "used")

    node: ListedNode
    inside: LookInside | None
    """The store's answers, until entries are made of them."""
    path: bytes
    """The node's when the names were asked for; a rename may have changed that since."""
    look: Look
    """What the directory itself was then."""

    def __init__(self, node: ListedNode) -> None:
        super().__init__(node)
        self.entries: list[bytes] = []
        self.made: dict[bytes, Made | None] = {}
        """Some of them, before they are read; None: one that has vanished meanwhile."""
        self.doubtful: list[bytes] = []
        """Those that must be asked for once more."""
        self.used = False

    def fetch(self) -> Eventual[None]:
        """Ask for the names."""
        node = self.node
        node.require()
        self.path = path = node.path
        inside = LookInside(node.view, path)
        seen = inside.ask()
        if type(seen) is Look:
            self._fetched(inside, seen)
            return None
        return self._fetch(inside, seen)

    async def _fetch(self, inside: LookInside, seen: Eventual[Look | None]) -> None:
        self._fetched(inside, await result_of(seen))

    def _fetched(self, inside: LookInside, seen: Look | None) -> None:
        look = self.node.still(seen)
        if look.hidden:
            refuse(errno.EACCES)
        self.look, self.inside = look, inside

    def prepare(self) -> None:
        """Make entries of the answers.  `.value` is among them if there is a value."""
        if self.inside is None:
            return
        node = self.node
        names, kinds, self.doubtful = self.inside.digest()
        self.entries = list(dict.fromkeys((*names, *node.lasting_children())))
        self.made = {}
        if node.view.has_dot_value(self.path, self.look):
            self.entries.insert(0, VALUE_NAME)
            self.made[VALUE_NAME] = self._make(VALUE_NAME, self.look)
        # The store is at work on the next while one is made: nothing is left to the end.
        self._make_all(kinds)
        self.inside = None

    def _make_all(self, kinds: Iterable[tuple[bytes, Look | None]]) -> None:
        made, leaf = self.made, self.node.leaves()
        of_leaf, _ = self.node.alike()
        for name, look in kinds:
            made[name] = (look, leaf(name), of_leaf) if look is LEAF else self._make(name, look)

    def _make(self, name: bytes, look: Look | None) -> Made | None:
        if look is None:
            if name not in self.node.lasting_children():
                return None
            look = NOTHING
        node = self.node.child(name, look)
        if look is PARENT:
            _, of_parent = self.node.alike()
            return look, node, of_parent
        return look, node, node.attributes(look)

    def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> Eventual[None]:
        if self.used:
            if start >= len(OWN_ENTRIES) + len(self.entries):
                return None  # the end, which whoever reads is told once more
            if start == 0:
                return self._read_anew(token)
        return self._read(start, token)

    async def _read_anew(self, token: pyfuse3.ReaddirToken) -> None:
        await result_of(self.fetch())
        await result_of(self._read(0, token))

    def _read(self, start: int, token: pyfuse3.ReaddirToken) -> Eventual[None]:
        self.used = True
        try:
            self.prepare()
        finally:
            # An error is met once: from the start on it is asked again.
            self.inside = None
        if start < len(OWN_ENTRIES) and not self._reply_own(token, start):
            return None
        first = max(0, start - len(OWN_ENTRIES))
        if first < len(self.entries) and self.doubtful:
            return self._look_and_reply(first, token, [])
        told: list[XenstoreNode] = []
        unknown = self._reply(first, token, told)
        return None if unknown is None else self._look_and_reply(unknown, token, told)

    def _reply(
        self, first: int, token: pyfuse3.ReaddirToken, told: list[XenstoreNode]
    ) -> int | None:
        """Put the entries from one on into the reply: up to one of which nothing is known yet, which
        is returned, or till the reply is full or the end is reached.

        told    gets the nodes of which the kernel will know by it
        """
        directory, made_of = self.node, self.made
        tree = directory.tree
        for index in range(first, len(self.entries)):
            name = self.entries[index]
            if name not in made_of:
                return index
            made = made_of[name]
            if made is not None and not tree.stands(made[1], directory, name):
                made = self._make(name, made[0])
            if made is None:
                continue
            _, node, entry = made
            entry.st_ino = InodeT(node.inode)
            shown = name if len(name) <= NAME_MAX else tree.aliases.file_name(name)
            if not pyfuse3.readdir_reply(token, shown, entry, len(OWN_ENTRIES) + index + 1):
                return None
            tree.remember(node)
            told.append(node)
        return None

    async def _look_and_reply(
        self, first: int, token: pyfuse3.ReaddirToken, told: list[XenstoreNode]
    ) -> None:
        """The same, after asking for what is not known."""
        try:
            if self.doubtful:
                looks = await self.node.view.look_closer(self.node.path, self.doubtful)
                self._make_all(looks.items())
                self.doubtful = []
            unknown = self._reply(first, token, told)
            while unknown is not None:
                await self._look_from(unknown)
                unknown = self._reply(unknown, token, told)
        except BaseException:
            # The kernel gets an error, and nothing of the reply.
            for node in told:
                self.node.tree.forget(node.inode, 1)
            raise

    def _reply_own(self, token: pyfuse3.ReaddirToken, start: int) -> bool:
        """Put the directory's own entries from `start` on into the reply; False if it is full."""
        _, own = self.node.alike()
        own.st_ino = InodeT(self.node.inode)
        for next_id, name in enumerate(OWN_ENTRIES[start:], start + 1):
            if not pyfuse3.readdir_reply(token, name, own, next_id):
                return False
        return True

    async def _look_from(self, index: int) -> None:
        """Ask what they are from one on; what is known of those before is given up."""
        window = self.entries[index : index + LOOK_WINDOW]
        children = [name for name in window if name != VALUE_NAME]
        looks = await self.node.view.look_at_children(self.node.path, children)
        self.made = {VALUE_NAME: self.made.get(VALUE_NAME)}
        self._make_all(looks.items())
