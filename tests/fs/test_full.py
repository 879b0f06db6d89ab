"""Ring: everything that can be full: a guest's quotas at both daemons, file descriptors, memory.

A full one is a clear error of the call that met it; the mount goes on, and works when there is room.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.fs.test_values import fails
from tests.support.mounting import LIMIT, Mount, Place, each_place, mounted, refusal
from tests.support.transaction_dirs import until
from tests.support.xenstored.harness import RealXenstored

FULL = {errno.ENOSPC, errno.EDQUOT}


place = each_place("C-guest", "ocaml-guest")


@pytest.fixture
def mount(place: Place, tmp_path: Path) -> Iterator[Mount]:
    with mounted([place.socket], tmp_path / "m") as mount:
        yield mount


def until_full(attempt: Callable[[int], object], most: int = 5000) -> tuple[int, int]:
    """How often it went well, and the errno of the first failure."""
    for number in range(most):
        try:
            attempt(number)
        except OSError as error:
            return number, error.errno or -1
    return most, 0


@pytest.mark.quick_if(place=["C-guest"])
def test_nodes(mount: Mount) -> None:
    top = mount.path / "data" / "full"
    top.mkdir()

    def make(number: int) -> None:
        (top / f"d{number % 30}").mkdir(exist_ok=True)
        (top / f"d{number % 30}" / f"n{number}").write_text("1\n")

    count, number = until_full(make)
    assert 300 < count < 1200
    assert number in FULL
    # Every kind of creation fails with it, and existing nodes can be changed and removed.
    attempts: list[Callable[[], None]] = [
        lambda: (top / "directory").mkdir(),
        lambda: os.close(os.open(top / "excl", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
        lambda: os.mknod(top / "node"),
    ]
    for attempt in attempts:
        assert refusal(attempt) in FULL
    (top / "d0" / "n0").write_text("2\n")
    assert (top / "d0" / "n0").read_text() == "2\n"
    (top / "d0" / "n0").unlink()
    make(0)
    mount.bash("rm -r data/full")
    top.mkdir()
    top.rmdir()
    assert mount.counter("transactions") == 0


def test_watches(place: Place, mount: Mount) -> None:
    with ExitStack() as stack:

        def watch(number: int) -> None:
            path = mount.path / f"data/w{number}"
            path.mkdir(exist_ok=True)
            stack.callback(os.close, os.open(path / ".watch", os.O_RDONLY | os.O_NONBLOCK))

        count, number = until_full(watch)
        assert 90 < count < 140
        assert number in FULL
        assert (mount.path / "name").read_text()
        # An existing watch can be shared.
        watch(0)
        (mount.path / "data" / "w0" / "x").write_text("1\n")
    until(lambda: mount.counter("watches") == place.own_watches)
    with ExitStack() as stack:
        watch(0)
    mount.bash("rm -r data/w*")


def is_written(path: Path) -> bool:
    """Whether the write took no transaction: it takes one if the machine is so busy that the open(2) before
    it is no longer recent."""
    return refusal(partial(path.write_text, "1\n")) == 0


def test_transactions(mount: Mount) -> None:
    inside = mount.path / ".transaction"
    count, number = until_full(lambda number: (inside / f"t{number}").mkdir())
    assert 8 < count < 13
    assert number in FULL
    assert len(os.listdir(inside)) == count
    # Reading and plain writing need none; what does says why it cannot.
    assert (mount.path / "name").read_text()
    until(partial(is_written, mount.path / "data" / "x"))
    assert refusal((mount.path / "data" / "d").mkdir) in FULL
    for name in os.listdir(inside):
        (inside / name).rmdir()
    (mount.path / "data" / "d").mkdir()
    (mount.path / "data" / "d").rmdir()


@pytest.mark.parametrize("how", ["write", "append", "attribute", "truncate"])
def test_values(mount: Mount, how: str) -> None:
    path = mount.path / "data" / "value"
    path.write_text("old\n")
    long = b"x" * 3900

    def append() -> None:
        with open(path, "ab", buffering=0) as file:
            file.write(long)

    ways: dict[str, Callable[[], object]] = {
        "write": lambda: path.write_bytes(long),
        "append": append,
        "attribute": lambda: os.setxattr(path, "user.xs.value", long),
        "truncate": lambda: os.truncate(path, len(long)),
    }
    assert refusal(ways[how]) in {errno.EFBIG, *FULL}
    assert path.read_text() == "old\n"


# -------------------------------------------------------------------------------- descriptors


@pytest.mark.quick_if(kind=["C"])
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_file_descriptors_of_the_mount(tmp_path: Path, kind: str) -> None:
    """Each transaction takes one.  Without any it says so, and works again when there are some."""
    with RealXenstored(kind) as daemon:
        daemon.populate()
        with mounted(["-o", "timeout=5", daemon.socket], tmp_path / "m") as mount:
            pid = mount.process.pid
            used = len(os.listdir(f"/proc/{pid}/fd"))
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 5, hard))
            inside = mount.path / ".transaction"
            count, number = until_full(lambda number: (inside / f"t{number}").mkdir())
            assert count < 8
            assert number in (errno.EMFILE, errno.EIO)
            assert (mount.path / "name").read_text() == "Domain-0\n"
            until(partial(is_written, mount.path / "data" / "x"))
            assert "x" in os.listdir(mount.path / "data")
            # A watch needs a connection of its own for the first one.
            start = time.monotonic()
            with suppress(OSError):
                os.close(os.open(mount.path / ".watch", os.O_RDONLY))
            assert time.monotonic() - start < LIMIT
            # A connection lost at such a time is not the end.
            daemon.restart()
            daemon.populate()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            until(lambda: (mount.path / "name").read_text() == "Domain-0\n")
            until(lambda: os.listdir(inside) == [])
            for again in range(20):
                (inside / f"t{again}").mkdir()
            for again in range(20):
                (inside / f"t{again}").rmdir()
            os.close(os.open(mount.path / ".watch", os.O_RDONLY))


# ------------------------------------------------------------------------------------- memory


def resident(mount: Mount) -> float:
    """MiB."""
    status = Path(f"/proc/{mount.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """The same, over and over, costs no more than once; and the first time not much."""
    with RealXenstored(kind) as daemon, mounted([daemon.socket], tmp_path / "m") as mount:
        daemon.populate()

        def work() -> None:
            mount.bash(
                """
                mkdir -p data/memory
                for i in $(seq 80); do
                    echo $i > data/memory/n$i; echo $i >> data/memory/n$i
                    mkdir data/memory/d$i; echo 1 > data/memory/d$i/x
                done
                mkdir .transaction/t; find .transaction/t > /dev/null; rmdir .transaction/t
                find .root -type f -exec cat {} + > /dev/null
                rm -r data/memory
                """
            )
            with ExitStack() as stack:
                for _ in range(200):
                    file = os.open(mount.path / "data" / ".watch", os.O_RDONLY | os.O_NONBLOCK)
                    stack.callback(os.close, file)

        for _ in range(2):
            work()
        before = resident(mount)
        for _ in range(4):
            work()
        assert resident(mount) - before < 3
        assert resident(mount) < 60


def heap(mount: Mount) -> float:
    """MiB of malloc's that are in memory."""
    maps = Path(f"/proc/{mount.process.pid}/smaps").read_text()
    return int(maps.split("[heap]")[1].split("Rss:")[1].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.ci
def test_the_heap_has_no_holes(tmp_path: Path) -> None:
    """Objects that are made large and cut to what came leave some, however few they are at a time."""
    with RealXenstored("ocaml") as daemon, mounted([daemon.socket], tmp_path / "m") as mount:
        daemon.populate()

        def append(number: int) -> None:
            for count in range(1500):
                with open(mount.path / "data" / f"{number}-{count // 500}", "ab", 0) as file:
                    file.write(b"x\n")

        before = heap(mount)
        threads = [threading.Thread(target=append, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3 * LIMIT)
            assert not thread.is_alive()
        assert heap(mount) - before < 1


def test_a_value_that_is_too_long_for_any_message(tmp_path: Path) -> None:
    with RealXenstored("C") as daemon, mounted([daemon.socket], tmp_path / "m") as mount:
        daemon.populate()
        path = mount.path / "data" / "x"
        path.write_text("old\n")
        with fails(errno.EFBIG):
            path.write_bytes(b"x" * 100_000)
        assert path.read_text() == "old\n"
