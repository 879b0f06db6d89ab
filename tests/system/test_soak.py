"""Ring: two minutes of everything at once.  The long run is `python3 -m tests.support.soak`."""

from __future__ import annotations

import pytest

from tests.support.soak import soak


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_minute(kind: str) -> None:
    run = soak(kind, 1.0)
    print(run.report())
    assert not run.failures, run.report()
    # Each did its work, in spite of what it met.
    for worker in ("counter", "appender", "writer", "locker", "reader", "watcher"):
        assert run.done[worker] >= 10, run.report()
    assert run.restarts + run.stops >= 2
    assert run.done["checks of what was counted"] >= 3
