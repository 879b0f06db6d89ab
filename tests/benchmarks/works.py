"""What is measured, against what, and how fast it should be."""

from __future__ import annotations

import itertools
import os
import select
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .errors import BenchmarkError
from .mounting import Mount
from .stores import NAME, NAME_VALUE, SCRATCH, Store
from .timing import Comparison, Contender

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

LOOP: Final = 200
"""Values that a script reads or writes in one run."""

NOWHERE: Final = "a string that is nowhere"

PROGRAM_SECONDS: Final = 600.0
"""When a program is taken for hung."""


@dataclass(frozen=True)
class Stage:
    """All that there is to be measured."""

    whole: Store
    quarter: Store
    """A store with a quarter of the nodes, for what a node costs in it."""
    bare: Mount
    """Its file has the same content as that of NAME in xsfs."""
    pyxs: Any
    """A connected pyxs.Client of the whole store."""


def comparisons(stage: Stage) -> list[Comparison]:
    return [*one_value(stage), *scripts(stage.whole), *trees(stage.whole, stage.quarter)]


def one_value(stage: Stage) -> list[Comparison]:
    """A program that reads one value, and has everything open that it needs for it.

    pyxs is what such a program uses instead; the bare file system is what no file system on pyfuse3
    can do better, so bare against pyxs is the part of the ratio which is not xsfs's.
    """
    line = f"{NAME_VALUE}\n".encode()
    node, path = NAME.encode(), stage.whole.file(NAME)
    bare_path = os.path.join(stage.bare.path, "value")
    ours = _batch("xsfs", lambda: _open_read_close(path), line)
    pyxs = _batch("pyxs", lambda: stage.pyxs.read(node), NAME_VALUE.encode())
    bare = _batch("bare pyfuse3", lambda: _open_read_close(bare_path), line)
    return [
        Comparison("open, read, close a value", ours, pyxs, 3.0, each=True),
        Comparison("open, read, close a value", ours, bare, each=True),
        Comparison("the same of bare pyfuse3", bare, pyxs, each=True),
    ]


def scripts(store: Store) -> list[Comparison]:
    """A shell script, such as a hotplug script: the shell's own `echo` and `read` on a file against
    a process for each value.  Both sides contain the start of one bash."""
    times = f"for i in {{1..{LOOP}}}; do"
    ours, theirs = store.file(SCRATCH), SCRATCH
    echo = _bash(store, "echo > FILE", f'{times} echo $i > "$1"; done', ours)
    write = _bash(store, "xenstore-write", f'{times} xenstore-write "$1" $i; done', theirs)
    # What was read last proves that something was: each run writes the same values.
    read = _bash(store, "read < FILE", f'{times} read -r x < "$1"; done; [[ $x == {LOOP} ]]', ours)
    tool = _bash(store, "xenstore-read", f'{times} xenstore-read "$1"; done', theirs)
    return [
        Comparison(f"{LOOP} times echo > FILE in bash", echo, write, 0.4),
        Comparison(f"{LOOP} times read < FILE in bash", read, tool, 0.25),
    ]


def trees(whole: Store, quarter: Store) -> list[Comparison]:
    """Somebody who looks through the whole store: for a name, or for a value.

    `xenstore-ls -f` prints names and values both, so it stands against either.  A node must not
    cost more because there are more of them, hence the same by the node in the smaller store.
    """
    find, find_quarter = (_find(store) for store in (whole, quarter))
    grep, grep_quarter = (_grep(store) for store in (whole, quarter))
    listing = _program(whole, "xenstore-ls -f", ["xenstore-ls", "-f"])
    return [
        Comparison(f"find in {whole.nodes} nodes", find, listing, 0.5),
        Comparison(f"grep -r in {whole.nodes} nodes", grep, listing, 2.5),
        Comparison("find, by the node", find, find_quarter, 1.2, each=True),
        Comparison("grep -r, by the node", grep, grep_quarter, 1.2, each=True),
    ]


# ---------------------------------------------------------------------------- kinds of contenders


def _open_read_close(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _batch(name: str, call: Callable[[], bytes], expected: bytes) -> Contender:
    """Something within this process."""
    got = call()
    if got != expected:
        raise BenchmarkError(f"{name} has read {got!r} instead of {expected!r}")

    def run() -> None:
        for _ in itertools.repeat(None, BATCH):
            call()

    return Contender(name, run, BATCH)


def _bash(store: Store, name: str, script: str, argument: str) -> Contender:
    command = ["bash", "-e", "-c", script, "bash", argument]
    return Contender(name, lambda: _run(command, store.environment), LOOP)


def _find(store: Store) -> Contender:
    return _program(store, f"find in {store.nodes}", ["find", store.mount.path])


def _grep(store: Store) -> Contender:
    command = ["grep", "-r", NOWHERE, store.mount.path]
    return _program(store, f"grep -r in {store.nodes}", command, status=1)


def _program(store: Store, name: str, command: Sequence[str], status: int = 0) -> Contender:
    """A program that visits all nodes of a store."""
    return Contender(name, lambda: _run(command, store.environment, status), store.nodes)


def _run(command: Sequence[str], environment: Mapping[str, str], status: int = 0) -> None:
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
