"""Ring: the mirror shows a changed value without its task, and leaves everything else to it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count

import pytest
import trio
from xsfs.mirror.pace import PAUSE_SECONDS

from tests.mirror.test_failures import FOREIGN
from tests.support.mirroring import Live, await_true, live
from tests.support.mounting import LIMIT, Place, each_place
from tests.support.xenstored.harness import XsClient
from xsfs.mirror.mirror import BREAK_SECONDS
from xsfs.mirror.reconcile import READY_SECONDS
from xsfs.view.view import Sight
from xsfs.xenstore.protocol import directory, read
from xsfs.xenstore.store import open_store

ROOT = "/at-once"
NODE = f"{ROOT}/node"

place = each_place("C", "ocaml")


class Watched:
    """A mirror, and what its task has looked at."""

    def __init__(self, alive: Live, patch: pytest.MonkeyPatch) -> None:
        self.alive = alive
        self.by_task: list[bytes] = []
        look = alive.mirror._look_at_changed

        async def recorded() -> None:
            self.by_task += alive.mirror._events
            await look()

        patch.setattr(alive.mirror, "_look_at_changed", recorded)

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

    def change_without_the_task(self) -> int:
        """Change it until the task has not looked at it; how many changes that took.  On a busy machine
        the store sometimes does not answer within a moment."""
        number = 0

        def without_the_task() -> bool:
            nonlocal number
            number += 1
            self.rest()
            return not self.change(str(number))

        await_true(without_the_task)
        return number

    def rest(self) -> None:
        """Until the task waits."""
        await_true(lambda: self.alive.mirror.true and bool(self.alive.mirror._work))


@pytest.fixture
def watched(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    with place.witness() as witness:
        witness.mkdir(ROOT)
        witness.write(NODE, "before")
        with live(place.socket, witness, root=ROOT) as alive:
            alive.settle()
            yield Watched(alive, monkeypatch)
        witness.rm(ROOT)


def test_a_value(watched: Watched) -> None:
    looks = watched.alive.mirror.looks
    descriptors = os.listdir("/proc/self/fd")
    number = watched.change_without_the_task()
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


def test_what_is_left_to_the_task_is_asked_once(watched: Watched) -> None:
    requests = watched.alive.mirror.store.requests
    watched.rest()
    watched.store.write(f"{ROOT}/new", "v")
    watched.alive.settle()
    assert watched.by_task == [f"{ROOT}/new".encode()]
    assert watched.alive.mirror.store.requests - requests == 2 + watched.alive.view.asks_perms


def test_a_removal(watched: Watched) -> None:
    def without_the_task() -> bool:
        watched.store.write(NODE, "v")
        watched.alive.settle()
        watched.rest()
        before = len(watched.by_task)
        watched.store.rm(NODE)
        watched.alive.settle()
        return len(watched.by_task) == before

    await_true(without_the_task)


def test_a_removal_of_the_last_child(watched: Watched) -> None:
    """What is left to be seen about its parent is the task's."""
    watched.store.write(f"{ROOT}/parent/child", "v")
    watched.alive.settle()
    for path in (NODE, f"{ROOT}/parent/child"):
        watched.rest()
        watched.store.rm(path)
        watched.alive.settle()


def test_permissions(watched: Watched) -> None:
    watched.rest()
    watched.store.set_perms(NODE, ("n0", "r7"))
    watched.alive.settle()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda store: store.write(f"{NODE}/child", "v"), id="a child"),
        pytest.param(lambda store: store.write(f"{ROOT}/new", "v"), id="a new node"),
        pytest.param(lambda store: store.mkdir(f"{ROOT}/a/b/c"), id="new directories"),
    ],
)
def test_what_is_more_than_a_file_is_left_to_the_task(watched: Watched, change: object) -> None:
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
    assert NODE.encode() in watched.by_task


def test_what_is_in_the_way_is_looked_at_by_the_task(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files' owner puts a file where the directory was, and takes his time."""
    directory = watched.alive.path("parent")
    watched.store.write(f"{ROOT}/parent/child", "v")
    watched.alive.settle()
    glance = watched.alive.view.glance
    seen: list[Sight] = []

    def replaced(path: bytes, meanwhile: Callable[[], None]) -> Sight | None:
        sight = glance(path, meanwhile)
        if sight is not None and not seen:
            seen.append(sight)
            time.sleep(1.5 * READY_SECONDS)
            shutil.rmtree(directory)
            directory.write_text("in the way")
        return sight

    monkeypatch.setattr(watched.alive.view, "glance", replaced)

    number = 0

    def is_shown() -> bool:
        with suppress(OSError):
            return (directory / "child").read_text() == f"{number}\n"
        return False

    def is_replaced() -> bool:
        nonlocal number
        number += 1
        watched.rest()
        watched.store.write(f"{ROOT}/parent/child", str(number))
        await_true(is_shown)
        return bool(seen)

    await_true(is_replaced)


def test_events_that_come_together_are_asked_for_once(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.rest()
    glances: list[bytes] = []

    def fails(path: bytes, meanwhile: object) -> Sight | None:
        glances.append(path)
        return None

    def tell() -> None:
        for _ in range(100):
            watched.alive.mirror._changes.put(NODE.encode())

    monkeypatch.setattr(watched.alive.view, "glance", fails)
    watched.alive.tell(tell)
    watched.alive.settle()
    assert glances == [NODE.encode()]


def test_a_second_event_without_a_break_is_left_to_the_task(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only the test moves on."""
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    by_task: list[int] = []

    def tell() -> None:
        nonlocal now
        for seconds in (LIMIT, BREAK_SECONDS / 2):
            now += seconds
            watched.alive.mirror._changes.put(NODE.encode())
            by_task.append(bool(watched.alive.mirror._changes))

    def shown_first() -> bool:
        by_task.clear()
        watched.rest()
        watched.alive.tell(tell)
        return by_task[0] == 0

    await_true(shown_first)
    assert by_task == [False, True]
    watched.alive.settle()


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


def test_who_has_worked_much_leaves_it_to_the_task(watched: Watched) -> None:
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
    watched.change_without_the_task()
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


def test_a_link_that_leads_nowhere_is_left_to_the_task(watched: Watched) -> None:
    """The files' owner puts one where the directory was: what is in it cannot even be looked at."""
    watched.store.write(f"{ROOT}/parent/child", "v")
    watched.alive.settle()
    watched.rest()
    directory = watched.alive.path("parent")
    shutil.rmtree(directory)
    directory.symlink_to("parent")
    watched.store.write(f"{ROOT}/parent/child", "w")
    await_true(lambda: not directory.is_symlink() and (directory / "child").is_file())
    assert (directory / "child").read_text() == "w\n"
    assert watched.alive.mirror.true


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
