"""For the client's tests: a store to ask, as whom, and a node of one's own in it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import trio

from xsfs.xenstore.store import Store, open_store
from xsfs.xenstore.watches import Subscription

GUEST = 7
HOME = f"/local/domain/{GUEST}"
LIMIT = 120.0
"""Seconds a test may take, over which something hangs."""
TIMEOUT = 60.0
"""The time limit of a store that answers, however busy the machine is."""
SOON = TIMEOUT / 2
"""A call that does not wait for the time limit ends within this time."""


@dataclass(frozen=True)
class Place:
    """A store, and who asks it."""

    kind: str
    domid: int
    path: str

    @property
    def root(self) -> str:
        """A node below which one may do as one likes."""
        return f"{HOME}/data" if self.domid else "/test"


async def furnish(path: str) -> None:
    """The guest's home, as a toolstack would write it."""
    async with open_store(path, timeout=TIMEOUT) as dom0:
        for name, value, perms in (("domid", GUEST, f"n0,r{GUEST}"), ("data", "", f"n{GUEST}")):
            await dom0.write(f"{HOME}/{name}", value)
            await dom0.set_perms(f"{HOME}/{name}", perms)


def set_time_limit(store: Store, seconds: float) -> None:
    store.timeout = store.breaker._timeout = store.watches._timeout = seconds
    connections = list(store._idle)
    for reconnecting in store._main, store.watches._reconnecting:
        reconnecting._timeout = seconds
        if reconnecting.current is not None:
            connections.append(reconnecting.current)
    for connection in connections:
        connection._timeout = seconds


@contextlib.contextmanager
def time_limit(store: Store, seconds: float) -> Iterator[None]:
    """In the block the store is given so little time, which is meant to pass.  Before and after it a busy
    machine has time enough."""
    before = store.timeout
    set_time_limit(store, seconds)
    try:
        yield
    finally:
        set_time_limit(store, before)


_numbers = itertools.count()


@contextlib.asynccontextmanager
async def opened(
    place: Place, *, timeout: float = TIMEOUT, limit: float = LIMIT
) -> AsyncIterator[tuple[Store, str]]:
    """A store, and the path of a node of the test's own; the node goes at the end."""
    with trio.fail_after(limit):
        async with open_store(path=place.path, timeout=timeout) as store:
            base = f"{place.root}/t{next(_numbers)}"
            await store.mkdir(base)
            yield store, base
            await store.delete(base)


async def no_watch_is_left(store: Store) -> None:
    """Return when the store has removed the last watch."""
    with trio.fail_after(LIMIT):
        while len(store.watches):
            await trio.sleep(0.01)


async def events_until(subscription: Subscription, last: str) -> list[str]:
    """All events up to the one for `last`."""
    found = []
    async for path in subscription:
        found.append(path.decode())
        if path == last.encode():
            return found
    raise AssertionError("a subscription has no end")
