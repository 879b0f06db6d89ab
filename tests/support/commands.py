"""The command `xsfs` as a user starts it, for tests of what it says, and of the process behind it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

from tests.support.mounting import LIMIT


def xsfs(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xsfs", *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """It failed with this status, and one clear line that has these words."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("xsfs: ")
    for word in words:
        assert word in done.stderr


def process_at(mountpoint: Path) -> int:
    """The process that serves a mount made in the background."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"xsfs" in words and bytes(mountpoint) in words:
                return int(entry.name)
    raise AssertionError("no such process")


def wait_for_end(process: int) -> None:
    """It is no child of ours, and may be nobody's who would bury it: a zombie has ended, too."""
    deadline = time.monotonic() + LIMIT
    pidfd = os.pidfd_open(process)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll((deadline - time.monotonic()) * 1000), "xsfs goes on"
    finally:
        os.close(pidfd)


def let_others_reach(path: Path) -> None:
    """pytest's temporary directories are closed to other users."""
    for parent in path.parents:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
