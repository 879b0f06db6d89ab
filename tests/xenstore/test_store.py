"""The client's ring: `open_store`, nodes, permissions and much at once, against both real daemons, a
guest of each, and the embedded store.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from tests.support import client_places
from tests.support.client_places import (
    MANY_PATH,
    SECRET,
    fails_with,
    many_names,
    only_dom0s,
    only_guests,
)
from tests.support.clients import GUEST, HOME, LIMIT, Place, opened
from xsfs.xenstore import connection, protocol
from xsfs.xenstore.commands import Commands, Value
from xsfs.xenstore.connection import WINDOW
from xsfs.xenstore.errors import NotFound, XenstoreError
from xsfs.xenstore.permissions import Permission
from xsfs.xenstore.protocol import PAYLOAD_MAX
from xsfs.xenstore.store import Store
from xsfs.xenstore.transport import SocketTransport
from xsfs.xenstore.watches import Subscription

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


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (b"abc", b"abc"),
        (bytearray(b"abc"), b"abc"),
        (memoryview(b"xabcx")[1:4], b"abc"),
        ("abc", b"abc"),
        (7, b"7"),
        (0, b"0"),
        ("", b""),
    ],
    ids=lambda value: type(value).__name__,
)
@trio_test
async def test_what_a_value_may_be(place: Place, value: Value, stored: bytes) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/v", value)
        assert await store.read(f"{base}/v") == stored
        async with store.transaction() as tx:
            await tx.write(f"{base}/w", value)
        assert await store.read(f"{base}/w") == stored


@pytest.mark.parametrize(
    "value", [None, True, False, 1.5, [1], ("a",), object()], ids=lambda value: type(value).__name__
)
@trio_test
async def test_what_is_no_value(place: Place, value: Any) -> None:
    """The caller does not mean the result of str() or bytes()."""
    async with opened(place) as (store, base):
        with pytest.raises(TypeError, match="value"):
            await store.write(f"{base}/v", value)
        assert not await store.exists(f"{base}/v")


@trio_test
async def test_what_is_no_request(place: Place) -> None:
    async with opened(place) as (store, base):
        # The types forbid it.  A caller without types can still make it.
        nonsense = protocol.Request(-42, base.encode() + b"\0")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="-42"):
            await store.call(nonsense)
        with pytest.raises(ValueError, match="-42"):
            await store.pipeline([protocol.read(base.encode()), nonsense])
        assert await store.read(base) == b""
        assert store.reconnects == 0


@trio_test
async def test_a_path_of_the_greatest_length_ends_no_connection(place: Place) -> None:
    """A listing in parts, and a watch, have more in their payload than the path."""
    path = b"/" + b"x" * (protocol.PATH_MAX - 1)
    async with opened(place) as (store, base):
        for call in store.read, store.list, store.get_perms:
            with pytest.raises(XenstoreError):
                await call(path)
        with fails_with("EINVAL"):
            await store.call(protocol.directory_part(path, 0))
        with fails_with("EINVAL"):
            async with store.watch(path):
                pass
        assert await store.read(base) == b""
        assert store.reconnects == store.watches.reconnects == 0


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
        await store.delete(f"{base}/a")  # its parent exists
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
            ("path", lambda: store.read("/" + 4095 * "x")),
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
async def test_pipelines_larger_than_the_window(place: Place) -> None:
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
            results[number] = await store.pipeline(requests)

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
async def test_requests_of_which_none_may_fail(place: Place) -> None:
    async with opened(place) as (store, base):
        path = base.encode()
        requests = [protocol.write(path + b"/a", b"1"), protocol.read(path + b"/a")]
        assert await store.call_all(requests) == [b"OK\0", b"1"]
        missing = protocol.read(path + b"/missing")
        with pytest.raises(NotFound) as caught:
            await store.call_all([*requests, missing, protocol.read(b"//")])
        assert caught.value.request is missing


@trio_test
async def test_an_empty_pipeline(place: Place) -> None:
    async with opened(place) as (store, _):
        assert await store.pipeline([]) == []


@trio_test
async def test_those_who_leave_do_not_disturb(place: Place) -> None:
    """Replies to requests whose tasks have been cancelled are known, and dropped."""
    async with opened(place) as (store, base):
        for number in range(50):
            with trio.move_on_after(0):
                await store.pipeline([protocol.get_domain_path(number)] * 100)
        assert await store.read(base) == b""
        assert store.reconnects == 0


# ---------------------------------------------------------------------------------- checkpoints

Operation = Callable[[Commands, str], Awaitable[object]]

OPERATIONS: dict[str, Operation] = {
    "pipeline": lambda store, base: store.pipeline([protocol.read(base.encode())]),
    "empty pipeline": lambda store, _: store.pipeline([]),
    "call": lambda store, base: store.call(protocol.read(base.encode())),
    "call_all": lambda store, base: store.call_all([protocol.read(base.encode())]),
    "read": lambda store, base: store.read(base),
    "read_integer": lambda store, base: store.read_integer(f"{base}/number"),
    "write": lambda store, base: store.write(f"{base}/x", "1"),
    "mkdir": lambda store, base: store.mkdir(f"{base}/x"),
    "delete": lambda store, base: store.delete(f"{base}/number"),
    "exists": lambda store, base: store.exists(base),
    "list": lambda store, base: store.list(base),
    "list_all": lambda store, base: store.list_all([base.encode()]),
    "get_perms": lambda store, base: store.get_perms(base),
    "set_perms": lambda store, base: store.set_perms(f"{base}/number", "n7,b8"),
    "domid": lambda store, _: store.domid(),
    "get_domain_path": lambda store, _: store.get_domain_path(3),
}
OF_THE_STORE: dict[str, Callable[[Store, str], Awaitable[object]]] = {
    "begin": lambda store, _: store.begin(),
    "atomically": lambda store, _: store.atomically(lambda transaction: transaction.commit()),
    "subscribe": lambda store, base: store.watches.subscribe(Subscription(base.encode())),
}


async def state_of(store: Store, base: str) -> object:
    return (
        sorted(await store.list(base)),
        await store.read(f"{base}/number"),
        await store.get_perms(f"{base}/number"),
    )


@trio_test
async def test_a_cancelled_operation_sends_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/number", 1)
        await store.set_perms(f"{base}/number", f"n{place.domid},r3")
        before = await state_of(store, base)
        calls: dict[str, Callable[[], Awaitable[object]]] = {}
        transaction = await store.begin()
        await transaction.read(base)
        for name, operation in OPERATIONS.items():
            calls[name] = partial(operation, store, base)
            calls[f"{name} in a transaction"] = partial(operation, transaction, base)
        for name, of_store in OF_THE_STORE.items():
            calls[name] = partial(of_store, store, base)
        sent: list[object] = []

        def send(transport: SocketTransport, messages: Sequence[bytes]) -> bytes:
            sent.extend(messages)
            return b""

        for name, call in calls.items():
            with monkeypatch.context() as patch, trio.CancelScope() as scope:
                patch.setattr(SocketTransport, "send", send)
                scope.cancel()
                await call()
            assert scope.cancelled_caught, name
            assert sent == [], name
        store.abandon(transaction)
        assert await state_of(store, base) == before
        assert store.transactions == 0
        assert store.reconnects == 0


@trio_test
async def test_a_loop_of_reads_can_be_cancelled(place: Place) -> None:
    async with opened(place) as (store, base):
        count = 0
        with trio.CancelScope() as scope:
            while count < MANY_READS:
                await store.read(base)
                count += 1
                if count == 10:
                    scope.deadline = trio.current_time()
        assert scope.cancelled_caught
        assert count < MANY_READS


MANY_READS = 20_000
"""Far more than one task reads in the millisecond that it may keep the event loop."""


@pytest.mark.parametrize(("computing", "reads_max"), [(0.0, MANY_READS), (0.0015, 200)])
@trio_test
async def test_other_tasks_have_their_turn_beside_a_loop_of_reads(
    place: Place, computing: float, reads_max: int
) -> None:
    """A task whose reads all return immediately must not keep the event loop to itself.

    computing   for how many seconds it computes between two reads
    """
    async with opened(place) as (store, base):
        turns = count = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                await trio.sleep(0.001)
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            while turns < 20 and count < reads_max:
                await store.read(base)
                count += 1
                end = time.perf_counter() + computing
                while time.perf_counter() < end:
                    pass
            nursery.cancel_scope.cancel()
        assert turns >= 20


@pytest.mark.parametrize("place", ["C", "ocaml"], indirect=True)
@trio_test
async def test_many_tasks_that_read_send_together(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each its own request, with a system call for each on both sides."""
    tasks = 100
    async with opened(place) as (store, base):
        sends = 0
        send = SocketTransport.send

        def counting(transport: SocketTransport, messages: Sequence[bytes]) -> bytes:
            nonlocal sends
            sends += 1
            return send(transport, messages)

        monkeypatch.setattr(SocketTransport, "send", counting)

        async def read() -> None:
            await store.read(base)

        # However slowly it comes to the next task, all belong together.
        monkeypatch.setattr(connection, "STREAK_SECONDS", LIMIT)
        for _ in range(30):
            sends = 0
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(read)
            assert sends <= 5
