"""Ring: the names of files, without a store."""

from __future__ import annotations

import pytest

from xsfs.view.names import is_scratch_name

SCRATCH = [".x", ".#x", "..x", "x~", "~", "#x#", "##", "x.bak", "x.tmp", "x.orig", "x.rej"]
SCRATCH += [
    ".x.swp",
    "x.swo",
    "x.swx",
    ".ansible_tmp8f3x",
    ".f.Ab12Cd",
    "f.oAb12Cd",
    ".git",
    "a b~",
]
NOT_SCRATCH = ["x", "x.b", "x.XXXXXX", "x.Ab12Cd", "#", "#x", "x#", "a b", "x.d", "x.bak.d", "a~b"]
NOT_SCRATCH += [
    ".watch",
    ".value",
    ".ls",
    ".json",
    ".dump",
    ".root",
    ".domain",
    ".diff",
    ".control",
]
NOT_SCRATCH += ["n" * 200 + "~0123456789abcdef"]


@pytest.mark.parametrize("name", SCRATCH)
def test_scratch_names(name: str) -> None:
    assert is_scratch_name(name.encode())


@pytest.mark.parametrize("name", NOT_SCRATCH)
def test_other_names(name: str) -> None:
    assert not is_scratch_name(name.encode())
