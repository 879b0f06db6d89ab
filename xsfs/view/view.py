"""What the store looks like from one place: as it is, or inside a transaction.

A `View` is what all nodes of one tree share: the session through which they ask, the domain whose
rights count, the rules by which a Xenstore node is a file or a directory.  It knows Xenstore and no
FUSE; each `look` is one burst of requests, and a second one for what the first leaves in doubt.
Nothing of it is kept but which nodes have been directories, and what a listing may ask ahead: never an
answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import trio

from xsfs.view.hints import Guesses
from xsfs.view.kinds import EMPTY, container_at, is_container
from xsfs.view.known import KnownDirectories
from xsfs.view.looks import LEAF, PARENT, Answers, Look, questions, questions_of_kind, understand
from xsfs.view.names import Format, join, shown_names
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Names, Session
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.eventual import Eventual, result_of
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.store import Store
from xsfs.xenstore.transaction import Transaction
from xsfs.xenstore.unanswered import Reply

Work = Callable[[Session], Awaitable[Request | None]]

GUEST_REQUESTS_MAX: Final = 1000
"""How many requests one transaction of a guest of oxenstored may have.  From 1024 on the daemon does
not even let it be rolled back, and as all of a guest is one connection to it, it stays for good."""

LOOK_WINDOW: Final = 256
"""How many nodes one burst looks at.  A listing of 100,000 children is asked in such steps."""


Kinds = Iterator[tuple[bytes, Look | None]]
"""What children are, by name, in the order of the answers."""


class Sight(NamedTuple):
    """All that one burst told of a node, for a copy of it."""

    look: Look | None
    names: Names
    """Of those children that a listing shows."""
    perms: Reply
    """As GET_PERMS gave them; nothing where they were not asked for."""


def home_of(domid: int) -> bytes:
    """What relative paths of a domain are relative to."""
    return b"/local/domain/%d" % domid


def _each(replies: Sequence[Reply], count: int) -> list[Sequence[Reply]]:
    """The replies to the questions about each of `count` nodes."""
    step = len(replies) // count if count else 1
    return [replies[start : start + step] for start in range(0, len(replies), step)]


class View:
    """See the module's text."""

    ended: bool = False
    """Whether all that was seen through it is stale for good: its transaction is over."""

    def __init__(
        self, store: Store, domid: int, root: bytes, content: Format, known: KnownDirectories
    ) -> None:
        self.store = store
        self.session: Session = store
        self.domid = domid
        self.home = home_of(domid)
        self.root = root
        self.content = content
        self.known = known
        self.asks_perms = domid != 0
        """Whether each look asks for the permissions, too: domain 0 may do everything anyway."""
        self.guesses = Guesses()
        self._requests_max: int | None = None
        self._probed = domid == 0
        self.at_end: dict[object, Callable[[], None]] = {}
        """What is called when it ends: for those who wait for something in it."""

    def end(self) -> None:
        """All that was seen through it is stale from now on."""
        self.ended = True
        while self.at_end:
            self.at_end.popitem()[1]()

    # ---------------------------------------------------------------------------------- looks

    async def look(self, path: bytes, meanwhile: Callable[[], None] | None = None) -> Look | None:
        """What the node is now; None if there is none.  One round trip.

        meanwhile   as in Session.burst
        """
        return await result_of(self.look_at_once(path, meanwhile))

    def look_at_once(
        self, path: bytes, meanwhile: Callable[[], None] | None = None
    ) -> Eventual[Look | None]:
        """The same, from a plain function: the look itself where the store tells within a moment."""
        asked = self.known.moment
        replies = self.session.ask(questions(path, perms=self.asks_perms), meanwhile)
        if type(replies) is list:
            return self.learn(path, replies, asked)
        return self._learn_later(path, replies, asked)

    async def _learn_later(
        self, path: bytes, replies: Eventual[Sequence[Reply]], asked: int
    ) -> Look | None:
        return self.learn(path, await result_of(replies), asked)

    async def look_all(self, paths: Sequence[bytes]) -> list[Look | None]:
        """The same for many nodes, still one round trip."""
        return await self.look_through(self.session, paths)

    async def look_at_children(
        self, path: bytes, names: Sequence[bytes]
    ) -> dict[bytes, Look | None]:
        """Of which kind children are, by name, with the value only of those where that depends on it.

        Of those that have children it is kept which, as guesses for who looks into it.
        """
        asked = self.known.moment
        replies = await self.session.burst(questions_of_kind(path, names, perms=self.asks_perms))
        doubtful: list[bytes] = []
        looks = dict(self.kinds(path, names, replies, asked, doubtful))
        return looks | await self.look_closer(path, doubtful)

    async def look_at_kind(self, path: bytes) -> Look | None:
        """The same of one node."""
        asked = self.known.moment
        replies = await self.session.burst(questions(path, perms=self.asks_perms, value=False))
        look = self.learn(path, (None, *replies), asked)
        if look is None or not look.readable:
            return look
        if look.has_children:
            if isinstance(replies[0], bytes):
                self.guesses.saw(path, replies[0])
            return look
        in_doubt = self.known.get(path) is not None or is_container(path)
        return await self.look(path) if in_doubt else look

    async def look_closer(self, path: bytes, doubtful: Sequence[bytes]) -> dict[bytes, Look | None]:
        """What children are whose kind the answers left in doubt."""
        if not doubtful:
            return {}
        looks = await self.look_all([join(path, name) for name in doubtful])
        return dict(zip(doubtful, looks, strict=True))

    def kinds(
        self,
        above: bytes,
        names: Iterable[bytes],
        replies: Iterable[Reply],
        asked: int,
        doubtful: list[bytes],
    ) -> Kinds:
        """What the replies to `questions_of_kind` tell, as far as they go.

        doubtful    gets the names of those that need a closer look
        """
        known, asks_perms = self.known, self.asks_perms
        container = container_at(above)
        if container is EMPTY:  # so that it need not be asked for each child
            container = None
        below = join(above, b"")
        answers = iter(replies)
        for name, children in zip(names, answers, strict=False):
            path = below + name
            if asks_perms:
                if (perms := next(answers, None)) is None:
                    return
                look = self.learn(path, (None, children, perms), asked)
            elif type(children) is bytes:  # what most answers are, and mean, without more ado
                if children:
                    known.seen(path)
                look = PARENT if children else LEAF
            else:
                look = self.learn(path, (None, children), asked)
            if look is None:
                pass
            elif look.has_children:
                if isinstance(children, bytes):
                    self.guesses.saw(path, children)
            elif look.readable and (
                known.get(path) is not None
                or (container is not None and container.get(name) is not None)
            ):
                doubtful.append(name)
                continue
            yield name, look

    async def look_through(self, session: Session, paths: Sequence[bytes]) -> list[Look | None]:
        """The same by another session: one of a transaction's own."""
        asked = self.known.moment
        replies = await session.burst(
            [q for path in paths for q in questions(path, perms=self.asks_perms)]
        )
        answers = _each(replies, len(paths))
        return [
            self.learn(path, answer, asked) for path, answer in zip(paths, answers, strict=True)
        ]

    async def survey(
        self,
        paths: Sequence[bytes],
        meanwhile: Callable[[], None] | None = None,
        session: Session | None = None,
    ) -> list[Sight]:
        """All about many nodes, in one round trip but for listings too long for one reply.

        meanwhile   as in Session.burst
        session     another one than the view's, to ask by

        Raises XenstoreError `E2BIG` for a node whose children there is no way to list.
        """
        asked = self.known.moment
        replies = await (session or self.session).burst(
            [q for path in paths for q in questions(path, perms=self.asks_perms)], meanwhile
        )
        sights = []
        for path, answers in zip(paths, _each(replies, len(paths)), strict=True):
            sight = self._sight(path, answers, asked)
            if sight is None:
                sight = await self._long_sight(path, answers, session or self.session)
            sights.append(sight)
        return sights

    def glance(self, path: bytes, meanwhile: Callable[[], None]) -> Sight | None:
        """The same of one node, if the store tells all within a moment."""
        asked = self.known.moment
        answers = self.store.at_once(questions(path, perms=self.asks_perms), meanwhile)
        return None if answers is None else self._sight(path, answers, asked)

    def _sight(self, path: bytes, answers: Sequence[Reply], asked: int) -> Sight | None:
        """None where the listing is too long for an answer."""
        look, listing = self.learn(path, answers, asked), answers[1]
        perms = answers[2] if len(answers) > 2 else b""
        if look is None or not look.has_children:
            return Sight(look, [], perms)
        if not isinstance(listing, bytes):
            return None
        return Sight(look, shown_names(path, protocol.decode_names(listing), listing), perms)

    async def _long_sight(self, path: bytes, answers: Sequence[Reply], session: Session) -> Sight:
        try:
            names = shown_names(path, await session.list(path))
        except XenstoreError as error:
            if error.name in ("ENOENT", "EACCES"):
                return Sight(None, [], b"")
            raise
        look = understand(answers, self.domid)
        return Sight(look, names, answers[2] if len(answers) > 2 else b"")

    def lasting_children(self, path: bytes) -> Collection[bytes]:
        """The names of directories that are there even while their nodes are not: in the root of a
        mount of the home, `data`, which the toolstack makes for guests but not for dom0."""
        return (b"data",) if path == self.root == self.home else ()

    def learn(self, path: bytes, answers: Answers, asked: int) -> Look | None:
        """What was seen of the node, when the store was `asked`."""
        look = understand(answers, self.domid)
        if look is None:
            self.known.missed(path, asked)
        elif look.has_children:
            self.known.seen(path)
        return look

    def is_directory(self, path: bytes, look: Look) -> bool:
        """Whether a node is a directory: it has children, or is empty and one by custom.

        A node that may not be read counts as one, since the way to readable nodes leads through it.
        """
        if look.has_children or not look.readable:
            return True
        if not look.whole:
            return False
        with_value = self.known.get(path)
        if look.value:
            return bool(with_value)
        return with_value is not None or is_container(path)

    def has_dot_value(self, path: bytes, look: Look) -> bool:
        """Whether there is a `.value` in a directory: one for each value, or just made."""
        return bool(look.value) or self.known.has_value(path)

    # -------------------------------------------------------------------------------- changes

    async def atomically(self, work: Work) -> None:
        """Run `work` so that all it reads and writes happens at once, or not at all.

        `work` gets a session, and returns the one last change, which goes out together with the
        commit; None if there is nothing left to do.  It may be run several times; what it raises
        undoes it.
        """

        async def and_commit(transaction: Transaction) -> None:
            last = await work(transaction)
            replies = await transaction.finish(() if last is None else (last,))
            for reply in replies:
                if isinstance(reply, XenstoreError):
                    raise reply

        await self.store.atomically(and_commit)

    async def begin(self) -> Transaction:
        """Start a transaction with a connection of its own, which cannot grow too big to be ended."""
        if not self._probed:
            # DIRECTORY_PART tells the daemons apart; the fresh root of a mount may be missing.
            (reply,) = await self.session.burst((protocol.directory_part(self.home, 0),))
            if isinstance(reply, XenstoreError) and reply.name in ("ENOSYS", "EINVAL"):
                self._requests_max = GUEST_REQUESTS_MAX
            self._probed = True
        transaction = await self.store.begin()
        transaction.requests_max = self._requests_max
        return transaction

    async def atomically_apart(self, work: Work) -> None:
        """The same on a connection of its own, for transactions that may be long."""
        deadline = trio.current_time() + self.store.timeout
        while True:
            transaction = await self.begin()
            try:
                last = await work(transaction)
                if last is not None:
                    await transaction.call(last)
                await transaction.commit()
                return
            except XenstoreError as error:
                if error.name != "EAGAIN" or trio.current_time() >= deadline:
                    raise
            finally:
                self.store.abandon(transaction)
