"""Nodes that a live mirror looks at in one burst."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import outcome
import trio

from xsfs.view import Sight

WINDOW: Final = 64
"""How many nodes one burst looks at.  While a whole copy is made a burst also waits, within its own
time limit, for the one before it."""

Survey = Callable[[Sequence[bytes]], Awaitable[list[Sight]]]


def next_window(queue: dict[bytes, None]) -> list[bytes]:
    """The latest first: a walk that goes down before it goes on has the shortest queue."""
    return [queue.popitem()[0] for _ in range(min(WINDOW, len(queue)))]


class Window:
    """Nodes that are looked at by a task of its own, while the one who wants to know is at work."""

    def __init__(self, paths: Sequence[bytes]) -> None:
        self.paths = paths
        self._seen = trio.Event()
        self._outcome: outcome.Outcome[list[Sight]] | None = None

    async def look(self, survey: Survey) -> None:
        try:
            self._outcome = outcome.Value(await survey(self.paths))
        except Exception as error:
            self._outcome = outcome.Error(error)
        self._seen.set()

    async def sights(self) -> list[Sight]:
        """What was seen.  Raises what the survey raised."""
        await self._seen.wait()
        assert self._outcome is not None
        return self._outcome.unwrap()
