"""The client without a store: real daemons that stop, die and come back, and sockets
without one.

Nothing here sleeps.  That a task waits for a reply is known from trio's own `wait_all_tasks_blocked`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.support.clients import (
    GUEST,
    LIMIT,
    SOON,
    Place,
    events_until,
    furnish,
    opened,
    set_time_limit,
    time_limit,
)
from tests.support.clock import LeapingClock
from tests.support.lying_store import LyingStore, Talk, silence
from tests.support.messages import Message
from tests.support.xenstored.harness import RealXenstored
from xsfs.xenstore import protocol
from xsfs.xenstore.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreError,
    StoreUnavailable,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.reconnect import CircuitBreaker
from xsfs.xenstore.store import Transaction, open_store
from xsfs.xenstore.watches import Subscription

SHORT = 0.3
"""A time limit that is meant to pass."""


@dataclass(frozen=True)
class Mortal:
    """A real daemon that a test may end, and the way to it."""

    daemon: RealXenstored
    place: Place

    async def restart(self) -> None:
        await trio.to_thread.run_sync(self.daemon.restart)
        await furnish(self.daemon.socket)


@pytest.fixture(params=["C", "ocaml", "C guest", "ocaml guest"])
def mortal(request: pytest.FixtureRequest) -> Iterator[Mortal]:
    kind, _, guest = request.param.partition(" ")
    with RealXenstored(kind, guests=(GUEST,)) as daemon:
        trio.run(furnish, daemon.socket)
        path = daemon.guest_socket(GUEST) if guest else daemon.socket
        yield Mortal(daemon, Place(kind, GUEST if guest else 0, path))


Outcomes = dict[str, object]


async def note(outcomes: Outcomes, name: str, call: Callable[[], Awaitable[object]]) -> None:
    """The outcome of the call: its result, or the type of the error."""
    try:
        outcomes[name] = await call()
    except StoreError as error:
        outcomes[name] = type(error)


@trio_test
async def test_a_restart(mortal: Mortal) -> None:
    """All of it at once, since a restart takes its time."""
    async with opened(mortal.place) as (store, base), contextlib.AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(store.watch(base)) for _ in range(2)]
        watches.append(await stack.enter_async_context(store.watch(f"{base}/other")))
        for events in watches:
            await anext(events)
        tx = await store.begin()
        await tx.mkdir(f"{base}/x")
        mortal.daemon.pause()
        outcomes: Outcomes = {}
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "read": lambda: store.get_domain_path(3),
            "reads": lambda: store.pipeline([protocol.get_domain_path(4)] * 3),
            "write": lambda: store.write(f"{base}/y", "1"),
            "transaction": lambda: tx.read(base),
            "watch": lambda: stack.enter_async_context(store.watch(f"{base}/late")),
        }
        async with trio.open_nursery() as nursery:
            for name, call in calls.items():
                nursery.start_soon(note, outcomes, name, call)
            await wait_all_tasks_blocked()
            assert outcomes == {}
            await mortal.restart()
        assert outcomes == {
            "read": b"/local/domain/3",
            "reads": [b"/local/domain/4\0"] * 3,
            "write": ConnectionLost,
            "transaction": TransactionEnded,
            "watch": ConnectionLost,
        }
        assert not tx.is_open
        for call in tx.commit, tx.rollback, lambda: tx.read(base):
            with pytest.raises(TransactionEnded):
                await call()
        store.abandon(tx)
        # A daemon that is being killed may accept one connection more.
        assert store.reconnects >= 1
        # A subscriber hears of it without having done anything.
        for events in watches:
            assert await anext(events) == events.path
        assert store.watches.reconnects >= 1
        # Everything works as before.
        await store.write(f"{base}/other", "1")
        for events in watches:
            assert (await events_until(events, f"{base}/other"))[-1] == f"{base}/other"
        async with store.transaction() as again:
            await again.write(f"{base}/z", "1")
        assert await store.read(f"{base}/z") == b"1"


@trio_test
async def test_a_write_that_could_not_leave_is_sent_to_the_next_daemon(mortal: Mortal) -> None:
    with trio.fail_after(LIMIT):
        async with open_store(path=mortal.place.path) as store:
            mortal.daemon.restart()  # no other task runs, so the connection's reader does not notice
            with contextlib.suppress(XenstoreError):  # a guest has no home at the new daemon
                await store.write("x", "1")
            assert store.reconnects == 1


@pytest.mark.parametrize("mortal", ["C", "ocaml"], indirect=True)
@trio_test
async def test_while_the_daemon_is_gone(mortal: Mortal) -> None:
    async with opened(mortal.place) as (store, base):
        with trio.fail_after(LIMIT):
            mortal.daemon.kill()
            outcomes: Outcomes = {}
            async with trio.open_nursery() as nursery:
                for name in "one", "two":
                    nursery.start_soon(note, outcomes, name, lambda: store.get_domain_path(3))
                nursery.start_soon(note, outcomes, "begin", store.begin)
                await wait_all_tasks_blocked()
                assert outcomes == {}
                await trio.to_thread.run_sync(mortal.daemon.start)
            transaction = outcomes.pop("begin")
            assert isinstance(transaction, Transaction)
            store.abandon(transaction)
            assert outcomes == {"one": b"/local/domain/3", "two": b"/local/domain/3"}
            # One connection, at first sight of the daemon, does for all.
            assert store.reconnects == 1
            await store.mkdir(base)


@pytest.mark.parametrize("mortal", ["C", "ocaml"], indirect=True)
@trio_test
async def test_a_daemon_that_stays_away(mortal: Mortal) -> None:
    with trio.fail_after(LIMIT):
        async with open_store(mortal.place.path, timeout=LIMIT) as store:
            async with store.watch("/a") as events:
                await anext(events)
                mortal.daemon.kill()
                set_time_limit(store, SHORT)
                for call in (
                    lambda: store.read("/"),
                    lambda: store.write("/a", ""),
                    store.begin,
                    lambda: store.atomically(Transaction.commit),
                    lambda: store.watches.subscribe(Subscription(b"/b")),
                ):
                    with trio.fail_after(SOON), pytest.raises(ConnectionLost):
                        await call()
            assert store.transactions == 0


@trio_test
async def test_a_daemon_that_stands_still(mortal: Mortal) -> None:
    async with opened(mortal.place, timeout=SHORT) as (store, base), store.watch(base) as events:
        await anext(events)
        outcomes: Outcomes = {}
        mortal.daemon.pause()
        started = trio.current_time()
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "read": lambda: store.read(base),
            "reads": lambda: store.pipeline([protocol.get_domain_path(4)] * 3),
            "write": lambda: store.write(f"{base}/y", "1"),
            "watch": lambda: store.watches.subscribe(Subscription(b"/b")),
            "atomically": lambda: store.atomically(Transaction.commit),
        }
        async with trio.open_nursery() as nursery:
            for name, call in calls.items():
                nursery.start_soon(note, outcomes, name, call)
        elapsed = trio.current_time() - started
        assert outcomes == dict.fromkeys(calls, RequestTimeout)
        assert SHORT <= elapsed < SHORT + 1
        mortal.daemon.resume()
        # By a new connection: one that was not answered in time is given up.
        with trio.fail_after(LIMIT):
            while True:
                try:
                    assert await store.read(base) == b""
                    break
                except RequestTimeout:
                    pass
        assert store.reconnects >= 1
        # The watch is set again, too; what has become of the first write is unknown.
        assert (await events_until(events, base))[-1] == base
        await store.write(f"{base}/z", "1")
        assert (await events_until(events, f"{base}/z"))[-1] == f"{base}/z"


# ------------------------------------------------------------------------------ clean-up, silence


class Failure(Exception):
    pass


async def eventually(call: Callable[[], Awaitable[bytes]]) -> bytes:
    """The result of the first call that the store answers."""
    while True:
        with contextlib.suppress(RequestTimeout, ConnectionLost):
            return await call()


async def took(call: Callable[[], Awaitable[object]]) -> float:
    start = trio.current_time()
    await call()
    return trio.current_time() - start


@pytest.mark.parametrize("cancelled", [False, True], ids=["fails", "cancelled"])
@trio_test
async def test_the_end_of_a_transaction_does_not_wait_long_for_a_silent_daemon(
    mortal: Mortal, cancelled: bool
) -> None:
    async with opened(mortal.place) as (store, base):

        async def work(tx: Transaction) -> None:
            await tx.write(f"{base}/a", "1")
            mortal.daemon.pause()
            if cancelled:
                scope.cancel()
                await trio.lowlevel.checkpoint()
            raise Failure

        async def atomically() -> None:
            with scope, pytest.raises(Failure):
                await store.atomically(work)

        async def in_a_block() -> None:
            async with store.transaction() as tx:
                await work(tx)

        async def transaction() -> None:
            with scope, pytest.raises(Failure):
                await in_a_block()

        for call in (atomically, transaction):
            scope = trio.CancelScope()
            assert await took(call) < SOON
            assert scope.cancelled_caught == cancelled
            mortal.daemon.resume()
            assert not await store.exists(f"{base}/a")
        assert store.transactions == 0


@trio_test
async def test_the_end_of_a_watch_does_not_wait_long_for_a_silent_daemon(mortal: Mortal) -> None:
    async with opened(mortal.place) as (store, base):

        async def leave(*, cancel: bool) -> None:
            with trio.CancelScope() as scope:
                async with store.watch(base) as events:
                    await anext(events)
                    mortal.daemon.pause()
                    if cancel:
                        scope.cancel()

        async def subscribe_and_cancel() -> None:
            mortal.daemon.pause()
            with trio.move_on_after(0.05) as scope:
                await store.watches.subscribe(Subscription(base.encode()))
            assert scope.cancelled_caught

        async def leave_behind_another() -> None:
            """A task that subscribes meanwhile waits for the daemon's reply, and holds the lock."""
            async with trio.open_nursery() as nursery, store.watch(base) as events:
                await anext(events)
                mortal.daemon.pause()
                nursery.start_soon(store.watches.subscribe, Subscription(f"{base}/b".encode()))
                await wait_all_tasks_blocked()
                await trio.sleep(0)
                store.watches.drop(events)
                nursery.cancel_scope.cancel()

        for call in (
            lambda: leave(cancel=False),
            lambda: leave(cancel=True),
            subscribe_and_cancel,
            leave_behind_another,
        ):
            assert await took(call) < SOON
            mortal.daemon.resume()
            with trio.fail_after(LIMIT):
                while True:  # what was left is removed before another one is set
                    with contextlib.suppress(ConnectionLost, RequestTimeout):
                        async with store.watch(base) as events:
                            assert await anext(events) == base.encode()
                            break
                while len(store.watches):
                    await trio.sleep(0.01)


@trio_test
async def test_an_unwatch_that_had_to_wait_is_sent_later(mortal: Mortal) -> None:
    """A watch that nobody wants counts against the quota, and its events wake xsfs."""
    async with opened(mortal.place) as (store, base):
        kept = Subscription(base.encode())
        left = Subscription(f"{base}/left".encode())
        for subscription in (kept, left):
            await store.watches.subscribe(subscription)
        may_go_on = trio.Event()

        async def wait_for_a_slow_daemon() -> None:
            async with store.watches._lock:
                await may_go_on.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_a_slow_daemon)
            await wait_all_tasks_blocked()
            store.watches.drop(left)
            assert len(store.watches) == 2
            may_go_on.set()
        with trio.fail_after(LIMIT):
            while len(store.watches) > 1:
                await trio.sleep(0.01)
        assert store.watches.reconnects == 0


@trio_test
async def test_a_connection_that_is_never_answered_is_replaced(
    mortal: Mortal, tmp_path: Path
) -> None:
    """The daemon goes on, but has forgotten a connection."""
    with LyingStore(tmp_path / "sock", mortal.place.path) as liar:
        lying = Place(mortal.place.kind, mortal.place.domid, liar.path)
        async with opened(lying) as (store, base):
            for _ in range(3):
                forgotten = liar.connections
                liar.lie = partial(silent_on_old, forgotten)
                with time_limit(store, SHORT), pytest.raises(RequestTimeout):
                    await store.write(f"{base}/a", "1")
                with trio.fail_after(SOON):
                    while True:
                        with contextlib.suppress(RequestTimeout):
                            await store.write(f"{base}/a", "2")
                            break
                assert await store.read(f"{base}/a") == b"2"
                assert liar.connections > forgotten
                assert store.breaker.error is None
                liar.behave()


def silent_on_old(forgotten: int, talk: Talk, _: Message) -> bool:
    return talk.number <= forgotten


@trio_test
async def test_requests_in_flight_time_out_when_a_probe_replaces_their_connection(
    tmp_path: Path,
) -> None:
    outcomes: Outcomes = {}
    with (
        RealXenstored("C") as daemon,
        LyingStore(tmp_path / "sock", daemon.socket) as liar,
        trio.fail_after(LIMIT),
    ):
        async with open_store(path=liar.path, timeout=LIMIT) as store:
            liar.lie = silence
            async with trio.open_nursery() as nursery:
                nursery.start_soon(note, outcomes, "write", partial(store.write, "/x", "1"))
                await wait_all_tasks_blocked()
                long_ago = float("-inf")
                store.breaker.failed(RequestTimeout("another"), store.breaker.answers, long_ago)
            assert outcomes == {"write": RequestTimeout}


@trio_test
async def test_only_a_whole_time_limit_opens_the_circuit_breaker(clock: LeapingClock) -> None:
    """A request that had little time left, or was not even sent, tells nothing about the store."""

    async def probe() -> None:
        raise RequestTimeout("still silent")

    async def fail_after(breaker: CircuitBreaker, seconds: float) -> None:
        with breaker.observing():
            clock.leap(seconds)
            raise RequestTimeout("no reply")

    async with trio.open_nursery() as nursery:
        breaker = CircuitBreaker(nursery, LIMIT, probe)
        with pytest.raises(RequestTimeout):
            await fail_after(breaker, 0)
        assert breaker.error is None
        await breaker.check()
        with pytest.raises(RequestTimeout):
            await fail_after(breaker, LIMIT)
        assert breaker.error is not None
        with pytest.raises(RequestTimeout):
            await breaker.check()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("mortal", ["C", "ocaml guest"], indirect=True)
@trio_test
async def test_many_who_watch_wait_for_a_silent_daemon_together(mortal: Mortal) -> None:
    """Not one time limit each."""
    limit, count = 1.0, 60
    assert count * limit > SOON
    outcomes: Outcomes = {}
    async with opened(mortal.place) as (store, base), store.watch(base) as events:
        await anext(events)
        mortal.daemon.pause()
        with time_limit(store, limit), trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                for name in map(str, range(count)):
                    subscription = Subscription(f"{base}/{name}".encode())
                    nursery.start_soon(
                        note, outcomes, name, partial(store.watches.subscribe, subscription)
                    )
        mortal.daemon.resume()
        await eventually(lambda: store.read(base))
    assert set(outcomes.values()) <= {RequestTimeout, ConnectionLost}


@trio_test
async def test_requests_fail_at_once_while_the_store_is_silent(
    mortal: Mortal, tmp_path: Path
) -> None:
    with LyingStore(tmp_path / "sock", mortal.place.path) as liar:
        lying = Place(mortal.place.kind, mortal.place.domid, liar.path)
        async with opened(lying) as (store, base):
            liar.lie = silence
            with time_limit(store, 1.0), pytest.raises(RequestTimeout) as caught:
                await store.read(base)
            assert not caught.value.during_outage
            for call in (
                lambda: store.read(base),
                lambda: store.write(base, ""),
                store.begin,
                lambda: store.atomically(Transaction.commit),
                lambda: store.watches.subscribe(Subscription(b"/b")),
            ):
                with trio.fail_after(SOON), pytest.raises(RequestTimeout) as caught:
                    await call()
                assert caught.value.during_outage
            with time_limit(store, 1.0):
                liar.hang_up()  # which ends a probe that would last longer
                before = liar.connections
                with trio.move_on_after(1.5):
                    await trio.sleep_forever()
            # With back-off, and not for longer than somebody asks.
            assert liar.connections <= before + 4
            liar.behave()
            assert await eventually(lambda: store.read(base)) == b""


# ---------------------------------------------------------------------------------- no store at all

AT_ONCE = SOON
"""Far less than the time limit of a request."""


async def cannot_open(path: Path | str) -> StoreError:
    with trio.fail_after(AT_ONCE), pytest.raises((StoreUnavailable, ConnectionLost)) as caught:
        async with open_store(os.fspath(path), timeout=LIMIT):
            pass
    return caught.value


@trio_test
async def test_no_socket(tmp_path: Path) -> None:
    error = await cannot_open(tmp_path / "missing")
    assert "No such file" in str(error)


@trio_test
async def test_a_socket_without_a_daemon(tmp_path: Path) -> None:
    path = tmp_path / "left"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(os.fspath(path))
    error = await cannot_open(path)
    assert "refused" in str(error)


@pytest.mark.parametrize("what", ["file", "directory", "fifo", "/dev/null"])
@trio_test
async def test_what_is_no_socket(what: str, tmp_path: Path) -> None:
    path = tmp_path / "path"
    if what == "file":
        path.write_bytes(b"")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(what)
    error = await cannot_open(path)
    if what != "/dev/null":
        assert isinstance(error, StoreUnavailable)
        assert error.hint


AS_NOBODY = """
import os, sys, trio
from xsfs.xenstore.store import open_store
from xsfs.xenstore.errors import StoreUnavailable
async def main():
    with trio.fail_after(30):
        async with open_store(sys.argv[1], timeout=60):
            pass
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    trio.run(main)
except StoreUnavailable as error:
    print(error.denied, error.hint != "", error)
"""


@pytest.mark.parametrize("closed", ["socket", "directory"])
def test_no_right(closed: str) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        path = os.path.join(directory, "sock")
        listener.bind(path)
        listener.listen(1)
        os.chmod(path, 0 if closed == "socket" else 0o777)
        os.chmod(directory, 0o755 if closed == "socket" else 0)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, path],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        os.chmod(directory, 0o700)
    assert done.stderr == ""
    assert done.stdout == f"True True permission denied: {path}\n"
