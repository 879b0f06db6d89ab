"""A connection: each reply comes to its request, each task to its turn, and each request to its end.

The peer is the other end of a socket pair, which the tests answer by hand.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.support.clock import LeapingClock
from tests.support.messages import Message, messages_of
from xsfs.xenstore import connection as module
from xsfs.xenstore import protocol
from xsfs.xenstore.connection import POLL_REQUESTS_MAX, WINDOW, Connection, Reply
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, XenstoreError
from xsfs.xenstore.protocol import PAYLOAD_MAX, Op, Parser, Request, encode
from xsfs.xenstore.transport import SocketTransport

LIMIT = 60.0
"""Seconds a test may take, over which something hangs."""


class CountingTransport(SocketTransport):
    """A socket that counts its sends."""

    sends = 0

    def send(self, messages: Sequence[bytes]) -> bytes:
        self.sends += 1
        return super().send(messages)


class Peer:
    """The other end: the test is the store."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._parser = Parser()

    def requests(self) -> list[Message]:
        """Those that have come since the last call."""
        found: list[Message] = []
        try:
            while True:
                data = self.socket.recv(1 << 20)
                assert data, "the connection has ended"
                found += messages_of(self._parser, data)
                if len(data) < 1 << 20:
                    break
        except BlockingIOError:
            pass
        return found

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self, request: Message, payload: bytes, op: int | None = None) -> None:
        self.send(encode(request.op if op is None else op, request.req_id, 0, payload))


@asynccontextmanager
async def connected(
    timeout: float = LIMIT, on_event: Callable[[bytes, bytes], None] | None = None
) -> AsyncIterator[tuple[Connection, Peer, trio.Nursery]]:
    ours, theirs = socket.socketpair()
    connection = Connection(CountingTransport(ours, same_loop=True), timeout, on_event)
    with trio.fail_after(2 * LIMIT), theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            yield connection, Peer(theirs), nursery
            connection.close()


def requests(count: int) -> list[Request]:
    return [protocol.read(b"/%d" % number) for number in range(count)]


class Outcome:
    """The outcome of one pipeline."""

    def __init__(self, nursery: trio.Nursery, connection: Connection, asked: list[Request]) -> None:
        self.replies: list[Reply] | None = None
        self.error: type[BaseException] | None = None
        self.scope = trio.CancelScope()
        self._asked = asked
        nursery.start_soon(self._run, connection)

    async def _run(self, connection: Connection) -> None:
        with self.scope:
            try:
                self.replies = await connection.pipeline(self._asked)
            except (ConnectionLost, RequestTimeout) as error:
                self.error = type(error)


# ------------------------------------------------------------------------------ requests in flight


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.randoms(), st.data())
def test_replies_in_any_order_come_to_their_requests(
    counts: list[int], random: Random, data: st.DataObject
) -> None:
    shuffled = data.draw(st.booleans(), "shuffled")

    async def main() -> None:
        async with connected() as (connection, peer, nursery):
            outcomes = [Outcome(nursery, connection, requests(count)) for count in counts]
            await wait_all_tasks_blocked()
            came = peer.requests()
            assert len({message.req_id for message in came}) == len(came) == sum(counts)
            if shuffled:
                random.shuffle(came)
            while came:
                together = random.randint(1, len(came))
                for message in came[:together]:
                    peer.reply(message, b"reply %d to %s" % (message.req_id, message.payload))
                del came[:together]
                await wait_all_tasks_blocked()
            for outcome, count in zip(outcomes, counts, strict=True):
                assert outcome.replies is not None
                for number, reply in enumerate(outcome.replies):
                    assert isinstance(reply, bytes)
                    assert reply.endswith(b" to /%d\0" % number)
                assert len(outcome.replies) == count
            replies = [reply for outcome in outcomes for reply in outcome.replies or ()]
            assert len(set(map(str, replies))) == sum(counts), "a reply came twice"
            assert not connection._in_flight
            assert connection.alive

    trio.run(main)


@trio_test
async def test_an_error_is_of_its_request() -> None:
    async with connected() as (connection, peer, nursery):
        outcome = Outcome(nursery, connection, requests(2))
        await wait_all_tasks_blocked()
        first, second = peer.requests()
        peer.reply(second, b"ENOENT\0", Op.ERROR)
        peer.reply(first, b"")
        await wait_all_tasks_blocked()
        assert outcome.replies is not None
        value, error = outcome.replies
        assert value == b""
        assert isinstance(error, XenstoreError)
        assert (error.name, error.request) == ("ENOENT", requests(2)[1])


@trio_test
async def test_events_among_replies_whatever_their_number() -> None:
    events: list[tuple[bytes, bytes]] = []
    async with connected(on_event=lambda *event: events.append(event)) as (
        connection,
        peer,
        nursery,
    ):
        outcome = Outcome(nursery, connection, requests(1))
        await wait_all_tasks_blocked()
        (message,) = peer.requests()
        event = encode(Op.WATCH_EVENT, message.req_id, 0, b"/a\0t\0")
        peer.send(event + encode(Op.READ, message.req_id, 0, b"x") + event)
        await wait_all_tasks_blocked()
        assert events == [(b"/a", b"t")] * 2
        assert outcome.replies == [b"x"]


@trio_test
async def test_an_event_may_end_the_connection() -> None:
    """No reply behind it is believed."""
    async with connected(on_event=lambda *_: connection.close("for the test")) as (
        connection,
        peer,
        nursery,
    ):
        outcome = Outcome(nursery, connection, requests(2))
        await wait_all_tasks_blocked()
        first, second = peer.requests()
        peer.send(
            encode(Op.READ, first.req_id, 0, b"x")
            + encode(Op.WATCH_EVENT, 0, 0, b"/a\0t\0")
            + encode(Op.READ, second.req_id, 0, b"y")
        )
        await wait_all_tasks_blocked()
        assert outcome.error is ConnectionLost


@pytest.mark.parametrize(
    ("op", "which"),
    [
        pytest.param(Op.READ, lambda first: first, id="twice"),
        pytest.param(Op.READ, lambda first: first + 3, id="of no request"),
        pytest.param(Op.READ, lambda _: 0xFFFFFFFF, id="of the last number"),
        pytest.param(Op.WRITE, lambda first: first + 1, id="of another kind"),
        pytest.param(4711, lambda first: first + 1, id="of no kind"),
    ],
)
@trio_test
async def test_a_reply_to_no_request_ends_the_connection(
    op: int, which: Callable[[int], int]
) -> None:
    async with connected() as (connection, peer, nursery):
        outcome = Outcome(nursery, connection, requests(3))
        await wait_all_tasks_blocked()
        first, *_ = peer.requests()
        peer.reply(first, b"x")
        await wait_all_tasks_blocked()
        assert connection.alive
        peer.send(encode(op, which(first.req_id), 0, b"y"))
        await wait_all_tasks_blocked()
        assert not connection.alive
        assert outcome.error is ConnectionLost


@trio_test
async def test_late_replies_to_a_cancelled_task_are_dropped() -> None:
    async with connected() as (connection, peer, nursery):
        outcome = Outcome(nursery, connection, requests(2))
        await wait_all_tasks_blocked()
        outcome.scope.cancel()
        await wait_all_tasks_blocked()
        late = peer.requests()
        other = Outcome(nursery, connection, requests(1))
        await wait_all_tasks_blocked()
        for message in (*late, *peer.requests()):
            peer.reply(message, b"%d" % message.req_id)
        await wait_all_tasks_blocked()
        assert outcome.replies is None
        assert other.replies == [b"2"]
        assert connection.alive
        assert not connection._in_flight


@trio_test
async def test_a_cancelled_request_that_is_never_answered_ends_the_connection() -> None:
    """Nothing would ever find out, if only tasks with time limits of their own asked."""
    async with connected(timeout=0.2) as (connection, peer, nursery):
        outcome = Outcome(nursery, connection, requests(1))
        await wait_all_tasks_blocked()
        outcome.scope.cancel()
        await connection.ended.wait()
        assert len(peer.requests()) == 1


@trio_test
async def test_an_error_tells_whether_anything_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 2)
    change = [protocol.write(b"/x", b"1")]

    async def is_unsent(connection: Connection, asked: list[Request]) -> bool:
        with pytest.raises(ConnectionLost) as caught:
            await connection.pipeline(asked)
        return caught.value.unsent

    async with connected() as (connection, peer, _):
        peer.socket.close()  # the reader has not noticed yet
        assert await is_unsent(connection, change)
        assert await is_unsent(connection, change)
    async with connected() as (connection, peer, nursery):
        Outcome(nursery, connection, change)
        await wait_all_tasks_blocked()
        peer.requests()
        peer.socket.close()
        assert await is_unsent(connection, change)  # it stood behind the other, which was sent
    async with connected() as (connection, peer, nursery):

        async def answer_the_first_window() -> None:
            await wait_all_tasks_blocked()
            for request in peer.requests():
                peer.reply(request, b"OK")
            peer.socket.close()

        nursery.start_soon(answer_the_first_window)
        assert not await is_unsent(connection, change * 3)


@trio_test
async def test_one_late_reply_ends_the_wait_of_all(clock: LeapingClock) -> None:
    async with connected(timeout=LIMIT) as (connection, _, nursery):
        outcomes = [Outcome(nursery, connection, requests(1))]
        await wait_all_tasks_blocked()
        clock.leap(LIMIT / 2)
        outcomes.append(Outcome(nursery, connection, requests(1)))
        await wait_all_tasks_blocked()
        assert connection.alive
        clock.leap(LIMIT / 2)
        start = trio.current_time()
        await wait_all_tasks_blocked()
        assert not connection.alive
        assert trio.current_time() - start < LIMIT / 4, "it waited for the second one, too"
        assert [outcome.error for outcome in outcomes] == [RequestTimeout] * 2


@trio_test
async def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_FLIGHT_MAX", 10)
    async with connected() as (connection, peer, nursery):
        outcome = Outcome(nursery, connection, requests(9))
        await wait_all_tasks_blocked()
        others = [Outcome(nursery, connection, requests(count)) for count in (2, 2, 2)]
        await wait_all_tasks_blocked()
        came = peer.requests()
        assert len(came) == 9, "nothing was sent of what is over the limit"
        for message in came:
            peer.reply(message, b"")
        await wait_all_tasks_blocked()
        assert outcome.replies == [b""] * 9
        came = peer.requests()
        assert len(came) == 6, "they had waited for room"
        for message in came:
            peer.reply(message, b"")
        await wait_all_tasks_blocked()
        assert [other.replies for other in others] == [[b""] * 2] * 3


@trio_test
async def test_a_wait_for_room_ends_at_the_deadline_or_with_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "IN_FLIGHT_MAX", 10)
    async with connected() as (connection, peer, nursery):
        Outcome(nursery, connection, requests(9))
        await wait_all_tasks_blocked()
        other = Outcome(nursery, connection, requests(2))
        await wait_all_tasks_blocked()
        deadline = trio.current_time() + 0.05
        with pytest.raises(RequestTimeout, match="too many"):
            await connection.pipeline(requests(2), deadline=deadline)
        assert trio.current_time() >= deadline
        with trio.move_on_after(0.05) as scope:
            await connection.pipeline(requests(2))
        assert scope.cancelled_caught
        assert len(peer.requests()) == 9
        connection.close()
        await wait_all_tasks_blocked()
        assert other.error is ConnectionLost


@trio_test
async def test_numbers_begin_again_around_what_is_still_in_flight() -> None:
    async with connected() as (connection, peer, nursery):
        old = Outcome(nursery, connection, requests(2))
        await wait_all_tasks_blocked()
        waiting = peer.requests()
        assert [message.req_id for message in waiting] == [0, 1]
        connection._next_id = 0xFFFFFFFE
        new = Outcome(nursery, connection, requests(4))
        await wait_all_tasks_blocked()
        came = peer.requests()
        assert [message.req_id for message in came] == [0xFFFFFFFE, 0xFFFFFFFF, 2, 3]
        for message in (*came, *waiting):
            peer.reply(message, message.payload)
        await wait_all_tasks_blocked()
        for outcome, count in ((old, 2), (new, 4)):
            assert outcome.replies == [b"/%d\0" % number for number in range(count)]


# --------------------------------------------------------------------- what may not be sent


@trio_test
async def test_what_is_no_message_leaves_nothing_behind() -> None:
    async with connected() as (connection, peer, nursery):
        # The types forbid it.  A caller without types can still make it.
        nonsense = Request(-42, b"/\0")  # type: ignore[arg-type]
        for asked in ([nonsense], [*requests(3), nonsense], [nonsense, *requests(3)]):
            with pytest.raises(ValueError, match="-42"):
                await connection.pipeline(asked)
        assert peer.requests() == []
        assert not connection._in_flight
        outcome = Outcome(nursery, connection, requests(1))
        await wait_all_tasks_blocked()
        (message,) = peer.requests()
        peer.reply(message, b"x")
        await wait_all_tasks_blocked()
        assert outcome.replies == [b"x"]


@trio_test
async def test_a_request_too_long_for_the_transport_is_not_sent() -> None:
    async with connected() as (connection, peer, nursery):
        long = protocol.directory_part(b"/" + b"x" * (PAYLOAD_MAX - 2), 0)
        first, last = requests(2)
        outcome = Outcome(nursery, connection, [first, long, last])
        alone = Outcome(nursery, connection, [long])
        await wait_all_tasks_blocked()
        came = peer.requests()
        assert [message.payload for message in came] == [first.payload, last.payload]
        for message in came:
            peer.reply(message, message.payload)
        await wait_all_tasks_blocked()
        assert outcome.replies is not None
        assert outcome.replies[::2] == [first.payload, last.payload]
        for refused in (outcome.replies[1], *(alone.replies or [])):
            assert isinstance(refused, XenstoreError)
            assert (refused.name, refused.request) == ("EINVAL", long)
        assert alone.replies
        longest = protocol.write(b"/a", b"x" * (PAYLOAD_MAX - 3))
        Outcome(nursery, connection, [longest])
        await wait_all_tasks_blocked()
        assert [message.payload for message in peer.requests()] == [longest.payload]


# ------------------------------------------------------------------------- much at once


@trio_test
async def test_requests_of_many_tasks_go_out_together() -> None:
    async with connected() as (connection, peer, nursery):
        transport = connection._transport
        assert isinstance(transport, CountingTransport)
        outcomes = [Outcome(nursery, connection, requests(1)) for _ in range(100)]
        await wait_all_tasks_blocked()
        # The first two cannot know that others follow.
        assert transport.sends <= 4
        for message in peer.requests():
            peer.reply(message, b"%d" % message.req_id)
        await wait_all_tasks_blocked()
        replies = [outcome.replies for outcome in outcomes]
        assert len({str(reply) for reply in replies}) == 100
        assert None not in replies


@trio_test
async def test_a_slow_peer_gets_everything_in_order() -> None:
    """The peer has no room for long: the rest waits, and requests of other tasks come behind it."""
    value = bytes(3000)
    async with connected() as (connection, peer, nursery):
        writes = [protocol.write(b"/%d" % number, value) for number in range(WINDOW)]
        outcomes = [Outcome(nursery, connection, writes)]
        await wait_all_tasks_blocked()
        outcomes += [Outcome(nursery, connection, requests(1)) for _ in range(3)]
        await wait_all_tasks_blocked()
        assert connection._unsent
        came: list[Message] = []
        while len(came) < WINDOW + 3:
            came += peer.requests()
            await wait_all_tasks_blocked()
        assert [message.payload for message in came] == [
            *(request.payload for request in writes),
            *[b"/0\0"] * 3,
        ]
        for message in came:
            peer.reply(message, b"OK\0")
            if not message.req_id % 100:
                await wait_all_tasks_blocked()  # the replies have no room, either
        await wait_all_tasks_blocked()
        assert outcomes[0].replies == [b"OK\0"] * WINDOW
        assert [outcome.replies for outcome in outcomes[1:]] == [[b"OK\0"]] * 3


@pytest.mark.parametrize("attempt", range(20))
@trio_test
async def test_garbage_into_a_full_socket(attempt: int) -> None:
    """The connection ends while its writer waits for room."""
    async with connected() as (connection, peer, nursery):
        writes = [protocol.write(b"/%d" % number, bytes(3000)) for number in range(WINDOW)]
        outcomes = [Outcome(nursery, connection, writes) for _ in range(1 + attempt % 3)]
        if attempt % 2:
            await wait_all_tasks_blocked()
            assert connection._unsent
        peer.send(b"GET / HTTP/1.1\r\n\r\n" * 10)
        await connection.ended.wait()
        await wait_all_tasks_blocked()
        assert [outcome.error for outcome in outcomes] == [ConnectionLost] * len(outcomes)
        with pytest.raises(ConnectionLost, match="broke the protocol"):
            await connection.pipeline(requests(1))


@trio_test
async def test_a_connection_that_ends_frees_its_descriptor_and_its_tasks() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(SocketTransport(ours), LIMIT)
    with trio.fail_after(LIMIT), theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await wait_all_tasks_blocked()
            connection.close()
            connection.close()
        assert ours.fileno() == -1


# ----------------------------------------------------------------------- replies at once


@trio_test
async def test_a_slow_store_is_waited_for_more_and_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop waits for the replies as long as they come within POLL_SECONDS."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    ours, theirs = socket.socketpair()
    transport = SocketTransport(ours)
    connection = Connection(transport, LIMIT)
    with trio.fail_after(LIMIT), theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            peer = Peer(theirs)
            skips = []
            for _ in range(12):
                connection._poll_skips = 0
                monkeypatch.setattr(module, "POLL_SECONDS", 1e-9)
                outcome = Outcome(nursery, connection, requests(1))
                await wait_all_tasks_blocked()
                (message,) = peer.requests()
                peer.reply(message, b"")
                await wait_all_tasks_blocked()
                assert outcome.replies == [b""]
                skips.append(connection._poll_skips)
            most = module.POLL_SKIPS_MAX
            assert skips == [1, 2, 4, 8, 16, 32, 64, most, most, most, most, most]
            # While pipelines skip it, none waits in it, and each counts.
            monkeypatch.setattr(transport, "receive_soon", lambda: pytest.fail("it waits"))
            Outcome(nursery, connection, requests(1))
            await wait_all_tasks_blocked()
            assert connection._poll_skips == most - 1
            connection.close()


@trio_test
async def test_very_much_is_slept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    transport = SocketTransport(ours)
    connection = Connection(transport, LIMIT)
    with trio.fail_after(LIMIT), theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            monkeypatch.setattr(transport, "receive_soon", lambda: pytest.fail("it waits"))
            Outcome(nursery, connection, requests(POLL_REQUESTS_MAX + 1))
            await wait_all_tasks_blocked()
            assert len(Peer(theirs).requests()) == POLL_REQUESTS_MAX + 1
            connection.close()


class InstantTransport(SocketTransport):
    """A store that answers before anybody could go to sleep."""

    peer: Peer

    def receive_soon(self) -> bytes:
        return b"".join(
            encode(message.op, message.req_id, 0, b"") for message in self.peer.requests()
        )


@trio_test
async def test_a_task_that_never_sleeps_lets_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", LIMIT)
    ours, theirs = socket.socketpair()
    transport = InstantTransport(ours)
    transport.peer = Peer(theirs)
    connection = Connection(transport, LIMIT)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    with trio.fail_after(LIMIT), theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            nursery.start_soon(count)
            for _ in range(100_000):  # of which a task may send a few hundred in its millisecond
                await connection.pipeline(requests(1))
                if turns > 5:
                    break
            assert turns > 5
            nursery.cancel_scope.cancel()
