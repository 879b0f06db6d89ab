"""What a Linux guest's kernel does between the openers of /dev/xen/xenbus and the one ring.

Bytes in, bytes out; no sockets.  After drivers/xen/xenbus: requests get numbers of their own in the
ring, transactions and watches belong to the client that made them, and end with it.

Unlike the kernel, and like the daemon's own socket: WATCH once more with the same path and token is
EEXIST, UNWATCH of an unknown one ENOENT, a refused WATCH gets an ERROR reply, and a message may
have a payload of 4096 bytes.
"""

from __future__ import annotations

import contextlib
from typing import Final, NamedTuple

from xsfs.xenstore.protocol import Op

from .client import HEADER

PAYLOAD_MAX: Final = 4096

QUEUE: Final = 16 * 1024
"""How much may wait for the ring, or for a client to read it, before (its) requests wait too."""

IN_FLIGHT: Final = 64
"""How many requests of a client are asked at once: their replies must fit with what is held."""


class TooLong(Exception):
    """A message over the limit: the daemon would stop serving the ring it came in."""


class Client:
    """One opener of the device."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.out = bytearray()
        """Whole messages for the client; who writes them to it takes them out."""
        self.gone = False
        self.requests = bytearray()
        """What has come from the client, and is not in the ring yet."""
        self.in_flight = 0
        self.watches: set[bytes] = set()
        """Payloads of WATCH as in the ring."""
        self.transactions: set[int] = set()
        self.lost_transactions: set[int] = set()
        """Those that were open at a migration."""

    def give(self, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        self.out += HEADER.pack(op, req_id, tx_id, len(payload)) + payload

    def refuse(self, req_id: int, tx_id: int, error: bytes) -> None:
        """Answer at once, maybe before earlier requests are: so does the kernel."""
        self.give(Op.ERROR, req_id, tx_id, error + b"\0")


class _Request(NamedTuple):
    """A request in the ring, under a number that only the ring knows."""

    client: Client
    op: int
    req_id: int
    tx_id: int
    payload: bytes


class Xenbus:
    def __init__(self) -> None:
        self.to_ring = bytearray()
        """Whole messages for the ring; who copies them there takes them out."""
        self._from_ring = bytearray()
        self._clients: dict[int, Client] = {}
        self._requests: dict[int, _Request] = {}
        self._kernel = Client(0)
        self._opened = 0
        self._sent = 0

    # -- clients

    def open(self) -> Client:
        self._opened += 1
        client = self._clients[self._opened] = Client(self._opened)
        return client

    def close(self, client: Client) -> None:
        """The client is gone: ask its last requests, and undo what it has left.

        What is under way is undone when it is answered.
        """
        with contextlib.suppress(TooLong):
            while message := _take(client.requests):
                self._request(client, *message)
        client.gone = True
        del self._clients[client.number]
        for payload in client.watches:
            self._send(client, Op.UNWATCH, payload)
        for tx_id in client.transactions:
            self._send(client, Op.TRANSACTION_END, b"F\0", ring_tx=tx_id)

    # -- migration

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._requests and not self.to_ring

    def resume(self) -> None:
        """The ring leads to another store now: set all watches again there.  Transactions are lost."""
        for client in self._clients.values():
            for payload in client.watches:
                self._send(self._kernel, Op.WATCH, payload)
            client.lost_transactions |= client.transactions
            client.transactions.clear()

    # -- from a client to the ring

    def advance(self, client: Client) -> None:
        """Ask as many of the client's requests as there is room for, now.

        TooLong: the next one is none, and the client must be closed.
        """
        while (
            client.in_flight < IN_FLIGHT
            and len(client.out) < QUEUE
            and len(self.to_ring) < QUEUE
            and (message := _take(client.requests))
        ):
            self._request(client, *message)

    def _request(self, client: Client, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        if op in (Op.WATCH, Op.UNWATCH):
            self._watch(client, op, req_id, tx_id, payload)
        elif (
            op != Op.TRANSACTION_START
            and tx_id
            and tx_id not in client.transactions | client.lost_transactions
        ):
            client.refuse(req_id, tx_id, b"ENOENT")
        elif op == Op.TRANSACTION_END and payload not in (b"T\0", b"F\0"):
            client.refuse(req_id, tx_id, b"EINVAL")
        elif op == Op.TRANSACTION_END and tx_id in client.lost_transactions:
            client.lost_transactions.discard(tx_id)
            if payload == b"T\0":
                client.refuse(req_id, tx_id, b"EAGAIN")
            else:
                client.give(op, req_id, tx_id, b"OK\0")
        else:
            self._send(client, op, payload, req_id, tx_id, ring_tx=tx_id)

    def _watch(self, client: Client, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """The token tells the ring's events apart; those of one client differ by its own tokens."""
        path, nul, token = payload.partition(b"\0")
        if token:
            payload = path + nul + b"%d:" % client.number + token
        if len(payload) > PAYLOAD_MAX:
            client.refuse(req_id, tx_id, b"EINVAL")
        else:
            self._send(client, op, payload, req_id, tx_id)

    def _send(
        self,
        client: Client,
        op: int,
        payload: bytes,
        req_id: int = 0,
        tx_id: int = 0,
        *,
        ring_tx: int = 0,
    ) -> None:
        while True:
            self._sent = self._sent % 0xFFFFFFFF + 1
            if self._sent not in self._requests:
                break
        client.in_flight += 1
        self._requests[self._sent] = _Request(client, op, req_id, tx_id, payload)
        self.to_ring += HEADER.pack(op, self._sent, ring_tx, len(payload)) + payload

    # -- from the ring to the clients

    def feed_ring(self, data: bytes) -> None:
        self._from_ring += data
        while message := _take(self._from_ring):
            op, number, tx_id, payload = message
            if op == Op.WATCH_EVENT:
                self._event(payload)
            elif number in self._requests:
                self._reply(self._requests.pop(number), op, tx_id, payload)

    def _event(self, payload: bytes) -> None:
        path, _, rest = payload.partition(b"\0")
        number, colon, token = rest.partition(b":")
        client = self._clients.get(int(number)) if colon and number.isdigit() else None
        if client:
            client.give(Op.WATCH_EVENT, 0, 0, path + b"\0" + token)

    def _reply(self, request: _Request, op: int, tx_id: int, payload: bytes) -> None:
        client = request.client
        client.in_flight -= 1
        if client is self._kernel:
            return
        if request.op == Op.TRANSACTION_END:
            # However it ended; the kernel forgets it too.
            client.transactions.discard(request.tx_id)
        elif op == request.op:
            self._done(request, payload)
        if not client.gone:
            watch = request.op in (Op.WATCH, Op.UNWATCH)
            client.give(op, request.req_id, request.tx_id if watch else tx_id, payload)

    def _done(self, request: _Request, payload: bytes) -> None:
        """A request that has made, or ended, something of its client's."""
        client = request.client
        if request.op == Op.TRANSACTION_START:
            tx_id = int(payload.rstrip(b"\0"))
            if client.gone:
                self._send(client, Op.TRANSACTION_END, b"F\0", ring_tx=tx_id)
            client.transactions.add(tx_id)
        elif request.op == Op.WATCH:
            if client.gone:
                self._send(client, Op.UNWATCH, request.payload)
            client.watches.add(request.payload)
        elif request.op == Op.UNWATCH:
            client.watches.discard(request.payload)


def _take(buffer: bytearray) -> tuple[int, int, int, bytes] | None:
    """Take one whole message out of the buffer; None if there is none."""
    if len(buffer) < HEADER.size:
        return None
    op, req_id, tx_id, length = HEADER.unpack_from(buffer)
    if length > PAYLOAD_MAX:
        raise TooLong(f"a payload of {length} bytes")
    end = HEADER.size + length
    if len(buffer) < end:
        return None
    payload = bytes(buffer[HEADER.size : end])
    del buffer[:end]
    return op, req_id, tx_id, payload
