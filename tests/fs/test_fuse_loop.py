"""What pyfuse3's workers get instead of trio's lock and wait: whose turn it is, and who sleeps."""

from __future__ import annotations

import os
import time
from functools import partial

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from xsfs.fs.fuse_loop import Turn, Waiter

LIMIT = 10.0

Pipe = tuple[int, int]


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


@trio_test
async def test_a_chore_is_done_before_its_worker_waits_for_its_turn() -> None:
    waiter = Waiter()
    turn = Turn(waiter)
    done: list[str] = []
    async with trio.open_nursery() as nursery:
        async with turn:
            waiter.put_off(lambda: done.append("chore"))
            assert done == []
            nursery.start_soon(turn.__aenter__)
            await wait_all_tasks_blocked()
            assert done == ["chore"]
        await wait_all_tasks_blocked()
    assert done == ["chore"]


@trio_test
async def test_a_chore_is_done_before_a_sleeper_reads_the_next_request(pipe: Pipe) -> None:
    reader, writer = pipe
    waiter = Waiter()
    done: list[str] = []

    async def read() -> None:
        await waiter.wait_readable(reader)
        done.append("request")

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            waiter.put_off(lambda: done.append("chore"))
            os.write(writer, b"x")
    assert done == ["chore", "request"]


@trio_test
async def test_chores_are_done_once_and_in_order() -> None:
    waiter = Waiter()
    done: list[int] = []
    for number in range(3):
        waiter.put_off(partial(done.append, number))
    assert done == [0, 1]
    waiter.do_chore()
    waiter.do_chore()
    assert done == [0, 1, 2]


@trio_test
async def test_a_chore_that_fails_harms_nobody() -> None:
    waiter = Waiter()
    turn = Turn(waiter)
    tried = 0

    def fails() -> None:
        nonlocal tried
        tried += 1
        raise ValueError

    waiter.put_off(fails)
    waiter.put_off(fails)
    async with turn:
        assert tried == 2


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
    turn = Turn(Waiter())
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


@trio_test
async def test_one_who_gives_up_wakes_the_others_all_the_same() -> None:
    turn = Turn(Waiter())
    taken: list[str] = []

    async def take(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with turn:
                taken.append(name)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            async with turn:
                gives_up = trio.CancelScope()
                nursery.start_soon(take, "gives up", gives_up)
                await wait_all_tasks_blocked()
                # It has left those who sleep, and has not run yet.
                gives_up.cancel()
            await wait_all_tasks_blocked()
            async with turn:
                nursery.start_soon(take, "stays", trio.CancelScope())
                await wait_all_tasks_blocked()
    assert taken == ["stays"]
