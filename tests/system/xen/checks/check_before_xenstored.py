"""In dom0, before there is a xenstored: the kernel's device takes requests, and nobody answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.system.xen.checks.machine import DEVICE, LIMIT


def test_no_socket_no_answer(tmp_path: Path) -> None:
    """The device is there, so it is what xsfs finds; it says in time that nothing answers."""
    done = subprocess.run(
        [sys.executable, "-m", "xsfs", "-o", "timeout=2", tmp_path],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "xenstored" in done.stderr


def test_only_root_may() -> None:
    assert os.stat(DEVICE).st_mode & 0o777 == 0o600
