"""A whole xenstored in this process, behind the real wire protocol.

`EmbeddedStore` owns a `Store` (the data), the `Watches`, and the connections.  Each connection has
one task which reads it; all the work of a request is synchronous, so requests are atomic, and no
lock is needed.  Output which a request has caused, for whichever connection, is sent at the end of
the batch in which the request came: a client which sends many requests at once gets their replies
in one piece.  After BURST requests of one client the others have their turn.  What happens to a
client which does not read is said in store_watch.py.

It does what C xenstored 4.17 does, and plays the hypervisor's part as well: INTRODUCE of a domain
which does not exist makes it exist, and any number of connections may speak for one guest.
Of xenstored's protections these are missing: the rate limit of guests' writes, the quotas for
memory and for outstanding requests.  CONTROL knows `check`, `help` and `print`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import stat
import uuid
from collections.abc import Callable
from typing import Final

import trio

from xsfs import wire
from xsfs.store_node import Refused, absolute, format_perms, home_of, is_path
from xsfs.store_transaction import Transaction
from xsfs.store_watch import Connection, Watch, Watches
from xsfs.tree import (
    DOM0,
    DOMID_LIMIT,
    WATCHES_MAX,
    Change,
    Store,
)
from xsfs.wire import Op

log = logging.getLogger(__name__)

RECEIVE: Final = 64 << 10
BURST: Final = 128
BACKLOG: Final = 128

OK: Final = b"OK\0"

_Handler = Callable[["EmbeddedStore", Connection, bytes, Transaction | None], bytes]


# --------------------------------------------------------------------------- arguments of requests


def _one_string(payload: bytes) -> bytes:
    if payload.find(b"\0") != len(payload) - 1:
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


# -------------------------------------------------------------------------------------- the store


class EmbeddedStore:
    def __init__(self, *, populate: bool = True) -> None:
        self._populate = populate
        self._watches = Watches()
        self._store = Store(self._tell)
        self._connections: set[Connection] = set()
        self._dirty: set[Connection] = set()
        """The connections with output that nobody has tried to send yet."""
        self._nursery: trio.Nursery | None = None
        if populate:
            for path, value, perms in _dom0_nodes():
                self._make(path, value, perms)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the sockets of `connect` until cancelled, and end all of them then."""
        if self._nursery is not None:
            raise RuntimeError("serve() runs already")
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def connect(self, domid: int = 0) -> socket.socket:
        """A socket (not blocking) on which the store is served to that domain."""
        if self._nursery is None:
            raise RuntimeError("connect() only works while serve() runs")
        self._welcome(domid)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        theirs.setblocking(False)
        self._nursery.start_soon(self._serve_socket, ours, domid)
        return theirs

    async def listen(
        self,
        path: str,
        domid: int = 0,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve whoever connects to the Unix socket `path`, until cancelled.

        The socket file is there, and `task_status` started, before this first waits.  It replaces
        a socket file on which nobody listens; OSError (EADDRINUSE) if somebody does.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            _bind(listener, path)
            identity = _identity(path)
            try:
                self._welcome(domid)
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    await self._accept(listener, domid, nursery)
            finally:
                # Somebody else's file may be there by now.
                if identity is not None and _identity(path) == identity:
                    os.unlink(path)

    async def _accept(self, listener: socket.socket, domid: int, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionError):
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.warning("cannot accept a connection: %s", error)
                await trio.sleep(0.1)
                continue
            sock.setblocking(False)
            nursery.start_soon(self._serve_socket, sock, domid)

    # -- domains

    def introduce(self, domid: int) -> None:
        """The domain exists from now on."""
        self._store.introduce(domid)
        self._flush()

    def destroy(self, domid: int) -> None:
        """The domain ceases to exist, and with it its nodes, its watches, and its connections."""
        if domid == DOM0:
            raise ValueError("domain 0 cannot be destroyed")
        self._drop_connections(domid)
        self._store.destroy(domid)
        self._flush()

    def _welcome(self, domid: int) -> None:
        if not self._store.is_introduced(domid):
            self._store.create_domain(domid)
            if self._populate:
                for path, value, perms in _guest_nodes(domid):
                    self._make(path, value, perms)
            self.introduce(domid)

    def _make(self, path: bytes, value: bytes, perms: list[bytes] | None) -> None:
        self._store.write(DOM0, path, value)
        if perms:
            self._store.set_perms(DOM0, path, perms)

    def _drop_connections(self, domid: int) -> None:
        for connection in self._connections:
            if connection.domid == domid:
                self._reset(connection)
                connection.close()

    # -- serving one connection

    async def _serve_socket(self, sock: socket.socket, domid: int) -> None:
        with sock:
            if not self._store.is_introduced(domid):
                # Gone since the socket was made.
                return
            async with trio.open_nursery() as nursery:
                connection = Connection(sock, domid, self._dirty, nursery)
                self._connections.add(connection)
                try:
                    await self._read(connection)
                finally:
                    self._connections.discard(connection)
                    self._reset(connection)
                    # The last replies, as far as the client has room for them.
                    connection.flush()
                    self._dirty.discard(connection)
                    nursery.cancel_scope.cancel()

    async def _read(self, connection: Connection) -> None:
        parser = wire.Parser(wire.PAYLOAD_MAX)
        sock = connection.sock
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                data = sock.recv(RECEIVE)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            parser.feed(data)
            try:
                await self._serve_requests(connection, parser)
            except wire.WireError as error:
                log.warning("closing a connection of domain %d: %s", connection.domid, error)
                return

    async def _serve_requests(self, connection: Connection, parser: wire.Parser) -> None:
        served = 0
        try:
            while (request := parser.next()) is not None:
                self._serve_request(connection, request)
                served += 1
                if connection.full:
                    self._flush()
                    await connection.drain()
                elif served % BURST == 0:
                    self._flush()
                    await trio.lowlevel.checkpoint()
        finally:
            self._flush()

    def _serve_request(self, connection: Connection, request: wire.Message) -> None:
        op, req_id, tx_id, payload = request
        try:
            reply = self._handle(connection, op, tx_id, payload)
            if len(reply) > wire.PAYLOAD_MAX:
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

    def _flush(self) -> None:
        while self._dirty:
            self._dirty.pop().flush()

    def _tell(self, change: Change) -> None:
        """Queue the event of a change for all who watch it and may know of it."""
        watches = self._watches.of(change)
        permitted: dict[Connection, bool] = {}
        for watch in watches:
            connection = watch.connection
            may = permitted.get(connection)
            if may is None:
                may = permitted[connection] = self._store.may_know(connection.domid, change)
            if may:
                watch.tell(change.path)

    def _reset(self, connection: Connection) -> None:
        """Drop the connection's watches and transactions."""
        domain = self._store.domains.get(connection.domid)
        for watch in connection.watches.values():
            self._watches.remove(watch)
            if domain is not None and domain.watches:
                domain.watches -= 1
        connection.watches.clear()
        for tx in connection.transactions.values():
            self._store.abort(tx)
        connection.transactions.clear()

    # -- requests for nodes

    def _read_value(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path = absolute(_one_string(payload), client.domid)
        return self._store.readable(client.domid, path, tx).value

    def _directory(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path = absolute(_one_string(payload), client.domid)
        node = self._store.readable(client.domid, path, tx)
        if node.child_bytes > wire.PAYLOAD_MAX:
            raise Refused("E2BIG")
        return node.listing

    def _directory_part(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        strings = _all_strings(payload)
        if len(strings) != 2:
            raise Refused("EINVAL")
        node = self._store.readable(client.domid, absolute(strings[0], client.domid), tx)
        offset = _domid(strings[1])
        generation = b"%d\0" % node.generation
        listing = node.listing
        # Whole names only, and room for the NUL which marks the end.
        room = wire.PAYLOAD_MAX - len(generation) - 1
        if len(listing) - offset <= room:
            return generation + listing[offset:] + b"\0"
        end = listing.rfind(b"\0", offset, offset + room) + 1
        return generation + listing[offset:end]

    def _get_perms(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path = absolute(_one_string(payload), client.domid)
        return format_perms(self._store.readable(client.domid, path, tx).perms)

    def _write(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path, nul, value = payload.partition(b"\0")
        if not nul:
            raise Refused("EINVAL")
        self._store.write(client.domid, absolute(path, client.domid), value, tx)
        return OK

    def _mkdir(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self._store.mkdir(client.domid, absolute(_one_string(payload), client.domid), tx)
        return OK

    def _rm(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self._store.rm(client.domid, absolute(_one_string(payload), client.domid), tx)
        return OK

    def _set_perms(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        path, *perms = _all_strings(payload) or [b""]
        if not perms:
            raise Refused("EINVAL")
        self._store.set_perms(client.domid, absolute(path, client.domid), perms, tx)
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
        if not (len(path) <= 2048 if path.startswith(b"@") else is_path(path)):
            raise Refused("EINVAL")
        if (path, token) in client.watches:
            raise Refused("EEXIST")
        domain = self._store.domains[client.domid]
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
        self._store.domains[client.domid].watches -= 1
        return OK

    def _reset_watches(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self._reset(client)
        return OK

    # -- transactions

    def _transaction_start(
        self, client: Connection, payload: bytes, tx: Transaction | None
    ) -> bytes:
        if tx is not None:
            raise Refused("EBUSY")
        started = self._store.start(client.domid)
        tx_id = client.new_transaction_id()
        client.transactions[tx_id] = started
        return b"%d\0" % tx_id

    def _transaction_end(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        if payload not in (b"T\0", b"F\0"):
            raise Refused("EINVAL")
        if tx is None:
            raise Refused("ENOENT")
        tx_id = next(number for number, open_tx in client.transactions.items() if open_tx is tx)
        del client.transactions[tx_id]
        if payload == b"T\0":
            self._store.commit(tx)
        else:
            self._store.abort(tx)
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
            self._store.introduce(domid)
            for connection in self._connections:
                if connection.domid == domid:
                    self._reset(connection)
        return OK

    def _introduced_domid(self, payload: bytes) -> int:
        domid = _domid(_one_string(payload))
        if domid == DOM0:
            raise Refused("EINVAL")
        if not self._store.is_introduced(domid):
            raise Refused("ENOENT")
        return domid

    def _release(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        domid = self._introduced_domid(payload)
        self._drop_connections(domid)
        self._store.release(domid)
        return OK

    def _resume(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        self._introduced_domid(payload)
        return OK

    def _set_target(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        strings = _all_strings(payload)
        if len(strings) < 2:
            raise Refused("EINVAL")
        domid, target = map(_domid, strings[:2])
        if not self._store.is_introduced(domid) or not self._store.is_introduced(target):
            raise Refused("ENOENT")
        self._store.domains[domid].target = target
        return OK

    def _get_domain_path(self, client: Connection, payload: bytes, tx: Transaction | None) -> bytes:
        return home_of(_domid(_one_string(payload))) + b"\0"

    def _is_domain_introduced(
        self, client: Connection, payload: bytes, tx: Transaction | None
    ) -> bytes:
        domid = _domid(_one_string(payload))
        # DOMID_SELF is always there.
        return b"T\0" if domid == DOMID_LIMIT or self._store.is_introduced(domid) else b"F\0"

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
    Op.CONTROL: (EmbeddedStore._control, _PRIVILEGED),
    Op.DIRECTORY: (EmbeddedStore._directory, 0),
    Op.READ: (EmbeddedStore._read_value, 0),
    Op.GET_PERMS: (EmbeddedStore._get_perms, 0),
    Op.WATCH: (EmbeddedStore._watch, _NO_TRANSACTION),
    Op.UNWATCH: (EmbeddedStore._unwatch, _NO_TRANSACTION),
    Op.TRANSACTION_START: (EmbeddedStore._transaction_start, 0),
    Op.TRANSACTION_END: (EmbeddedStore._transaction_end, 0),
    Op.INTRODUCE: (EmbeddedStore._introduce, _PRIVILEGED),
    Op.RELEASE: (EmbeddedStore._release, _PRIVILEGED),
    Op.GET_DOMAIN_PATH: (EmbeddedStore._get_domain_path, 0),
    Op.WRITE: (EmbeddedStore._write, 0),
    Op.MKDIR: (EmbeddedStore._mkdir, 0),
    Op.RM: (EmbeddedStore._rm, 0),
    Op.SET_PERMS: (EmbeddedStore._set_perms, 0),
    Op.IS_DOMAIN_INTRODUCED: (EmbeddedStore._is_domain_introduced, _PRIVILEGED),
    Op.RESUME: (EmbeddedStore._resume, _PRIVILEGED),
    Op.SET_TARGET: (EmbeddedStore._set_target, _PRIVILEGED),
    Op.RESET_WATCHES: (EmbeddedStore._reset_watches, 0),
    Op.DIRECTORY_PART: (EmbeddedStore._directory_part, 0),
}


# ------------------------------------------------------------------------------- the socket file


def _bind(listener: socket.socket, path: str) -> None:
    listener.setblocking(False)
    # Before bind(): then the file never exists with another mode.
    os.fchmod(listener.fileno(), 0o600)
    try:
        listener.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not _is_stale(path):
            raise
        os.unlink(path)
        listener.bind(path)
    listener.listen(BACKLOG)


def _is_stale(path: str) -> bool:
    """Whether this is a socket on which nobody listens."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


# ------------------------------------------------------------------------------- the first nodes

_Made = tuple[bytes, bytes, list[bytes] | None]
"""Path, value, and permissions unless they are the parent's."""


def _below(base: bytes, entries: dict[str, str], perms: list[bytes] | None = None) -> list[_Made]:
    return [(base + b"/" + key.encode(), value.encode(), perms) for key, value in entries.items()]


def _uuid_of(domid: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"xsfs domain {domid}"))


def _dom0_nodes() -> list[_Made]:
    """What xen-init-dom0 and libxl have written once domain 0 is up."""
    home = home_of(DOM0)
    vm = f"/vm/{_uuid_of(DOM0)}"
    return [
        *_below(
            home,
            {
                "domid": "0",
                "name": "Domain-0",
                "vm": vm,
                "control": "",
                "control/feature-poweroff": "1",
                "control/feature-reboot": "1",
                "data": "",
                "device-model": "",
                "backend": "",
                "libxl/disable_udev": "1",
                "memory/target": "4194304",
                "memory/static-max": "8388608",
                "memory/freemem-slack": "262144",
            },
        ),
        *_below(b"/local/pool/0", {"name": "Pool-0", "uuid": _uuid_of(-1)}),
        *_below(vm.encode(), {"name": "Domain-0", "uuid": _uuid_of(DOM0)}),
        *_below(b"/libxl", {"0/dm-version": "qemu_xen"}),
    ]


def _guest_nodes(domid: int) -> list[_Made]:
    """The home of a guest, as libxl makes it."""
    home = home_of(domid)
    vm = f"/vm/{_uuid_of(domid)}"
    toolstacks = [b"n0", b"r%d" % domid]
    guests = [b"n%d" % domid]
    return [
        (home, b"", toolstacks),
        (vm.encode(), b"", toolstacks),
        *_below(vm.encode(), {"name": f"domain-{domid}", "uuid": _uuid_of(domid)}),
        *_below(
            home,
            {
                "vm": vm,
                "name": f"domain-{domid}",
                "cpu/0/availability": "online",
                "memory/static-max": "1048576",
                "memory/target": "1048576",
                "device": "",
                "control": "",
                "control/platform-feature-multiprocessor-suspend": "1",
                "control/platform-feature-xs_reset_watches": "1",
            },
        ),
        *_below(
            home,
            {
                "control/shutdown": "",
                "control/feature-poweroff": "",
                "control/feature-reboot": "",
                "control/feature-suspend": "",
                "control/sysrq": "",
                "device/suspend/event-channel": "",
                "data": "",
                "drivers": "",
                "feature": "",
                "attr": "",
                "error": "",
            },
            guests,
        ),
        *_below(home, {"domid": str(domid), "store/port": "1", "store/ring-ref": "1044476"}),
    ]
