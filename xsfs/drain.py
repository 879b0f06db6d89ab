"""A socket that is read at once, however busy the event loop is: the connection of the watches.

The socket takes some 70 events, and oxenstored holds 2000 more for a watcher; past that whoever writes
waits, and if he writes by the socket he waits for good.  Of a client that pipelines its writes
oxenstored takes 70,000 a second, so 30 ms in which the loop does anything else would be too long.  So a
thread does nothing but read, and keeps what has come until the loop takes it.

The thread needs the interpreter to go on, and may wait for it for SWITCH_SECONDS each time and more,
in which the socket fills.  So when much comes at once it asks for more than the socket holds
(MSG_WAITALL): then it is the kernel that goes on reading, for a moment, without the interpreter.

What a `DrainedTransport` owns: the socket, the thread, what was received and not yet taken, and an
eventfd that is readable while there is any of that.

What always holds:

- Only the thread receives, only the loop takes, sends and closes.  Each of the two counts for itself.
- What is held is bounded.  Past HELD_MAX the connection ends, upon which all watches are set again on a
  new one, and every reader is told to look again at all of it.
- The descriptors are closed by whichever of the two is done with them last, as the number of a closed
  one may belong to another file at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from xsfs.transport import SocketTransport, Transport

HELD_MAX: Final = 16 << 20
"""Bytes.  Some 300,000 events, which take the loop a second."""

SWITCH_SECONDS: Final = 0.001
"""For sys.setswitchinterval: how long the loop may keep the interpreter from the thread."""

MUCH: Final = 1024
"""Bytes.  Where so much is there at once, the thread was late."""

RUSH_SIZE: Final = 1 << 18
RUSH_FIRST: Final = 5_000
RUSH_MAX: Final = 40_000
"""How much is then asked for at once, and how many microseconds it is waited for: the longer the more
has come the last time, as the daemon sends what it holds only twice as fast as more is written."""


class DrainedTransport:
    """See the module's text."""

    def __init__(self, inner: SocketTransport) -> None:
        self._inner = inner
        self._socket = inner.socket
        self._limit(0)
        self.payload_max = inner.payload_max
        self.watch_blocks = inner.watch_blocks
        self.one_at_a_time = inner.one_at_a_time
        self._arrived = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._chunks: deque[bytes] = deque()
        self._received = 0
        self._taken = 0
        self._failure: OSError | None = None
        self._users = 2
        self._lock = threading.Lock()
        threading.Thread(target=self._drain, name="xsfs-watches", daemon=True).start()

    def fileno(self) -> int:
        return self._arrived

    def outlet(self) -> int:
        return self._inner.outlet()

    def send(self, messages: Sequence[bytes]) -> bytes:
        return self._inner.send(messages)

    def send_rest(self, rest: bytes) -> bytes:
        return self._inner.send_rest(rest)

    def receive(self) -> bytes:
        # In this order: what the thread adds from here on makes it readable again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._arrived)
        if not self._chunks:
            raise BlockingIOError
        chunk = self._chunks.popleft()
        if self._chunks:
            os.eventfd_write(self._arrived, 1)
        if not chunk and self._failure is not None:
            raise self._failure
        self._taken += len(chunk)
        return chunk

    def receive_soon(self) -> bytes | None:
        return None

    def close(self) -> None:
        self._hang_up()
        self._done()

    def _hang_up(self) -> None:
        """Tell the peer, and wake the thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _drain(self) -> None:
        _hurry()
        chunk = b"x"
        rush = 0
        while chunk:
            try:
                chunk = self._socket.recv(RUSH_SIZE, socket.MSG_WAITALL if rush else 0)
            except BlockingIOError:
                rush = self._limit(0)
                continue
            except OSError as error:
                chunk, self._failure = b"", error
            self._received += len(chunk)
            if self._received - self._taken > HELD_MAX:
                chunk = b""
                self._failure = OSError(errno.ENOBUFS, "more events than can be taken")
                self._hang_up()
            self._chunks.append(chunk)
            os.eventfd_write(self._arrived, 1)
            if len(chunk) >= MUCH:
                rush = self._limit(min(2 * rush or RUSH_FIRST, RUSH_MAX))
            elif rush:
                rush = self._limit(0)
        self._done()

    def _limit(self, microseconds: int) -> int:
        """How long recv may wait; 0: for ever."""
        limit = struct.pack("ll", 0, microseconds)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return microseconds

    def _done(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._inner.close()
        os.close(self._arrived)


def _hurry() -> None:
    """Have the kernel run this thread before others, as far as it lets this process: it does next to
    nothing, but that at once, or in a crowd of programs the socket is full before its turn comes."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def drained(connect: Callable[[], Transport]) -> Callable[[], Transport]:
    """The same connections, read by threads where they are sockets.

    The kernel reads the device by itself, whoever waits; and a store in this very loop is no faster
    than the loop.
    """

    def connect_drained() -> Transport:
        transport = connect()
        if isinstance(transport, SocketTransport) and not transport.same_loop:
            return DrainedTransport(transport)
        return transport

    return connect_drained
