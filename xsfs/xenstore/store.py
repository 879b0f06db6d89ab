"""The client: Xenstore for tasks of a trio program, and the Python interface of xsfs.

    async with open_store() as store:
        name = await store.read("name")
        await store.write("data/x", "42")
        async with store.transaction() as tx:
            await tx.write("data/n", await tx.read_integer("data/n") + 1)
        async with store.watch("data") as events:
            async for path in events:
                ...

A `Store` has one connection for requests, which all tasks share and which comes back after it was
lost; one for watches (xsfs/xenstore/watches.py); and one for each `Transaction`, so that closing it ends
even a transaction that the daemon refuses to end.  What `atomically` runs is on the shared connection: it
is for the few requests of one short transaction.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Final, TypeVar

import trio

from xsfs.xenstore import protocol
from xsfs.xenstore.background import open_servants
from xsfs.xenstore.commands import Answers, NamesOfEach, Path, Session, encode_path
from xsfs.xenstore.connection import WINDOW, Connection
from xsfs.xenstore.errors import (
    DEFAULT_TIMEOUT,
    ConnectionLost,
    RequestTimeout,
    StoreError,
    XenstoreError,
)
from xsfs.xenstore.eventual import Eventual, result_of
from xsfs.xenstore.outage import Outage
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.reconnect import Connect, Link, open_connection
from xsfs.xenstore.transaction import Transaction
from xsfs.xenstore.transport import Transport, find_store, open_transport
from xsfs.xenstore.unanswered import Batch, Reply
from xsfs.xenstore.watches import Subscription, Watches

ATOMIC_MAX: Final = 4
"""How many short transactions run at once: a guest is let to have 10 in all, its mounts' own and
other programs' included."""

Result = TypeVar("Result")


class Store(Session):
    """Xenstore as it is.  Made by `open_store`."""

    def __init__(self, nursery: trio.Nursery, connect: Connect, timeout: float) -> None:
        self._nursery = nursery
        self._connect = connect
        self._link = Link(nursery, connect, timeout)
        self._atomic = trio.CapacityLimiter(ATOMIC_MAX)
        self.timeout = timeout
        self.outage = Outage(nursery, timeout, self._probe)
        self.watches = Watches(nursery, connect, timeout, self.outage)
        self.requests = 0
        """How many requests were sent, those of transactions and watches apart."""
        self._reconnects_beside = 0
        """Those of stores beside it, which have ended."""
        self.transactions = 0
        """How many transactions with a connection of their own are open."""

    @property
    def payload_max(self) -> int:
        connection = self._link.connection
        return connection.payload_max if connection is not None else protocol.DEVICE_PAYLOAD_MAX

    @property
    def reconnects(self) -> int:
        return max(0, self._link.made - 1) + self._reconnects_beside

    async def open(self) -> None:
        """Connect for the first time, and see that the store answers.

        A daemon that is not there is an error at once: it is only waited for after it was seen.
        """
        await self._connect_now()
        await self.burst((protocol.directory(b"/"),))

    async def _connect_now(self) -> Connection:
        deadline = trio.current_time() + self.timeout
        return self._link.adopt(await open_connection(self._connect, deadline, patient=False))

    def distrust(self, reason: str) -> None:
        """End the connection of a store that answers nonsense; the next request makes a new one."""
        self._link.close(reason)

    async def burst(
        self, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None
    ) -> list[Reply]:
        """As in Session.  What only reads is asked again when the connection is lost meanwhile."""
        return await result_of(self.ask(requests, meanwhile))

    def ask(
        self, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None
    ) -> Eventual[list[Reply]]:
        """As in Session."""
        self.requests += len(requests)
        connection = self._at_hand(requests)
        if connection is None:
            if meanwhile is not None:
                meanwhile()
            return self._replies(requests, None)
        batch = connection.ask(requests, 0, meanwhile)
        if batch.missing:
            return self._replies(requests, batch)
        self.outage.answered()
        return batch.replies

    def _at_hand(self, requests: Sequence[Request]) -> Connection | None:
        """The connection, where these can be sent by it just so."""
        connection = self._link.connection
        if connection is None or not connection.alive or self.outage.error is not None:
            return None
        return connection if 0 < len(requests) <= WINDOW else None

    def at_once(
        self, requests: Sequence[Request], meanwhile: Callable[[], None]
    ) -> list[Reply] | None:
        """As `ask`, but None if not all is answered within a moment.

        For what only reads: it may have been sent, and what is answered later is dropped.
        """
        connection = self._at_hand(requests)
        if connection is None or not connection.prompt:
            return None
        with suppress(ConnectionLost, RequestTimeout):
            replies = self.ask(requests, meanwhile)
            if isinstance(replies, list):
                return replies
            replies.close()
        return None

    def receive(self) -> None:
        """As in Connection."""
        if (connection := self._link.connection) is not None:
            connection.receive()

    def ask_and(
        self, requests: Sequence[Request], more: Callable[[], Sequence[Request]]
    ) -> Eventual[Answers]:
        """As in Session.  Where each reply must be slept for, all of it is one burst."""
        connection = self._at_hand(requests)
        if connection is None or not connection.prompt:
            return self._burst_and(requests, more)
        batch, rest = connection.ask_both(requests, more)
        self.requests += len(requests) + (0 if rest is None else len(rest.requests))
        if batch.missing or not connection.comes_soon(rest):
            return self._replies_and(requests, connection, batch, rest)
        self.outage.answered()
        return batch.replies, partial(connection.replies_in_turn, rest)

    async def _replies_and(
        self, requests: Sequence[Request], connection: Connection, batch: Batch, rest: Batch | None
    ) -> Answers:
        """Both, where one has to be slept for."""
        replies = batch.replies
        if batch.missing:
            replies = await self._replies(requests, batch)
        else:
            self.outage.answered()
        if rest is not None and not connection.comes_soon(rest):
            with suppress(ConnectionLost, RequestTimeout):
                await connection.replies(rest)
        return replies, partial(connection.replies_in_turn, rest)

    async def _replies(self, requests: Sequence[Request], batch: Batch | None) -> list[Reply]:
        """What could not be answered at once; `batch` is what was asked just now."""
        outage = self.outage
        if batch is None:
            await outage.check()
        answers = outage.answers
        deadline = trio.current_time() + self.timeout
        try:
            replies = await self._ask(requests, deadline, batch)
        except (RequestTimeout, ConnectionLost) as error:
            outage.failed(error, answers, deadline)
            raise
        outage.answered()
        return replies

    async def _probe(self) -> None:
        await self._ask((protocol.directory(b"/"),), trio.current_time() + self.timeout)

    async def _ask(
        self, requests: Sequence[Request], deadline: float, batch: Batch | None = None
    ) -> list[Reply]:
        connection = self._link.connection
        failure: StoreError = RequestTimeout("Xenstore did not answer in time")
        if connection is not None and (batch is not None or connection.alive):
            try:
                if batch is not None:
                    return await connection.replies(batch)
                return await connection.burst(requests)
            except ConnectionLost as error:
                failure = error
                if not all(request.repeatable for request in requests):
                    raise
        # From here on it is asked by new connections, all in the time that one may take.
        while trio.current_time() < deadline:
            with trio.move_on_at(deadline):
                connection = await self._link.connected(deadline)
                try:
                    return await connection.burst(requests)
                except ConnectionLost as error:
                    failure = error
                    if not all(request.repeatable for request in requests):
                        raise
        raise failure

    async def list_all(self, paths: Sequence[bytes]) -> NamesOfEach:
        """As in Session.  A node that never stops changing is listed in a transaction, where it
        stands still."""
        try:
            return await super().list_all(paths)
        except XenstoreError as error:
            if error.name != "EAGAIN":
                raise

        async def work(transaction: Transaction) -> NamesOfEach | XenstoreError:
            try:
                return await transaction.list_all(paths)
            except XenstoreError as error:
                return error  # not a conflict, to be tried again and again

        names = await self.atomically(work)
        if isinstance(names, XenstoreError):
            raise names
        return names

    @asynccontextmanager
    async def beside(self, count: int) -> AsyncIterator[Sequence[Store]]:
        """The same store by `count` more connections: for who asks more than it can soon answer.

        A daemon looks at all its connections before each request that it takes, oxenstored even between
        the parts of one, and then does something for each: several are served almost as fast as one.
        There are fewer where no more can be had.
        """
        async with open_servants() as nursery:
            stores: list[Store] = []
            with suppress(StoreError, OSError):
                for _ in range(count):
                    stores.append(await self._another(nursery))
            try:
                yield stores
            finally:
                self.requests += sum(store.requests for store in stores)
                self._reconnects_beside += sum(store.reconnects for store in stores)

    async def _another(self, nursery: trio.Nursery) -> Store:
        """Raises StoreError, OSError if it can't be had at once."""
        store = Store(nursery, self._connect, self.timeout)
        store.outage = self.outage
        connection = await store._connect_now()
        # By the connection itself: the store would try again and again.
        await connection.burst((protocol.directory(b"/"),))
        return store

    # -------------------------------------------------------------------------- transactions

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction with a connection of its own.

        It is committed at the end of the block if nobody ended it before, rolled back if the block
        raises.  A conflict raises XenstoreError `EAGAIN` there: begin again.
        """
        transaction = await self.begin()
        try:
            yield transaction
            if transaction.open:
                await transaction.commit()
        finally:
            self.abandon(transaction)

    async def begin(self) -> Transaction:
        """Start a transaction with a connection of its own; `abandon` must follow sometime."""
        await self.outage.check()
        with self.outage.noticed(trio.current_time() + self.timeout) as deadline:
            connection = Connection(await open_connection(self._connect, deadline), self.timeout)
            self._nursery.start_soon(connection.run)
            self.transactions += 1
            try:
                return await self._start(connection)
            except BaseException:
                self._close(connection)
                raise

    def abandon(self, transaction: Transaction) -> None:
        """Close the transaction's connection, which rolls back what is still open."""
        self._close(transaction.connection)

    def _close(self, connection: Connection) -> None:
        connection.close()
        self.transactions -= 1

    async def _start(self, connection: Connection) -> Transaction:
        (reply,) = await connection.burst((protocol.transaction_start(),))
        self.outage.answered()
        if isinstance(reply, XenstoreError):
            raise reply
        number = protocol.decode_transaction_id(reply)
        return Transaction(connection, number, self.outage, self.timeout)

    async def atomically(self, work: Callable[[Transaction], Awaitable[Result]]) -> Result:
        """Run `work` in a short transaction, again while it conflicts, for `timeout` seconds.

        `work` ends the transaction itself (`finish`, `commit`); it is rolled back where it raises.
        Raises XenstoreError `EAGAIN` if it conflicted all the time.
        """
        await self.outage.check()
        deadline = trio.current_time() + self.timeout
        with self.outage.noticed(deadline):
            async with self._one_of_few(deadline):
                return await self._again_while_it_conflicts(work, deadline)

    async def _again_while_it_conflicts(
        self, work: Callable[[Transaction], Awaitable[Result]], deadline: float
    ) -> Result:
        while True:
            self.requests += 1
            transaction = await self._start(await self._link.connected(deadline))
            try:
                return await work(transaction)
            except XenstoreError as error:
                if error.name != "EAGAIN" or trio.current_time() >= deadline:
                    raise
            finally:
                await self._clean_up(transaction)

    @asynccontextmanager
    async def _one_of_few(self, deadline: float) -> AsyncIterator[None]:
        """One of ATOMIC_MAX places.  Those who wait for it wait no longer than for an answer."""
        with trio.move_on_at(deadline) as waiting:
            await self._atomic.acquire()
        if waiting.cancelled_caught:
            raise RequestTimeout("Xenstore did not end other transactions in time")
        try:
            yield
        finally:
            self._atomic.release()

    async def _clean_up(self, transaction: Transaction) -> None:
        if not transaction.open:
            return
        with trio.CancelScope(shield=True):
            try:
                await transaction.rollback()
            except StoreError:
                # A daemon that will not end it keeps it as long as the connection.
                self.distrust("a transaction could not be ended")

    # ------------------------------------------------------------------------------- watches

    def watch(self, path: Path) -> AbstractAsyncContextManager[Subscription]:
        """The events of a node and all below it, while the block runs.

        The first one comes at once and is for the node itself.  Events tell the path of what
        changed, in the form (absolute, relative) in which `path` is given.
        """
        return self.watches.watching(encode_path(path))


@asynccontextmanager
async def open_store(
    path: str | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    connect: Connect | None = None,
) -> AsyncIterator[Store]:
    """A Store, connected and answering.

    path        its socket or device; looked for where libxenstore does if None
    timeout     seconds within which each request must be answered
    connect     how to make a connection, for stores that have no path

    Raises StoreUnavailable, ConnectionLost, RequestTimeout.
    """
    if connect is None:
        # Absolute: connections are made later, too, and the background process leaves the directory.
        found = os.path.abspath(path if path is not None else find_store(os.environ))

        def connect() -> Transport:
            return open_transport(found)

    async with open_servants() as nursery:
        store = Store(nursery, connect, timeout)
        nursery.start_soon(store.watches.run)
        await store.open()
        yield store
