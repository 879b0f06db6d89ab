"""How much a live mirror works, and how long it rests.

Under load it rests as long as it works, so that it never takes more than half a processor, and events
merge meanwhile; what is left when no more come is done without a rest, as far as it has rested before.

`Pace` is touched by the mirror's task, and by what works in its place while it waits.
"""

from __future__ import annotations

import time
from typing import Final

import trio

PAUSE_SECONDS: Final = 0.002
"""How much work is done before the mirror pauses: sleeping takes a millisecond at least."""

SPARE_SECONDS: Final = 0.25
"""How much work may be done without a pause once no more events come: what is left of a storm.  It is
earned by resting."""

REST_SECONDS: Final = 0.01
"""How long it rests before it looks whether more events have come."""


class Pace:
    """See the module's text."""

    def __init__(self) -> None:
        self.told = False
        """Whether an event has come since this was last set to False."""
        self.owed = 0.0
        """How many seconds it has worked and not rested."""
        self.spare = SPARE_SECONDS
        self._works_since = 0.0
        self._waits_since = 0.0

    def begin_work(self) -> None:
        # Not the time that the store takes, or other processes: it is none that we took.
        self._works_since = time.thread_time()

    def end_work(self) -> None:
        self.owed += time.thread_time() - self._works_since

    def begin_wait(self) -> None:
        """There is nothing to do."""
        self._waits_since = time.perf_counter()

    def has_waited(self) -> float:
        """Until now, for so many seconds; perhaps it goes on."""
        now = time.perf_counter()
        rested, self._waits_since = now - self._waits_since, now
        self.owed = max(0.0, self.owed - rested)
        self.spare = min(SPARE_SECONDS, self.spare + rested)
        return rested

    @property
    def is_tired(self) -> bool:
        return self.owed > PAUSE_SECONDS

    async def rest(self) -> None:
        """Rest as long as was worked; or no longer, once no more events come, if there is that much
        work to spare."""
        # Who tells has had no turn since the work began.  One turn may come before theirs.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        while self.owed > 0:
            if not self.told and self.spare >= self.owed:
                self.spare -= self.owed
                break
            rest = min(self.owed, REST_SECONDS)
            self.told = False
            await trio.sleep(rest)
            self.owed -= rest
            self.spare = min(SPARE_SECONDS, self.spare + rest)
        self.owed = 0.0
