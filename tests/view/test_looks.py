"""Ring: pure.  What a node is, by every combination of what the store may say of it.

The answers of a burst can be of different moments: a node may come or go between two of them.
"""

from __future__ import annotations

from typing import Final

import pytest
from xsfs.view.looks import HIDDEN, LEAF, PARENT, Look, understand

from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import XenstoreError

GUEST: Final = 7
ANY: Final = protocol.read(b"/n")

VALUE: Final = b"v"
NONE: Final = b""
NAMES: Final = b"a\0b\0"

READABLE: Final = b"n0\0r7\0"
WRITABLE: Final = b"n0\0b7\0"


def error(name: str) -> XenstoreError:
    return XenstoreError(name, ANY)


@pytest.mark.parametrize(
    ("value", "children", "look"),
    [
        (VALUE, NONE, Look(VALUE, False, True, True)),
        (VALUE, NAMES, Look(VALUE, True, True, True)),
        (NONE, NONE, Look(b"", False, True, True)),
        (VALUE, error("E2BIG"), Look(VALUE, True, True, True)),
        (None, NONE, LEAF),
        (None, NAMES, PARENT),
        (None, error("E2BIG"), PARENT),
        (error("ENOENT"), error("ENOENT"), None),
        (None, error("ENOENT"), None),
        # A path too long for this store.
        (error("EINVAL"), error("EINVAL"), None),
        (error("EACCES"), error("EACCES"), HIDDEN),
        (None, error("EACCES"), HIDDEN),
        # It came, went, or changed hands between the two.
        (error("ENOENT"), NAMES, None),
        (error("ENOENT"), error("E2BIG"), None),
        (VALUE, error("ENOENT"), None),
        (error("EACCES"), NONE, HIDDEN),
        (error("EACCES"), error("E2BIG"), HIDDEN),
        (error("ENOENT"), error("EACCES"), None),
        (VALUE, error("EACCES"), HIDDEN),
    ],
)
def test_of_domain_0(value: Reply | None, children: Reply, look: Look | None) -> None:
    assert understand((value, children), 0) == look
    # Whoever must ask for permissions, too, is told the same where they allow everything.
    assert understand((value, children, WRITABLE), GUEST) == look


@pytest.mark.parametrize(
    ("value", "children", "perms", "look"),
    [
        (VALUE, NONE, READABLE, Look(VALUE, False, True, False)),
        (VALUE, error("E2BIG"), READABLE, Look(VALUE, True, True, False)),
        (None, NAMES, READABLE, Look(b"", True, True, False, whole=False)),
        (VALUE, NONE, error("ENOENT"), None),
        (VALUE, error("E2BIG"), error("ENOENT"), None),
        (VALUE, NONE, error("EACCES"), HIDDEN),
        (error("ENOENT"), error("ENOENT"), error("ENOENT"), None),
        (error("EACCES"), error("EACCES"), error("EACCES"), HIDDEN),
    ],
)
def test_of_a_guest(value: Reply | None, children: Reply, perms: Reply, look: Look | None) -> None:
    assert understand((value, children, perms), GUEST) == look


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EQUOTA", "EBUSY", "ENOSYS"])
def test_what_says_nothing_of_the_node(name: str) -> None:
    for answers in (
        (error(name), NONE),
        (VALUE, error(name)),
        (None, error(name)),
        (error(name), error("E2BIG")),
    ):
        with pytest.raises(XenstoreError, match=name):
            understand(answers, 0)


def test_a_value_is_never_too_big_to_be_told() -> None:
    """E2BIG is what a store says of a listing."""
    with pytest.raises(XenstoreError, match="E2BIG"):
        understand((error("E2BIG"), NONE), 0)
