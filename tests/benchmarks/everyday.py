"""Five everyday jobs, by the Xenstore tools, by xsfs, and by its mirror.

    python3 -m tests.benchmarks.everyday

Measures them with both daemons, which takes some three minutes, and writes the picture, the table of
docs/performance.md and the sentence of the README.  Each job is what a user types; processes that it starts
count.  Exits with 1 if something could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.xenstored.harness import MissingProgramError, XsClient

from . import chart, mirror_works, watches
from .chart import Bar, Panel
from .errors import BenchmarkError
from .kinds import bash, execute
from .mounting import PROJECT, xsfs
from .progress import progress
from .report import duration, mebibytes
from .stores import DOMAINS_MIN, SCRATCH, Store, domains_for, store
from .timing import Contender, run_rounds

DOCUMENT: Final = PROJECT / "docs" / "performance.md"
PICTURE: Final = PROJECT / "docs" / "performance.svg"
README: Final = PROJECT / "README.md"

DAEMONS: Final = {"C": "C xenstored", "ocaml": "oxenstored"}
GUEST: Final = "/local/domain/2"

PROCESSES: Final = 200
"""How often in a run a script starts a program."""
LINES: Final = 2000
"""How often in a run a script reads or writes a file."""
CHANGES: Final = 200

TITLES: Final = (
    "read a value in a script",
    "write a value in a script",
    "wait for a change",
    "list a guest",
    "dump everything",
)
COMMANDS: Final = (
    ("xenstore-read P", "read x < P", "read x < P"),
    ("xenstore-write P 1", "echo 1 > P", ""),
    ("xenstore-watch P", "cat P/.watch", "inotify, then read"),
    ("xenstore-ls -f -p P", "cat P/.ls", "grep -r . P"),
    ("xenstore-ls -f -p", "cat .ls", "grep -r ."),
)
WAYS: Final = ("xenstore-*", "xsfs", "mirror of xsfs")


@dataclass(frozen=True)
class Measured:
    """What one daemon gave: for each job the seconds by each way, None where there is none."""

    nodes: int
    seconds: Sequence[Sequence[float | None]]
    memory: int
    """Bytes of the process, when everything has been dumped."""


def once(store: Store, name: str, *command: str) -> Contender:
    return Contender(name, lambda: execute(command, store.environment), 1)


def repeated(times: int, command: str) -> str:
    return f"for ((i = 0; i < {times}; i++)); do {command}; done"


def tools(store: Store, writer: XsClient) -> Sequence[Contender]:
    return (
        bash(store, "read", repeated(PROCESSES, 'xenstore-read "$1"'), SCRATCH, PROCESSES),
        bash(store, "write", repeated(PROCESSES, 'xenstore-write "$1" 1'), SCRATCH, PROCESSES),
        told("xenstore-watch", lambda: watches.theirs(store), writer),
        once(store, "list", "xenstore-ls", "-f", "-p", GUEST),
        once(store, "dump", "xenstore-ls", "-f", "-p"),
    )


def ours(store: Store, writer: XsClient) -> Sequence[Contender]:
    path = store.file(SCRATCH)
    return (
        bash(store, "read <", repeated(LINES, 'read -r x < "$1"'), path, LINES),
        bash(store, "echo >", repeated(LINES, 'echo 1 > "$1"'), path, LINES),
        told(".watch", lambda: watches.ours(store), writer),
        once(store, "cat GUEST/.ls", "cat", store.file(f"{GUEST}/.ls")),
        once(store, "cat .ls", "cat", store.file("/.ls")),
    )


def mirror(store: Store, copy: str) -> Sequence[Contender | None]:
    return (
        bash(store, "mirror", repeated(LINES, 'read -r x < "$1"'), copy + SCRATCH, LINES),
        None,
        mirror_works.changing(store, copy),
        once(store, "grep -r GUEST", "grep", "-r", ".", copy + GUEST),
        once(store, "grep -r", "grep", "-r", ".", copy),
    )


def told(
    name: str,
    start: Callable[[], contextlib.AbstractContextManager[watches.Reader]],
    writer: XsClient,
) -> Contender:
    """From a write until a reader that waits has its line."""

    def run() -> float:
        with start() as reader:
            return watches.median_latency(writer, reader, CHANGES) * CHANGES

    return Contender(name, run, CHANGES)


def measure(kind: str, nodes: int, rounds: int, progress: Callable[[str], None]) -> Measured:
    with (
        store(kind, max(DOMAINS_MIN, domains_for(nodes))) as whole,
        XsClient(whole.socket) as writer,
    ):
        writer.write(watches.TOP, b"")
        by_tools, by_mount = tools(whole, writer), ours(whole, writer)
        seconds = _medians([*by_tools, *by_mount], rounds, progress)
        memory = whole.mount.resident()
        # The mirror follows each change: it is not there while anything else is measured.
        with mirror_works.place() as copy, xsfs(whole.socket, f"root=/,mirror={copy}"):
            by_mirror = mirror(whole, copy)
            seconds |= _medians([it for it in by_mirror if it], rounds, progress)
        jobs = zip(by_tools, by_mount, by_mirror, strict=True)
        return Measured(
            whole.nodes,
            [[None if it is None else seconds[it] for it in job] for job in jobs],
            memory,
        )


def _medians(
    contenders: Sequence[Contender], rounds: int, progress: Callable[[str], None]
) -> dict[Contender, float]:
    """Seconds of a single read, write, change or dump."""
    for contender in contenders:
        contender.run()
    seconds = run_rounds(contenders, rounds, progress)
    return {it: statistics.median(seconds[it]) / it.items for it in contenders}


# ---------------------------------------------------------------------------------- the documents

_TABLE: Final = re.compile(
    r"(<!-- generated: table -->\n).*?(<!-- end of generated -->)", re.DOTALL
)
_SENTENCE: Final = re.compile(r"reads a\s+value\s+in\s+.*?\.(?= )", re.DOTALL)


def table(measured: Mapping[str, Measured], rounds: int) -> Iterator[str]:
    c = measured["C"]
    yield f"Medians of {rounds} rounds with {c.nodes:,} nodes, on {machine()}:"
    yield ""
    ways = [way for name in measured for way in (f"{DAEMONS[name]}: {WAYS[0]}", *WAYS[1:])]
    yield f"| job | {' | '.join(ways)} |"
    yield "| --- |" + " --- |" * len(ways)
    for number, title in enumerate(TITLES):
        times = [it for each in measured.values() for it in each.seconds[number]]
        yield f"| {title} | {' | '.join('' if it is None else duration(it) for it in times)} |"
    yield ""
    yield f"xsfs then takes {mebibytes(c.memory).strip()} of memory."


def sentence(measured: Measured) -> str:
    tool, mount, _ = measured.seconds[0]
    assert tool is not None
    assert mount is not None
    return f"reads a value in {duration(mount)}, where `xenstore-read` takes {duration(tool)}."


def machine() -> str:
    model = re.search("^model name\\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = model[1].replace("(R)", "") if model else platform.machine()
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} processors ({processor}), Linux {kernel}, Python {platform.python_version()}"


def picture(measured: Measured) -> str:
    panels = []
    for title, commands, seconds in zip(TITLES, COMMANDS, measured.seconds, strict=True):
        labels = [commands[0], f"xsfs: {commands[1]}", f"mirror: {commands[2]}".rstrip(": ")]
        panels.append(Panel(title, [Bar(*bar) for bar in zip(labels, seconds, strict=True)]))
    return chart.draw(
        "Five everyday jobs",
        f"Shorter is faster. C xenstored with {measured.nodes:,} nodes",
        panels,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.benchmarks.everyday",
        description="Measure five everyday jobs, and write the figures into the documents.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=10_000, help="how many nodes, at least")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is run")
    parser.add_argument("--print", action="store_true", help="print the table, and write nothing")
    arguments = parser.parse_args()
    try:
        measured = {
            kind: measure(kind, arguments.nodes, arguments.rounds, progress) for kind in DAEMONS
        }
    except (BenchmarkError, MissingProgramError, OSError, subprocess.SubprocessError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    progress("")
    lines = "".join(f"{line}\n" for line in table(measured, arguments.rounds))
    print(lines, end="")
    if not arguments.print:
        PICTURE.write_text(picture(measured["C"]))
        for path, pattern, text in (
            (DOCUMENT, _TABLE, rf"\g<1>{lines}\g<2>"),
            (README, _SENTENCE, sentence(measured["C"])),
        ):
            new, count = pattern.subn(text, path.read_text())
            if count != 1:
                raise BenchmarkError(f"{path} has no place for the figures")
            path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
