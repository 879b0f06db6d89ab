"""In dom0, before there is a xenstored: the kernel's device takes requests, and nobody answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.mounting import mounted
from tests.system.xen.checks.machine import DEVICE, LIMIT

XSFS = (sys.executable, "-m", "xsfs")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*XSFS, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_no_socket_no_answer(tmp_path: Path) -> None:
    """The device is there, so it is what xsfs finds; it says in time that nothing answers."""
    done = run("-o", "timeout=2", str(tmp_path))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "xenstored" in done.stderr


def test_only_root_may(tmp_path: Path) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *XSFS, "-f", DEVICE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode in (4, 5, 6), done.stderr
    assert done.stderr.count("\n") == 1


def test_the_embedded_store_needs_none(tmp_path: Path) -> None:
    with mounted(["embedded"], tmp_path / "m") as mount:
        assert mount.bash("cat name") == "Domain-0\n"
