"""Kinds of contenders: calls within this process, shell scripts, programs that visit all nodes."""

from __future__ import annotations

import itertools
import os
import select
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .errors import BenchmarkError
from .stores import Store
from .timing import Contender

PROGRAMS: Final = {
    "bash": "bash",
    "find": "findutils",
    "grep": "grep",
    "xenstore-ls": "xenstore-utils",
    "xenstore-read": "xenstore-utils",
    "xenstore-write": "xenstore-utils",
}
"""What is needed, and Debian's packages of it."""

BATCH: Final = 500
"""Calls in one run where a single one is too short to be measured."""

LONG_BATCH: Final = 20 * BATCH
"""The same of those that take a few microseconds: one that is interrupted must not count."""

NOWHERE: Final = "a string that is nowhere"

PROGRAM_SECONDS: Final = 600.0
"""When a program is taken for hung."""


def open_read_close(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def batch(name: str, call: Callable[[], bytes], expected: bytes, count: int = BATCH) -> Contender:
    """Something within this process."""
    got = call()
    if got != expected:
        raise BenchmarkError(f"{name} has read {got!r} instead of {expected!r}")

    def run() -> None:
        for _ in itertools.repeat(None, count):
            call()

    return Contender(name, run, count)


def bash(store: Store, name: str, script: str, argument: str, items: int) -> Contender:
    command = ["bash", "-e", "-c", script, "bash", argument]
    return Contender(name, lambda: execute(command, store.environment), items)


def find(store: Store, name: str, path: str) -> Contender:
    return program(store, name, ["find", path])


def names_below(top: str) -> set[str]:
    """The nodes that a walk finds, relative to `top`.  oxenstored lists domains' special nodes, too."""
    return {
        os.path.relpath(os.path.join(directory, name), top)
        for directory, directories, files in os.walk(top)
        for name in (*directories, *files)
        if name != ".value" and not name.startswith("@")
    }


def grep(store: Store, name: str, path: str) -> Contender:
    return program(store, name, ["grep", "-r", NOWHERE, path], status=1)


def listing(store: Store) -> Contender:
    return program(store, "xenstore-ls -f", ["xenstore-ls", "-f", store.top])


def program(store: Store, name: str, command: Sequence[str], status: int = 0) -> Contender:
    """A program that visits all nodes of a store that are to be read."""
    return Contender(name, lambda: execute(command, store.environment, status), store.read)


def execute(command: Sequence[str], environment: Mapping[str, str], status: int = 0) -> None:
    """Run a program to its end, and know of it at once: Popen.wait with a timeout would look only
    every 50 ms."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as program:
        ended = os.pidfd_open(program.pid)
        try:
            if not select.select([ended], [], [], PROGRAM_SECONDS)[0]:
                program.kill()
                raise BenchmarkError(f"no end after {PROGRAM_SECONDS:g} s: {' '.join(command)}")
        finally:
            os.close(ended)
    if program.returncode != status:
        raise BenchmarkError(f"exit status {program.returncode}: {' '.join(command)}")
