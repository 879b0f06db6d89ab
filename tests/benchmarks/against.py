"""This version of xsfs against another one: `python3 -m tests.benchmarks --against DIR`.

DIR is a checkout of the other version.  Both are mounted on one store and take turns, so a ratio does not
depend on what else the machine does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from . import mirror_works
from .kinds import bash, batch, find, grep, open_read_close
from .mounting import xsfs
from .report import duration, table
from .stores import DOMAINS_MIN, NAME, SCRATCH, Store, domains_for, store
from .timing import Comparison, Contender, Result, measure, warm_up
from .works import ECHO, LINE, LOOP

BUSY_LOOPS: Final = 2


def compare(
    *,
    project: Path,
    kind: str,
    nodes: int,
    rounds: int,
    only: str | None,
    busy: bool,
    progress: Callable[[str], None],
) -> list[Result]:
    """Measure this version against the checkout at `project`."""
    with contextlib.ExitStack() as stack:
        progress(f"starting a {kind} daemon")
        ours = stack.enter_context(store(kind, max(DOMAINS_MIN, domains_for(nodes))))
        mount = stack.enter_context(xsfs(ours.socket, project=project))
        theirs = dataclasses.replace(ours, mount=mount, project=project)
        if busy:
            stack.enter_context(_busy_loops())
        chosen = [it for it in _comparisons(ours, theirs) if it.work.startswith(only or "")]
        progress("warming up")
        warm_up(chosen)
        return measure(chosen, rounds, progress)


@contextlib.contextmanager
def _busy_loops() -> Iterator[None]:
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(BUSY_LOOPS)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _comparisons(ours: Store, theirs: Store) -> Iterator[Comparison]:
    for a, b in zip(_contenders(ours), _contenders(theirs), strict=True):
        yield Comparison(a.name, a, b, each=True)


def _contenders(store: Store) -> Iterable[Contender]:
    value, scratch = store.file(NAME), store.file(SCRATCH)
    return (
        batch("open-read-close", lambda: open_read_close(value), LINE),
        find(store, "find", store.file(store.top)),
        grep(store, "grep -r", store.file(store.top)),
        bash(store, "echo", ECHO, scratch, LOOP),
        mirror_works.starting(store),
        mirror_works.changing_alone(store),
    )


def lines(results: Iterable[Result]) -> Iterable[str]:
    """A table: medians for one item (a file, a node, a change), and the median of the rounds' ratios."""
    rows: list[tuple[str, ...]] = [("work", "this", "other", "this/other")]
    for it in results:
        medians = (duration(statistics.median(times)) for times in (it.ours, it.theirs))
        rows.append((it.comparison.work, *medians, f"{it.ratio:.2f}"))
    return table(rows, words=1)
