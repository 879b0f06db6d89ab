"""Questions to a Xenstore that are the same each time: encoded once, their answers only counted."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from xsfs.xenstore.busy_polling import LINGER_SECONDS, Linger
from xsfs.xenstore.protocol import Parser, Request, encode


class Asker:
    """A connection, and no more than that: who asks waits right there, at first awake as xsfs does."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._linger = Linger(self._socket.fileno())
        self._due = 0
        """How many bytes of answers have not come."""

    def question(self, requests: Sequence[Request]) -> Question:
        """Asks it once, so as to know how long the answer is."""
        if not requests:
            return Question(self, b"", 0)
        encoded = b"".join(encode(op, 1, 0, payload) for op, payload in requests)
        self._socket.sendall(encoded)
        parser, replies, expected = Parser(), 0, 0
        while replies < len(requests):
            data = self._socket.recv(65536)
            expected += len(data)
            parser.feed(data)
            while parser.next() is not None:
                replies += 1
        return Question(self, encoded, expected)

    def send(self, encoded: bytes, expected: int) -> None:
        if encoded:
            self._socket.sendall(encoded)
            self._due += expected

    def wait(self, left: int = 0) -> None:
        """Until no more than `left` bytes of the answers have not come."""
        while self._due > left:
            self._linger.comes(LINGER_SECONDS)
            self._due -= len(self._socket.recv(65536))


class Question:
    """Of a store that does not change."""

    __slots__ = ("_asker", "_encoded", "_expected")

    def __init__(self, asker: Asker, encoded: bytes, expected: int) -> None:
        self._asker = asker
        self._encoded = encoded
        self._expected = expected

    def ask(self) -> None:
        self._asker.wait()
        self._asker.send(self._encoded, self._expected)
        self._asker.wait()

    def ask_and(self, more: Question) -> None:
        """Ask another one behind it, whose answers need not have come."""
        self._asker.wait()
        self._asker.send(self._encoded, self._expected)
        self._asker.send(more._encoded, more._expected)
        self._asker.wait(more._expected)

    def wait(self) -> None:
        """For all that was asked."""
        self._asker.wait()
