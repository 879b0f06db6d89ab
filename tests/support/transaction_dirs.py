"""What tests do with the directories of transactions."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.mounting import LIMIT, Mount
from tests.support.xenstored.harness import XsClient, XsError

SHELLS = ["bash", "dash"]

GUEST_OPEN_MAX = 11
"""How many transactions a guest may have open: ten, and one more is let in."""


def start(mount: Mount, name: str) -> Path:
    path = mount.path / ".transaction" / name
    path.mkdir()
    return path


def inside(tx: Path, box: Path) -> Path:
    """The box as the transaction sees it."""
    return tx / "data" / box.name


def control(tx: Path, word: str) -> None:
    """As `echo WORD > .control`."""
    # Not by a file object, which takes EAGAIN for a pipe that is full.
    file = os.open(tx / ".control", os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(file, word.encode() + b"\n")
    finally:
        os.close(file)


def shell(name: str, script: str, mount: Mount, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [name, "-c", script, name, *words],
        cwd=mount.path,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=LIMIT * 3,
        check=False,
    )


def until(condition: Callable[[], bool]) -> None:
    """Until it is so, which it must be in time."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline


def end_by(how: str, tx: Path) -> None:
    if how == "rmdir":
        tx.rmdir()
    else:
        control(tx, how)


def open_at_once(witness: XsClient) -> int:
    """How many transactions a guest can open now, by the daemon's own count."""
    opened = []
    try:
        while True:
            opened.append(witness.start())
    except XsError as error:
        full = error.name
    assert full in ("ENOSPC", "EQUOTA")
    for number in opened:
        witness.end(number, commit=False)
    return len(opened)
