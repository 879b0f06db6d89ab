"""A store that is farther away than anything else takes time: a relay that counts round trips.

It delivers requests at once.  It keeps what the daemon sends until daemon and client both sleep, and then
delivers all of it: that is one round trip.  So the count does not depend on how busy the machine is.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

PAUSE: Final = 0.01
"""Seconds between two looks at the processes.  Longer than xsfs sleeps for a reply before it sends more
requests: two ticks of the kernel."""

SIZE: Final = 1 << 16


class _Connection:
    def __init__(self, client: socket.socket, upstream: str) -> None:
        self.client = client
        self.daemon = socket.socket(socket.AF_UNIX)
        self.daemon.connect(upstream)
        self.kept = b""
        self.unsent = b""
        """Requests for which the daemon has no room: oxenstored accepts more as its replies are taken."""

    def sleeps(self) -> bool:
        return _sleeps(_peer(self.client)) and _sleeps(_peer(self.daemon))

    def close(self) -> None:
        self.client.close()
        self.daemon.close()


class DistantStore:
    """A context manager; `path` is the relay's socket, `trips` the count."""

    def __init__(self, path: Path, upstream: str) -> None:
        self.path = str(path)
        self.trips = 0
        self._upstream = upstream
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._connections: list[_Connection] = []
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ended)
        self._thread.join()
        os.close(self._end)
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _run(self) -> None:
        while True:
            ready = self._ready(PAUSE)
            if self._end in ready:
                return
            if ready:
                self._relay(ready)
            elif any(each.kept for each in self._connections) and self._all_sleep():
                self.trips += 1
                for connection in self._connections:
                    kept, connection.kept = connection.kept, b""
                    with suppress(OSError):  # the client has gone
                        connection.client.sendall(kept)

    def _ready(self, seconds: float) -> list[int | socket.socket]:
        sockets = [sock for each in self._connections for sock in (each.client, each.daemon)]
        watched: list[int | socket.socket] = [self._end, self._listener, *sockets]
        blocked = [each.daemon for each in self._connections if each.unsent]
        readable, writable, _ = select.select(watched, blocked, (), seconds)
        return readable + writable

    def _all_sleep(self) -> bool:
        # Two looks: see PAUSE.  What was sent before they fell asleep is there by the second one.
        for seconds in (PAUSE, 0.0):
            if not all(each.sleeps() for each in self._connections) or self._ready(seconds):
                return False
        return True

    def _relay(self, ready: list[int | socket.socket]) -> None:
        if self._listener in ready:
            self._connections.append(_Connection(self._listener.accept()[0], self._upstream))
        for connection in list(self._connections):
            with suppress(OSError):
                with suppress(BlockingIOError):
                    connection.kept += connection.daemon.recv(SIZE, socket.MSG_DONTWAIT)
                if connection.client in ready:
                    if not (data := connection.client.recv(SIZE)):
                        raise ConnectionResetError
                    connection.unsent += data
                with suppress(BlockingIOError):
                    sent = connection.daemon.send(connection.unsent, socket.MSG_DONTWAIT)
                    connection.unsent = connection.unsent[sent:]
                continue
            self._connections.remove(connection)
            connection.close()


def _peer(sock: socket.socket) -> int:
    """The process at the other end."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def _sleeps(pid: int) -> bool:
    """Whether none of its threads has anything to do."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            if thread.read_text().rpartition(")")[2].split()[0] != "S":
                return False
    return True
