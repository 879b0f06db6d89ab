"""Ring: two minutes of everything at once.  The long run is `python3 -m tests.support.soak`.

XSFS_SOAK_MINUTES says how long the run over ssh takes.
"""

from __future__ import annotations

import os

import pytest

from tests.support.soak import Soak, soak


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_minute(kind: str) -> None:
    check(soak(kind, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_another_host(kind: str) -> None:
    run = soak(kind, float(os.environ.get("XSFS_SOAK_MINUTES", "3")), ssh=True)
    check(run)
    assert run.done["checks of the mirror"] >= 3
    assert not [name for name in os.listdir("/run/xsfs") if name.startswith(".xsfs-ssh-")]


def check(run: Soak) -> None:
    print(run.report())
    assert not run.failures, run.report()
    # Each did its work, in spite of what it met.
    for worker in ("counter", "appender", "writer", "locker", "reader", "watcher"):
        assert run.done[worker] >= 10, run.report()
    disturbances = sum(run.done[name] for name in run.done if name.startswith("disturbances"))
    assert run.restarts + run.stops + disturbances >= 2
    assert run.done["checks of what was counted"] >= 3
