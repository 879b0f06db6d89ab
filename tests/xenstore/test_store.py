"""The client's ring: `open_store`, nodes, permissions and much at once, against both real daemons, a
guest of each, and the embedded store.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import trio_test
from xsfs.xenstore.eventual import result_of

from tests.support import client_places
from tests.support.client_places import (
    MANY_PATH,
    SECRET,
    fails_with,
    many_names,
    only_dom0s,
    only_guests,
)
from tests.support.clients import GUEST, HOME, Place, opened
from xsfs.xenstore import protocol
from xsfs.xenstore.connection import WINDOW
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import Permission
from xsfs.xenstore.protocol import PAYLOAD_MAX

places, place = client_places.places, client_places.place

# ----------------------------------------------------------------------------------------- nodes

VALUES = [b"", b"x", b"\0", b"a\0b\0", bytes(range(256)), b"v" * 1500]


@trio_test
async def test_values_of_any_bytes(place: Place) -> None:
    async with opened(place) as (store, base):
        for value in VALUES:
            await store.write(f"{base}/v", value)
            assert await store.read(f"{base}/v") == value
            assert await store.read(f"{base}/v".encode()) == value


@trio_test
async def test_text_and_numbers(place: Place) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/v", "grün")
        assert await store.read(f"{base}/v") == "grün".encode()
        with pytest.raises(ValueError, match="invalid literal"):
            await store.read_integer(f"{base}/v")
        await store.write(f"{base}/v", -42)
        assert await store.read(f"{base}/v") == b"-42"
        assert await store.read_integer(f"{base}/v") == -42


@trio_test
async def test_writing_makes_all_parents(place: Place) -> None:
    async with opened(place) as (store, base):
        assert not await store.exists(f"{base}/a/b/c")
        await store.write(f"{base}/a/b/c", "1")
        assert await store.exists(f"{base}/a/b/c")
        assert await store.read(f"{base}/a/b") == b""
        await store.mkdir(f"{base}/d/e")
        assert await store.read(f"{base}/d") == b""


@trio_test
async def test_mkdir_leaves_what_is_there(place: Place) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/a", "1")
        await store.mkdir(f"{base}/a")
        assert await store.read(f"{base}/a") == b"1"


@trio_test
async def test_the_store_says_what_is_wrong(place: Place) -> None:
    async with opened(place) as (store, base):
        with pytest.raises(XenstoreError) as caught:
            await store.read(f"{base}/missing")
        assert caught.value.name == "ENOENT"
        assert caught.value.request == protocol.read(f"{base}/missing".encode())
        assert str(caught.value) == f"ENOENT: READ {base}/missing"
        for call in store.list, store.get_perms:
            with fails_with("ENOENT"):
                await call(f"{base}/missing")


@trio_test
async def test_deleting(place: Place) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/a/b/c", "1")
        await store.delete(f"{base}/a")
        assert not await store.exists(f"{base}/a/b/c")
        assert not await store.exists(f"{base}/a")
        await store.delete(f"{base}/a")  # its parent is there
        with fails_with("ENOENT"):
            await store.delete(f"{base}/a/b")


@trio_test
async def test_listing(place: Place) -> None:
    async with opened(place) as (store, base):
        assert await store.list(base) == []
        for name in "b", "a", "c":
            await store.write(f"{base}/{name}/x", "")
        assert sorted(await store.list(base)) == [b"a", b"b", b"c"]
        both = await store.list_all([base.encode(), f"{base}/a".encode()])
        assert [sorted(names) for names in both] == [[b"a", b"b", b"c"], [b"x"]]


@trio_test
async def test_listing_very_many(place: Place) -> None:
    async with opened(place) as (store, base):
        if place.kind == "ocaml" and place.domid:
            with fails_with("E2BIG"):
                await store.list(MANY_PATH)
        else:
            expected = sorted(name.encode() for name in many_names())
            assert sorted(await store.list(MANY_PATH)) == expected
        # The connection is in step.
        assert await store.read(base) == b""
        assert store.reconnects == 0


@trio_test
async def test_what_would_break_the_connection_is_not_sent(place: Place) -> None:
    async with opened(place) as (store, base):
        room = PAYLOAD_MAX - len(base) - 1
        too_long: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("value", lambda: store.write(base, bytes(room + 1))),
            ("path", lambda: store.read("/" + 3072 * "x")),
            ("path", lambda: store.mkdir("/a//b")),
            ("path", lambda: store.list("")),
            ("path", lambda: store.get_perms("/a.b")),
            ("path", lambda: store.read("/ä")),
            ("root", lambda: store.delete("/")),
            ("permission", lambda: store.set_perms(base, "")),
        ]
        for what, call in too_long:
            with pytest.raises(ValueError, match=what):
                await call()
        assert await store.read(base) == b""
        assert store.reconnects == 0


@trio_test
async def test_permissions_that_do_not_fit_a_message_are_not_sent(place: Place) -> None:
    async with opened(place) as (store, base):
        with pytest.raises(ValueError, match="do not fit"):
            await store.set_perms(base, [Permission(GUEST, True, True)] * PAYLOAD_MAX)
        assert await store.read(base) == b""
        assert store.reconnects == 0


@only_dom0s
@trio_test
async def test_the_longest_value(place: Place) -> None:
    async with opened(place) as (store, base):
        value = b"v" * (PAYLOAD_MAX - len(base) - 1)
        if place.kind == "ocaml":
            with fails_with("E2BIG"):
                await store.write(base, value)
        else:
            await store.write(base, value)
            assert await store.read(base) == value
        assert store.reconnects == 0


# ---------------------------------------------------------------------------- permissions, domains


@trio_test
async def test_permissions(place: Place) -> None:
    async with opened(place) as (store, base):
        owner = Permission(place.domid, False, False)
        assert (await store.get_perms(base))[0].domid == place.domid
        entries = (owner, Permission(3, True, False), Permission(4, False, True))
        await store.set_perms(base, entries)
        # oxenstored forgets domains that do not exist only when they go.
        assert await store.get_perms(base) == entries
        await store.set_perms(base, f"r{place.domid},b3")
        assert await store.get_perms(base) == (
            Permission(place.domid, True, False),
            Permission(3, True, True),
        )


@trio_test
async def test_who_asks(place: Place) -> None:
    async with opened(place) as (store, base):
        assert await store.domid() == place.domid
        if place.domid:
            relative = base.removeprefix(f"{HOME}/")
            await store.write(f"{relative}/x", "1")
            assert await store.read(f"{base}/x") == b"1"


@trio_test
async def test_domains(place: Place) -> None:
    async with opened(place) as (store, _):
        assert await store.get_domain_path(GUEST) == HOME.encode()
        assert await store.get_domain_path(4321) == b"/local/domain/4321"
        if place.domid:
            with fails_with("EACCES"):
                await store.is_domain_introduced(GUEST)
        else:
            assert await store.is_domain_introduced(GUEST) is True
            assert await store.is_domain_introduced(4321) is False


@only_guests
@trio_test
async def test_a_guest_is_refused(place: Place) -> None:
    async with opened(place) as (store, _):
        for call in store.list, store.read, store.mkdir, store.exists:
            with fails_with("EACCES"):
                await call(SECRET)


# -------------------------------------------------------------------------------- many at once


@trio_test
async def test_each_task_gets_its_own_answer(place: Place) -> None:
    tasks, rounds = 40, 15
    async with opened(place) as (store, base):
        done = []

        async def work(number: int) -> None:
            path = f"{base}/n{number}"
            await store.write(path, number)
            for _ in range(rounds):
                assert await store.read_integer(path) == number
                with fails_with("ENOENT"):
                    await store.read(f"{path}/missing")
                assert await store.get_domain_path(number) == b"/local/domain/%d" % number
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(work, number)
        assert sorted(done) == list(range(tasks))
        assert store.reconnects == 0


@trio_test
async def test_bursts_larger_than_the_window(place: Place) -> None:
    async with opened(place) as (store, base):
        count = 3 * WINDOW + 7
        requests = [
            protocol.read(f"{base}/missing{number}".encode())
            if number % 3 == 0
            else protocol.get_domain_path(number)
            for number in range(count)
        ]
        results: dict[int, list[bytes | XenstoreError]] = {}

        async def ask(number: int) -> None:
            results[number] = await store.burst(requests)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, number)
        for replies in results.values():
            assert len(replies) == count
            for number, reply in enumerate(replies):
                if isinstance(reply, XenstoreError):
                    assert number % 3 == 0
                    assert (reply.name, reply.request) == ("ENOENT", requests[number])
                else:
                    assert reply == b"/local/domain/%d\0" % number
        assert len(results) == 3


@trio_test
async def test_an_empty_burst(place: Place) -> None:
    async with opened(place) as (store, _):
        assert await store.burst([]) == []


@trio_test
async def test_what_is_done_while_the_store_is_at_work(place: Place) -> None:
    """Once, whatever is asked and of whom."""
    async with opened(place) as (store, base):
        path = base.encode()
        await store.write(path, b"1")
        done: list[int] = []

        def meanwhile() -> None:
            done.append(len(done))

        assert await store.burst([protocol.read(path)], meanwhile) == [b"1"]
        assert done == [0]
        assert await store.burst([], meanwhile) == []
        assert done == [0, 1]
        replies = await store.burst([protocol.read(path)] * (WINDOW + 1), meanwhile)
        assert replies == [b"1"] * (WINDOW + 1)
        assert done == [0, 1, 2]
        transaction = await store.begin()
        assert await transaction.burst([protocol.read(path)], meanwhile) == [b"1"]
        await transaction.rollback()
        assert done == [0, 1, 2, 3]
        store.drop_connection("for the test")  # the next one has to connect first
        assert await store.burst([protocol.read(path)], meanwhile) == [b"1"]
        assert done == [0, 1, 2, 3, 4]


@trio_test
async def test_what_is_asked_behind_a_burst(place: Place) -> None:
    """It is asked once, and its replies are its own, errors among them, whenever they come."""
    async with opened(place) as (store, base):
        path = base.encode()
        await store.write(base, "7")
        calls = []

        def more() -> list[protocol.Request]:
            calls.append(1)
            return [protocol.get_domain_path(5), protocol.read(path + b"/missing")]

        first, rest = await result_of(
            store.ask_and([protocol.read(path), protocol.directory(path)], more)
        )
        assert first == [b"7", b""]
        for replies in (list(rest()), list(rest())):
            assert len(replies) <= 2
            assert replies[:1] in ([], [b"/local/domain/5\0"])
            for error in replies[1:]:
                assert isinstance(error, XenstoreError)
                assert error.name == "ENOENT"
        assert calls == [1]
        first, rest = await result_of(store.ask_and([protocol.read(path)], list))
        assert first == [b"7"]
        assert not list(rest())
        assert store.reconnects == 0


@trio_test
async def test_those_who_leave_do_not_disturb(place: Place) -> None:
    """Replies to requests whose tasks have been cancelled are known, and dropped."""
    async with opened(place) as (store, base):
        for number in range(50):
            with trio.move_on_after(0):
                await store.burst([protocol.get_domain_path(number)] * 100)
        assert await store.read(base) == b""
        assert store.reconnects == 0
