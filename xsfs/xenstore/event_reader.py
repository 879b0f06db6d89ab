"""The transport of the watches: a socket that is read in time, however busy the event loop is.

The socket holds some 70 events, and oxenstored keeps 2000 more for a watcher.  Past that oxenstored makes
every writer wait.  A writer that uses the socket then waits until it is killed.  oxenstored accepts 70,000
writes a second from a client that pipelines them, so 30 ms without a read would be too long.

While few events come, the event loop reads, because nothing delivers an event sooner.  If one read returns
LATE_BYTES or more, the loop was late, and a thread takes over.  It does nothing but read, and hands the
bytes to the loop.  When few bytes have come for a while, the thread ends and the loop
reads again.

The thread needs the interpreter to go on, and may wait for it for SWITCH_SECONDS and more each time, in
which the socket fills.  So it asks for more than the socket holds (MSG_WAITALL): then the kernel goes on
reading for up to CHUNK_MICROSECONDS without the interpreter.

An `EventReader` owns the socket, the thread if there is one, and the chunks that the thread has read and
the loop has not used yet.

Invariants:

- Either the thread or the loop receives.  The loop starts the thread.  The thread's last act is to tell
  the loop that it has ended.
- The loop alone touches the chunks, sends, and closes the socket.  It closes the socket after the thread
  has ended, because the number of a closed descriptor may belong to another file at once.
- The chunks are bounded.  Past HELD_MAX bytes the connection ends.  Then the client sets all watches again on
  a new one, and each subscriber learns that it may have missed something.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Final

import trio

from xsfs.xenstore.transport import SocketTransport, Transport

HELD_MAX: Final = 16 << 20
"""Bytes.  Some 300,000 events, which the loop handles in a second."""

SWITCH_SECONDS: Final = 0.001
"""For sys.setswitchinterval: how long the loop may keep the interpreter from the thread."""

LATE_BYTES: Final = 1024
"""If one read returns so many bytes, the loop was late."""

CALM_MICROSECONDS: Final = 100_000
"""The thread ends when it has not received so many bytes at once for this time."""

CHUNK_SIZE: Final = 1 << 18
CHUNK_MICROSECONDS: Final = 20_000
"""How much the thread asks for at once, and how long it waits for that."""


class EventReader(SocketTransport):
    """See the module's docstring."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._token = trio.lowlevel.current_trio_token()
        self._chunks: deque[bytes] = deque()
        self._arrived = trio.lowlevel.ParkingLot()
        self._received = 0
        self._used = 0
        """Bytes that the thread has received, and that the loop has used."""
        self._failure: OSError | None = None
        self.has_thread = False
        self._closed = False

    async def receive(self) -> bytes:
        while not self._closed:
            if self._chunks:
                chunk = self._chunks.popleft()
                self._used += len(chunk)
                if not chunk and self._failure is not None:
                    raise self._failure
                await trio.lowlevel.checkpoint()
                return chunk
            if self.has_thread:
                await self._arrived.park()
                continue
            data = await super().receive()
            if len(data) >= LATE_BYTES:
                self._start_thread()
            return data
        raise trio.ClosedResourceError

    def close(self) -> None:
        self._closed = True
        self._arrived.unpark_all()
        if not self.has_thread:
            super().close()
            return
        trio.lowlevel.notify_closing(self.socket)  # the writer may wait for room
        self._hang_up()

    def _hang_up(self) -> None:
        """End the connection, which wakes the thread."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    # ----------------------------------------------------------------------------- the thread

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._read, name="xsfs-watches", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return  # there can be no more threads: the loop reads on
        self.has_thread = True

    def _read(self) -> None:
        buffer = memoryview(bytearray(CHUNK_SIZE))
        late_at = time.monotonic()
        is_late = True
        while is_late or time.monotonic() < late_at + CALM_MICROSECONDS / 1e6:
            chunk = self._receive_chunk(buffer, is_late)
            if chunk is not None and not self._deliver(chunk):
                break
            is_late = chunk is not None and len(chunk) >= LATE_BYTES
            if is_late:
                late_at = time.monotonic()
        try:
            self._token.run_sync_soon(self._thread_ended)
        except trio.RunFinishedError:
            self.socket.close()

    def _receive_chunk(self, buffer: memoryview, is_late: bool) -> bytes | None:
        """The bytes that come in time.  None if none do; b"" at the end."""
        limit = struct.pack("ll", 0, CHUNK_MICROSECONDS if is_late else CALM_MICROSECONDS)
        flags = socket.MSG_WAITALL if is_late else 0
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            return bytes(buffer[: self.socket.recv_into(buffer, 0, flags)])
        except BlockingIOError:
            return None
        except OSError as error:
            self._failure = error
            return b""

    def _deliver(self, chunk: bytes) -> bool:
        """Hand a chunk to the loop.  Returns whether there can be more."""
        self._received += len(chunk)
        if self._received - self._used > HELD_MAX:
            chunk = b""
            self._failure = OSError(errno.ENOBUFS, "more events than xsfs can handle")
            self._hang_up()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._chunk_arrived, chunk)
        return bool(chunk)

    def _chunk_arrived(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._arrived.unpark_all()

    def _thread_ended(self) -> None:
        self.has_thread = False
        self._arrived.unpark_all()
        if self._closed:
            self.socket.close()


def with_event_reader(transport: Transport) -> Transport:
    """An EventReader in place of a socket.

    The device needs none, because the kernel reads events from the ring by itself.  A store in this event
    loop is no faster than the loop.
    """
    if isinstance(transport, SocketTransport) and not transport.same_loop:
        return EventReader(transport.socket)
    return transport
