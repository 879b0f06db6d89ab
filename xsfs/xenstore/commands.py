"""The operations on Xenstore, whatever they go through: the store as it is, or one transaction.

A `Session` answers `burst`; all else follows from it.  Somebody who knows pyxs, libxenstore or LING's
xenstore module finds the operations under the names they have there (docs/python.md has the table).
Paths are bytes or str, absolute or relative to the domain's home; values and names are bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from xsfs.xenstore import protocol
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.eventual import Eventual
from xsfs.xenstore.permissions import (
    Permission,
    Permissions,
    decode_perms,
    parse_permissions,
    set_perms,
)
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.unanswered import Reply

Path = bytes | str
Names = list[bytes]
NamesOfEach = list[Names]
Replies = list[Reply]

Rest = Callable[[], Iterator[Reply]]
"""Gives replies in order, as they come.  They are waited for no longer than a moment: it ends where one
has not come by then.  To be called again for the same ones."""

Answers = tuple[Replies, Rest]
"""To what was asked, and to what was asked behind it."""

LISTING_RESTARTS: Final = 20
"""How often a listing is begun anew because the node changed meanwhile, before it is EAGAIN."""

PARTS_MAX: Final = protocol.REPLY_MAX // 1024
"""How many parts one listing may have, that a store which never ends one is found out."""


def encode_path(path: Path) -> bytes:
    """The path as bytes; ValueError for one that no daemon takes."""
    return protocol.check_path(path.encode() if isinstance(path, str) else path)


class Session(ABC):
    """What can be asked of Xenstore."""

    @abstractmethod
    async def burst(
        self, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None
    ) -> Replies:
        """Ask everything in one round trip; the replies, in order, errors of single ones among them.

        meanwhile   called once before the replies are there, while the store is at work if it can be

        Raises StoreError where no reply came at all.
        """

    def ask(
        self, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None
    ) -> Eventual[Replies]:
        """The same, from a plain function: the replies themselves where they come within a moment."""
        return self.burst(requests, meanwhile)

    def ask_and(
        self, requests: Sequence[Request], more: Callable[[], Sequence[Request]]
    ) -> Eventual[Answers]:
        """The same, with what `more` gives asked behind it, whose replies may come later.

        Where nothing is gained by that, all of it is one burst.  `more` is called once.
        """
        return self._burst_and(requests, more)

    async def _burst_and(
        self, requests: Sequence[Request], more: Callable[[], Sequence[Request]]
    ) -> Answers:
        replies = await self.burst([*requests, *more()])
        count = len(requests)
        return replies[:count], lambda: iter(replies[count:])

    @property
    @abstractmethod
    def payload_max(self) -> int:
        """The longest payload of a request, in bytes."""

    async def call(self, request: Request) -> bytes:
        """The reply to one request.  Raises XenstoreError for the store's own verdict."""
        (reply,) = await self.burst((request,))
        if isinstance(reply, XenstoreError):
            raise reply
        return reply

    # --------------------------------------------------------------------------------- nodes

    async def read(self, path: Path) -> bytes:
        """The node's value: any bytes, perhaps none."""
        return await self.call(protocol.read(encode_path(path)))

    async def read_integer(self, path: Path) -> int:
        """The node's value as a number; ValueError where it is none."""
        return int(await self.read(path))

    async def write(self, path: Path, value: bytes | str | int) -> None:
        """Set the node's value; makes the node, and all its missing parents.

        ValueError for a value that does not fit one message.
        """
        data = value if isinstance(value, bytes) else str(value).encode()
        encoded = encode_path(path)
        if len(data) > protocol.value_max(encoded, self.payload_max):
            raise ValueError(f"a value of {len(data)} bytes does not fit one message")
        await self.call(protocol.write(encoded, data))

    async def mkdir(self, path: Path) -> None:
        """Make the node without a value, and all its missing parents; nothing if it is there."""
        await self.call(protocol.mkdir(encode_path(path)))

    async def delete(self, path: Path) -> None:
        """Remove the node and all below it; nothing if it is missing but its parent is there."""
        await self.call(protocol.rm(encode_path(path)))

    async def exists(self, path: Path) -> bool:
        try:
            await self.read(path)
        except XenstoreError as error:
            if error.name == "ENOENT":
                return False
            raise
        return True

    async def list(self, path: Path) -> Names:
        """The names of the node's children, however many; their order means nothing.

        Raises XenstoreError `E2BIG` where the daemon has no way to list so many (oxenstored, asked
        by a guest), `EAGAIN` where the node never stopped changing.
        """
        (names,) = await self.list_all((encode_path(path),))
        return names

    async def list_all(self, paths: Sequence[bytes]) -> NamesOfEach:
        """The children's names of many nodes, in one round trip where all are short enough."""
        replies = await self.burst([protocol.directory(path) for path in paths])
        names = []
        for path, reply in zip(paths, replies, strict=True):
            if isinstance(reply, bytes):
                names.append(protocol.decode_names(reply))
            elif reply.name == "E2BIG":
                names.append(await self._list_parts(path, reply))
            else:
                raise reply
        return names

    async def _list_parts(self, path: bytes, too_big: XenstoreError) -> Names:
        for _ in range(LISTING_RESTARTS):
            listing = bytearray()
            first_generation = None
            for _ in range(PARTS_MAX):
                try:
                    reply = await self.call(protocol.directory_part(path, len(listing)))
                except XenstoreError as error:
                    # oxenstored knows no DIRECTORY_PART: what DIRECTORY said is then the verdict.
                    if error.name in ("ENOSYS", "EINVAL"):
                        raise too_big from error
                    raise
                generation, part, last = protocol.decode_part(reply)
                if first_generation is None:
                    first_generation = generation
                elif generation != first_generation:
                    break
                listing += part
                if last:
                    return protocol.decode_names(bytes(listing))
                if len(listing) > protocol.REPLY_MAX:
                    raise protocol.WireError("a listing that never ends")
            else:
                raise protocol.WireError("a listing that never ends")
        raise XenstoreError("EAGAIN", protocol.directory(path))

    async def get_perms(self, path: Path) -> Permissions:
        return decode_perms(await self.call(protocol.get_perms(encode_path(path))))

    async def set_perms(self, path: Path, perms: str | Iterable[Permission]) -> None:
        """Set the node's permissions, given as Permission objects or as `n0,r7`."""
        entries = parse_permissions(perms) if isinstance(perms, str) else perms
        request = set_perms(encode_path(path), entries)
        if len(request.payload) > self.payload_max:
            raise ValueError("the permissions do not fit one message")
        await self.call(request)

    # ------------------------------------------------------------------------------- domains

    async def domid(self) -> int:
        """The number of the domain that asks, as its toolstack wrote it; 0 where nobody did.

        GET_DOMAIN_PATH would not tell: it prints its argument.  ValueError for what is no number.
        """
        try:
            return await self.read_integer("domid")
        except XenstoreError as error:
            if error.name != "ENOENT":
                raise
            return 0

    async def get_domain_path(self, domid: int) -> bytes:
        return protocol.decode_string(await self.call(protocol.get_domain_path(domid)))

    async def is_domain_introduced(self, domid: int) -> bool:
        return protocol.decode_string(await self.call(protocol.is_domain_introduced(domid))) == b"T"
