"""The operations on Xenstore: on the store itself, or within one transaction.

`Commands` needs `pipeline` from its subclasses, and everything else follows.  The operations have the
names that they have in pyxs, libxenstore and LING's xenstore module (docs/python.md has the table).
Paths are bytes or str, absolute or relative to the domain's home.  Values and names are bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Final

from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import NotFound, XenstoreError
from xsfs.xenstore.permissions import (
    Permission,
    Permissions,
    decode_perms,
    parse_permissions,
    set_perms,
)
from xsfs.xenstore.protocol import Op, Request

Path = bytes | str
Value = bytes | bytearray | memoryview | str | int
Names = list[bytes]
Pipeline = Callable[[Sequence[Request]], Awaitable[list[Reply]]]
"""See `Commands.pipeline`."""
WalkedNode = tuple[bytes, bytes, Names]
"""(path, value, names of the children)"""

LISTING_RESTARTS: Final = 20
"""How often a listing starts again because the node changed meanwhile, before it fails with EAGAIN."""

PARTS_MAX: Final = protocol.REPLY_MAX // 3072
"""The number of parts of one listing.  The daemons leave at most the length of a name unused in each part, so
more come only from a store that never ends one."""

WALK_WINDOW: Final = 128
"""How many nodes `walk` reads in one round trip."""

_LEFT_OUT: Final = frozenset(("ENOENT", "EACCES", "EINVAL"))
"""Errors of nodes that a walk leaves out.  EINVAL: the path is longer than the store accepts."""


def encode_path(path: Path) -> bytes:
    """The path as bytes.  ValueError for one that no daemon accepts."""
    return protocol.check_path(path.encode() if isinstance(path, str) else path)


def encode_value(value: Value) -> bytes:
    """The value as bytes: bytes as they are, str in UTF-8, an int in decimal.  TypeError for others."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).encode()
    raise TypeError(f"a value is bytes, str or int, not {type(value).__name__}")


class Commands(ABC):
    """The operations on the store itself, or within one transaction.

    Each is a checkpoint: it can be cancelled, and lets other tasks run.
    """

    @abstractmethod
    async def pipeline(self, requests: Sequence[Request]) -> list[Reply]:
        """Send all requests at once and wait for the replies: in order, with errors of single requests
        among them.  Raises StoreError if no reply came."""

    def pipelines(self) -> Sequence[Pipeline]:
        """How a walk sends many pipelines at once: by turns with each of these."""
        return (self.pipeline,)

    @property
    @abstractmethod
    def payload_max(self) -> int:
        """The longest payload of a request, in bytes."""

    async def call(self, request: Request) -> bytes:
        """The reply to one request.  Raises XenstoreError if the store replies with an error."""
        (reply,) = await self.pipeline((request,))
        if isinstance(reply, XenstoreError):
            raise reply
        return reply

    async def call_all(self, requests: Sequence[Request]) -> list[bytes]:
        """The replies to requests sent together.  Raises the first error among them, as XenstoreError."""
        replies: list[bytes] = []
        for reply in await self.pipeline(requests):
            if isinstance(reply, XenstoreError):
                raise reply
            replies.append(reply)
        return replies

    # --------------------------------------------------------------------------------- nodes

    async def read(self, path: Path) -> bytes:
        """The node's value: any bytes, perhaps none."""
        return await self.call(protocol.read(encode_path(path)))

    async def read_integer(self, path: Path) -> int:
        """The node's value as a number.  Raises ValueError if it is none."""
        return int(await self.read(path))

    async def write(self, path: Path, value: Value) -> None:
        """Set the node's value.  Creates the node and all its missing parents.

        Raises TypeError for a value that is not bytes, str or int, and ValueError for one that does not fit
        one message.
        """
        data, encoded = encode_value(value), encode_path(path)
        if len(data) > protocol.value_max(encoded, self.payload_max):
            raise ValueError(f"a value of {len(data)} bytes does not fit one message")
        await self.call(protocol.write(encoded, data))

    async def mkdir(self, path: Path) -> None:
        """Create the node without a value, and all its missing parents, unless it exists."""
        await self.call(protocol.mkdir(encode_path(path)))

    async def delete(self, path: Path) -> None:
        """Remove the node and all below it.  A missing node is no error if its parent exists."""
        await self.call(protocol.rm(encode_path(path)))

    async def exists(self, path: Path) -> bool:
        """Whether there is such a node."""
        try:
            await self.read(path)
        except NotFound:
            return False
        return True

    async def list(self, path: Path) -> Names:
        """The names of the node's children, however many, in no particular order.

        Raises XenstoreError `E2BIG` if the daemon has no way to list so many (oxenstored, for a guest),
        Conflict if the node never stopped changing.
        """
        (names,) = await self.list_all((encode_path(path),))
        return names

    async def list_all(self, paths: Sequence[bytes]) -> Sequence[Names]:
        """The names of the children of each node, in one round trip if all listings are short enough."""
        replies = await self.pipeline([protocol.directory(path) for path in paths])
        return [await self._names(path, reply) for path, reply in zip(paths, replies, strict=True)]

    async def _names(self, path: bytes, listing: Reply) -> Names:
        """The names in the reply to DIRECTORY, which may be that there are too many for one reply."""
        if isinstance(listing, bytes):
            return protocol.decode_names(listing)
        if listing.name == "E2BIG":
            return await self._list_parts(path, listing)
        raise listing

    async def _list_parts(self, path: bytes, too_big: XenstoreError) -> Names:
        for _ in range(LISTING_RESTARTS):
            try:
                names = await self._list_parts_once(path)
            except XenstoreError as error:
                # oxenstored has no DIRECTORY_PART: its reply to DIRECTORY is the error then.
                raise too_big if error.name in ("ENOSYS", "EINVAL") else error from None
            if names is not None:
                return names
        raise XenstoreError("EAGAIN", protocol.directory(path))

    async def _list_parts_once(self, path: bytes) -> Names | None:
        """The names; None if the node has changed meanwhile."""
        listing = bytearray()
        generations = set()
        for _ in range(PARTS_MAX):
            reply = await self.call(protocol.directory_part(path, len(listing)))
            generation, part, last = protocol.decode_part(reply)
            generations.add(generation)
            listing += part
            if len(generations) > 1:
                return None
            if last:
                return protocol.decode_names(bytes(listing))
            if len(listing) > protocol.REPLY_MAX:
                break
        raise protocol.WireError("a listing that never ends")

    async def walk(self, path: Path) -> AsyncIterator[WalkedNode]:
        """The node and all below it, each before its children: (path, value, names of the children).

        Many nodes share a round trip.  Nodes are left out if they vanish meanwhile, or if this domain may not
        read them.  Raises XenstoreError if that is so for the first one.
        """
        async for nodes in self.walk_in_windows(path):
            for node in nodes:
                yield node

    async def walk_in_windows(self, path: Path) -> AsyncIterator[Sequence[WalkedNode]]:
        """The nodes of `walk`, in the lists in which they come."""
        top = encode_path(path)
        stack = [top]
        while stack:
            window = stack[-WALK_WINDOW:][::-1]
            del stack[-WALK_WINDOW:]
            replies = await self.pipeline(
                [ask(path) for path in window for ask in (protocol.read, protocol.directory)]
            )
            nodes: list[WalkedNode] = []
            below: list[bytes] = []
            for path, value, listing in zip(window, replies[::2], replies[1::2], strict=True):
                try:
                    if isinstance(value, XenstoreError):
                        raise value
                    names = await self._names(path, listing)
                except XenstoreError as error:
                    if path == top or error.name not in _LEFT_OUT:
                        raise
                    continue
                if path == b"/":
                    # oxenstored lists the special nodes, which can only be watched.
                    names = [name for name in names if not name.startswith(b"@")]
                names = [name for name in names if protocol.is_name(name)]
                nodes.append((path, value, names))
                above = path if path == b"/" else path + b"/"
                below += [above + name for name in names]
            stack += below[::-1]
            yield nodes

    async def get_perms(self, path: Path) -> Permissions:
        """The node's permissions, the owner's first.  `format_permissions` makes `n0,r7` of them."""
        return decode_perms(await self.call(protocol.get_perms(encode_path(path))))

    async def set_perms(self, path: Path, perms: str | Iterable[Permission]) -> None:
        """Set the node's permissions, given as Permission objects or as `n0,r7`.

        Raises ValueError if they do not fit one message.
        """
        entries = parse_permissions(perms) if isinstance(perms, str) else perms
        request = set_perms(encode_path(path), entries)
        if len(request.payload) > self.payload_max:
            raise ValueError("the permissions do not fit one message")
        await self.call(request)

    # ------------------------------------------------------------------------------- domains

    async def domid(self) -> int:
        """The number of this client's own domain, as the toolstack wrote it; 0 if none is written.

        Raises ValueError if the node holds no number.
        """
        # GET_DOMAIN_PATH would not tell: it prints its argument.
        try:
            return await self.read_integer("domid")
        except NotFound:
            return 0

    async def get_domain_path(self, domid: int) -> bytes:
        """The home of a domain, whether or not the domain exists: `/local/domain/7`."""
        return protocol.decode_string(await self.call(protocol.get_domain_path(domid)))

    async def is_domain_introduced(self, domid: int) -> bool:
        """Whether the daemon serves the domain."""
        return protocol.decode_string(await self.call(protocol.is_domain_introduced(domid))) == b"T"

    async def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Let the daemon serve a new domain.  For a toolstack, as are `release`, `resume` and `set_target`.

        gfn     the guest's frame number of the page with the Xenstore ring
        port    the domain's event channel for the ring
        """
        await self.call(protocol.domain_request(Op.INTRODUCE, domid, gfn, port))

    async def release(self, domid: int) -> None:
        """Tell the daemon that the domain has ended."""
        await self.call(protocol.domain_request(Op.RELEASE, domid))

    async def resume(self, domid: int) -> None:
        """Tell the daemon that the domain, which has shut down, runs again: it may shut down once more."""
        await self.call(protocol.domain_request(Op.RESUME, domid))

    async def set_target(self, domid: int, target: int) -> None:
        """Give `domid` the permissions of `target`, whose devices it emulates."""
        await self.call(protocol.domain_request(Op.SET_TARGET, domid, target))
