"""Ring: the mirror shows a changed value without its task, and leaves everything else to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import pytest
import trio

from tests.mirroring import Live, await_true, live
from tests.mounting import LIMIT, Place, each_place
from tests.test_mirror_failures import FOREIGN
from tests.xenstored.harness import XsClient
from xsfs.client import open_store
from xsfs.mirror_pace import PAUSE_SECONDS
from xsfs.view import Sight
from xsfs.wire import directory, read

ROOT = "/at-once"
NODE = f"{ROOT}/node"

place = each_place("C", "ocaml")


class Watched:
    """A mirror, and what its task has looked at."""

    def __init__(self, alive: Live) -> None:
        self.alive = alive
        self.by_task: list[bytes] = []
        look = alive.mirror._look_at_changed

        async def recorded(paths: Sequence[bytes]) -> None:
            self.by_task += paths
            await look(paths)

        alive.mirror._look_at_changed = recorded  # type: ignore[method-assign]

    @property
    def store(self) -> XsClient:
        return self.alive.witness

    def change(self, value: str) -> bool:
        """Whether the task has looked at it when the value is there."""
        before = len(self.by_task)
        self.store.write(NODE, value)
        shown = self.alive.path("node")
        await_true(lambda: shown.read_text() == f"{value}\n")
        return len(self.by_task) > before

    def rest(self) -> None:
        """Until the task waits."""
        await_true(lambda: self.alive.mirror._waits)


@pytest.fixture
def watched(place: Place) -> Iterator[Watched]:
    with place.witness() as witness:
        witness.mkdir(ROOT)
        witness.write(NODE, "before")
        with live(place.socket, witness, root=ROOT) as alive:
            alive.settle()
            yield Watched(alive)
        witness.rm(ROOT)


def test_a_value(watched: Watched) -> None:
    """Where the store answers within a moment, which on a busy machine it sometimes does not."""
    number = 0

    def without_the_task() -> bool:
        nonlocal number
        number += 1
        watched.rest()
        return not watched.change(str(number))

    looks = watched.alive.mirror.looks
    descriptors = os.listdir("/proc/self/fd")
    await_true(without_the_task)
    assert os.listdir("/proc/self/fd") == descriptors
    assert watched.alive.mirror.looks >= looks + number
    watched.alive.settle()


def test_what_is_known_later(watched: Watched) -> None:
    """A node that was looked at without the task is looked at again when more is known of it."""
    watched.rest()
    watched.change("v")
    watched.store.write(NODE, "")
    watched.alive.settle()
    watched.alive.tell(partial(watched.alive.known.add, NODE.encode()))
    watched.alive.settle()
    assert watched.alive.path("node").is_dir()


def test_permissions(watched: Watched) -> None:
    watched.rest()
    watched.store.set_perms(NODE, ("n0", "r7"))
    watched.alive.settle()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda store: store.rm(NODE), id="a removal"),
        pytest.param(lambda store: store.write(f"{NODE}/child", "v"), id="a child"),
        pytest.param(lambda store: store.write(f"{ROOT}/new", "v"), id="a new node"),
        pytest.param(lambda store: store.mkdir(f"{ROOT}/a/b/c"), id="new directories"),
    ],
)
def test_what_is_more_than_a_value_is_left_to_the_task(watched: Watched, change: object) -> None:
    assert callable(change)
    watched.rest()
    change(watched.store)
    watched.alive.settle()
    assert watched.by_task


def test_what_is_a_directory_by_now_is_left_to_the_task(watched: Watched) -> None:
    """Its children are to be looked at, too."""
    watched.rest()

    def becomes_a_directory() -> None:
        watched.store.write(f"{NODE}/child", "v")
        watched.alive.mirror._changes.put(NODE.encode())

    watched.alive.tell(becomes_a_directory)
    watched.alive.settle()
    assert watched.by_task[0] == NODE.encode()


def test_a_directory_whose_value_changes_is_left_to_the_task(watched: Watched) -> None:
    watched.store.write(f"{NODE}/child", "v")
    watched.alive.settle()
    watched.rest()
    watched.by_task.clear()
    watched.store.write(NODE, "after")
    watched.alive.settle()
    assert watched.by_task == [NODE.encode()]


@pytest.mark.parametrize("path", FOREIGN)
def test_an_event_of_another_place_changes_nothing(watched: Watched, path: bytes) -> None:
    """Even if it comes alone, while the task waits."""
    watched.rest()
    watched.alive.tell(partial(watched.alive.mirror._changes.put, path))
    watched.alive.settle()
    watched.rest()
    watched.alive.settle()


def test_who_has_worked_much_rests_first(watched: Watched) -> None:
    watched.rest()

    def has_worked() -> None:
        # Less what it rests from now on, until the event comes.
        watched.alive.mirror._pace.owed = PAUSE_SECONDS + LIMIT

    watched.alive.tell(has_worked)
    assert watched.change("after")


def test_what_is_done_without_the_task_is_work(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it took a second each time."""
    ticks = count()
    monkeypatch.setattr(time, "thread_time", lambda: float(next(ticks)))
    number = 0

    def without_the_task() -> bool:
        nonlocal number
        number += 1
        watched.rest()
        return not watched.change(str(number))

    await_true(without_the_task)
    assert watched.change("after")


def test_what_goes_wrong_is_left_to_the_task(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: bytes, meanwhile: object) -> Sight | None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(watched.alive.view, "glance", fails)
    watched.rest()
    assert watched.change("after")
    assert watched.alive.mirror.true
    watched.alive.settle()


def test_what_is_asked_at_once_is_not_waited_for(place: Place) -> None:
    """A store that says nothing costs a moment; what it says later is of nobody's concern."""
    daemon = place.daemon
    assert daemon is not None
    meanwhile: list[int] = []

    async def ask() -> None:
        async with open_store(place.socket) as store:
            with trio.fail_after(LIMIT):
                while store.at_once((directory(b"/"),), lambda: None) is None:
                    await store.list("/")
                daemon.pause()
                try:
                    start = time.monotonic()
                    requests = (read(b"/local"), directory(b"/"))
                    assert store.at_once(requests, lambda: meanwhile.append(1)) is None
                    assert time.monotonic() - start < 1
                finally:
                    daemon.resume()
                assert meanwhile == [1]
                assert b"local" in await store.list("/")
                assert store.reconnects == 0

    trio.run(ask)
