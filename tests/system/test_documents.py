"""Ring: the commands in the documents, on a host of their own (tests/support/documents.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from docs import record
from tests.support.documents import (
    blocks,
    check_dialogue,
    check_session,
    install_scripts,
    matches,
)
from tests.support.host import REPOSITORY, Host, open_host
from tests.support.mounting import LIMIT
from tests.support.programs import Lines
from tests.support.xenstored.harness import RealXenstored

MOUNTED = "xsfs /mnt/xenstore"

REPOSITORY_THERE = "/mnt/.repository"
"""The project, on the host of the tests."""

DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]

TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"


@pytest.fixture
def daemon() -> Iterator[RealXenstored]:
    """A fresh Xenstore with two guests."""
    with RealXenstored("C", guests=(7, 9)) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture
def dom0(daemon: RealXenstored) -> Iterator[Host]:
    """The dom0 that the Xenstore belongs to."""
    with open_host(daemon.socket) as host:
        yield host


@pytest.fixture(scope="module")
def mounted_dom0() -> Iterator[Host]:
    """A dom0 with a mount, for all tests that begin by removing what they use."""
    with RealXenstored("C", guests=(7, 9)) as daemon:
        daemon.populate()
        with open_host(daemon.socket) as host:
            host.sh(MOUNTED)
            yield host


def test_the_readme(dom0: Host) -> None:
    check_session("README.md", dom0)


def test_the_recording_shows_what_the_session_prints() -> None:
    lines = [line.text for line in record.record()]
    assert record.shown() == lines, "python3 -m docs.record"


def test_the_figures_of_the_readme_are_those_of_the_table() -> None:
    readme, page = (
        (REPOSITORY / name).read_text() for name in ("README.md", "docs/performance.md")
    )
    said = re.search(r"reads a value in (\S+ \S+), where `xenstore-read` takes (\S+ \S+)\.", readme)
    row = re.search(r"^\| read a value in a script \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    assert said is not None
    assert row is not None
    assert said.groups() == (row[2], row[1])


def quick_reference() -> list[tuple[list[str], list[str]]]:
    """The commands of each row of the README's table: with xenstore-*, and with the mount."""
    text = (REPOSITORY / "README.md").read_text()
    table = text[text.index("\n## Quick reference") : text.index("\n## A session")]
    rows = re.findall(r"^\| (?!---|with )(.*) \| (.*) \|$", table, re.MULTILINE)
    # A single word in backquotes is the name of a file.
    return [
        (re.findall("`([^`]* [^`]*)`", old), re.findall("`([^`]* [^`]*)`", new))
        for old, new in rows
    ]


@pytest.mark.parametrize(
    ("old", "new"), [pytest.param(*row, id=row[1][0]) for row in quick_reference() if row[1]]
)
def test_the_quick_reference(mounted_dom0: Host, old: list[str], new: list[str]) -> None:
    """Both sides of a row do the same to the store."""

    def outcome(commands: list[str]) -> str:
        # P is a file, or a directory in these rows.
        path = "data" if "watch" in commands[0] or "P/." in commands[0] else "data/x"
        script = "\n".join(
            # A watcher never ends by itself: its first line must come.
            f"exec 3< <(exec {command}); read -r line <&3 || exit; kill $!"
            if "watch" in command
            else command
            for command in commands
        )
        script = script.replace("V", "2").replace("P", path)
        ready = "set -e; cd /mnt/xenstore; rm -rf data; mkdir -p data; echo 1 > data/x"
        mounted_dom0.sh(f"{ready}\n{script}")
        return mounted_dom0.sh("xenstore-ls -f -p data")

    assert not old or outcome(old) == outcome(new)
    outcome(new)


def test_the_quick_reference_was_found() -> None:
    assert len([row for row in quick_reference() if row[0] and row[1]]) >= 9


def test_the_tutorial(daemon: RealXenstored, dom0: Host) -> None:
    """A thread plays domain 7 and its toolstack, which react to the request to shut down."""
    shutdown = "/local/domain/7/control/shutdown"

    def guest() -> None:
        with daemon.client(timeout=LIMIT) as client:
            client.watch(shutdown, "")
            while client.read(shutdown) != b"poweroff":
                client.event(LIMIT)
            daemon.destroy_domain(7)
            client.rm("/local/domain/7")

    with ThreadPoolExecutor() as pool:
        done = pool.submit(guest)
        check_session("docs/tutorial.md", dom0)
        done.result(LIMIT)


def test_the_tutorial_without_xen() -> None:
    """An example plays the guests, on the embedded store."""
    text = (REPOSITORY / "docs" / "tutorial.md").read_text()
    mount, guests = re.findall(r"^    ((?:xsfs embedded|XENSTORED_PATH=).*)$", text, re.MULTILINE)
    guests = guests.removesuffix(" &").replace("/opt/xsfs/bin/python", "/mnt/.python/bin/python")
    # It prints a line when the guests exist.
    before = f"""\
{mount}
exec 4< <(cd {REPOSITORY_THERE} && PYTHONPATH=. exec env {guests} 2> /run/guests.log)
echo $! > /run/guests.pid
read -r line <&4"""
    with open_host() as host:
        try:
            check_session("docs/tutorial.md", host, before, omit=[MOUNTED])
        finally:
            host.sh('kill "$(cat /run/guests.pid)"')


def test_the_commands(dom0: Host) -> None:
    check_session("docs/commands.md", dom0)


def test_transactions(dom0: Host) -> None:
    check_session("docs/transactions.md", dom0, MOUNTED)


def test_subtrees(dom0: Host) -> None:
    check_session("docs/subtree.md", dom0, MOUNTED)


def test_watches(dom0: Host) -> None:
    check_dialogue("docs/watches.md", dom0, MOUNTED)


def test_the_mirror(dom0: Host) -> None:
    check_dialogue("docs/mirror.md", dom0)


def test_monitoring(dom0: Host) -> None:
    install_scripts("docs/monitoring.md", dom0)
    check_session("docs/monitoring.md", dom0)


def test_troubleshooting(dom0: Host) -> None:
    check_session("docs/troubleshooting.md", dom0)


def test_messages_in_troubleshooting_are_those_of_the_program() -> None:
    """Every message in a table must occur in the source."""
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
    """The anchors that a document's headings get."""
    headings = re.findall("^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub("[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https://)([^)]*)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        document = path.parent / file if file else path
        assert document.exists(), target
        assert not anchor or anchor in anchors(document), target


def test_matches() -> None:
    assert matches(["a", "b...d", "...", "e"], ["a", "bcd", "x", "y", "e"])
    assert matches(["...", "e"], ["e"])
    assert not matches(["a"], ["a", "b"])
    assert not matches(["a...c"], ["a", "c"])
    assert not matches([], ["a"])


def check_python(document: str, dom0: Host, daemon: RealXenstored, first: Sequence[str]) -> None:
    """The program of a document prints these lines, and then each change below `data`."""
    (program,) = blocks(document, "python")
    with dom0.start(
        'exec /mnt/.python/bin/python -c "$1"', program, PYTHONPATH=REPOSITORY_THERE
    ) as run:
        assert run.stdout is not None
        lines = Lines(run.stdout.fileno())
        try:
            assert [lines.next() for _ in first] == first
            with daemon.client() as client:
                client.write("/local/domain/0/data/new", "1")
            assert re.fullmatch("(b'data/)?new'?", lines.next())
        finally:
            run.kill()


def test_a_watch_in_asyncio(daemon: RealXenstored, dom0: Host) -> None:
    dom0.sh(MOUNTED)
    check_python("docs/watches.md", dom0, daemon, ["."])


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached = {REPOSITORY / "README.md"}
    new = list(reached)
    while new:
        path = new.pop()
        targets = re.findall(r"\]\(([^)#]+\.md)(?:#[^)]*)?\)", path.read_text())
        found = {(path.parent / target).resolve() for target in targets} - reached
        found = {path for path in found if path.exists()}
        reached |= found
        new += found
    assert set(DOCUMENTS) - reached == set()


def test_the_robustness_page_names_test_files() -> None:
    text = (REPOSITORY / "docs" / "dev" / "robustness.md").read_text()
    named = set(re.findall("`([a-z]+/test_[a-z_]+)`", text))
    assert len(named) > 10
    assert {name for name in named if not (REPOSITORY / "tests" / f"{name}.py").exists()} == set()
