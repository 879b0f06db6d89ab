"""One client of the embedded store: its connection, its watches, and what is queued for it.

A `Connection` belongs to the task which reads it.  Any code which serves any connection may queue
output to it (`queue_event`) and `flush` it, because an event goes to whoever watches; all that is
synchronous.  While the socket does not take all, one task (`_drain`) alone sends.

The queue is bounded.  Past OUTPUT_HIGH bytes no more requests are taken from the connection until
it has read its replies, so replies stay below OUTPUT_HIGH and one reply more.  Events come from
others' requests, which must not wait: past OUTPUT_MAX the connection is closed.  (xenstored keeps
any number of events for a socket, and drops those which a guest does not read in 20 s.)
An event identical to one which is still queued is dropped, except special ones.  An event handed to
the kernel no longer counts as queued, since the client may have acted on it already.
"""

from __future__ import annotations

import itertools
import socket
from typing import Final

import trio

from xsfs.embedded.domains import Change
from xsfs.embedded.record import home_of, parent_of
from xsfs.embedded.transaction import Transaction
from xsfs.xenstore import protocol

OUTPUT_HIGH: Final = 256 << 10
OUTPUT_MAX: Final = 4 << 20

_numbers = itertools.count()


class Watch:
    """`stripped` is how much of a path its events leave out: a relative watch is told of relative
    paths.  `number` grows, since a connection's events come in the order of its watches."""

    __slots__ = ("connection", "number", "path", "stripped", "token")

    def __init__(self, connection: Connection, path: bytes, token: bytes, relative: bool) -> None:
        self.connection = connection
        self.path = path
        self.token = token
        self.stripped = len(home_of(connection.domid)) + 1 if relative else 0
        self.number = next(_numbers)

    def tell(self, path: bytes) -> None:
        self.connection.queue_event(path[self.stripped :], self.token)


class Watches:
    """All watches, by path: a change looks at its own path and those above, not at each watch."""

    def __init__(self) -> None:
        self._by_path: dict[bytes, dict[Watch, None]] = {}

    def add(self, watch: Watch) -> None:
        self._by_path.setdefault(watch.path, {})[watch] = None

    def remove(self, watch: Watch) -> None:
        found = self._by_path[watch.path]
        del found[watch]
        if not found:
            del self._by_path[watch.path]

    def of(self, change: Change) -> list[Watch]:
        """The watches which a change is for, in their order."""
        by_path = self._by_path
        path = change.path
        found = list(by_path.get(path, ()))
        if not change.exact:
            while path != b"/":
                path = parent_of(path)
                found += by_path.get(path, ())
            found.sort(key=lambda watch: watch.number)
        return found


class Connection:
    def __init__(
        self, sock: socket.socket, domid: int, dirty: set[Connection], nursery: trio.Nursery
    ) -> None:
        self.sock = sock
        self.domid = domid
        self.watches: dict[tuple[bytes, bytes], Watch] = {}
        self.transactions: dict[int, Transaction] = {}
        self._last_transaction = 0
        self._dirty = dirty
        self._nursery = nursery
        self._out = bytearray()
        self._queued_events: set[bytes] = set()
        # Set while a task sends what the socket did not take at once.
        self._drained: trio.Event | None = None
        self._closed = False

    # -- output

    def queue_reply(self, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        if not self._closed:
            self._out += protocol.encode(op, req_id, tx_id, payload)
            self._dirty.add(self)

    def queue_event(self, path: bytes, token: bytes) -> None:
        payload = b"%b\0%b\0" % (path, token)
        if len(payload) > protocol.PAYLOAD_MAX or self._closed:
            return
        if not path.startswith(b"@"):
            if payload in self._queued_events:
                return
            self._queued_events.add(payload)
        if len(self._out) > OUTPUT_MAX:
            self.close()
            return
        self.queue_reply(protocol.Op.WATCH_EVENT, 0, 0, payload)

    @property
    def full(self) -> bool:
        return len(self._out) >= OUTPUT_HIGH

    def flush(self) -> None:
        """Send what the socket takes without waiting; a task does the rest."""
        if self._drained is None and not self._closed:
            self._send()
            if self._out and not self._closed:
                self._drained = trio.Event()
                self._nursery.start_soon(self._drain, self._drained)

    def _send(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._out[:sent]
        self._queued_events.clear()

    async def _drain(self, drained: trio.Event) -> None:
        try:
            while self._out and not self._closed:
                await trio.lowlevel.wait_writable(self.sock)
                self._send()
        finally:
            self._drained = None
            drained.set()

    async def drain(self) -> None:
        """Wait until the client has taken all that was queued."""
        while self._drained is not None:
            await self._drained.wait()

    def close(self) -> None:
        """End the connection: its tasks are cancelled, and the one which reads it cleans up."""
        self._closed = True
        self._out.clear()
        self._nursery.cancel_scope.cancel()

    # -- transactions

    def new_transaction_number(self) -> int:
        while True:
            self._last_transaction = (self._last_transaction + 1) & 0xFFFFFFFF
            if self._last_transaction and self._last_transaction not in self.transactions:
                return self._last_transaction
