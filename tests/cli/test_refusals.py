"""Ring: the command as a user starts it, where it mounts nothing: refusals, and help."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.commands import refused, xsfs
from tests.support.mounting import LIMIT, mounted
from tests.support.xenstored.harness import RealXenstored


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C") as daemon:
        daemon.populate()
        yield daemon


def test_usage(daemon: RealXenstored, mountpoint: Path) -> None:
    for arguments, word in (
        ((), "required"),
        (("a", "b", "c"), "too many"),
        (("-o", "nonsense", mountpoint), "nonsense"),
        (("-o", "umask=9", mountpoint), "umask"),
        (("-o", "root=relative", mountpoint), "root"),
        (("-o", "root", mountpoint), "root=PATH"),
        (("-o", "ro=1", mountpoint), "takes no value"),
        (("-o", "timeout=0", mountpoint), "timeout"),
        (("-o", "uid=1_0", mountpoint), "number"),
        (("-o", "uid=4294967295", mountpoint), "number"),
        (("-o", "domid=3", daemon.socket, mountpoint), "embedded"),
        (("--nonsense", mountpoint), "--nonsense"),
    ):
        refused(xsfs(*arguments), 2, word, "--help")


@pytest.mark.parametrize("arguments", [("--help",), ("--nonsense",), ("-f", "x", "/m")])
def test_what_mounts_nothing_loads_nothing(arguments: Sequence[str]) -> None:
    """Nobody waits for trio and pyfuse3 who asks for help.  (mount -f only pretends.)"""
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
    assert xsfs("--version").stdout == f"xsfs {__version__}\n"


def test_no_xenstore(tmp_path: Path, mountpoint: Path) -> None:
    nowhere = {"XENSTORED_RUNDIR": str(tmp_path / "none"), "XENSTORED_PATH": ""}
    if not os.path.exists("/dev/xen/xenbus"):
        refused(xsfs(mountpoint, **nowhere), 3, "no Xenstore found", "embedded")
    gone = tmp_path / "gone.sock"
    refused(xsfs(gone, mountpoint), 3, f"cannot connect to Xenstore at {gone}: No such file")
    (tmp_path / "file").write_text("")
    refused(xsfs(tmp_path / "file", mountpoint), 3, "neither a socket nor a device")


def test_a_daemon_that_has_gone(mountpoint: Path) -> None:
    with RealXenstored("C") as daemon:
        daemon.kill()
        start = time.monotonic()
        refused(xsfs(daemon.socket, mountpoint), 3, f"at {daemon.socket}: Connection refused")
        assert time.monotonic() - start < 5  # it is not waited for


def test_a_daemon_that_does_not_answer(mountpoint: Path) -> None:
    with RealXenstored("C") as daemon:
        daemon.pause()
        refused(xsfs("-o", "timeout=1", daemon.socket, mountpoint), 3, "did not answer")
        daemon.resume()


def test_no_right_to_connect(daemon: RealXenstored, mountpoint: Path) -> None:
    # Root may connect to everything by CAP_DAC_OVERRIDE: without it, and for another's socket.
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
    refused(done, 4, "no right", "root")


def test_wrong_mountpoints(daemon: RealXenstored, tmp_path: Path, mountpoint: Path) -> None:
    refused(xsfs(daemon.socket, tmp_path / "missing"), 5, "does not exist", "mkdir")
    (tmp_path / "file").write_text("")
    refused(xsfs(daemon.socket, tmp_path / "file"), 5, "not a directory")


def test_mounting_twice(daemon: RealXenstored, mountpoint: Path) -> None:
    with mounted([daemon.socket], mountpoint) as mount:
        refused(xsfs(daemon.socket, mountpoint), 5, "busy", "umount")
        assert mount.bash("cat name") == "Domain-0\n"
