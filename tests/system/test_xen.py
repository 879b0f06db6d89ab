"""xsfs on real Xen: the lab's checks, in dom0 and in a domU, with each daemon, and under systemd.

Each check's outcome is printed as it comes.  It takes some minutes, since all is emulated.  A single
configuration is chosen by `-k ocaml`, and single checks by `XSFS_TEST_XEN="-k conflict"`, the arguments for
the pytest in dom0.  See docs/dev/real-xen.md.
"""

from __future__ import annotations

import os
import shlex

import pytest

from tests.system.xen.lab import CONFIGURATIONS, build, printer, run

ARGUMENTS = shlex.split(os.environ.get("XSFS_TEST_XEN", ""))


@pytest.fixture(scope="module")
def image() -> None:
    """Raises LabError, with what is missing, where it cannot be made."""
    build()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("C", marks=pytest.mark.ci),
        pytest.param("ocaml", marks=pytest.mark.ci),
        "systemd",
    ],
)
def test_real_xen(name: str, image: None, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        outcome = run(CONFIGURATIONS[name], printer(name), ARGUMENTS)
        print(f"{name}: {outcome}", flush=True)
    assert outcome.good, f"{outcome}; what has failed is in the output above"
