"""Pipelines to Xenstore that are encoded once; of the replies only the bytes are counted."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from xsfs.xenstore.busy_polling import BUSY_POLL_SECONDS, BusyPoll
from xsfs.xenstore.protocol import Parser, Request, encode


class Asker:
    """A connection for one caller, which waits for the reply right there, by busy polling as xsfs does."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._busy_poll = BusyPoll(self._socket.fileno())

    def question(self, requests: Sequence[Request]) -> Question:
        """Sends them once to learn how long the replies are."""
        encoded = b"".join(encode(op, 1, 0, payload) for op, payload in requests)
        self._socket.sendall(encoded)
        parser, replies, expected = Parser(), 0, 0
        while replies < len(requests):
            data = self._socket.recv(65536)
            expected += len(data)
            replies += len(parser.feed(data))
        return Question(self, encoded, expected)

    def ask(self, encoded: bytes, expected: int) -> None:
        """Send requests, and receive so many bytes of replies."""
        self._socket.sendall(encoded)
        while expected > 0:
            self._busy_poll.is_readable(BUSY_POLL_SECONDS)
            expected -= len(self._socket.recv(65536))


class Question:
    """Requests to a store that does not change, in one pipeline."""

    __slots__ = ("_asker", "_encoded", "_expected")

    def __init__(self, asker: Asker, encoded: bytes, expected: int) -> None:
        self._asker = asker
        self._encoded = encoded
        self._expected = expected

    def ask(self) -> None:
        self._asker.ask(self._encoded, self._expected)
