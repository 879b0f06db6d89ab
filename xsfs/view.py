"""What the store looks like from one place: as it is, or inside a transaction.

A `View` is what all nodes of one tree share: the session through which they ask, the domain whose
rights count, the rules by which a Xenstore node is a file or a directory.  It knows Xenstore and no
FUSE; each `look` is one burst of requests, and a second one for what the first leaves in doubt.
Nothing of it is kept but which nodes have been directories, and what a listing may ask ahead: never an
answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, NamedTuple

import trio

from xsfs import wire
from xsfs.client import Store, Transaction
from xsfs.connection import Reply
from xsfs.errors import XenstoreError
from xsfs.guesses import Guesses
from xsfs.known import KnownDirectories
from xsfs.names import Format, are_names, is_container, join
from xsfs.permissions import access_of, decode_perms
from xsfs.session import Names, Session
from xsfs.wire import Op, Request

Work = Callable[[Session], Awaitable[Request | None]]

GUEST_REQUESTS_MAX: Final = 1000
"""How many requests one transaction of a guest of oxenstored may have.  From 1024 on the daemon does
not even let it be rolled back, and as all of a guest is one connection to it, it stays for good."""

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

PARENT: Final = Look(b"", True, True, True, whole=False)
"""One with children."""

NOTHING: Final = Look(b"", False, True, True)
"""The root of a mount whose node is not there: a fresh store has no /local/domain/0."""


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
        self._guesses = Guesses()
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

        Of those that have children it is kept which, as guesses for `look_into`.
        """
        paths = [join(path, name) for name in names]
        asked = self.known.moment
        replies = await self.session.burst(self._questions_of_kind(paths))
        return await self._kinds(names, paths, replies, asked)

    async def look_at_kind(self, path: bytes) -> Look | None:
        """The same of one node."""
        asked = self.known.moment
        replies = await self.session.burst(self._questions_of_kind((path,)))
        return (await self._kinds((path,), (path,), replies, asked))[path]

    async def _kinds(
        self, names: Sequence[bytes], paths: Sequence[bytes], replies: Sequence[Reply], asked: int
    ) -> dict[bytes, Look | None]:
        """What the replies to `_questions_of_kind` tell, by name."""
        looks: dict[bytes, Look | None] = {}
        doubtful: dict[bytes, bytes] = {}
        perms = iter(replies[len(paths) :])
        for name, path, children in zip(names, paths, replies, strict=False):
            if not children and not self.asks_perms:
                look: Look | None = LEAF  # what most nodes are, without more ado
            else:
                of_perms = (next(perms),) if self.asks_perms else ()
                look = self._learn(path, (None, children, *of_perms), asked)
            looks[name] = look
            if look is None or look.hidden:
                continue
            if look.has_children:
                if isinstance(children, bytes):
                    self._guesses.saw(path, children)
            elif self.known.get(path) is not None or is_container(path):
                doubtful[name] = path
        if doubtful:
            looks.update(zip(doubtful, await self.look_all(list(doubtful.values())), strict=True))
        return looks

    async def look_into(self, path: bytes) -> tuple[Look | None, Names, dict[bytes, Look | None]]:
        """What the node is now, the names of its children, and what is known of these already.

        One round trip for short listings, and none for what the children are whose names were guessed.
        All answers are of now: a wrong guess is only a question too many.
        """
        guess = self._guesses.take(path)
        guessed = self.shown(path, wire.strings(guess))
        paths = [join(path, name) for name in guessed]
        questions = self._questions(path)
        asked = self.known.moment
        replies = await self.session.burst([*questions, *self._questions_of_kind(paths)])
        look = self._learn(path, replies[: len(questions)], asked)
        if look is None or not look.has_children:
            return look, [], {}
        listing = replies[1]
        if isinstance(listing, XenstoreError):
            return look, await self.session.list(path), {}
        self._guesses.was_listed(path, listing)
        known = await self._kinds(guessed, paths, replies[len(questions) :], asked)
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
        return Sight(look, self.shown(path, names), perms)

    def shown(self, path: bytes, names: list[bytes]) -> list[bytes]:
        """Those of a node's children that a listing shows."""
        if (
            path != b"/"
            and are_names(names)
            and len(path) + 1 + max(map(len, names)) <= wire.PATH_MAX
        ):
            return names
        return [name for name in names if self.shows_child(path, name)]

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

    def _questions_of_kind(self, paths: Sequence[bytes]) -> list[Request]:
        """What to ask in order to know which nodes are directories, but for empty ones that could be:
        of these `_kinds` asks for more."""
        terminated = [path + b"\0" for path in paths]
        questions = [Request(Op.DIRECTORY, path) for path in terminated]
        if self.asks_perms:
            questions += [Request(Op.GET_PERMS, path) for path in terminated]
        return questions

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
                return PARENT if children else LEAF
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
            writable = access_of(decode_perms(perms), self.domid)[1]
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
