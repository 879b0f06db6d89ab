"""The transport of the watches: a socket that is read in time, however busy the event loop is.

The socket holds some 70 events, and oxenstored keeps 2000 more for a watcher.  Past that oxenstored makes
every writer wait, until the writer is killed if it uses the socket.  oxenstored accepts 70,000 writes a
second from a client that pipelines them, so 30 ms without a read would be too long.

While few events come, the event loop reads, because nothing delivers an event sooner.  If one read returns
LATE_BYTES or more, the loop was late, and a thread takes over.  It does nothing but read, and hands the
bytes to the loop.  It ends when few bytes come and the loop waits for them.

The thread needs the interpreter to go on, and may wait for it for SWITCH_SECONDS and more each time, in
which the socket fills.  So it asks for more than the socket holds (MSG_WAITALL): then the kernel goes on
reading for up to CHUNK_MICROSECONDS without the interpreter.

An `EventReader` owns the socket, the thread if there is one, and the chunks that the thread has read and
the loop has not used yet.

Invariants:

- Either the thread or the loop receives.  The thread's last act is to tell the loop that it has ended.
- The loop alone touches the chunks, sends, and closes the socket.  It closes the socket after the thread
  has ended, because the number of a closed descriptor may belong to another file at once.
- The chunks are bounded.  Past HELD_MAX bytes the connection ends, and the client sets all watches again.
"""

from __future__ import annotations

import errno
import socket
import threading
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

CHUNK_SIZE: Final = 1 << 18
CHUNK_MICROSECONDS: Final = 20_000
"""How much the thread asks for at once, and how long it waits for that."""


class EventReader(SocketTransport):
    """See the module's docstring."""

    receive_microseconds = CHUNK_MICROSECONDS

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._token = trio.lowlevel.current_trio_token()
        self._chunks: deque[bytes | OSError] = deque()
        self._arrived = trio.lowlevel.ParkingLot()
        self._received = 0
        self._used = 0
        """Bytes that the thread has received, and that the loop has used."""
        self.has_thread = False
        self._closed = False

    def receive_soon(self) -> bytes | None:
        return None  # the thread may be receiving

    async def receive(self) -> bytes:
        while not self._closed:
            if self._chunks:
                chunk = self._chunks.popleft()
                if isinstance(chunk, OSError):
                    raise chunk
                self._used += len(chunk)
                await trio.lowlevel.checkpoint()
                return chunk
            if self.has_thread:
                await self._arrived.park()
                continue
            data = await super().receive()
            if len(data) >= LATE_BYTES:
                with suppress(RuntimeError):  # there can be no more threads: the loop reads on
                    threading.Thread(target=self._read, name="xsfs-watches", daemon=True).start()
                    self.has_thread = True
            return data
        raise trio.ClosedResourceError

    def close(self) -> None:
        self._closed = True
        self._arrived.unpark_all()
        if self.has_thread:
            trio.lowlevel.notify_closing(self.socket)  # the writer may wait for room
            self._hang_up()
        else:
            super().close()

    def _hang_up(self) -> None:
        """End the connection, which wakes the thread."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def _put(self, chunk: bytes | OSError) -> None:
        self._chunks.append(chunk)
        self._arrived.unpark_all()

    def _thread_ended(self) -> None:
        self.has_thread = False
        self._arrived.unpark_all()
        if self._closed:
            self.socket.close()

    # ----------------------------------------------------------------------------- the thread

    def _read(self) -> None:
        try:
            try:
                self._read_while_needed()
            except OSError as error:
                self._token.run_sync_soon(self._put, error)
            self._token.run_sync_soon(self._thread_ended)
        except trio.RunFinishedError:
            self.socket.close()

    def _read_while_needed(self) -> None:
        buffer = memoryview(bytearray(CHUNK_SIZE))
        size = LATE_BYTES
        while size >= LATE_BYTES or not self._loop_waits():
            try:
                size = self.socket.recv_into(buffer, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                size = 0  # nothing came in time
                continue
            self._received += size
            if self._received - self._used > HELD_MAX:
                self._hang_up()
                raise OSError(errno.ENOBUFS, "more events than xsfs can handle")
            self._token.run_sync_soon(self._put, bytes(buffer[:size]))
            if not size:
                return

    def _loop_waits(self) -> bool:
        """Whether the loop has handled all that it got."""
        return bool(self._arrived)


def with_event_reader(transport: Transport) -> Transport:
    """An EventReader in place of a socket.  The device needs none: the kernel reads events from the ring."""
    if isinstance(transport, SocketTransport):
        return EventReader(transport.socket)
    return transport
