"""A connection to Xenstore for a program that does nothing while it waits for a reply.

Each reply finds its request by its number, so that several may ask.  Nobody else gets a turn meanwhile,
and the first mistake is the end.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable
from typing import Final

from xsfs.xenstore.busy_polling import BUSY_POLL_SECONDS, BusyPoll
from xsfs.xenstore.protocol import HEADER, Op

Asked = range
"""The numbers of requests that were sent together."""

SECONDS: Final = 10
"""How long a reply may take."""


class Connection:
    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        # Not settimeout(2): each call would look before it waits.
        limit = struct.pack("ll", SECONDS, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        self._busy_poll = BusyPoll(self._socket.fileno())
        self._data = b""
        self._next = 0
        self._open: dict[int, int] = {}
        """What was asked for by the requests that are not answered, by number."""
        self._replies: dict[int, bytes | None] = {}
        """Those that nobody has taken."""

    def ask(self, op_of_each: Iterable[tuple[int, bytes]]) -> Asked:
        """Send requests for nodes."""
        pack, asked, first = HEADER.pack, self._open, self._next
        messages, number = [], first
        for op, path in op_of_each:
            payload = (path or b"/") + b"\0"
            messages.append(pack(op, number, 0, len(payload)) + payload)
            asked[number] = op
            number += 1
        self._next = number
        self._socket.sendall(b"".join(messages))
        return range(first, number)

    def replies(self, asked: Asked) -> list[bytes | None]:
        """In order; None is one for an error.  Raises OSError."""
        replies = self._replies
        late = time.perf_counter() + SECONDS
        while asked and asked[-1] not in replies:
            self._busy_poll.is_readable(BUSY_POLL_SECONDS)
            data = self._socket.recv(65536)
            if not data or time.perf_counter() > late:
                raise ConnectionError("no reply")
            self._parse(self._data + data)
        return [replies.pop(number) for number in asked]

    def receive(self) -> None:
        """Take the replies that have come."""
        if self._busy_poll.is_readable(0):
            self._parse(self._data + self._socket.recv(65536))

    def _parse(self, data: bytes) -> None:
        start, asked = 0, self._open
        while len(data) - start >= HEADER.size:
            op, number, _, length = HEADER.unpack_from(data, start)
            end = start + HEADER.size + length
            if len(data) < end:
                break
            expected = asked.pop(number, None)
            if expected is None or op not in (expected, Op.ERROR):
                raise ConnectionError("a reply that nobody asked for")
            self._replies[number] = data[start + HEADER.size : end] if op == expected else None
            start = end
        self._data = data[start:]
