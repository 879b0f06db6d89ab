"""Ring: the tools of docs/tools.md, each as the table shows it, on real mounts.

The rows are the parameters.  A row that promises too much fails, and so does one that warns without reason.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.host import REPOSITORY
from tests.support.mounting import Mount, each_place

DOCUMENT = (REPOSITORY / "docs" / "tools.md").read_text()

place = each_place("C", "ocaml")


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


def test_the_tables_were_found() -> None:
    assert len(CHANGING) > 40
    assert len(READING) > 20
    assert len(NEEDING_CAT) > 4
    assert len(FAILING) > 12


def named(table: list[list[str]]) -> list[object]:
    return [pytest.param(*row[1:], id=row[0]) for row in table]


@pytest.fixture
def disk(tmp_path: Path, box: Path) -> Path:
    (box / "x").write_text("1\n")
    path = tmp_path / "disk"
    path.mkdir()
    return path


quick_on_c = pytest.mark.quick_if(place=["C"])


@quick_on_c
@pytest.mark.parametrize("command", named(CHANGING))
def test_a_tool_that_changes_a_value(mount: Mount, box: Path, disk: Path, command: str) -> None:
    script = f"set -e; cd {box}\n{command}"
    # Ansible wants UTF-8.
    mount.bash(script, B=str(disk), HOME=str(disk.parent), LC_ALL="C.UTF-8")
    assert (box / "x").read_text() == "2\n"


@quick_on_c
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
