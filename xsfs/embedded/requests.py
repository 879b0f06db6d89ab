"""The requests of the embedded store: what each means, in one table.

`Requests` owns the `Store` (the data) and the `Watches`, and knows all connections.  It is called
with one request at a time, does it completely, and queues the reply and whatever events it causes;
it never waits.  Whoever calls it sends what was queued.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final

from xsfs.embedded.client_connection import Connection, Watch, Watches
from xsfs.embedded.database import WATCHES_MAX, Store
from xsfs.embedded.domains import DOM0, DOMID_LIMIT, Change
from xsfs.embedded.record import PATH_LENGTH_MAX, Refused, absolute, format_perms, home_of, is_path
from xsfs.embedded.transaction import Transaction
from xsfs.xenstore import protocol
from xsfs.xenstore.protocol import Op

log = logging.getLogger(__name__)

OK: Final = b"OK\0"

_Handler = Callable[["Requests", Connection, bytes, Transaction | None], bytes]


# --------------------------------------------------------------------------- arguments of requests


def _one_string(payload: bytes) -> bytes:
    # xenstored forgets to say EINVAL, and replies with the name of whatever error was last.
    if not payload or payload.find(b"\0") != len(payload) - 1:
        raise Refused("EINVAL")
    return payload[:-1]


def _all_strings(payload: bytes) -> list[bytes]:
    """The strings of a payload; like xenstored, without what follows the last NUL."""
    return payload.split(b"\0")[:-1]


_NUMBER = re.compile(rb"[ \t\n\v\f\r]*([+-]?[0-9]+)")


def _number(text: bytes) -> int:
    """atoi(): what is no number is 0."""
    match = _NUMBER.match(text)
    return int(match[1]) if match else 0


def _domid(text: bytes) -> int:
    return _number(text) & 0xFFFFFFFF


class Requests:
    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self._watches = Watches()
        self.store = Store(self._tell)

    def serve(self, connection: Connection, request: protocol.Message) -> None:
        op, req_id, tx_id, payload = request
        try:
            reply = self._handle(connection, op, tx_id, payload)
            if len(reply) > protocol.PAYLOAD_MAX:
                raise Refused("E2BIG")
        except Refused as refused:
            op, reply = Op.ERROR, refused.name.encode() + b"\0"
        except Exception:
            # One request's fault must not end the store for all.
            log.exception("request %d of domain %d failed", op, connection.domid)
            op, reply = Op.ERROR, b"EIO\0"
        connection.queue_reply(op, req_id, tx_id, reply)
        if op == Op.WATCH:
            # The newest watch; its first event follows the reply.
            watch = next(reversed(connection.watches.values()))
            watch.tell(watch.path)

    def _handle(self, connection: Connection, op: int, tx_id: int, payload: bytes) -> bytes:
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
        return handler(self, connection, payload, tx)

    def _tell(self, change: Change) -> None:
        """Queue the event of a change for all who watch it and may know of it."""
        watches = self._watches.of(change)
        permitted: dict[Connection, bool] = {}
        for watch in watches:
            connection = watch.connection
            may = permitted.get(connection)
            if may is None:
                may = permitted[connection] = self.store.domains.may_know(connection.domid, change)
            if may:
                watch.tell(change.path)

    def reset(self, connection: Connection) -> None:
        """Drop the connection's watches and transactions."""
        domain = self.store.domains.known.get(connection.domid)
        for watch in connection.watches.values():
            self._watches.remove(watch)
            if domain is not None and domain.watches:
                domain.watches -= 1
        connection.watches.clear()
        for tx in connection.transactions.values():
            self.store.abort(tx)
        connection.transactions.clear()

    def drop_connections(self, domid: int) -> None:
        for connection in self.connections:
            if connection.domid == domid:
                self.reset(connection)
                connection.close()

    # -- requests for nodes

    def _read_value(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path = absolute(_one_string(payload), client.domid)
        return self.store.readable(client.domid, path, tx).value

    def _directory(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path = absolute(_one_string(payload), client.domid)
        node = self.store.readable(client.domid, path, tx)
        if node.child_bytes > protocol.PAYLOAD_MAX:
            raise Refused("E2BIG")
        return node.listing

    def _directory_part(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        strings = _all_strings(payload)
        if len(strings) != 2:
            raise Refused("EINVAL")
        node = self.store.readable(client.domid, absolute(strings[0], client.domid), tx)
        offset = _domid(strings[1])
        generation = b"%d\0" % node.generation
        listing = node.listing
        # Whole names only, and room for the NUL which marks the end.
        room = protocol.PAYLOAD_MAX - len(generation) - 1
        if len(listing) - offset <= room:
            return generation + listing[offset:] + b"\0"
        end = listing.rfind(b"\0", offset, offset + room) + 1
        return generation + listing[offset:end]

    def _get_perms(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path = absolute(_one_string(payload), client.domid)
        return format_perms(self.store.readable(client.domid, path, tx).perms)

    def _write(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path, nul, value = payload.partition(b"\0")
        if not nul:
            raise Refused("EINVAL")
        self.store.write(client.domid, absolute(path, client.domid), value, tx)
        return OK

    def _mkdir(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self.store.mkdir(client.domid, absolute(_one_string(payload), client.domid), tx)
        return OK

    def _rm(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self.store.rm(client.domid, absolute(_one_string(payload), client.domid), tx)
        return OK

    def _set_perms(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path, *perms = _all_strings(payload) or [b""]
        if not perms:
            raise Refused("EINVAL")
        self.store.set_perms(client.domid, absolute(path, client.domid), perms, tx)
        return OK

    # -- watches

    @staticmethod
    def _watch_arguments(client: Connection, payload: bytes) -> tuple[bytes, bytes, bool]:
        strings = _all_strings(payload)
        if len(strings) != 2:
            raise Refused("EINVAL")
        path, token = strings
        return absolute(path, client.domid), token, not path.startswith((b"/", b"@"))

    def _watch(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path, token, relative = self._watch_arguments(client, payload)
        if not (len(path) <= PATH_LENGTH_MAX if path.startswith(b"@") else is_path(path)):
            raise Refused("EINVAL")
        if (path, token) in client.watches:
            raise Refused("EEXIST")
        domain = self.store.domains.known[client.domid]
        if client.domid != DOM0 and domain.watches > WATCHES_MAX:
            raise Refused("E2BIG")
        domain.watches += 1
        watch = Watch(client, path, token, relative)
        client.watches[path, token] = watch
        self._watches.add(watch)
        return OK

    def _unwatch(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path, token, _ = self._watch_arguments(client, payload)
        watch = client.watches.pop((path, token), None)
        if watch is None:
            raise Refused("ENOENT")
        self._watches.remove(watch)
        self.store.domains.known[client.domid].watches -= 1
        return OK

    def _reset_watches(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self.reset(client)
        return OK

    # -- transactions

    def _transaction_start(
        self, client: Connection, payload: bytes, tx: Transaction | None
    ) -> bytes:
        if tx is not None:
            raise Refused("EBUSY")
        started = self.store.start(client.domid)
        started.number = client.new_transaction_number()
        client.transactions[started.number] = started
        return b"%d\0" % started.number

    def _transaction_end(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        if payload not in (b"T\0", b"F\0"):
            raise Refused("EINVAL")
        if tx is None:
            raise Refused("ENOENT")
        del client.transactions[tx.number]
        if payload == b"T\0":
            self.store.commit(tx)
        else:
            self.store.abort(tx)
        return OK

    # -- domains

    def _introduce(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        strings = _all_strings(payload)
        if len(strings) < 3:
            raise Refused("EINVAL")
        domid = _domid(strings[0])
        if _number(strings[2]) <= 0 or domid >= DOMID_LIMIT:
            raise Refused("EINVAL")
        if domid != DOM0:
            self.store.introduce(domid)
            for connection in self.connections:
                if connection.domid == domid:
                    self.reset(connection)
        return OK

    def _introduced_domid(self, payload: bytes) -> int:
        domid = _domid(_one_string(payload))
        if domid == DOM0:
            raise Refused("EINVAL")
        if not self.store.domains.is_introduced(domid):
            raise Refused("ENOENT")
        return domid

    def _release(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        domid = self._introduced_domid(payload)
        self.drop_connections(domid)
        self.store.release(domid)
        return OK

    def _resume(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self._introduced_domid(payload)
        return OK

    def _set_target(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        strings = _all_strings(payload)
        if len(strings) < 2:
            raise Refused("EINVAL")
        domid, target = map(_domid, strings[:2])
        if not self.store.domains.is_introduced(domid) or not self.store.domains.is_introduced(
            target
        ):
            raise Refused("ENOENT")
        self.store.domains.known[domid].target = target
        return OK

    def _get_domain_path(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        return home_of(_domid(_one_string(payload))) + b"\0"

    def _is_domain_introduced(
        self, client: Connection, payload: bytes, tx: Transaction | None
    ) -> bytes:
        domid = _domid(_one_string(payload))
        # DOMID_SELF is always there.
        return b"T\0" if domid == DOMID_LIMIT or self.store.domains.is_introduced(domid) else b"F\0"

    def _control(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        match _all_strings(payload):
            case [b"help"]:
                return b"check\t\nprint\t<string>\nhelp\t\n\0"
            case [b"print", text]:
                log.info("control: %s", text.decode("ascii", "backslashreplace"))
                return OK
            case [b"check"]:
                return OK
            case _:
                raise Refused("EINVAL")


_PRIVILEGED: Final = 1
_NO_TRANSACTION: Final = 2
"""xenstored does not look at the tx_id of such a request."""

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
