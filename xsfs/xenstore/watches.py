"""Watches: one connection for all of them, and for nothing else.

What `Watches` owns: a link whose connection carries only WATCH and UNWATCH, one at a time (on the
kernel's device anything else outstanding beside them can deadlock its Xenstore driver), and one watch
at the store for each path, however many subscribe to it.

What always holds:

- An event is put into each subscription of its watch and never waits for a subscriber.  Equal events
  still unread are one; past EVENTS_MAX the backlog becomes one event for the watched path itself,
  which by Xenstore's own rule means "look at all of it again".
- Taking an event from the connection costs the same however many subscribe to its watch: where there
  are several, `_spread` tells them, one at a time, and what comes meanwhile is merged.  A reader of
  the connection that fell some 2000 events behind would stop whoever writes, with oxenstored for good.
- A watch that nobody wants any more is removed before another one is set: what was closed counts no
  more against the quota of whoever opens next.
- After the connection was lost, `run` sets every watch again, and the store's initial event tells
  each subscriber that it may have missed something.  One that the store then refuses (the quota may be
  used up by others meanwhile) is tried again, with back-off, for as long as somebody wants it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Connection
from xsfs.xenstore.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreError,
    StoreUnavailable,
    XenstoreError,
)
from xsfs.xenstore.event_reader import drained
from xsfs.xenstore.outage import Outage
from xsfs.xenstore.reconnect import BACKOFF_MAX, Connect, Link

log = logging.getLogger(__name__)

EVENTS_MAX: Final = 4096

REFUSED_FIRST: Final = 1.0
REFUSED_MAX: Final = 30.0
"""Seconds until a watch that was refused when it was set again is tried once more."""


class Subscription:
    """The events of one path for one reader.  Iterate over it, or use `take` and `wait`.

    `on_event`, if given, is called at each event, and when the watch was lost or has been set again,
    in the connection's task: it must not wait, but for a moment (PROMPT_SECONDS).
    """

    def __init__(
        self,
        path: bytes,
        on_event: Callable[[], None] | None = None,
        events_max: int = EVENTS_MAX,
    ) -> None:
        self.path = path
        self.interruptions = 0
        """How often the watch was lost with its connection: events may have been missed."""
        self._events: dict[bytes, None] = {}
        self._events_max = events_max
        self._on_event = on_event
        self._arrived = trio.lowlevel.ParkingLot()

    def put(self, path: bytes) -> None:
        if len(self._events) >= self._events_max and path not in self._events:
            self._events = {self.path: None}
        else:
            self._events[path] = None
        self._arrived.unpark_all()
        self.alert()

    def alert(self) -> None:
        if self._on_event is not None:
            self._on_event()

    def interrupt(self) -> None:
        self.interruptions += 1
        self.alert()

    def take(self) -> list[bytes]:
        """The paths that changed since last asked, in order; perhaps none."""
        events = list(self._events)
        self._events.clear()
        return events

    def only(self) -> bytes | None:
        """The path that changed, if it is one; it stays to be taken."""
        return next(iter(self._events)) if len(self._events) == 1 else None

    def __bool__(self) -> bool:
        """Whether there is an event to take."""
        return bool(self._events)

    async def wait(self) -> None:
        """Return when there is an event to take."""
        while not self._events:
            await self._arrived.park()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> bytes:
        await self.wait()
        path = next(iter(self._events))
        del self._events[path]
        return path


class _Watch:
    """One watch at the store."""

    def __init__(self, path: bytes, token: bytes) -> None:
        self.path = path
        self.token = token
        self.subscriptions: dict[Subscription, None] = {}
        self.connection: Connection | None = None
        self.armed = False
        """Whether the store has it, as far as is known."""
        self.refused = False
        """Whether the store did not take it again after the connection was lost."""
        self.unspread: dict[bytes, None] = {}
        """Events that not all subscriptions have been told of."""
        self.spreading = False

    def put(self, path: bytes) -> None:
        if len(self.unspread) >= EVENTS_MAX and path not in self.unspread:
            self.unspread = {self.path: None}
        else:
            self.unspread[path] = None


class Watches:
    """See the module's text.  `run` must be running."""

    def __init__(
        self, nursery: trio.Nursery, connect: Connect, timeout: float, outage: Outage
    ) -> None:
        self._nursery = nursery
        self._outage = outage
        self._timeout = timeout
        self._link = Link(nursery, drained(connect), timeout, self._dispatch)
        self._turn = trio.Lock()
        self._by_path: dict[bytes, _Watch] = {}
        self._by_token: dict[bytes, _Watch] = {}
        self._unwanted: deque[_Watch] = deque()
        """Watches to be removed, in the order in which they were left."""
        self._last_token = 0
        self._lost = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """How many watches there are at the store."""
        return len(self._by_path) + len(self._unwanted)

    @property
    def reconnects(self) -> int:
        return max(0, self._link.made - 1)

    def _dispatch(self, path: bytes, token: bytes) -> None:
        watch = self._by_token.get(token)
        if watch is None:
            # Of a watch just removed; or of a store that lies, which harms nobody.
            return
        if len(watch.subscriptions) == 1 and not watch.spreading:
            next(iter(watch.subscriptions)).put(path)
            return
        watch.put(path)
        if not watch.spreading:
            watch.spreading = True
            self._nursery.start_soon(self._spread, watch)

    async def _spread(self, watch: _Watch) -> None:
        """Tell all subscriptions of the events, and let other tasks run after each: above all the
        one that reads the connection."""
        while watch.unspread:
            events, watch.unspread = watch.unspread, {}
            for subscription in list(watch.subscriptions):
                if subscription in watch.subscriptions:
                    for path in events:
                        subscription.put(path)
                    await trio.lowlevel.checkpoint()
        watch.spreading = False

    async def subscribe(self, subscription: Subscription) -> None:
        """Watch the subscription's path for it.  Raises StoreError; then nothing is watched.

        The first event comes at once, as Xenstore's do.
        """
        async with self._turn:
            watch = self._by_path.get(subscription.path)
            if watch is not None:
                watch.subscriptions[subscription] = None
                subscription.put(subscription.path)
                return
            self._last_token += 1
            watch = _Watch(subscription.path, b"%x" % self._last_token)
            watch.subscriptions[subscription] = None
            self._by_token[watch.token] = watch
            try:
                await self._outage.check()
                await self._arm(watch)
            except XenstoreError:
                del self._by_token[watch.token]
                raise
            except BaseException:
                # Cancelled, or without a reply: the store may have it, or set it later.
                del self._by_token[watch.token]
                self._unwanted.append(watch)
                self._nursery.start_soon(self._clear)
                raise
            self._by_path[watch.path] = watch
            self._lost.unpark_all()

    def armed(self, subscription: Subscription) -> bool:
        """Whether its watch is set at the store now."""
        watch = self._by_path.get(subscription.path)
        return watch is not None and watch.armed

    async def unsubscribe(self, subscription: Subscription) -> None:
        """The opposite; the last subscriber of a path removes the watch.  Never raises."""
        if self._leave(subscription):
            with trio.CancelScope(shield=True):
                await self._clear()

    def drop(self, subscription: Subscription) -> None:
        """The same without waiting for the store."""
        if self._leave(subscription):
            self._nursery.start_soon(self._clear)

    def _leave(self, subscription: Subscription) -> bool:
        """Give the subscription no more events.  Whether that left a watch which nobody wants."""
        watch = self._by_path.get(subscription.path)
        if watch is None or subscription not in watch.subscriptions:
            return False
        del watch.subscriptions[subscription]
        if watch.subscriptions:
            return False
        del self._by_path[watch.path]
        del self._by_token[watch.token]
        self._unwanted.append(watch)
        return True

    async def _clear(self) -> None:
        async with self._turn:
            await self._remove_unwanted()

    async def _remove_unwanted(self) -> None:
        while self._unwanted:
            await self._disarm(self._unwanted[0])
            self._unwanted.popleft()

    async def _disarm(self, watch: _Watch) -> None:
        connection = watch.connection
        if connection is None or not connection.alive:
            return
        try:
            await connection.burst((protocol.unwatch(watch.path, watch.token),))
        except StoreError as error:
            # The daemon may still have it: only the connection's end is sure to end it.
            connection.close(f"a watch could not be removed: {error}")

    async def _arm(self, watch: _Watch) -> None:
        await self._remove_unwanted()
        deadline = trio.current_time() + self._timeout
        connection = await self._link.connected(deadline)
        watch.connection = connection
        (reply,) = await connection.burst((protocol.watch(watch.path, watch.token),))
        if isinstance(reply, XenstoreError):
            watch.connection = None
            raise reply
        watch.armed = True

    async def run(self) -> None:
        """Set the watches again whenever their connection has been lost."""
        patience = REFUSED_FIRST
        while True:
            connection = self._link.connection
            if not self._by_path or connection is None:
                await self._lost.park()
            elif connection.alive and all(
                watch.connection in (None, connection) for watch in self._by_path.values()
            ):
                if not any(watch.refused for watch in self._by_path.values()):
                    patience = REFUSED_FIRST
                    await connection.ended()
                    continue
                with trio.move_on_after(patience):
                    await connection.ended()
                if connection.alive:
                    patience = min(2 * patience, REFUSED_MAX)
                    await self._rearm()
            else:
                self._interrupt()
                await self._rearm()

    def _interrupt(self) -> None:
        for watch in self._by_path.values():
            if watch.armed and (watch.connection is None or not watch.connection.alive):
                watch.armed = False
                for subscription in watch.subscriptions:
                    subscription.interrupt()

    async def _rearm(self) -> None:
        for watch in list(self._by_path.values()):
            try:
                async with self._turn:
                    await self._rearm_one(watch)
            except (ConnectionLost, RequestTimeout, StoreUnavailable):
                await trio.sleep(BACKOFF_MAX)
                return

    async def _rearm_one(self, watch: _Watch) -> None:
        if self._by_path.get(watch.path) is not watch:
            return  # removed meanwhile
        if watch.connection is not None and watch.connection.alive:
            return
        try:
            await self._arm(watch)
        except (ConnectionLost, StoreUnavailable):
            raise
        except RequestTimeout:
            # It may be set later, or never: a new connection is sure to have none.
            self._link.close("a watch was not set in time")
            raise
        except StoreError as error:
            watch.connection = None
            if watch.refused:
                return  # that was said already
            watch.refused = True
            log.error("the watch of %r is refused, and tried again: %s", watch.path, error)
            for subscription in watch.subscriptions:
                subscription.put(watch.path)
        else:
            if watch.refused:
                watch.refused = False
                log.warning("the watch of %r is set again", watch.path)
            # The kernel's device may send the first event before it says that the watch is set.
            for subscription in watch.subscriptions:
                subscription.alert()

    @asynccontextmanager
    async def watching(self, path: bytes) -> AsyncIterator[Subscription]:
        subscription = Subscription(path)
        await self.subscribe(subscription)
        try:
            yield subscription
        finally:
            await self.unsubscribe(subscription)
