"""What LOOKUPs have made ready, kept for the OPEN of the same open(2).

The kernel sends both in the name of the same thread, one right after the other.  What was made is given
once, to that thread, for that inode, and only for a moment: an open(2) whose OPEN is late asks the
store.  (One without a LOOKUP, of /proc/self/fd/N, may get what the thread looked up just before.)
"""

from __future__ import annotations

import time
from typing import Final, Generic, TypeVar

PREFETCH_SECONDS: Final = 0.01
PREFETCH_MAX: Final = 64

Ready = TypeVar("Ready")


class Prefetched(Generic[Ready]):
    """See the module's text."""

    def __init__(self) -> None:
        self._ready: dict[int, tuple[int, Ready, float]] = {}

    def put(self, pid: int, inode: int, ready: Ready) -> None:
        self._ready.pop(pid, None)
        self._ready[pid] = (inode, ready, time.monotonic() + PREFETCH_SECONDS)
        if len(self._ready) > PREFETCH_MAX:
            del self._ready[next(iter(self._ready))]

    def take(self, pid: int, inode: int) -> Ready | None:
        found = self._ready.pop(pid, None)
        if found is None or found[0] != inode or found[2] < time.monotonic():
            return None
        return found[1]

    def drop(self) -> None:
        """Something was written through the mount: what was fetched before may be outdated."""
        self._ready.clear()
