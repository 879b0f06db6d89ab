"""The values that LOOKUPs have fetched, kept for the OPEN of the same open(2).

The kernel sends both in the name of the same thread, one right after the other.  A value is given once,
to that thread, for that inode, and only for a moment: an open(2) whose OPEN is late asks the store.
(One without a LOOKUP, of /proc/self/fd/N, may get what the thread looked up just before.)
"""

from __future__ import annotations

import time
from typing import Final

PREFETCH_SECONDS: Final = 0.01
PREFETCH_MAX: Final = 64


class Prefetched:
    """See the module's text."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[object, bytes, float]] = {}

    def put(self, pid: int, node: object, value: bytes) -> None:
        self._values.pop(pid, None)
        self._values[pid] = (node, value, time.monotonic() + PREFETCH_SECONDS)
        if len(self._values) > PREFETCH_MAX:
            del self._values[next(iter(self._values))]

    def take(self, pid: int, node: object) -> bytes | None:
        found = self._values.pop(pid, None)
        if found is None or found[0] is not node or found[2] < time.monotonic():
            return None
        return found[1]

    def drop(self) -> None:
        """Something was written through the mount: what was fetched before may be outdated."""
        self._values.clear()
