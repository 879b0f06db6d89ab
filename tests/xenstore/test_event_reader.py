"""Ring: the watches' socket, and what a flood of events does to those who write."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.support.mounting import LIMIT, mounted
from tests.support.programs import program
from tests.support.xenstored.harness import RealXenstored, strings
from xsfs.xenstore.event_reader import HELD_MAX, LATE_BYTES, EventReader

HOME = "/local/domain/0"


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[EventReader, trio.SocketStream]]:
    """A reader, and the peer of its socket."""
    ours, theirs = socket.socketpair()
    reader = EventReader(ours)
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    with trio.fail_after(LIMIT):
        async with peer:
            yield reader, peer


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.001)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def receive_to_the_end(reader: EventReader) -> None:
    while await reader.receive():
        pass


async def fall_behind(reader: EventReader, peer: trio.SocketStream) -> None:
    """Have the thread take over."""
    assert not reader.has_thread
    await peer.send_all(bytes(LATE_BYTES))
    assert len(await reader.receive()) == LATE_BYTES
    assert reader.has_thread


def threads() -> int:
    return sum(thread.name == "xsfs-watches" for thread in threading.enumerate())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@trio_test
async def test_little_is_read_by_the_loop() -> None:
    async with pair() as (reader, peer):
        for number in range(100):
            await peer.send_all(b"%d" % number)
            assert await reader.receive() == b"%d" % number
            assert not reader.has_thread
        assert not threads()
        reader.close()


@trio_test
async def test_a_task_that_waits_for_a_reply_takes_nothing_from_the_reader() -> None:
    async with pair() as (reader, peer):
        await peer.send_all(b"an event")
        assert reader.receive_soon() is None
        assert await reader.receive() == b"an event"
        reader.close()


@pytest.fixture
def never_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread goes on until the connection ends, however long the test takes to send more."""
    monkeypatch.setattr(EventReader, "_loop_waits", lambda _: False)


@pytest.mark.usefixtures("never_calm")
@trio_test
async def test_what_is_sent_comes_in_order_while_nobody_takes_it() -> None:
    sent = b"".join(b"%07d\n" % number for number in range(100_000))
    async with pair() as (reader, peer):
        await fall_behind(reader, peer)
        assert threads()
        # Several times what a socket holds: the peer does not wait for the one who takes.
        await peer.send_all(sent)
        found = bytearray()
        while len(found) < len(sent):
            found += await reader.receive()
        assert found == sent
        reader.close()


@trio_test
async def test_the_loop_reads_again_when_little_comes() -> None:
    """Nothing is lost, doubled or reordered while the socket changes hands, again and again."""
    async with pair() as (reader, peer):
        for _ in range(3):
            await fall_behind(reader, peer)
            sent, found = bytearray(), bytearray()
            while reader.has_thread:
                piece = b"<%d>" % len(sent)
                sent += piece
                await peer.send_all(piece)
                found += await reader.receive()
            while len(found) < len(sent):
                found += await reader.receive()
            assert found == sent
            await until(lambda: not threads())
        reader.close()


@pytest.mark.usefixtures("never_calm")
@pytest.mark.parametrize("by_thread", [False, True])
@trio_test
async def test_the_end_of_the_peer_is_the_end(by_thread: bool) -> None:
    async with pair() as (reader, peer):
        if by_thread:
            await fall_behind(reader, peer)
        await peer.send_all(b"last words")
        await peer.aclose()
        assert await reader.receive() == b"last words"
        assert await reader.receive() == b""
        reader.close()


@pytest.mark.usefixtures("never_calm")
@trio_test
async def test_more_than_can_be_held_is_the_end() -> None:
    async with pair() as (reader, peer):
        await fall_behind(reader, peer)
        # The sender is let go of at once, not when somebody takes what has come.
        with pytest.raises(trio.BrokenResourceError):
            await peer.send_all(bytes(4 * HELD_MAX))
        with pytest.raises(OSError, match="more events than"):
            await receive_to_the_end(reader)
        reader.close()


@pytest.mark.usefixtures("never_calm")
@pytest.mark.parametrize("by_thread", [False, True])
@trio_test
async def test_whoever_waits_is_woken_when_it_is_closed(by_thread: bool) -> None:
    async with pair() as (reader, peer):
        if by_thread:
            await fall_behind(reader, peer)
        ended = []

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await reader.receive()
            ended.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            reader.close()
        assert ended == [True]


@pytest.mark.usefixtures("never_calm")
def test_nothing_is_left_of_it() -> None:
    wait_until(lambda: not threads())  # of the tests before
    gc.collect()
    before = descriptors()

    async def use(by_thread: bool, peer_first: bool) -> None:
        async with pair() as (reader, peer):
            if by_thread:
                await fall_behind(reader, peer)
            if peer_first:
                await peer.aclose()
                assert await reader.receive() == b""
            reader.close()

    for by_thread in (False, True):
        for peer_first in (False, True):
            trio.run(use, by_thread, peer_first)
    wait_until(lambda: not threads() and descriptors() == before)


@pytest.mark.quick_if(kind=["ocaml"])
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_flood_of_pipelined_writes_stops_nobody(kind: str, tmp_path: Path) -> None:
    """Under oxenstored one whose watcher is too slow never gets another reply."""
    requests = [
        ("WRITE", strings(f"{HOME}/data/n{number % 5000}") + b"%d" % number)
        for number in range(60_000)
    ]
    with RealXenstored(kind) as daemon, ExitStack() as stack:
        daemon.populate()
        mount = stack.enter_context(mounted([daemon.socket], tmp_path / "m"))
        witness = stack.enter_context(daemon.client())
        witness.pipeline(requests[:5000])
        readers = [
            stack.enter_context(program("cat", mount.path / "data" / ".watch")) for _ in range(3)
        ]
        for reader in readers:
            assert reader.lines.next() == "."
        replies = witness.pipeline(requests)
        assert set(replies) == {b"OK\0"}
        witness.write(f"{HOME}/data/end", b"")
        for reader in readers:
            assert reader.lines.until("end")
