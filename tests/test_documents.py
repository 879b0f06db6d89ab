"""Ring: what the documents show, typed as it stands on a host of its own (tests/documents.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.documents import check_session, matches
from tests.host import Host, open_host
from tests.xenstored.harness import RealXenstored

MOUNTED = "xsfs /mnt/xenstore"


@pytest.fixture
def dom0() -> Iterator[Host]:
    """A dom0 with two guests, all fresh."""
    with RealXenstored("C", guests=(7, 9)) as daemon:
        daemon.populate()
        with open_host(daemon.socket) as host:
            yield host


def test_the_readme(dom0: Host) -> None:
    check_session("README.md", dom0, MOUNTED)


def test_the_tutorial(dom0: Host) -> None:
    check_session("docs/tutorial.md", dom0)


def test_transactions(dom0: Host) -> None:
    check_session("docs/transactions.md", dom0, MOUNTED)


def test_what_matches() -> None:
    assert matches(["a", "b...d", "...", "e"], ["a", "bcd", "x", "y", "e"])
    assert matches(["...", "e"], ["e"])
    assert not matches(["a"], ["a", "b"])
    assert not matches(["a...c"], ["a", "c"])
    assert not matches([], ["a"])
