"""Ring: the live mirror without a mount.  Single changes while it has nothing to do, and how much of a
processor a flood of them costs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest
import trio

from tests.mirror.test_failures import FOREIGN, contains
from tests.support.mirroring import Live, await_true, busy, live
from tests.support.mounting import LIMIT, Place, each_place
from tests.support.xenstored.harness import XsClient
from xsfs.mirror.mirror import SLICE_SECONDS

ROOT = "/changes"
NODE = f"{ROOT}/node"

place = each_place("C", "ocaml")


@pytest.fixture
def alive(place: Place) -> Iterator[Live]:
    with place.witness() as witness:
        witness.mkdir(ROOT)
        witness.write(NODE, "before")
        with live(place.socket, witness, root=ROOT) as alive:
            alive.settle()
            yield alive
        witness.rm(ROOT)


def await_rest(alive: Live) -> None:
    """Until the mirror's task has nothing to do."""
    await_true(lambda: alive.mirror.is_current and bool(alive.mirror._idle))


# ------------------------------------------------------------------------------ single changes


def test_a_value_is_fetched_once(alive: Live) -> None:
    """By one pipeline; and nothing stays open."""
    descriptors = os.listdir("/proc/self/fd")
    for number in range(20):
        await_rest(alive)
        requests = alive.mirror.store.requests
        fetched = alive.mirror.fetched
        alive.witness.write(NODE, str(number))
        await_true(partial(contains, alive.path("node"), f"{number}\n"))
        await_rest(alive)
        assert alive.mirror.fetched - fetched == 1
        assert alive.mirror.store.requests - requests == 2 + alive.view.asks_perms
    assert os.listdir("/proc/self/fd") == descriptors
    alive.settle()


CHANGES: dict[str, Callable[[XsClient], object]] = {
    "a value": lambda store: store.write(NODE, "after"),
    "an empty value": lambda store: store.write(NODE, ""),
    "a removal": lambda store: store.rm(NODE),
    "a removal of the last child": lambda store: store.rm(f"{ROOT}/parent/child"),
    "permissions": lambda store: store.set_perms(NODE, ("n0", "r7")),
    "a child": lambda store: store.write(f"{NODE}/child", "v"),
    "a new node": lambda store: store.write(f"{ROOT}/new", "v"),
    "new directories": lambda store: store.mkdir(f"{ROOT}/a/b/c"),
    "a value of a directory": lambda store: store.write(f"{ROOT}/parent", "v"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_single_change(alive: Live, change: str) -> None:
    alive.witness.write(f"{ROOT}/parent/child", "v")
    alive.settle()
    await_rest(alive)
    CHANGES[change](alive.witness)
    alive.settle()


def test_what_is_known_later(alive: Live) -> None:
    """A node that was fetched is fetched again when more is known of it."""
    alive.witness.write(NODE, "")
    alive.settle()
    await_rest(alive)
    alive.tell(partial(alive.sticky.add, NODE.encode()))
    alive.settle()
    assert alive.path("node").is_dir()


@pytest.mark.parametrize("path", FOREIGN)
def test_an_event_of_another_place_changes_nothing(alive: Live, path: bytes) -> None:
    await_rest(alive)
    alive.tell(partial(alive.mirror._changes.put, path))
    alive.settle()
    await_rest(alive)
    alive.settle()


@pytest.mark.parametrize("trick", ["a file", "a link that leads nowhere", "a directory"])
def test_what_the_owner_of_the_files_puts_there_does_not_stay(alive: Live, trick: str) -> None:
    alive.witness.write(f"{ROOT}/parent/child", "v")
    alive.settle()
    await_rest(alive)
    directory = alive.path("parent")
    shutil.rmtree(directory)
    if trick == "a file":
        directory.write_text("in the way")
    elif trick == "a directory":
        (directory / "child" / "deep").mkdir(parents=True)
    else:
        directory.symlink_to("parent")
    alive.witness.write(f"{ROOT}/parent/child", "w")

    def is_shown() -> bool:
        with suppress(OSError):
            return (directory / "child").read_text() == "w\n"
        return False

    await_true(is_shown)
    assert not directory.is_symlink()
    assert alive.mirror.is_current


# ------------------------------------------------------------------------------------- load


_FLOOD = f"""
import sys, time
from tests.support.xenstored.harness import XsClient, strings

def writes():
    end = time.monotonic() + float(sys.argv[2])
    number = 0
    while time.monotonic() < end:
        number += 1
        yield "WRITE", strings(f"{ROOT}/{{number % 500}}") + b"%d" % number

with XsClient(sys.argv[1]) as client:
    client.pipeline(writes(), window=4096)
"""


@pytest.mark.quick_if(place=["C"])
def test_a_flood_takes_half_a_processor(alive: Live, place: Place) -> None:
    """Of what the mirror's thread gets: it sleeps as long as it works.  The client's own part, which
    takes the events, comes on top."""
    thread = next(t for t in threading.enumerate() if t.name == "mirror")
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    slept = 0.0
    sleep = trio.sleep

    async def measured(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        await sleep(seconds)

    alive.tell(lambda: setattr(trio, "sleep", measured))
    try:
        before = time.clock_gettime(clock)
        with subprocess.Popen([sys.executable, "-c", _FLOOD, place.socket, f"{LIMIT}"]) as flood:
            try:
                # Until there was something to do.
                await_true(lambda: time.clock_gettime(clock) - before > 0.5)
            finally:
                flood.kill()
        worked = time.clock_gettime(clock) - before
    finally:
        alive.tell(lambda: setattr(trio, "sleep", sleep))
    # With a wide room for the client's own part, which is the greater, the less turns the mirror gets.
    assert slept > 0.2 * worked
    alive.settle()


@pytest.fixture
def gaps(alive: Live) -> Iterator[list[float]]:
    """How long other tasks of the mirror's thread had to wait for their turns."""
    found: list[float] = []
    stop = trio.CancelScope()

    async def tick() -> None:
        with stop:
            while True:
                began = time.thread_time()
                await trio.sleep(0)
                found.append(time.thread_time() - began)

    def start() -> None:
        trio.lowlevel.spawn_system_task(tick)

    alive.tell(start)
    yield found
    alive.tell(stop.cancel)


LEVELS = 900


@pytest.mark.quick_if(place=["C"])
def test_deep_paths_hold_nobody_up(alive: Live, gaps: list[float]) -> None:
    """A guest that writes and removes them, again and again: each event is of a node whose parents are
    missing."""
    deep = [f"{ROOT}/{number}" + "/d" * LEVELS for number in range(8)]
    for _ in range(3):
        for path in deep:
            alive.witness.write(path, "v")
        for number in range(8):
            alive.witness.rm(f"{ROOT}/{number}")
    paths = [f"{ROOT}/gone/{number}".encode() + b"/d" * LEVELS for number in range(300)]
    # All events of the above come before this one.
    alive.witness.write(NODE, "after")
    await_true(partial(contains, alive.path("node"), "after\n"))
    await_rest(alive)
    fetched = alive.mirror.fetched

    def tell() -> None:
        for path in paths:
            alive.mirror._changes.put(path)

    alive.tell(tell)
    await_true(lambda: alive.mirror.fetched > fetched)
    alive.settle()
    await_rest(alive)
    # One for all of them.  The store walks up the whole path of each node that it does not find.
    assert alive.mirror.fetched - fetched <= 2
    assert max(gaps) < 100 * SLICE_SECONDS * busy(), "a slice, and what cannot be divided"


@pytest.mark.quick_if(place=["C"])
def test_a_directory_of_many_children_holds_nobody_up(alive: Live, gaps: list[float]) -> None:
    count = 4000
    for start in range(0, count, 1000):
        alive.witness.pipeline(
            ("WRITE", b"%s/many/%d\0" % (ROOT.encode(), number))
            for number in range(start, start + 1000)
        )
    await_true(lambda: alive.mirror.nodes >= count)
    alive.settle()
    await_rest(alive)
    gaps.clear()
    alive.witness.write(f"{ROOT}/many", "v")  # all of them are fetched again
    alive.settle()
    alive.witness.rm(f"{ROOT}/many")
    await_true(lambda: alive.mirror.nodes < 10)
    assert max(gaps) < 100 * SLICE_SECONDS * busy()
