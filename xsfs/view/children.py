"""Looking into a node: what it is, which children it has and of which kind they are, asked together.

The names of the children are guessed, from what was seen in the node before, so that their kinds can be
asked right behind the node itself.  All answers are of now: a wrong guess is only a question too many.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from xsfs.view.looks import Look, questions, questions_of_kind
from xsfs.view.names import is_shown, shown_names
from xsfs.view.view import Kinds, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Answers, Names, Rest
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.eventual import Eventual, result_of
from xsfs.xenstore.protocol import Request

log = logging.getLogger(__name__)


class Children(NamedTuple):
    """What the answers tell of a node's children."""

    names: Names
    """Of those that a listing shows."""
    kinds: Kinds
    """Of as many as the answers tell, as these come."""
    doubtful: list[bytes]
    """The names of those whose kind the answers leave in doubt, once all kinds were told."""


class LookInside:
    """One such look: `ask`, and then `digest`.

    It takes one round trip for short listings, and none more for children whose names were guessed.
    """

    __slots__ = ("_asked", "_guess", "_guessed", "_listing", "_path", "_rest", "_view")

    _listing: bytes | Names
    """The names as DIRECTORY gave them; those of a listing too long for one reply."""
    _rest: Rest
    """Gives the answers about those whose names were guessed."""

    def __init__(self, view: View, path: bytes) -> None:
        self._view = view
        self._path = path
        self._guess = b""
        self._guessed: Names = []

    def ask(self) -> Eventual[Look | None]:
        """What the node is now; None if there is none."""
        view = self._view
        self._asked = view.known.moment
        answers = view.session.ask_and(
            questions(self._path, perms=view.asks_perms), self._of_children
        )
        if type(answers) is tuple:
            return self._understand(answers)
        return self._wait(answers)

    async def _wait(self, answers: Eventual[Answers]) -> Look | None:
        return await result_of(self._understand(await result_of(answers)))

    def _of_children(self) -> Sequence[Request]:
        view = self._view
        self._guess = guess = view.guesses.take(self._path)
        if not guess:
            return ()
        self._guessed = shown_names(self._path, protocol.decode_names(guess), guess)
        return questions_of_kind(self._path, self._guessed, perms=view.asks_perms)

    def _understand(self, answers: Answers) -> Eventual[Look | None]:
        own, self._rest = answers
        look = self._view.learn(self._path, own, self._asked)
        listing = own[1] if look is not None and look.has_children else b""
        if isinstance(listing, XenstoreError):
            return self._list(look)
        self._listing = listing
        return look

    async def _list(self, look: Look | None) -> Look | None:
        self._listing = await self._view.session.list(self._path)
        return look

    def digest(self) -> Children:
        """What there is to know of the children; asks nothing.

        To be called before anything else is done with the view, since that learns from the answers; and
        again where it raised.
        """
        view, path, listing = self._view, self._path, self._listing
        if not listing:
            return Children([], iter(()), [])
        if not isinstance(listing, bytes):
            return Children(_shown(path, listing), iter(()), [])
        if listing == self._guess and len(self._guessed) == listing.count(b"\0"):
            shown = self._guessed
        else:
            shown = _shown(path, protocol.decode_names(listing))
        view.guesses.was_listed(path, listing)
        doubtful: list[bytes] = []
        kinds = view.kinds(path, self._guessed, self._rest(), self._asked, doubtful)
        return Children(shown, kinds, doubtful)


def _shown(path: bytes, names: Names) -> Names:
    """Those to be shown of the names in a listing; of the others the log tells."""
    shown = shown_names(path, names)
    if len(shown) < len(names):
        for name in names:
            if not is_shown(path, name) and not name.startswith(b"@"):
                log.warning("left out of %r: a child named %r", path, name[:80])
    return shown
