"""The domain in which the checks run."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

DEVICE: Final = "/dev/xen/xenbus"
SOCKET: Final = "/var/run/xenstored/socket"
SHARE: Final = Path("/lab/share")
MACHINE: Final = SHARE / "tests/system/xen/machine"
CAPABILITIES: Final = Path("/proc/xen/capabilities")

LIMIT: Final = 300.0
"""Seconds that anything here may take.  All is emulated, perhaps on a loaded machine."""

IN_DOM0: Final = CAPABILITIES.exists() and "control_d" in CAPABILITIES.read_text()

SETTINGS: Final = dict(line.split("=", 1) for line in (SHARE / "run.conf").read_text().splitlines())
DAEMON: Final = SETTINGS["DAEMON"]


class Witness:
    """The tools of Xen, over this domain's default way or another one."""

    def __init__(self, source: str | None = None) -> None:
        self.environment = {**os.environ, **({"XENSTORED_PATH": source} if source else {})}

    def run(self, command: str, *arguments: str) -> str:
        done = subprocess.run(
            [f"xenstore-{command}", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, f"xenstore-{command} {arguments}: {done.stderr}"
        return done.stdout

    def read(self, path: str) -> str:
        return self.run("read", path).removesuffix("\n")

    def write(self, *paths_and_values: str) -> None:
        self.run("write", *paths_and_values)

    def remove(self, path: str) -> None:
        self.run("rm", path)


def shell(script: str, limit: float = LIMIT) -> str:
    """What bash prints; it must succeed."""
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=limit, check=False
    )
    assert done.returncode == 0, f"{script!r}: {done.stderr}{done.stdout}"
    return done.stdout


def until_text(path: Path, expected: str) -> None:
    """Wait until a file's text is this one."""
    deadline = time.monotonic() + LIMIT
    while (text := path.read_text()) != expected:
        assert time.monotonic() < deadline, f"{path} is {text!r}, not {expected!r}"
        time.sleep(0.05)


def until(condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.1)
