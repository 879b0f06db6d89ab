"""When the event loop last gave all tasks their turn.

A turn takes longer than a reply of the store.  So a task that asks one thing after the other, and a worker
that answers one request of the kernel after the other, go on without a turn for a bounded time.  Each of them
notes the turns that it gives or sees, so that the others need not give one.
"""

from __future__ import annotations

from typing import Final

import trio


class Turns:
    """Those of one event loop."""

    last = 0.0
    """The time of the last turn that was noted, by time.perf_counter()."""


_TURNS: Final[trio.lowlevel.RunVar[Turns]] = trio.lowlevel.RunVar("xsfs turns")


def turns() -> Turns:
    """Those of the running event loop."""
    try:
        return _TURNS.get()
    except LookupError:
        _TURNS.set(Turns())
        return _TURNS.get()
