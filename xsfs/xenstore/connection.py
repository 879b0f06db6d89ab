"""One connection to Xenstore: many requests in flight, each reply matched to its request.

A `Connection` owns a transport, the requests in flight, and three tasks (`run`).  The reader receives.  The
writer sends if several tasks ask at once or the peer is slow.  The watchdog enforces deadlines while a task
waits for replies.  Any task of the same trio loop may call `pipeline`.

Invariants:

- No other task can hold up the reader, because an oxenstored whose events are not read stops answering other
  clients.  So `on_event` must not wait, nor take longer than a few microseconds.
- Each request in flight is known by its req_id until its reply has come.  A task that is cancelled leaves
  its requests in flight, so that late replies are recognised and dropped.  At most IN_FLIGHT_MAX are; a
  pipeline waits until there is room for its requests.
- A task that waits for replies is woken when the last one has come, when its deadline has passed, or when
  the connection has ended.  A request that is unanswered at its deadline ends the connection, even if the
  task that sent it was cancelled.
- A violation of the protocol ends the connection.

A task that is alone waits for its replies inside `pipeline`, without the event loop: the store answers within
some 20 microseconds, and a turn of the loop takes longer.  The task gives other tasks a turn if they have had
none for STREAK_SECONDS.  If several tasks ask, the writer sends their requests together, in the loop's next
turn.
"""

from __future__ import annotations

import logging
import math
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import outcome
import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError, XenstoreError
from xsfs.xenstore.home import Home
from xsfs.xenstore.protocol import (
    HEADER,
    Op,
    Parser,
    Request,
    WireError,
    decode_error,
    decode_event,
)
from xsfs.xenstore.transport import Transport
from xsfs.xenstore.turns import turns
from xsfs.xenstore.xenbus import WatchRefused

log = logging.getLogger(__name__)

Reply = bytes | XenstoreError

WINDOW: Final = 512
"""How many requests of one pipeline are sent before their replies are awaited.  They are enough to hide the
round trip, and few enough that requests of other tasks wait only milliseconds behind them."""

IN_FLIGHT_MAX: Final = 65536

POLL_REQUESTS_MAX: Final = 64
POLL_SECONDS: Final = 0.0005
"""A task waits for the replies to at most so many requests, and for so long, within `pipeline` itself."""

POLL_SKIPS_MAX: Final = 128
"""After replies that took longer, the next pipeline does not wait for its replies in this way.  If they
take longer again, the next two do not, then four, up to this number."""

STREAK_SECONDS: Final = 0.001
"""For so long tasks may call `pipeline` one after the other without a turn for the event loop."""

_NOT_YET: Final[Any] = None
_ERROR: Final = int(Op.ERROR)
_EVENT: Final = int(Op.WATCH_EVENT)
_WATCH_OPS: Final = frozenset((Op.WATCH, Op.UNWATCH))


class _Batch:
    """Requests that one task sent together.

    messages    the requests as bytes, until the transport takes them
    missing     how many of them are not answered
    replies     in the order of the requests, complete if nothing is missing
    task        the task that sleeps until then
    deadline    in trio's time; 0 if no task has slept yet
    """

    __slots__ = ("deadline", "messages", "missing", "replies", "requests", "task")

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.messages: list[bytes] = []
        self.missing = len(requests)
        self.replies: list[Reply] = [_NOT_YET] * self.missing
        self.task: Task | None = None
        self.deadline = 0.0

    def wake(self, result: outcome.Outcome[list[Reply]]) -> None:
        if self.task is not None:
            reschedule(self.task, result)
            self.task = None


class Connection:
    """See the module's docstring.  `run` must be running while `pipeline` is used.

    timeout     seconds within which each pipeline must be answered
    on_event    called with (path, token) of each watch event, by the reader
    home        where paths are sent as relative ones
    """

    def __init__(
        self,
        transport: Transport,
        timeout: float,
        on_event: Callable[[bytes, bytes], None] | None = None,
        home: Home | None = None,
    ) -> None:
        self._transport = transport
        self._timeout = timeout
        self._on_event = on_event
        self._home = home or Home()
        self._parser = Parser()
        self._in_flight: dict[int, tuple[_Batch, int]] = {}
        """By req_id: the batch, and the request's place in it."""
        self._next_id = 0
        self._outgoing: list[_Batch] = []
        """Messages that the writer has to send."""
        self._unsent = b""
        """The rest of messages for which the peer had no room."""
        self._room = trio.lowlevel.ParkingLot()
        """Tasks that wait until fewer requests are in flight."""
        self._writer_parked = trio.lowlevel.ParkingLot()
        self._watchdog_parked = trio.lowlevel.ParkingLot()
        self._watched_deadline = 0.0
        self._turns = turns()
        self._streak_task: Task | None = None
        self._streak_switches = 0
        self._streak_since = 0.0
        """The turn since which the switches between tasks are counted."""
        self._poll_skips = 0
        self._poll_misses = 0
        """How many pipelines were to be skipped after the last late reply; 0 if replies came in time."""
        self.alive = True
        self._closed_because = ""
        self._scope = trio.CancelScope()
        self.ended = trio.Event()
        self.payload_max = transport.payload_max
        self.is_served_in_turn = transport.is_served_in_turn

    # ------------------------------------------------------------------------------- requests

    async def pipeline(
        self, requests: Sequence[Request], tx_id: int = 0, deadline: float | None = None
    ) -> list[Reply]:
        """Send the requests, WINDOW at a time, and wait for the replies: in order, with errors of single
        requests among them.

        deadline    in trio's time; `timeout` from now on if None

        A request that is too long for the transport is not sent.  Its reply is the XenstoreError `EINVAL`,
        with which the daemons answer a path that is too long.

        Raises ConnectionLost, with `unsent` if nothing was sent.  Raises RequestTimeout if this or an earlier
        pipeline was not answered in time; the connection has ended then.  Raises ValueError for a request
        that is no message; nothing was sent then.  If the caller is cancelled, the store may still carry out
        requests that were sent.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if deadline is None:
            deadline = trio.current_time() + self._timeout
        count = len(requests)
        if count > WINDOW:
            replies: list[Reply] = []
            for start in range(0, count, WINDOW):
                window = requests[start : start + WINDOW]
                try:
                    replies += await self.pipeline(window, tx_id, deadline)
                except StoreError as error:
                    error.unsent = error.unsent and not start
                    raise
            return replies
        if not count:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return []
        if len(self._in_flight) + count > IN_FLIGHT_MAX:
            await self._wait_for_room(count, deadline)
        if requests[0].op in _WATCH_OPS:
            return await self._pipeline_watches(requests, deadline)
        is_crowd = self._is_crowd()
        batch = self._enter(requests, tx_id)
        if is_crowd or self._unsent:
            self._outgoing.append(batch)
            self._writer_parked.unpark_all()
        else:
            self._send(batch.messages, (batch,))
            self._receive_at_once(batch)
        if batch.missing:
            return await self._wait(batch, deadline)
        if time.perf_counter() - self._turns.last > STREAK_SECONDS:
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._turns.last = time.perf_counter()
        return batch.replies

    async def _wait_for_room(self, count: int, deadline: float) -> None:
        """Wait until so many more requests may be in flight."""
        with trio.move_on_at(deadline) as scope:
            while self.alive and len(self._in_flight) + count > IN_FLIGHT_MAX:
                await self._room.park()
        if scope.cancelled_caught:
            reason = "Xenstore does not answer, and too many requests wait for it"
            raise RequestTimeout(reason, unsent=True)
        self._room.unpark()  # there may be room for the next one, too

    def _is_crowd(self) -> bool:
        """Whether requests of other tasks are under way, or about to be."""
        if self._in_flight:
            return True
        task = current_task()
        if self._streak_since != self._turns.last:
            self._streak_since = self._turns.last
            self._streak_switches = 0
        elif task is not self._streak_task:
            self._streak_switches += 1
        self._streak_task = task
        return self._streak_switches > 1

    def _enter(self, requests: Sequence[Request], tx_id: int) -> _Batch:
        """Put requests into the table of those in flight."""
        if not self.alive:
            raise ConnectionLost(self._closed_because, unsent=True)
        in_flight = self._in_flight
        batch = _Batch(requests)
        messages = batch.messages
        req_id = self._next_id
        payload_max, pack, above = self.payload_max, HEADER.pack, self._home.above
        try:
            for place, (op, payload) in enumerate(requests):
                if above and payload.startswith(above):
                    payload = payload[len(above) :]
                if len(payload) > payload_max:
                    # C xenstored closes the connection, and oxenstored gets out of step.
                    batch.replies[place] = XenstoreError("EINVAL", requests[place])
                    batch.missing -= 1
                    continue
                while req_id in in_flight:  # unanswered since the numbers last started at 0
                    req_id = (req_id + 1) & 0xFFFFFFFF
                messages.append(pack(op, req_id, tx_id, len(payload)) + payload)
                in_flight[req_id] = batch, place
                req_id = (req_id + 1) & 0xFFFFFFFF
        except struct.error:
            self._forget(batch)
            raise ValueError(f"not a message: {requests[place]}") from None
        self._next_id = req_id
        return batch

    def _forget(self, batch: _Batch) -> None:
        """Remove its requests from the table, because no replies will come."""
        for req_id, (other, _) in list(self._in_flight.items()):
            if other is batch:
                del self._in_flight[req_id]

    def _send(self, messages: Sequence[bytes], batches: Sequence[_Batch]) -> None:
        """Send the messages of these batches."""
        failure = None
        try:
            self._unsent = self._transport.send(messages)
        except OSError as error:
            failure = error
        if not isinstance(failure, ConnectionError):  # else the socket is closed, and took nothing
            for batch in batches:
                batch.messages = []
        if failure is not None:
            self.close(f"cannot send: {failure.strerror}")
        if self._unsent:
            self._writer_parked.unpark_all()

    async def _wait(self, batch: _Batch, deadline: float) -> list[Reply]:
        """Sleep until all replies have come."""
        if not self.alive:
            raise ConnectionLost(self._closed_because, unsent=bool(batch.messages))
        batch.deadline = deadline
        batch.task = current_task()
        if deadline < self._watched_deadline:
            self._watchdog_parked.unpark_all()

        def abort(_: object) -> Abort:
            batch.task = None
            return Abort.SUCCEEDED

        replies: list[Reply] = await wait_task_rescheduled(abort)
        return replies

    async def _pipeline_watches(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        batch = self._enter(requests, 0)
        try:
            if self._unsent or self._outgoing:
                self._outgoing.append(batch)
            else:
                with trio.fail_at(deadline):
                    self._unsent = await self._transport.send_watch(batch.messages)
                batch.messages = []
            self._writer_parked.unpark_all()
        except trio.TooSlowError:
            self.close("the kernel did not carry out a WATCH in time")
            raise RequestTimeout("the kernel did not carry out a WATCH in time") from None
        except WatchRefused as refused:
            self._forget(batch)
            return [XenstoreError(refused.name, request) for request in requests]
        except OSError as error:
            self.close(f"cannot send: {error.strerror}")
        if batch.missing:
            return await self._wait(batch, deadline)
        return batch.replies

    def _receive_at_once(self, batch: _Batch) -> None:
        """Receive the replies here, if they come within POLL_SECONDS.  The event loop waits meanwhile."""
        if batch.missing > POLL_REQUESTS_MAX:
            return
        if self._poll_skips:
            self._poll_skips -= 1
            return
        left = POLL_SECONDS
        end = time.perf_counter() + left
        while batch.missing and left > 0 and self.alive:
            try:
                data = self._transport.receive_soon()
            except OSError:
                return  # the reader meets the error, too
            left = end - time.perf_counter()
            if data is None:
                break
            self._digest(data)
        if left <= 0:
            self._poll_misses = self._poll_skips = min(2 * self._poll_misses or 1, POLL_SKIPS_MAX)
        elif not batch.missing:
            self._poll_misses = 0

    # --------------------------------------------------------------------------------- tasks

    async def run(self) -> None:
        """Serve the connection until it ends, or until cancelled.  Does not raise for its end."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._enforce_deadlines)
                    await self._read()
        finally:
            self.close()

    def close(
        self,
        reason: str = "the connection was closed",
        error: type[ConnectionLost] | type[RequestTimeout] = ConnectionLost,
    ) -> None:
        """End the connection, and wake all tasks that wait on it with `error`.  Any number of times."""
        if not self.alive:
            return
        self._closed_because = reason
        self.alive = False
        self._scope.cancel()
        self.ended.set()
        for batch in {batch for batch, _ in self._in_flight.values()}:
            batch.wake(outcome.Error(error(reason, unsent=bool(batch.messages))))
        self._in_flight.clear()
        self._room.unpark_all()
        self._transport.close()

    async def _read(self) -> None:
        while self.alive:
            try:
                data = await self._transport.receive()
            except trio.ClosedResourceError:
                return
            except OSError as error:
                self.close(f"cannot receive: {error.strerror}")
                return
            self._turns.last = time.perf_counter()
            self._digest(data)

    def _digest(self, data: bytes) -> None:
        """Handle what was received; b"" means the end."""
        if not data:
            middle = " in the middle of a message" if self._parser.partial else ""
            self.close(f"Xenstore closed the connection{middle}")
            return
        in_flight = self._in_flight
        try:
            for op, req_id, _, payload in self._parser.feed(data):
                # Events first: the kernel's device leaves rubbish in their req_id.
                if op == _EVENT:
                    path, token = decode_event(payload)
                    if self._on_event is not None:
                        self._on_event(path, token)
                    if not self.alive:
                        return
                    continue
                try:
                    batch, place = in_flight[req_id]
                except KeyError:
                    text = f"a reply to request {req_id}, which is not in flight"
                    raise WireError(text) from None
                request = batch.requests[place]
                if op == request.op:
                    batch.replies[place] = payload
                elif op == _ERROR:
                    batch.replies[place] = XenstoreError(decode_error(payload), request)
                else:
                    raise WireError(f"a reply of type {op} to a request of type {request.op}")
                del in_flight[req_id]
                batch.missing -= 1
                if not batch.missing and batch.deadline:
                    batch.wake(outcome.Value(batch.replies))
                    if self._room:
                        self._room.unpark()
            if self._parser.error is not None:
                raise self._parser.error
        except WireError as error:
            log.error("Xenstore broke the protocol: %s", error)
            self.close(f"Xenstore broke the protocol: {error}")

    async def _write(self) -> None:
        try:
            while self.alive:
                if self._unsent:
                    self._unsent = await self._transport.send_rest(self._unsent)
                elif self._outgoing:
                    batches, self._outgoing = self._outgoing, []
                    self._send([each for batch in batches for each in batch.messages], batches)
                else:
                    await self._writer_parked.park()
        except trio.ClosedResourceError:
            return
        except OSError as error:
            self.close(f"cannot send: {error.strerror}")

    async def _enforce_deadlines(self) -> None:
        """Wake at most once in a time limit while a task waits, and never while none does."""
        while True:
            deadlines = (batch.deadline for batch, _ in self._in_flight.values() if batch.deadline)
            self._watched_deadline = min(deadlines, default=math.inf)
            if self._watched_deadline <= trio.current_time():
                self.close("Xenstore did not answer in time", RequestTimeout)
            with trio.move_on_at(self._watched_deadline):
                await self._watchdog_parked.park()
