"""The guest's side of a struct xenstore_domain_interface, the page it shares with the daemon."""

from __future__ import annotations

import mmap
from typing import Final

SIZE: Final = 1024
"""Bytes of either direction.  The requests come first in the page, then the replies."""

# Indexes of the words after both.
REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = range(512, 516)


class Ring:
    """Bytes in, bytes out; who uses it has to notify the daemon.

    There are no memory barriers in Python: this relies on the strong ordering of x86-64, and on
    event channel datagrams for wake-ups.
    """

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._page = mmap.mmap(file.fileno(), 4096)
        # Native words, so that an index is stored in one go.
        self._words = memoryview(self._page).cast("I")

    def close(self) -> None:
        self._words.release()
        self._page.close()

    def put(self, data: bytes | bytearray) -> int:
        """Copy requests in; returns how many bytes did fit."""
        prod = self._words[REQ_PROD]
        used = (prod - self._words[REQ_CONS]) & 0xFFFFFFFF
        count = min(SIZE - used, len(data))
        start = prod % SIZE
        first = min(count, SIZE - start)
        self._page[start : start + first] = data[:first]
        self._page[: count - first] = data[first:count]
        self._words[REQ_PROD] = (prod + count) & 0xFFFFFFFF
        return count

    def get(self) -> bytes:
        """Take out all replies and events which are there."""
        cons = self._words[RSP_CONS]
        count = (self._words[RSP_PROD] - cons) & 0xFFFFFFFF
        start = cons % SIZE
        first = min(count, SIZE - start)
        data = self._page[SIZE + start : SIZE + start + first]
        data += self._page[SIZE : SIZE + count - first]
        self._words[RSP_CONS] = (cons + count) & 0xFFFFFFFF
        return data
