"""A whole xenstored in this process, behind the real wire protocol.

`EmbeddedStore` owns the sockets and the tasks; `Requests` owns the data.  One task reads each
connection.  A request is synchronous, so requests are atomic and need no lock.  At the end of its
turn a task flushes the output that its requests have caused for any connection, so a client that
sends many requests at once gets few large replies.  client_connection.py says how the store
treats a client that does not read.

The store behaves like C xenstored 4.17 and plays the hypervisor's part, too: INTRODUCE of a domain
that does not exist creates it, and any number of connections may speak for one guest.
docs/embedded.md lists what it lacks.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from xsfs.embedded.client_connection import ClientConnection
from xsfs.embedded.contents import create_guest_nodes, create_host_nodes
from xsfs.embedded.domains import DOM0
from xsfs.embedded.requests import Requests
from xsfs.xenstore import protocol

log = logging.getLogger(__name__)

RECEIVE: Final = 64 << 10
TURN: Final = 0.0005
"""Seconds.  All connections with received requests share this time for one turn of each."""
BACKLOG: Final = 128


class EmbeddedStore:
    """See the module's docstring.

    nursery     runs the tasks that serve the sockets of `connect`
    populate    whether the store has the first nodes of a host and of its guests
    """

    def __init__(self, nursery: trio.Nursery, *, populate: bool = True) -> None:
        self._nursery = nursery
        self._populate = populate
        self._requests = Requests()
        self._database = self._requests.database
        self._busy = 0
        """How many connections have received requests that they have not handled."""
        if populate:
            create_host_nodes(self._database)

    def connect(self, domid: int = 0) -> socket.socket:
        """A non-blocking socket on which the store serves the domain."""
        self._welcome(domid)
        ours, theirs = socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._nursery.start_soon(self._serve_socket, ours, domid)
        return theirs

    async def listen(
        self,
        path: str,
        domid: int = 0,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve all clients that connect to the Unix socket `path`, until cancelled.

        The socket file exists, and `task_status` has started, before this method first waits.  It
        replaces a socket file on which no process listens.  If a process listens, or the file is
        not a socket, it raises OSError (EADDRINUSE).
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            _bind(listener, path)
            bound = os.stat(path)
            try:
                self._welcome(domid)

                async def serve_stream(stream: trio.SocketStream) -> None:
                    sock = socket.socket(fileno=stream.socket.detach())
                    sock.setblocking(False)
                    await self._serve_socket(sock, domid)

                task_status.started()
                wrapped = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                await trio.serve_listeners(serve_stream, [wrapped])
            finally:
                with suppress(FileNotFoundError):
                    # Another process may have replaced the file.
                    if os.path.samestat(os.stat(path), bound):
                        os.unlink(path)

    def introduce(self, domid: int) -> None:
        """The domain exists from now on, and is introduced."""
        self._database.introduce(domid)
        self._flush()

    def destroy(self, domid: int) -> None:
        """The domain no longer exists; the store removes its nodes and closes its connections.

        ValueError for domain 0.
        """
        if domid == DOM0:
            raise ValueError("domain 0 cannot be destroyed")
        self._requests.drop_connections(domid)
        self._database.destroy(domid)
        self._flush()

    def _welcome(self, domid: int) -> None:
        if not self._database.domains.is_connected(domid):
            self._database.create(domid)
            if self._populate:
                create_guest_nodes(self._database, domid)
            self.introduce(domid)

    async def _serve_socket(self, sock: socket.socket, domid: int) -> None:
        with sock:
            if not self._database.domains.is_connected(domid):
                # Destroyed since the connection was opened.
                return
            async with trio.open_nursery() as nursery:
                connection = ClientConnection(sock, domid, nursery)
                self._requests.connections.add(connection)
                try:
                    await self._read(connection)
                finally:
                    self._requests.connections.discard(connection)
                    # Send the last replies, as far as the socket accepts them.
                    connection.flush()
                    nursery.cancel_scope.cancel()

    async def _read(self, connection: ClientConnection) -> None:
        parser = protocol.Parser(protocol.PAYLOAD_MAX)
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
            self._busy += 1
            turn_end = time.perf_counter() + TURN / self._busy
            try:
                for request in parser.feed(data):
                    await self._requests.serve(connection, request)
                    if connection.full or time.perf_counter() >= turn_end:
                        self._flush()
                        await trio.lowlevel.checkpoint()
                        if connection.full:
                            await connection.drain()
                        turn_end = time.perf_counter() + TURN / self._busy
            finally:
                self._busy -= 1
                self._flush()
            if parser.error is not None:
                log.warning("closing a connection of domain %d: %s", connection.domid, parser.error)
                return

    def _flush(self) -> None:
        for connection in self._requests.connections:
            connection.flush()


def _bind(listener: socket.socket, path: str) -> None:
    # Before bind(), so the file never exists with another mode.
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
    """Whether this is a socket on which no process listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return Path(path).is_socket() and probe.connect_ex(path) == errno.ECONNREFUSED
