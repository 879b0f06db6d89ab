"""The client: Xenstore for the tasks of a trio program.

    async with open_store() as store:
        name = await store.read("name")
        await store.write("data/x", "42")
        async with store.transaction() as tx:
            await tx.write("data/n", await tx.read_integer("data/n") + 1)
        async with store.watch("data") as events:
            async for path in events:
                ...

A `Store` owns these connections:

- one for requests, which all tasks share and which is opened again after it was lost;
- one for watches (watches.py);
- up to WALK_CONNECTIONS for walks over subtrees, which are opened by the first of them;
- one for each `Transaction` of `begin` and `transaction`;
- up to SHORT_MAX for the transactions of `atomically`, which stay open for the next transaction.

To close a transaction's connection ends even a transaction that the daemon refuses to end.  So a connection
on which the state of a transaction is unknown is always closed.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Final, TypeVar

import trio

from xsfs.xenstore import protocol
from xsfs.xenstore.background import open_background
from xsfs.xenstore.commands import Commands, Names, Path, Pipeline, encode_path
from xsfs.xenstore.connection import Connection, Reply
from xsfs.xenstore.errors import (
    DEFAULT_TIMEOUT,
    Conflict,
    ConnectionLost,
    RequestTimeout,
    StoreError,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.home import Home
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.reconnect import (
    CircuitBreaker,
    Connect,
    ReconnectingConnection,
    open_transport_by,
)
from xsfs.xenstore.transport import find_store, open_transport
from xsfs.xenstore.watches import Subscription, Watches

WALK_CONNECTIONS: Final = 4
"""How many connections walks over subtrees have.  Both daemons look at all their clients, and then serve one
request of each.  With four, a daemon computes two thirds of the time that it takes with one, and a request
of another task waits behind four of a walk."""

SHORT_MAX: Final = 4
"""How many transactions of `atomically` run at once.  A guest may have 10 transactions in all, which its
mounts and its other programs share."""

FAR_SECONDS: Final = 0.002
"""A round trip to the daemon of this host takes less, except now and then on a busy machine."""

CLEANUP_SECONDS: Final = 1.0
"""How long the end of a transaction may wait for a silent daemon."""

IN_DOUBT_MAX: Final = 20
"""How often `atomically` takes one of _MAYBE_CONFLICTS for the result of a conflict, before it raises it."""

_MAYBE_CONFLICTS: Final = frozenset(("ENOENT", "EIO"))
"""Errors that C xenstored may give in a transaction with a conflict.  A transaction is no snapshot, so a
listing may name a child that is gone when it is read."""

Result = TypeVar("Result")


class Transaction(Commands):
    """One Xenstore transaction.  `commit` or `rollback` end it, and so does the end of its connection."""

    def __init__(
        self,
        connection: Connection,
        tx_id: int,
        breaker: CircuitBreaker,
        deadline: float | None = None,
    ) -> None:
        """`deadline` is that of all its requests, in trio's time; if None, each has the time limit."""
        self.connection = connection
        self._breaker = breaker
        self._deadline = deadline
        self._tx_id: int | None = tx_id
        self.requests = 0
        """How many requests were sent in it."""
        self.requests_max: int | None = None
        """How many may be.  One more fails with XenstoreError `EQUOTA`, and nothing is sent."""
        self.on_requests: Callable[[Sequence[Request]], None] | None = None
        """Called with the requests of each pipeline before they are sent."""
        self.has_written = False
        """Whether a request was sent that changes anything."""
        self.has_ended = False
        """Whether a reply of the store has confirmed its end.  oxenstored cannot end one over its quota."""

    @property
    def payload_max(self) -> int:
        return self.connection.payload_max

    @property
    def is_open(self) -> bool:
        """Whether it has not ended yet."""
        return self._tx_id is not None and self.connection.alive

    async def pipeline(self, requests: Sequence[Request]) -> list[Reply]:
        if self._tx_id is None:
            raise TransactionEnded("the transaction has ended")
        if self.connection.alive:
            await self._breaker.check()
        if self.requests_max is not None and self.requests + len(requests) > self.requests_max:
            raise XenstoreError("EQUOTA", requests[0])
        self.requests += len(requests)
        if self.on_requests is not None:
            self.on_requests(requests)
        self.has_written = self.has_written or not all(r.repeatable for r in requests)
        try:
            with self._breaker.observing():
                return await self.connection.pipeline(requests, self._tx_id, self._deadline)
        except ConnectionLost as error:
            self._tx_id = None
            raise TransactionEnded(f"the transaction was lost: {error}") from error

    async def finish(self, requests: Sequence[Request], *, commit: bool = True) -> list[Reply]:
        """Send `requests` and end the transaction, in one round trip.

        Raises XenstoreError for the reply to the end: `EAGAIN` is a conflict.  The transaction is
        committed even if one of the requests failed, so look at their replies.  ConnectionLost and
        RequestTimeout mean that the outcome is unknown.
        """
        if self._tx_id is None:
            raise TransactionEnded("the transaction has ended")
        tx_id, self._tx_id = self._tx_id, None
        sent = (*requests, protocol.transaction_end(commit))
        try:
            *replies, end = await self.connection.pipeline(sent, tx_id, self._deadline)
        except ConnectionLost as error:
            if not error.unsent:
                raise
            raise TransactionEnded("the transaction was lost with its connection") from error
        self.has_ended = not isinstance(end, XenstoreError) or end.name == "EAGAIN"
        if isinstance(end, XenstoreError):
            # C xenstored ends a transaction in which a request failed with ENOMEM: the reply to that
            # request tells the reason.
            errors = [reply for reply in replies if isinstance(reply, XenstoreError)]
            raise errors[0] if errors and end.name != "EAGAIN" else end
        return replies

    async def commit(self) -> None:
        """Carry out all changes at once.  Raises Conflict if there was one: start again.

        ConnectionLost and RequestTimeout mean that the outcome is unknown.
        """
        await self.finish(())

    async def rollback(self) -> None:
        """Undo all changes, and end the transaction."""
        await self.finish((), commit=False)


class Store(Commands):
    """Xenstore as it is.  Made by `open_store`."""

    def __init__(self, nursery: trio.Nursery, connect: Connect, timeout: float) -> None:
        self._nursery = nursery
        self._connect = connect
        self._now = trio.lowlevel.current_clock().current_time
        self.home = Home()
        self._main = ReconnectingConnection(nursery, connect, timeout, self.home)
        self._walking = tuple(
            ReconnectingConnection(nursery, connect, timeout, self.home, is_extra=True)
            for _ in range(WALK_CONNECTIONS)
        )
        """The connections for walks, which `pipelines` gives."""
        self._short_limit = trio.CapacityLimiter(SHORT_MAX)
        self._idle: list[Connection] = []
        """Connections for transactions of `atomically`, with none open."""
        self.timeout = timeout
        self.breaker = CircuitBreaker(nursery, timeout, self._probe)
        self.watches = Watches(nursery, connect, timeout, self.breaker, self.home)
        self.requests = 0
        """How many requests were sent, apart from those of transactions and watches."""
        self.is_far = True
        """Whether no pipeline has ever taken less than FAR_SECONDS."""
        self.walks = 0
        """How many walks over subtrees run, which share what may be in flight."""
        self.transactions = 0
        """How many transactions that `begin` started are open."""

    @property
    def payload_max(self) -> int:
        connection = self._main.current
        return connection.payload_max if connection is not None else protocol.DEVICE_PAYLOAD_MAX

    @property
    def reconnects(self) -> int:
        """How often the connection for requests was opened again."""
        return self._main.reconnects

    async def connect(self) -> None:
        """Connect for the first time, and see that the store answers.

        A missing daemon is an error at once: `Store` only waits for a daemon that it has seen.
        """
        deadline = trio.current_time() + self.timeout
        self._main.adopt(await open_transport_by(self._connect, deadline, wait_for_daemon=False))
        await self.pipeline((protocol.directory(b"/"),))

    async def _probe(self) -> None:
        """Send a request on a new connection, which replaces the one that is not answered."""
        deadline = trio.current_time() + self.timeout
        connection = self._main.adopt(await open_transport_by(self._connect, deadline))
        await connection.pipeline((protocol.directory(b"/"),), deadline=deadline)

    def drop_connection(self, reason: str) -> None:
        """Close the connections to a store that violates the protocol.  The next request opens a new one."""
        for each in (self._main, *self._walking):
            each.close(reason)

    def pipelines(self) -> Sequence[Pipeline]:
        connection = self._main.current
        # The kernel has one queue for all who open its device.
        if self.is_far or connection is None or not connection.is_served_in_turn:
            return (self.pipeline,)
        return [partial(self.pipeline, by=each) for each in self._walking]

    async def pipeline(
        self, requests: Sequence[Request], by: ReconnectingConnection | None = None
    ) -> list[Reply]:
        """As in Commands.  If the connection was lost, requests are sent again that only read, or of which
        nothing was sent.

        by      the connection for the requests, if it is not the usual one; without a free descriptor for it
                the usual one serves
        """
        link = by or self._main
        if self.breaker.error is not None:
            await self.breaker.check()
        self.requests += len(requests)
        # Not `observing`, a generator: it adds 4 to the 65 microseconds of xsfs for an open, read and close.
        answers, start = self.breaker.answers, self._now()
        deadline = start + self.timeout
        failure: ConnectionLost | RequestTimeout | None = None
        try:
            while True:
                connection = link.current
                if connection is None or not connection.alive:
                    try:
                        connection = await link.get(deadline)
                    except ConnectionLost as error:
                        if error.is_local and link is not self._main:
                            link = self._main
                            continue
                        # A timeout explains more than the attempt to connect again, a lost connection less.
                        raise failure if isinstance(failure, RequestTimeout) else error from None
                try:
                    replies = await connection.pipeline(requests, 0, deadline)
                    break
                except (ConnectionLost, RequestTimeout) as error:
                    is_late = connection.alive or trio.current_time() >= deadline
                    if is_late or not (error.unsent or all(r.repeatable for r in requests)):
                        raise
                    failure = error
        except (ConnectionLost, RequestTimeout) as error:
            self.breaker.failed(error, answers, start)
            raise
        self.breaker.answered()
        if self.is_far and requests:
            self.is_far = self._now() - start >= FAR_SECONDS
        return replies

    async def _list_parts(self, path: bytes, too_big: XenstoreError) -> Names:
        """A node that never stops changing is listed in a transaction, in which it stands still."""
        with suppress(Conflict):
            return await super()._list_parts(path, too_big)
        # Not `atomically`: a commit would conflict with the very changes that disturb the listing.
        async with self._long(self.begin) as transaction:
            return await transaction.list(path)

    # -------------------------------------------------------------------------- transactions

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction with a connection of its own.

        It is committed at the end of the block unless it has ended before, and rolled back if the block
        raises.  The end of the block raises Conflict if there was one: start again.
        """
        async with self._long(self.begin) as transaction:
            yield transaction
            if transaction.is_open:
                await transaction.commit()

    @asynccontextmanager
    async def _long(
        self, begin: Callable[[], Awaitable[Transaction]]
    ) -> AsyncIterator[Transaction]:
        """A transaction with a connection of its own, which is rolled back if it does not end."""
        transaction = await begin()
        try:
            yield transaction
        finally:
            await self.roll_back(transaction)

    async def begin(self) -> Transaction:
        """Start a transaction with a connection of its own.  The caller must `abandon` it later."""
        await self.breaker.check()
        deadline = trio.current_time() + self.timeout
        with self.breaker.observing():
            connection = await self._open(deadline)
            try:
                tx_id = await self._start(connection, deadline)
            except BaseException:
                connection.close()
                raise
        self.transactions += 1
        return Transaction(connection, tx_id, self.breaker)

    async def roll_back(self, transaction: Transaction) -> None:
        """Roll the transaction back if it is open, and close its connection.

        Not only the latter: Linux cannot suspend a guest any more in which a descriptor of the device was
        closed with a transaction open.
        """
        await self._clean_up(transaction)
        self.abandon(transaction)

    async def _clean_up(self, transaction: Transaction) -> None:
        """Roll the transaction back if it is open, whether or not the caller is cancelled."""
        with (
            trio.CancelScope(deadline=trio.current_time() + CLEANUP_SECONDS, shield=True),
            suppress(StoreError),
        ):
            if transaction.is_open:
                await transaction.rollback()

    def abandon(self, transaction: Transaction) -> None:
        """Close the transaction's connection, which rolls back a transaction that is still open."""
        transaction.connection.close()
        self.transactions -= 1

    async def _open(self, deadline: float) -> Connection:
        transport = await open_transport_by(self._connect, deadline)
        connection = Connection(transport, self.timeout, home=self.home)
        self._nursery.start_soon(connection.run)
        return connection

    async def _start(self, connection: Connection, deadline: float) -> int:
        (reply,) = await connection.pipeline((protocol.transaction_start(),), 0, deadline)
        if isinstance(reply, XenstoreError):
            raise reply
        return protocol.decode_transaction_id(reply)

    async def atomically(
        self,
        work: Callable[[Transaction], Awaitable[Result]],
        begin: Callable[[], Awaitable[Transaction]] | None = None,
    ) -> Result:
        """Run `work` in a transaction and commit it, again and again while it conflicts.

        begin   starts each transaction, which may be long; if None, they are short ones

        `work` may end the transaction itself.  If it raises, the transaction is rolled back.  An error may be
        the result of a conflict, so `atomically` first finds out whether there is one, and then retries
        instead.  All attempts together take `timeout` at most, and a quarter of it more if the store stops
        answering near the end.

        Raises Conflict if it conflicted all the time.
        """
        await self.breaker.check()
        deadline = trio.current_time() + self.timeout
        with self.breaker.observing():
            in_doubt = 0
            while True:
                # The last attempt must not fail just because it started late.
                extended = max(deadline, trio.current_time() + self.timeout / 4)
                async with (
                    self._short_transaction(extended) if begin is None else self._long(begin)
                ) as transaction:
                    try:
                        result = await work(transaction)
                        if transaction.is_open:
                            await transaction.commit()
                        return result
                    except Exception as error:
                        if not await self._is_conflict(transaction, error):
                            raise
                        conflict = XenstoreError("EAGAIN", protocol.transaction_end(True))
                        if isinstance(error, XenstoreError) and transaction.has_written:
                            conflict = error
                in_doubt += conflict.name in _MAYBE_CONFLICTS
                if trio.current_time() >= deadline or in_doubt > IN_DOUBT_MAX:
                    raise conflict

    async def _is_conflict(self, transaction: Transaction, error: Exception) -> bool:
        """Whether `error`, which was met in the transaction, may be the result of a conflict.

        If the transaction has only read, this commits it to find out.
        """
        if isinstance(error, XenstoreError) and error.name == "EAGAIN":
            return True
        if not transaction.is_open:
            return False
        if transaction.has_written:
            return isinstance(error, XenstoreError) and error.name in _MAYBE_CONFLICTS
        try:
            await transaction.commit()
        except XenstoreError as end:
            return end.name == "EAGAIN"
        return False

    @asynccontextmanager
    async def _short_transaction(self, deadline: float) -> AsyncIterator[Transaction]:
        """A transaction on a connection that is used again if the transaction's end is certain."""
        with trio.move_on_at(deadline) as waiting:
            await self._short_limit.acquire()
        if waiting.cancelled_caught:
            raise RequestTimeout("Xenstore did not end other transactions in time")
        self.requests += 1
        try:
            connection, tx_id = await self._start_on_idle(deadline)
            transaction = Transaction(connection, tx_id, self.breaker, deadline)
            try:
                yield transaction
            finally:
                await self._clean_up(transaction)
                if transaction.has_ended:
                    self._idle.append(connection)
                else:
                    connection.close("the end of a transaction is uncertain")
        finally:
            self._short_limit.release()

    async def _start_on_idle(self, deadline: float) -> tuple[Connection, int]:
        while True:
            was_idle = bool(self._idle)
            connection = self._idle.pop() if was_idle else await self._open(deadline)
            if not connection.alive:
                continue
            try:
                return connection, await self._start(connection, deadline)
            except XenstoreError:
                self._idle.append(connection)  # no transaction was started
                raise
            except BaseException as error:
                connection.close("the start of a transaction is uncertain")
                if not (was_idle and isinstance(error, ConnectionLost)):
                    raise

    # ------------------------------------------------------------------------------- watches

    def watch(self, path: Path) -> AbstractAsyncContextManager[Subscription]:
        """The events of a node and all below it, while the block runs.

        The first event comes immediately and is for the node itself.  An event is the path of the changed
        node, in the form (absolute, relative) in which `path` is given.
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

    path        the socket or device; if None, the one that libxenstore would use
    timeout     seconds within which each request must be answered
    connect     how to connect to a store that has no path

    Raises StoreUnavailable, ConnectionLost, RequestTimeout.
    """
    if connect is None:
        # Absolute: connections are opened later, too, and a daemon changes its working directory.
        found = os.path.abspath(path if path is not None else find_store(os.environ))
        connect = partial(open_transport, found)

    async with open_background() as nursery:
        store = Store(nursery, connect, timeout)
        nursery.start_soon(store.watches.run)
        await store.connect()
        yield store
