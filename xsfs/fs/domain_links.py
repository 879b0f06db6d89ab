"""Guests by name: `.domain` in the root of a tree has a symbolic link for each domain that has a name.

The links are made of the store's present state at each look-up and listing.  Nothing is kept.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import Final

from xsfs.fs.generated import GeneratedDirectory, SymbolicLink
from xsfs.fs.nodes import refuse
from xsfs.view.names import NAME_MAX
from xsfs.view.view import FETCH_WINDOW, View
from xsfs.xenstore import protocol
from xsfs.xenstore.errors import XenstoreError

DOMAINS: Final = b"/local/domain"

_FILE_NAME: Final = re.compile(rb"(?!\.\.?\Z)[^/\0]{1,%d}" % NAME_MAX)

_MISSING: Final = frozenset(("ENOENT", "EACCES"))


async def domains_by_name(view: View) -> dict[bytes, list[bytes]]:
    """The names of the domains whose names may be read, with the numbers of the domains of each name."""
    try:
        numbers = [name for name in await view.commands.list(DOMAINS) if name.isdigit()]
    except XenstoreError as error:
        if error.name not in _MISSING:
            raise
        # A guest may not list the domains.
        numbers = [b"%d" % view.domid]
    numbers.sort(key=int)
    found: dict[bytes, list[bytes]] = {}
    for start in range(0, len(numbers), FETCH_WINDOW):
        window = numbers[start : start + FETCH_WINDOW]
        replies = await view.commands.pipeline(
            [protocol.read(b"%s/%s/name" % (DOMAINS, number)) for number in window]
        )
        for number, reply in zip(window, replies, strict=True):
            if isinstance(reply, XenstoreError):
                if reply.name not in _MISSING:
                    raise reply
            elif _FILE_NAME.fullmatch(reply):
                found.setdefault(reply, []).append(number)
    return found


class DomainLink(SymbolicLink):
    """The link to the home of the domain of this name.  Fails with ENOTUNIQ if several domains have it."""

    async def readlink(self) -> bytes:
        numbers = (await domains_by_name(self.view)).get(self.name, [])
        if len(numbers) != 1:
            refuse(errno.ENOTUNIQ if numbers else errno.ENOENT)
        return b"../.root%s/%s" % (DOMAINS, numbers[0])


class DomainsDirectory(GeneratedDirectory):
    """`.domain`: see the module's docstring."""

    child_kind = DomainLink

    async def names(self) -> Sequence[bytes]:
        found = await domains_by_name(self.view)
        return [name for name, numbers in found.items() if len(numbers) == 1]
