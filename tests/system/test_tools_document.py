"""Ring: the tools of docs/tools.md, each as the table shows it, on real mounts.

The rows are the parameters.  A row that promises too much fails, and so does one that warns without reason.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import REPOSITORY
from tests.support.mounting import Mount, Place, mounted, open_place

DOCUMENT = (REPOSITORY / "docs" / "tools.md").read_text()

PRIVATE, READABLE, SHARED = "", "umask=022", "allow_other,umask=022"
"""The options of mounts."""

slow = [pytest.mark.slow, pytest.mark.ci]

SETTINGS = [
    pytest.param(("C", PRIVATE), id="C"),
    pytest.param(("ocaml", PRIVATE), id="ocaml", marks=slow),
    pytest.param(("C", READABLE), id="C-umask", marks=slow),
    pytest.param(("C", SHARED), id="C-allow_other", marks=slow),
]


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A store, and the options of the mount."""
    chosen: tuple[str, str] = request.param
    return chosen


@pytest.fixture(scope="module")
def place(setting: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with open_place(setting[0], tmp_path_factory.mktemp("place")) as place:
        yield place


@pytest.fixture(scope="module")
def mount(
    place: Place, setting: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    options = ["-o", setting[1]] if setting[1] else []
    with mounted([*options, place.socket], tmp_path_factory.mktemp("mount") / "m") as mount:
        yield mount


def rows(heading: str) -> list[list[str]]:
    """The cells of each row of the table below a heading.  Backquotes around a whole cell go."""
    section = re.split("^## ", DOCUMENT.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    lines = re.findall(r"^\| (.*?) ?\|$", section, re.MULTILINE)[2:]
    return [
        [
            re.sub(r"^`(.*)`$", r"\1", cell.strip()).replace(r"\|", "|")
            for cell in re.split(r"(?<!\\)\|", line)
        ]
        for line in lines
    ]


CHANGING = rows("Tools that change values")
READING = rows("Tools that read")
NEEDING_CAT = rows("Tools that need cat")
FAILING = rows("Tools that fail")
PRIVATE_FILES = rows("Private files with allow_other")


def test_the_tables_were_found() -> None:
    assert len(CHANGING) > 40
    assert len(READING) > 20
    assert len(NEEDING_CAT) > 4
    assert len(FAILING) > 12
    assert len(PRIVATE_FILES) > 10


def named(table: list[list[str]]) -> list[object]:
    return [pytest.param(*row[1:], id=row[0]) for row in table]


@pytest.fixture
def disk(tmp_path: Path, box: Path) -> Path:
    (box / "x").write_text("1\n")
    path = tmp_path / "disk"
    path.mkdir()
    return path


def run(mount: Mount, box: Path, disk: Path, command: str) -> subprocess.CompletedProcess[str]:
    script = f"set -e; cd {box}\n{command}"
    # Ansible wants UTF-8.
    return mount.run(script, B=str(disk), HOME=str(disk.parent), LC_ALL="C.UTF-8")


@pytest.mark.parametrize(("tool", "command"), [pytest.param(*row, id=row[0]) for row in CHANGING])
def test_a_tool_that_changes_a_value(
    mount: Mount, setting: tuple[str, str], box: Path, disk: Path, tool: str, command: str
) -> None:
    done = run(mount, box, disk, command)
    if setting[1] == SHARED and tool in {row[0] for row in PRIVATE_FILES}:
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr + done.stdout
    assert (box / "x").read_text() == "2\n"


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("command", "status", "left"), named(PRIVATE_FILES))
def test_a_tool_that_copies_a_private_file(
    mount: Mount,
    setting: tuple[str, str],
    box: Path,
    disk: Path,
    command: str,
    status: str,
    left: str,
) -> None:
    (disk / "x").write_text("2\n")
    (disk / "x").chmod(0o600)
    done = run(mount, box, disk, command)
    if setting[1] == SHARED:
        assert str(done.returncode) == status.partition(",")[0]
        message = re.search("not permitted|EPERM", done.stderr + done.stdout)
        assert bool(message) == (status != "0")
        value = (box / "x").read_text().strip() if (box / "x").exists() else "missing"
        assert left.startswith(value)
    else:
        assert done.returncode == 0, done.stderr + done.stdout
        assert (box / "x").read_text() == "2\n"


@pytest.mark.parametrize(("command", "printed"), named(READING))
def test_a_tool_that_reads(mount: Mount, box: Path, disk: Path, command: str, printed: str) -> None:
    assert mount.bash(f"cd {box}\n{command}", B=str(disk)).split() == printed.split()


@pytest.mark.parametrize(("command", "instead"), named(NEEDING_CAT))
def test_a_tool_that_needs_cat(
    mount: Mount, box: Path, disk: Path, command: str, instead: str
) -> None:
    expected = mount.bash(f"cat {box}/.ls")
    assert expected
    assert mount.bash(f"cd {box}\n{command}", B=str(disk)) == ""
    mount.bash("rm -rf $B/*", B=str(disk))
    assert mount.bash(f"cd {box}\n{instead}", B=str(disk)) == expected


@pytest.mark.parametrize(("command", "error", "reason"), named(FAILING))
def test_a_tool_that_fails(
    mount: Mount, box: Path, disk: Path, command: str, error: str, reason: str
) -> None:
    assert reason
    if error:
        done = mount.run(f"cd {box}; {command}", B=str(disk))
        assert done.returncode != 0
        assert error in done.stderr
    else:  # it prints nothing, and waits or not
        done = mount.run(f"cd {box}; timeout -s KILL 1 {command}")
        assert done.stdout == ""
    assert (box / "x").read_text() == "1\n"


def test_shred_destroys_the_value_and_fails(mount: Mount, box: Path, disk: Path) -> None:
    done = mount.run(f"cd {box}; shred x")
    assert "File too large" in done.stderr
    assert (box / "x").read_bytes() != b"1\n"
