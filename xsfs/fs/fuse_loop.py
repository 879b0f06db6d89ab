"""pyfuse3's session loop, with fewer trips through the event loop.

pyfuse3 takes its event loop from the name `trio` in its own module; pyfuse3.asyncio replaces that name to
run on asyncio.  Here pyfuse3 gets trio with two objects replaced, which the workers of its session loop use
before each request:

- The lock under which one worker at a time waits for the kernel.  trio's lock lets another task run at each
  acquisition.  `ReceiveLock` lets no other task run if it is free.  So a worker whose request needed no
  waiting goes on with the next one.  The lock still wakes another worker, which runs as soon as this one
  waits.
- The wait for the kernel's descriptor.  `KernelDescriptor` polls for BUSY_POLL_SECONDS before it sleeps: a
  process that has just got its answer sends the next request within that time.  An idle mount sleeps.

Between two requests all other tasks get a turn, unless they have had one within TURN_SECONDS.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import pyfuse3
import trio

from xsfs.xenstore.busy_polling import BUSY_POLL_SECONDS, BusyPoll
from xsfs.xenstore.turns import Turns, turns

TURN_SECONDS: Final = 0.0007
"""Less than STREAK_SECONDS of the client, which gives its turns in the middle of a request.  In such a turn
another worker begins to wait for the kernel, and sleeps."""


class ReceiveLock:
    """See the module's docstring.  At most one waiting worker is woken at a time."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting = trio.lowlevel.ParkingLot()
        self._has_woken = False

    async def __aenter__(self) -> None:
        while self._is_taken:
            await self._waiting.park()
            self._has_woken = False
        self._is_taken = True

    async def __aexit__(self, *raised: object) -> None:
        self._is_taken = False
        if not self._has_woken and self._waiting:
            self._waiting.unpark()
            self._has_woken = True


class KernelDescriptor:
    """Waits for requests of the kernel."""

    def __init__(self) -> None:
        self.under_way = 0
        """How many requests wait for the store.  Their replies would have to wait for a busy poll."""
        self._turns: Turns
        self._busy_poll: BusyPoll | None = None

    @contextmanager
    def not_under_way(self) -> Iterator[None]:
        """A request that takes long, and whose replies may wait for a busy poll."""
        self.under_way -= 1
        try:
            yield
        finally:
            self.under_way += 1

    async def wait_readable(self, descriptor: int) -> None:
        if self._busy_poll is None:
            self._busy_poll, self._turns = BusyPoll(descriptor), turns()
        if time.perf_counter() - self._turns.last > TURN_SECONDS:
            await trio.lowlevel.checkpoint()
            self._turns.last = time.perf_counter()
        if not self._busy_poll.is_readable(0 if self.under_way else BUSY_POLL_SECONDS):
            await trio.lowlevel.wait_readable(descriptor)
            self._turns.last = time.perf_counter()


class _Proxy:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install(kernel: KernelDescriptor) -> None:
    """Give pyfuse3 its event loop.  Call it before pyfuse3.main."""
    lowlevel = _Proxy(trio.lowlevel, wait_readable=kernel.wait_readable)
    cast(Any, pyfuse3).trio = _Proxy(trio, lowlevel=lowlevel, Lock=ReceiveLock)
