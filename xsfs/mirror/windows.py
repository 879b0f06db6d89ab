"""Nodes that a live mirror looks at in one burst, and how it looks at all of them.

`Windows` owns the bursts of one whole copy: which are asked, and by which connection.  Several ask in
turn, as events come by one of their own anyway: a reply says what a node was at some moment since it
was asked for, and what changes later has an event.  Bursts are taken in the order in which they were
asked.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from typing import Final

import outcome
import trio

from xsfs.view.view import Sight
from xsfs.xenstore.store import Store

WINDOW: Final = 64
"""How many nodes one burst looks at."""

TRIED_MAX: Final = 4 * WINDOW
"""How many nodes are tried for one burst, where many are not worth a question.  Nobody else has a turn
meanwhile."""

OLDEST_SHARE: Final = 4
"""Where all are to have their turn, one in so many of a burst is one that has waited longest."""

WINDOWS_AHEAD: Final = 4
"""How many bursts of a whole copy are asked before the last one is applied, each by a connection of its
own: the store is never at rest, not even while its answers are understood."""

Survey = Callable[[Sequence[bytes], Store], Awaitable[list[Sight]]]
"""Looks at nodes by one of the stores."""


def next_window(
    queue: OrderedDict[bytes, None],
    others: Container[bytes] = (),
    *,
    size: int = WINDOW,
    fair: bool = False,
) -> list[bytes]:
    """The latest first: a walk that goes down before it goes on has the shortest queue.

    others      those that will be looked at anyway, which are left out
    fair        whether everyone's turn comes, however many are later
    """
    latest = size - max(1, size // OLDEST_SHARE) if fair else size
    window: list[bytes] = []
    while queue and len(window) < size:
        path, _ = queue.popitem(last=len(window) < latest)
        if path not in others:
            window.append(path)
    return window


def full_window(
    queue: OrderedDict[bytes, None], worth: Callable[[Sequence[bytes]], list[bytes]]
) -> list[bytes]:
    """The same of those that are worth being looked at, which are rarely so many.

    worth       gives those of some nodes that are; it is asked about TRIED_MAX at most
    """
    window: list[bytes] = []
    left = TRIED_MAX
    while queue and left and len(window) < WINDOW:
        tried = next_window(queue, size=min(left, WINDOW - len(window)))
        left -= len(tried)
        window += worth(tried)
    return window


class _Window:
    """Nodes that are looked at by a task of its own, while the one who wants to know is at work."""

    def __init__(self, paths: Sequence[bytes]) -> None:
        self.paths = paths
        self._seen = trio.Event()
        self._outcome: outcome.Outcome[list[Sight]] | None = None

    async def look(self, survey: Survey, store: Store) -> None:
        try:
            self._outcome = outcome.Value(await survey(self.paths, store))
        except Exception as error:
            self._outcome = outcome.Error(error)
        self._seen.set()

    async def sights(self) -> list[Sight]:
        """What was seen.  Raises what the survey raised."""
        await self._seen.wait()
        assert self._outcome is not None
        return self._outcome.unwrap()


class Windows:
    """See the module's text.

    queue       the nodes, to which whoever takes what was seen adds others
    stores      by whom is asked
    servants    where the asking tasks run
    """

    def __init__(
        self,
        queue: OrderedDict[bytes, None],
        stores: Iterable[Store],
        survey: Survey,
        servants: trio.Nursery,
    ) -> None:
        self._queue = queue
        self._stores = deque(stores)
        self._survey = survey
        self._servants = servants
        self._asked: deque[_Window] = deque()

    async def next(self) -> tuple[Sequence[bytes], list[Sight]] | None:
        """The next nodes, and what was seen of them; None at the end.  Raises what the survey raised.

        To be called when the last ones have been applied.  More is asked before this returns.
        """
        self._ask()
        if not self._asked:
            return None
        window = self._asked.popleft()
        sights = await window.sights()
        self._ask()
        for _ in range(2):  # it is sent in one of them, before this task or after
            await trio.lowlevel.checkpoint()
        return window.paths, sights

    def _ask(self) -> None:
        if self._queue and len(self._asked) < WINDOWS_AHEAD:
            window = _Window(next_window(self._queue))
            self._asked.append(window)
            self._servants.start_soon(window.look, self._survey, self._stores[0])
            self._stores.rotate()

    def receive(self) -> None:
        """Take the replies that have come: for who is at work for a while."""
        for store in self._stores:
            store.receive()
