"""LOOKUPs that the store did not answer: not asked twice for one system call.

The kernel looks a name up that it knows already, in order to see whether it is still so.  Whatever
error it gets, it forgets the name and looks it up anew, at once and in the name of the same thread.  A
store that is silent would so cost each open(2) and stat(2) its time limit twice.
"""

from __future__ import annotations

import time
from typing import Final

from xsfs.errors import StoreError

AGAIN_SECONDS: Final = 0.02
"""Within which the second LOOKUP comes, and no person's second attempt."""

KEPT_MAX: Final = 64

Question = tuple[int, int, bytes]
"""Thread, directory, name."""


class Silence:
    """The LOOKUPs that have just failed for want of an answer."""

    def __init__(self) -> None:
        self._failed: dict[Question, tuple[StoreError, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._failed)

    def keep(self, question: Question, error: StoreError) -> None:
        self._failed[question] = error, time.monotonic() + AGAIN_SECONDS
        if len(self._failed) > KEPT_MAX:
            del self._failed[next(iter(self._failed))]

    def take(self, question: Question) -> StoreError | None:
        """Why the same question has just failed, once."""
        error, until = self._failed.pop(question, (None, 0.0))
        return error if time.monotonic() < until else None
