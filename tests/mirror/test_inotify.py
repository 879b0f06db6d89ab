"""Ring: a real mount with a live mirror, watched by inotify.

No FUSE file system tells of changes made elsewhere.  And times, which Xenstore itself does not have.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from tests.support.mirroring import Mirrored, await_true, mirrored
from tests.support.mounting import LIMIT, Place, each_place
from tests.support.user_systemd import user_systemd
from tests.support.xenstored.harness import strings

place = each_place("C", "ocaml", "embedded", quick=("C", "ocaml"))


@pytest.fixture(scope="module")
def alive(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirrored]:
    with mirrored(place, tmp_path_factory.mktemp("mount") / "m", root="/watched") as alive:
        yield alive


@pytest.fixture(autouse=True)
def emptied(alive: Mirrored) -> None:
    alive.witness.rm("/watched")
    alive.witness.mkdir("/watched")
    alive.settle()


class Watching:
    """`inotifywait -m -r`, and what it has said since last asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process = subprocess.Popen(
            ["inotifywait", "-m", "-r", "--format", "%e %w%f", str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "Watches established" in line:
                break
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            events, _, path = line.rstrip("\n").partition(" ")
            wanted = {"MOVED_TO", "DELETE", "CREATE"} & set(events.split(","))
            if wanted:
                self.lines.append(f"{wanted.pop()} {path.removeprefix(f'{self.directory}/')}")

    def has_said(self, count: int) -> bool:
        return len(self.lines) == count

    def await_lines(self, *lines: str) -> None:
        """Exactly these come, in this order."""
        await_true(lambda: len(self.lines) >= len(lines))
        assert tuple(self.lines) == lines
        self.lines.clear()

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(LIMIT)
        self._thread.join(LIMIT)
        for stream in self._process.stdout, self._process.stderr:
            assert stream is not None
            stream.close()


@contextmanager
def watching(directory: Path) -> Iterator[Watching]:
    watching = Watching(directory)
    try:
        yield watching
    finally:
        watching.end()


def xenstore_write(place: Place, path: str, value: str) -> None:
    subprocess.run(
        ["xenstore-write", path, value],
        env={**os.environ, "XENSTORED_PATH": place.socket},
        check=True,
        timeout=LIMIT,
    )


def test_one_event_a_change(place: Place, alive: Mirrored) -> None:
    alive.witness.write("/watched/d/f", "0")
    alive.settle()
    with watching(alive.directory) as watched:
        for number in range(20):
            xenstore_write(place, "/watched/d/f", str(number))
            await_true(partial(watched.has_said, number + 1))
        xenstore_write(place, "/watched/d/f", "19")  # the same is a change, too
        watched.await_lines(*["MOVED_TO d/f"] * 21)
        alive.witness.set_perms("/watched/d/f", ["n0", "r5"])
        watched.await_lines("MOVED_TO d/f")
        alive.witness.write("/watched/d", "v")
        watched.await_lines("MOVED_TO d/.value")
        alive.witness.write("/watched/d/g", "")
        watched.await_lines("MOVED_TO d/g")
        alive.witness.rm("/watched/d/f")
        watched.await_lines("DELETE d/f")
        alive.witness.write("/watched/d", "")
        watched.await_lines("DELETE d/.value")


def test_directories(alive: Mirrored) -> None:
    with watching(alive.directory) as watched:
        alive.witness.write("/watched/n", "v")
        watched.await_lines("MOVED_TO n")
        alive.witness.write("/watched/n/m", "v")
        await_true((alive.directory / "n/m").exists)
        await_true(lambda: len(watched.lines) >= 2)  # what is said comes a moment later
        assert watched.lines[:2] == ["DELETE n", "CREATE n"]
        alive.settle()
        watched.lines.clear()
        # inotifywait watches new directories a moment after they were made.
        await_true(lambda: reaches(alive, watched, "n/m"))
        alive.witness.rm("/watched/n")
        await_true(lambda: watched.lines[-1:] == ["DELETE n"])
        assert "DELETE n/m" in watched.lines


def reaches(alive: Mirrored, watched: Watching, place: str) -> bool:
    """Whether a change of this node is noticed."""
    alive.witness.write(f"/watched/{place}", "again")
    alive.settle()
    return f"MOVED_TO {place}" in watched.lines


def test_the_mirror_comes_back_to_whoever_watches(place: Place, alive: Mirrored) -> None:
    """The directory itself stays when all that is in it goes with the connection."""
    if place.daemon is None:
        return  # the embedded store ends with its mount
    inode = alive.directory.stat().st_ino
    with watching(alive.directory) as watched:
        alive.witness.write("/watched/f", "v")
        watched.await_lines("MOVED_TO f")
        place.daemon.restart()
        alive.witness.close()
        alive.witness = place.witness()
        await_true(lambda: not (alive.directory / "f").exists())
        alive.witness.write("/watched/g", "v")
        await_true(lambda: "MOVED_TO g" in watched.lines)
    assert alive.directory.stat().st_ino == inode


class Seen(FileSystemEventHandler):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def on_any_event(self, event: FileSystemEvent) -> None:
        self.events.append((event.event_type, os.fsdecode(event.dest_path or event.src_path)))


def test_watchdog(place: Place, alive: Mirrored) -> None:
    alive.witness.write("/watched/d/f", "0")
    alive.settle()
    seen = Seen()
    observer = Observer()
    observer.schedule(seen, str(alive.directory), recursive=True)
    observer.start()
    try:
        file = str(alive.directory / "d/f")
        xenstore_write(place, "/watched/d/f", "1")
        await_true(lambda: any(path == file for _, path in seen.events))
        seen.events.clear()
        alive.witness.rm("/watched/d/f")
        await_true(lambda: ("deleted", file) in seen.events)
        alive.witness.write("/watched/e/f", "1")
        await_true(lambda: ("created", str(alive.directory / "e")) in seen.events)
    finally:
        observer.stop()
        observer.join(LIMIT)


def test_a_path_unit_of_systemd(place: Place, alive: Mirrored, tmp_path: Path) -> None:
    """systemd starts a service at each change, of a file that may not be there before."""
    seen = tmp_path / "seen"
    seen.touch()
    state = alive.directory / "device/state"
    units = {
        "state.path": f"[Path]\nPathChanged={state}\n",
        "state.service": f"[Service]\nType=oneshot\nExecStart=sh -c 'cat {state} >> {seen}'\n",
    }
    with user_systemd(tmp_path, units) as systemd:
        systemd.systemctl("start", "state.path")
        await_true(lambda: systemd.systemctl("is-active", "state.path") == "active")
        told = []
        for number in range(1, 5):
            xenstore_write(place, "/watched/device/state", str(number))
            told.append(str(number))
            await_true(lambda: seen.read_text().split() == told)
            # A change while its service still runs is one more start, at systemd's leisure.
            await_true(lambda: systemd.systemctl("is-active", "state.service") == "inactive")


# ------------------------------------------------------------------------------------ times


def times(alive: Mirrored) -> dict[str, int]:
    return {
        str(path.relative_to(alive.directory)): path.stat().st_mtime_ns
        for path in alive.directory.rglob("*")
    }


def test_what_changed_lately(alive: Mirrored, tmp_path: Path) -> None:
    for name in ("a", "b", "d/c", "d/e"):
        alive.witness.write(f"/watched/{name}", "v")
    alive.settle()
    mark = tmp_path / "mark"
    mark.touch()
    before = times(alive)
    await_true(lambda: time.time_ns() > mark.stat().st_mtime_ns + 20_000_000)
    alive.witness.write("/watched/d/e", "w")
    alive.settle()
    newer = ["find", ".", "-newer", str(mark), "-type", "f"]
    found = subprocess.run(newer, cwd=alive.directory, capture_output=True, text=True, check=True)
    assert found.stdout == "./d/e\n"
    alive.witness.write("/watched/a", "v")  # the same again
    alive.settle()
    await_true(lambda: times(alive)["a"] > before["a"])
    listed = subprocess.run(
        ["ls", "-t", "a", "b", "d/c", "d/e"],
        cwd=alive.directory,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.split()[:2] == ["a", "d/e"]
    assert {name: when for name, when in times(alive).items() if name in ("b", "d/c")} == {
        name: before[name] for name in ("b", "d/c")
    }


def test_looking_at_everything_again_changes_no_time(place: Place, alive: Mirrored) -> None:
    alive.witness.pipeline(
        ("WRITE", strings(f"/watched/{n % 5}/{n}") + b"%d" % n) for n in range(50)
    )
    alive.witness.write("/watched/1", "v")
    alive.settle()
    before = times(alive)
    looks = alive.mount.counter("mirror_looks")
    if place.daemon is not None:
        place.daemon.add_guest(30)
        place.daemon.destroy_domain(30)
    else:
        alive.witness.call("INTRODUCE", strings("30", "1", "1"))
        alive.witness.call("RELEASE", strings("30"))
    await_true(lambda: alive.mount.counter("mirror_looks") >= looks + 56)
    alive.settle()
    assert times(alive) == before
