"""Busy polling: what comes in time is seen, and a busy host is left alone."""

from __future__ import annotations

import os
import time

import pytest

from xsfs.xenstore.busy_polling import SKIPS, YIELD_SECONDS_MAX, BusyPoll

Pipe = tuple[int, int]


def test_what_is_there_is_seen_at_once(pipe: Pipe) -> None:
    reader, writer = pipe
    os.write(writer, b"x")
    assert BusyPoll(reader).is_readable(0)


def test_what_is_not_there_is_waited_for_as_long_as_asked(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_yield", lambda: None)  # no other process takes the processor
    monkeypatch.setattr("xsfs.xenstore.busy_polling.YIELD_SECONDS_MAX", 60.0)
    poll = BusyPoll(pipe[0])
    start = time.perf_counter()
    assert not poll.is_readable(0.05)
    assert time.perf_counter() - start >= 0.05
    assert not poll.is_readable(0)


def test_whoever_is_waited_for_gets_the_processor(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    monkeypatch.setattr(os, "sched_yield", lambda: os.write(writer, b"x"))
    assert BusyPoll(reader).is_readable(10)
    assert os.read(reader, 2) == b"x"


def test_on_a_busy_host_the_next_polls_do_not_wait(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    yields = 0

    def another_process_runs() -> None:
        nonlocal yields
        yields += 1
        time.sleep(2 * YIELD_SECONDS_MAX)

    monkeypatch.setattr(os, "sched_yield", another_process_runs)
    poll = BusyPoll(reader)
    for count in (1, 2):
        assert not poll.is_readable(10)
        assert yields == count
        for _ in range(SKIPS):
            assert not poll.is_readable(10)
        assert yields == count, "it waited within the pause"
    # What is there is seen all the same, in the pause, too.
    assert not poll.is_readable(10)
    os.write(writer, b"x")
    assert poll.is_readable(10)
    assert yields == 3


def test_the_end_has_come_too() -> None:
    reader, writer = os.pipe()
    try:
        os.close(writer)
        assert BusyPoll(reader).is_readable(0)
    finally:
        os.close(reader)
