"""Ring: a guest that does what it may do to harm dom0's view, on real daemons, and dom0's own tools.

Whatever the guest does, find, tar, rm, ls and cat in dom0 end in time, with the truth or with an error
that says what is so, and the mount goes on.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fs.test_watch_files import flood, wait_stopped
from tests.support.mounting import GUEST, LIMIT, Mount, mounted
from tests.support.programs import program
from tests.support.xenstored.harness import RealXenstored, XsClient, XsError, strings
from xsfs.view.names import file_name

HOME = f"/local/domain/{GUEST}"

# The messages that a tool may print if something changed while it looked.
CLEAR = (
    *("No such file or directory", "Stale file handle", "Is a directory", "Not a directory"),
    *("Directory not empty", "File removed before we read it", "file changed as we read it"),
    *("File shrank", "Permission denied", "Exiting with failure status", "Cannot stat"),
    *("Resource temporarily unavailable", "exit delayed from previous errors"),
    *("file changed its type", "changed during execution", "Error is not recoverable"),
)


@pytest.fixture(scope="module", params=["C", "ocaml"])
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param, guests=(GUEST,)) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture(scope="module")
def mount(daemon: RealXenstored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """Dom0's, at the guest's home."""
    path = tmp_path_factory.mktemp("hostile") / "m"
    with mounted(["-o", f"root={HOME}", daemon.socket], path) as mount:
        yield mount


@pytest.fixture
def guest(daemon: RealXenstored) -> Iterator[XsClient]:
    with daemon.client(GUEST) as client:
        yield client
        with contextlib.suppress(XsError):
            client.rm("data/evil")


@pytest.fixture
def evil(mount: Mount, guest: XsClient) -> Path:
    guest.mkdir("data/evil")
    return mount.path / "data" / "evil.d"


@contextlib.contextmanager
def meanwhile(daemon: RealXenstored, harm: Callable[[XsClient, int], None]) -> Iterator[list[int]]:
    """The guest does harm, again and again, as fast as it can: how often, in the end."""
    over = threading.Event()
    count = [0]

    def go_on() -> None:
        with daemon.client(GUEST) as client:
            while not over.is_set():
                with contextlib.suppress(XsError):
                    harm(client, count[0])
                count[0] += 1

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join(LIMIT)
    assert not thread.is_alive()


def tool(*command: str | Path, seconds: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """A tool that ends in time; each line that it complains in says clearly what is so."""
    done = subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=seconds,
        check=False,
    )
    for line in done.stderr.splitlines():
        assert any(clear in line for clear in CLEAR), (command, line)
    assert "Input/output error" not in done.stderr
    return done


def still_works(mount: Mount) -> None:
    assert (mount.path / "name").read_text()
    assert "Traceback" not in mount.stderr


def written(guest: XsClient, names: list[str]) -> int:
    """Write a node of each name, until the quota is full: how many."""
    for number, name in enumerate(names):
        try:
            guest.write(f"data/evil/{name}", b"v")
        except XsError as refused:
            return number if refused.name in ("ENOSPC", "EQUOTA") else -1
    return len(names)


# --------------------------------------------------------------------------------- names, values


def test_long_names(daemon: RealXenstored, mount: Mount, guest: XsClient, evil: Path) -> None:
    """The longest that a path has room for, as many as the quota lets it make."""
    longest = 2047 - len("data/evil/")
    names = [f"n{number}-".ljust(longest, "x") for number in range(1000)]
    made = names[: written(guest, names)]
    assert made or daemon.kind == "C", "C lets one node have 2 KiB of names"
    expected = sorted(os.fsdecode(file_name(name.encode())) for name in made)
    assert sorted(os.listdir(evil)) == expected
    start = time.monotonic()
    done = tool("ls", "-l", evil)
    assert done.returncode == 0
    assert time.monotonic() - start < LIMIT / 2, len(made)
    assert len(tool("find", evil, "-type", "f").stdout.splitlines()) == len(made)
    for alias in expected[:20]:
        assert (evil / alias).read_text() == "v\n"
    assert tool("rm", "-r", evil.with_name("evil")).returncode == 0
    with pytest.raises(XsError):
        guest.ls("data/evil")
    still_works(mount)


@pytest.mark.quick_if(daemon=["ocaml"])
def test_a_thousand_children(mount: Mount, guest: XsClient, evil: Path, tmp_path: Path) -> None:
    """Each in a directory of its own, as C limits what one node's names may take together."""
    names = [f"{number % 40}/{'y' * 30}{number}" for number in range(1000)]
    made = names[: written(guest, names)]
    assert len(made) > 500
    files = tool("find", evil, "-type", "f", "-printf", "%P\n").stdout.split()
    assert sorted(files) == sorted(made)
    archive = tmp_path / "evil.tar"
    assert tool("tar", "-C", evil, "-cf", archive, ".").returncode == 0
    with tarfile.open(archive) as copy:
        assert len([member for member in copy if member.isfile()]) == len(made)
    # At its quota it can make nothing more; dom0 can still take all of it away.
    assert tool("rm", "-r", evil.with_name("evil"), seconds=2 * LIMIT).returncode == 0
    still_works(mount)


@pytest.mark.slow
@pytest.mark.ci
def test_a_path_of_many_levels(mount: Mount, guest: XsClient, evil: Path) -> None:
    """More than Python's stack has room for."""
    levels = 600
    guest.write("data/evil" + "/a" * levels, b"v")
    done = tool("find", evil, "-name", "a", seconds=2 * LIMIT)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == levels
    assert tool("rm", "-r", evil.with_name("evil"), seconds=2 * LIMIT).returncode == 0
    with pytest.raises(XsError):
        guest.ls("data/evil")
    still_works(mount)


VALUES = {
    "escape": b"\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "newlines": b"one\ntwo\n\nthree\n\n",
    "carriage": b"visible\rhidden",
    "nul": b"before\0after",
    "all": bytes(range(256)),
    "format": b"%s%n%x$(reboot)`reboot`; rm -rf /",
    "utf8": b"\xff\xfe\xc0\x80",
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_any_bytes(
    mount: Mount, guest: XsClient, evil: Path, tmp_path: Path, name: str
) -> None:
    value = VALUES[name]
    guest.write("data/evil/value", value)
    path = evil / "value"
    assert path.read_bytes() == value + b"\n"
    assert path.stat().st_size == len(value) + 1
    assert os.getxattr(path, "user.xs.value") == value
    copy = tmp_path / "copy"
    assert tool("cp", path, copy).returncode == 0
    assert copy.read_bytes() == value + b"\n"
    # No value gets into a listing or into the log.
    assert tool("ls", "-l", evil).returncode == 0
    assert "\x1b" not in mount.stderr
    still_works(mount)


ENTRIES = ("r-1", "b32757", "w4294967295", "n65536", "r32752", "n99999999999999999999")


def test_permissions_of_any_kind(
    daemon: RealXenstored, mount: Mount, guest: XsClient, evil: Path, tmp_path: Path
) -> None:
    """The mount shows all permissions that a daemon accepts from a guest.  mv, cp -a and tar keep them, and
    no connection ends."""
    connects = mount.counter("reconnects")
    top = f"{HOME}/data/evil"
    taken = 0
    with daemon.client() as dom0:
        for number, entry in enumerate(ENTRIES):
            guest.write(f"data/evil/src/{number}", b"v")
            try:
                guest.set_perms(f"data/evil/src/{number}", [f"n{GUEST}", entry])
            except XsError:
                continue
            taken += 1
            shown = os.getxattr(evil / "src" / str(number), "user.xs.perms").decode()
            assert shown == ",".join(dom0.get_perms(f"{top}/src/{number}"))
        assert taken

        def perms(directory: str) -> list[list[str]]:
            names = sorted(dom0.ls(f"{top}/{directory}"))
            return [dom0.get_perms(f"{top}/{directory}/{name}") for name in names]

        expected = perms("src")
        script = """
            set -e; cd "$0"
            ls -l src; getfattr -d src/*; cat src/*
            tar --xattrs --xattrs-include='user.*' -cf "$1" src
            cp -a src copy
            mkdir restored; tar --xattrs --xattrs-include='user.*' -C restored -xf "$1"
            mv src moved
        """
        done = subprocess.run(
            ["bash", "-c", script, evil, tmp_path / "tar"],
            capture_output=True,
            text=True,
            timeout=LIMIT * 3,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        for directory in ("copy", "restored/src", "moved"):
            assert perms(directory) == expected, directory
    assert mount.counter("reconnects") == connects
    still_works(mount)


def test_watching_a_guest_who_picks_names(mount: Mount, guest: XsClient, evil: Path) -> None:
    """One line for each change, whatever the name."""
    descriptor = os.open(evil / ".watch", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in ("-rf", "@releaseDomain", "x" * 1000, "--help", "@", "-"):
            guest.write(f"data/evil/{name}", b"1")
        lines: set[str] = set()
        deadline = time.monotonic() + LIMIT
        while len(lines) < 7:
            assert time.monotonic() < deadline, lines
            with contextlib.suppress(BlockingIOError):
                lines.update(os.read(descriptor, 65536).decode().splitlines())
        alias = os.fsdecode(file_name(b"x" * 1000))
        assert lines == {".", "./-rf", "./@releaseDomain", alias, "./--help", "./@", "./-"}
        for line in lines - {"."}:
            assert (evil / line).read_text() == "1\n"
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------- in motion


FLAPPING = [f"data/evil/f{number}" for number in range(4)]
FLIPS = 4 * 2 * 25
"""How often a file has become a directory, or a directory a file, in one turn of `flap`."""

FLIPS_MIN = 2000
"""So many at least happen while dom0 looks."""


def flap(client: XsClient, number: int) -> None:
    """Four files become directories and back, as fast as the daemon can do it, and are nothing for a
    moment."""
    requests = [("WRITE", strings(top) + b"value") for top in FLAPPING]
    for _ in range(FLIPS // 8):
        for top in FLAPPING:
            requests += [
                ("WRITE", strings(f"{top}/child") + b"value"),
                ("RM", strings(f"{top}/child")),
            ]
    requests += [("RM", strings(top)) for top in FLAPPING]
    assert len(client.pipeline(requests)) == len(requests)


def look_at_it(evil: Path, archive: Path) -> None:
    tool("find", evil, "-ls")
    tool("tar", "-C", evil, "-cf", archive, ".")
    tool("grep", "-r", "value", evil)
    tool("ls", "-lR", evil)


@pytest.mark.quick_if(daemon=["C"])
def test_flapping_between_file_and_directory(
    daemon: RealXenstored, mount: Mount, evil: Path, tmp_path: Path
) -> None:
    with meanwhile(daemon, flap) as count:
        looks = 0
        while looks < 5 or count[0] * FLIPS < FLIPS_MIN:
            look_at_it(evil, tmp_path / "evil.tar")
            tool("rm", "-rf", *(evil / Path(top).name for top in FLAPPING))
            looks += 1
    still_works(mount)
    tool("rm", "-rf", evil.with_name("evil"))
    assert not evil.with_name("evil").exists()


def test_revoking_permissions_in_the_middle(
    daemon: RealXenstored, guest: XsClient, tmp_path: Path
) -> None:
    """Of another guest's view: dom0 itself may read everything."""
    guest.write("data/evil/d/e/f", b"secret")

    def revoke(client: XsClient, number: int) -> None:
        for path in ("data/evil/d/e/f", "data/evil/d/e", "data/evil/d", "data/evil"):
            client.set_perms(path, [f"n{GUEST}", "r8" if number % 2 else "n8"])

    daemon.add_guest(8)
    daemon.populate([8])
    try:
        with (
            mounted(["-o", "root=/", daemon.guest_socket(8)], tmp_path / "m") as mount,
            meanwhile(daemon, revoke) as count,
        ):
            evil = mount.path / HOME[1:] / "data" / "evil"
            looks = 0
            while looks < 5 or count[0] <= 10:
                look_at_it(evil, tmp_path / "evil.tar")
                looks += 1
            assert not mount.counter("transactions")
    finally:
        daemon.destroy_domain(8)


@pytest.mark.quick_if(daemon=["ocaml"])
def test_a_storm_of_events(
    daemon: RealXenstored, mount: Mount, guest: XsClient, evil: Path
) -> None:
    """A reader that sleeps, one that reads, and dom0's own work, while the guest writes."""

    def storm(client: XsClient, number: int) -> None:
        client.pipeline(
            [("WRITE", strings(f"data/evil/n{each}") + b"%d" % number) for each in range(200)]
        )

    with program("cat", evil / ".watch") as asleep, program("cat", evil / ".watch") as awake:
        for reader in (asleep, awake):
            assert reader.lines.next() == "."
        asleep.process.send_signal(19)
        wait_stopped(asleep.process)
        with meanwhile(daemon, storm) as count, daemon.client() as dom0:
            start = time.monotonic()
            assert flood(dom0, "/local/domain/0/data/own", 100, 2000) < LIMIT
            for _ in range(50):
                assert (mount.path / "name").read_text()
            assert time.monotonic() - start < LIMIT
            while count[0] <= 2:
                assert (mount.path / "name").read_text()
        guest.write("data/evil/end", b"")
        awake.lines.until("end")
    still_works(mount)
