"""One client of the embedded store: its connection, watches, transactions and unsent output.

The task that reads a `ClientConnection` owns it.  Any task that serves a request may queue output
for any connection (`queue_events`) and `flush` it, because an event goes to every watcher.  All of
that is synchronous.  While the socket does not accept everything, only one task (`drain`) sends.

Invariants:

- The output is bounded.  At OUTPUT_HIGH bytes the store stops serving the connection's requests
  until the client has read its replies.  Events come from other clients' requests, which must not
  wait: past OUTPUT_MAX bytes the store closes the connection.  (xenstored keeps any number of events
  for a socket.  It drops events that a guest does not read within 20 s.)
- No event is queued twice at one time, except special ones.  An event that the kernel has accepted
  no longer counts as queued, because the client may have acted on it.
"""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable
from typing import Final

import trio

from xsfs.embedded.transaction import DatabaseTransaction
from xsfs.xenstore import protocol

OUTPUT_HIGH: Final = 256 << 10
OUTPUT_MAX: Final = 4 << 20


def clients_of(connections: Iterable[ClientConnection], domid: int) -> list[ClientConnection]:
    return [each for each in connections if each.domid == domid]


def watches_of(connections: Iterable[ClientConnection], domid: int) -> int:
    """How many watches the domain has."""
    return sum(len(each.watches) for each in clients_of(connections, domid))


def transactions_of(connections: Iterable[ClientConnection], domid: int) -> int:
    """How many open transactions the domain has."""
    return sum(len(each.transactions) for each in clients_of(connections, domid))


class ClientConnection:
    def __init__(self, sock: socket.socket, domid: int, nursery: trio.Nursery) -> None:
        self.sock = sock
        self.domid = domid
        self.watches: dict[tuple[bytes, bytes], int] = {}
        """By path and token: how many bytes of a path the events omit, so that a relative watch gets
        relative paths."""
        self.transactions: dict[int, DatabaseTransaction] = {}
        self.last_transaction = 0
        self._nursery = nursery
        self.unsent = bytearray()
        """The output that the socket has not accepted."""
        self._queued_events: set[bytes] = set()
        self._sending = trio.Lock()
        """Taken while a task sends output that the socket did not accept at once."""
        self._closed = False

    def queue_reply(self, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        if not self._closed:
            self.unsent += protocol.encode(op, req_id, tx_id, payload)

    def queue_events(self, path: bytes, watched: Container[bytes]) -> None:
        """The event of a change at `path` for each watch at one of the paths `watched`."""
        for (watch_path, token), omitted in self.watches.items():
            if watch_path in watched:
                self._queue_event(path[omitted:], token)

    def queue_first_event(self) -> None:
        """The first event of the newest watch, which follows the reply to the WATCH."""
        (path, token), omitted = next(reversed(self.watches.items()))
        self._queue_event(path[omitted:], token)

    def _queue_event(self, path: bytes, token: bytes) -> None:
        payload = b"%b\0%b\0" % (path, token)
        if len(payload) > protocol.PAYLOAD_MAX or self._closed:
            return
        if not path.startswith(b"@"):
            if payload in self._queued_events:
                return
            self._queued_events.add(payload)
        if len(self.unsent) > OUTPUT_MAX:
            self.close()
            return
        self.queue_reply(protocol.Op.WATCH_EVENT, 0, 0, payload)

    @property
    def full(self) -> bool:
        return len(self.unsent) >= OUTPUT_HIGH

    def flush(self) -> None:
        """Send what the socket accepts without waiting, and let a task send the rest."""
        if self.unsent and not self._sending.locked():
            self._send()
            if self.unsent:
                self._nursery.start_soon(self.drain)

    def _send(self) -> None:
        try:
            sent = self.sock.send(self.unsent)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self.unsent[:sent]
        self._queued_events.clear()

    async def drain(self) -> None:
        """Send until the socket has accepted all output."""
        async with self._sending:
            while self.unsent:
                await trio.lowlevel.wait_writable(self.sock)
                self._send()

    def reset(self) -> None:
        self.watches.clear()
        self.transactions.clear()

    def close(self) -> None:
        """Discard the output and cancel the connection's tasks; its reading task cleans up."""
        self._closed = True
        self.unsent.clear()
        self._nursery.cancel_scope.cancel()
