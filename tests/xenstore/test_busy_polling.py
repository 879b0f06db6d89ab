"""Waiting awake: what comes in time is seen, what does not is not waited for."""

from __future__ import annotations

import os
import time

import pytest

from xsfs.xenstore.busy_polling import Linger

Pipe = tuple[int, int]


def test_what_is_there_is_seen_at_once(pipe: Pipe) -> None:
    reader, writer = pipe
    os.write(writer, b"x")
    linger = Linger(reader)
    assert linger.descriptor == reader
    assert linger.comes(0)


def test_what_is_not_there_is_waited_for_as_long_as_asked(pipe: Pipe) -> None:
    linger = Linger(pipe[0])
    start = time.perf_counter()
    assert not linger.comes(0.05)
    assert time.perf_counter() - start >= 0.05
    assert not linger.comes(0)


def test_whoever_is_waited_for_gets_the_processor(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    monkeypatch.setattr(os, "sched_yield", lambda: os.write(writer, b"x"))
    assert Linger(reader).comes(10)
    assert os.read(reader, 2) == b"x"


def test_the_end_has_come_too() -> None:
    reader, writer = os.pipe()
    try:
        os.close(writer)
        assert Linger(reader).comes(0)
    finally:
        os.close(reader)
