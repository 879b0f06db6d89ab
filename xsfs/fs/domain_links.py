"""Guests by name: `.domain` in the root of a tree has a symbolic link for each domain that has a name.

The links are made of the store's present state at each look-up and listing.  Nothing is kept.
"""

from __future__ import annotations

import errno
import stat
from collections import Counter
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes

from xsfs.fs.nodes import Caller, Handle, Node, refuse
from xsfs.fs.special import GeneratedDirectory
from xsfs.view.names import NAME_MAX
from xsfs.view.view import FETCH_WINDOW, View
from xsfs.xenstore import protocol
from xsfs.xenstore.errors import XenstoreError

DOMAINS: Final = b"/local/domain"

_MISSING: Final = frozenset(("ENOENT", "EACCES"))


def is_file_name(name: bytes) -> bool:
    """Whether a file can have this name."""
    return (
        0 < len(name) <= NAME_MAX
        and name not in (b".", b"..")
        and b"/" not in name
        and b"\0" not in name
    )


async def domain_names(view: View) -> list[tuple[bytes, bytes]]:
    """The name and the number of each domain whose name may be read, in the order of the numbers."""
    try:
        numbers = [name for name in await view.commands.list(DOMAINS) if name.isdigit()]
    except XenstoreError as error:
        if error.name not in _MISSING:
            raise
        # A guest may not list the domains.
        numbers = [b"%d" % view.domid]
    numbers.sort(key=int)
    found = []
    for start in range(0, len(numbers), FETCH_WINDOW):
        window = numbers[start : start + FETCH_WINDOW]
        replies = await view.commands.pipeline(
            [protocol.read(b"%s/%s/name" % (DOMAINS, number)) for number in window]
        )
        for number, reply in zip(window, replies, strict=True):
            if isinstance(reply, XenstoreError):
                if reply.name not in _MISSING:
                    raise reply
            elif is_file_name(reply):
                found.append((reply, number))
    return found


class DomainLink(Node):
    """The link to the home of the domain of this name."""

    __slots__ = ()

    kind = stat.S_IFLNK

    parent: DomainsDirectory

    async def getattr(self) -> EntryAttributes:
        return self.attributes(len(await self.readlink()))

    def attributes(self, size: int) -> EntryAttributes:
        entry = self.entry(size)
        entry.st_mode = stat.S_IFLNK | 0o777
        return entry

    async def readlink(self) -> bytes:
        self.require()
        return await self.parent.target_of(self.name)


class DomainsDirectory(GeneratedDirectory):
    """`.domain`: see the module's docstring."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        return self.view.root

    async def getattr(self) -> EntryAttributes:
        self.require()
        return self.entry(0, write=False)

    async def target_of(self, name: bytes) -> bytes:
        """Where the link leads.  Fails with ENOTUNIQ if several domains have this name."""
        numbers = [number for each, number in await domain_names(self.view) if each == name]
        if not numbers:
            refuse(errno.ENOENT)
        if len(numbers) > 1:
            refuse(errno.ENOTUNIQ)
        return target_path(numbers[0])

    async def lookup(self, name: bytes, pid: int) -> EntryAttributes:
        self.require()
        if len(name) > NAME_MAX:
            refuse(errno.ENAMETOOLONG)
        target = await self.target_of(name)
        link = self.table.node(DomainLink, self, name)
        self.table.remember(link)
        return link.attributes(len(target))

    async def opendir(self, caller: Caller) -> Handle:
        handle = DomainsHandle(self)
        await handle.fetch()
        return handle


def target_path(number: bytes) -> bytes:
    """The home of a domain, as seen from `.domain`."""
    return b"../.root%s/%s" % (DOMAINS, number)


class DomainsHandle(Handle):
    """An open `.domain`: the links that there were when it was opened, or last rewound."""

    __slots__ = ("_links", "_was_read")

    node: DomainsDirectory

    def __init__(self, node: DomainsDirectory) -> None:
        super().__init__(node)
        self._links: list[tuple[bytes, bytes]] = []
        self._was_read = False

    async def fetch(self) -> None:
        self.node.require()
        found = await domain_names(self.node.view)
        count = Counter(name for name, _ in found)
        self._links = [(name, number) for name, number in found if count[name] == 1]

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        if start == 0 and self._was_read:
            await self.fetch()
        self._was_read = True
        node, table = self.node, self.node.table
        for position in range(start, len(self._links) + 2):
            if position < 2:
                name = (b".", b"..")[position]
                if not pyfuse3.readdir_reply(token, name, node.entry(0, write=False), position + 1):
                    return
                continue
            name, number = self._links[position - 2]
            link = table.node(DomainLink, node, name)
            entry = link.attributes(len(target_path(number)))
            if not pyfuse3.readdir_reply(token, name, entry, position + 1):
                return
            table.remember(link)
