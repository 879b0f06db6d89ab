"""A connection over a long way, as ProxyCommand of ssh: `delay.py HOST PORT SECONDS`.

It joins standard input and output with HOST:PORT.  Each way takes half of SECONDS, whatever is already
on it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import deque

SIZE = 65536


class Way:
    """One direction: what is read from one descriptor is written to the other, later."""

    def __init__(self, source: int, target: int, seconds: float) -> None:
        self._source = source
        self._target = target
        self._seconds = seconds
        self._queue: deque[tuple[float, bytes]] = deque()
        self._came = threading.Semaphore(0)

    def read(self) -> None:
        while True:
            data = os.read(self._source, SIZE)
            self._queue.append((time.monotonic() + self._seconds, data))
            self._came.release()
            if not data:
                return

    def write(self) -> None:
        while True:
            self._came.acquire()
            due, data = self._queue.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            if not data:
                os._exit(0)  # one way has ended, and so has the connection
            while data:
                data = data[os.write(self._target, data) :]


def main() -> None:
    host, port, seconds = sys.argv[1:]
    with socket.create_connection((host, int(port))) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = [
            Way(0, sock.fileno(), float(seconds) / 2),
            Way(sock.fileno(), 1, float(seconds) / 2),
        ]
        for way in ways:
            threading.Thread(target=way.read, daemon=True).start()
        threads = [threading.Thread(target=way.write, daemon=True) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
