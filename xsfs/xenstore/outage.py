"""An outage: Xenstore has kept silent for a whole time limit, or has been gone for one.

Whoever asks then is refused almost at once, with the error that the last one met who waited, until
Xenstore answers again.  Otherwise each system call would cost the time limit, and some cost it many
times: the kernel looks a known name up twice, one name is looked up by one process at a time, and who
makes something in a directory keeps all others out until he is answered.

What `Outage` owns: whether there is one, and one task that asks again and again meanwhile, with
back-off, and sooner when somebody else asks.  It ends with the first answer; and when nobody has asked
for a whole time limit, since a mount that nobody uses does nothing: the next who asks then waits.

Who asks waits for GRACE_SECONDS at most, in which a store that has come back can say so; in a crowd, or
in a queue of the kernel's, each for half as long as the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError

log = logging.getLogger(__name__)

PROBE_FIRST: Final = 0.05
PROBE_MAX: Final = 1.0
"""Seconds between two attempts to be answered: while somebody asks, and at most."""

GRACE_SECONDS: Final = 0.25


class Outage:
    """See the module's text.

    nursery     where the asking task runs
    timeout     the time limit of a request, in seconds
    probe       asks something
    """

    def __init__(
        self, nursery: trio.Nursery, timeout: float, probe: Callable[[], Awaitable[object]]
    ) -> None:
        self._nursery = nursery
        self._timeout = timeout
        self._probe = probe
        self.error: RequestTimeout | ConnectionLost | None = None
        """What begot the outage, while there is one."""
        self.answers = 0
        """How often Xenstore has answered."""
        self._asked_at = 0.0
        self._grace = GRACE_SECONDS
        self._over = trio.lowlevel.ParkingLot()
        self._attempt = trio.CancelScope()
        self._attempt_since = 0.0

    async def check(self) -> None:
        """Raises RequestTimeout or ConnectionLost during an outage."""
        if self.error is None:
            return
        now = trio.current_time()
        if now > self._asked_at + GRACE_SECONDS:
            self._grace = GRACE_SECONDS
        soon = max(now, self._attempt_since + PROBE_FIRST)
        self._attempt.deadline = min(self._attempt.deadline, soon)
        # However short: who tries again and again must not keep the answer from coming.
        with trio.move_on_after(self._grace):
            await self._over.park()
        self._asked_at = trio.current_time()
        if self.error is not None:
            self._grace /= 2
            error = type(self.error)(*self.error.args)
            error.asked = False
            raise error

    def answered(self) -> None:
        self.answers += 1
        if self.error is not None:
            self._end()
            log.warning("Xenstore answers again")

    def _end(self) -> None:
        self.error = None
        self._attempt.cancel()
        self._over.unpark_all()

    @contextmanager
    def noticed(self, deadline: float) -> Iterator[float]:
        """Something that is to be answered by then."""
        answers = self.answers
        try:
            yield deadline
            self.answered()
        except (RequestTimeout, ConnectionLost) as error:
            self.failed(error, answers, deadline)
            raise

    def failed(self, error: RequestTimeout | ConnectionLost, answers: int, deadline: float) -> None:
        """Somebody who asked when there had been so many answers could have waited until then."""
        if self.answers != answers or self.error is not None:
            return
        # Who tries to connect gives up where the next attempt would come too late.
        if deadline - trio.current_time() > self._timeout / 2:
            return
        if answers:  # else whoever began with it says so
            log.warning("Xenstore has not answered for %g s: %s", self._timeout, error)
        self.error = error
        self._asked_at = trio.current_time()
        self._grace = GRACE_SECONDS
        self._nursery.start_soon(self._ask_again)

    async def _ask_again(self) -> None:
        delay = PROBE_FIRST
        while self.error is not None:
            now = self._attempt_since = trio.current_time()
            if now > self._asked_at + self._timeout:
                self._end()
                return
            # What is unanswered then is answered in its turn, or never.
            with trio.move_on_after(delay) as self._attempt:
                try:
                    await self._probe()
                    self.answered()
                except StoreError:
                    await trio.sleep_forever()
            delay = min(2 * delay, PROBE_MAX)
