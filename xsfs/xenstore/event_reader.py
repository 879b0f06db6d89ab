"""A socket that is read in time, however busy the event loop is: the connection of the watches.

The socket takes some 70 events, and oxenstored holds 2000 more for a watcher; past that whoever writes
waits, and if he writes by the socket he waits for good.  Of a client that pipelines its writes
oxenstored takes 70,000 a second, so 30 ms in which the loop does anything else would be too long.

While little comes, the loop reads: nothing is told sooner.  Once so much is there that the loop was
late, a thread takes over (a rush), which does nothing but read, and keeps what has come until the loop
takes it.  When little has come for a while the thread has ended, and the loop reads again.

The thread needs the interpreter to go on, and may wait for it for SWITCH_SECONDS each time and more,
in which the socket fills.  So while much comes at once it asks for more than the socket holds
(MSG_WAITALL): then it is the kernel that goes on reading, for a moment, without the interpreter.

What a `DrainedTransport` owns: the socket, the thread of the rush if there is one, what that has
received and the loop has not yet taken, and an eventfd that is readable while there is any of that.

What always holds:

- Only one of the two receives: the thread in a rush, else the loop.  The loop alone begins a rush; the
  thread ends it by the last thing that it puts before the loop.
- Only the loop takes, sends and closes.  Each of the two counts for itself.
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
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from xsfs.xenstore.transport import SocketTransport, Transport

HELD_MAX: Final = 16 << 20
"""Bytes.  Some 300,000 events, which take the loop a second."""

SWITCH_SECONDS: Final = 0.001
"""For sys.setswitchinterval: how long the loop may keep the interpreter from the thread."""

MUCH: Final = 1024
"""Bytes.  Where so much is there at once, whoever reads was late."""

CALM_SECONDS: Final = 0.1
"""A rush is over when not so much has been there at once for so long."""

RUSH_SIZE: Final = 1 << 18
RUSH_FIRST: Final = 5_000
RUSH_MAX: Final = 40_000
"""How much is asked for at once in a rush, and how many microseconds it is waited for: the longer the
more has come the last time, as the daemon sends what it holds only twice as fast as more is written."""


class DrainedTransport:
    """See the module's text."""

    def __init__(self, inner: SocketTransport) -> None:
        self._inner = inner
        self._socket = inner.socket
        self.payload_max = inner.payload_max
        self.watch_blocks = inner.watch_blocks
        self.prompt = False
        self._arrived = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._chunks: deque[bytes | None] = deque()
        """Received by the thread.  None: it is done with the socket, which may have more."""
        self._received = 0
        self._taken = 0
        self._failure: OSError | None = None
        self.rushing = False
        self._users = 1
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._arrived if self.rushing else self._inner.fileno()

    def outlet(self) -> int:
        return self._inner.outlet()

    def send(self, messages: Sequence[bytes]) -> bytes:
        return self._inner.send(messages)

    def send_rest(self, rest: bytes) -> bytes:
        return self._inner.send_rest(rest)

    def receive(self) -> bytes:
        if self.rushing:
            return self._take()
        data = self._inner.receive()
        if len(data) >= MUCH:
            self._rush()
        return data

    def receive_soon(self) -> bytes | None:
        return None

    def close(self) -> None:
        self._hang_up()
        self._done()

    def _hang_up(self) -> None:
        """Tell the peer, and wake the thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _rush(self) -> None:
        thread = threading.Thread(target=self._drain, name="xsfs-watches", daemon=True)
        with self._lock:
            # Held until both are counted.
            try:
                thread.start()
            except RuntimeError:
                return  # there can be no more threads: the loop reads on
            self._users += 1
            self.rushing = True

    def _take(self) -> bytes:
        # In this order: what the thread adds from here on makes it readable again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._arrived)
        if not self._chunks:
            raise BlockingIOError
        chunk = self._chunks.popleft()
        if chunk is None:
            self.rushing = False
            raise BlockingIOError
        if self._chunks:
            os.eventfd_write(self._arrived, 1)
        if not chunk and self._failure is not None:
            raise self._failure
        self._taken += len(chunk)
        return chunk

    def _drain(self) -> None:
        """The thread."""
        _hurry()
        buffer = memoryview(bytearray(RUSH_SIZE))
        wait = RUSH_FIRST
        late = time.monotonic()
        more = True
        while more:
            chunk = self._receive(buffer, wait)
            if chunk is not None and len(chunk) >= MUCH:
                late = time.monotonic()
                wait = min(2 * wait or RUSH_FIRST, RUSH_MAX)
            elif time.monotonic() - late > CALM_SECONDS:
                more = False
            else:
                wait = 0
            if chunk is not None:
                more = self._put(chunk) and more
        self._put(None)
        self._done()

    def _receive(self, buffer: memoryview, microseconds: int) -> bytes | None:
        """What comes within that time; or 0: what comes first.  None: nothing; b"": the end."""
        limit = struct.pack("ll", 0, microseconds or int(CALM_SECONDS * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        try:
            flags = socket.MSG_WAITALL if microseconds else 0
            return bytes(buffer[: self._socket.recv_into(buffer, 0, flags)])
        except BlockingIOError:
            return None
        except OSError as error:
            self._failure = error
            return b""

    def _put(self, chunk: bytes | None) -> bool:
        """Hold it for the loop.  Whether there can be more."""
        if chunk is not None:
            self._received += len(chunk)
            if self._received - self._taken > HELD_MAX:
                chunk = b""
                self._failure = OSError(errno.ENOBUFS, "more events than can be taken")
                self._hang_up()
        self._chunks.append(chunk)
        os.eventfd_write(self._arrived, 1)
        return bool(chunk)

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
    """The same connections, read in time where they are sockets.

    The kernel reads the device by itself, whoever waits; and a store in this very loop is no faster
    than the loop.
    """

    def connect_drained() -> Transport:
        transport = connect()
        if isinstance(transport, SocketTransport) and not transport.same_loop:
            return DrainedTransport(transport)
        return transport

    return connect_drained
