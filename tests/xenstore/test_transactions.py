"""The client's ring: transactions, in each of the places."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import trio_test

from tests.support import client_places
from tests.support.client_places import (
    SHORT,
    fails_with,
)
from tests.support.clients import Place, opened
from xsfs.xenstore import protocol
from xsfs.xenstore.errors import TransactionEnded
from xsfs.xenstore.store import Store, Transaction

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
