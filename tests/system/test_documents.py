"""Ring: what the documents show, typed as it stands on a host of its own
(tests/support/documents.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import check_dialogue, check_session, matches
from tests.support.host import REPOSITORY, Host, open_host
from tests.support.xenstored.harness import RealXenstored

MOUNTED = "xsfs /mnt/xenstore"

DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]

TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"


@pytest.fixture
def dom0() -> Iterator[Host]:
    """A dom0 with two guests, all fresh."""
    with RealXenstored("C", guests=(7, 9)) as daemon:
        daemon.populate()
        with open_host(daemon.socket) as host:
            yield host


def test_the_readme(dom0: Host) -> None:
    check_session("README.md", dom0, MOUNTED)


def test_the_commands(dom0: Host) -> None:
    check_session("docs/commands.md", dom0)


def test_transactions(dom0: Host) -> None:
    check_session("docs/transactions.md", dom0, MOUNTED)


def test_watches(dom0: Host) -> None:
    check_dialogue("docs/watches.md", dom0, MOUNTED)


def test_the_mirror(dom0: Host) -> None:
    check_dialogue("docs/mirror.md", dom0)


def test_troubleshooting(dom0: Host) -> None:
    check_session("docs/troubleshooting.md", dom0)


def test_messages_in_troubleshooting_are_those_of_the_program() -> None:
    """Each that stands in a table must stand in the source, too."""
    source = "".join(path.read_text() for path in (REPOSITORY / "xsfs").rglob("*.py"))
    tables = re.findall(
        r"^\| message \|.*?\n\n", TROUBLESHOOTING.read_text(), re.DOTALL | re.MULTILINE
    )
    messages = [
        text for table in tables for text in re.findall("^\\| `(.*?)`", table, re.MULTILINE)
    ]
    assert len(messages) > 20
    for message in messages:
        for part in message.replace("/dev/fuse", "{FUSE_DEVICE}").split("..."):
            assert part.strip(" :") in source, message


def anchors(document: Path) -> set[str]:
    """Of its headings, as they are made of them."""
    headings = re.findall("^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub("[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]*)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        document = path.parent / file if file else path
        assert document.exists(), target
        assert not anchor or anchor in anchors(document), target


def test_what_matches() -> None:
    assert matches(["a", "b...d", "...", "e"], ["a", "bcd", "x", "y", "e"])
    assert matches(["...", "e"], ["e"])
    assert not matches(["a"], ["a", "b"])
    assert not matches(["a...c"], ["a", "c"])
    assert not matches([], ["a"])
