"""Waiting awake: what comes within microseconds is not slept for.

To be put to sleep and woken costs both sides more than such a wait takes; in a virtual machine most of
all, whose idle processor has to be given back and asked for.  Whoever else wants the processor gets it
between two looks: perhaps the one who is waited for.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

LINGER_SECONDS: Final = 100e-6
"""For a reply, and for the next request of whoever was answered."""


class Linger:
    """Looks at one descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        self._poll = poll.poll

    def comes(self, seconds: float) -> bool:
        """Whether there is something to be read, or the end, by now or within this time."""
        poll = self._poll
        if poll(0):
            return True
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            os.sched_yield()
            if poll(0):
                return True
        return False
