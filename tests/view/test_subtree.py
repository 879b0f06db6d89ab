"""A walk over a subtree, in process, over the embedded store: its windows, its round trips, its ends."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.operating import World, in_world
from xsfs.view import subtree
from xsfs.view.subtree import (
    WINDOW,
    WINDOWS_MIN,
    DumpFormat,
    JsonFormat,
    LsFormat,
    TextFormat,
    Walk,
    is_complete,
    parse_line,
)
from xsfs.xenstore import store
from xsfs.xenstore.background import open_background
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.store import WALK_CONNECTIONS
from xsfs.xenstore.transport import Transport

TOP = b"/local/domain/0/data"


class Recorder:
    """The sizes of the pipelines that a view's commands send.

    most            how many requests were in flight at once
    connections     those that were named: a walk's
    """

    def __init__(self, w: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.most = 0
        self.connections: set[object] = set()
        pipeline = w.store.pipeline
        in_flight = 0

        async def record(requests: Sequence[Request], **connection: Any) -> list[Reply]:
            nonlocal in_flight
            self.sizes.append(len(requests))
            self.connections.update(connection.values())
            in_flight += len(requests)
            self.most = max(self.most, in_flight)
            replies = await pipeline(requests, **connection)
            in_flight -= len(requests)
            return replies

        monkeypatch.setattr(w.store, "pipeline", record)


async def text_of(w: World, kind: type[TextFormat], top: bytes = TOP) -> bytes:
    made = await Walk(kind(w.view, top), lambda size: None).run()
    assert made is not None
    assert made.error is None
    return bytes(made.text)


@in_world
async def test_no_pipeline_is_long_and_none_is_wasted(w: World) -> None:
    for number in range(2000):
        await w.store.write(b"%s/%d/%d" % (TOP, number // 50, number), b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", False)  # however busy the machine is
        recorder = Recorder(w, patch)
        text = await text_of(w, LsFormat)
    assert text.count(b"\n") == 2040
    assert max(recorder.sizes) <= 3 * WINDOW
    assert recorder.most == 3 * WINDOW * WALK_CONNECTIONS
    assert len(recorder.connections) == WALK_CONNECTIONS
    assert len(recorder.sizes) <= 2041 // WINDOW + 1 + 3


@in_world
async def test_over_the_kernels_device_a_walk_uses_the_connection_of_all(w: World) -> None:
    for number in range(200):
        await w.store.write(b"%s/%d" % (TOP, number), b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", False)
        assert w.store._main.current is not None
        patch.setattr(w.store._main.current, "is_served_in_turn", False)
        recorder = Recorder(w, patch)
        await text_of(w, LsFormat)
    assert recorder.most == 3 * WINDOW * WINDOWS_MIN
    assert not recorder.connections


@in_world
async def test_a_walk_goes_on_if_a_connection_is_lost(w: World) -> None:
    for number in range(2000):
        await w.store.write(b"%s/%d" % (TOP, number), b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", False)
        text = await text_of(w, LsFormat)

        windows = 0

        def lose(size: int) -> None:
            nonlocal windows
            windows += 1
            if windows == 50:
                for each in w.store._walking:
                    each.close("lost")

        made = await Walk(LsFormat(w.view, TOP), lose).run()
    assert made is not None
    assert bytes(made.text) == text
    assert [each.reconnects for each in w.store._walking] == [1] * WALK_CONNECTIONS


@in_world
async def test_a_walk_without_free_descriptors_uses_the_connection_of_all(w: World) -> None:
    for number in range(200):
        await w.store.write(b"%s/%d" % (TOP, number), b"x")

    def connect() -> Transport:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "the socket")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", False)
        for each in w.store._walking:
            patch.setattr(each, "_connect", connect)
        text = await text_of(w, LsFormat)
    assert text.count(b"\n") == 200
    assert not any(each.current for each in w.store._walking)


def test_after_a_restart_one_connection_logs(caplog: pytest.LogCaptureFixture) -> None:
    in_world(walk_after_restart)()
    assert caplog.messages.count("connected to Xenstore again") == 1


async def walk_after_restart(w: World) -> None:
    for number in range(200):
        await w.store.write(b"%s/%d" % (TOP, number), b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", False)
        text = await text_of(w, LsFormat)
        w.store.drop_connection("the daemon restarts")
        await w.store.read(b"%s/1" % TOP)
        assert await text_of(w, LsFormat) == text
    assert [each.reconnects for each in w.store._walking] == [1] * WALK_CONNECTIONS


@in_world
async def test_a_deep_chain_beside_a_wide_directory_costs_its_depth(w: World) -> None:
    for number in range(500):
        await w.store.write(b"%s/a/%d" % (TOP, number), b"x")
    await w.store.write(TOP + b"/b" * 40, b"x")
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(w, patch)
        await text_of(w, JsonFormat)
    assert len(recorder.sizes) <= 41 + 542 // WINDOW + 1


@in_world
async def test_over_a_long_way_a_walk_takes_a_round_trip_a_level(w: World) -> None:
    for number in range(4000):
        await w.store.write(b"%s/%d/%d/%d" % (TOP, number // 400, number // 20, number), b"x")
    pipeline = w.store.pipeline
    under_way = trio.lowlevel.ParkingLot()
    trips = 0

    async def ask_from_afar(requests: Sequence[Request]) -> list[Reply]:
        await under_way.park()
        return await pipeline(requests)

    async def deliver() -> None:
        """Whenever nobody does anything else."""
        nonlocal trips
        while True:
            await wait_all_tasks_blocked()
            if under_way:
                trips += 1
                under_way.unpark_all()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "pipeline", ask_from_afar)
        patch.setattr(w.store, "is_far", True)
        patch.setattr(store, "FAR_SECONDS", 0.0)
        async with open_background() as nursery:
            nursery.start_soon(deliver)
            text = await text_of(w, LsFormat)
    assert text.count(b"\n") == 4000 + 200 + 10
    assert trips <= 4 + 2


@in_world
async def test_walks_at_once_share_the_windows_in_flight(w: World) -> None:
    for number in range(500):
        await w.store.write(b"%s/%d" % (TOP, number), b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", True)
        patch.setattr(store, "FAR_SECONDS", 0.0)  # any store is far
        patch.setattr(subtree, "FAR_WINDOWS", 5 * WINDOWS_MIN)
        recorder = Recorder(w, patch)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(text_of, w, LsFormat)
    assert recorder.most == 5 * WINDOWS_MIN * 3 * WINDOW
    assert w.store.walks == 0


@in_world
async def test_one_fast_reply_shows_that_the_store_is_near(w: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", True)
        patch.setattr(store, "FAR_SECONDS", 0.0)
        await w.store.read("name")
        assert w.store.is_far
        patch.setattr(store, "FAR_SECONDS", float("inf"))
        await w.store.pipeline(())
        assert w.store.is_far, "nothing was sent"
        await w.store.read("name")
        assert not w.store.is_far
        patch.setattr(store, "FAR_SECONDS", 0.0)
        await w.store.read("name")
        assert not w.store.is_far, "a slow one shows nothing"


@in_world
async def test_others_get_a_turn_within_a_window(w: World) -> None:
    assert subtree.TURN_SECONDS <= 0.001
    for number in range(WINDOW):
        await w.store.write(b"%s/%d" % (TOP, number), b"x")
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    def begin(*_: object) -> bytes:
        seen.append(turns)
        return b""

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subtree, "TURN_SECONDS", 0)
        text_format = LsFormat(w.view, TOP)
        patch.setattr(text_format, "begin", begin)
        async with open_background() as nursery:
            nursery.start_soon(count_turns)
            await Walk(text_format, lambda size: None).run()
    assert len(seen) == WINDOW + 1
    assert len(set(seen)) > WINDOW // 2  # the order of tasks within a turn is random


@in_world
async def test_the_text_is_in_order_whatever_the_windows(w: World) -> None:
    for number in range(300):
        await w.store.write(b"%s/%d/x/%d" % (TOP, number % 17, number), b"%d" % number)
    lines = (await text_of(w, DumpFormat)).splitlines()
    paths = [json.loads(line)["path"] for line in lines]
    assert len(paths) == len(set(paths)) == 1 + 17 + 17 + 300
    # Depth first: what is below a node follows it at once.
    for position, path in enumerate(paths[1:], 1):
        below = [each.startswith(path + "/") for each in paths[position + 1 :]]
        assert below == sorted(below, reverse=True)


@in_world
async def test_before_each_window_the_caller_may_end_the_walk(w: World) -> None:
    for number in range(500):
        await w.store.write(b"%s/%d" % (TOP, number), b"v" * 100)
    sizes: list[int] = []

    def check(size: int) -> None:
        sizes.append(size)
        if size > 20_000:
            raise OverflowError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store, "is_far", False)
        with pytest.raises(OverflowError):
            await Walk(LsFormat(w.view, TOP), check).run()
    assert sizes == sorted(sizes)
    assert sizes[-1] < 20_000 + WINDOW * WALK_CONNECTIONS * 200


@in_world
async def test_a_walk_can_be_cancelled(w: World) -> None:
    for number in range(500):
        await w.store.write(b"%s/%d" % (TOP, number), b"x")
    with trio.CancelScope() as scope:
        scope.cancel()
        await text_of(w, LsFormat)
    assert scope.cancelled_caught
    assert (await text_of(w, LsFormat)).count(b"\n") == 500


@in_world
async def test_a_node_that_does_not_exist_has_no_text(w: World) -> None:
    for kind in (LsFormat, JsonFormat, DumpFormat):
        assert await Walk(kind(w.view, TOP + b"/none"), lambda size: None).run() is None


@in_world
async def test_every_line_of_a_dump_can_be_parsed(w: World) -> None:
    values = [bytes((byte,)) for byte in range(256)] + [b"", "\u2028\u00e9".encode()]
    for number, value in enumerate(values):
        await w.store.write(b"%s/%d" % (TOP, number), value)
    lines = [parse_line(line) for line in (await text_of(w, DumpFormat)).splitlines()]
    found = {path: value for path, value, _ in lines}
    assert found == {b".": b""} | {b"%d" % number: value for number, value in enumerate(values)}


def test_only_a_whole_object_is_complete() -> None:
    line = b'{"path": "a", "value": "}"}'
    assert [end for end in range(len(line) + 1) if is_complete(line[:end])] == [len(line)]
    assert not is_complete(b"[" * 100_000)
