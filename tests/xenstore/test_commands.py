"""The client's ring: whole subtrees, and the requests of a toolstack."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from trio.testing import trio_test

from tests.support import client_places
from tests.support.client_places import MANY_PATH, SECRET, many_names, only_dom0s, only_guests
from tests.support.clients import GUEST, HOME, LIMIT, Place, opened
from tests.support.xenstored.bridge import GUEST_PORT
from tests.support.xenstored.harness import RealXenstored
from xsfs.xenstore.commands import WALK_WINDOW, WalkedNode
from xsfs.xenstore.errors import NotFound, PermissionDenied, XenstoreError
from xsfs.xenstore.store import Store, open_store

places, place = client_places.places, client_places.place


async def walked(store: Store, path: str) -> list[WalkedNode]:
    return [node async for node in store.walk(path)]


# ------------------------------------------------------------------------------------------- walk


@trio_test
async def test_a_walk_gives_each_node_before_its_children(place: Place) -> None:
    async with opened(place) as (store, base):
        values = {base: b"", f"{base}/a": b"1", f"{base}/a/b": b"\0\xff", f"{base}/a/b/c": b""}
        values |= {f"{base}/d{number}": b"%d" % number for number in range(2 * WALK_WINDOW)}
        for name, value in values.items():
            await store.write(name, value)
        nodes = await walked(store, base)
        assert {path.decode(): value for path, value, _ in nodes} == values
        assert len(nodes) == len(values)
        seen = {base.encode()}
        for path, _, names in nodes:
            assert path in seen
            seen |= {b"%s/%s" % (path, name) for name in names}
        assert len(seen) == len(values)


@trio_test
async def test_a_walk_of_relative_paths(place: Place) -> None:
    async with opened(place) as (store, base):
        relative = base.removeprefix(f"{HOME}/") if place.domid else base
        await store.write(f"{base}/a", "1")
        top = relative.encode()
        assert await walked(store, relative) == [(top, b"", [b"a"]), (top + b"/a", b"1", [])]


@only_dom0s
@trio_test
async def test_a_walk_of_everything(place: Place) -> None:
    async with opened(place) as (store, base):
        paths = [path for path, _, _ in await walked(store, "/")]
        assert paths[0] == b"/"
        assert base.encode() in paths
        assert f"{MANY_PATH}/{many_names()[-1]}".encode() in paths
        assert not any(b"@" in path for path in paths)
        assert len(paths) == len(set(paths))


@only_guests
@trio_test
async def test_a_walk_leaves_out_what_may_not_be_read(
    place: Place, places: dict[str, Place]
) -> None:
    kind = place.kind
    async with (
        opened(place) as (store, base),
        open_store(places[kind].path) as dom0,
    ):
        await dom0.write(f"{base}/hidden/below", "1")
        await dom0.set_perms(f"{base}/hidden", "n0")
        await store.write(f"{base}/shown", "2")
        paths = [path.decode() for path, _, _ in await walked(store, base)]
        assert sorted(paths) == [base, f"{base}/shown"]
        with pytest.raises(PermissionDenied):
            await walked(store, SECRET)


@trio_test
async def test_a_walk_leaves_out_what_vanishes_meanwhile(place: Place) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/a/b", "1")
        paths = []
        async for path, _, _ in store.walk(base):
            paths.append(path.decode())
            if path == base.encode():
                await store.delete(f"{base}/a")
        assert paths == [base]
        with pytest.raises(NotFound):
            await walked(store, f"{base}/a")


@trio_test
async def test_a_walk_in_a_transaction(place: Place) -> None:
    async with opened(place) as (store, base):
        async with store.transaction() as tx:
            await tx.write(f"{base}/a", "1")
            assert [path async for path, _, _ in tx.walk(f"{base}/a")] == [f"{base}/a".encode()]
            await tx.rollback()
        assert len(await walked(store, base)) == 1


# -------------------------------------------------------------------------------------- toolstack

OTHER = 8
NEW = 9


@pytest.fixture(params=["C", "ocaml"])
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param, guests=(GUEST, OTHER)) as daemon:
        daemon.populate()
        daemon.create_domain(NEW)
        yield daemon


@trio_test
async def test_a_toolstack_introduces_and_releases_a_domain(daemon: RealXenstored) -> None:
    with trio.fail_after(LIMIT):
        async with open_store(daemon.socket) as store, store.watch("@introduceDomain") as events:
            await anext(events)
            assert not await store.is_domain_introduced(NEW)
            await store.introduce(NEW, 0x1000 + NEW, GUEST_PORT)
            assert await anext(events) == b"@introduceDomain"
            assert await store.is_domain_introduced(NEW)
            async with store.watch("@releaseDomain") as releases:
                await anext(releases)
                await store.release(NEW)
                assert await anext(releases) == b"@releaseDomain"
            assert not await store.is_domain_introduced(NEW)


@trio_test
async def test_a_toolstack_resumes_a_domain(daemon: RealXenstored) -> None:
    """A domain that runs again may shut down once more."""
    with trio.fail_after(LIMIT):
        async with open_store(daemon.socket) as store, store.watch("@releaseDomain") as events:
            await anext(events)
            for _ in range(2):
                daemon.shutdown_domain(GUEST)
                assert await anext(events) == b"@releaseDomain"
                await store.resume(GUEST)
            with pytest.raises(XenstoreError):
                await store.resume(NEW)


@trio_test
async def test_a_toolstack_sets_the_target_of_a_device_model(daemon: RealXenstored) -> None:
    data = f"/local/domain/{OTHER}/data"
    with trio.fail_after(LIMIT):
        async with (
            open_store(daemon.socket) as store,
            open_store(daemon.guest_socket(GUEST)) as guest,
        ):
            with pytest.raises(PermissionDenied):
                await guest.write(data, "mine")
            await store.set_target(GUEST, OTHER)
            await guest.write(data, "mine")


@only_guests
@trio_test
async def test_a_guest_is_no_toolstack(place: Place) -> None:
    async with opened(place) as (store, _):
        for request in (store.introduce(NEW, 1, 1), store.release(OTHER), store.resume(OTHER)):
            with pytest.raises(PermissionDenied):
                await request
        with pytest.raises(PermissionDenied):
            await store.set_target(GUEST, OTHER)
