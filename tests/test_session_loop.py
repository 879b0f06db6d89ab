"""What pyfuse3's workers get instead of trio's lock and wait: whose turn it is, and who sleeps."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from xsfs.session_loop import Turn, Waiter

LIMIT = 10.0

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@trio_test
async def test_others_get_their_turn_while_requests_come_without_end(pipe: Pipe) -> None:
    reader, writer = pipe
    os.write(writer, b"x")
    waiter = Waiter()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        end = time.monotonic() + LIMIT
        while turns < 3:
            assert time.monotonic() < end, "nobody else ever ran"
            await waiter.wait_readable(reader)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("under_way", [0, 1])
@trio_test
async def test_whoever_waits_sleeps_in_the_end_and_is_woken(pipe: Pipe, under_way: int) -> None:
    reader, writer = pipe
    waiter = Waiter()
    waiter.under_way = under_way
    woken = trio.Event()

    async def wait() -> None:
        await waiter.wait_readable(reader)
        woken.set()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert not woken.is_set()
            os.write(writer, b"x")
            await woken.wait()


@trio_test
async def test_a_turn_is_taken_by_one_at_a_time() -> None:
    turn = Turn()
    inside = 0
    served = []

    async def worker(number: int) -> None:
        nonlocal inside
        for _ in range(3):
            async with turn:
                inside += 1
                assert inside == 1
                await trio.sleep(0)
                inside -= 1
            served.append(number)
            await trio.sleep(0)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(worker, number)
    assert sorted(served) == sorted([*range(5)] * 3)
