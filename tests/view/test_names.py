"""Names and values as files have them."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsfs.view.names import (
    ALIAS_PREFIX,
    NAME_MAX,
    RAW,
    TEXT,
    ValueFormat,
    file_name,
    forced_name,
    is_alias,
    is_scratch_name,
    is_shown,
    join,
    parent_path,
    shown_names,
)
from xsfs.xenstore.protocol import PATH_MAX, is_name

LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@-"
names = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=300).map(bytes)


@given(names)
def test_a_name_is_its_file_name_unless_it_is_too_long(name: bytes) -> None:
    found = file_name(name)
    assert len(found) <= NAME_MAX
    assert (found == name) == (len(name) <= NAME_MAX)
    assert is_alias(found) == (len(name) > NAME_MAX)
    assert is_name(found) != is_alias(found), "an alias is never the name of a node"


def test_an_alias() -> None:
    name = b"x" * (NAME_MAX + 1)
    alias = file_name(name)
    digest = hashlib.sha256(name).hexdigest()[:16].encode()
    assert alias == b"x" * ALIAS_PREFIX + b"~" + digest
    assert file_name(name + b"y") != alias
    assert not is_alias(alias + b"0")
    assert not is_alias(alias[1:])


@pytest.mark.parametrize(
    ("name", "forced"),
    [
        (b"a.d", b"a"),
        (b"@x-_9.d", b"@x-_9"),
        (b"a", None),
        (b".d", None),
        (b"a.d.d", None),
        (b"a.c", None),
        (b"a\n.d", None),
        (file_name(b"x" * 300) + b".d", file_name(b"x" * 300)),
    ],
)
def test_a_name_as_a_directory(name: bytes, forced: bytes | None) -> None:
    assert forced_name(name) == forced


@pytest.mark.parametrize(
    ("path", "name", "shown"),
    [
        (b"/", b"a", True),
        (b"/", b"@releaseDomain", False),  # a special node, not a child
        (b"/a", b"@releaseDomain", True),
        *((b"/a", name, False) for name in (b"", b".", b"..", b"a/b", b"a.b", b"a\n", b"\xff")),
        (b"/a", b"x" * (PATH_MAX - 3), True),
        (b"/a", b"x" * (PATH_MAX - 2), False),
    ],
)
def test_what_a_listing_shows(path: bytes, name: bytes, shown: bool) -> None:
    assert is_shown(path, name) == shown


PATHS = st.sampled_from([b"/", b"/a", b"/" + b"x" * (PATH_MAX - 4), b"/" + b"x" * (PATH_MAX - 2)])
any_names = st.one_of(
    names, st.sampled_from([b"@a", b"", b".", b"a.b", b"a b", b"a\n", b"\xff", b"a/b"])
)


@given(PATHS, st.lists(any_names, max_size=6))
def test_names_of_a_listing_at_once_and_one_by_one(path: bytes, listed: list[bytes]) -> None:
    listing = b"".join(b"%s\0" % name for name in listed)
    assert shown_names(path, listing) == [name for name in listed if is_shown(path, name)]


@pytest.mark.parametrize("path", [b"/", b"/a", b"/a/b"])
def test_a_child_and_its_parent(path: bytes) -> None:
    assert parent_path(join(path, b"x")) == path
    assert join(path, b"x").endswith(b"/x")
    assert b"//" not in join(path, b"x")


def test_the_parent_of_the_root_is_the_root() -> None:
    assert parent_path(b"/") == b"/"


@pytest.mark.parametrize("format_", [TEXT, RAW])
@given(value=st.binary(max_size=40) | st.sampled_from([b"\n", b"a\n", b"a\n\n", b"\0"]))
def test_a_value_survives_the_file(format_: ValueFormat, value: bytes) -> None:

    assert format_.parse(format_.render(value)) == value


def test_text_ends_with_a_newline() -> None:
    assert TEXT.render(b"a") == b"a\n"
    assert TEXT.render(b"") == b""
    assert TEXT.parse(b"a") == b"a"  # printf
    assert TEXT.parse(b"a\n\n") == b"a\n"
    assert RAW.render(b"a") == RAW.parse(b"a") == b"a"


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
