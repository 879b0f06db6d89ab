"""A small blocking client of the Xenstore wire protocol: what tests ask a daemon with.

It is the independent witness of the tests, so it shares no parser and no encoder with xsfs.wire: a
mistake there must not hide itself here.  Only the table of operations is the same one.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable
from typing import Final, Self

from xsfs.xenstore.protocol import Op

HEADER: Final = struct.Struct("=IIII")  # type, req_id, tx_id, length

OPS: Final[dict[str, int]] = {op.name: op.value for op in Op} | {"RESTRICT": 20}
"""Numbers by name.  RESTRICT is of old versions, for tests of unknown requests."""

WATCH_EVENT: Final = OPS["WATCH_EVENT"]
ERROR: Final = OPS["ERROR"]

Reply = tuple[int, int, int, bytes]
"""(type, req_id, tx_id, payload)"""

Outgoing = tuple[str | int, bytes] | tuple[str | int, bytes, int]
"""(operation, payload) or (operation, payload, tx_id)"""


class XsError(Exception):
    """An ERROR reply; .name is the errno name the daemon sent."""

    def __init__(self, name: str, what: str = "") -> None:
        super().__init__(f"{name} {what}".strip())
        self.name = name


class XsTimeout(Exception):
    """The message that a test waited for has not come in time."""


class XsEOF(Exception):
    """The peer has closed the connection."""


def encode(arg: str | bytes) -> bytes:
    return arg.encode() if isinstance(arg, str) else bytes(arg)


def strings(*args: str | bytes) -> bytes:
    """The arguments as NUL-terminated strings."""
    return b"".join(encode(arg) + b"\0" for arg in args)


class XsClient:
    """One connection, by the path of a Unix socket.  `timeout` bounds each wait, in seconds."""

    def __init__(self, path: str, timeout: float = 60.0) -> None:
        self.path = path
        self.timeout = timeout
        self.events: deque[tuple[str, str]] = deque()
        """(path, token) of the events that came while something else was waited for."""
        self._buffer = bytearray()
        self._req_id = 0
        self.sock = socket.socket(socket.AF_UNIX)
        # The daemons listen with a backlog of 1, so that a connect() which does not block easily
        # fails with EAGAIN: use a timeout of the kernel's.
        limit = struct.pack("ll", max(1, int(timeout)), 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise
        self.sock.settimeout(timeout)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- messages

    def _next(self) -> Reply | None:
        if len(self._buffer) >= HEADER.size:
            op, req_id, tx, length = HEADER.unpack_from(self._buffer)
            end = HEADER.size + length
            if len(self._buffer) >= end:
                payload = bytes(self._buffer[HEADER.size : end])
                del self._buffer[:end]
                return op, req_id, tx, payload
        return None

    def _fill(self) -> None:
        try:
            data = self.sock.recv(262144)
        except ConnectionResetError:
            data = b""
        if not data:
            raise XsEOF(f"the end of the connection to {self.path}")
        self._buffer += data

    def receive(self, timeout: float | None = None) -> Reply:
        """The next message of any kind."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not (message := self._next()):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.sock], [], [], left)[0]:
                raise XsTimeout(f"nothing came from {self.path} within {limit} s")
            self._fill()
        return message

    def _pack(self, op: str | int, payload: bytes, tx: int, req_id: int | None) -> bytes:
        if req_id is None:
            self._req_id = req_id = self._req_id % 0x7FFFFFFF + 1
        number = OPS[op] if isinstance(op, str) else op
        return HEADER.pack(number, req_id, tx, len(payload)) + payload

    def send(
        self, op: str | int, payload: bytes = b"", tx: int = 0, req_id: int | None = None
    ) -> int:
        """Send one request, and return its req_id."""
        self.sock.sendall(self._pack(op, payload, tx, req_id))
        return self._req_id if req_id is None else req_id

    def _event(self, payload: bytes) -> None:
        path, token = payload.split(b"\0")[:2]
        self.events.append((path.decode(), token.decode()))

    def reply(self, req_id: int, timeout: float | None = None) -> bytes:
        """The payload of the reply to a request that was sent; XsError if it is an error."""
        while True:
            op, got, _, payload = self.receive(timeout)
            if op == WATCH_EVENT:
                self._event(payload)
            elif got == req_id:
                if op == ERROR:
                    raise XsError(payload.rstrip(b"\0").decode())
                return payload

    def call(
        self, op: str | int, payload: bytes = b"", tx: int = 0, timeout: float | None = None
    ) -> bytes:
        try:
            return self.reply(self.send(op, payload, tx), timeout)
        except XsError as err:
            raise XsError(err.name, f"{op} {payload[:80]!r}") from None

    def event(self, timeout: float = 60.0) -> tuple[str, str]:
        """The next watch event: (path, token)."""
        while not self.events:
            op, _, _, payload = self.receive(timeout)
            if op == WATCH_EVENT:
                self._event(payload)
        return self.events.popleft()

    def events_so_far(self) -> list[tuple[str, str]]:
        """The watch events of all changes that the daemon has carried out: the first event of another watch
        comes behind them."""
        last = "domid", "events so far"
        self.watch(*last)
        found = []
        while (event := self.event()) != last:
            found.append(event)
        self.unwatch(*last)
        return found

    def pipeline(self, requests: Iterable[Outgoing], window: int = 65536) -> list[bytes | XsError]:
        """Send many requests without waiting for each reply.

        Returns the payloads of the replies, or XsError objects, in the order of the requests.
        (They need not come in it: a guest's kernel answers some requests itself, at once.)
        """
        waiting = iter(requests)
        replies: dict[int, bytes | XsError | None] = {}
        out, done, missing = bytearray(), False, 0
        self.sock.setblocking(False)
        try:
            while not done or missing:
                while not done and len(out) < window:
                    request = next(waiting, None)
                    if request is None:
                        done = True
                        break
                    op, payload, tx = request if len(request) == 3 else (*request, 0)
                    out += self._pack(op, payload, tx, None)
                    replies[self._req_id] = None
                    missing += 1
                if not missing:
                    break
                readable, writable, _ = select.select(
                    [self.sock], [self.sock] if out else [], [], self.timeout
                )
                if not readable and not writable:
                    raise XsTimeout(f"{missing} replies have not come within {self.timeout} s")
                if writable:
                    with contextlib.suppress(BlockingIOError):
                        del out[: self.sock.send(out[:window])]
                if readable:
                    self._fill()
                while message := self._next():
                    op, req_id, _, payload = message
                    if op == WATCH_EVENT:
                        self._event(payload)
                        continue
                    if replies.get(req_id, b"") is not None:
                        raise RuntimeError(f"a reply to no request: {message}")
                    name = payload.rstrip(b"\0").decode() if op == ERROR else ""
                    replies[req_id] = XsError(name) if op == ERROR else payload
                    missing -= 1
        finally:
            self.sock.settimeout(self.timeout)
        return [reply for reply in replies.values() if reply is not None]

    # -- the operations

    def read(self, path: str, tx: int = 0) -> bytes:
        return self.call("READ", strings(path), tx)

    def write(self, path: str, value: str | bytes = b"", tx: int = 0) -> None:
        self.call("WRITE", strings(path) + encode(value), tx)

    def mkdir(self, path: str, tx: int = 0) -> None:
        self.call("MKDIR", strings(path), tx)

    def rm(self, path: str, tx: int = 0) -> None:
        self.call("RM", strings(path), tx)

    def ls(self, path: str, tx: int = 0) -> list[str]:
        """DIRECTORY alone."""
        reply = self.call("DIRECTORY", strings(path), tx)
        return [name.decode() for name in reply.split(b"\0")[:-1]]

    def ls_part(self, path: str, tx: int = 0) -> list[str]:
        """The whole listing by DIRECTORY_PART, started again whenever the node changes."""
        listing, generation = b"", None
        while True:
            reply = self.call("DIRECTORY_PART", strings(path, str(len(listing))), tx)
            now, _, part = reply.partition(b"\0")
            if generation not in (None, now):
                listing, generation = b"", None
                continue
            generation = now
            # An empty string at the end marks the end of the listing.
            if part == b"\0" or part.endswith(b"\0\0"):
                return [name.decode() for name in (listing + part[:-1]).split(b"\0")[:-1]]
            listing += part

    def get_perms(self, path: str, tx: int = 0) -> list[str]:
        reply = self.call("GET_PERMS", strings(path), tx)
        return [perm.decode() for perm in reply.split(b"\0")[:-1]]

    def set_perms(self, path: str, perms: Iterable[str], tx: int = 0) -> None:
        self.call("SET_PERMS", strings(path, *perms), tx)

    def watch(self, path: str, token: str) -> None:
        self.call("WATCH", strings(path, token))

    def unwatch(self, path: str, token: str) -> None:
        self.call("UNWATCH", strings(path, token))

    def start(self) -> int:
        return int(self.call("TRANSACTION_START", b"\0").rstrip(b"\0"))

    def end(self, tx: int, commit: bool = True) -> None:
        self.call("TRANSACTION_END", b"T\0" if commit else b"F\0", tx)

    def domain_path(self, domid: int) -> str:
        return self.call("GET_DOMAIN_PATH", strings(str(domid))).rstrip(b"\0").decode()

    def introduced(self, domid: int) -> bool:
        return self.call("IS_DOMAIN_INTRODUCED", strings(str(domid))) == b"T\0"
