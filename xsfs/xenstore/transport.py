"""Where Xenstore is, and the two ways of talking to it: a Unix socket and the kernel's device.

A transport moves bytes and never waits, but for the device's WATCH (see `device.py`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from xsfs.xenstore.busy_polling import LINGER_SECONDS, Linger
from xsfs.xenstore.errors import StoreUnavailable
from xsfs.xenstore.protocol import PAYLOAD_MAX
from xsfs.xenstore.xenbus import DeviceTransport

RUNDIR: Final = "/var/run/xenstored"
DEVICES: Final = ("/dev/xen/xenbus", "/proc/xen/xenbus")
RECEIVE_SIZE: Final = 65536

SOON: Final = 1000
"""Microseconds.  The kernel rounds it up to its tick, 4 ms at most."""

NO_STORE_HINT: Final = (
    "start xenstored (dom0) or load xen's drivers (domU), name its socket or device, "
    "or try 'xsfs embedded MOUNTPOINT', which needs no Xen"
)


class Transport(Protocol):
    """One end of an open connection."""

    payload_max: int
    watch_blocks: bool
    """Whether sending a WATCH or UNWATCH blocks the caller for a round trip."""
    prompt: bool
    """Whether `receive_soon` can wait."""

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to receive."""

    def outlet(self) -> int:
        """A descriptor that is writable when there is room for what `send` returned."""

    def send(self, messages: Sequence[bytes]) -> bytes:
        """Send whole messages; returns what could not be sent yet.  OSError ends the connection."""

    def send_rest(self, rest: bytes) -> bytes:
        """Go on with what `send` returned."""

    def receive(self) -> bytes:
        """What there is to read; b"" at the end.  BlockingIOError where there is nothing yet."""

    def receive_soon(self) -> bytes | None:
        """The same, but wait a moment (SOON at most) for it; None where nothing came."""

    def close(self) -> None: ...


class _Buffer(threading.local):
    """Where a thread receives.

    recv(2) into a fresh object of RECEIVE_SIZE, which is cut to what came, leaves a hole of almost that
    size behind each object: the heap grew to three times what was in it.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RECEIVE_SIZE))


_buffer: Final = _Buffer()


class SocketTransport:
    """A connected Unix socket."""

    payload_max = PAYLOAD_MAX
    watch_blocks = False

    def __init__(self, sock: socket.socket, *, same_loop: bool = False) -> None:
        """`same_loop`: the peer is a task of this very event loop, and must not be waited for."""
        self.same_loop = same_loop
        self.prompt = not same_loop
        # Blocking, so that receive_soon is a single system call; all others say MSG_DONTWAIT.
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, SOON))
        self.socket = sock
        self._linger = Linger(sock.fileno())

    def fileno(self) -> int:
        return self.socket.fileno()

    def outlet(self) -> int:
        return self.socket.fileno()

    def send(self, messages: Sequence[bytes]) -> bytes:
        data = b"".join(messages)
        try:
            sent = self.socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return data
        return b"" if sent == len(data) else data[sent:]

    def send_rest(self, rest: bytes) -> bytes:
        return self.send((rest,))

    def receive(self) -> bytes:
        view = _buffer.view
        return bytes(view[: self.socket.recv_into(view, 0, socket.MSG_DONTWAIT)])

    def receive_soon(self) -> bytes | None:
        if not self.prompt:
            return None
        self._linger.comes(LINGER_SECONDS)
        view = _buffer.view
        try:
            return bytes(view[: self.socket.recv_into(view)])
        except BlockingIOError:
            return None

    def close(self) -> None:
        self.socket.close()


def find_store(environ: Mapping[str, str]) -> str:
    """The path of the socket or device, looked for as libxenstore does: xs_open() of xs.c.

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

    Raises BlockingIOError while a daemon has no room for one more connection (both listen with a
    backlog of 1), StoreUnavailable where trying again is of no use, other OSErrors where the daemon
    may come back.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISSOCK(mode):
            return _connect(path)
        if stat.S_ISCHR(mode):
            return _open_device(path)
    except PermissionError as error:
        raise StoreUnavailable(
            f"permission denied: {path}", "Xenstore is restricted to root; run as root", denied=True
        ) from error
    except OSError as error:
        # ENXIO, ENODEV: the device is there but Xen is not.
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise StoreUnavailable(f"{path}: {error.strerror}", NO_STORE_HINT) from error
        error.filename = path  # connect(2) does not tell it
        raise
    raise StoreUnavailable(
        f"{path} is neither a socket nor a device", "SOURCE must be xenstored's socket or xenbus"
    )


def _open_device(path: str) -> DeviceTransport:
    def open_device() -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        if not _can_be_polled(descriptor):
            os.close(descriptor)
            raise StoreUnavailable(f"{path} is not Xenstore's device", "try /dev/xen/xenbus")
        return descriptor

    return DeviceTransport(open_device)


def _can_be_polled(descriptor: int) -> bool:
    with select.epoll() as poll:
        try:
            poll.register(descriptor)
        except PermissionError:
            return False
    return True


def _connect(path: str) -> SocketTransport:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return SocketTransport(sock)
