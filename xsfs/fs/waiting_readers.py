"""Whether the thread that waits in a read of a watch file has been signalled, as /proc shows it.

The kernel reports a signal to a FUSE file system by FUSE_INTERRUPT, which pyfuse3 does not pass on.  So
xsfs looks at the thread that waits.  It is in `request_wait_answer` from the request until the answer:
in state S until a signal arrives, and in state D from then on.

A READ request does not say which thread waits.  Usually it is the thread that opened the file.  If that
thread does not wait, another one does: of a child process that inherited the file, or of the same process.
The census finds it among all threads of the system.

`Census` owns a table: which threads waited for which inode when it last looked.  It counts the openers
that are expected to wait.  Only tasks that answer a read use it; one of them at a time goes over /proc.

Invariants:

- The census lets other tasks run after each millisecond, and takes a tenth of the time at most.
- A `Reader` never relies on what it found earlier: it looks at each thread again, and drops a thread
  that has stopped waiting.
- A guess is corrected within CENSUS_SECONDS: two readers may wait for one open file.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from signal import SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU
from typing import Final

import trio

CENSUS_SECONDS: Final = 30.0
"""How old the knowledge of a reader may be."""

CENSUS_SECONDS_WRITABLE: Final = 1.0
"""How old if the file is open for writing: a write(2) must wait for the read before it."""

UNKNOWN_SECONDS: Final = 10.0
"""How long a reader that the census did not find is left unknown."""

SLICE_SECONDS: Final = 0.001

CANDIDATES_MAX: Final = 16
"""If more threads than these may be the one that waits, a reader is left unknown."""

DESCRIPTORS_MAX: Final = 1024
"""In how many descriptors of one thread the census looks for the file."""

_WAITS_FOR_ANSWER: Final = b"request_wait_answer"
_WAITS_FOR_TURN: Final = b"fdget_pos"
"""A thread that reads or writes while another thread reads by the same open file.  It is in state D,
and even SIGKILL has to wait until that other read ends."""

_STOPS: Final = sum(1 << number - 1 for number in (SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU))


class Outcome(Enum):
    """The result of a look at a reader."""

    WAITS = auto()
    INTERRUPTED = auto()
    """A signal will end it, or call its handler: read(2) ends with EINTR."""
    PAUSED = auto()
    """It was stopped, frozen or traced, or its process has dealt with the signal otherwise.  A read(2)
    of a pipe would go on when this is over, without the program noticing."""
    UNKNOWN = auto()
    """/proc does not show who waits."""


def _read(thread: int, name: str) -> bytes:
    """The start of a file in /proc; empty if the thread has ended or xsfs may not read it."""
    try:
        with open(f"/proc/{thread}/{name}", "rb", buffering=0) as file:
            return file.read(4096)
    except OSError:
        return b""


def look(thread: int, writable: bool = False) -> Outcome:
    """The state of a thread that waited in a read; UNKNOWN if it does not wait any more.

    writable    whether the file is open for writing
    """
    place = _read(thread, "wchan")
    if _WAITS_FOR_ANSWER in place:
        if _read(thread, "stat").rpartition(b") ")[2][:1] != b"D":
            return Outcome.WAITS
        return Outcome.INTERRUPTED if _will_notice(thread) else Outcome.PAUSED
    if _WAITS_FOR_TURN in place:
        if writable:
            # Perhaps it is a write, which may not have to wait for the next event.
            return Outcome.INTERRUPTED
        return Outcome.PAUSED if _will_notice(thread) else Outcome.WAITS
    return Outcome.UNKNOWN


def _status(thread: int) -> dict[bytes, bytes]:
    lines = _read(thread, "status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(b":") for line in lines)}


def _will_notice(thread: int) -> bool:
    """Whether a signal is pending that ends the program or calls a handler."""
    status = _status(thread)
    of_thread, of_process, blocked, caught = (
        int(status.get(name, b"0"), 16) for name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigCgt")
    )
    pending = (of_thread | of_process) & ~blocked
    return bool(pending & ~(_STOPS & ~caught))


def _inodes_of(thread: int) -> Iterator[int]:
    """The inodes that a waiting thread may be reading: of the descriptor that its system call names, or
    of all that it has open if xsfs may not see the system call."""
    call = _read(thread, "syscall").split()
    # Nine words: the call, six arguments, two registers.
    descriptors = [int(call[1], 16)] if len(call) == 9 else _numbers(f"/proc/{thread}/fd")
    for descriptor in descriptors[:DESCRIPTORS_MAX]:
        _, found, rest = _read(thread, f"fdinfo/{descriptor}").partition(b"\nino:")
        if found:
            yield int(rest.split(None, 1)[0])


Family = tuple[int, int, int]
"""The ids of a thread, its process and the parent process; 0 for the last two if the thread has ended."""


def _family(thread: int) -> Family:
    status = _status(thread)
    return thread, int(status.get(b"Tgid", 0)), int(status.get(b"PPid", 0))


def _numbers(directory: str) -> Sequence[int]:
    try:
        return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    except OSError:
        return ()


class Census:
    """See the module's docstring.  There is one, as there is one /proc."""

    def __init__(self) -> None:
        self.possible = os.path.realpath("/proc/self") == f"/proc/{os.getpid()}"
        """Whether the ids of threads that FUSE gives are those in /proc."""
        self.openers: Counter[int] = Counter()
        """How many reads wait now of files that this thread has opened."""
        self._began = self._due = -math.inf
        """When the last census began, and when the next one may begin."""
        self._waiting: dict[int, list[Family]] = {}
        self._lock = trio.Lock()

    async def waiting(self, inode: int, since: float) -> Sequence[Family]:
        """The threads that wait for the inode, as seen at `since` or later."""
        async with self._lock:
            if self._began < since:
                await trio.sleep_until(self._due)
                began = trio.current_time()
                self._waiting = await self._take()
                # The more it costs, the less often it is taken.
                self._began, self._due = began, began + 10 * (trio.current_time() - began)
            return self._waiting.get(inode, ())

    @staticmethod
    async def _take() -> dict[int, list[Family]]:
        found: dict[int, list[Family]] = {}
        slice_ends = trio.current_time() + SLICE_SECONDS
        for process in _numbers("/proc"):
            for thread in _numbers(f"/proc/{process}/task"):
                place = _read(thread, "wchan")
                if _WAITS_FOR_ANSWER in place or _WAITS_FOR_TURN in place:
                    family = _family(thread)
                    for inode in set(_inodes_of(thread)):
                        found.setdefault(inode, []).append(family)
                if trio.current_time() > slice_ends:
                    await trio.lowlevel.checkpoint()
                    slice_ends = trio.current_time() + SLICE_SECONDS
        return found


CENSUS: Final = Census()


class Reader:
    """The threads that may wait in a read of one open file.

    opener      the thread that opened it; 0 if it is in a PID namespace that xsfs cannot see
    inode       the number of the file's inode
    writable    whether it is open for writing, too
    """

    def __init__(self, opener: int, inode: int, *, writable: bool) -> None:
        self._opener = opener
        self._inode = inode
        self._writable = writable
        self._patience = CENSUS_SECONDS_WRITABLE if writable else CENSUS_SECONDS
        self._threads = {opener}
        self._is_guess = True
        """Whether the census has not yet told of the threads."""
        self._began = 0.0
        """When the present read started."""
        self._census_due = trio.current_time() + self._patience
        """When to ask the census, even if the reader is known, or cannot be found."""
        self._misses = 0
        """How many times in a row the census has not found the reader."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a read waits."""
        self._began = trio.current_time()
        CENSUS.openers[self._opener] += 1
        try:
            yield
        finally:
            CENSUS.openers[self._opener] -= 1
            if not CENSUS.openers[self._opener]:
                del CENSUS.openers[self._opener]

    async def look(self) -> Outcome:
        """The state of the thread that waits in the present read."""
        if not CENSUS.possible:
            return Outcome.UNKNOWN
        now = trio.current_time()
        is_due = now >= self._census_due
        # A thread waits in one read at a time: if it opened several files, others read some of them.
        is_ambiguous = self._is_guess and CENSUS.openers[self._opener] > 1
        outcome = Outcome.UNKNOWN if is_due or is_ambiguous else self._look()
        if outcome is Outcome.UNKNOWN and (is_due or self._misses < 2):
            since = now if self._misses else max(self._began, now - self._patience / 2)
            self._choose(await CENSUS.waiting(self._inode, since))
            self._census_due = trio.current_time() + self._patience
            outcome = self._look()
            if outcome is Outcome.UNKNOWN:
                self._misses += 1
                if self._misses == 1:
                    # A thread that a signal has just woken is nowhere for a moment.
                    return Outcome.WAITS
                self._census_due = trio.current_time() + UNKNOWN_SECONDS
        if outcome is not Outcome.UNKNOWN:
            self._misses = 0
        return outcome

    def _choose(self, waiting: Sequence[Family]) -> None:
        """Of the threads that wait for the inode, those that may wait in this read.

        Another open file may have the same inode.  Its opener, if that waits, waits for it.  A process
        that inherited this file mostly is a child of the process that opened it.
        """
        own = {*_family(self._opener)[:2]} - {0}
        openers = CENSUS.openers.keys() - {self._opener}
        others = [family for family in waiting if family[0] not in openers]
        near = [family for family in others if own.intersection(family)]
        threads = {thread for thread, _, _ in near or others}
        self._is_guess = not 0 < len(threads) <= CANDIDATES_MAX
        self._threads = {self._opener} if self._is_guess else threads

    def _look(self) -> Outcome:
        outcomes = {thread: look(thread, self._writable) for thread in self._threads}
        waiting = {thread for thread in outcomes if outcomes[thread] is not Outcome.UNKNOWN}
        if not waiting:
            return Outcome.UNKNOWN
        self._threads = waiting
        seen = {outcomes[thread] for thread in waiting}
        if Outcome.INTERRUPTED in seen and (len(waiting) == 1 or self._writable):
            return Outcome.INTERRUPTED
        # If several threads may be the reader, a signal for one must not interrupt another.
        return Outcome.WAITS if seen == {Outcome.WAITS} else Outcome.PAUSED
