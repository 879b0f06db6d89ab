"""The figures as a table, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from .timing import Result

HEADINGS: Final = ("work", "against", "ours", "theirs", "ratio", "target", "")
LEFT: Final = 2
"""So many columns are words."""


@dataclass(frozen=True)
class Circumstances:
    """What the figures depend on."""

    kind: str
    nodes: int
    read: int
    """How many of them the programs visit that visit all."""
    quarter_nodes: int
    rounds: int
    cpus: int
    load: float
    """At the beginning: with more than a little, the figures are noisy."""


@dataclass(frozen=True)
class Memory:
    """Bytes resident of processes which serve a file system."""

    bare: int
    mounted: int
    """xsfs, before anything was looked at."""
    visited: int
    """At the end, after find has been everywhere."""
    finished: int
    """After all rounds."""
    mirror: int
    """xsfs with a mirror of everything, after all rounds."""


def lines(circumstances: Circumstances, results: Sequence[Result], memory: Memory) -> Iterable[str]:
    it = circumstances
    part = "" if it.read == it.nodes else f", {it.read} of them read"
    yield f"{it.kind} daemon, {it.nodes} nodes{part} ({it.quarter_nodes} in the smaller store)"
    yield f"medians of {it.rounds} rounds, {it.cpus} CPUs, load {it.load:.1f} at the start"
    yield ""
    yield from table([HEADINGS, *map(_row, results)], words=LEFT)
    yield ""
    yield "resident memory"
    yield f"  bare pyfuse3, mounted           {mebibytes(memory.bare)}"
    yield f"  xsfs, just mounted              {mebibytes(memory.mounted)}"
    yield f"  xsfs, after all rounds          {mebibytes(memory.finished)}"
    yield f"  xsfs, all nodes visited         {mebibytes(memory.visited)}"
    yield f"  xsfs, all nodes mirrored        {mebibytes(memory.mirror)}"


def document(
    circumstances: Circumstances, results: Sequence[Result], memory: Memory
) -> Mapping[str, Any]:
    """The same for programs: seconds and bytes, and each round's time."""
    return {
        **asdict(circumstances),
        "results": [
            {
                "work": result.comparison.work,
                "ours": result.comparison.ours.name,
                "against": result.comparison.theirs.name,
                "each": result.comparison.each,
                "ours_median": statistics.median(result.ours),
                "theirs_median": statistics.median(result.theirs),
                "ratio": result.ratio,
                "target": result.comparison.target,
                "ok": result.ok,
                "ours_rounds": result.ours,
                "theirs_rounds": result.theirs,
            }
            for result in results
        ],
        "memory": asdict(memory),
    }


def _row(result: Result) -> tuple[str, ...]:
    target = result.comparison.target
    return (
        result.comparison.work,
        result.comparison.theirs.name,
        duration(statistics.median(result.ours)),
        duration(statistics.median(result.theirs)),
        f"{result.ratio:.3g}",
        "" if target is None else f"{target:g}",
        "" if target is None else "ok" if result.ok else "over",
    )


def table(rows: Sequence[Sequence[str]], *, words: int) -> Iterable[str]:
    """`words`: how many columns are words, and so aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def duration(seconds: float) -> str:
    """To three digits."""
    for unit, units in ("µs", 1e6), ("ms", 1e3):
        if seconds * units < 999.5:
            return f"{seconds * units:.3g} {unit}"
    return f"{seconds:.3g} s"


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):6.1f} MiB"
