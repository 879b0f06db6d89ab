"""What the store looks like from one place: as it is, or inside a transaction.

A `View` is what all nodes of one tree share: the session through which they ask, the domain whose
rights count, the rules by which a Xenstore node is a file or a directory.  It knows Xenstore and no
FUSE; each `look` is one burst of requests, and nothing of it is kept but which nodes have been
directories, and what a listing may ask next (`_guesses`): never an answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, NamedTuple

import trio

from xsfs import wire
from xsfs.client import Store, Transaction
from xsfs.connection import Reply
from xsfs.errors import XenstoreError
from xsfs.known import KnownDirectories
from xsfs.names import Format, is_container, join
from xsfs.session import Names, Session
from xsfs.wire import Op, Request

Work = Callable[[Session], Awaitable[Request | None]]

GUEST_REQUESTS_MAX: Final = 1000
"""How many requests one transaction of a guest of oxenstored may have.  From 1024 on the daemon does
not even let it be rolled back, and as all of a guest is one connection to it, it stays for good."""

GUESSES_MAX: Final = 1024
LISTED_MAX: Final = 64
"""How many directories are remembered that were listed lately: a script may list one in a loop."""
GUESS_SIZE_MAX: Final = 512
"""Bytes of a listing that is kept as a guess: some 50 names."""

LOOK_WINDOW: Final = 256
"""How many nodes one burst looks at.  A listing of 100,000 children is asked in such steps."""


class Look(NamedTuple):
    """What one burst told of a node."""

    value: bytes
    """Empty also where it was not asked for, as the kind does not depend on it."""
    has_children: bool
    readable: bool
    writable: bool
    whole: bool = True
    """Whether the value was asked for."""

    @property
    def hidden(self) -> bool:
        """Whether this domain may not even know what the node is."""
        return not self.readable


Answers = Sequence[Reply | None]
"""To READ, DIRECTORY and, where they are asked for, GET_PERMS of a node.  None: not asked."""


class Sight(NamedTuple):
    """All that one burst told of a node, for a copy of it."""

    look: Look | None
    names: Names
    """Of those children that a listing shows."""
    perms: Reply
    """As GET_PERMS gave them; nothing where they were not asked for."""


_ABSENT: Final = frozenset(("ENOENT", "EINVAL"))
"""EINVAL: a path longer than the store takes, so that there can be no such node."""

HIDDEN: Final = Look(b"", False, False, True)
"""A node that may not be read.  Whether it may be written only a write can tell."""

LEAF: Final = Look(b"", False, True, True, whole=False)
"""A node without children, whose value was not asked for."""

NOTHING: Final = Look(b"", False, True, True)
"""The root of a mount whose node is not there: a fresh store has no /local/domain/0."""


def home_of(domid: int) -> bytes:
    """What relative paths of a domain are relative to."""
    return b"/local/domain/%d" % domid


def _each(replies: Sequence[Reply], count: int) -> list[Sequence[Reply]]:
    """The replies to the questions about each of `count` nodes."""
    step = len(replies) // count if count else 1
    return [replies[start : start + step] for start in range(0, len(replies), step)]


def _keep(guesses: dict[bytes, bytes], path: bytes, listing: bytes, most: int) -> None:
    """Keep a guess, and `most` of them at most: the oldest goes.  Nonsense is none."""
    guesses.pop(path, None)
    if not listing.endswith(b"\0"):
        return
    guesses[path] = listing
    if len(guesses) > most:
        del guesses[next(iter(guesses))]


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
        self._guesses: dict[bytes, bytes] = {}
        self._listed: dict[bytes, bytes] = {}
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

    async def look(self, path: bytes) -> Look | None:
        """What the node is now; None if there is none.  One round trip."""
        (look,) = await self.look_all((path,))
        return look

    async def look_all(self, paths: Sequence[bytes]) -> list[Look | None]:
        """The same for many nodes, still one round trip."""
        return await self.look_through(self.session, paths)

    async def look_at_children(
        self, path: bytes, names: Sequence[bytes]
    ) -> dict[bytes, Look | None]:
        """Of which kind children are, by name, with the value only of those where that depends on it.

        Of those that have children it is kept which, as a guess for `look_into`: who lists a directory
        often lists those in it next.
        """
        paths = [join(path, name) for name in names]
        asked = self.known.moment
        questions = [self._questions_of_kind(path) for path in paths]
        replies = await self.session.burst([q for each in questions for q in each])
        return self._children(paths, names, questions, replies, asked)

    def _children(
        self,
        paths: Sequence[bytes],
        names: Sequence[bytes],
        questions: Sequence[Sequence[Request]],
        replies: Sequence[Reply],
        asked: int,
    ) -> dict[bytes, Look | None]:
        looks: dict[bytes, Look | None] = {}
        start = 0
        for path, name, of_it in zip(paths, names, questions, strict=True):
            if len(of_it) == 1 and replies[start] == b"":
                looks[name] = LEAF  # what most nodes are, without more ado
                start += 1
                continue
            answers: Answers = replies[start : start + len(of_it)]
            start += len(of_it)
            if of_it[0].op != Op.READ:
                answers = (None, *answers)
            looks[name] = look = self._learn(path, answers, asked)
            if look is not None and look.has_children:
                self._guess(path, answers[1])
        return looks

    def _guess(self, path: bytes, listing: Reply | None) -> None:
        if isinstance(listing, bytes) and len(listing) <= GUESS_SIZE_MAX:
            _keep(self._guesses, path, listing, GUESSES_MAX)

    async def look_into(self, path: bytes) -> tuple[Look | None, Names, dict[bytes, Look | None]]:
        """What the node is now, the names of its children, and what is known of these already.

        One round trip for short listings, and none for what the children are whose names were guessed.
        All answers are of now: a wrong guess is only a question too many.
        """
        guess = self._guesses.pop(path, b"") or self._listed.get(path, b"")
        guessed = [name for name in wire.strings(guess) if self.shows_child(path, name)]
        paths = [join(path, name) for name in guessed]
        questions = self._questions(path)
        asked = self.known.moment
        of_children = [self._questions_of_kind(path) for path in paths]
        replies = await self.session.burst([*questions, *(q for each in of_children for q in each)])
        look = self._learn(path, replies[: len(questions)], asked)
        if look is None or not look.has_children:
            return look, [], {}
        listing = replies[1]
        if isinstance(listing, XenstoreError):
            return look, await self.session.list(path), {}
        if len(listing) <= GUESS_SIZE_MAX:
            _keep(self._listed, path, listing, LISTED_MAX)
        known = self._children(paths, guessed, of_children, replies[len(questions) :], asked)
        return look, wire.decode_names(listing), known

    async def look_through(self, session: Session, paths: Sequence[bytes]) -> list[Look | None]:
        """The same by another session: one of a transaction's own."""
        asked = self.known.moment
        replies = await session.burst([q for path in paths for q in self._questions(path)])
        answers = _each(replies, len(paths))
        return [
            self._learn(path, answer, asked) for path, answer in zip(paths, answers, strict=True)
        ]

    async def survey(self, paths: Sequence[bytes]) -> list[Sight]:
        """All about many nodes, in one round trip but for listings too long for one reply.

        Raises XenstoreError `E2BIG` for a node whose children there is no way to list.
        """
        asked = self.known.moment
        replies = await self.session.burst([q for path in paths for q in self._questions(path)])
        return [
            await self._sight(path, answers, asked)
            for path, answers in zip(paths, _each(replies, len(paths)), strict=True)
        ]

    async def _sight(self, path: bytes, answers: Sequence[Reply], asked: int) -> Sight:
        look = self._learn(path, answers, asked)
        perms = answers[2] if len(answers) > 2 else b""
        if look is None or not look.has_children:
            return Sight(look, [], perms)
        listing = answers[1]
        try:
            names = (
                wire.decode_names(listing)
                if isinstance(listing, bytes)
                else await self.session.list(path)
            )
        except XenstoreError as error:
            if error.name in ("ENOENT", "EACCES"):
                return Sight(None, [], b"")
            raise
        return Sight(look, [name for name in names if self.shows_child(path, name)], perms)

    def shows_child(self, path: bytes, name: bytes) -> bool:
        """Whether a listing shows a child: names of a broken or hostile store are left out."""
        if not wire.is_name(name) or len(path) + 1 + len(name) > wire.PATH_MAX:
            return False
        # A domain's special nodes, which oxenstored lists in the root, are watched, not read.
        return not (name.startswith(b"@") and path == b"/")

    def lasting_children(self, path: bytes) -> Collection[bytes]:
        """The names of directories that are there even while their nodes are not: in the root of a
        mount of the home, `data`, which the toolstack makes for guests but not for dom0."""
        return (b"data",) if path == self.root == self.home else ()

    def _questions(self, path: bytes) -> Sequence[Request]:
        """What to ask in order to know what a node is."""
        terminated = path + b"\0"
        if not self.asks_perms:
            return (Request(Op.READ, terminated), Request(Op.DIRECTORY, terminated))
        return (
            Request(Op.READ, terminated),
            Request(Op.DIRECTORY, terminated),
            Request(Op.GET_PERMS, terminated),
        )

    def _questions_of_kind(self, path: bytes) -> Sequence[Request]:
        """What to ask in order to know whether it is a directory: the value only of an empty node
        that could be one."""
        if self.known.get(path) is not None or is_container(path):
            return self._questions(path)
        if not self.asks_perms:
            return (Request(Op.DIRECTORY, path + b"\0"),)
        return self._questions(path)[1:]

    def _learn(self, path: bytes, answers: Answers, asked: int) -> Look | None:
        """What was seen of the node, when the store was `asked`."""
        look = self._understand(answers)
        if look is None:
            self.known.missed(path, asked)
        elif look.has_children:
            self.known.seen(path)
        return look

    def _understand(self, answers: Answers) -> Look | None:
        value, children = answers[0], answers[1]
        if len(answers) == 2 and type(children) is bytes:
            if value is None:
                return Look(b"", bool(children), True, True, whole=False)
            if type(value) is bytes:
                return Look(value, bool(children), True, True)
        has_children = bool(children)
        if isinstance(value, XenstoreError) or isinstance(children, XenstoreError):
            if isinstance(children, XenstoreError) and children.name == "E2BIG":
                has_children = True
            else:
                for reply in (value, children):
                    if isinstance(reply, XenstoreError):
                        if reply.name in _ABSENT:
                            return None
                        if reply.name == "EACCES":
                            return HIDDEN
                        raise reply
            if isinstance(value, XenstoreError):
                raise value
        writable = True
        if len(answers) > 2:
            perms = answers[2]
            if not isinstance(perms, bytes):
                return None if perms is not None and perms.name == "ENOENT" else HIDDEN
            writable = wire.access_of(wire.decode_perms(perms), self.domid)[1]
        return Look(value or b"", has_children, True, writable, whole=value is not None)

    def is_directory(self, path: bytes, look: Look) -> bool:
        """Whether a node is a directory: it has children, or is empty and one by custom.

        A node that may not be read counts as one, since the way to readable nodes leads through it.
        """
        if look.has_children or look.hidden:
            return True
        if not look.whole:
            return False
        return self.known.knows(path, look.value) or (not look.value and is_container(path))

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
            (reply,) = await self.session.burst((wire.directory_part(self.home, 0),))
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
