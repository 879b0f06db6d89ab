"""The mount's own limits on what its users have open together; Xenstore's quotas are the daemon's.

With `allow_other` every user of the system can open files.  Users who are neither root nor the mounting user
share half of each quota, so that the other half is left to root.
"""

from __future__ import annotations

from dataclasses import dataclass

from xsfs.fs.nodes import Caller, refuse


@dataclass
class Quota:
    """How much of something there may be.

    number  the errno when it is used up
    """

    limit: int
    number: int
    used: int = 0
    used_by_unprivileged: int = 0


class Share:
    """The part of a quota that one handle takes."""

    __slots__ = ("_is_unprivileged", "_quota", "_size")

    def __init__(self, quota: Quota, caller: Caller) -> None:
        self._quota = quota
        self._is_unprivileged = caller.unprivileged
        self._size = 0

    def resize(self, size: int) -> None:
        """Take this much instead.  Fails with the quota's errno, and then changes nothing."""
        quota, more = self._quota, size - self._size
        is_full = quota.used + more > quota.limit
        if self._is_unprivileged:
            is_full = is_full or quota.used_by_unprivileged + more > quota.limit // 2
        if is_full and more > 0:
            refuse(quota.number)
        quota.used += more
        if self._is_unprivileged:
            quota.used_by_unprivileged += more
        self._size = size
