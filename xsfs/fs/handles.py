"""The table of open files and directories, and how many of them there may be.

With `allow_other` every user of the system can open files here.  Those who are neither root nor the one
who mounted share half of what there is, so that however many they open, something is left for others.

What always holds: a handle is in the table from its OPEN to its RELEASE, or to the end of the mount.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import count
from typing import Final, cast

from pyfuse3 import FileHandleT

from xsfs.fs.inodes import Handle, refuse

HANDLES_MAX: Final = 65536
"""Each may hold a value of 4 KiB: 256 MiB at the very most."""


class Handles:
    """See the module's text."""

    def __init__(self) -> None:
        self._handles: dict[int, Handle] = {}
        self._numbers = cast(Iterator[FileHandleT], count(1))
        self._foreign: set[int] = set()
        """Those of others."""
        self._own = frozenset((0, os.getuid()))

    def __len__(self) -> int:
        return len(self._handles)

    def is_foreign(self, uid: int) -> bool:
        """Whether that is one of the others."""
        return uid not in self._own

    def admit(self, uid: int) -> bool:
        """The same of who opens; ENFILE if there is no room for one more."""
        foreign = uid not in self._own  # and no call for it: an OPEN is to be answered at once
        full = len(self._handles) >= HANDLES_MAX
        if full or (foreign and len(self._foreign) >= HANDLES_MAX // 2):
            refuse(errno.ENFILE)
        return foreign

    def add(self, handle: Handle, foreign: bool) -> FileHandleT:
        number = next(self._numbers)
        self._handles[number] = handle
        if foreign:
            self._foreign.add(number)
        return number

    def get(self, number: int) -> Handle:
        return self._handles[number]

    def pop(self, number: int) -> Handle:
        self._foreign.discard(number)
        return self._handles.pop(number)

    def pop_all(self) -> list[Handle]:
        handles = list(self._handles.values())
        self._handles.clear()
        self._foreign.clear()
        return handles
