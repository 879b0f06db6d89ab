"""pyfuse3's session loop, with fewer trips through the event loop.

pyfuse3 takes its event loop from the name `trio` in its own module, which is how it can run on
asyncio, too (pyfuse3.asyncio replaces that name).  Here it gets trio with two things exchanged, which
the workers of its session loop use before each request:

- The lock under which one worker at a time waits for the kernel.  trio's lets another task run at each
  acquisition; this one does not where it is free, so a worker whose request needed no waiting goes on
  with the next.  Another is woken all the same, and comes to run as soon as it waits.
- The wait for the kernel's descriptor.  Before it sleeps it lingers for LINGER_SECONDS: a process that
  has just got its answer asks the next thing within that time.  An idle mount sleeps.

What need not be done before an answer is put off until after it, as a chore: whoever got the answer has
to come back first, so it costs nobody's time.

What always holds:

- Between two requests all other tasks get their turn, where they have not had one for TURN_SECONDS.
- A chore is done before the next request is read; and before any other task goes on, unless the worker
  that put it off has ended.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Any, Final, cast

import pyfuse3
import trio

from xsfs.xenstore.busy_polling import LINGER_SECONDS, Linger

TURN_SECONDS: Final = 0.002

_IGNORED: Final = suppress(Exception)  # one will do for all: it keeps nothing


class _AtOnce:
    """What is awaited without waiting.

    A coroutine that ends at once would do, but costs several times as much, and three such things are
    awaited before each request.
    """

    __slots__ = ()
    __await__ = staticmethod(().__iter__)


AT_ONCE: Final = cast(Awaitable[None], _AtOnce())


class Turn:
    """A lock of the kind described above.

    Of those who wait one at most is on its way: the others need not be woken to find the lock taken.
    """

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()
        self._woken = False
        self._sleepers = 0
        """How many there are in _waiting, or were before they gave up."""

    def __aenter__(self) -> Awaitable[None]:
        # A worker comes here right after its answer.
        if self._waiter.chore is not None:
            self._waiter.do_chore()
        if self._taken:
            return self._acquire()
        self._taken = True
        return AT_ONCE

    async def _acquire(self) -> None:
        while self._taken:
            self._sleepers += 1
            try:
                await self._waiting.park()
            finally:
                self._sleepers -= 1
            self._woken = False
        self._taken = True

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Awaitable[None]:
        self._taken = False
        if self._sleepers and not self._woken:
            # None, where the one who slept has given up and has not run since.
            self._woken = bool(self._waiting.unpark())
        return AT_ONCE


class Waiter:
    """Waits for one descriptor, the kernel's."""

    def __init__(self) -> None:
        self.under_way = 0
        """How many requests are being answered."""
        self.chore: Callable[[], None] | None = None
        """What was put off, if anything."""
        self._linger: Linger | None = None
        self._turn_ends = 0.0

    def put_off(self, chore: Callable[[], None]) -> None:
        """Have something done after the present answer.  What it raises is lost."""
        if self.chore is not None:
            self.do_chore()
        self.chore = chore

    def do_chore(self) -> None:
        """Do what was put off."""
        if (chore := self.chore) is not None:
            self.chore = None
            with _IGNORED:
                chore()

    def wait_readable(self, descriptor: int) -> Awaitable[None]:
        linger = self._linger
        if linger is None or linger.descriptor != descriptor:
            self._linger = linger = Linger(descriptor)
        if time.perf_counter() < self._turn_ends and self._comes(linger):
            return AT_ONCE
        return self._wait(linger)

    def _comes(self, linger: Linger) -> bool:
        # Not while a request is under way, whose reply from Xenstore would have to wait.
        return linger.comes(0 if self.under_way else LINGER_SECONDS)

    async def _wait(self, linger: Linger) -> None:
        if time.perf_counter() >= self._turn_ends:
            await trio.lowlevel.checkpoint()
            self._turn_ends = time.perf_counter() + TURN_SECONDS
            if self._comes(linger):
                return
        await trio.lowlevel.wait_readable(linger.descriptor)
        self.do_chore()
        self._turn_ends = time.perf_counter() + TURN_SECONDS


def install() -> Waiter:
    """Give pyfuse3 its event loop.  Before pyfuse3.main."""
    waiter = Waiter()
    lowlevel = SimpleNamespace(
        wait_readable=waiter.wait_readable,
        notify_closing=trio.lowlevel.notify_closing,
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
    )
    cast(Any, pyfuse3).trio = SimpleNamespace(
        Lock=partial(Turn, waiter),
        open_nursery=trio.open_nursery,
        ClosedResourceError=trio.ClosedResourceError,
        from_thread=trio.from_thread,
        lowlevel=lowlevel,
    )
    return waiter
