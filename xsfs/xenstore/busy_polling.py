"""Busy polling: xsfs does not sleep for a descriptor that becomes readable within microseconds.

To put a process to sleep and to wake it takes longer than such a wait.  It takes longest in a virtual
machine, which returns an idle processor to the hypervisor.  Between two polls any other process that wants
the processor gets it.  If another process used it for more than YIELD_SECONDS_MAX, the machine is busy, and
polling would only delay that process.  Then the next SKIPS polls do not wait.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

BUSY_POLL_SECONDS: Final = 100e-6
"""How long xsfs polls for a reply, and for the next request of the kernel after it has answered one."""

YIELD_SECONDS_MAX: Final = 0.0003
SKIPS: Final = 256


class BusyPoll:
    """Polls one descriptor."""

    def __init__(self, descriptor: int) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        self._poll = poll.poll
        self._skips = 0
        """How many more polls do not wait."""

    def is_readable(self, seconds: float) -> bool:
        """Whether there is something to read, or the end, by now or within this time."""
        poll = self._poll
        if poll(0):
            return True
        if self._skips:
            self._skips -= 1
            return False
        now = time.perf_counter()
        end = now + seconds
        while now < end:
            os.sched_yield()
            if poll(0):
                return True
            before, now = now, time.perf_counter()
            if now - before > YIELD_SECONDS_MAX:
                self._skips = SKIPS
                return False
        return False
