"""Ring: replies that are taken by who is at work, without a turn for the task that reads them; and the
mirror, which does so while it makes a whole copy, and asks ahead by several connections."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked
from xsfs.mirror.windows import WINDOW, WINDOWS_AHEAD, Windows

from tests.support.clients import LIMIT, TIMEOUT
from tests.support.lying_store import Gate, HangUp, Lie, LyingStore, Talk, hang_up, honest, on, says
from tests.support.mirroring import Live, live
from tests.support.mounting import Place, each_place
from tests.support.xenstored.harness import RealXenstored, XsClient
from xsfs.mirror.mirror import Mirror
from xsfs.view.view import Sight
from xsfs.xenstore.connection import PROMPT_MAX, Connection, Reply
from xsfs.xenstore.protocol import Message, Op, read
from xsfs.xenstore.store import Store, open_store

place = each_place("C", "ocaml", "embedded")

MANY = PROMPT_MAX + 1
"""More requests than are waited for on the spot."""

ROOT = "/receiving"
NODES = 16 * WINDOW
"""Enough for the mirror to be as far ahead as it may be."""


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


@dataclass
class Asked:
    """A burst whose sender sleeps, as its answers are held back."""

    store: Store
    liar: LyingStore
    gate: Gate
    replies: list[Reply]

    def work_until(self, done: Callable[[], bool]) -> None:
        """No other task has a turn meanwhile."""
        end = time.monotonic() + LIMIT
        while not done():
            assert time.monotonic() < end, "it does not come"
            self.store.receive()


@asynccontextmanager
async def asked(socket: str, above: Path, lie: Lie) -> AsyncIterator[Asked]:
    """`lie`: what is done to the requests when the gate is open."""
    gate = Gate()
    with LyingStore(above / "liar", socket) as liar:
        async with open_store(liar.path, timeout=TIMEOUT) as store:
            await store.write("/receiving-value", "v")
            burst = Asked(store, liar, gate, [])
            liar.lie = on(Op.READ, gate.before(lie))

            async def ask() -> None:
                burst.replies += await store.burst([read(b"/receiving-value")] * MANY)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await wait_all_tasks_blocked()
                assert outstanding(store) == MANY
                try:
                    yield burst
                finally:
                    gate.open()
                    liar.behave()
            await store.delete("/receiving-value")


@trio_test
async def test_replies_come_without_a_turn(place: Place, tmp_path: Path) -> None:
    async with asked(place.socket, tmp_path, honest) as burst:
        burst.store.receive()  # nothing has come
        assert outstanding(burst.store) == MANY
        burst.gate.open()
        burst.work_until(lambda: not outstanding(burst.store))
        assert burst.replies == []
    assert burst.replies == [b"v"] * MANY


@trio_test
async def test_the_end_of_the_connection(daemon: RealXenstored, tmp_path: Path) -> None:
    async with asked(daemon.socket, tmp_path, hang_up) as burst:
        connection = connection_of(burst.store)
        burst.gate.open()
        burst.work_until(lambda: not connection.alive)
        burst.liar.behave()
    assert burst.replies == [b"v"] * MANY  # asked again by a new connection
    assert burst.store.reconnects == 1


@trio_test
async def test_nonsense(daemon: RealXenstored, tmp_path: Path) -> None:
    async with asked(daemon.socket, tmp_path, says(b"", Op.WRITE)) as burst:
        connection = connection_of(burst.store)
        burst.gate.open()
        burst.work_until(lambda: not connection.alive)
        burst.liar.behave()
    assert burst.replies == [b"v"] * MANY


@trio_test
async def test_what_fails_ends_the_connection(
    daemon: RealXenstored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader would not meet it: the device's transport has lost what it was about to write."""

    def receive() -> bytes:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async with asked(daemon.socket, tmp_path, honest) as burst:
        connection = connection_of(burst.store)
        with monkeypatch.context() as patch:
            patch.setattr(connection._transport, "receive", receive)
            connection.receive()
        assert not connection.alive
        burst.gate.open()
    assert burst.replies == [b"v"] * MANY


@trio_test
async def test_nothing_is_taken_where_nothing_is_awaited(
    daemon: RealXenstored, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(daemon.socket, timeout=TIMEOUT) as store:
        connection = connection_of(store)
        with monkeypatch.context() as patch:
            patch.setattr(connection._transport, "receive", lambda: pytest.fail("it was asked"))
            store.receive()
        connection.close()
        store.receive()
        assert b"tool" in await store.list("/")


# ------------------------------------------------------------------------------- the whole copy


class Course:
    """In which order a mirror asks and applies, and how many bursts are asked ahead."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[Sequence[bytes]] = []
        self.stores: list[Store | None] = []
        self.applied: list[Sequence[bytes]] = []
        self.ahead: list[int] = []
        self.received = 0
        survey, apply, receive = Mirror._survey, Mirror._apply, Windows.receive

        async def recorded_survey(
            mirror: Mirror,
            paths: Sequence[bytes],
            meanwhile: Callable[[], None] | None = None,
            *,
            store: Store | None = None,
        ) -> list[Sight]:
            self.asked.append(paths)
            self.stores.append(store)
            return await survey(mirror, paths, meanwhile, store=store)

        async def recorded_apply(
            mirror: Mirror,
            paths: Sequence[bytes],
            sights: Sequence[Sight],
            *,
            renew: bool,
            meanwhile: Callable[[], None] | None = None,
        ) -> None:
            await apply(mirror, paths, sights, renew=renew, meanwhile=meanwhile)
            self.applied.append(paths)
            self.ahead.append(len(self.asked) - len(self.applied))

        def recorded_receive(windows: Windows) -> None:
            self.received += 1
            receive(windows)

        patch.setattr(Mirror, "_survey", recorded_survey)
        patch.setattr(Mirror, "_apply", recorded_apply)
        patch.setattr(Windows, "receive", recorded_receive)


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
    assert course.received >= NODES // WINDOW // 4  # a fast machine makes many in 0.3 ms


def test_connections_ask_in_turn(alive: Live, course: Course) -> None:
    own, *others = stores = course.stores[:WINDOWS_AHEAD]
    assert own is alive.mirror.store
    assert len(set(stores)) == WINDOWS_AHEAD
    for number, store in enumerate(course.stores):
        assert store is stores[number % WINDOWS_AHEAD]
    # READ, DIRECTORY and, for permissions in files, GET_PERMS of each node.
    questions = (2 + alive.view.asks_perms) * (NODES + 1)
    assert own.requests == 1 + questions  # the first one is that by which the store was opened
    for number, other in enumerate(others, 1):
        asked = sum(map(len, course.asked[number::WINDOWS_AHEAD]))
        assert other is not None
        assert other.requests == (2 + alive.view.asks_perms) * asked
        assert not connection_of(other).alive


@pytest.mark.parametrize("times", [1, 3])
def test_other_connections_are_lost(place: Place, tmp_path: Path, times: int) -> None:
    """They come back, and what was asked by them is asked again."""
    lost: list[int] = []

    def lie(talk: Talk, request: Message) -> bool:
        # The first is the mirror's own, and one of the others its watches', which carries no READ.
        if talk.number > 1 and talk.requests > WINDOW and len(lost) < times:
            lost.append(talk.number)
            raise HangUp
        return False

    with place.witness() as witness, LyingStore(tmp_path / "liar", place.socket) as liar:
        _make_nodes(witness)
        liar.lie = on(Op.READ, lie)
        with live(liar.path, witness, root=ROOT) as alive:
            assert len(lost) == times
            assert alive.mirror.store.reconnects == times
            assert alive.differences() == []
        witness.rm(ROOT)


def test_there_are_no_other_connections(place: Place, tmp_path: Path) -> None:
    def welcome(talk: Talk) -> None:
        if talk.number > 2:
            raise HangUp

    with place.witness() as witness, LyingStore(tmp_path / "liar", place.socket) as liar:
        _make_nodes(witness)
        liar.welcome = welcome
        with live(liar.path, witness, root=ROOT) as alive:
            assert liar.connections == 3  # none was tried for twice, and no more than one
            assert alive.mirror.store.reconnects == 0
            assert alive.differences() == []
        witness.rm(ROOT)


def test_a_long_listing_goes_on_by_the_connection_that_asked(
    daemon: RealXenstored, tmp_path: Path
) -> None:
    asked: dict[int, set[int]] = {Op.DIRECTORY: set(), Op.DIRECTORY_PART: set()}
    long = f"{ROOT}/long"

    def lie(talk: Talk, request: Message) -> bool:
        if request.op in asked and request.payload.startswith(long.encode() + b"\0"):
            asked[request.op].add(talk.number)
        return False

    with daemon.client() as witness, LyingStore(tmp_path / "liar", daemon.socket) as liar:
        names = [f"{'n' * 40}{number}" for number in range(200)]
        witness.pipeline(("WRITE", f"{long}/{name}\0v".encode()) for name in names)
        liar.lie = lie
        with live(liar.path, witness, root=ROOT) as alive:
            assert len(os.listdir(alive.path("long"))) == len(names)
    # It is in the second burst; by the first connection the root was asked for.
    assert asked[Op.DIRECTORY_PART] == asked[Op.DIRECTORY] != {1}
