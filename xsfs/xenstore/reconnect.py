"""A connection that comes back, and the circuit breaker for a store that does not answer.

A `ReconnectingConnection` owns at most one live `Connection`.  It opens one when a task first needs it,
and again after it has ended.  Any task may call `get`: one of them connects, the others wait for it.
Between requests nothing happens: the reader notices that the daemon has gone, and the next request
connects again.

A `CircuitBreaker` knows whether Xenstore answers, and owns one task that probes it.

- Closed: requests go out.  After one that waited for at least half the time limit in vain it opens.
- Open: requests fail with the error of that request, at the latest after GRACE_SECONDS.  Otherwise each
  system call would take the time limit, and some would take it many times: the kernel looks up a known name
  twice, and lets one process at a time look up a name.  The task sends probes on new connections, with
  back-off, and sooner if a task asks.
- Half-open: while a probe has just been sent, a request waits up to GRACE_SECONDS for its outcome.
  The first answer closes the breaker.  If no task asks for a whole time limit, the breaker closes, too,
  because an unused mount sends no probes.  The next request then takes its whole time limit.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from xsfs.xenstore.connection import Connection
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError, StoreUnavailable
from xsfs.xenstore.home import Home
from xsfs.xenstore.transport import Transport

log = logging.getLogger(__name__)

BACKOFF_FIRST: Final = 0.005
BACKOFF_MAX: Final = 1.0

PROBE_FIRST: Final = 0.05
PROBE_MAX: Final = 1.0
"""Seconds between two probes: while somebody asks, and at most."""

GRACE_SECONDS: Final = 0.25
GRACE_SECONDS_LATER: Final = 0.05
"""How long a request waits for the outcome of a probe: of one just sent, and of one that takes long."""

Connect = Callable[[], Transport]


async def open_transport_by(
    connect: Connect,
    deadline: float,
    *,
    wait_for_daemon: bool = True,
    wait_for_descriptor: bool = True,
) -> Transport:
    """Connect, with back-off until `deadline` (in trio's time).

    wait_for_daemon         whether to retry if the daemon is gone, and not only if it is busy
    wait_for_descriptor     whether to retry if this process has no free descriptor

    Raises StoreUnavailable if a retry is of no use, else ConnectionLost.
    """
    delay = BACKOFF_FIRST
    while True:
        try:
            return connect()
        except StoreUnavailable:
            raise
        except OSError as error:
            # EAGAIN: the daemon's backlog of 1 is full.  ECONNREFUSED, ENOENT: it restarts.
            failure = error
        is_local = failure.errno in (errno.EMFILE, errno.ENFILE)
        is_busy = isinstance(failure, BlockingIOError)
        may_retry = wait_for_descriptor if is_local else wait_for_daemon or is_busy
        if not may_retry or trio.current_time() + delay >= deadline:
            where = failure.filename or "its socket"
            lost = ConnectionLost(f"cannot connect to Xenstore at {where}: {failure.strerror}")
            lost.is_local = is_local
            raise lost from failure
        await trio.sleep(delay)
        delay = min(2 * delay, BACKOFF_MAX)


class ReconnectingConnection:
    """See the module's docstring.

    nursery     runs the tasks of each connection
    is_extra    there is another connection to the store, which can serve instead and which logs: `get` does
                not wait for a free descriptor
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        connect: Connect,
        timeout: float,
        home: Home,
        on_event: Callable[[bytes, bytes], None] | None = None,
        *,
        is_extra: bool = False,
    ) -> None:
        self._nursery = nursery
        self._connect = connect
        self._timeout = timeout
        self._home = home
        self._on_event = on_event
        self._is_extra = is_extra
        self._lock = trio.Lock()
        self.current: Connection | None = None
        """The last connection; it need not be alive."""
        self._delay = 0.0
        self._opened_at = -BACKOFF_MAX
        self.reconnects = 0
        """How many connections have replaced another one."""

    async def get(self, deadline: float) -> Connection:
        """The live connection.  Raises ConnectionLost, StoreUnavailable."""
        with trio.move_on_at(deadline):
            async with self._lock:
                if self.current is not None and self.current.alive:
                    return self.current
                return await self._open(deadline)
        raise ConnectionLost("Xenstore cannot be reached")

    async def _open(self, deadline: float) -> Connection:
        # A store that accepts each connection and closes it must not be flooded with connections.
        longest = min(BACKOFF_MAX, self._timeout / 4)
        was_short = trio.current_time() < self._opened_at + BACKOFF_MAX
        self._delay = min(2 * self._delay or BACKOFF_FIRST, longest) if was_short else 0.0
        await trio.sleep(self._delay)
        try:
            transport = await open_transport_by(
                self._connect, deadline, wait_for_descriptor=not self._is_extra
            )
        except StoreUnavailable as error:
            log.warning("Xenstore is gone: %s", error)
            raise
        connection = self.adopt(transport)
        if self.reconnects and not self._is_extra:
            log.warning("connected to Xenstore again")
        return connection

    def adopt(self, transport: Transport) -> Connection:
        """Make a transport that was just opened the current connection.  Only a connection that is not
        answered is replaced while it is alive."""
        if self.current is not None:
            self.current.close("Xenstore did not answer in time", RequestTimeout)
            self.reconnects += 1
        connection = Connection(transport, self._timeout, self._on_event, self._home)
        self._nursery.start_soon(connection.run)
        self.current = connection
        self._opened_at = trio.current_time()
        return connection

    def close(self, reason: str) -> None:
        if self.current is not None:
            self.current.close(reason)


class CircuitBreaker:
    """See the module's docstring.

    nursery     runs the probing task
    timeout     the time limit of a request, in seconds
    probe       sends a request on a new connection
    """

    def __init__(
        self, nursery: trio.Nursery, timeout: float, probe: Callable[[], Awaitable[object]]
    ) -> None:
        self._nursery = nursery
        self._timeout = timeout
        self._probe = probe
        self.error: RequestTimeout | ConnectionLost | None = None
        """The error that opened it, while it is open."""
        self.answers = 0
        """How many requests Xenstore has answered."""
        self._asked_at = 0.0
        self._probed_at = 0.0
        self._is_probing = False
        self._outcome = trio.lowlevel.ParkingLot()
        """Tasks that wait for the outcome of a probe."""
        self._pause = trio.CancelScope()

    async def check(self) -> None:
        """Raises RequestTimeout or ConnectionLost while it is open."""
        if self.error is None:
            return
        now = self._asked_at = trio.current_time()
        probed_at = self._probed_at
        if not self._is_probing:
            probed_at = max(now, probed_at + PROBE_FIRST)
            self._pause.deadline = min(self._pause.deadline, probed_at)
        with trio.move_on_at(max(probed_at + GRACE_SECONDS, now + GRACE_SECONDS_LATER)):
            await self._outcome.park()
        if self.error is not None:
            error = type(self.error)(*self.error.args)
            error.during_outage = True
            raise error

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Take note of the outcome of the block, which asks something."""
        answers, start = self.answers, trio.current_time()
        try:
            yield
        except (RequestTimeout, ConnectionLost) as error:
            self.failed(error, answers, start)
            raise
        self.answered()

    def answered(self) -> None:
        self.answers += 1
        if self.error is not None:
            self._close()
            log.warning("Xenstore answers again")

    def _close(self) -> None:
        self.error = None
        self._pause.cancel()
        self._outcome.unpark_all()

    def failed(self, error: RequestTimeout | ConnectionLost, answers: int, start: float) -> None:
        if self.answers != answers or self.error is not None:
            return
        if isinstance(error, ConnectionLost) and error.is_local:
            return
        # A short wait is no outage: a request late in a transaction has little time, and
        # `open_transport_by` gives up if its next attempt would come too late.
        if trio.current_time() - start < self._timeout / 2:
            return
        if answers:  # before the first answer the caller of `connect` reports the error
            log.warning("Xenstore has not answered for %g s: %s", self._timeout, error)
        self.error = error
        self._asked_at = trio.current_time()
        self._nursery.start_soon(self._probe_until_answered)

    async def _probe_until_answered(self) -> None:
        delay = PROBE_FIRST
        while self.error is not None:
            now = self._probed_at = trio.current_time()
            if now > self._asked_at + self._timeout:
                self._close()
                return
            self._is_probing = True
            try:
                await self._probe()
            except StoreError:
                self._outcome.unpark_all()
            else:
                self.answered()
                return
            finally:
                self._is_probing = False
            with trio.move_on_after(delay) as self._pause:
                await trio.sleep_forever()
            delay = min(2 * delay, PROBE_MAX)
