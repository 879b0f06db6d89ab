"""Watches: one connection for all of them, and for nothing else.

`Watches` owns a reconnecting connection that carries only WATCH and UNWATCH, one at a time: on the kernel's
device any other request beside them can deadlock its Xenstore driver.  It owns one watch at the store for
each path and depth, however many subscribe to it.  Any task may subscribe and unsubscribe; the
connection's reader delivers events.

Invariants:

- An event is put into each subscription of its watch, and never waits for a subscriber.  Equal events that
  are still unread are one.  Past EVENTS_MAX the backlog becomes one event for the watched path itself,
  which by Xenstore's own rule means "look at all of it again".
- The reader spends the same time on an event however many subscribe to its watch.  If several do, the task
  `_spread` puts it into one after the other, and merges events that come meanwhile.  If the reader fell some
  2000 events behind, oxenstored would stop all writers until they are killed.
- A watch that nobody wants any more is removed before another one is set, so that it no longer counts
  against the quota.
- After the connection was lost, `run` sets every watch again.  The store's first event then tells each
  subscriber that it may have missed something.  If the store refuses a watch then (others may have used
  up the quota meanwhile), `run` retries it with back-off as long as somebody wants it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Connection, Reply
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError, XenstoreError
from xsfs.xenstore.event_reader import with_event_reader
from xsfs.xenstore.home import Home, moved
from xsfs.xenstore.reconnect import BACKOFF_MAX, CircuitBreaker, Connect, ReconnectingConnection

log = logging.getLogger(__name__)

EVENTS_MAX: Final = 4096

REFUSED_FIRST: Final = 1.0
REFUSED_MAX: Final = 30.0
"""Seconds until a watch is retried that the store refused when it was to be set again."""

REMOVE_SECONDS: Final = 1.0
"""How long an UNWATCH may take before the connection is closed instead."""


def _add(events: dict[bytes, None], path: bytes, watched: bytes) -> None:
    """Add an event to a backlog, or replace a backlog that is full by an event for the watched path."""
    if len(events) >= EVENTS_MAX and path not in events:
        events.clear()
        path = watched
    events[path] = None


class Subscription:
    """The events of one path for one subscriber.  Iterate over it, or use `take` and `wait`."""

    def __init__(
        self, path: bytes, on_event: Callable[[], object] | None = None, depth: int | None = None
    ) -> None:
        """The connection's reader calls `on_event` at each event, and when the watch was lost, set again, or
        ended.  It must not wait, nor take longer than a few microseconds.

        depth       how many levels below the path changes count.  Only xapi's oxenstored gets it; all other
                    daemons send the events without a limit.
        """
        self.path = path
        self.depth = depth
        self.interruptions = 0
        """How often the watch was lost with its connection, and events may have been missed."""
        self._events: dict[bytes, None] = {}
        self._on_event = on_event
        self.ended = False
        """Whether the block of the watch has ended."""
        self._arrived = trio.lowlevel.ParkingLot()

    def put(self, path: bytes) -> None:
        _add(self._events, path, self.path)
        self._arrived.unpark_all()
        self.alert()

    def alert(self) -> None:
        if self._on_event is not None:
            self._on_event()

    def interrupt(self) -> None:
        self.interruptions += 1
        self.alert()

    def take(self) -> list[bytes]:
        """The paths that changed since the last call, in order; perhaps none."""
        events = list(self._events)
        self._events.clear()
        return events

    def __bool__(self) -> bool:
        """Whether there is an event to take."""
        return bool(self._events)

    def end(self) -> None:
        """Let tasks that wait for an event return."""
        self.ended = True
        self._arrived.unpark_all()
        self.alert()

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
    """One watch at the store."""

    def __init__(self, path: bytes, depth: int | None, token: bytes) -> None:
        self.path = path
        self.depth = depth
        self.token = token
        self.subscriptions: dict[Subscription, None] = {}
        self.connection: Connection | None = None
        self.armed = False
        """Whether the store has it, as far as xsfs knows."""
        self.refused = False
        """Whether the store refused it after the connection was lost."""
        self.unspread: dict[bytes, None] = {}
        """Events that not all subscriptions have yet."""
        self.spreading = False


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
        self._by_path: dict[tuple[bytes, int | None], _Watch] = {}
        self._by_token: dict[bytes, _Watch] = {}
        self._unwanted: deque[_Watch] = deque()
        """Watches to be removed, in the order in which they were left."""
        self._last_token = 0
        self._answered_at = 0.0
        """When the store last answered a WATCH or UNWATCH."""
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
        if watch.path.startswith(b"/"):
            path = self._home.absolute(path)
        if len(watch.subscriptions) == 1 and not watch.spreading:
            next(iter(watch.subscriptions)).put(path)
            return
        _add(watch.unspread, path, watch.path)
        if not watch.spreading:
            watch.spreading = True
            self._nursery.start_soon(self._spread, watch)

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
        watch.spreading = False

    # --------------------------------------------------------------------------- subscriptions

    async def subscribe(self, subscription: Subscription) -> None:
        """Watch the subscription's path for it.  Raises StoreError; then nothing is watched.

        The first event comes at once, as Xenstore's do.
        """
        start = trio.current_time()
        key = subscription.path, subscription.depth
        if key not in self._by_path:
            await self._breaker.check()
        async with self._lock:
            if key not in self._by_path:
                # Tasks that waited for the lock together fail together, if no watch was answered meanwhile.
                await self._set_first(subscription, max(start, self._answered_at) + self._timeout)
                return
            self._by_path[key].subscriptions[subscription] = None
            subscription.put(subscription.path)

    async def _set_first(self, subscription: Subscription, deadline: float) -> None:
        if trio.current_time() >= deadline:
            raise RequestTimeout("Xenstore did not answer the requests of other watches in time")
        self._last_token += 1
        watch = _Watch(subscription.path, subscription.depth, b"%x" % self._last_token)
        watch.subscriptions[subscription] = None
        self._by_token[watch.token] = watch
        try:
            await self._arm(watch, deadline)
        except BaseException as error:
            del self._by_token[watch.token]
            if not isinstance(error, XenstoreError):
                # Cancelled, or without a reply: the store may have it, or set it later.
                self._unwanted.append(watch)
                self._nursery.start_soon(self._clear)
            raise
        self._by_path[watch.path, watch.depth] = watch
        self._first_watch.unpark_all()

    def is_armed(self, subscription: Subscription) -> bool:
        """Whether its watch is set at the store now."""
        watch = self._by_path.get((subscription.path, subscription.depth))
        return watch is not None and watch.armed

    async def unsubscribe(self, subscription: Subscription) -> None:
        """Deliver no more events to it.  The last subscriber of a path removes the watch.

        Never raises a StoreError.  Takes REMOVE_SECONDS at most, even if the caller is cancelled.
        """
        if self._leave(subscription):
            with trio.move_on_after(REMOVE_SECONDS) as scope:
                scope.shield = True
                await self._clear()
            if scope.cancelled_caught:
                self._nursery.start_soon(self._clear)

    def drop(self, subscription: Subscription) -> None:
        """`unsubscribe`, in the background."""
        if self._leave(subscription):
            self._nursery.start_soon(self._clear)

    def _leave(self, subscription: Subscription) -> bool:
        """Leave the watch.  Returns whether nobody wants it any more."""
        watch = self._by_path.get((subscription.path, subscription.depth))
        if watch is None or subscription not in watch.subscriptions:
            return False
        del watch.subscriptions[subscription]
        if watch.subscriptions:
            return False
        del self._by_path[watch.path, watch.depth]
        del self._by_token[watch.token]
        self._unwanted.append(watch)
        return True

    async def _clear(self) -> None:
        async with self._lock:
            await self._remove_unwanted()

    async def _remove_unwanted(self) -> None:
        while self._unwanted:
            await self._disarm(self._unwanted[0])
            self._unwanted.popleft()

    async def _disarm(self, watch: _Watch) -> None:
        connection = watch.connection
        if connection is None or not connection.alive:
            return
        is_removed = False
        try:
            deadline = trio.current_time() + REMOVE_SECONDS
            request = protocol.unwatch(watch.path, watch.token)
            (reply,) = await connection.pipeline((request,), 0, deadline)
            self._answered_at = trio.current_time()
            is_removed = isinstance(reply, bytes) or reply.name == "ENOENT"
        except StoreError as error:
            log.info("a watch could not be removed: %s", error)
        finally:
            if not is_removed:
                # The daemon may still have it: only the connection's end is sure to end it.
                connection.close("a watch could not be removed")

    async def _arm(self, watch: _Watch, deadline: float) -> None:
        await self._remove_unwanted()
        connection = await self._reconnecting.get(deadline)
        watch.connection = connection
        try:
            reply = await self._set(watch, connection, deadline)
        except ConnectionLost as error:
            if not error.unsent:
                raise
            return await self._arm(watch, deadline)  # the connection had just died
        if isinstance(reply, XenstoreError):
            raise reply
        watch.armed = True

    async def _set(self, watch: _Watch, connection: Connection, deadline: float) -> Reply:
        """Send WATCH, with the depth if the daemon takes one."""
        if watch.depth is not None:
            # C xenstored 4.22.0 dies at a live update of a watch with a depth.  It knows GET_FEATURE.
            (features,) = await connection.pipeline((protocol.get_feature(),), 0, deadline)
            if isinstance(features, XenstoreError) and features.name == "ENOSYS":
                request = protocol.watch(watch.path, watch.token, watch.depth)
                (reply,) = await connection.pipeline((request,), 0, deadline)
                self._answered_at = trio.current_time()
                if isinstance(reply, bytes) or reply.name != "EINVAL":
                    return reply
        request = protocol.watch(watch.path, watch.token)
        (reply,) = await connection.pipeline((request,), 0, deadline)
        self._answered_at = trio.current_time()
        return reply

    # ------------------------------------------------------------------------------ reconnects

    async def run(self) -> None:
        """Set the watches again whenever their connection has been lost."""
        patience = 0.0
        while True:
            connection = self._reconnecting.current
            if not self._by_path or connection is None:
                await self._first_watch.park()
            elif connection.alive and all(
                watch.connection in (None, connection) for watch in self._by_path.values()
            ):
                is_refused = any(watch.refused for watch in self._by_path.values())
                patience = min(2 * patience or REFUSED_FIRST, REFUSED_MAX) if is_refused else 0.0
                with trio.move_on_after(patience or math.inf):
                    await connection.ended.wait()
                if connection.alive:
                    await self._rearm()
            else:
                self._interrupt()
                await self._rearm()

    def move(self, source: bytes, target: bytes) -> None:
        """Watch below `target` what was watched below `source`.  Each subscriber learns that it may have
        missed something."""
        by_path: dict[tuple[bytes, int | None], _Watch] = {}
        for watch in self._by_path.values():
            watch.path = moved(watch.path, source, target)
            for subscription in watch.subscriptions:
                subscription.path = watch.path
            kept = by_path.setdefault((watch.path, watch.depth), watch)
            if kept is not watch:
                kept.subscriptions.update(watch.subscriptions)
                kept.armed = kept.armed or watch.armed
                del self._by_token[watch.token]
        self._by_path = by_path
        self._reconnecting.close("the watches move")

    def _interrupt(self) -> None:
        for watch in self._by_path.values():
            if watch.armed and (watch.connection is None or not watch.connection.alive):
                watch.armed = False
                for subscription in watch.subscriptions:
                    subscription.interrupt()

    async def _rearm(self) -> None:
        for watch in list(self._by_path.values()):
            try:
                async with self._lock:
                    await self._rearm_one(watch)
            except StoreError:
                await trio.sleep(BACKOFF_MAX)
                return

    async def _rearm_one(self, watch: _Watch) -> None:
        if self._by_path.get((watch.path, watch.depth)) is not watch:
            return  # removed meanwhile
        if watch.connection is not None and watch.connection.alive:
            return
        try:
            await self._arm(watch, trio.current_time() + self._timeout)
        except XenstoreError as error:
            watch.connection = None
            if watch.refused:
                return  # the log has it already
            watch.refused = True
            log.error("Xenstore refuses the watch of %r, xsfs retries: %s", watch.path, error)
            for subscription in watch.subscriptions:
                subscription.put(watch.path)
        else:
            if watch.refused:
                watch.refused = False
                log.warning("the watch of %r is set again", watch.path)
            # The kernel's device may deliver the first event before the reply to WATCH.
            for subscription in watch.subscriptions:
                subscription.alert()

    @asynccontextmanager
    async def watching(
        self, path: bytes, on_event: Callable[[], object] | None = None
    ) -> AsyncIterator[Subscription]:
        subscription = Subscription(path, on_event)
        await self.subscribe(subscription)
        try:
            yield subscription
        finally:
            subscription.end()
            await self.unsubscribe(subscription)
