"""The client's ring: watches, in each of the places.

Nothing here sleeps.  That an event has come is known from a later one on the same connection.
"""

from __future__ import annotations

import contextlib
import errno

import pytest
from trio.testing import trio_test

from tests.support import client_places
from tests.support.client_places import (
    WATCHES,
    fails_with,
    only_dom0s,
    only_guests,
)
from tests.support.clients import HOME, Place, events_until, no_watch_is_left, opened
from xsfs.xenstore import protocol
from xsfs.xenstore.watches import EVENTS_MAX, Subscription

places, place = client_places.places, client_places.place


@trio_test
async def test_a_watch_tells_of_the_node_and_all_below(place: Place) -> None:
    async with opened(place) as (store, base), store.watch(base) as events:
        assert await anext(events) == base.encode()
        await store.write(f"{base}/a/b", "1")
        assert await anext(events) == f"{base}/a/b".encode()
        await store.delete(f"{base}/a")
        assert await anext(events) == f"{base}/a".encode()
        await store.write(base, "")
        assert await anext(events) == base.encode()


@only_guests
@trio_test
async def test_a_relative_watch_tells_relative_paths(place: Place) -> None:
    async with opened(place) as (store, base):
        relative = base.removeprefix(f"{HOME}/")
        async with store.watch(relative) as events:
            assert await anext(events) == relative.encode()
            await store.write(f"{base}/a", "1")
            assert await anext(events) == f"{relative}/a".encode()


@trio_test
async def test_the_first_event_comes_for_missing_nodes_too(place: Place) -> None:
    async with opened(place) as (store, base), store.watch(f"{base}/missing") as events:
        assert await anext(events) == f"{base}/missing".encode()


@trio_test
async def test_unread_events_are_kept_and_merged(place: Place) -> None:
    async with opened(place) as (store, base), store.watch(base) as events:
        for _ in range(5):
            await store.write(f"{base}/a", "1")
            await store.write(f"{base}/b", "1")
        await store.write(f"{base}/x", "")
        # Once something further has come by the same connection, all of these have.
        async with store.watch(f"{base}/c") as further:
            await anext(further)
        assert events
        expected = [base, f"{base}/a", f"{base}/b", f"{base}/x"]
        assert [path.decode() for path in events.take()] == expected
        assert not events
        assert events.take() == []


@trio_test
async def test_many_subscribers_one_watch(place: Place) -> None:
    """More subscribers than a guest may have watches."""
    async with opened(place) as (store, base), contextlib.AsyncExitStack() as stack:
        subscriptions = [await stack.enter_async_context(store.watch(base)) for _ in range(200)]
        assert len(store.watches) == 1
        for events in subscriptions:
            assert await anext(events) == base.encode()
        await store.write(f"{base}/a", "1")
        for events in subscriptions:
            assert (await events_until(events, f"{base}/a"))[-1] == f"{base}/a"


@trio_test
async def test_the_last_subscriber_takes_the_watch_along(place: Place) -> None:
    async with opened(place) as (store, base):
        async with store.watch(base) as stays:
            await anext(stays)
            async with store.watch(base):
                assert len(store.watches) == 1
            assert len(store.watches) == 1
            await store.write(f"{base}/a", "1")
            assert await anext(stays) == f"{base}/a".encode()
        await no_watch_is_left(store)
        # More of them than a guest may have at once, each of another path.
        for number in range(150):
            async with store.watch(f"{base}/{number}"):
                pass
        async with store.watch(base) as again:
            assert await anext(again) == base.encode()
        assert store.watches.reconnects == 0


@only_guests
@trio_test
async def test_a_watch_the_store_refuses(place: Place) -> None:
    async with opened(place) as (store, base):
        async with contextlib.AsyncExitStack() as stack:
            for number in range(WATCHES):
                await stack.enter_async_context(store.watch(f"{base}/{number}"))
            with fails_with("EQUOTA" if place.kind == "ocaml" else "E2BIG"):
                for number in range(WATCHES, 2 * WATCHES):
                    await stack.enter_async_context(store.watch(f"{base}/{number}"))
            assert len(store.watches) < 2 * WATCHES
        await no_watch_is_left(store)
        async with store.watch(base) as events:
            assert await anext(events) == base.encode()


@trio_test
async def test_what_was_left_counts_no_more(place: Place) -> None:
    """Nobody has waited for it: the store hears that the old ones end before it hears of a new one."""
    async with opened(place) as (store, base):
        left = [Subscription(f"{base}/{number}".encode()) for number in range(WATCHES)]
        for subscription in left:
            await store.watches.subscribe(subscription)
        for subscription in left:
            store.watches.drop(subscription)
        assert len(store.watches) == WATCHES
        async with store.watch(base) as events:
            assert await anext(events) == base.encode()
            assert len(store.watches) == 1


@only_dom0s
@trio_test
async def test_a_backlog_too_long_becomes_one_event(place: Place) -> None:
    over = 40
    async with opened(place) as (store, base), store.watch(base) as events:
        await anext(events)
        paths = [f"{base}/{number}" for number in range(EVENTS_MAX + over)]
        await store.pipeline([protocol.mkdir(path.encode()) for path in paths])
        async with store.watch("/further") as further:
            await anext(further)
        backlog = [path.decode() for path in events.take()]
        assert backlog == [base, *paths[EVENTS_MAX + 1 :]]
        # It goes on as ever.
        await store.write(f"{base}/z", "")
        assert await anext(events) == f"{base}/z".encode()


@only_guests
@trio_test
async def test_a_watch_by_a_connection_that_has_just_died(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another connection sends it, and nobody notices."""

    async def fail(messages: object) -> bytes:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    async with opened(place) as (store, base), store.watch(base) as others:
        assert await anext(others) == base.encode()
        connection = store.watches._reconnecting.current
        assert connection is not None
        monkeypatch.setattr(connection._transport, "send_watch", fail)
        async with store.watch(f"{base}/x") as events:
            assert await anext(events) == f"{base}/x".encode()
        assert await anext(others) == base.encode()
