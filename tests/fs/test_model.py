"""Ring: a real mount, of every store, against an ordinary file system.

Random operations on few names are done in both, and every result, errno and tree must be the same:
few names make renames meet their own traces.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounting import Mount

NAMES = ("a", "b", "c")
STEPS = 700
Outcome = object


def write(mode: str) -> Callable[[Path, Path, str], Outcome]:
    def operation(path: Path, _: Path, text: str) -> Outcome:
        with open(path, mode) as file:
            file.write(text)
        return None

    return operation


def rewrite(path: Path, _: Path, text: str) -> Outcome:
    with open(path, "r+") as file:
        before = file.read()
        file.seek(0)
        file.write(text)
        file.truncate()
        file.seek(0)
        return before, file.read()


def empty_and_read(path: Path, _: Path, text: str) -> Outcome:
    with open(path, "w+") as file:
        before = file.read()
        file.write(text)
        return before


def through_a_rename(path: Path, other: Path, text: str) -> Outcome:
    with open(path, "r+") as file:
        path.rename(other)
        file.write(text)
    return None


OPERATIONS: dict[str, Callable[[Path, Path, str], Outcome]] = {
    "write": write("w"),
    "append": write("a"),
    "create": write("x"),
    "rewrite": rewrite,
    "empty and read": empty_and_read,
    "write through a rename": through_a_rename,
    "rename": lambda path, other, _: path.rename(other) and None,
    "unlink": lambda path, *_: path.unlink(),
    "mkdir": lambda path, *_: path.mkdir(),
    "rmdir": lambda path, *_: path.rmdir(),
    "rmtree": lambda path, *_: shutil.rmtree(path),
    "read": lambda path, *_: path.read_text(),
    "list": lambda path, *_: sorted(os.listdir(path)),
    "size": lambda path, *_: path.is_file() and path.stat().st_size,
    "truncate": lambda path, *_: os.truncate(path, 0),
    "same": lambda path, other, _: path.samefile(other),
}

WEIGHTS = {"rename": 5, "write": 3, "mkdir": 3, "rmtree": 0.2}


def outcome_of(name: str, root: Path, path: str, other: str, text: str) -> Outcome:
    try:
        return OPERATIONS[name](root / path, root / other, text)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def tree_of(root: Path) -> dict[str, str | None]:
    return {
        str(path.relative_to(root)): path.read_text() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.quick_if(place=["C", "embedded"], seed=[0])
@pytest.mark.parametrize("seed", range(3))
def test_it_behaves_as_an_ordinary_file_system(
    mount: Mount, box: Path, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    names = list(OPERATIONS)
    weights = [WEIGHTS.get(name, 1) for name in names]

    def some_path() -> str:
        return "/".join(chance.choice(NAMES) for _ in range(chance.choice((1, 1, 2, 2, 3))))

    done = []
    for step in range(STEPS):
        (name,) = chance.choices(names, weights)
        call = (name, some_path(), some_path(), f"{step}\n")
        done.append(call)
        here = outcome_of(name, box, *call[1:])
        there = outcome_of(name, tmp_path, *call[1:])
        assert here == there, done[-8:]
        if step % 10 == 0:
            assert tree_of(box) == tree_of(tmp_path), done[-12:]
    assert tree_of(box) == tree_of(tmp_path)
