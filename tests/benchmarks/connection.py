"""A connection to Xenstore that does no more than what a single reader needs."""

from __future__ import annotations

import socket

from xsfs.linger import LINGER_SECONDS, Linger
from xsfs.wire import HEADER, Op, encode


def message(op: Op, path: bytes) -> bytes:
    return encode(op, 0, 0, (path or b"/") + b"\0")


class Connection:
    """Replies come in the order of the requests; None is one for an error."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._linger = Linger(self._socket.fileno())
        self._data = b""
        self._replies: list[bytes | None] = []
        self.send = self._socket.sendall

    def replies(self, count: int) -> list[bytes | None]:
        while len(self._replies) < count:
            self._linger.comes(LINGER_SECONDS)
            self._parse(self._data + self._socket.recv(65536))
        taken, self._replies = self._replies[:count], self._replies[count:]
        return taken

    def _parse(self, data: bytes) -> None:
        start = 0
        while len(data) - start >= HEADER.size:
            op, _, _, length = HEADER.unpack_from(data, start)
            end = start + HEADER.size + length
            if len(data) < end:
                break
            self._replies.append(None if op == Op.ERROR else data[start + HEADER.size : end])
            start = end
        self._data = data[start:]
