"""The lock and the wait that pyfuse3's workers get: one of them reads at a time, other tasks get a turn."""

from __future__ import annotations

import os
import time

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from xsfs.fs.fuse_loop import KernelDescriptor, ReceiveLock
from xsfs.xenstore.turns import turns

LIMIT = 60.0

Pipe = tuple[int, int]


@trio_test
async def test_other_tasks_run_while_requests_come_without_end(pipe: Pipe) -> None:
    reader, writer = pipe
    os.write(writer, b"x")
    kernel = KernelDescriptor()
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
            assert time.monotonic() < end, "no other task ever ran"
            await kernel.wait_readable(reader)
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_request_that_is_there_needs_no_turn_of_the_loop(pipe: Pipe) -> None:
    reader, writer = pipe
    kernel = KernelDescriptor()
    os.write(writer, b"x")
    await kernel.wait_readable(reader)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        for _ in range(1000):  # a slow machine may take longer than the time for a turn
            await kernel.wait_readable(reader)
        assert turns < 1000
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_turn_that_the_client_has_noted_counts(pipe: Pipe) -> None:
    """Otherwise each millisecond would have two turns, one of them in the middle of a request."""
    reader, writer = pipe
    kernel = KernelDescriptor()
    os.write(writer, b"x")
    ran: list[str] = []

    async def other() -> None:
        ran.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        turns().last = (
            time.perf_counter() + LIMIT
        )  # a slow machine may take longer than the time for a turn
        await kernel.wait_readable(reader)
        assert ran == []
        for _ in range(2):  # one turn may come before that of the other task
            turns().last = 0.0
            await kernel.wait_readable(reader)
        assert ran == ["other"]
    assert turns().last > 0.0


@pytest.mark.parametrize("under_way", [0, 1])
@trio_test
async def test_a_worker_that_waits_sleeps_in_the_end_and_is_woken(
    pipe: Pipe, under_way: int
) -> None:
    reader, writer = pipe
    kernel = KernelDescriptor()
    kernel.under_way = under_way
    woken = trio.Event()

    async def wait() -> None:
        await kernel.wait_readable(reader)
        woken.set()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert not woken.is_set()
            os.write(writer, b"x")
            await woken.wait()


@trio_test
async def test_a_wait_that_is_cancelled_leaves_the_descriptor_usable(pipe: Pipe) -> None:
    reader, writer = pipe
    kernel = KernelDescriptor()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.wait_readable, reader)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        os.write(writer, b"x")
        await kernel.wait_readable(reader)


@trio_test
async def test_the_receive_lock_lets_one_worker_in_at_a_time() -> None:
    lock = ReceiveLock()
    inside = 0
    served = []

    async def worker(number: int) -> None:
        nonlocal inside
        for _ in range(3):
            async with lock:
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
async def test_a_free_receive_lock_is_taken_without_a_turn_of_the_loop() -> None:
    lock = ReceiveLock()
    ran: list[str] = []

    async def other() -> None:
        ran.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(3):
            async with lock:
                pass
        assert ran == []
    assert ran == ["other"]


@trio_test
async def test_a_worker_that_is_cancelled_wakes_the_others_all_the_same() -> None:
    lock = ReceiveLock()
    taken: list[str] = []

    async def take(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                taken.append(name)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            async with lock:
                gives_up = trio.CancelScope()
                nursery.start_soon(take, "gives up", gives_up)
                await wait_all_tasks_blocked()
                # It has left the waiting workers, and has not run yet.
                gives_up.cancel()
            await wait_all_tasks_blocked()
            async with lock:
                nursery.start_soon(take, "stays", trio.CancelScope())
                await wait_all_tasks_blocked()
    assert taken == ["stays"]


@trio_test
async def test_a_worker_that_was_woken_and_is_cancelled_passes_the_lock_on() -> None:
    lock = ReceiveLock()
    taken: list[str] = []

    async def take(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                taken.append(name)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope() for _ in range(2)]
            async with lock:
                for number, scope in enumerate(scopes):
                    nursery.start_soon(take, str(number), scope)
                    await wait_all_tasks_blocked()
            scopes[0].cancel()  # after it was woken
    assert taken[-1] == "1"
