"""Ring: another user of the same machine, at a mount that lets everybody in as far as possible."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.fs.test_values import fails
from tests.fs.test_watch_files import wait_for
from tests.support.commands import let_others_reach
from tests.support.mounting import LIMIT, Mount, mounted, quick_params, refusal
from tests.support.programs import program
from tests.support.xenstored.harness import RealXenstored
from xsfs.fs.transactions import EACH_UNPRIVILEGED_MAX, OPEN_MAX, UNPRIVILEGED_MAX
from xsfs.fs.watch_files import READERS_MAX

HOME = "/local/domain/0"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


# The rights of other users of the host do not depend on the daemon.
@pytest.fixture(scope="module", params=quick_params(["C"], ["C", "ocaml"]))
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture
def mount(daemon: RealXenstored, tmp_path: Path) -> Iterator[Mount]:
    let_others_reach(tmp_path / "m")
    with mounted(["-o", "allow_other,umask=000", daemon.socket], tmp_path / "m") as mount:
        yield mount


@contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    """For this process and those that it starts."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, limits[1])))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


OPENS = """
import os, sys
path, count, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
opened = []
why = "all"
for number in range(count):
    try:
        opened.append(os.open(path, os.O_RDONLY | (os.O_NONBLOCK if mode == "poll" else 0)))
    except OSError as error:
        why = error.strerror
        break
print(len(opened), why, flush=True)
sys.stdin.read()
"""


@contextmanager
def opened_by_nobody(path: Path, count: int, mode: str = "poll") -> Iterator[tuple[int, str]]:
    """Another user opens a file so many times, and keeps all of it open."""
    command = [*NOBODY, "/usr/bin/python3", "-c", OPENS, str(path), str(count), mode]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"LC_ALL": "C"}
    ) as process:
        assert process.stdout is not None
        number, _, why = process.stdout.readline().partition(" ")
        yield int(number), why.strip()


def test_modes_are_enforced(daemon: RealXenstored, tmp_path: Path) -> None:
    """With allow_other the kernel enforces them, for each kind of access."""
    path = tmp_path / "m"
    let_others_reach(path)
    with mounted(["-o", "allow_other,umask=022", daemon.socket], path) as mount:
        for script, allowed in {
            "cat name": True,
            "ls": True,
            "cat .domid": True,
            "echo 1 > name": False,
            "echo 1 > data/new": False,
            "mkdir data/new": False,
            "rm name": False,
            "mv name data": False,
            "mkdir .transaction/theirs": False,
            "setfattr -n user.xs.perms -v b0 name": False,
            "truncate -s 0 name": False,
        }.items():
            done = subprocess.run(
                [*NOBODY, "sh", "-c", script],
                cwd=path,
                capture_output=True,
                timeout=LIMIT,
                check=False,
            )
            assert (done.returncode == 0) is allowed, (script, done.stderr)
        assert (path / "name").read_text() == "Domain-0\n"
        assert mount.counter("transactions") == 0


def test_secrets_stay_secret_by_default(daemon: RealXenstored, tmp_path: Path) -> None:
    """allow_other alone opens nothing: the umask is 077."""
    path = tmp_path / "m"
    let_others_reach(path)
    with mounted(["-o", "allow_other", daemon.socket], path):
        for name in ("", "name", ".domid", ".root/tool/xenstored", ".watch", ".transaction"):
            done = subprocess.run(
                [*NOBODY, "cat", path / name],
                capture_output=True,
                timeout=LIMIT,
                check=False,
            )
            assert b"Permission denied" in done.stderr, name


def test_ten_thousand_open_files(mount: Mount) -> None:
    with (
        many_descriptors(10_100),
        opened_by_nobody(mount.path / "name", 10_000) as (count, why),
    ):
        assert (count, why) == (10_000, "all")
        start = time.monotonic()
        for _ in range(50):
            assert (mount.path / "name").read_text() == "Domain-0\n"
        (mount.path / "data" / "x").write_text("1\n")
        assert time.monotonic() - start < LIMIT / 2
        status = Path(f"/proc/{mount.process.pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) / 1024 < 100, "MiB"


def test_as_many_watch_files_as_he_gets(mount: Mount) -> None:
    """The user gets half of them, waiting or not; the rest is for others."""
    with (
        many_descriptors(10_100),
        opened_by_nobody(mount.path / "data" / ".watch", 10_000) as (count, why),
    ):
        assert (count, why) == (READERS_MAX // 2, "Too many open files")
        with program("cat", mount.path / "data" / ".watch") as reader:
            assert reader.lines.next() == "."
            (mount.path / "data" / "x").write_text("1\n")
            reader.lines.until("x")
            assert (mount.path / "name").read_text() == "Domain-0\n"
    # All that the user had is free again.
    with opened_by_nobody(mount.path / ".watch", 10) as (count, why):
        assert (count, why) == (10, "all")


BEGINS = """
import os, sys
count = 0
try:
    while True:
        os.mkdir(f"{sys.argv[1]}-{count}")
        count += 1
except OSError as error:
    print(count, error.strerror)
"""


def test_as_many_transactions_as_he_gets(mount: Mount) -> None:
    """Each of the others has a share of half of them."""

    def begun_by(uid: int) -> str:
        command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        done = subprocess.run(
            [*command, "/usr/bin/python3", "-c", BEGINS, f"t{uid}"],
            cwd=mount.path / ".transaction",
            env={"LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        )
        return done.stdout.strip()

    full = "No space left on device"
    each, together = EACH_UNPRIVILEGED_MAX, UNPRIVILEGED_MAX
    for uid in range(65530, 65530 - together // each, -1):
        assert begun_by(uid) == f"{each} {full}"
    assert begun_by(65534) == f"0 {full}"
    assert begun_by(0) == f"{OPEN_MAX - together} {full}"
    for name in os.listdir(mount.path / ".transaction"):
        (mount.path / ".transaction" / name).rmdir()
    assert begun_by(65534) == f"{each} {full}"


def test_blocked_readers_of_another_user_block_nobody(mount: Mount) -> None:
    command = " & ".join(["cat .watch >/dev/null"] * 200) + " & echo begun; wait"
    with subprocess.Popen(
        [*NOBODY, "sh", "-c", command], cwd=mount.path, stdout=subprocess.PIPE, process_group=0
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            deadline = time.monotonic() + LIMIT
            while mount.counter("readers") < 200:
                assert time.monotonic() < deadline
            start = time.monotonic()
            for _ in range(20):
                assert (mount.path / "name").read_text() == "Domain-0\n"
            assert time.monotonic() - start < LIMIT / 2
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # or a failure would wait for it
    wait_for(mount, "readers", 0)


# ------------------------------------------------------------------------------ what is refused


def test_names_that_mean_something_elsewhere(mount: Mount) -> None:
    data = mount.path / "data"

    def write(path: Path) -> None:
        path.write_text("1")

    for name in ("a b", "a\nb", "a\x1b[31m", "\x07", "a\tb", "é", "x..", "*", "$(id)", "a;b"):
        for attempt in (write, Path.mkdir):
            with fails(errno.EINVAL):
                attempt(data / name)
        assert not (data / name).exists()


def test_links_and_devices(mount: Mount) -> None:
    data = mount.path / "data"
    (data / "file").write_text("1\n")
    attempts: list[Callable[[], None]] = [
        lambda: os.symlink("/etc/passwd", data / "link"),
        lambda: os.link(data / "file", data / "link"),
        lambda: os.mkfifo(data / "fifo"),
        lambda: os.mknod(data / "device", 0o600 | 0o020000, os.makedev(1, 3)),
    ]
    for attempt in attempts:
        with fails(errno.EPERM):
            attempt()
    assert not os.path.lexists(data / "link")


def test_huge_attributes(mount: Mount) -> None:
    path = mount.path / "name"
    for name in ("user.xs.perms", "user.xs.value"):
        huge = partial(os.setxattr, path, name, b"1" * 65536)
        assert refusal(huge) in (errno.E2BIG, errno.EFBIG)
    with fails(errno.EOPNOTSUPP):
        os.setxattr(path, "user.other", b"x" * 60000)
    for value in (b"", b"x0", b"n", b"\0", b"n0\n\nr1 \x1b", b"n99999999999"):
        assert refusal(partial(os.setxattr, path, "user.xs.perms", value))
    assert os.getxattr(path, "user.xs.perms") == b"n0"
    assert path.read_text() == "Domain-0\n"


def test_no_path_leads_out(mount: Mount, daemon: RealXenstored) -> None:
    """Not `..`, not a name of the store, not a link: there are none."""
    top = mount.path.stat()
    assert (mount.path / "data" / "..").stat().st_ino == top.st_ino
    for path, _, _ in os.walk(mount.path / ".root"):
        found = os.lstat(path)
        assert found.st_dev == top.st_dev
    links = subprocess.run(
        ["find", mount.path, mount.path / ".root", "!", "-type", "f", "!", "-type", "d"],
        capture_output=True,
        timeout=LIMIT * 3,
        check=True,
    )
    assert links.stdout == b""
    with daemon.client() as client:
        client.write(f"{HOME}/data/etc", b"../../../../etc/passwd")
    assert (mount.path / "data" / "etc").read_text() == "../../../../etc/passwd\n"
    assert (mount.path / "data" / ".." / ".." / mount.path.name).samefile(mount.path)


def test_standard_error_is_not_his(mount: Mount) -> None:
    """Requests of a user get into the log only if something is wrong with the store."""
    subprocess.run(
        [*NOBODY, sys.executable, "-c", "import os; os.listdir(b'\\x1b[31mevil')"],
        cwd=mount.path,
        stderr=subprocess.DEVNULL,
        timeout=LIMIT,
        check=False,
    )
    assert "evil" not in mount.stderr
