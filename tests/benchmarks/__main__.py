"""`python3 -m tests.benchmarks`, from the root of the project: see --help.

`--against DIR` mounts the checkout at DIR, another version, and this one on one store, lets both take turns,
and prints medians and the ratios of the pairs; with `--busy` beside two busy loops.

Exits with 0 whatever the figures are, as they depend on what else the machine has to do; 1 means
that something could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from tests.support.xenstored.harness import DAEMONS, MissingProgramError

from . import against, kinds, mirror_works, works
from .errors import BenchmarkError
from .kinds import execute, names_below
from .libxenstore import reader
from .mounting import UNMOUNT, bare, bare_tree, xsfs
from .progress import progress
from .report import Circumstances, Memory, document, lines
from .stores import DOMAINS_MIN, NAME, NAME_VALUE, domains_for, store
from .timing import Comparison, Result, measure, warm_up

MODULES: Final = ("pyfuse3", "pyxs", "trio")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.benchmarks",
        description="Measure xsfs against pyxs, the Xenstore tools and a bare pyfuse3 file system.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--kind", choices=sorted(DAEMONS), default="C", help="the daemon to mount")
    add("--nodes", type=_positive, default=10_000, help="how many nodes it has, at least")
    add("--read", type=_positive, metavar="N", help="how many of them are read (default: all)")
    add("--rounds", type=_positive, default=7, help="how often everything is run")
    add("--only", metavar="PROGRAM", help="measure only this, as find, and whom it stands against")
    add("--against", metavar="DIR", type=Path, help="measure against the version in that checkout")
    add("--busy", action="store_true", help="with --against: beside two busy loops")
    add("--json", metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _check() -> None:
    for program, package in {**kinds.PROGRAMS, **UNMOUNT}.items():
        if not shutil.which(program):
            raise MissingProgramError(program, package)
    for module in MODULES:
        if not importlib.util.find_spec(module):
            raise BenchmarkError(f"there is no Python module {module}: pip install {module}")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise BenchmarkError("no right to use /dev/fuse, or it is missing")


@contextlib.contextmanager
def _pyxs(socket: str) -> Iterator[Any]:
    import pyxs  # only here: _check() has words for it where it is missing

    with pyxs.Client(unix_socket_path=socket) as client:
        yield client


def _see_the_same(stage: works.Stage) -> None:
    """A tree in which something is missing would be walked in no time."""
    whole = stage.whole
    ours = names_below(whole.file(whole.top))
    if names_below(stage.tree.path) != ours:
        raise BenchmarkError(f"other names at {stage.tree.path} than in xsfs")


def _run(
    kind: str, nodes: int, read: int | None, rounds: int, only: str | None
) -> tuple[Circumstances, list[Result], Memory]:
    domains = max(DOMAINS_MIN, domains_for(nodes))
    part = 0 if read is None else max(DOMAINS_MIN, domains_for(read))
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        progress(f"starting {kind} daemons")
        whole = enter(store(kind, domains - part, part))
        quarter = enter(store(kind, (part or domains) // 4))
        mounted = whole.mount.resident()
        directory = enter(tempfile.TemporaryDirectory(prefix="xsfs-tmpfs-", dir="/dev/shm"))
        # At the same depth as in the mirror: each directory on the way takes its time.
        value = directory + NAME
        os.makedirs(os.path.dirname(value))
        with open(value, "wb") as file:
            file.write(works.LINE)
        stage = works.Stage(
            whole,
            quarter,
            enter(bare(f"{NAME_VALUE}\n")),
            enter(bare(f"{NAME_VALUE}\n", whole.socket, NAME)),
            enter(bare_tree(whole.socket, whole.top)),
            value,
            enter(_pyxs(whole.socket)),
            enter(reader(NAME, works.LINE, whole.environment)),
        )
        _see_the_same(stage)
        results = _phase(works.comparisons(stage), rounds, only)
        finished = whole.mount.resident()
        progress("visiting all nodes")
        execute(["find", whole.mount.path], whole.environment)
        visited = whole.mount.resident()
        # The mirror follows each change: it is not there while anything else is measured.
        copy = enter(mirror_works.place())
        mirror = enter(xsfs(whole.socket, f"mirror={copy}"))
        results += _phase(mirror_works.comparisons(stage, copy), rounds, only)
        memory = Memory(stage.bare.resident(), mounted, visited, finished, mirror.resident())
        progress("")
    cpus = os.cpu_count() or 1
    circumstances = Circumstances(kind, whole.nodes, whole.read, quarter.nodes, rounds, cpus, load)
    return circumstances, results, memory


def _phase(comparisons: list[Comparison], rounds: int, only: str | None) -> list[Result]:
    comparisons = [it for it in comparisons if it.ours.name.startswith(only or "")]
    progress("warming up")
    warm_up(comparisons)
    return measure(comparisons, rounds, progress)


def _terminated(number: int, _: object) -> NoReturn:
    """An exception, so that everything is unmounted and ended."""
    sys.exit(128 + number)


def main() -> int:
    arguments = _arguments()
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, _terminated)
    try:
        _check()
        if arguments.against is not None:
            results = against.compare(
                project=arguments.against.resolve(),
                kind=arguments.kind,
                nodes=arguments.nodes,
                rounds=arguments.rounds,
                only=arguments.only,
                busy=arguments.busy,
                progress=progress,
            )
            progress("")
            for line in against.lines(results):
                print(line)
            return 0
        figures = _run(
            *(arguments.kind, arguments.nodes, arguments.read), arguments.rounds, arguments.only
        )
        if not figures[1]:
            raise BenchmarkError(f"nothing is measured that begins with {arguments.only}")
        for line in lines(*figures):
            print(line)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(document(*figures), file, indent=2)
                file.write("\n")
    except (BenchmarkError, MissingProgramError, OSError, subprocess.SubprocessError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
