"""Connects the clients of a Unix socket, guest.<domid>.sock, to the ring of that domain."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import Final

from .ring import Ring
from .xenbus import QUEUE, Client, TooLong, Xenbus

GUEST_PORT: Final = 1
"""The event channel port of the ring, the same in every domain."""

HELD_MAX: Final = 1 << 20
"""How much is held for a client that does not read before it is dropped."""

RETRY_MS: Final = 2
"""There is no event for room in the queue of a datagram socket."""


class GuestBridge(threading.Thread):
    """Serves all clients of one domain, and is never held up by any of them.

    A client that does not read its replies is not read from either; watch events still pile up for
    it, and past HELD_MAX bytes it is dropped (EOF).  So is one whose request has a payload of more
    than 4096 bytes: the daemon would give the whole ring up.  When the daemon takes no requests,
    since too many are outstanding or since it is gone, clients just wait.
    """

    def __init__(self, directory: str, domid: int) -> None:
        super().__init__(name=f"xenstore-guest-{domid}", daemon=True)
        self.path = os.path.join(directory, f"guest.{domid}.sock")
        self._directory = directory
        self._daemon_path = os.path.join(directory, "evtchn")
        self._attach(domid)
        self._listener = _bind(socket.SOCK_STREAM, self.path)
        self._listener.listen(64)
        self._stopped, self._stopper = socket.socketpair()
        self._kick_due = False
        self._next_domid: int | None = None
        self._resumed = threading.Event()
        self._xenbus = Xenbus()
        self._clients: dict[Client, socket.socket] = {}
        self.start()

    def _attach(self, domid: int) -> None:
        """Open the ring and the event channel of this domain."""
        self._evtchn_path = os.path.join(self._directory, f"evtchn.{domid}")
        self._wakeup = struct.pack("=II", domid, GUEST_PORT)
        self._ring = Ring(os.path.join(self._directory, f"ring.{domid}"))
        self._evtchn = _bind(socket.SOCK_DGRAM, self._evtchn_path)

    def _detach(self) -> None:
        self._evtchn.close()
        self._ring.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._evtchn_path)

    def resume_as(self, domid: int) -> None:
        """The guest was migrated: it goes on as this domain, which must be introduced.  The socket stays."""
        self._resumed.clear()
        self._next_domid = domid
        self._stopper.send(b"m")
        if not self._resumed.wait(60):
            raise TimeoutError("requests of the guest are not answered")

    def stop(self) -> None:
        """Drop all clients, and the socket."""
        self._stopper.send(b"x")
        self.join()
        for sock in (*self._clients.values(), self._listener, self._stopped, self._stopper):
            sock.close()
        self._detach()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def run(self) -> None:
        while True:
            self._pump()
            ready = self._wait()
            if self._stopped.fileno() in ready and self._stopped.recv(1) == b"x":
                return
            if self._evtchn.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._evtchn.recv(16)
            # Requests are only taken in here, and asked in _pump: what a client leaves behind is
            # undone before whoever connects after it has closed is heard.
            for client, sock in list(self._clients.items()):
                events = ready.get(sock.fileno(), 0)
                if events & ~select.POLLOUT:
                    self._read(client, sock, everything=bool(events & ~select.POLLIN))
            if self._listener.fileno() in ready:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    sock = self._listener.accept()[0]
                    sock.setblocking(False)
                    self._clients[self._xenbus.open()] = sock

    def _wait(self) -> dict[int, int]:
        poll = select.poll()
        for sock in self._stopped, self._evtchn, self._listener:
            poll.register(sock, select.POLLIN)
        for client, sock in self._clients.items():
            wanted = select.POLLIN if len(client.requests) < QUEUE else 0
            # A hang-up is told of in any case.
            poll.register(sock, wanted | (select.POLLOUT if client.out else 0))
        return dict(poll.poll(RETRY_MS if self._kick_due else None))

    def _pump(self) -> None:
        """Move all that can be moved, but for what is still to be read from clients."""
        replies = self._ring.get()
        self._xenbus.feed_ring(replies)
        for client, sock in list(self._clients.items()):
            if client.out:
                self._write(client, sock)
        if self._next_domid is not None and self._xenbus.is_idle:
            self._detach()
            self._attach(self._next_domid)
            self._next_domid = None
            self._xenbus.resume()
            self._resumed.set()
        # Before a migration, what is under way is answered, and nothing else is asked.
        for client in list(self._clients if self._next_domid is None else ()):
            try:
                self._xenbus.advance(client)
            except TooLong:
                self._drop(client)
        if self._clients:
            # One who sends a lot must not always be the first to fill the room there is.
            client = next(iter(self._clients))
            self._clients[client] = self._clients.pop(client)
        moved = self._ring.put(self._xenbus.to_ring)
        del self._xenbus.to_ring[:moved]
        if replies or moved or self._kick_due:
            self._kick()

    def _kick(self) -> None:
        self._kick_due = False
        try:
            self._evtchn.sendto(self._wakeup, self._daemon_path)
        except BlockingIOError:
            self._kick_due = True
        except (ConnectionRefusedError, FileNotFoundError):
            pass  # no daemon: nobody hears it, as in reality

    def _read(self, client: Client, sock: socket.socket, *, everything: bool) -> None:
        """Take requests: one helping, or after a hang-up all that the client had still sent."""
        try:
            while data := sock.recv(QUEUE):
                client.requests += data
                if not everything:
                    return
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        self._drop(client)

    def _write(self, client: Client, sock: socket.socket) -> None:
        try:
            del client.out[: sock.send(client.out)]
        except BlockingIOError:
            pass
        except ConnectionError:
            # The hang-up is seen to when its last requests are read.
            client.out.clear()
        if len(client.out) > HELD_MAX:
            self._drop(client)

    def _drop(self, client: Client) -> None:
        self._clients.pop(client).close()
        self._xenbus.close(client)


def _bind(kind: socket.SocketKind, path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.setblocking(False)
    sock.bind(path)
    return sock
