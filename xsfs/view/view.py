"""Xenstore nodes as files and directories: of the store itself, or inside a transaction.

All nodes of one tree share a `View`.  It has the commands by which they ask, the domain whose rights count,
and the rules by which a Xenstore node is a file or a directory.  It knows Xenstore, and nothing of FUSE.

READ and DIRECTORY together tell the kind of a node.  If the rights of the asking domain may not suffice, the
view sends GET_PERMS, too.  If only the kind matters, it omits READ.  The kind depends on the value only if
a node has no children and may be a directory; then a second pipeline fetches the value.

A view keeps no states.  It remembers which nodes have been directories (`sticky`).  If it fetches only the
kind of a directory, for a stat or a listing of its parent, it remembers the names in it, too (`hints`): a
program that lists a directory often lists its children next.  With a hint, a listing asks for the kinds of
the children together with their names.  A wrong hint only costs superfluous requests, because it is never
shown.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from itertools import repeat
from typing import Final, NamedTuple

import trio

from xsfs.view.bounded import Bounded
from xsfs.view.kinds import StickyDirectories, is_container
from xsfs.view.names import ValueFormat, is_shown, join, shown_names
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands, Names
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.home import moved
from xsfs.xenstore.permissions import access_of, decode_perms
from xsfs.xenstore.protocol import Op, Request
from xsfs.xenstore.store import Store, Transaction

log = logging.getLogger(__name__)

Work = Callable[[Commands], Awaitable[Request | None]]

GUEST_REQUESTS_MAX: Final = 1000
"""How many requests one transaction of a guest of oxenstored may have.  From 1024 on the daemon does not
even roll it back, and since a guest has one connection to it, the transaction stays until the guest ends."""

FETCH_WINDOW: Final = 256
"""How many nodes one pipeline asks about.  A listing of 100,000 children takes many such pipelines."""


HINTS_MAX: Final = 1024
"""How many hints are kept."""

HINT_SIZE_MAX: Final = 512
"""The length in bytes of a listing that is a hint: some 50 names."""


class NodeState(NamedTuple):
    """A Xenstore node at one moment, according to the replies of one pipeline."""

    value: bytes | None
    """None if READ was not sent."""
    has_children: bool
    readable: bool
    writable: bool
    children_hash: int = 0
    """Differs if the list of children differs; 0 if it is empty or unknown."""


UNREADABLE: Final = NodeState(b"", False, False, True)
"""A node that this domain may not read.  Only a write can tell whether it may be written."""

EMPTY_NODE: Final = NodeState(b"", False, True, True)
"""A directory that is shown although its node does not exist: a fresh store has no /local/domain/0."""

LEAF: Final = NodeState(None, False, True, True)
"""A node without children, whose value was not fetched."""

ABSENT: Final = frozenset(("ENOENT", "EINVAL"))
"""EINVAL: the path is longer than the store accepts, so there can be no such node."""


class Listing(NamedTuple):
    """A directory and its children at one moment."""

    state: NodeState | None
    names: Names
    """The children that a listing shows."""
    kinds: dict[bytes, NodeState | None]
    """The states of the children whose names were hinted, by name."""


# To find a member of an enum takes 0.2 microseconds.
_READ: Final = Op.READ
_DIRECTORY: Final = Op.DIRECTORY
_GET_PERMS: Final = Op.GET_PERMS


def requests_for(path: bytes, *, perms: bool, value: bool = True) -> tuple[Request, ...]:
    """The requests that tell the state of a node; without `value`, only its kind."""
    payload = path + b"\0"
    own = Request(_DIRECTORY, payload)
    asked = (Request(_READ, payload), own) if value else (own,)
    return (*asked, Request(_GET_PERMS, payload)) if perms else asked


def interpret(
    value: Reply | None, children: Reply, perms: Reply | None, domid: int
) -> NodeState | None:
    """The state of a node for domain `domid`, by the replies to READ, DIRECTORY and GET_PERMS.

    None if the node does not exist.  `value` and `perms` are None if they were not asked for.  Raises
    XenstoreError for a reply that does not tell whether the node exists.
    """
    for reply in (value, children):
        if isinstance(reply, XenstoreError) and (reply is value or reply.name != "E2BIG"):
            if reply.name in ABSENT:
                return None
            if reply.name == "EACCES":
                return UNREADABLE
            raise reply
    if isinstance(perms, XenstoreError):
        return None if perms.name == "ENOENT" else UNREADABLE
    assert not isinstance(value, XenstoreError)
    # E2BIG: the node has too many children for one reply.
    has_children = children != b""
    children_hash = hash(children) if has_children and isinstance(children, bytes) else 0
    if perms is None:
        if value is None and not has_children:
            return LEAF
        return NodeState(value, has_children, True, True, children_hash)
    _, writable = access_of(decode_perms(perms), domid)
    return NodeState(value, has_children, True, writable, children_hash)


def home_of(domid: int) -> bytes:
    """The directory in which the relative paths of a domain start."""
    return b"/local/domain/%d" % domid


class View:
    """See the module's docstring."""

    ended: bool = False
    """Whether its transaction is over, so that everything seen through it is stale."""

    log_prefix: bytes = b""
    """A prefix of its paths in the log."""

    def __init__(
        self,
        store: Store,
        domid: int,
        root: bytes,
        value_format: ValueFormat,
        sticky: StickyDirectories,
    ) -> None:
        self.store = store
        self.commands: Commands = store
        self.domid = domid
        self.home = home_of(domid)
        self.root = root
        self.value_format = value_format
        self.sticky = sticky
        self.asks_perms = domid != 0
        """Whether each pipeline asks for permissions, too.  Domain 0 may do everything anyway."""
        self.hints: Bounded[bytes, bytes] = Bounded(HINTS_MAX)
        """By path, listings as bytes of the protocol."""
        self._requests_max: int | None = None
        self._has_probed = domid == 0
        self._moves = trio.lowlevel.ParkingLot()
        """Tasks that wait for `move_home`."""
        self.at_end: dict[object, Callable[[], None]] = {}
        """Functions to call when it ends."""

    def move_home(self, domid: int) -> None:
        """The domain has got another domid."""
        home = home_of(domid)
        self.root = moved(self.root, self.home, home)
        self.domid, self.home = domid, home
        self._moves.unpark_all()

    async def has_moved(self, path: bytes) -> bool:
        """Whether this path, which cannot be read, is the home that the domain had until now.

        If so, this waits until the view knows the new one.
        """
        if path != self.home or not self.domid:
            return False
        if await self.store.domid() in (0, self.domid):
            return path != self.home
        with trio.move_on_after(self.store.timeout):
            while path == self.home:
                await self._moves.park()
        return path != self.home

    def end(self) -> None:
        """End the view: from now on everything seen through it is stale."""
        self.ended = True
        while self.at_end:
            self.at_end.popitem()[1]()

    # --------------------------------------------------------------------------------- states

    async def fetch(
        self, paths: Sequence[bytes], commands: Commands | None = None
    ) -> list[NodeState | None]:
        """The present states of the nodes, in one round trip; None for a missing node.

        commands    a transaction to ask in, instead of the view's own commands
        """
        asks_perms = self.asks_perms
        replies = await (commands or self.commands).pipeline(
            [request for path in paths for request in requests_for(path, perms=asks_perms)]
        )
        each = iter(replies)
        of_each = zip(paths, each, each, each if asks_perms else repeat(None), strict=False)
        return [
            self._learn(path, interpret(value, children, perms, self.domid))
            for path, value, children, perms in of_each
        ]

    async def fetch_one(self, path: bytes) -> NodeState | None:
        """The present state of the node, in one round trip; None if it does not exist."""
        asks_perms = self.asks_perms
        replies = await self.commands.pipeline(requests_for(path, perms=asks_perms))
        state = interpret(replies[0], replies[1], replies[2] if asks_perms else None, self.domid)
        if state is None or state.has_children:
            self._learn(path, state)
        return state

    async def fetch_directory(self, path: bytes) -> NodeState | None:
        """The state of a node that probably is a directory.  Its value is None if nothing depends on it."""
        asks_perms = self.asks_perms
        replies = await self.commands.pipeline(requests_for(path, perms=asks_perms, value=False))
        children = replies[0]
        state = interpret(None, children, replies[1] if asks_perms else None, self.domid)
        if state is None or not state.readable:
            return state
        if state.has_children:
            self._saw_children(path, children)
            return state
        return await self.fetch_one(path) if self._may_be_directory(path) else state

    async def kinds(self, parent: bytes, names: Sequence[bytes]) -> dict[bytes, NodeState | None]:
        """The states of a node's children by name.  Only those whose kind depends on it have a value."""
        replies = await self.commands.pipeline(self._requests_for_kinds(parent, names))
        return await self._understand_kinds(parent, names, replies)

    def _requests_for_kinds(self, parent: bytes, names: Sequence[bytes]) -> list[Request]:
        above = join(parent, b"")
        asked = (_DIRECTORY, _GET_PERMS) if self.asks_perms else (_DIRECTORY,)
        return [Request(op, b"%s%s\0" % (above, name)) for name in names for op in asked]

    async def _understand_kinds(
        self, parent: bytes, names: Sequence[bytes], replies: Sequence[Reply]
    ) -> dict[bytes, NodeState | None]:
        above = join(parent, b"")
        in_container = is_container(parent)
        step = 2 if self.asks_perms else 1
        states: dict[bytes, NodeState | None] = {}
        doubtful = []
        for index, name in enumerate(names):
            path = above + name
            children = replies[step * index]
            if children == b"" and not self.asks_perms:
                state: NodeState | None = LEAF  # most children
            else:
                perms = replies[step * index + 1] if self.asks_perms else None
                state = interpret(None, children, perms, self.domid)
            states[name] = state
            if state is None:
                continue
            if state.has_children:
                self._saw_children(path, children)
            elif state.readable and (path in self.sticky or (in_container and is_container(path))):
                doubtful.append(name)
        if doubtful:
            fetched = await self.fetch([above + name for name in doubtful])
            states.update(zip(doubtful, fetched, strict=True))
        return states

    async def list_directory(self, path: bytes) -> Listing:
        """The state of a node, its children's names, and the states of children whose names were hinted.

        One round trip, unless the listing is too long for one reply, or a kind depends on a value.
        """
        hint = self.hints.pop(path, b"")
        hinted = shown_names(path, hint)
        own = requests_for(path, perms=self.asks_perms)
        replies = await self.commands.pipeline((*own, *self._requests_for_kinds(path, hinted)))
        perms = replies[2] if self.asks_perms else None
        listing = replies[1]
        state = self._learn(path, interpret(replies[0], listing, perms, self.domid))
        if state is None or not state.has_children:
            return Listing(state, [], {})
        if not isinstance(listing, bytes):
            listing = protocol.encode_names(await self.commands.list(path))
        names = hinted if listing == hint else shown_names(path, listing)
        if len(names) < listing.count(b"\0"):
            _log_hidden(path, protocol.decode_names(listing))
        kinds = await self._understand_kinds(path, hinted, replies[len(own) :]) if hinted else {}
        return Listing(state, names, kinds)

    def _saw_children(self, path: bytes, listing: Reply) -> None:
        self.sticky.add(path)
        if isinstance(listing, bytes) and len(listing) <= HINT_SIZE_MAX and not listing[-1]:
            self.hints.put(path, listing)
        else:
            self.hints.pop(path, None)

    def _learn(self, path: bytes, state: NodeState | None) -> NodeState | None:
        if state is None:
            self.sticky.discard_value(path)
        elif state.has_children:
            self.sticky.add(path)
        return state

    # ---------------------------------------------------------------------------------- kinds

    def _may_be_directory(self, path: bytes) -> bool:
        """Whether a node without children may be a directory, depending on its value."""
        return path in self.sticky or is_container(path)

    def is_directory(self, path: bytes, state: NodeState) -> bool:
        """Whether a node is a directory: it has children, or it is empty and has been a directory or is
        one by Xen's conventions.

        A node that may not be read counts as one, since the way to readable nodes leads through it.
        """
        if state.has_children or not state.readable:
            return True
        if state.value:
            return bool(self.sticky.has_value(path))
        return state.value is not None and self._may_be_directory(path)

    def has_dot_value(self, path: bytes, state: NodeState) -> bool:
        """Whether a directory has a `.value`: if the value is not empty, or `.value` was just created."""
        return bool(state.value or self.sticky.has_value(path))

    def always_there_below(self, path: bytes) -> Collection[bytes]:
        """The names of directories that are shown even if their nodes do not exist: in the root of a
        mount of the home, `data`, which the toolstack creates for guests but not for dom0."""
        return (b"data",) if path == self.root == self.home else ()

    def is_always_there(self, path: bytes) -> bool:
        """Whether this path is shown even if its node does not exist."""
        if path == self.root:
            return True
        parent, _, name = path.rpartition(b"/")
        return name in self.always_there_below(parent)

    # -------------------------------------------------------------------------------- changes

    async def has_features(self) -> bool:
        """Whether the daemon knows GET_FEATURE, and so may be C xenstored 4.22, which dies of SET_PERMS with
        a reserved domid on its socket."""
        (reply,) = await self.store.pipeline((protocol.get_feature(),))
        return not (isinstance(reply, XenstoreError) and reply.name == "ENOSYS")

    async def atomically(self, work: Work) -> None:
        """Run `work` in a transaction: all that it reads and writes happens together, or not at all.

        `work` gets the commands of a transaction, and returns its last change, which goes out together
        with the commit, or None.  It may run several times.  If it raises, nothing has happened.
        """
        await self.store.atomically(partial(_work_and_commit, work))

    async def atomically_apart(self, work: Work) -> None:
        """`atomically` on a connection of its own, for a transaction that may be long."""
        await self.store.atomically(partial(_work_and_commit, work), self.begin)

    async def begin(self) -> Transaction:
        """Start a transaction on its own connection, which stays small enough for the daemon to end."""
        if not self._has_probed:
            # DIRECTORY_PART tells the daemons apart.  The root of a mount may not exist yet.
            (reply,) = await self.store.pipeline((protocol.directory_part(self.home, 0),))
            if isinstance(reply, XenstoreError) and reply.name in ("ENOSYS", "EINVAL"):
                self._requests_max = GUEST_REQUESTS_MAX
            self._has_probed = True
        transaction = await self.store.begin()
        transaction.requests_max = self._requests_max
        return transaction


async def _work_and_commit(work: Work, transaction: Transaction) -> None:
    last = await work(transaction)
    for reply in await transaction.finish(() if last is None else (last,)):
        if isinstance(reply, XenstoreError):
            raise reply


def _log_hidden(path: bytes, names: Names) -> None:
    for name in names:
        if not is_shown(path, name) and not name.startswith(b"@"):
            log.warning("left out of %r: a child named %r", path, name[:80])
