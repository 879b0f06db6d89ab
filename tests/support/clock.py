"""A clock of trio that a test can put forward.

A time limit is long, so that a busy machine does not reach it, and passes at once when the test says so.
"""

from __future__ import annotations

import time

from trio.abc import Clock


class LeapingClock(Clock):
    """The system's clock, and what `leap` has added to it.  `trio_test` uses it if it is an argument."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return time.perf_counter() + self._ahead

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.current_time()

    def leap(self, seconds: float) -> None:
        self._ahead += seconds
