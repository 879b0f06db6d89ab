"""The client's ring: `open_store` against both real daemons, a guest of each, and the embedded
store.

Nothing here sleeps.  That an event has come is known from a later one on the same connection.
"""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
from trio.testing import trio_test

from tests.clients import GUEST, HOME, LIMIT, TIMEOUT, Place, events_until, furnish, opened
from tests.xenstored.harness import RealXenstored
from xsfs import wire
from xsfs.client import Store, open_store
from xsfs.connection import WINDOW
from xsfs.embedded import EmbeddedStore
from xsfs.errors import TransactionEnded, XenstoreError
from xsfs.eventual import result_of
from xsfs.permissions import Permission
from xsfs.transaction import Transaction
from xsfs.watches import EVENTS_MAX, Subscription
from xsfs.wire import PAYLOAD_MAX

MANY = 5000
MANY_PATH = "/many"
"""A node of dom0 with MANY children, which everybody may list."""
SECRET = "/secret"

WATCHES = 100
"""What each store lets a guest have; it stops short of twice as many."""

SHORT = 0.3
"""A time limit that is meant to pass."""


# ---------------------------------------------------------------------------------------- places


class Embedded:
    """The embedded store, in a thread of its own, listening for dom0 and the guest."""

    def __init__(self, directory: str) -> None:
        self.socket = os.path.join(directory, "dom0")
        self.guest_socket = os.path.join(directory, "guest")
        self._ready: queue.Queue[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = queue.Queue()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))
        self._thread.start()
        self._token, self._scope = self._ready.get(timeout=LIMIT)

    async def _run(self) -> None:
        store = EmbeddedStore()
        async with trio.open_nursery() as nursery:
            await nursery.start(store.listen, self.socket, 0)
            await nursery.start(store.listen, self.guest_socket, GUEST)
            self._ready.put((trio.lowlevel.current_trio_token(), nursery.cancel_scope))

    def close(self) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()


async def make_many(path: str) -> None:
    async with open_store(path, timeout=TIMEOUT) as dom0:
        await dom0.mkdir(SECRET)
        await dom0.set_perms(SECRET, "n0")
        await dom0.mkdir(MANY_PATH)
        await dom0.set_perms(MANY_PATH, "r0")
        replies = await dom0.burst(
            [wire.mkdir(f"{MANY_PATH}/{name}".encode()) for name in many_names()]
        )
        assert not any(isinstance(reply, XenstoreError) for reply in replies)


def many_names() -> list[str]:
    return [f"child-{number}" for number in range(MANY)]


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, Place]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for kind in "C", "ocaml":
            daemon = stack.enter_context(RealXenstored(kind, guests=(GUEST,)))
            found[kind] = Place(kind, 0, daemon.socket)
            found[f"{kind} guest"] = Place(kind, GUEST, daemon.guest_socket(GUEST))
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        embedded = Embedded(directory)
        stack.callback(embedded.close)
        found["embedded"] = Place("embedded", 0, embedded.socket)
        found["embedded guest"] = Place("embedded", GUEST, embedded.guest_socket)
        for place in found.values():
            if not place.domid:
                trio.run(furnish, place.path)
                trio.run(make_many, place.path)
        yield found


DOM0S = ("C", "ocaml", "embedded")
GUESTS = tuple(f"{kind} guest" for kind in DOM0S)
only_dom0s = pytest.mark.parametrize("place", DOM0S, indirect=True)
only_guests = pytest.mark.parametrize("place", GUESTS, indirect=True)


@pytest.fixture(params=[*DOM0S, *GUESTS])
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    return places[request.param]


@contextlib.contextmanager
def fails_with(name: str) -> Iterator[None]:
    with pytest.raises(XenstoreError) as caught:
        yield
    assert caught.value.name == name


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
        assert caught.value.request == wire.read(f"{base}/missing".encode())
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
            wire.read(f"{base}/missing{number}".encode())
            if number % 3 == 0
            else wire.get_domain_path(number)
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

        assert await store.burst([wire.read(path)], meanwhile) == [b"1"]
        assert done == [0]
        assert await store.burst([], meanwhile) == []
        assert done == [0, 1]
        replies = await store.burst([wire.read(path)] * (WINDOW + 1), meanwhile)
        assert replies == [b"1"] * (WINDOW + 1)
        assert done == [0, 1, 2]
        transaction = await store.begin()
        assert await transaction.burst([wire.read(path)], meanwhile) == [b"1"]
        await transaction.rollback()
        assert done == [0, 1, 2, 3]
        store.distrust("for the test")  # the next one has to connect first
        assert await store.burst([wire.read(path)], meanwhile) == [b"1"]
        assert done == [0, 1, 2, 3, 4]


@trio_test
async def test_what_is_asked_behind_a_burst(place: Place) -> None:
    """It is asked once, and its replies are its own, errors among them, whenever they come."""
    async with opened(place) as (store, base):
        path = base.encode()
        await store.write(base, "7")
        calls = []

        def more() -> list[wire.Request]:
            calls.append(1)
            return [wire.get_domain_path(5), wire.read(path + b"/missing")]

        first, rest = await result_of(store.ask_and([wire.read(path), wire.directory(path)], more))
        assert first == [b"7", b""]
        for replies in (list(rest()), list(rest())):
            assert len(replies) <= 2
            assert replies[:1] in ([], [b"/local/domain/5\0"])
            for error in replies[1:]:
                assert isinstance(error, XenstoreError)
                assert error.name == "ENOENT"
        assert calls == [1]
        first, rest = await result_of(store.ask_and([wire.read(path)], list))
        assert first == [b"7"]
        assert not list(rest())
        assert store.reconnects == 0


@trio_test
async def test_those_who_leave_do_not_disturb(place: Place) -> None:
    """Replies to requests whose tasks have been cancelled are known, and dropped."""
    async with opened(place) as (store, base):
        for number in range(50):
            with trio.move_on_after(0):
                await store.burst([wire.get_domain_path(number)] * 100)
        assert await store.read(base) == b""
        assert store.reconnects == 0


# --------------------------------------------------------------------------------- transactions


@trio_test
async def test_a_transaction_is_seen_when_committed(place: Place) -> None:
    async with opened(place) as (store, base):
        async with store.transaction() as tx:
            assert store.transactions == 1
            await tx.write(f"{base}/a", "1")
            await tx.mkdir(f"{base}/b")
            assert await tx.read(f"{base}/a") == b"1"
            assert sorted(await tx.list(base)) == [b"a", b"b"]
            assert not await store.exists(f"{base}/a")
            assert await store.list(base) == []
            assert tx.open
        assert not tx.open
        assert await store.read(f"{base}/a") == b"1"
        assert sorted(await store.list(base)) == [b"a", b"b"]
        assert store.transactions == 0


class Failure(Exception):
    pass


async def fail_in_transaction(store: Store, path: str) -> None:
    async with store.transaction() as tx:
        await tx.write(path, "1")
        raise Failure


@trio_test
async def test_a_transaction_that_fails_changes_nothing(place: Place) -> None:
    async with opened(place) as (store, base):
        with pytest.raises(Failure):
            await fail_in_transaction(store, f"{base}/a")
        assert not await store.exists(f"{base}/a")
        async with store.transaction() as tx:
            await tx.write(f"{base}/a", "1")
            await tx.rollback()
            assert not tx.open
        assert not await store.exists(f"{base}/a")


@trio_test
async def test_after_its_end_a_transaction_is_of_no_use(place: Place) -> None:
    async with opened(place) as (store, base):
        for commit in True, False:
            async with store.transaction() as tx:
                await (tx.commit() if commit else tx.rollback())
                for call in tx.commit, tx.rollback, lambda: tx.read(base), lambda: tx.mkdir(base):
                    with pytest.raises(TransactionEnded):
                        await call()


@trio_test
async def test_a_conflict(place: Place) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/n", 1)
        with fails_with("EAGAIN"):
            async with store.transaction() as tx:
                await tx.write(f"{base}/n", await tx.read_integer(f"{base}/n") + 1)
                await store.write(f"{base}/n", 5)
        assert await store.read_integer(f"{base}/n") == 5
        assert store.transactions == 0


@trio_test
async def test_requests_and_the_end_in_one_go(place: Place) -> None:
    async with opened(place) as (store, base):
        node = f"{base}/a".encode()
        transaction = await store.begin()
        replies = await transaction.finish((wire.write(node, b"1"), wire.read(node)))
        store.abandon(transaction)
        assert replies == [b"OK\0", b"1"]
        assert await store.read(node) == b"1"


@trio_test
async def test_nothing_is_left_of_transactions(place: Place) -> None:
    """A guest may have some 10 in all."""
    async with opened(place) as (store, base):
        for _ in range(15):
            with pytest.raises(Failure):
                await fail_in_transaction(store, f"{base}/x")
            # Not ended by anything but the end of its connection.
            store.abandon(await store.begin())
        async with store.transaction() as tx:
            await tx.mkdir(f"{base}/y")
        assert await store.list(base) == [b"y"]
        assert store.transactions == 0


@pytest.mark.parametrize("place", ["C", "ocaml"], indirect=True)
@trio_test
async def test_a_transaction_takes_its_connection_along(place: Place) -> None:
    async with opened(place) as (store, base):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(Failure):
                await fail_in_transaction(store, f"{base}/x")
            async with store.transaction():
                assert len(os.listdir("/proc/self/fd")) == before + 1
            assert len(os.listdir("/proc/self/fd")) == before


@trio_test
async def test_atomically_tries_again(place: Place) -> None:
    async with opened(place) as (store, base):
        await store.write(f"{base}/n", 1)
        attempts = 0

        async def work(tx: Transaction) -> int:
            nonlocal attempts
            attempts += 1
            found = await tx.read_integer(f"{base}/n")
            if attempts < 3:
                await store.write(f"{base}/n", found + 10)
            await tx.write(f"{base}/n", found + 1)
            await tx.commit()
            return found

        assert await store.atomically(work) == 21
        assert attempts == 3
        assert await store.read_integer(f"{base}/n") == 22


@trio_test
async def test_counting_together(place: Place) -> None:
    async with opened(place) as (store, base), opened(place) as (other, _):
        node = f"{base}/n"
        await store.write(node, 0)

        async def increment(tx: Transaction) -> None:
            value = str(await tx.read_integer(node) + 1).encode()
            await tx.finish((wire.write(node.encode(), value),))

        async def work(mine: Store) -> None:
            for _ in range(4):
                await mine.atomically(increment)

        async with trio.open_nursery() as nursery:
            for mine in store, store, store, other, other:
                nursery.start_soon(work, mine)
        assert await store.read_integer(node) == 20


@trio_test
async def test_atomically_undoes_work_that_fails(place: Place) -> None:
    async with opened(place) as (store, base):

        async def work(tx: Transaction) -> None:
            await tx.write(f"{base}/a", "1")
            raise Failure

        # More often than a guest may have transactions.
        for _ in range(15):
            with pytest.raises(Failure):
                await store.atomically(work)
        assert not await store.exists(f"{base}/a")
        assert store.reconnects == 0


@trio_test
async def test_atomically_gives_up_in_time(place: Place) -> None:
    async with opened(place, timeout=SHORT) as (store, base):
        node = f"{base}/n"
        await store.write(node, 0)

        async def work(tx: Transaction) -> None:
            found = await tx.read_integer(node)
            await store.write(node, found + 1)
            await tx.write(node, found + 1)
            await tx.commit()

        with fails_with("EAGAIN"):
            await store.atomically(work)
        assert await store.read_integer(node) > 0


# -------------------------------------------------------------------------------------- watches


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
        assert len(store.watches) == 0
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
        assert len(store.watches) == 0
        async with store.watch(base) as events:
            assert await anext(events) == base.encode()


@only_guests
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
        await store.burst([wire.mkdir(path.encode()) for path in paths])
        async with store.watch("/further") as further:
            await anext(further)
        backlog = [path.decode() for path in events.take()]
        assert backlog == [base, *paths[EVENTS_MAX + 1 :]]
        # It goes on as ever.
        await store.write(f"{base}/z", "")
        assert await anext(events) == f"{base}/z".encode()
