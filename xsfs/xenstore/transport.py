"""Transports to Xenstore: their interface, the one over a Unix socket, and the search for a socket or device.

A transport moves bytes and never blocks, except for a WATCH over the device (see xenbus.py).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import trio

from xsfs.xenstore.busy_polling import BUSY_POLL_SECONDS, BusyPoll
from xsfs.xenstore.errors import StoreUnavailable
from xsfs.xenstore.protocol import PAYLOAD_MAX
from xsfs.xenstore.xenbus import DeviceTransport

RUNDIR: Final = "/var/run/xenstored"
DEVICES: Final = ("/dev/xen/xenbus", "/proc/xen/xenbus")
RECEIVE_SIZE: Final = 65536

NO_STORE_HINT: Final = (
    "start xenstored (dom0) or load xen's drivers (domU), name its socket or device, "
    "or try 'xsfs embedded MOUNTPOINT', which needs no Xen"
)


class Transport(Protocol):
    """One end of an open connection."""

    payload_max: int
    is_served_in_turn: bool
    """Whether the store takes the requests of this connection and of others in turn."""

    def send(self, messages: Sequence[bytes]) -> bytes:
        """Send whole messages.  Returns the bytes that could not be sent yet.

        Raises OSError if the connection has ended.
        """

    async def send_watch(self, messages: Sequence[bytes]) -> bytes:
        """`send` for WATCH and UNWATCH, which one transport must send in a way of its own.

        Raises WatchRefused (xenbus.py) if the transport itself learns that the store refused.
        """

    async def send_rest(self, rest: bytes) -> bytes:
        """Wait until there is room, then send more of the bytes that `send` returned."""

    def receive_soon(self) -> bytes | None:
        """Receive what comes within a few milliseconds; b"" at the end.  None if nothing comes, or at once if
        this transport cannot wait."""

    async def receive(self) -> bytes:
        """Wait for bytes and receive them; b"" at the end.  OSError if the connection broke."""

    def close(self) -> None:
        """Close it, and end the waits of `receive` and `send_rest` with trio.ClosedResourceError."""


class _Buffer(threading.local):
    """The memory into which a thread receives.

    A buffer of this size for each reply, or for each socket, leaves a hole in the heap when it is freed.  A
    mount with many transactions grew by half.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RECEIVE_SIZE))


_buffer: Final = _Buffer()


class SocketTransport:
    """A connected Unix socket."""

    payload_max = PAYLOAD_MAX
    is_served_in_turn = True
    receive_microseconds = 1000
    """How long `receive_soon` sleeps for a reply.  The kernel rounds it up to its tick, of 4 ms at most."""

    def __init__(self, sock: socket.socket, *, same_loop: bool = False) -> None:
        """`same_loop`: the peer is a task of this event loop, which cannot run while `receive_soon` waits."""
        self.same_loop = same_loop
        # Blocking, so that receive_soon is one system call.  All other calls use MSG_DONTWAIT.
        sock.setblocking(True)
        limit = struct.pack("ll", 0, self.receive_microseconds)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.socket = sock
        self._busy_poll = BusyPoll(sock.fileno())

    def send(self, messages: Sequence[bytes]) -> bytes:
        data = b"".join(messages)
        try:
            sent = self.socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return data
        return b"" if sent == len(data) else data[sent:]

    async def send_watch(self, messages: Sequence[bytes]) -> bytes:
        return self.send(messages)

    async def send_rest(self, rest: bytes) -> bytes:
        await trio.lowlevel.wait_writable(self.socket)
        return self.send((rest,))

    def receive_soon(self) -> bytes | None:
        if self.same_loop:
            return None
        self._busy_poll.is_readable(BUSY_POLL_SECONDS)
        view = _buffer.view
        try:
            return bytes(view[: self.socket.recv_into(view)])
        except BlockingIOError:
            return None

    async def receive(self) -> bytes:
        view = _buffer.view
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            try:
                return bytes(view[: self.socket.recv_into(view, 0, socket.MSG_DONTWAIT)])
            except BlockingIOError:
                continue  # receive_soon has taken it

    def close(self) -> None:
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()


def find_store(environ: Mapping[str, str]) -> str:
    """The path of the socket or device that libxenstore would use: xs_open() of xs.c.

    Raises StoreUnavailable.
    """
    if path := environ.get("XENSTORED_PATH"):
        return path
    candidates = (os.path.join(environ.get("XENSTORED_RUNDIR") or RUNDIR, "socket"), *DEVICES)
    for path in candidates:
        if os.path.exists(path):
            return path
    raise StoreUnavailable(f"no Xenstore found: none of {', '.join(candidates)}", NO_STORE_HINT)


def open_transport(path: str) -> Transport:
    """Connect to the socket, or open the device, at `path`.

    Raises BlockingIOError while a daemon has no room for one more connection (both daemons listen with
    a backlog of 1), StoreUnavailable if a retry is of no use, another OSError if the daemon may come
    back.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISSOCK(mode):
            return _connect(path)
        if stat.S_ISCHR(mode):
            return DeviceTransport(partial(os.open, path, os.O_RDWR | os.O_NONBLOCK))
    except PermissionError as error:
        raise StoreUnavailable(
            f"permission denied: {path}", "Xenstore is restricted to root; run as root", denied=True
        ) from error
    except OSError as error:
        # ENXIO, ENODEV: Xen does not run, or this is another device.
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise StoreUnavailable(f"{path}: {error.strerror}", NO_STORE_HINT) from error
        # connect(2) does not name the path, and Python gives no errno if the path is too long.
        number = error.errno or errno.ENAMETOOLONG
        raise OSError(number, error.strerror or str(error), path) from error
    raise StoreUnavailable(
        f"{path} is neither a socket nor a device", "SOURCE must be xenstored's socket or xenbus"
    )


def _connect(path: str) -> SocketTransport:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return SocketTransport(sock)
