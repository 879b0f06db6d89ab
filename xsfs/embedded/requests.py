"""The requests of the embedded store: one table maps each operation to its handler.

`Requests` owns the `Database` and knows all connections.  Any task of the store may call it with one
request.  It handles the request completely and queues the reply and all events that the request
causes.  The caller sends what is queued.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from xsfs.embedded import control
from xsfs.embedded.client_connection import (
    ClientConnection,
    clients_of,
    transactions_of,
    watches_of,
)
from xsfs.embedded.control import Result
from xsfs.embedded.database import Database
from xsfs.embedded.domains import DOM0, DOMID_LIMIT, Change, Domain
from xsfs.embedded.record import (
    PATH_MAX,
    ROOT,
    Record,
    Refused,
    absolute,
    format_perms,
    home_of,
    is_path,
    parent_of,
    unsigned,
)
from xsfs.embedded.transaction import DatabaseTransaction
from xsfs.xenstore import protocol
from xsfs.xenstore.background import run_in_thread
from xsfs.xenstore.protocol import Op

log = logging.getLogger(__name__)


class _Request(NamedTuple):
    """The parts of one request that a handler needs.

    tx      the transaction that it is part of
    """

    client: ClientConnection
    tx_id: int
    payload: bytes
    tx: DatabaseTransaction | None

    @property
    def domid(self) -> int:
        return self.client.domid

    @property
    def string(self) -> bytes:
        """The payload, if it is one string."""
        # Here xenstored forgets to set EINVAL and replies with the name of its last error.
        if not self.payload or self.payload.find(b"\0") != len(self.payload) - 1:
            raise Refused("EINVAL")
        return self.payload[:-1]

    @property
    def path(self) -> bytes:
        return absolute(self.string, self.domid)

    def strings(self, least: int, most: int = protocol.PAYLOAD_MAX) -> list[bytes]:
        """All strings of the payload.  As in xenstored, bytes after the last NUL do not count."""
        strings = self.payload.split(b"\0")[:-1]
        if not least <= len(strings) <= most:
            raise Refused("EINVAL")
        return strings


class Requests:
    def __init__(self) -> None:
        self.connections: set[ClientConnection] = set()
        self.database = Database(self._fire_watches)

    async def serve(self, connection: ClientConnection, request: protocol.Message) -> None:
        """Handle one request.  Only a memory report has a checkpoint, while a thread writes it."""
        op, req_id, tx_id, payload = request
        try:
            result = self._handle(connection, op, tx_id, payload)
            if callable(result):
                # The file may be on a slow disk, or in a mount that this thread serves.
                await run_in_thread(result)
                result = None
            reply = b"OK\0" if result is None else result
            if len(reply) > protocol.PAYLOAD_MAX:
                raise Refused("E2BIG")
        except Refused as refused:
            op, reply = Op.ERROR, refused.name.encode() + b"\0"
        except Exception:
            # A fault in one handler must not end the store for all clients.
            log.exception("request %d of domain %d failed", op, connection.domid)
            op, reply = Op.ERROR, b"EIO\0"
        connection.queue_reply(op, req_id, tx_id, reply)
        if op == Op.WATCH:
            connection.queue_first_event()

    def _handle(self, connection: ClientConnection, op: int, tx_id: int, payload: bytes) -> Result:
        found = _HANDLERS.get(op)
        if found is None:
            raise Refused("ENOSYS")
        handler, flags = found
        if flags & _PRIVILEGED and connection.domid != DOM0:
            raise Refused("EACCES")
        tx = None
        if tx_id and not flags & _NO_TRANSACTION:
            tx = connection.transactions.get(tx_id)
            if tx is None:
                raise Refused("ENOENT")
        return handler(self, _Request(connection, tx_id, payload, tx))

    def _fire_watches(self, change: Change) -> None:
        """Queue the event of a change for each watch whose domain may get it."""
        watched = {path := change.path}
        while not change.exact and path != ROOT:
            path = parent_of(path)
            watched.add(path)
        for connection in self.connections:
            if connection.watches and self.database.domains.may_read(connection.domid, change):
                connection.queue_events(change.path, watched)

    def drop_connections(self, domid: int) -> None:
        for connection in clients_of(self.connections, domid):
            self.connections.discard(connection)
            connection.close()

    # -- requests for nodes

    def _readable(self, request: _Request) -> Record:
        return self.database.readable(request.domid, request.path, request.tx)

    def _read_value(self, request: _Request) -> bytes:
        return self._readable(request).value

    def _directory(self, request: _Request) -> bytes:
        return self._readable(request).children

    def _directory_part(self, request: _Request) -> bytes:
        path, offset_text = request.strings(2, 2)
        node = self.database.readable(request.domid, absolute(path, request.domid), request.tx)
        offset = unsigned(offset_text)
        generation = b"%d\0" % node.generation
        listing = node.children
        # A part has only whole names, and room for the NUL that marks the end of the listing.
        room = protocol.PAYLOAD_MAX - len(generation) - 1
        if len(listing) - offset <= room:
            return generation + listing[offset:] + b"\0"
        end = listing.rfind(b"\0", offset, offset + room) + 1
        return generation + listing[offset:end]

    def _get_perms(self, request: _Request) -> bytes:
        return format_perms(self._readable(request).perms)

    def _write(self, request: _Request) -> None:
        path, nul, value = request.payload.partition(b"\0")
        if not nul:
            raise Refused("EINVAL")
        self.database.write(request.domid, absolute(path, request.domid), value, request.tx)

    def _mkdir(self, request: _Request) -> None:
        self.database.mkdir(request.domid, request.path, request.tx)

    def _rm(self, request: _Request) -> None:
        self.database.rm(request.domid, request.path, request.tx)

    def _set_perms(self, request: _Request) -> None:
        path, *perms = request.strings(2)
        self.database.set_perms(request.domid, absolute(path, request.domid), perms, request.tx)

    # -- watches

    def _watch(self, request: _Request) -> None:
        client, quotas = request.client, self.database.quotas
        given_path, token = request.strings(2, 2)
        path = absolute(given_path, request.domid)
        special = path.startswith(b"@")
        if not (len(path) <= PATH_MAX if special else is_path(path, quotas[b"path-max"])):
            raise Refused("EINVAL")
        if (path, token) in client.watches:
            raise Refused("EEXIST")
        used = watches_of(self.connections, client.domid)
        if client.domid != DOM0 and used > quotas[b"watches"]:
            raise Refused("E2BIG")
        client.watches[path, token] = len(path) - len(given_path)

    def _unwatch(self, request: _Request) -> None:
        path, token = request.strings(2, 2)
        if request.client.watches.pop((absolute(path, request.domid), token), None) is None:
            raise Refused("ENOENT")

    def _reset_watches(self, request: _Request) -> None:
        request.client.reset()

    # -- transactions

    def _transaction_start(self, request: _Request) -> bytes:
        if request.tx is not None:
            raise Refused("EBUSY")
        client = request.client
        used = transactions_of(self.connections, client.domid)
        if client.domid != DOM0 and used > self.database.quotas[b"transactions"]:
            raise Refused("ENOSPC")
        # A number of 32 bits, and not 0, which means no transaction.
        client.last_transaction = client.last_transaction % 0xFFFFFFFF + 1
        client.transactions[client.last_transaction] = DatabaseTransaction(client.domid)
        return b"%d\0" % client.last_transaction

    def _transaction_end(self, request: _Request) -> None:
        if request.payload not in (b"T\0", b"F\0"):
            raise Refused("EINVAL")
        if request.tx is None:
            raise Refused("ENOENT")
        del request.client.transactions[request.tx_id]
        if request.payload == b"T\0":
            self.database.commit(request.tx)

    # -- domains

    def _introduce(self, request: _Request) -> None:
        domid, _, port, *_ = map(unsigned, request.strings(3))
        if port == 0 or domid >= DOMID_LIMIT:
            raise Refused("EINVAL")
        if domid != DOM0:
            self.database.introduce(domid)
            for client in clients_of(self.connections, domid):
                client.reset()

    def _connected_guest(self, request: _Request) -> Domain:
        domid = unsigned(request.string)
        if domid == DOM0:
            raise Refused("EINVAL")
        return self.database.domains.connected(domid)

    def _release(self, request: _Request) -> None:
        domain = self._connected_guest(request)
        if domain.holders:
            # As in xenstored, RELEASE of a target only undoes the newest SET_TARGET's hold on it.
            domain.holders.popitem()
        else:
            self.drop_connections(domain.domid)
            self.database.forget(domain)

    def _resume(self, request: _Request) -> None:
        self._connected_guest(request)

    def _set_target(self, request: _Request) -> None:
        domid, target, *_ = map(unsigned, request.strings(2))
        self.database.domains.set_target(domid, target)

    def _get_domain_path(self, request: _Request) -> bytes:
        return home_of(unsigned(request.string)) + b"\0"

    def _is_domain_introduced(self, request: _Request) -> bytes:
        domid = unsigned(request.string)
        # xenstored always reports DOMID_SELF as introduced.
        introduced = domid == DOMID_LIMIT or self.database.domains.is_introduced(domid)
        return b"T\0" if introduced else b"F\0"

    def _control(self, request: _Request) -> Result:
        return control.run(self.database, self.connections, request.strings(0))


_Handler = Callable[[Requests, _Request], Result]

_PRIVILEGED: Final = 1
_NO_TRANSACTION: Final = 2  # xenstored ignores the tx_id of such a request

_HANDLERS: Final[dict[int, tuple[_Handler, int]]] = {
    Op.CONTROL: (Requests._control, _PRIVILEGED),
    Op.DIRECTORY: (Requests._directory, 0),
    Op.READ: (Requests._read_value, 0),
    Op.GET_PERMS: (Requests._get_perms, 0),
    Op.WATCH: (Requests._watch, _NO_TRANSACTION),
    Op.UNWATCH: (Requests._unwatch, _NO_TRANSACTION),
    Op.TRANSACTION_START: (Requests._transaction_start, 0),
    Op.TRANSACTION_END: (Requests._transaction_end, 0),
    Op.INTRODUCE: (Requests._introduce, _PRIVILEGED),
    Op.RELEASE: (Requests._release, _PRIVILEGED),
    Op.GET_DOMAIN_PATH: (Requests._get_domain_path, 0),
    Op.WRITE: (Requests._write, 0),
    Op.MKDIR: (Requests._mkdir, 0),
    Op.RM: (Requests._rm, 0),
    Op.SET_PERMS: (Requests._set_perms, 0),
    Op.IS_DOMAIN_INTRODUCED: (Requests._is_domain_introduced, _PRIVILEGED),
    Op.RESUME: (Requests._resume, _PRIVILEGED),
    Op.SET_TARGET: (Requests._set_target, _PRIVILEGED),
    Op.RESET_WATCHES: (Requests._reset_watches, 0),
    Op.DIRECTORY_PART: (Requests._directory_part, 0),
}
