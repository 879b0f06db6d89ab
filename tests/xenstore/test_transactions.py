"""The client's ring: transactions, in each of the places."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from tests.support import client_places
from tests.support.client_places import (
    SHORT,
    fails_with,
)
from tests.support.clients import LIMIT, TIMEOUT, Place, opened
from tests.support.lying_store import Lie, LyingStore, Talk, on, says, silence
from tests.support.messages import Message
from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, TransactionEnded, XenstoreError
from xsfs.xenstore.protocol import Op, Request
from xsfs.xenstore.store import SHORT_MAX, Store, Transaction

places, place = client_places.places, client_places.place


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
            assert tx.is_open
        assert not tx.is_open
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
            assert not tx.is_open
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
        replies = await transaction.finish((protocol.write(node, b"1"), protocol.read(node)))
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
            await tx.finish((protocol.write(node.encode(), value),))

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


@trio_test
async def test_atomically_commits_what_work_does_not(place: Place) -> None:
    async with opened(place) as (store, base):

        async def work(tx: Transaction) -> str:
            await tx.write(f"{base}/a", "1")
            assert not await store.exists(f"{base}/a")
            return "done"

        assert await store.atomically(work) == "done"
        assert await store.read(f"{base}/a") == b"1"


@trio_test
async def test_an_error_that_a_conflict_made_is_not_raised(place: Place) -> None:
    """C xenstored's transaction is no snapshot: a child that was listed may be gone when it is read."""
    async with opened(place) as (store, base):
        await store.write(f"{base}/a", "1")
        await store.write(f"{base}/b", "2")
        attempts = 0

        async def read_all(tx: Transaction) -> dict[bytes, bytes]:
            nonlocal attempts
            attempts += 1
            names = await tx.list(base)
            if attempts == 1:
                await store.delete(f"{base}/a")
            return {name: await tx.read(f"{base}/{name.decode()}") for name in names}

        assert await store.atomically(read_all) in ({b"b": b"2"}, {b"a": b"1", b"b": b"2"})

        await store.write(f"{base}/a", "1")
        attempts = 0

        async def mark_and_read_all(tx: Transaction) -> dict[bytes, bytes]:
            await tx.write(f"{base}/mark", str(attempts))
            return await read_all(tx)

        found = await store.atomically(mark_and_read_all)
        assert found.pop(b"mark") == b"%d" % (attempts - 1)
        assert found in ({b"b": b"2"}, {b"a": b"1", b"b": b"2"})


@trio_test
async def test_an_error_without_a_conflict_is_raised(place: Place) -> None:
    """And soon: not after trying again for the whole time limit."""
    async with opened(place) as (store, base):

        async def read(tx: Transaction) -> bytes:
            return await tx.read(f"{base}/missing")

        async def write_and_read(tx: Transaction) -> bytes:
            await tx.write(f"{base}/a", "1")
            return await tx.read(f"{base}/missing")

        start = trio.current_time()
        for work in (read, write_and_read):
            with fails_with("ENOENT"):
                await store.atomically(work)
        assert trio.current_time() - start < TIMEOUT / 2
        assert not await store.exists(f"{base}/a")


@trio_test
async def test_only_a_few_run_at_once(place: Place) -> None:
    """A guest has some ten transactions in all."""
    async with opened(place) as (store, base):
        running = done = 0
        has_all = trio.Event()

        async def work(tx: Transaction) -> None:
            nonlocal running, done
            running += 1
            assert running <= SHORT_MAX
            if running == SHORT_MAX:
                has_all.set()
            await has_all.wait()
            await tx.read(base)
            running -= 1
            done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(store.atomically, work)
        assert done == 30
        # They are on connections that are used again.
        assert len(store._idle) <= SHORT_MAX
        assert all(connection.alive for connection in store._idle)


# ------------------------------------------------------------------------- ends that are uncertain


def swallowed(talk: Talk, request: Message) -> bool:
    """The daemon carries it out, and the client never hears of it."""
    talk.ask(request)
    return True


UNCERTAIN: dict[str, tuple[Op, Lie]] = {
    "the start is not answered": (Op.TRANSACTION_START, swallowed),
    "the end never comes to the daemon": (Op.TRANSACTION_END, silence),
    "the end is refused": (Op.TRANSACTION_END, says(b"EQUOTA\0", Op.ERROR)),
}


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["", "cancelled"])
@pytest.mark.parametrize("name", UNCERTAIN)
@pytest.mark.parametrize("place", ["C guest", "ocaml guest", "embedded guest"], indirect=True)
@trio_test
async def test_an_uncertain_end_leaves_the_guest_no_transaction(
    place: Place, name: str, is_cancelled: bool, tmp_path: Path
) -> None:
    """It happens more often than a guest may have transactions."""
    timeout = 0.1

    async def read(tx: Transaction) -> bytes:
        return await tx.read("data")

    async def try_it(store: Store) -> None:
        with suppress(RequestTimeout, ConnectionLost, XenstoreError):
            await store.atomically(read)

    with LyingStore(tmp_path / "sock", place.path) as liar:
        lying = Place(place.kind, place.domid, liar.path)
        async with opened(lying, timeout=TIMEOUT if is_cancelled else timeout) as (store, _):
            op, lie = UNCERTAIN[name]
            for _ in range(12):
                liar.lie = on(op, lie)
                before = liar.connections
                with trio.move_on_after(timeout if is_cancelled else TIMEOUT):
                    await try_it(store)
                liar.behave()
                assert store._idle == []
                assert liar.connections > before
                await works_again(store)
            assert store._idle == []
            async with opened(place) as (direct, base):
                transactions = [await direct.begin() for _ in range(GUEST_TRANSACTIONS)]
                for transaction in transactions:
                    await transaction.read(base)
                    direct.abandon(transaction)


GUEST_TRANSACTIONS = 10


async def works_again(store: Store) -> None:
    while True:
        with suppress(RequestTimeout, ConnectionLost):
            await store.read("data")
            return


SILENT: dict[str, Lie] = {
    "from the start": on(Op.TRANSACTION_START, silence),
    "at a read": on(Op.READ, silence),
    "late": on(Op.READ, silence),
    "at the end": on(Op.TRANSACTION_END, silence),
}


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("place", ["C"], indirect=True)
@trio_test
async def test_the_time_limit_counts_once(place: Place, name: str, tmp_path: Path) -> None:
    """However many wait for one of the few places: not once for each request, nor once for each task."""
    timeout = 2.0
    with LyingStore(tmp_path / "sock", place.path) as liar:
        async with opened(Place("C", 0, liar.path), timeout=timeout) as (store, base):
            took: list[float] = []

            async def read(tx: Transaction) -> bytes:
                if name == "late":
                    await trio.sleep(0.75 * timeout)
                return await tx.read(base)

            async def try_it() -> None:
                start = trio.current_time()
                with pytest.raises((RequestTimeout, ConnectionLost)):
                    await store.atomically(read)
                took.append(trio.current_time() - start)

            liar.lie = SILENT[name]
            async with trio.open_nursery() as nursery:
                for _ in range(SHORT_MAX + 2):
                    nursery.start_soon(try_it)
            assert timeout - 0.01 <= max(took) < 1.5 * timeout
            liar.behave()
            liar.hang_up()
            with trio.fail_after(LIMIT):
                while True:
                    with suppress(RequestTimeout, ConnectionLost):
                        assert await store.atomically(read) == b""
                        break
            # The connection for requests was closed, too.  A read connects again, a removal would fail.
            assert await store.read(base) == b""


@pytest.mark.parametrize("place", ["C"], indirect=True)
@trio_test
async def test_conflicts_are_no_outage(place: Place) -> None:
    """The last attempt has little time left: that it did not suffice is not the store's silence."""
    async with opened(place, timeout=SHORT) as (store, base):

        async def conflict(tx: Transaction) -> None:
            await tx.read(base)
            await store.write(base, "")

        for _ in range(5):
            with fails_with("EAGAIN"):
                await store.atomically(conflict)
            assert store.breaker.error is None


@trio_test
async def test_a_transaction_is_ended_before_its_connection_is_closed(place: Place) -> None:
    """Linux cannot suspend a guest any more in which the device was closed with a transaction open."""
    ends: list[bytes] = []
    async with opened(place) as (store, base):
        with suppress(KeyError):
            async with store.transaction() as tx:
                await tx.write(f"{base}/a", "1")
                send = tx.connection.pipeline

                async def noted(
                    requests: Sequence[Request], tx_id: int = 0, deadline: float | None = None
                ) -> list[Reply]:
                    ends.extend(r.payload for r in requests if r.op == Op.TRANSACTION_END)
                    return await send(requests, tx_id, deadline)

                tx.connection.pipeline = noted  # type: ignore[method-assign]
                raise KeyError
        assert ends == [b"F\0"]
        assert not tx.connection.alive
        assert not await store.exists(f"{base}/a")
