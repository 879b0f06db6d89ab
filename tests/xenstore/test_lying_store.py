"""The client's ring against a store that lies: every violation of the protocol ends in an error of
the client's own within its time limit, every waiter is woken, and the next request works as soon as
the store behaves.

The truth behind the lies is the C daemon's.  The store tells each lie twice: at once, while the
client is still sending, and late, when the client sleeps.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.support.clients import LIMIT, SOON, TIMEOUT, no_watch_is_left, time_limit
from tests.support.lying_store import (
    Gate,
    HangUp,
    Lie,
    LyingStore,
    Talk,
    hang_up,
    honest,
    on,
    says,
    sends,
    silence,
)
from tests.support.messages import Message
from tests.support.xenstored.harness import RealXenstored
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import LISTING_RESTARTS
from xsfs.xenstore.connection import POLL_REQUESTS_MAX
from xsfs.xenstore.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreError,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.protocol import Op, WireError, encode
from xsfs.xenstore.store import Store, Transaction, open_store
from xsfs.xenstore.transport import SocketTransport, Transport
from xsfs.xenstore.watches import Subscription

SHORT = 0.3
"""A time limit that is meant to pass."""

NODE = "/test/node"


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C") as daemon:
        with daemon.client() as dom0:
            dom0.write(NODE, "truth")
        yield daemon


@pytest.fixture
def liar(daemon: RealXenstored, tmp_path: Path) -> Iterator[LyingStore]:
    with LyingStore(tmp_path / "sock", daemon.socket) as liar:
        yield liar


@contextlib.asynccontextmanager
async def opened(liar: LyingStore) -> AsyncIterator[Store]:
    with trio.fail_after(LIMIT):
        async with open_store(liar.path, timeout=TIMEOUT) as store:
            yield store


async def works(store: Store) -> None:
    """The store behaves again, and so does the client."""
    assert await store.read(NODE) == b"truth"
    assert b"node" in await store.list("/test")
    await store.write("/test/other", "1")
    async with store.watch(NODE) as events:
        assert await anext(events) == NODE.encode()
    async with store.transaction() as tx:
        assert await tx.read(NODE) == b"truth"


async def comes_back(store: Store) -> None:
    """A client that waits before it connects once more may wait longer than a short time limit; after
    an outage it may take a moment until it knows that it is over."""
    with trio.fail_after(LIMIT):
        while True:
            with contextlib.suppress(ConnectionLost, RequestTimeout):
                assert await store.read(NODE) == b"truth"
                return


# ------------------------------------------------------------------------------ lies about a reply


def doubled(talk: Talk, request: Message) -> bool:
    talk.send(2 * talk.ask(request))
    return True


def byte_by_byte(talk: Talk, request: Message) -> bool:
    for byte in talk.ask(request):
        talk.send(bytes((byte,)))
    return True


def unasked(talk: Talk, request: Message) -> bool:
    talk.send(encode(request.op, request.req_id + 4711, 0, b"OK\0"))
    return True


def truncated_payload(talk: Talk, request: Message) -> bool:
    talk.send(struct.pack("=IIII", request.op, request.req_id, request.tx_id, 10) + b"OK\0")
    raise HangUp


def oversized(talk: Talk, request: Message) -> bool:
    length = protocol.REPLY_MAX + 1
    talk.send(struct.pack("=IIII", request.op, request.req_id, request.tx_id, length) + b"OK\0")
    return True


def ends_early(talk: Talk, request: Message) -> bool:
    """A reply of 3 bytes where there should be more, and silence."""
    talk.send(struct.pack("=IIII", request.op, request.req_id, request.tx_id, 10) + b"OK\0")
    return True


def events_first(talk: Talk, _: Message) -> bool:
    talk.event(b"/a", b"no such token")
    return False


FATAL: dict[str, Lie] = {
    "hangs up": hang_up,
    "half a header": sends(b"\x0b\0\0\0\1", then_hang_up=True),
    "half a payload": truncated_payload,
    "oversized": oversized,
    "unasked": unasked,
    "wrong type": says(b"OK\0", Op.MKDIR),
    "impossible type": says(b"OK\0", 0xFFFF),
    "an error that is no name": says(b"no name\0", Op.ERROR),
    "an error without any name": says(b"", Op.ERROR),
    "an event without a token": says(b"/a\0", Op.WATCH_EVENT),
    "an event without its NUL": says(b"/a\0t", Op.WATCH_EVENT),
    "noise": sends(b"GET / HTTP/1.1\r\n\r\n" * 10),
    "zeros": sends(bytes(64)),
}
"""Lies that end the connection."""

MUTE: dict[str, Lie] = {
    "silence": silence,
    "silence in the middle of a reply": ends_early,
    "events of watches never set": sends(encode(Op.WATCH_EVENT, 9, 9, b"/a\0no such token\0")),
}
"""Lies that leave the request without a reply."""

HARMLESS: dict[str, Lie] = {
    "the truth": honest,
    "byte by byte": byte_by_byte,
    "events first": events_first,
}
"""Replies that a client must accept."""


async def told(
    liar: LyingStore, lie: Lie, late: bool, call: Callable[[], Awaitable[object]]
) -> None:
    """Call while the liar tells the lie, at once or when all have gone to sleep."""
    gate = Gate()
    if not late:
        gate.open()
    liar.lie = gate.before(lie)
    async with trio.open_nursery() as nursery:
        if late:
            nursery.start_soon(open_when_asleep, gate)
        await call()


async def open_when_asleep(gate: Gate) -> None:
    await wait_all_tasks_blocked()
    gate.open()


both_ways = pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])


@both_ways
@pytest.mark.parametrize("name", FATAL)
@trio_test
async def test_a_change_whose_reply_is_a_lie(liar: LyingStore, name: str, late: bool) -> None:
    async with opened(liar) as store:

        async def write() -> None:
            with trio.fail_after(SOON), pytest.raises(ConnectionLost):
                await store.write("/test/x", "1")

        await told(liar, FATAL[name], late, write)
        liar.behave()
        await works(store)
        assert store.reconnects == 1


@both_ways
@pytest.mark.parametrize("name", FATAL)
@trio_test
async def test_what_only_reads_is_asked_again(liar: LyingStore, name: str, late: bool) -> None:
    """The store lies once, and the caller gets no error."""
    times = itertools.count()

    def once(talk: Talk, request: Message) -> bool:
        return next(times) == 0 and FATAL[name](talk, request)

    async with opened(liar) as store:

        async def read() -> None:
            with trio.fail_after(SOON):
                assert await store.read(NODE) == b"truth"

        await told(liar, once, late, read)
        assert store.reconnects == 1
        await works(store)


@pytest.mark.parametrize("name", FATAL)
@trio_test
async def test_a_store_that_never_stops_lying(liar: LyingStore, name: str) -> None:
    async with opened(liar) as store:
        liar.lie = FATAL[name]
        with time_limit(store, SHORT), trio.fail_after(SOON), pytest.raises(StoreError):
            await store.read(NODE)
        liar.behave()
        with trio.fail_after(LIMIT):
            await comes_back(store)
        await works(store)


@both_ways
@pytest.mark.parametrize("name", FATAL)
@trio_test
async def test_every_waiter_is_woken(liar: LyingStore, name: str, late: bool) -> None:
    """The lie is the last of many replies, the others of which never come."""
    outcomes: list[type[StoreError]] = []
    waiters = 2 * POLL_REQUESTS_MAX

    async with opened(liar) as store:

        async def wait(number: int) -> None:
            with pytest.raises(StoreError) as caught:
                await store.write(f"/test/w{number}", "1")
            outcomes.append(caught.type)

        async def everybody() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(waiters):
                    nursery.start_soon(wait, number)

        asked = itertools.count(1)

        def last(talk: Talk, request: Message) -> bool:
            return next(asked) < waiters or FATAL[name](talk, request)

        with trio.fail_after(SOON):
            await told(liar, last, late, everybody)
        assert outcomes == [ConnectionLost] * waiters
        liar.behave()
        await works(store)


@pytest.mark.parametrize("name", FATAL)
@trio_test
async def test_the_last_reply_of_a_burst_is_a_lie(liar: LyingStore, name: str) -> None:
    """All others were answered: nothing but the lie itself can wake the sender."""
    count = POLL_REQUESTS_MAX + 1
    asked = itertools.count(1)

    def last(talk: Talk, request: Message) -> bool:
        return next(asked) == count and FATAL[name](talk, request)

    async with opened(liar) as store:
        liar.lie = last
        with trio.fail_after(SOON), pytest.raises(ConnectionLost):
            await store.pipeline([protocol.write(b"/test/x", b"")] * count)
        liar.behave()
        await works(store)


@both_ways
@pytest.mark.parametrize("name", MUTE)
@trio_test
async def test_no_reply(liar: LyingStore, name: str, late: bool) -> None:
    async with opened(liar) as store:

        async def ask() -> None:
            started = trio.current_time()
            for request in protocol.read(NODE.encode()), protocol.mkdir(b"/test/x"):
                with trio.fail_after(SOON), pytest.raises(RequestTimeout):
                    await store.call(request)
            # Of the first; with the second it is known already.
            assert trio.current_time() - started >= SHORT

        with time_limit(store, SHORT):
            await told(liar, MUTE[name], late, ask)
        liar.behave()
        if name == "silence in the middle of a reply":
            liar.hang_up()  # nobody can tell where the next message would begin
        await comes_back(store)
        await works(store)


@both_ways
@pytest.mark.parametrize("name", HARMLESS)
@trio_test
async def test_odd_but_true(liar: LyingStore, name: str, late: bool) -> None:
    async with opened(liar) as store:
        await told(liar, HARMLESS[name], late, lambda: works(store))
        assert store.reconnects == 0


@pytest.mark.parametrize("name", ["EWHATEVER", "ENOTSUP", "x", "E" * 40])
@pytest.mark.parametrize("nul", [b"\0", b""], ids=["NUL", "no NUL"])
@trio_test
async def test_errors_nobody_knows(liar: LyingStore, name: str, nul: bytes) -> None:
    async with opened(liar) as store:
        liar.lie = says(name.encode() + nul, Op.ERROR)
        for call in store.read, store.mkdir, store.list, store.get_perms, store.exists:
            with pytest.raises(XenstoreError) as caught:
                await call(NODE)
            assert caught.value.name == name
        liar.behave()
        await works(store)
        assert store.reconnects == 0


@trio_test
async def test_a_doubled_reply(liar: LyingStore) -> None:
    async with opened(liar) as store:
        liar.lie = on(Op.READ, doubled)
        for _ in range(3):
            assert await store.read(NODE) == b"truth"
        liar.behave()
        assert await store.read(NODE) == b"truth"
        await works(store)
        assert 1 <= store.reconnects <= 3


@trio_test
async def test_replies_in_another_order(liar: LyingStore) -> None:
    count = 5
    held: list[Message] = []

    def backwards(talk: Talk, request: Message) -> bool:
        held.append(request)
        if len(held) == count:
            while held:
                message = held.pop()
                talk.reply(message, b"reply to " + message.payload)
        return True

    async with opened(liar) as store:
        liar.lie = backwards
        replies = await store.pipeline([protocol.read(b"/%d" % number) for number in range(count)])
        assert replies == [b"reply to /%d\0" % number for number in range(count)]

        found: dict[int, bytes] = {}

        async def read(number: int) -> None:
            found[number] = await store.read(f"/{number}")

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(read, number)
        assert found == {number: b"reply to /%d\0" % number for number in range(count)}
        liar.behave()
        await works(store)
        assert store.reconnects == 0


@trio_test
async def test_late_replies_are_dropped(liar: LyingStore) -> None:
    """The reply to a request that has timed out is not the next one's."""
    gate = Gate()
    async with opened(liar) as store:
        liar.lie = gate.before(says(b"late"))
        with time_limit(store, SHORT), pytest.raises(RequestTimeout):
            await store.read(NODE)
        liar.behave()
        gate.open()
        await comes_back(store)
        assert await store.read(NODE) == b"truth"
        # A connection that has not answered once may never again: it was replaced.
        assert store.reconnects >= 1


# ------------------------------------------------------------------- replies that make no sense

Call = Callable[[Store], Awaitable[object]]

NONSENSE: dict[str, tuple[Op, bytes, Call]] = {
    "a listing without its NUL": (Op.DIRECTORY, b"a\0b", lambda store: store.list("/test")),
    "a listing of one NUL too few": (Op.DIRECTORY, b"a", lambda store: store.list("/test")),
    "no permissions": (Op.GET_PERMS, b"", lambda store: store.get_perms(NODE)),
    "odd permissions": (Op.GET_PERMS, b"n0\0x7\0", lambda store: store.get_perms(NODE)),
    "half a permission": (Op.GET_PERMS, b"n0\0r", lambda store: store.get_perms(NODE)),
    "binary permissions": (Op.GET_PERMS, b"\xff\xfe\0", lambda store: store.get_perms(NODE)),
    "no path": (Op.GET_DOMAIN_PATH, b"", lambda store: store.get_domain_path(3)),
    "two paths": (Op.GET_DOMAIN_PATH, b"/a\0/b\0", lambda store: store.get_domain_path(3)),
    "no truth": (Op.IS_DOMAIN_INTRODUCED, b"T", lambda store: store.is_domain_introduced(3)),
    **{
        f"the transaction {number[:8]!r}": (Op.TRANSACTION_START, number, call)
        for number in (b"", b"\0", b"0\0", b"-1\0", b"x\0", b"4294967296\0", b"1" * 5000 + b"\0")
        for call in (lambda store: store.begin(),)
    },
    **{
        f"atomically in transaction {number[:8]!r}": (Op.TRANSACTION_START, number, call)
        for number in (b"", b"0\0", b"x\0", b"1" * 5000 + b"\0")
        for call in (lambda store: store.atomically(Transaction.commit),)
    },
}


@pytest.mark.parametrize("name", NONSENSE)
@trio_test
async def test_a_reply_that_makes_no_sense(liar: LyingStore, name: str) -> None:
    op, payload, call = NONSENSE[name]
    async with opened(liar) as store:
        liar.lie = on(op, says(payload))
        with trio.fail_after(SOON), pytest.raises(WireError):
            await call(store)
        liar.behave()
        await works(store)
        assert store.transactions == 0


@trio_test
async def test_a_transaction_nobody_has_begun(liar: LyingStore) -> None:
    async with opened(liar) as store:
        liar.lie = on(Op.TRANSACTION_START, says(b"4711\0"))
        async with store.transaction() as tx:
            with pytest.raises(XenstoreError, match="ENOENT"):
                await tx.read(NODE)
            with pytest.raises(XenstoreError, match="ENOENT"):
                await tx.commit()
        liar.behave()
        await works(store)
        assert store.transactions == 0


@both_ways
@trio_test
async def test_a_connection_lost_in_a_transaction(liar: LyingStore, late: bool) -> None:
    async with opened(liar) as store:
        tx = await store.begin()

        async def read() -> None:
            with pytest.raises(TransactionEnded):
                await tx.read(NODE)

        await told(liar, hang_up, late, read)
        with pytest.raises(TransactionEnded):
            await tx.commit()
        store.abandon(tx)
        liar.behave()
        await works(store)


class Failure(Exception):
    pass


@trio_test
async def test_work_that_fails_keeps_its_own_error(liar: LyingStore) -> None:
    """Also where the transaction cannot be undone: then its connection goes, and it with it."""
    async with opened(liar) as store:
        liar.lie = on(Op.TRANSACTION_END, silence)

        async def work(tx: Transaction) -> None:
            await tx.write("/test/x", "1")
            raise Failure

        for count in 1, 2:
            with pytest.raises(Failure):
                await store.atomically(work)
            assert liar.connections == 1 + count
        liar.behave()
        await works(store)
        assert store.reconnects == 0


# ------------------------------------------------------------------------ listings without an end

TOO_BIG = says(b"E2BIG\0", Op.ERROR)


def parts(part: Lie) -> Lie:
    """DIRECTORY is refused, and DIRECTORY_PART answered by the lie."""
    return lambda talk, request: (
        on(Op.DIRECTORY, TOO_BIG)(talk, request) or on(Op.DIRECTORY_PART, part)(talk, request)
    )


@pytest.mark.parametrize(
    "payload", [b"", b"7", b"7\0", b"x\0a\0", b"\0a\0", b"x"], ids=lambda payload: repr(payload)
)
@trio_test
async def test_a_part_that_makes_no_sense(liar: LyingStore, payload: bytes) -> None:
    async with opened(liar) as store:
        liar.lie = parts(says(payload))
        with pytest.raises(WireError):
            await store.list("/test")
        liar.behave()
        await works(store)


@trio_test
async def test_a_listing_that_never_ends(liar: LyingStore) -> None:
    async with opened(liar) as store:
        liar.lie = parts(says(b"7\0a\0"))
        with trio.fail_after(LIMIT), pytest.raises(WireError):
            await store.list("/test")
        liar.behave()
        await works(store)


@trio_test
async def test_a_listing_is_no_longer_than_a_reply(liar: LyingStore) -> None:
    """Parts do not add up to what would not be taken at once."""
    part = b"7\0" + (b"x" * 1023 + b"\0") * 1024
    enough = protocol.REPLY_MAX // len(part) + 2
    asked = itertools.count(1)

    def endless(talk: Talk, request: Message) -> bool:
        if next(asked) > enough:
            raise HangUp
        return says(part)(talk, request)

    async with opened(liar) as store:
        liar.lie = parts(endless)
        with pytest.raises(WireError):
            await store.list("/test")
        liar.behave()
        await works(store)


@trio_test
async def test_a_listing_that_changes_all_the_time(liar: LyingStore) -> None:
    generations = itertools.count(1)

    def changing(talk: Talk, request: Message) -> bool:
        return says(b"%d\0a\0b\0" % next(generations))(talk, request)

    async with opened(liar) as store:
        liar.lie = parts(changing)
        with pytest.raises(XenstoreError) as caught:
            await store.list("/test")
        assert caught.value.name == "EAGAIN"
        # Two parts each time; and all of it once more in a transaction, in which it should stand still.
        assert next(generations) == 2 * 2 * LISTING_RESTARTS + 1
        liar.behave()
        await works(store)
        assert store.reconnects == 0


@trio_test
async def test_a_listing_that_changes_once(liar: LyingStore) -> None:
    replies = iter((b"7\0a\0", b"8\0b\0", b"8\0a\0", b"8\0b\0c\0\0"))

    def changing(talk: Talk, request: Message) -> bool:
        return says(next(replies))(talk, request)

    async with opened(liar) as store:
        liar.lie = parts(changing)
        assert await store.list("/test") == [b"a", b"b", b"c"]


# ------------------------------------------------------------------------------- connections, watches


@trio_test
async def test_closed_after_accept(liar: LyingStore) -> None:
    def goodbye(_: Talk) -> None:
        raise HangUp

    async with opened(liar) as store:
        liar.welcome = goodbye
        liar.hang_up()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: store.read(NODE),
            lambda: store.write("/test/x", "1"),
            store.begin,
            lambda: store.atomically(Transaction.commit),
            lambda: store.watches.subscribe(Subscription(b"/test")),
        ]
        for call in calls:
            with (
                time_limit(store, SHORT),
                trio.fail_after(SOON),
                pytest.raises(ConnectionLost),
            ):
                await call()
        with trio.fail_after(SOON), pytest.raises(ConnectionLost):
            async with open_store(liar.path, timeout=SHORT):
                pass
        liar.behave()
        with trio.fail_after(LIMIT):
            await comes_back(store)
        await works(store)


@trio_test
async def test_a_store_that_hangs_up_is_not_stormed(liar: LyingStore) -> None:
    async with opened(liar) as store:
        liar.lie = hang_up
        with time_limit(store, 1.0), pytest.raises(StoreError):
            await store.read(NODE)
        # With back-off from 5 ms on there are some ten.
        assert liar.connections < 50


@trio_test
async def test_a_store_that_hangs_up_on_watches_is_not_stormed(liar: LyingStore) -> None:
    async with opened(liar) as store, store.watch(NODE) as events:
        await anext(events)

        def watch_and_go(talk: Talk, request: Message) -> bool:
            if request.op == Op.WATCH:
                says(b"OK\0")(talk, request)
            raise HangUp

        liar.lie = watch_and_go
        liar.hang_up()
        # That something does not happen takes a while to see.
        with trio.move_on_after(1):
            await trio.sleep_forever()
        assert liar.connections < 50
        liar.behave()
        await works(store)


@both_ways
@pytest.mark.parametrize("name", [*FATAL, *MUTE])
@trio_test
async def test_a_watch_that_is_a_lie(liar: LyingStore, name: str, late: bool) -> None:
    async with opened(liar) as store:

        async def watch() -> None:
            with trio.fail_after(SOON), pytest.raises((ConnectionLost, RequestTimeout)):
                await store.watches.subscribe(Subscription(b"/test"))

        with time_limit(store, SHORT):
            await told(liar, {**FATAL, **MUTE}[name], late, watch)
        liar.behave()
        liar.hang_up()
        await works(store)
        await no_watch_is_left(store)


@trio_test
async def test_events_that_are_no_events(liar: LyingStore) -> None:
    """They end the watches' connection, and the watches are set again."""
    async with opened(liar) as store, store.watch(NODE) as events:
        await anext(events)

        def broken_event(talk: Talk, request: Message) -> bool:
            if request.op == Op.WATCH:
                talk.send(encode(Op.WATCH_EVENT, 0, 0, b"no token\0"))
            return False

        liar.lie = broken_event
        with trio.fail_after(SOON), pytest.raises(ConnectionLost):
            await store.watches.subscribe(Subscription(b"/test"))
        liar.behave()
        assert await anext(events) == NODE.encode()
        await store.write(f"{NODE}/x", "")
        while await anext(events) != f"{NODE}/x".encode():
            pass
        await works(store)


@trio_test
async def test_a_connection_lost_between_two_watches(liar: LyingStore) -> None:
    """Lost while the watches are set again, it takes those along that were set already."""
    paths = [f"/test/w{number}" for number in range(3)]
    times = itertools.count()

    def one_each(talk: Talk, request: Message) -> bool:
        """Two connections take one watch each, and end within the same piece of data."""
        if request.op != Op.WATCH or next(times) >= 2:
            return False
        talk.send(encode(request.op, request.req_id, 0, b"OK\0") + bytes(16))
        raise HangUp

    async with opened(liar) as store, contextlib.AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(store.watch(path)) for path in paths]
        for events in watches:
            await anext(events)
        liar.lie = one_each
        liar.hang_up()
        with trio.fail_after(SOON):
            # The liar sends no event for a watch that it takes itself: these are the daemon's.
            for events in watches:
                assert await anext(events) == events.path
            for path, events in zip(paths, watches, strict=True):
                await store.write(f"{path}/x", "")
                while await anext(events) != f"{path}/x".encode():
                    pass


@trio_test
async def test_a_store_that_refuses_the_client_later_is_not_asked_all_the_time(
    liar: LyingStore,
) -> None:
    """The socket becomes a file: a watch that cannot be set again is no reason to spin."""
    async with opened(liar) as store, store.watch(NODE) as events:
        await anext(events)
        liar.close()
        Path(liar.path).write_bytes(b"")
        with trio.fail_after(SOON):
            await wait_all_tasks_blocked()


# ------------------------------------------------------------------------------------- the clock


class LikeTheDevice(SocketTransport):
    """A socket on which WATCH is sent in a thread, as on the kernel's device."""

    async def send_watch(self, messages: Sequence[bytes]) -> bytes:
        return await trio.to_thread.run_sync(self.send, messages)


@both_ways
@pytest.mark.parametrize("name", [*FATAL, *MUTE])
@trio_test
async def test_a_watch_sent_by_a_thread(liar: LyingStore, name: str, late: bool) -> None:
    def connect() -> Transport:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(liar.path)
        return LikeTheDevice(sock)

    with trio.fail_after(LIMIT):
        async with open_store(connect=connect, timeout=TIMEOUT) as store:
            await works(store)

            async def watch() -> None:
                with trio.fail_after(SOON), pytest.raises((ConnectionLost, RequestTimeout)):
                    await store.watches.subscribe(Subscription(b"/test"))

            with time_limit(store, SHORT):
                await told(liar, {**FATAL, **MUTE}[name], late, watch)
            liar.behave()
            liar.hang_up()
            await works(store)


def test_a_flood_does_not_stop_the_clock(liar: LyingStore) -> None:
    """A store that sends and sends, but never the reply: other tasks must get their turn.

    A loop that stands still cannot time itself out, so it runs in a thread of its own.
    """
    event = encode(Op.WATCH_EVENT, 0, 0, b"/a\0no such token\0")
    outcome: list[type[BaseException]] = []

    def flood(talk: Talk, _: Message) -> bool:
        while True:
            talk.send(event)

    async def ask() -> None:
        async with open_store(liar.path, timeout=TIMEOUT) as store:
            liar.lie = flood
            try:
                with time_limit(store, SHORT):
                    await store.read(NODE)
            except StoreError as error:
                outcome.append(type(error))

    thread = threading.Thread(target=trio.run, args=(ask,))
    thread.start()
    thread.join(SOON)
    in_time = not thread.is_alive()
    liar.hang_up()
    liar.behave()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert in_time
    assert outcome == [RequestTimeout]
