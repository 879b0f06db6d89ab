"""What was asked and has not been answered: the table that brings each reply to its request.

What it owns: the batches of one connection that are not answered, and the numbers of its requests.  It
sends and receives nothing.

What always holds:

- Each request belongs to one `Batch`, which is in the table until all of it is answered, and is known
  by its number: a req_id is that and the request's place in the batch.
- A sender that has gone (cancelled, timed out) leaves its batch here, so that the late replies are
  known and dropped.  The table is bounded: past OUTSTANDING_MAX nothing more is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import outcome
from trio.lowlevel import Task, reschedule

from xsfs.xenstore.errors import RequestTimeout, XenstoreError
from xsfs.xenstore.protocol import Fields, Op, Request, WireError, decode_error

Reply = bytes | XenstoreError

PLACE_BITS: Final = 9
"""Of a req_id, those that are the place in a batch; the others are the batch's number."""

BATCH_MAX: Final = 1 << PLACE_BITS
OUTSTANDING_MAX: Final = 65536

_PLACE: Final = BATCH_MAX - 1
_NUMBERS: Final = 1 << 32 - PLACE_BITS
_ERROR: Final = int(Op.ERROR)
_EVENT: Final = int(Op.WATCH_EVENT)
UNANSWERED: Final[Any] = None
"""What a reply is until it is there."""


class Batch:
    """Requests sent together.

    first       the req_id of the first; those of the others follow
    missing     how many of them are not answered
    replies     in order; complete when nothing is missing
    task        who sleeps until then
    deadline    until when, in trio's time; 0 as long as nobody has slept for it
    """

    __slots__ = ("deadline", "first", "missing", "replies", "requests", "task")

    def __init__(self, requests: Sequence[Request], number: int) -> None:
        self.requests = requests
        self.first = number << PLACE_BITS
        self.deadline = 0.0
        self.missing = len(requests)
        self.replies: list[Reply] = [UNANSWERED] * len(requests)
        self.task: Task | None = None

    def wake(self, result: outcome.Outcome[list[Reply]]) -> None:
        """Who sleeps, if anybody does, gets this."""
        if self.task is not None:
            reschedule(self.task, result)
            self.task = None


class Unanswered:
    """See the module's text."""

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}
        self._next = 0
        self.outstanding = 0
        """How many requests are not answered."""

    def __iter__(self) -> Iterator[Batch]:
        """The oldest first."""
        return iter(self._batches.values())

    def enter(self, requests: Sequence[Request]) -> Batch:
        """A batch of BATCH_MAX requests at most.  Raises RequestTimeout where there is no room."""
        count = len(requests)
        if not 0 < count <= BATCH_MAX:
            raise ValueError(f"a batch of {count} requests")
        outstanding = self.outstanding + count
        if outstanding > OUTSTANDING_MAX:
            raise RequestTimeout("Xenstore does not answer, and too much is asked of it already")
        number = self._next
        while number in self._batches:  # it has been waiting since the numbers began anew
            number = (number + 1) % _NUMBERS
        self._next = (number + 1) % _NUMBERS
        batch = self._batches[number] = Batch(requests, number)
        self.outstanding = outstanding
        return batch

    def leave(self, batch: Batch) -> None:
        """Nothing more of it will come."""
        if self._batches.pop(batch.first >> PLACE_BITS, None) is not None:
            self.outstanding -= batch.missing

    def take_all(self) -> list[Batch]:
        """Nothing more will come at all."""
        batches = list(self)
        self._batches.clear()
        self.outstanding = 0
        return batches

    def take(self, messages: Iterable[Fields], on_event: Callable[[bytes], None]) -> None:
        """Replies, and events, with whose payloads `on_event` is called.

        Who waits for a batch that is complete is woken.  Raises WireError for what nobody asked.
        """
        batches = self._batches
        batch: Batch | None = None
        number = -1
        for op, req_id, _, payload in messages:
            # Events first: the kernel's device leaves rubbish in their req_id.
            if op == _EVENT:
                on_event(payload)
                batch = None  # who was told may have ended everything
                continue
            # Mostly that of the message before.
            if batch is None or req_id >> PLACE_BITS != number:
                number = req_id >> PLACE_BITS
                batch = batches.get(number)
            place = req_id & _PLACE
            if (
                batch is None
                or place >= len(batch.requests)
                or batch.replies[place] is not UNANSWERED
            ):
                raise WireError(f"a reply to request {req_id}, which is not open")
            request = batch.requests[place]
            if op == request[0]:
                batch.replies[place] = payload
            elif op == _ERROR:
                batch.replies[place] = XenstoreError(decode_error(payload), request)
            else:
                raise WireError(f"a reply of type {op} to {request.op.name}")
            self.outstanding -= 1
            batch.missing -= 1
            if not batch.missing:
                # Not before: what raises above is woken with all others that are in the table.
                del batches[number]
                if batch.task is not None:
                    batch.wake(outcome.Value(batch.replies))
