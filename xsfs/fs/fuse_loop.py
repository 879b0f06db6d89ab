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
from collections.abc import Awaitable
from functools import partial
from types import TracebackType
from typing import Any, Final, cast

import pyfuse3
import trio

from xsfs.xenstore.busy_polling import BUSY_POLL_SECONDS, BusyPoll

TURN_SECONDS: Final = 0.002


class _Done:
    """An awaitable that does not wait.

    A coroutine that ends at once costs several times as much, and three of these are awaited before each
    request.
    """

    __slots__ = ()
    __await__ = staticmethod(().__iter__)


DONE: Final = cast(Awaitable[None], _Done())


class ReceiveLock:
    """See the module's docstring.  At most one waiting worker is woken at a time."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting = trio.lowlevel.ParkingLot()
        self._has_woken = False
        self._sleepers = 0
        """How many workers are in _waiting, or were before they were cancelled."""

    def __aenter__(self) -> Awaitable[None]:
        if self._is_taken:
            return self._acquire()
        self._is_taken = True
        return DONE

    async def _acquire(self) -> None:
        while self._is_taken:
            self._sleepers += 1
            try:
                await self._waiting.park()
            finally:
                self._sleepers -= 1
            self._has_woken = False
        self._is_taken = True

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Awaitable[None]:
        self._is_taken = False
        if self._sleepers and not self._has_woken:
            # `unpark` wakes no worker if the only sleeper was cancelled and has not run since.
            self._has_woken = bool(self._waiting.unpark())
        return DONE


class KernelDescriptor:
    """Waits for requests of the kernel."""

    def __init__(self) -> None:
        self.under_way = 0
        """How many requests wait for the store.  Their replies would have to wait for a busy poll."""
        self._busy_poll: BusyPoll | None = None
        self._turn_ends = 0.0

    def wait_readable(self, descriptor: int) -> Awaitable[None]:
        poll = self._busy_poll
        if poll is None or poll.descriptor != descriptor:
            self._busy_poll = poll = BusyPoll(descriptor)
        seconds = 0 if self.under_way else BUSY_POLL_SECONDS
        if time.perf_counter() < self._turn_ends and poll.is_readable(seconds):
            return DONE
        return self._wait(poll)

    async def _wait(self, poll: BusyPoll) -> None:
        if time.perf_counter() >= self._turn_ends:
            await trio.lowlevel.checkpoint()
            self._turn_ends = time.perf_counter() + TURN_SECONDS
            if poll.is_readable(0 if self.under_way else BUSY_POLL_SECONDS):
                return
        await trio.lowlevel.wait_readable(poll.descriptor)
        self._turn_ends = time.perf_counter() + TURN_SECONDS


class _Proxy:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install() -> KernelDescriptor:
    """Give pyfuse3 its event loop.  Call it before pyfuse3.main."""
    kernel = KernelDescriptor()
    lowlevel = _Proxy(trio.lowlevel, wait_readable=kernel.wait_readable)
    cast(Any, pyfuse3).trio = _Proxy(trio, lowlevel=lowlevel, Lock=partial(ReceiveLock))
    return kernel
