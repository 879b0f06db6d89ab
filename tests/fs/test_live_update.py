"""A xenstored that is replaced while it runs, by xenstore-control live-update: nobody notices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fs.test_restarts import InFlight
from tests.support.mirroring import await_true, scratch
from tests.support.mounting import LIMIT, Mount, Place, mounted, open_place
from tests.support.programs import program
from tests.support.xenstored.harness import XENSTORE_CONTROL, RealXenstored


@pytest.fixture(params=["C", "ocaml", "C-guest", "ocaml-guest"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A store of its own for each test."""
    with open_place(request.param, tmp_path) as place:
        yield place


@pytest.fixture
def mount(place: Place, tmp_path: Path) -> Iterator[Mount]:
    with scratch() as directory:
        options = ["-o", f"mirror={directory}/mirror", place.socket]
        with mounted(options, tmp_path / "m") as mount:
            yield mount


def program_of(daemon: RealXenstored) -> bytes:
    """What differs after each execve(2): the program's random addresses."""
    return Path(f"/proc/{daemon.pid}/auxv").read_bytes()


@contextmanager
def live_update(daemon: RealXenstored) -> Iterator[subprocess.Popen[str]]:
    """The command that replaces the daemon by its own program, which ends before the block does."""
    before = program_of(daemon)
    with subprocess.Popen(
        [XENSTORE_CONTROL, "live-update", "-t", f"{LIMIT:.0f}", daemon.binary],
        env={**os.environ, "XENSTORED_PATH": daemon.socket},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        try:
            yield command
            _, complaint = command.communicate(timeout=2 * LIMIT)
            assert (command.returncode, complaint) == (0, "")
        finally:
            command.kill()
    assert program_of(daemon) != before


def check_unnoticed(mount: Mount) -> None:
    assert mount.counter("reconnects") == 0
    assert mount.counter("errors") == 0
    assert "lost" not in mount.stderr


def test_a_reader_a_mirror_and_an_open_transaction(place: Place, mount: Mount) -> None:
    assert place.daemon is not None
    data = mount.path / "data"
    data.joinpath("x").write_text("1\n")
    with program("cat", data / ".watch") as reader:
        assert reader.lines.next() == "."
        transaction = mount.path / ".transaction/t"
        transaction.mkdir()
        transaction.joinpath("data/x").write_text("2\n")
        with live_update(place.daemon):
            assert data.joinpath("x").read_text() == "1\n"
            assert transaction.joinpath("data/x").read_text() == "2\n"
            transaction.joinpath(".control").write_text("commit\n")
        assert reader.lines.next() == "x"
        assert data.joinpath("x").read_text() == "2\n"
        data.joinpath("y").write_text("3\n")
        assert reader.lines.next() == "y"
    copy = mount.path / ".mirror/data/y"
    await_true(lambda: copy.exists() and copy.read_text() == "3\n")
    check_unnoticed(mount)


def test_operations_in_flight(place: Place, mount: Mount) -> None:
    assert place.daemon is not None
    with place.dom0() as dom0:
        for number in range(50):
            dom0.write(f"{place.home}/data/d{number}/n", b"0")
            dom0.set_perms(f"{place.home}/data/d{number}", [f"n{place.domid}"])
            dom0.set_perms(f"{place.home}/data/d{number}/n", [f"n{place.domid}"])
    with InFlight(mount) as work:
        for _ in range(2):
            with live_update(place.daemon):
                pass
            work.wait_for("ok", 200)
    assert set(work.outcomes) == {"ok"}
    check_unnoticed(mount)
