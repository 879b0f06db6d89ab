"""The command as a user starts it, if it mounts nothing: refusals, and help."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import xsfs as package
from tests.support.commands import refused, xsfs
from tests.support.mounting import LIMIT, mounted
from tests.support.xenstored.harness import RealXenstored

PACKAGE = Path(package.__file__).parent


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C") as daemon:
        daemon.populate()
        yield daemon


def test_usage(daemon: RealXenstored, mountpoint: Path) -> None:
    for arguments, word in (
        ((), "the mountpoint is missing"),
        (("-f",), "the mountpoint is missing"),
        (("a", "b", "c"), "too many"),
        (("-o", "nonsense", mountpoint), "nonsense"),
        (("-o", "umask=9", mountpoint), "umask"),
        (("-o", "root=relative", mountpoint), "root"),
        (("-o", "root", mountpoint), "root=PATH"),
        (("-o", "ro=1", mountpoint), "takes no value"),
        (("-o", "timeout=0", mountpoint), "timeout"),
        (("-o", "uid=1_0", mountpoint), "number"),
        (("-o", "uid=4294967295", mountpoint), "number"),
        (("-o", "uid=no-such-user", mountpoint), "must be the name of a user, or a number"),
        (("-o", "gid=no-such-group", mountpoint), "must be the name of a group, or a number"),
        (("-o", "timeout=abc", mountpoint), "'timeout=abc' must be a number of seconds"),
        (("-o", "tx_timeout=nan", mountpoint), "must be a number of seconds"),
        (("-o", "timeout=86400", mountpoint), "less than 86400"),
        (("-o", os.fsdecode(b"root=/\xff"), mountpoint), "is not a path that Xenstore accepts"),
        (("-o", "root=/a//b", mountpoint), "is not a path that Xenstore accepts"),
        (("-o", "domid=3", daemon.socket, mountpoint), "embedded"),
        (("--nonsense", mountpoint), "--nonsense"),
    ):
        refused(xsfs(*arguments), 2, word, "--help")


@pytest.mark.parametrize("arguments", [("--help",), ("--nonsense",), ("-f", "x", "/m")])
def test_what_mounts_nothing_loads_nothing(arguments: Sequence[str]) -> None:
    """Help and mistakes need not wait for trio and pyfuse3.  (mount -f only pretends.)"""
    name = "mount.xsfs" if "-f" in arguments else "xsfs"
    program = f"import sys; sys.argv[0] = {name!r}; from xsfs.cli.main import main\n"
    loaded = "[name for name in ('trio', 'pyfuse3') if name in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}try: main()\nfinally: print({loaded})", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.stdout.endswith("[]\n"), done.stderr


def test_help_and_version() -> None:
    from xsfs import __version__
    from xsfs.cli.options import OPTIONS

    helped = xsfs("--help")
    assert helped.returncode == 0
    for name in OPTIONS:
        assert f"\n  {name}" in helped.stdout
    assert max(map(len, helped.stdout.splitlines())) <= 80
    assert helped.stdout.partition("\nexamples:\n")[2].count("\n  xsfs ") >= 1
    assert xsfs("--version").stdout == f"xsfs {__version__}\n"


def test_no_xenstore(tmp_path: Path, mountpoint: Path) -> None:
    nowhere = {"XENSTORED_RUNDIR": str(tmp_path / "none"), "XENSTORED_PATH": ""}
    if not os.path.exists("/dev/xen/xenbus"):
        refused(xsfs(mountpoint, **nowhere), 3, "no Xenstore found", "embedded")
    gone = tmp_path / "gone.sock"
    refused(xsfs(gone, mountpoint), 3, f"cannot connect to Xenstore at {gone}: No such file")
    (tmp_path / "file").write_text("")
    refused(xsfs(tmp_path / "file", mountpoint), 3, "neither a socket nor a device")


def test_a_socket_s_path_may_be_too_long_for_the_kernel(
    tmp_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.chdir(deep)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        refused(xsfs(deep / "socket", mountpoint), 3, f"{deep}/socket: AF_UNIX path too long")
    listen = f"listen={deep}/new"
    refused(xsfs("-o", listen, "embedded", mountpoint), 3, f"{deep}/new: AF_UNIX path too long")


def test_a_daemon_that_has_gone(mountpoint: Path) -> None:
    with RealXenstored("C") as daemon:
        daemon.kill()
        # xsfs does not wait for it.
        attempt = xsfs("-o", f"timeout={10 * LIMIT}", daemon.socket, mountpoint)
        refused(attempt, 3, f"at {daemon.socket}: Connection refused")


def test_a_daemon_that_does_not_answer(mountpoint: Path) -> None:
    with RealXenstored("C") as daemon:
        daemon.pause()
        refused(xsfs("-o", "timeout=1", daemon.socket, mountpoint), 3, "did not answer")
        daemon.resume()


def test_ctrl_c_before_the_mount(tmp_path: Path, mountpoint: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "socket"))
        silent.listen()
        silent.settimeout(LIMIT)
        with subprocess.Popen(
            [sys.executable, "-m", "xsfs", tmp_path / "socket", mountpoint],
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            connection, _ = silent.accept()
            with connection:
                os.killpg(running.pid, signal.SIGINT)
                _, said = running.communicate(timeout=LIMIT)
    assert said == "xsfs: ending: SIGINT\nxsfs: interrupted before the mount (try again)\n"
    assert running.returncode == 8


def test_no_right_to_connect(daemon: RealXenstored, mountpoint: Path) -> None:
    # Root without CAP_DAC_OVERRIDE, and a socket of another user.
    os.chown(daemon.socket, 99, 99)
    try:
        done = subprocess.run(
            [
                *("setpriv", "--bounding-set=-dac_override,-dac_read_search"),
                *(sys.executable, "-m", "xsfs", daemon.socket, str(mountpoint)),
            ],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    finally:
        os.chown(daemon.socket, 0, 0)
    refused(done, 4, f"permission denied: {daemon.socket} (", "run as root")


def test_wrong_mountpoints(daemon: RealXenstored, tmp_path: Path, mountpoint: Path) -> None:
    refused(xsfs(daemon.socket, tmp_path / "missing"), 5, "does not exist", "mkdir")
    (tmp_path / "file").write_text("")
    refused(xsfs(daemon.socket, tmp_path / "file"), 5, "not a directory")


@pytest.mark.parametrize("path", ["/", "/proc", "/proc/self/net", "/sys", "/sys/fs", "/dev"])
def test_a_mount_never_hides_what_every_program_needs(
    daemon: RealXenstored, tmp_path: Path, path: str
) -> None:
    """In a mount namespace of its own: should xsfs mount after all, nobody else sees it."""
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in (path, str(link)):
        command = [sys.executable, "-m", "xsfs", daemon.socket, name]
        done = subprocess.run(
            ["unshare", "--mount", "--propagation=private", *command],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        refused(done, 5, f"the mountpoint {name} belongs to the system", "/mnt/xenstore")


def test_mounting_twice(daemon: RealXenstored, mountpoint: Path) -> None:
    with mounted([daemon.socket], mountpoint) as mount:
        refused(xsfs(daemon.socket, mountpoint), 5, "already an xsfs mount (umount it first)")
        assert mount.bash("cat name") == "Domain-0\n"


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can reach.  Each pytest that starts closes the parent of `tmp_path`."""
    with tempfile.TemporaryDirectory(prefix="xsfs-test-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@pytest.fixture
def as_nobody(public: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs xsfs with the embedded store as a user without rights, from a copy of the sources that this
    user can read."""
    sources = public / "sources"
    shutil.copytree(PACKAGE, sources / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    sources.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}

    def run(mountpoint: Path, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
                *(sys.executable, "-m", "xsfs", *options, "embedded", str(mountpoint)),
            ],
            cwd=sources,
            env={**environment, "PYTHONPATH": str(sources)},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    return run


def test_mountpoints_of_others(
    as_nobody: Callable[..., subprocess.CompletedProcess[str]], public: Path
) -> None:
    """fusermount3 would refuse them, too, but not say what to do."""
    place = public / "place"
    place.mkdir(0o755)
    refused(as_nobody(place), 5, f"no write access to the mountpoint {place}", "that you may write")
    place.chmod(0o1777)
    refused(as_nobody(place), 5, "sticky and belongs to another user", "that you own")


def test_a_mount_of_another_user(
    as_nobody: Callable[..., subprocess.CompletedProcess[str]], public: Path
) -> None:
    place = public / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    try:
        assert as_nobody(place).returncode == 0
        refused(xsfs("embedded", place), 5, "Permission denied", f"umount {place} first")
    finally:
        subprocess.run(["umount", place], check=False, timeout=LIMIT)


def test_a_mirror_without_a_default_directory(
    as_nobody: Callable[..., subprocess.CompletedProcess[str]], public: Path
) -> None:
    place = public / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    refused(as_nobody(place, "-o", "mirror"), 7, "XDG_RUNTIME_DIR is not set (use mirror=DIR)")
    assert not os.path.ismount(place)


def test_allow_other_has_to_be_allowed(
    as_nobody: Callable[..., subprocess.CompletedProcess[str]], public: Path
) -> None:
    place = public / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    assert "\nuser_allow_other" not in Path("/etc/fuse.conf").read_text()
    refused(as_nobody(place, "-o", "allow_other"), 6, "add user_allow_other to /etc/fuse.conf")
