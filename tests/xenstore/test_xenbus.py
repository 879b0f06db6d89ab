"""The kernel's device, as far as it can be had without Xen: pairs of sockets that keep messages apart.

Tests on real Xen (tests/system/xen) check the real device.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.support.clock import LeapingClock
from tests.support.messages import Message, messages_of
from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Connection, Reply
from xsfs.xenstore.errors import RequestTimeout, XenstoreError
from xsfs.xenstore.protocol import Op, Parser, Request, encode, read, watch
from xsfs.xenstore.xenbus import DESCRIPTORS_MAX, DeviceTransport, WatchRefused

LIMIT = 60.0


class Device:
    """The kernel's side of all descriptors, in the order in which they were opened."""

    def __init__(self, descriptors_max: int = DESCRIPTORS_MAX) -> None:
        self.sides: list[socket.socket] = []
        self.unanswered: dict[int, Message] = {}
        self.transport_limit = descriptors_max

    def open(self) -> int:
        if len(self.sides) == self.transport_limit:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.sides.append(theirs)
        return ours.detach()

    def look(self) -> list[tuple[int, Message]]:
        """The new requests, each with its descriptor; never a second one before the first is answered."""
        new = []
        for number, side in enumerate(self.sides):
            try:
                data = side.recv(65536)
            except BlockingIOError:
                continue
            assert number not in self.unanswered
            parser = Parser()
            (message,) = messages_of(parser, data)
            assert not parser.partial
            self.unanswered[number] = message
            new.append((number, message))
            with pytest.raises(BlockingIOError):
                side.recv(65536)
        return new

    def answer(self, number: int, cut: int = 0) -> None:
        """In two pieces, if it is to be cut."""
        op, req_id, tx_id, payload = self.unanswered.pop(number)
        reply = encode(op, req_id, tx_id, b"answer to " + payload)
        for piece in filter(None, (reply[:cut], reply[cut:])):
            self.sides[number].send(piece)

    def close(self) -> None:
        for side in self.sides:
            side.close()


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


@asynccontextmanager
async def connected(device: Device) -> AsyncIterator[tuple[Connection, trio.Nursery]]:
    connection = Connection(DeviceTransport(device.open), LIMIT)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            yield connection, nursery
            await wait_all_tasks_blocked()
            connection.close()


def reads(count: int) -> list[Request]:
    return [read(b"/%d" % number) for number in range(count)]


def expected(requests: list[Request]) -> list[Reply]:
    return [b"answer to " + request.payload for request in requests]


@trio_test
async def test_what_is_asked_together_goes_out_together(device: Device) -> None:
    """In order, one request for each descriptor, and no more descriptors than that."""
    requests = reads(DESCRIPTORS_MAX + 5)
    answers: list[Reply] = []

    async def ask() -> None:
        answers.extend(await connection.pipeline(requests))

    async with connected(device) as (connection, nursery):
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        first = device.look()
        assert [message.payload for _, message in first] == [
            request.payload for request in requests[:DESCRIPTORS_MAX]
        ]
        device.answer(3)
        await wait_all_tasks_blocked()
        assert [(number, message.payload) for number, message in device.look()] == [
            (3, requests[DESCRIPTORS_MAX].payload)
        ]
        while device.unanswered:
            device.answer(next(iter(device.unanswered)))
            await wait_all_tasks_blocked()
            device.look()
    assert answers == expected(requests)
    assert len(device.sides) == DESCRIPTORS_MAX


@given(st.randoms(use_true_random=False), st.integers(1, 40), st.integers(1, DESCRIPTORS_MAX))
def test_each_answer_is_to_its_question(
    chance: random.Random, count: int, descriptors: int
) -> None:
    """Whatever the order of the answers, in pieces too, and however few descriptors there are."""
    device = Device(descriptors)
    requests = reads(count)
    answers: dict[int, list[Reply]] = {}

    async def main() -> None:
        async def ask(start: int) -> None:
            answers[start] = await connection.pipeline(requests[start::2])

        async with connected(device) as (connection, nursery):
            nursery.start_soon(ask, 0)
            nursery.start_soon(ask, 1)
            await wait_all_tasks_blocked()
            device.look()
            while device.unanswered:
                device.answer(chance.choice(list(device.unanswered)), chance.randrange(40))
                await wait_all_tasks_blocked()
                device.look()

    try:
        trio.run(main)
    finally:
        device.close()
    assert answers == {start: expected(requests[start::2]) for start in (0, 1)}
    assert len(device.sides) <= descriptors


@trio_test
async def test_a_transaction_is_its_descriptors(device: Device) -> None:
    """And what comes after a request that has to wait does not overtake it."""
    done: list[str] = []

    async def ask(name: str, request: Request, tx_id: int = 0) -> None:
        await connection.pipeline([request], tx_id)
        done.append(name)

    async with connected(device) as (connection, nursery):
        for name, request, tx_id in (
            ("start", protocol.transaction_start(), 0),
            ("outside", read(b"/a"), 0),
            ("inside", read(b"/b"), 7),
            ("behind", read(b"/c"), 0),
        ):
            nursery.start_soon(ask, name, request, tx_id)
            await wait_all_tasks_blocked()
        assert [(number, message.op) for number, message in device.look()] == [
            (0, Op.TRANSACTION_START),
            (1, Op.READ),
        ]
        device.answer(1)
        await wait_all_tasks_blocked()
        assert device.look() == []
        device.answer(0)
        await wait_all_tasks_blocked()
        assert [(number, message.tx_id) for number, message in device.look()] == [(0, 7), (1, 0)]
        device.answer(0)
        device.answer(1)
        await wait_all_tasks_blocked()
    assert sorted(done) == ["behind", "inside", "outside", "start"]


@trio_test
async def test_an_event_is_no_answer(device: Device) -> None:
    async with connected(device) as (connection, nursery):
        device.transport_limit = 1
        for path in b"/a", b"/b":
            nursery.start_soon(connection.pipeline, [read(path)])
        await wait_all_tasks_blocked()
        device.look()
        device.sides[0].send(encode(Op.WATCH_EVENT, 99, 0, b"/a\0token\0"))
        await wait_all_tasks_blocked()
        assert device.look() == []
        device.answer(0)
        await wait_all_tasks_blocked()
        assert len(device.look()) == 1
        device.answer(0)


@trio_test
async def test_a_watch_has_one_time_limit(device: Device, clock: LeapingClock) -> None:
    """Whatever part of it the kernel takes to carry it out."""

    class Slow(DeviceTransport):
        async def send_watch(self, messages: Sequence[bytes]) -> bytes:
            clock.leap(0.8 * LIMIT)
            return await super().send_watch(messages)

    connection = Connection(Slow(device.open), LIMIT)
    with trio.fail_after(3 * LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            outcomes: list[type[BaseException]] = []

            async def set_watch() -> None:
                with pytest.raises(RequestTimeout) as caught:
                    await connection.pipeline([watch(b"/", b"token")])
                outcomes.append(caught.type)

            nursery.start_soon(set_watch)
            while not any(batch.deadline for batch, _ in connection._in_flight.values()):
                await trio.sleep(0.001)
            assert not outcomes
            clock.leap(0.3 * LIMIT)
            with trio.fail_after(LIMIT / 2):
                while not outcomes:
                    await trio.sleep(0.001)
            connection.close()


@trio_test
async def test_the_loop_goes_on_while_the_kernel_carries_out_a_watch(device: Device) -> None:
    """write(2) of a WATCH blocks until the daemon has answered."""
    may_go_on = threading.Event()

    class Slow(DeviceTransport):
        def _write_watch(self, messages: Sequence[bytes]) -> None:
            assert may_go_on.wait(LIMIT)
            super()._write_watch(messages)

    connection = Connection(Slow(device.open), LIMIT)
    replies: list[Reply] = []

    async def set_watch() -> None:
        replies.extend(await connection.pipeline([watch(b"/", b"token")]))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            nursery.start_soon(set_watch)
            await wait_all_tasks_blocked()
            assert device.look() == []
            may_go_on.set()
            while not (came := device.look()):
                await trio.sleep(0.001)
            assert [(number, message.op) for number, message in came] == [(0, Op.WATCH)]
            device.answer(0)
            while not replies:
                await trio.sleep(0.001)
            assert replies == [b"answer to /\0token\0"]
            connection.close()


@trio_test
async def test_a_refused_watch_is_an_error_of_that_request(device: Device) -> None:
    """The kernel refuses it within write(2), and no reply comes: the connection goes on as before."""

    class Refusing(DeviceTransport):
        def _write_watch(self, messages: Sequence[bytes]) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pytest.raises(WatchRefused, match="EINVAL"):
        await Refusing(device.open).send_watch([])
    connection = Connection(Refusing(device.open), LIMIT)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            for _ in range(3):
                (reply,) = await connection.pipeline([watch(b"/", b"token")])
                assert isinstance(reply, XenstoreError)
                assert reply.name == "EINVAL"
                assert reply.request == watch(b"/", b"token")
            nursery.start_soon(connection.pipeline, [read(b"/a")])
            await wait_all_tasks_blocked()
            (answered,) = device.look()
            device.answer(answered[0])
            await wait_all_tasks_blocked()
            assert connection.alive
            connection.close()


def test_a_watch_is_sent_by_the_thread_that_asks(device: Device) -> None:
    """A refused one is that thread's error: what the event loop receives meanwhile has nothing to do
    with it."""
    refused = 0

    async def main() -> None:
        nonlocal refused
        transport = DeviceTransport(device.open)
        device.sides[0].shutdown(socket.SHUT_RD)  # each write is refused

        async def receive() -> None:
            while True:
                device.sides[0].send(encode(Op.WATCH_EVENT, 0, 0, b"/a\0token\0"))
                await transport.receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for number in range(500):
                with pytest.raises(WatchRefused, match="EPIPE"):
                    await transport.send_watch([encode(Op.WATCH, number, 0, b"/a\0token\0")])
                refused += 1
            nursery.cancel_scope.cancel()
        transport.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        trio.run(main)
    finally:
        sys.setswitchinterval(interval)
    assert refused == 500


@trio_test
async def test_nothing_is_left_of_it(device: Device) -> None:
    before = len(os.listdir("/proc/self/fd"))
    transport = DeviceTransport(device.open)
    transport.send([encode(Op.READ, number, 0, b"/\0") for number in range(4)])
    assert len(device.sides) == 4
    transport.close()
    transport.close()
    device.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_that_cannot_be_waited_for_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    opened = []

    def open_file() -> int:
        opened.append(os.open(tmp_path / "file", os.O_RDWR))
        return opened[-1]

    with pytest.raises(OSError, match="not Xenstore's device"):
        DeviceTransport(open_file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
