"""Watches: one connection for all of them, and for nothing else.

`Watches` owns a reconnecting connection that carries only WATCH and UNWATCH, one at a time: on the kernel's
device any other request beside them can deadlock its Xenstore driver.  It owns one watch for each path,
however many subscribe to it.  Any task may subscribe; the connection's reader delivers events.

Invariants:

- An event never waits for a subscriber.  Equal events that are still unread are one.  Past EVENTS_MAX the
  backlog becomes one event for the watched path itself, which means "look at all of it again".
- The reader spends the same time on an event however many subscribe to its watch.  If several do, the task
  `_spread` puts it into one after the other, and merges events that come meanwhile.
- A watch that nobody wants any more is removed before another one is set: it counts against the quota.
- A WATCH or UNWATCH without a reply ends the connection: only its end is sure to end the watch.
- After the connection was lost, `run` sets every watch again.  The store's first event then tells each
  subscriber that it may have missed something.  If the store refuses a watch then (others may have used
  up the quota meanwhile), `run` retries it as long as somebody wants it.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Connection
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError, XenstoreError
from xsfs.xenstore.event_reader import with_event_reader
from xsfs.xenstore.home import Home, moved
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.reconnect import CircuitBreaker, Connect, ReconnectingConnection

log = logging.getLogger(__name__)

EVENTS_MAX: Final = 4096

RETRY_SECONDS: Final = 1.0
REMOVE_SECONDS: Final = 1.0
"""Until watches are retried that could not be set again, and until an UNWATCH must be answered."""


def _add(events: dict[bytes, None], path: bytes, watched: bytes) -> None:
    """Add an event to a backlog, or replace a backlog that is full by an event for the watched path."""
    if len(events) >= EVENTS_MAX and path not in events:
        events.clear()
        path = watched
    events[path] = None


class Subscription:
    """The events of one path for one subscriber.  Iterate over it, or use `take` and `wait`."""

    def __init__(
        self,
        path: bytes,
        on_event: Callable[[], object] | None = None,
        depth: int | None = None,
    ) -> None:
        """The connection's reader calls `on_event` at each event, and when the watch was lost, set again, or
        ended.  It must not wait, nor take longer than a few microseconds.  If it is None, tasks that `wait`
        are woken instead.

        depth       how many levels below the path changes count.  Only xapi's oxenstored gets it; all other
                    daemons send the events without a limit.  All subscribers of one path give the same.
        """
        self.path = path
        self.depth = depth
        self.interruptions = 0
        """How often the watch was lost with its connection, and events may have been missed."""
        self._events: dict[bytes, None] = {}
        self._arrived = trio.lowlevel.ParkingLot()
        self.alert = on_event or self._arrived.unpark_all
        self.ended = False
        """Whether the block of the watch has ended."""

    def put(self, path: bytes) -> None:
        _add(self._events, path, self.path)
        self.alert()

    def take(self) -> list[bytes]:
        """The paths that changed since the last call, in order; perhaps none."""
        events = list(self._events)
        self._events.clear()
        return events

    def __bool__(self) -> bool:
        """Whether there is an event to take."""
        return bool(self._events)

    async def wait(self) -> None:
        """Return when there is an event to take, or the watch has ended."""
        while not self._events and not self.ended:
            await self._arrived.park()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> bytes:
        await self.wait()
        if not self._events:
            raise StopAsyncIteration
        path = next(iter(self._events))
        del self._events[path]
        return path


class _Watch:
    """One watch that somebody wants."""

    def __init__(self, subscription: Subscription, token: bytes) -> None:
        self.path = subscription.path
        self.depth = subscription.depth
        self.token = token
        self.subscriptions = {subscription: None}
        self.connection: Connection | None = None
        """The connection on which the store has it.  None while the store does not have it."""
        self.refused = False
        """Whether the store refused it after the connection was lost."""
        self.unspread: dict[bytes, None] | None = None
        """While `_spread` runs: the events that not all subscriptions have yet."""

    @property
    def is_set(self) -> bool:
        return self.connection is not None and self.connection.alive


class Watches:
    """See the module's docstring.  `run` must be running."""

    def __init__(
        self,
        nursery: trio.Nursery,
        connect: Connect,
        timeout: float,
        breaker: CircuitBreaker,
        home: Home,
    ) -> None:
        self._nursery = nursery
        self._home = home
        self._breaker = breaker
        self._timeout = timeout
        self._reconnecting = ReconnectingConnection(
            nursery, lambda: with_event_reader(connect()), timeout, home, self._dispatch
        )
        self._lock = trio.Lock()
        """Held while a WATCH or UNWATCH is outstanding."""
        self._by_path: dict[bytes, _Watch] = {}
        self._by_token: dict[bytes, _Watch] = {}
        self._unwanted: deque[_Watch] = deque()
        """Watches to be removed, in the order in which they were left."""
        self._tokens = itertools.count()
        self._first_watch = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """The number of watches at the store."""
        return len(self._by_path) + len(self._unwanted)

    @property
    def reconnects(self) -> int:
        return self._reconnecting.reconnects

    # --------------------------------------------------------------------------------- events

    def _dispatch(self, path: bytes, token: bytes) -> None:
        watch = self._by_token.get(token)
        if watch is None:
            # Of a watch that was just removed, or sent by a store that lies: harmless.
            return
        if watch.path.startswith(b"/") and not path.startswith((b"/", b"@")):
            path = self._home.above + path
        if watch.unspread is None:
            if len(watch.subscriptions) == 1:
                next(iter(watch.subscriptions)).put(path)
                return
            watch.unspread = {}
            self._nursery.start_soon(self._spread, watch)
        _add(watch.unspread, path, watch.path)

    async def _spread(self, watch: _Watch) -> None:
        """Put the events into all subscriptions, with a turn for other tasks after each: above all for
        the reader of the connection."""
        while watch.unspread:
            events, watch.unspread = watch.unspread, {}
            for subscription in list(watch.subscriptions):
                if subscription in watch.subscriptions:
                    for path in events:
                        subscription.put(path)
                    await trio.lowlevel.checkpoint()
        watch.unspread = None

    # --------------------------------------------------------------------------- subscriptions

    async def subscribe(self, subscription: Subscription) -> None:
        """Watch the subscription's path for it.  Raises StoreError; then nothing is watched.

        The first event comes at once, as Xenstore's do.
        """
        path = subscription.path
        deadline = trio.current_time() + self._timeout
        if path not in self._by_path:
            await self._breaker.check()
        async with self._lock:
            if path in self._by_path:
                self._by_path[path].subscriptions[subscription] = None
                subscription.put(path)
                return
            # Tasks that waited for the lock together fail together.
            if trio.current_time() >= deadline:
                raise RequestTimeout("Xenstore did not answer requests of other watches in time")
            watch = _Watch(subscription, b"%x" % next(self._tokens))
            self._by_token[watch.token] = watch
            try:
                await self._set(watch)
            except BaseException:
                del self._by_token[watch.token]
                raise
            self._by_path[path] = watch
            self._first_watch.unpark_all()

    def is_armed(self, subscription: Subscription) -> bool:
        """Whether its watch is set at the store now."""
        watch = self._by_path.get(subscription.path)
        return watch is not None and watch.is_set

    def drop(self, subscription: Subscription) -> None:
        """Deliver no more events to it.  After the last subscriber of a path, the watch is removed in the
        background."""
        watch = self._by_path.get(subscription.path)
        if watch is None or subscription not in watch.subscriptions:
            return
        del watch.subscriptions[subscription]
        if not watch.subscriptions:
            del self._by_path[watch.path]
            del self._by_token[watch.token]
            self._unwanted.append(watch)
            self._nursery.start_soon(self._clear)

    async def _clear(self) -> None:
        async with self._lock:
            await self._remove_unwanted()

    # ------------------------------------------------------------------ requests, under the lock

    async def _set(self, watch: _Watch) -> None:
        """Set the watch at the store.  Raises StoreError; then the store does not have it."""
        await self._remove_unwanted()
        deadline = trio.current_time() + self._timeout
        while True:
            connection = await self._reconnecting.get(deadline)
            try:
                await self._set_by(connection, watch)
                return
            except ConnectionLost as error:
                if not error.unsent:  # else the connection has just died
                    raise

    async def _set_by(self, connection: Connection, watch: _Watch) -> None:
        if watch.depth is not None:
            # C xenstored 4.22.0 dies at a live update of a watch with a depth.  It knows GET_FEATURE.
            (features,) = await connection.pipeline((protocol.get_feature(),))
            if isinstance(features, XenstoreError) and features.name == "ENOSYS":
                with suppress(XenstoreError):  # EINVAL: the daemon knows no depth
                    limited = protocol.watch(watch.path, watch.token, watch.depth)
                    await self._send(connection, limited, self._timeout)
                    watch.connection = connection
                    return
        await self._send(connection, protocol.watch(watch.path, watch.token), self._timeout)
        watch.connection = connection

    async def _remove_unwanted(self) -> None:
        while self._unwanted:
            watch = self._unwanted[0]
            connection = watch.connection
            if connection is not None and connection.alive:
                try:
                    request = protocol.unwatch(watch.path, watch.token)
                    await self._send(connection, request, REMOVE_SECONDS)
                except StoreError as error:
                    log.info("a watch could not be removed: %s", error)
                    connection.close("a watch could not be removed")
            self._unwanted.popleft()

    async def _send(self, connection: Connection, request: Request, seconds: float) -> None:
        """Send WATCH or UNWATCH.  Raises StoreError."""
        try:
            (reply,) = await connection.pipeline((request,), 0, trio.current_time() + seconds)
        except BaseException:
            connection.close("a request of a watch was not answered")
            raise
        if isinstance(reply, XenstoreError):
            raise reply

    # ------------------------------------------------------------------------------ reconnects

    async def run(self) -> None:
        """Set the watches again whenever their connection has been lost."""
        while True:
            connection = self._reconnecting.current
            if connection is None or not self._by_path:
                await self._first_watch.park()
            elif all(watch.is_set for watch in self._by_path.values()):
                await connection.ended.wait()
            else:
                self._interrupt()
                if not await self._set_again():
                    await trio.sleep(RETRY_SECONDS)

    def move(self, source: bytes, target: bytes) -> None:
        """Watch below `target` what was watched below `source`.  Each subscriber learns that it may have
        missed something."""
        self._reconnecting.close("the watches move")
        self._interrupt()
        watches = self._by_path.values()
        self._by_path = {}
        for watch in watches:
            watch.path = moved(watch.path, source, target)
            for subscription in watch.subscriptions:
                subscription.path = watch.path
            kept = self._by_path.setdefault(watch.path, watch)
            if kept is not watch:
                kept.subscriptions.update(watch.subscriptions)
                del self._by_token[watch.token]

    def _interrupt(self) -> None:
        """Tell the subscribers of watches whose connection was lost."""
        for watch in self._by_path.values():
            if watch.connection is not None and not watch.connection.alive:
                watch.connection = None
                for subscription in watch.subscriptions:
                    subscription.interruptions += 1
                    subscription.alert()

    async def _set_again(self) -> bool:
        """Set the watches that the store does not have.  Returns False if some have to be retried later."""
        for watch in list(self._by_path.values()):
            async with self._lock:
                if watch.is_set or self._by_path.get(watch.path) is not watch:
                    continue  # it was removed meanwhile
                try:
                    await self._set(watch)
                except XenstoreError as error:
                    if not watch.refused:
                        log.error(
                            "Xenstore refuses the watch of %r, xsfs retries: %s", watch.path, error
                        )
                        for subscription in watch.subscriptions:
                            subscription.put(watch.path)
                    watch.refused = True
                    continue
                except StoreError:
                    return False
            if watch.refused:
                log.warning("the watch of %r is set again", watch.path)
            watch.refused = False
            # The kernel's device may deliver the first event before the reply to WATCH.
            for subscription in watch.subscriptions:
                subscription.alert()
        return not any(watch.refused for watch in self._by_path.values())

    @asynccontextmanager
    async def watching(
        self, path: bytes, on_event: Callable[[], object] | None = None
    ) -> AsyncIterator[Subscription]:
        subscription = Subscription(path, on_event)
        await self.subscribe(subscription)
        try:
            yield subscription
        finally:
            subscription.ended = True
            subscription.alert()  # tasks that wait for an event return
            self.drop(subscription)
