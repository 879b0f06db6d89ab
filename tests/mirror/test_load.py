"""Ring: a real mount with a live mirror under a flood of changes, and at rest.

XSFS_TEST_FLOOD says how many seconds the flood lasts; `pytest -s` shows what it cost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mirroring import HOME, Mirrored, await_true, mirrored
from tests.support.mounting import LIMIT, Place, each_place

SECONDS = float(os.environ.get("XSFS_TEST_FLOOD", "2"))

RATE = 10_000
"""Writes a second, at most."""

NODES = 500

GROWTH_MAX = 24
"""MiB by which xsfs may grow in a flood."""

_FLOOD = f"""
import sys, time
from tests.support.xenstored.harness import XsClient, strings

def writes(seconds):
    start = time.monotonic()
    number = 0
    while time.monotonic() < start + seconds:
        number += 1
        yield "WRITE", strings(f"{HOME}/flood/{{number % {NODES}}}") + b"%d" % number
        if number % 100 == 0:
            ahead = number / {RATE} - (time.monotonic() - start)
            if ahead > 0:
                time.sleep(ahead)

with XsClient(sys.argv[1]) as client:
    print(len(client.pipeline(writes(float(sys.argv[2])), window=16384)))
"""


place = each_place("C", "ocaml", "embedded", quick=("C", "ocaml"))


@pytest.fixture(scope="module")
def alive(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirrored]:
    with mirrored(place, tmp_path_factory.mktemp("mount") / "m") as alive:
        yield alive


def status(alive: Mirrored, name: str) -> int:
    """A number of /proc/PID/status, of all threads together where each has its own."""
    tasks = Path(f"/proc/{alive.mount.process.pid}/task")
    found = []
    for task in tasks.iterdir():
        for line in (task / "status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                found.append(int(value.split()[0]))
    return found[0] if name.startswith("Vm") else sum(found)


def processor_seconds(alive: Mirrored) -> float:
    fields = Path(f"/proc/{alive.mount.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def reading(alive: Mirrored) -> Iterator[list[float]]:
    """Somebody who reads through the mount all the time; how long each reading took."""
    took: list[float] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.wait(0.005):
            start = time.monotonic()
            assert (alive.mount.path / "name").read_bytes() == b"Domain-0\n"
            took.append(time.monotonic() - start)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join(LIMIT)
        assert not thread.is_alive()


@pytest.mark.quick_if(place=["C"])
def test_a_flood(place: Place, alive: Mirrored) -> None:
    """Readers are served, memory stays, nobody hangs, and the mirror is true when it is over."""
    memory, processor = status(alive, "VmRSS"), processor_seconds(alive)
    with reading(alive) as took:
        # A writer that oxenstored stops permanently would not end.
        done = subprocess.run(
            # The readers of events come first: oxenstored stops a writer permanently if its watchers are
            # 2,000 events behind, which may happen on a busy machine.
            ["nice", "-n", "19", sys.executable, "-c", _FLOOD, place.socket, str(SECONDS)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=SECONDS + LIMIT,
        )
        await_true(lambda: len(took) > 10)
    spent = processor_seconds(alive) - processor
    alive.settle()
    grown = (status(alive, "VmRSS") - memory) / 1024
    print(
        f"\n{place.name}: {int(done.stdout) / SECONDS:.0f} writes a second for {SECONDS:g} s: "
        f"{spent / SECONDS:.2f} processors, {grown:.1f} MiB more, "
        f"{len(took)} readings of {max(took) * 1000:.0f} ms at most"
    )
    assert grown < GROWTH_MAX
    assert max(took) < LIMIT / 2
    alive.witness.rm(f"{HOME}/flood")
    alive.settle()


def test_at_rest_it_costs_nothing(place: Place, tmp_path: Path) -> None:
    """No thread of it wakes up, once what was to be done has been done: whether an answer came in time
    is the last thing to be seen."""
    timeout = 2.0
    with mirrored(place, tmp_path / "m", f"timeout={timeout}") as alive:
        alive.settle()

        def work() -> tuple[int, float]:
            return status(alive, "voluntary_ctxt_switches"), processor_seconds(alive)

        def rests() -> bool:
            before = work()
            time.sleep(2 * timeout)
            return before == work()

        await_true(rests)
