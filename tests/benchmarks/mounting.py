"""File systems in processes of their own, unmounted and ended whatever happens.

They stay in the foreground, so that their process is known, and get a session of their own, so that
Ctrl-C reaches only the benchmark, which ends them in order.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import BenchmarkError

PROJECT: Final = Path(__file__).parents[2]

UNMOUNT: Final = {"umount": "mount"} if os.getuid() == 0 else {"fusermount3": "fuse3"}
"""The program that unmounts, and Debian's package of it."""

UNMOUNT_LAZILY: Final = ["umount", "-l"] if os.getuid() == 0 else ["fusermount3", "-uz"]

MOUNT_SECONDS: Final = 30.0
END_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Mount:
    path: str
    pid: int

    def resident(self) -> int:
        """Bytes of memory which the process has in RAM."""
        with open(f"/proc/{self.pid}/status") as lines:
            for line in lines:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        raise BenchmarkError(f"the file system at {self.path} has ended")


def compiled() -> dict[str, str]:
    """An environment in which Python keeps what it has compiled, as where xsfs is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def xsfs(
    socket: str, *options: str, project: Path = PROJECT
) -> contextlib.AbstractContextManager[Mount]:
    """The whole of a store, from / on, unless the options say otherwise.

    project     the checkout whose xsfs is mounted
    """
    return mounted("xsfs", ["-f", "-o", ",".join(("root=/", *options)), socket], project)


def bare(content: str, *store: str) -> contextlib.AbstractContextManager[Mount]:
    """A file system with a single file, found under any name.  `store`: the socket that each lookup
    asks, and for which node; none if it is not to ask."""
    return mounted(f"{__package__}.bare", [content, *store])


def bare_tree(socket: str, top: str) -> contextlib.AbstractContextManager[Mount]:
    """All names below a node of the store, each asked for and none believed."""
    return mounted(f"{__package__}.bare_tree", [socket, top])


@contextlib.contextmanager
def mounted(module: str, arguments: Sequence[str], project: Path = PROJECT) -> Iterator[Mount]:
    """Run a Python module which mounts a file system at the path that is its last argument."""
    # An empty directory: removing it fails where a mount is left, instead of emptying what is in it.
    path = tempfile.mkdtemp(prefix=f"{module.rpartition('.')[2]}-")
    try:
        with subprocess.Popen(
            [sys.executable, "-m", module, *arguments, path],
            cwd=project,
            env=compiled() | {"PYTHONPATH": str(project)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                _await(process, module, path)
                yield Mount(path, process.pid)
            finally:
                _end(process, path)
    finally:
        os.rmdir(path)


def _await(process: subprocess.Popen[bytes], module: str, path: str) -> None:
    deadline = time.monotonic() + MOUNT_SECONDS
    while not os.path.ismount(path):
        if process.poll() is not None:
            raise BenchmarkError(f"{module} could not mount, exit status {process.returncode}")
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{module} has not mounted within {MOUNT_SECONDS:g} s")
        time.sleep(0.001)


def _end(process: subprocess.Popen[bytes], path: str) -> None:
    """Unmount, upon which the process ends; if not, end it first."""
    if _unmount(path):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()
        _unmount(path)


def _unmount(path: str) -> bool:
    """Lazily, as a program that was interrupted may still have something open."""
    command = [*UNMOUNT_LAZILY, path]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
