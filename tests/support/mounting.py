"""Real mounts of real stores, for the outer rings of the tests.

A `Place` is a store seen from one domain, with a witness: a client that shares no code with xsfs.  A
`Mount` is a running xsfs process on one, and what it wrote to stderr.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.xenstored.harness import RealXenstored, XsClient

LIMIT = 60.0
"""Seconds that anything here may take."""

GUEST = 7


class Mount:
    """An xsfs process in the foreground, and its mountpoint."""

    def __init__(self, arguments: Sequence[str], path: Path) -> None:
        self.path = path
        self.stderr_path = path.with_name(path.name + ".stderr")
        path.mkdir(exist_ok=True)
        with open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xsfs", "-f", *arguments, str(path)],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def wait_mounted(self) -> None:
        """Until the kernel says that it is mounted: mountinfo can be polled for changes."""
        deadline = time.monotonic() + LIMIT
        process = os.pidfd_open(self.process.pid)
        with open("/proc/self/mountinfo", "rb") as mounts:
            poll = select.poll()
            poll.register(mounts, select.POLLPRI)
            poll.register(process, select.POLLIN)
            while not os.path.ismount(self.path):
                left = deadline - time.monotonic()
                assert left > 0, f"not mounted in time: {self.stderr}"
                poll.poll(left * 1000)
                assert self.process.poll() is None, f"xsfs ended: {self.stderr}"
                mounts.seek(0)
                mounts.read()
        os.close(process)

    def end(self, number: int | None = None) -> int:
        """End it by a signal, or by umount; its exit status."""
        if number is not None:
            self.process.send_signal(number)
        elif os.path.ismount(self.path):
            subprocess.run(["umount", self.path], check=True, timeout=LIMIT)
        try:
            return self.process.wait(LIMIT)
        finally:
            self.clear()

    def clear(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT)
        subprocess.run(["umount", "-l", self.path], stderr=subprocess.DEVNULL, check=False)

    def bash(self, script: str, **environment: str) -> str:
        """What a shell prints that runs the script at the mountpoint; it must succeed."""
        done = self.run(script, **environment)
        assert done.returncode == 0, f"{script!r}: {done.stderr}{done.stdout}\n{self.stderr}"
        return done.stdout

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.path,
            env={**os.environ, "LC_ALL": "C", **environment},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=LIMIT * 3,
            check=False,
        )

    def counter(self, name: str) -> int:
        for line in (self.path / ".stats").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
        raise KeyError(name)


@contextmanager
def mounted(arguments: Sequence[str], path: Path, *, tracebacks: bool = False) -> Iterator[Mount]:
    """A mount that must end well: status 0, and no bug in its log."""
    mount = Mount(arguments, path)
    try:
        mount.wait_mounted()
        yield mount
        assert mount.process.poll() is None, f"xsfs died: {mount.stderr}"
        assert mount.end() == 0, mount.stderr
        assert tracebacks or "Traceback" not in mount.stderr, mount.stderr
    finally:
        mount.clear()


@dataclass
class Place:
    """A store as one domain sees it."""

    name: str
    socket: str
    domid: int
    daemon: RealXenstored | None = None
    """None: the store inside a mount of its own, which listens at `socket`."""

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    @property
    def guest(self) -> bool:
        return self.domid != 0

    @property
    def own_watches(self) -> int:
        """How many watches a mount has that nobody uses: a guest's watches its `domid`."""
        return int(self.guest)

    @property
    def home(self) -> str:
        return f"/local/domain/{self.domid}"

    def witness(self) -> XsClient:
        """An independent client of the same domain."""
        return XsClient(self.socket)

    def dom0(self) -> XsClient:
        assert self.daemon is not None
        return self.daemon.client()


PLACES = ("C", "ocaml", "C-guest", "ocaml-guest", "embedded")


@contextmanager
def open_place(name: str, directory: Path) -> Iterator[Place]:
    """The store called so, filled with what a toolstack writes."""
    kind, _, role = name.partition("-")
    domid = GUEST if role else 0
    if kind == "embedded":
        socket = str(directory / "embedded.sock")
        with mounted(["-o", f"listen={socket}", "embedded"], directory / "embedded-store") as mount:
            wait_for_socket(socket, mount)
            yield Place(name, socket, domid)
        return
    with RealXenstored(kind, guests=(GUEST,)) as daemon:
        daemon.populate()
        socket = daemon.guest_socket(GUEST) if domid else daemon.socket
        yield Place(name, socket, domid, daemon)


of_dom0 = pytest.mark.parametrize(
    "place", [name for name in PLACES if "guest" not in name], indirect=True, scope="module"
)
"""For a test of what a guest may not do: it runs in the places of domain 0."""

of_guests = pytest.mark.parametrize(
    "place", [name for name in PLACES if "guest" in name], indirect=True, scope="module"
)
"""For a test of what domain 0 is not refused: it runs in the places of a guest."""


def quick_params(quick: Sequence[str], names: Sequence[str]) -> list[Any]:
    """The params of a fixture: with those that are not among the quick ones, tests are slow, and ci."""
    marks = (pytest.mark.slow, pytest.mark.ci)
    return [pytest.param(name, marks=() if name in quick else marks) for name in names]


def each_place(*names: str, quick: Sequence[str] = PLACES) -> Any:
    """A fixture: each of these stores in turn, for a whole file of tests.

    The tests at a place that is not among the quick ones are slow, and CI runs them.
    """

    @pytest.fixture(scope="module", params=quick_params(quick, names))
    def place(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Place]:
        with open_place(request.param, tmp_path_factory.mktemp("place")) as place:
            yield place

    return place


def refusal(attempt: Callable[[], object]) -> int:
    """The errno with which it fails; 0 if it does not."""
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


def wait_for_socket(socket: str, mount: Mount) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        with suppress(OSError), XsClient(socket) as client:
            client.read("/tool/xenstored")
            return
        assert mount.process.poll() is None, mount.stderr
        assert time.monotonic() < deadline, "the embedded store does not listen"


def winners(attempt: Callable[[], object], contenders: int = 8) -> int:
    """How many of some threads succeed that attempt the same at once; the others must find that it
    exists already."""
    won = []

    def contend() -> None:
        try:
            attempt()
        except FileExistsError:
            return
        won.append(True)

    threads = [threading.Thread(target=contend) for _ in range(contenders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    return len(won)
