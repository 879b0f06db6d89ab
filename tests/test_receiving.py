"""Ring: replies that are taken by who is at work, without a turn for the task that reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from tests.clients import LIMIT, TIMEOUT
from tests.lying_store import LyingStore, hang_up, on, silence
from tests.mirroring import Live, live
from tests.mounting import Place, each_place
from tests.xenstored.harness import RealXenstored, XsClient
from xsfs.client import Store, open_store
from xsfs.connection import PROMPT_MAX, Connection
from xsfs.mirror import WINDOWS_AHEAD, Mirror
from xsfs.mirror_window import WINDOW
from xsfs.unanswered import Reply
from xsfs.view import Sight
from xsfs.wire import Op, read

place = each_place("C", "ocaml", "embedded")

MANY = PROMPT_MAX + 1
"""More requests than are waited for on the spot."""

ROOT = "/receiving"
NODES = 5 * WINDOW


@pytest.fixture
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C") as daemon:
        yield daemon


def connection_of(store: Store) -> Connection:
    connection = store._link.connection
    assert connection is not None
    return connection


def outstanding(store: Store) -> int:
    return connection_of(store)._unanswered.outstanding


def work_until_all_is_there(store: Store) -> None:
    """No other task has a turn meanwhile."""
    end = time.monotonic() + LIMIT
    while outstanding(store):
        assert time.monotonic() < end, "the replies do not come"
        store.receive()


@trio_test
async def test_replies_come_without_a_turn(place: Place) -> None:
    async with open_store(place.socket, timeout=TIMEOUT) as store:
        await store.write("/receiving-value", "v")
        replies: list[Reply] = []

        async def ask() -> None:
            replies.extend(await store.burst([read(b"/receiving-value")] * MANY))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not outstanding(store):
                await trio.lowlevel.checkpoint()
            work_until_all_is_there(store)
            assert replies == []
        assert replies == [b"v"] * MANY
        assert await store.read("/receiving-value") == b"v"
        await store.delete("/receiving-value")


@trio_test
async def test_nothing_is_taken_where_nothing_is_awaited(
    daemon: RealXenstored, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(daemon.socket, timeout=TIMEOUT) as store:
        transport = connection_of(store)._transport
        monkeypatch.setattr(transport, "receive", lambda: pytest.fail("it was asked for"))
        store.receive()
        monkeypatch.undo()
        connection_of(store).close()
        store.receive()
        assert b"tool" in await store.list("/")


@trio_test
async def test_nothing_has_come_yet(daemon: RealXenstored, tmp_path: Path) -> None:
    with LyingStore(tmp_path / "liar", daemon.socket) as liar:
        async with open_store(liar.path, timeout=TIMEOUT) as store:
            liar.lie = on(Op.READ, silence)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.burst, [read(b"/tool")] * MANY)
                await wait_all_tasks_blocked()
                for _ in range(3):
                    store.receive()
                assert outstanding(store) == MANY
                assert connection_of(store).alive
                nursery.cancel_scope.cancel()


@trio_test
async def test_the_end_of_the_connection(daemon: RealXenstored, tmp_path: Path) -> None:
    with LyingStore(tmp_path / "liar", daemon.socket) as liar:
        async with open_store(liar.path, timeout=TIMEOUT) as store:
            connection = connection_of(store)
            liar.lie = on(Op.READ, hang_up)
            replies: list[Reply] = []

            async def ask() -> None:
                replies.extend(await store.burst([read(b"/tool")] * MANY))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                while not outstanding(store):
                    await trio.lowlevel.checkpoint()
                end = time.monotonic() + LIMIT
                while connection.alive:
                    assert time.monotonic() < end, "the end is not seen"
                    connection.receive()
                liar.behave()
            assert replies == [b""] * MANY  # asked again by a new connection
            assert store.reconnects == 1


# ------------------------------------------------------------------------------- the whole copy


class Course:
    """In which order a mirror asks and applies, and how many bursts are asked ahead."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[Sequence[bytes]] = []
        self.applied: list[Sequence[bytes]] = []
        self.ahead: list[int] = []
        self.received = 0
        survey, apply, receive = Mirror._survey, Mirror._apply, Store.receive

        async def recorded_survey(mirror: Mirror, paths: Sequence[bytes]) -> list[Sight]:
            self.asked.append(paths)
            return await survey(mirror, paths)

        async def recorded_apply(
            mirror: Mirror, paths: Sequence[bytes], sights: Sequence[Sight], *, renew: bool
        ) -> None:
            await apply(mirror, paths, sights, renew=renew)
            self.applied.append(paths)
            self.ahead.append(len(self.asked) - len(self.applied))

        def recorded_receive(store: Store) -> None:
            self.received += 1
            receive(store)

        patch.setattr(Mirror, "_survey", recorded_survey)
        patch.setattr(Mirror, "_apply", recorded_apply)
        patch.setattr(Store, "receive", recorded_receive)


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Course:
    return Course(monkeypatch)


@pytest.fixture
def alive(place: Place, course: Course) -> Iterator[Live]:
    with place.witness() as witness:
        _make_nodes(witness)
        with live(place.socket, witness, root=ROOT) as alive:
            yield alive
        witness.rm(ROOT)


def _make_nodes(witness: XsClient) -> None:
    witness.pipeline(("WRITE", f"{ROOT}/{number}\0{number}".encode()) for number in range(NODES))


def test_bursts_are_asked_ahead_and_applied_in_order(alive: Live, course: Course) -> None:
    assert course.applied == course.asked
    assert [len(paths) for paths in course.asked] == [1, *[WINDOW] * (NODES // WINDOW)]
    assert max(course.ahead) == WINDOWS_AHEAD
    assert alive.differences() == []


def test_replies_are_taken_while_files_are_made(alive: Live, course: Course) -> None:
    assert course.received >= NODES // WINDOW
