"""`.diff` of a transaction: what a commit would change, on real mounts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.mounting import Mount, Place, mounted, of_dom0, refusal
from tests.support.transaction_dirs import control, inside, start
from tests.support.xenstored.harness import XsClient


def diff(tx: Path) -> list[str]:
    return (tx / ".diff").read_text().splitlines()


def test_each_kind_of_change_has_a_line(
    place: Place, mount: Mount, witness: XsClient, box: Path, tx: Path
) -> None:
    top, owner = f"{place.home}/data/{box.name}", place.domid
    for name in ("value", "perms", "both", "gone", "same"):
        witness.write(f"{top}/{name}", b"before")
    for name in ("tree/a/b", "tree/c", "kept/a", "kept/b"):
        witness.write(f"{top}/{name}", b"t")
    tx.mkdir()
    assert diff(tx) == []
    there = inside(tx, box)
    (there / "value").write_text("after")
    os.setxattr(there / "perms", "user.xs.perms", f"b{owner},r3".encode())
    (there / "both").write_text("after")
    os.setxattr(there / "both", "user.xs.perms", f"b{owner},r3".encode())
    (there / "gone").unlink()
    (there / "same").write_text("before")
    (there / "new" / "deep").mkdir(parents=True)
    (there / "new" / "deep" / "leaf").write_text("1")
    mount.bash(f"rm -r .transaction/t1/data/{box.name}/tree")
    mount.bash(f"mv .transaction/t1/data/{box.name}/kept .transaction/t1/data/{box.name}/moved")
    expected = [
        "* both",
        "p both",
        "- gone",
        "- kept",
        "- kept/a",
        "- kept/b",
        "+ moved",
        "+ moved/a",
        "+ moved/b",
        "+ new",
        "+ new/deep",
        "+ new/deep/leaf",
        "p perms",
        "- tree",
        "- tree/a",
        "- tree/a/b",
        "- tree/c",
        "* value",
    ]
    assert diff(tx) == [f"{line[:2]}data/{box.name}/{line[2:]}" for line in expected]
    assert diff(tx) == diff(tx)
    control(tx, "commit")
    assert witness.read(f"{top}/new/deep/leaf") == b"1"


def test_it_is_compared_with_the_store_of_that_moment(
    place: Place, witness: XsClient, box: Path, tx: Path
) -> None:
    top = f"{place.home}/data/{box.name}"
    witness.write(f"{top}/x", b"old")
    tx.mkdir()
    (inside(tx, box) / "x").write_text("new")
    assert diff(tx) == [f"* data/{box.name}/x"]
    witness.write(f"{top}/x", b"new")
    assert diff(tx) == []
    witness.rm(f"{top}/x")
    assert diff(tx) == [f"+ data/{box.name}/x"]


def test_removed_and_made_once_more(
    place: Place, mount: Mount, witness: XsClient, box: Path, tx: Path
) -> None:
    top = f"{place.home}/data/{box.name}"
    for name in ("d/a", "d/b"):
        witness.write(f"{top}/{name}", b"1")
    tx.mkdir()
    there = inside(tx, box)
    mount.bash(f"rm -r .transaction/t1/data/{box.name}/d")
    (there / "d").mkdir()
    (there / "d" / "b").write_text("1")
    (there / "d" / "c").write_text("1")
    assert diff(tx) == [f"- data/{box.name}/d/a", f"+ data/{box.name}/d/c"]


def test_owed_truncations_count(witness: XsClient, place: Place, box: Path, tx: Path) -> None:
    witness.write(f"{place.home}/data/{box.name}/x", b"old")
    tx.mkdir()
    with open(inside(tx, box) / "x", "w"):
        assert diff(tx) == [f"* data/{box.name}/x"]


@of_dom0
def test_reading_it_causes_no_conflict(
    place: Place, witness: XsClient, box: Path, tx: Path
) -> None:
    """Of nodes above the changed ones, which other clients may change."""
    top = f"{place.home}/data/{box.name}"
    witness.write(f"{top}/a/x", b"1")
    tx.mkdir()
    (inside(tx, box) / "a" / "x").write_text("2")
    assert diff(tx) == [f"* data/{box.name}/a/x"]
    witness.write(f"{place.home}/beside", b"1")
    control(tx, "commit")
    assert witness.read(f"{top}/a/x") == b"2"
    witness.rm(f"{place.home}/beside")


def test_paths_outside_of_the_root_are_absolute(
    place: Place, mount: Mount, witness: XsClient, box: Path, tmp_path: Path
) -> None:
    top = f"{place.home}/data/{box.name}"
    witness.write(f"{top}/root/in", b"1")
    with mounted(["-o", f"root={top}/root", place.socket], tmp_path / "m") as other:
        tx = start(other, "t")
        (tx / "in").write_text("2")
        (tx / "new").write_text("2")
        (tx / ".root" / top[1:] / "out").write_text("2")
        os.setxattr(tx, "user.xs.perms", f"b{place.domid},r3".encode())
        assert diff(tx) == [f"+ {top}/out", "p .", "* in", "+ new"]
        tx.rmdir()


def test_it_is_read_only_and_never_listed(tx: Path) -> None:
    tx.mkdir()
    assert ".diff" not in os.listdir(tx)
    assert os.stat(tx / ".diff").st_mode & 0o777 == 0o400
    assert refusal(lambda: os.open(tx / ".diff", os.O_WRONLY)) == errno.EACCES


def test_it_ends_with_the_transaction(box: Path, tx: Path) -> None:
    tx.mkdir()
    (inside(tx, box) / "x").write_text("1")
    file = os.open(tx / ".diff", os.O_RDONLY)
    tx.rmdir()
    with pytest.raises(OSError, match="Stale") as failure:
        os.read(file, 100)
    assert failure.value.errno == errno.ESTALE
    os.close(file)
    assert refusal(lambda: os.stat(tx / ".diff")) == errno.ENOENT


@pytest.mark.quick_if(place=["C"])
def test_a_thousand_changes(place: Place, mount: Mount, witness: XsClient, box: Path) -> None:
    """Of `.root/`, and as many made outside meanwhile."""
    count = 60 if place.guest else 1000  # a guest's transaction may not have as many changes
    top = f"{place.home}/data/{box.name}"
    for number in range(count):
        witness.write(f"{top}/{number}", b"old")
    tx = start(mount, "many")
    there = tx / ".root" / top[1:]
    for number in range(count):
        if number % 4 == 0:
            (there / str(number)).unlink()
        elif number % 4 == 1:
            (there / str(number)).write_text("new")
        elif number % 4 == 2:
            os.setxattr(there / str(number), "user.xs.perms", f"b{place.domid},r3".encode())
        else:
            (there / f"new-{number}").write_text("1")
    for number in range(1, count, 8):
        witness.write(f"{top}/{number}", b"new")  # as in the transaction
    starts = ("- ", "* ", "p ", "+ new-")
    expected = [f"{starts[number % 4]}{number}" for number in range(count) if number % 8 != 1]
    expected = [line[:2] + f"data/{box.name}/" + line[2:] for line in expected]
    assert sorted(diff(tx)) == sorted(expected)
    tx.rmdir()
