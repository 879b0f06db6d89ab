"""Requests below the home have relative paths: what a guest asks after a migration, before it has noticed."""

from __future__ import annotations

import pytest
from trio.testing import trio_test

from tests.support import client_places
from tests.support.client_places import only_guests
from tests.support.clients import HOME, Place, no_watch_is_left, opened
from xsfs.xenstore.errors import XenstoreError

places, place = client_places.places, client_places.place

FORMER = "/local/domain/4321"
"""The home that the guest had before.  It cannot read anything there."""


@only_guests
@trio_test
async def test_paths_below_the_former_home_lead_to_the_home(place: Place) -> None:
    async with opened(place) as (store, base):
        former = base.replace(HOME, FORMER)
        await store.write(f"{base}/name", "own")
        with pytest.raises(XenstoreError):
            await store.read(f"{former}/name")
        store.home.move(FORMER.encode())
        assert await store.read(f"{former}/name") == b"own"
        await store.write(f"{former}/a", "1")
        assert await store.read(f"{base}/a") == b"1"
        async with store.transaction() as tx:
            await tx.write(f"{former}/b", await tx.read(f"{former}/a"))
        assert await store.read(f"{base}/b") == b"1"
        with pytest.raises(XenstoreError):
            await store.read(FORMER)  # itself has no relative path
        with pytest.raises(XenstoreError):
            await store.read(former.replace(FORMER, f"{FORMER}1") + "/name")


@only_guests
@trio_test
async def test_events_of_absolute_watches_have_absolute_paths(place: Place) -> None:
    async with opened(place) as (store, base):
        former = base.replace(HOME, FORMER)
        store.home.move(FORMER.encode())
        async with store.watch(former) as events, store.watch("data") as relative:
            assert await anext(events) == former.encode()
            assert await anext(relative) == b"data"
            await store.write(f"{base}/a", "1")
            assert await anext(events) == f"{former}/a".encode()
            assert (await anext(relative)).startswith(b"data/")
        async with store.watch("@releaseDomain") as events:
            assert await anext(events) == b"@releaseDomain"


@only_guests
@trio_test
async def test_watches_move(place: Place) -> None:
    async with opened(place) as (store, base):
        former = base.replace(HOME, FORMER)
        store.home.move(FORMER.encode())
        async with store.watch(former) as events, store.watch(FORMER) as home:
            await anext(events)
            await anext(home)
            store.home.move(HOME.encode())
            store.watches.move(FORMER.encode(), HOME.encode())
            assert await anext(events) == base.encode()
            assert await anext(home) == HOME.encode()
            await store.write(f"{base}/a", "1")
            assert await anext(events) == f"{base}/a".encode()
            assert await anext(home) == f"{base}/a".encode()


@only_guests
@trio_test
async def test_watches_that_meet_at_a_path_are_all_kept(place: Place) -> None:
    async with opened(place) as (store, base):
        former = base.replace(HOME, FORMER)
        store.home.move(FORMER.encode())
        async with store.watch(base) as there, store.watch(former) as here:
            await anext(there)
            await anext(here)
            store.home.move(HOME.encode())
            store.watches.move(FORMER.encode(), HOME.encode())
            assert await anext(there) == base.encode()
            assert await anext(here) == base.encode()
            await store.write(f"{base}/a", "1")
            assert await anext(there) == f"{base}/a".encode()
            assert await anext(here) == f"{base}/a".encode()
        await no_watch_is_left(store)
