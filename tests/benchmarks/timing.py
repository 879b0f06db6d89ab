"""Who is measured, how, and what came of it.

On a machine with other things to do, one measurement after another would compare different minutes.
So each round runs every contender, close to whom it is compared with and every other round in the
opposite order, and a ratio is the median of the rounds' ratios.  What takes milliseconds can fall into
another pace of the processor than what comes next: it is run several times in a round, and its median
counts.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

SHORT_SECONDS: Final = 0.05
SHORT_RUNS: Final = 5
"""How often in a round what takes less than that is run."""


@dataclass(frozen=True, eq=False)
class Contender:
    """Something that takes time."""

    name: str
    run: Callable[[], float | None]
    """Raises an exception where the work was not done, since a failure would be fast.  What it took
    in seconds, where that is less than all of the call."""
    items: int
    """How many times, or for how many nodes, one run does its work."""


@dataclass(frozen=True)
class Comparison:
    """One line of what is to be known."""

    work: str
    ours: Contender
    theirs: Contender
    target: float | None = None
    """What the ratio should not exceed, if anything is expected of it."""
    each: bool = False
    """Whether the time of a single item matters, rather than that of a run."""


@dataclass(frozen=True)
class Result:
    """A comparison's figures; times in seconds, of a run or of an item of it, one a round."""

    comparison: Comparison
    ours: Sequence[float] = field(repr=False)
    theirs: Sequence[float] = field(repr=False)

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def ok(self) -> bool | None:
        """None: no target."""
        target = self.comparison.target
        return None if target is None else self.ratio <= target


def contenders(comparisons: Sequence[Comparison]) -> list[Contender]:
    """Each once, in the order in which they come."""
    both = ((comparison.ours, comparison.theirs) for comparison in comparisons)
    return list(dict.fromkeys(itertools.chain.from_iterable(both)))


def warm_up(comparisons: Sequence[Comparison]) -> None:
    for contender in contenders(comparisons):
        contender.run()


def measure(
    comparisons: Sequence[Comparison], rounds: int, progress: Callable[[str], None]
) -> list[Result]:
    """Run all rounds; `progress` is told what is about to run."""
    seconds = run_rounds(contenders(comparisons), rounds, progress)

    def times(contender: Contender, each: bool) -> list[float]:
        divisor = contender.items if each else 1
        return [taken / divisor for taken in seconds[contender]]

    return [Result(it, times(it.ours, it.each), times(it.theirs, it.each)) for it in comparisons]


def run_rounds(
    contenders: Sequence[Contender], rounds: int, progress: Callable[[str], None]
) -> Mapping[Contender, list[float]]:
    """The seconds of a run of each contender, one for each round."""
    order = list(contenders)
    seconds: Mapping[Contender, list[float]] = {contender: [] for contender in order}
    for number in range(1, rounds + 1):
        for contender in order:
            progress(f"round {number} of {rounds}: {contender.name}")
            seconds[contender].append(_time_well(contender.run))
        order.reverse()
    return seconds


def _time_well(run: Callable[[], float | None]) -> float:
    taken = [_time(run)]
    while taken[0] < SHORT_SECONDS and len(taken) < SHORT_RUNS:
        taken.append(_time(run))
    return statistics.median(taken)


def _time(run: Callable[[], float | None]) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        taken = run()
        return time.perf_counter() - start if taken is None else taken
    finally:
        gc.enable()
