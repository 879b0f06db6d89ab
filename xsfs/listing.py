"""Listings: the names in a directory, and what they are, asked in as few bursts as will do."""

from __future__ import annotations

import errno
import logging
from abc import abstractmethod
from collections.abc import Collection

import pyfuse3

from xsfs.names import VALUE_NAME, join
from xsfs.node import Handle, refuse
from xsfs.view import LOOK_WINDOW, NOTHING, Look
from xsfs.xattrs import XenstoreNode

log = logging.getLogger(__name__)


class ListedNode(XenstoreNode):
    """What a listing needs of a directory."""

    __slots__ = ()

    @abstractmethod
    def still(self, look: Look | None) -> Look:
        """What was seen of the node, if it is still a directory; else ESTALE."""

    @abstractmethod
    def child(self, name: bytes, path: bytes, look: Look) -> XenstoreNode:
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

    What the children are is asked as the listing goes on, LOOK_WINDOW of them in one burst.
    """

    __slots__ = ("entries", "looks", "path", "used")

    node: ListedNode

    def __init__(self, node: ListedNode) -> None:
        super().__init__(node)
        self.path = b""
        """The node's, as long as one request takes: to ask for it is to walk up the tree."""
        self.entries: list[bytes] = []
        self.looks: dict[bytes, Look | None] = {}
        """What some of them are."""
        self.used = False

    async def fetch(self) -> None:
        """Ask for the names.  `.value` is among them if there is a value."""
        node = self.node
        node.require()
        self.path = node.path
        look, names, self.looks = await node.view.look_into(self.path)
        look = node.still(look)
        if look.hidden:
            refuse(errno.EACCES)
        shown = node.view.shown(self.path, names)
        if len(shown) < len(names):
            self._log_left_out(names)
        self.entries = list(dict.fromkeys((*shown, *node.lasting_children())))
        if node.view.has_dot_value(self.path, look):
            self.entries.insert(0, VALUE_NAME)
            self.looks[VALUE_NAME] = look

    def _log_left_out(self, names: list[bytes]) -> None:
        for name in names:
            if not self.node.view.shows_child(self.path, name) and not name.startswith(b"@"):
                log.warning("left out of %r: a child named %r", self.path, name[:80])

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        if start == 0 and self.used:
            await self.fetch()
        self.used = True
        if start < len(self.entries) + 2:
            self.path = self.node.path
        for position in range(start, len(self.entries) + 2):
            if position < 2:
                name, own = (b".", b"..")[position], self.node.entry(0)
                if not pyfuse3.readdir_reply(token, name, own, position + 1):
                    return
                continue
            if self.entries[position - 2] not in self.looks:
                await self._look_from(position - 2)
            if not self._reply(token, self.entries[position - 2], position + 1):
                return

    def _reply(self, token: pyfuse3.ReaddirToken, name: bytes, next_id: int) -> bool:
        """Put one entry into the reply; False if it is full."""
        look = self.looks[name]
        if look is None:
            if name not in self.node.lasting_children():
                return True  # vanished meanwhile
            look = NOTHING
        node = self.node.child(name, self._path(name), look)
        tree = node.tree
        if not pyfuse3.readdir_reply(
            token, tree.aliases.file_name(name), node.attributes(look), next_id
        ):
            return False
        tree.remember(node)
        return True

    def _path(self, name: bytes) -> bytes:
        return self.path if name == VALUE_NAME else join(self.path, name)

    async def _look_from(self, index: int) -> None:
        """Ask what they are from one on; what is known of those before is given up."""
        own = self.looks.get(VALUE_NAME)
        window = self.entries[index : index + LOOK_WINDOW]
        children = [name for name in window if name != VALUE_NAME]
        self.looks = await self.node.view.look_at_children(self.path, children)
        self.looks[VALUE_NAME] = own
