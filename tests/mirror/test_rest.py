"""How long the mirror rests after its work, by a clock that jumps: no store, no files."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock
from xsfs.mirror.pace import REST_SECONDS, SPARE_SECONDS, Pace


def rested(owed: float, spare: float, busy: float) -> tuple[float, float]:
    """How many seconds it rests, and what it may do without from then on.

    busy    for how many seconds from the start on events come, all the time
    """
    pace = Pace()
    pace.owed, pace.spare = owed, spare

    async def events() -> None:
        end = trio.current_time() + busy
        while trio.current_time() < end:
            pace.told = True
            await trio.sleep(REST_SECONDS / 10)

    async def run() -> tuple[float, float]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(events)
            start = trio.current_time()
            await pace.rest()
            taken = trio.current_time() - start
            nursery.cancel_scope.cancel()
        assert pace.owed == 0.0
        return taken, pace.spare

    return trio.run(run, clock=MockClock(autojump_threshold=0))


def near(seconds: float) -> object:
    return pytest.approx(seconds, abs=REST_SECONDS / 5)


def test_while_events_come_it_rests_as_long_as_it_worked() -> None:
    for owed in (0.003, 0.05, 0.4):
        assert rested(owed, SPARE_SECONDS, 9.0) == (near(owed), SPARE_SECONDS)
        assert rested(owed, 0.0, 9.0) == (near(owed), near(min(owed, SPARE_SECONDS)))


def test_once_none_come_it_goes_on() -> None:
    assert rested(0.05, SPARE_SECONDS, 0.0) == (0.0, near(SPARE_SECONDS - 0.05))


def test_it_looks_soon_whether_more_have_come() -> None:
    taken, _ = rested(0.08, SPARE_SECONDS, 0.02)
    assert 0.02 <= taken <= 0.02 + 2 * REST_SECONDS


def test_what_it_does_without_a_rest_is_earned() -> None:
    taken, left = rested(0.1, 0.0, 0.0)
    assert 0.05 <= taken <= 0.05 + 1.2 * REST_SECONDS
    assert left == near(2 * taken - 0.1)
    taken, left = rested(1.0, SPARE_SECONDS, 0.0)
    owed = 1.0 - SPARE_SECONDS
    assert owed <= taken <= owed + 1.2 * REST_SECONDS
    assert left == near(taken - owed)
