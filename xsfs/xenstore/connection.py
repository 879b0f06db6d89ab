"""One connection to Xenstore: many requests in flight, each reply brought to the one who waits.

What it owns: a transport, what was asked through it and is unanswered
(xsfs/xenstore/unanswered.py), and three tasks (`run`): the reader, the writer (idle unless the peer is slow to take what is sent) and the
watchdog (idle unless something is unanswered).  Any task of the same trio loop may call `burst`.

What always holds:

- The reader reads, whoever else waits, or is at work (and may read, too): an oxenstored whose events
  are not read stops answering other clients.  So what is done with an event (`on_event`) must not wait,
  but for a moment.
- Who sends a batch sleeps until the whole of it is answered, timed out, or the connection has ended.
  When `run` ends, every sender has been woken.
- Any violation of the protocol ends the connection; nothing after it is believed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import outcome
import trio
from trio.lowlevel import Abort, current_task, wait_task_rescheduled

from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, XenstoreError
from xsfs.xenstore.protocol import Fields, Op, Parser, Request, WireError, decode_event, encode_all
from xsfs.xenstore.threads import run_abandonable
from xsfs.xenstore.transport import Transport
from xsfs.xenstore.unanswered import BATCH_MAX, UNANSWERED, Batch, Reply, Unanswered

log = logging.getLogger(__name__)

WINDOW: Final = BATCH_MAX
"""How many requests of one burst are sent before their replies are awaited: enough to hide the
round trip, few enough that other tasks' requests wait milliseconds behind them."""

PROMPT_MAX: Final = 64
"""How many requests a burst may have whose replies are waited for on the spot."""
PROMPT_SECONDS: Final = 0.0005
PROMPT_SKIPS_MAX: Final = 128
"""A daemon that took longer than PROMPT_SECONDS is not waited for in this way the next time; if it
then takes longer again, the next two times, and so on, up to so many."""


class Connection:
    """See the module's text.  `run` must be running while `burst` is used.

    timeout     seconds within which each request must be answered
    on_event    called with (path, token) of each watch event, in the reader's task
    """

    def __init__(
        self,
        transport: Transport,
        timeout: float,
        on_event: Callable[[bytes, bytes], None] | None = None,
    ) -> None:
        self._transport = transport
        self._timeout = timeout
        self._on_event = on_event
        self._parser = Parser()
        self._unanswered = Unanswered()
        self._unsent = b""
        self._skip_prompt = 0
        self._skips = 0
        """How often that was after the last time that it took too long; 0 if it was quick since."""
        self._writer_parked = trio.lowlevel.ParkingLot()
        self._watchdog_parked = trio.lowlevel.ParkingLot()
        self.alive = True
        self._closed_because = ""
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.payload_max = transport.payload_max

    @property
    def prompt(self) -> bool:
        """Whether replies are waited for on the spot now."""
        return (
            self.alive
            and self._transport.prompt
            and not self._skip_prompt
            and not self._unsent
            and self._unanswered.outstanding <= PROMPT_MAX
        )

    async def ended(self) -> None:
        """Return when the connection has ended."""
        await self._ended.wait()

    # ------------------------------------------------------------------------------- requests

    async def burst(self, requests: Sequence[Request], tx_id: int = 0) -> list[Reply]:
        """Ask everything at once; the replies, in order, errors of single requests among them.

        Raises ConnectionLost, RequestTimeout.
        """
        if len(requests) > WINDOW:
            replies: list[Reply] = []
            for start in range(0, len(requests), WINDOW):
                replies += await self.burst(requests[start : start + WINDOW], tx_id)
            return replies
        if not requests:
            return []
        if self._transport.watch_blocks and requests[0].op in (Op.WATCH, Op.UNWATCH):
            return await self.replies(await self._post_watch(requests))
        return await self.replies(self.ask(requests, tx_id))

    def ask(
        self,
        requests: Sequence[Request],
        tx_id: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> Batch:
        """Send requests, WINDOW at most.  What the store answers within a moment is answered then.

        meanwhile   called when they are sent: what can be done before the answers are there

        Raises ConnectionLost where nothing was sent, RequestTimeout where too much is unanswered.
        """
        batch = self._post(requests, tx_id)
        if meanwhile is not None:
            meanwhile()
        self._receive_promptly(batch)
        return batch

    def ask_both(
        self, requests: Sequence[Request], more: Callable[[], Sequence[Request]]
    ) -> tuple[Batch, Batch | None]:
        """The same, and send right behind it what `more` gives, while the store is at work on the
        former.  Only that is waited for.  None where nothing more was asked, or over WINDOW."""
        batch = self._post(requests, 0)
        questions = more()
        asked = 0 < len(questions) <= WINDOW and self.alive
        rest = self._post(questions, 0) if asked else None
        self._receive_promptly(batch)
        if batch.missing and rest is not None:
            batch.deadline = rest.deadline = trio.current_time() + self._timeout
        return batch, rest

    def _post(self, requests: Sequence[Request], tx_id: int) -> Batch:
        if not self.alive:
            raise ConnectionLost(self._closed_because)
        batch = self._unanswered.enter(requests)
        messages = encode_all(requests, batch.first, tx_id)
        if self._unsent:
            self._unsent += b"".join(messages)
            return batch
        try:
            self._unsent = self._transport.send(messages)
            if self._unsent:
                self._writer_parked.unpark_all()
        except OSError as error:
            self.close(f"cannot send: {error.strerror}")
        return batch

    async def replies(self, batch: Batch) -> list[Reply]:
        """Sleep until all are there.  Raises ConnectionLost, RequestTimeout."""
        if not batch.missing:
            return batch.replies
        if not self.alive:
            raise ConnectionLost(self._closed_because)
        if not batch.deadline:
            # Nobody has slept since it was sent: that was within the last moment.
            batch.deadline = trio.current_time() + self._timeout
        batch.task = current_task()
        if self._watchdog_parked:
            self._watchdog_parked.unpark_all()

        def abort(_: object) -> Abort:
            batch.task = None
            return Abort.SUCCEEDED

        replies: list[Reply] = await wait_task_rescheduled(abort)
        return replies

    def comes_soon(self, batch: Batch | None) -> bool:
        """Whether all of it can be expected within a moment: not too much, or of a slow daemon."""
        if batch is None or not batch.missing:
            return True
        return len(batch.requests) <= PROMPT_MAX and self.prompt

    def replies_in_turn(self, batch: Batch | None) -> Iterator[Reply]:
        """In order, each as soon as it is there: who takes them is at work while the store is.

        They are waited for on the spot, for a moment in all.  Ends where one has not come by then.
        """
        if batch is None:
            return
        seconds = PROMPT_SECONDS
        replies = batch.replies
        for place in range(len(replies)):
            while replies[place] is UNANSWERED:
                if not self.prompt:
                    return
                start = time.perf_counter()
                came = self._receive_soon()
                seconds -= time.perf_counter() - start
                self._took(seconds)
                if not came:
                    return
            yield replies[place]

    async def _post_watch(self, requests: Sequence[Request]) -> Batch:
        """Have the device carry out a WATCH or UNWATCH, in a thread since it blocks.

        A refused one is an error of write(2), and has no reply.
        """
        if not self.alive:
            raise ConnectionLost(self._closed_because)
        batch = self._unanswered.enter(requests)
        batch.deadline = trio.current_time() + self._timeout
        try:
            with trio.fail_after(self._timeout):
                await run_abandonable(self._transport.send, encode_all(requests, batch.first, 0))
        except trio.TooSlowError:
            raise RequestTimeout("the kernel did not carry out a WATCH in time") from None
        except OSError as error:
            name = errno.errorcode.get(error.errno or errno.EIO, "EIO")
            self._unanswered.leave(batch)
            raise XenstoreError(name, batch.requests[0]) from error
        return batch

    def _receive_promptly(self, batch: Batch) -> None:
        """Wait for the replies right here, for a moment, without a trip through the event loop.

        A daemon on another core answers within some 20 microseconds, which is less than it takes
        to go to sleep and be woken.  Done only for a few requests while nothing else is under way,
        and not again for a while after a daemon has let us wait: the whole loop stands still.
        """
        if self._unanswered.outstanding > PROMPT_MAX or self._unsent:
            return
        if self._skip_prompt:
            self._skip_prompt -= 1
            return
        clock = time.perf_counter
        late = clock() + PROMPT_SECONDS
        left = PROMPT_SECONDS
        while batch.missing and left > 0 and self.alive:
            came = self._receive_soon()
            left = late - clock()
            if not came:
                break
        self._took(left)

    def _receive_soon(self) -> bool:
        """Wait for what comes within a moment, and take it.  Whether anything came."""
        try:
            data = self._transport.receive_soon()
        except OSError:
            return False  # the reader meets it, too
        if data is None:
            return False
        self._digest(data)
        return True

    def _took(self, left: float) -> None:
        """Replies were waited for, and so much of the moment is left."""
        if left <= 0:
            self._skip_prompt = self._skips = min(2 * self._skips or 1, PROMPT_SKIPS_MAX)
        elif not self._unanswered.outstanding:
            self._skips = 0

    # --------------------------------------------------------------------------------- tasks

    async def run(self) -> None:
        """Serve the connection until it ends, or until cancelled.  Never raises for its end."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_rest)
                    nursery.start_soon(self._watch_the_clock)
                    await self._read()
        finally:
            self.close("the connection was closed")

    def close(self, reason: str = "the connection was closed") -> None:
        """End the connection, and wake all who wait on it.  Any number of times."""
        if not self.alive:
            return
        self._closed_because = reason
        self.alive = False
        self._scope.cancel()
        self._ended.set()
        for batch in self._unanswered.take_all():
            batch.wake(outcome.Error(ConnectionLost(reason)))
        trio.lowlevel.notify_closing(self._transport.fileno())
        trio.lowlevel.notify_closing(self._transport.outlet())
        self._transport.close()

    async def _read(self) -> None:
        while self.alive:
            try:
                await trio.lowlevel.wait_readable(self._transport.fileno())
            except OSError as error:
                self.close(f"cannot receive: {error.strerror}")
                return
            self._receive()

    def receive(self) -> None:
        """Take the replies that have come, if any are awaited.

        For who is at work for a while without a turn for the reader: a daemon that cannot get rid of
        its replies stops.
        """
        if self.alive and self._unanswered.outstanding:
            self._receive()

    def _receive(self) -> None:
        """Take what there is, if anything."""
        try:
            data = self._transport.receive()
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"cannot receive: {error.strerror}")
            return
        self._digest(data)

    def _digest(self, data: bytes) -> None:
        """Take what was received; nothing means the end."""
        if not data:
            middle = " in the middle of a message" if self._parser.partial else ""
            self.close(f"Xenstore closed the connection{middle}")
            return
        # Mostly one reply comes at a time.
        if (one := self._parser.whole(data)) is not None:
            messages: Iterable[Fields] = (one,)
        else:
            self._parser.feed(data)
            messages = self._parser.messages()
        try:
            self._unanswered.take(messages, self._event)
        except WireError as error:
            log.error("Xenstore broke the protocol: %s", error)
            self.close(f"Xenstore broke the protocol: {error}")

    def _event(self, payload: bytes) -> None:
        path, token = decode_event(payload)
        if self._on_event is not None:
            self._on_event(path, token)

    async def _write_rest(self) -> None:
        while True:
            if not self._unsent:
                await self._writer_parked.park()
            await trio.lowlevel.wait_writable(self._transport.outlet())
            try:
                self._unsent = self._transport.send_rest(self._unsent)
            except OSError as error:
                self.close(f"cannot send: {error.strerror}")
                return

    async def _watch_the_clock(self) -> None:
        """Wake at most once a timeout while something is awaited, and never while nothing is."""
        while True:
            # They are slept for in the order in which they were sent: the first is the oldest.
            oldest = next((b for b in self._unanswered if b.task is not None), None)
            if oldest is None:
                await self._watchdog_parked.park()
            elif oldest.deadline > trio.current_time():
                await trio.sleep_until(oldest.deadline)
            else:
                oldest.wake(outcome.Error(RequestTimeout("Xenstore did not answer in time")))
