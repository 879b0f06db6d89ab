"""A lock that gives the event loop no turn if it is free.

trio.Lock lets another task run at each acquisition.  With it an `echo` takes a fifth longer, and a worker of
pyfuse3's session loop could not go on with the next request.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import trio


class QuickLock(AbstractAsyncContextManager[None]):
    """See the module's docstring.  At most one waiting task is woken at a time, and may find that another
    task has taken the lock first."""

    __slots__ = ("_has_woken", "_is_taken", "_waiting")

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: trio.lowlevel.ParkingLot | None = None
        """Made by the first task that waits."""
        self._has_woken = False

    async def __aenter__(self) -> None:
        while self._is_taken:
            if self._waiting is None:
                self._waiting = trio.lowlevel.ParkingLot()
            await self._waiting.park()
            self._has_woken = False
        self._is_taken = True

    async def __aexit__(self, *raised: object) -> None:
        self._is_taken = False
        if not self._has_woken and self._waiting:
            self._waiting.unpark()
            self._has_woken = True
