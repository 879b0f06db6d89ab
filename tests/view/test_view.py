"""Ring: pure.  What a node is, by every combination of what the store may say of it.

The answers of a burst can be of different moments: a node may come or go between two of them.
"""

from __future__ import annotations

from typing import Final

import pytest

from xsfs.view.view import LEAF, UNREADABLE, NodeState, interpret, requests_for
from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import XenstoreError

GUEST: Final = 7
ANY: Final = protocol.read(b"/n")

VALUE: Final = b"v"
NONE: Final = b""
NAMES: Final = b"a\0b\0"
HASH: Final = hash(NAMES)
PARENT: Final = NodeState(None, True, True, True, HASH)
LONG_PARENT: Final = NodeState(None, True, True, True)
"""With more children than one reply holds."""

READABLE: Final = b"n0\0r7\0"
WRITABLE: Final = b"n0\0b7\0"


def error(name: str) -> XenstoreError:
    return XenstoreError(name, ANY)


@pytest.mark.parametrize(
    ("value", "children", "state"),
    [
        (VALUE, NONE, NodeState(VALUE, False, True, True)),
        (VALUE, NAMES, NodeState(VALUE, True, True, True, HASH)),
        (NONE, NONE, NodeState(b"", False, True, True)),
        (VALUE, error("E2BIG"), NodeState(VALUE, True, True, True)),
        (None, NONE, LEAF),
        (None, NAMES, PARENT),
        (None, error("E2BIG"), LONG_PARENT),
        (error("ENOENT"), error("ENOENT"), None),
        (None, error("ENOENT"), None),
        # A path too long for this store.
        (error("EINVAL"), error("EINVAL"), None),
        (error("EACCES"), error("EACCES"), UNREADABLE),
        (None, error("EACCES"), UNREADABLE),
        # It came, went, or changed hands between the two.
        (error("ENOENT"), NAMES, None),
        (error("ENOENT"), error("E2BIG"), None),
        (VALUE, error("ENOENT"), None),
        (error("EACCES"), NONE, UNREADABLE),
        (error("EACCES"), error("E2BIG"), UNREADABLE),
        (error("ENOENT"), error("EACCES"), None),
        (VALUE, error("EACCES"), UNREADABLE),
    ],
)
def test_of_domain_0(value: Reply | None, children: Reply, state: NodeState | None) -> None:
    assert interpret(value, children, None, 0) == state
    # Whoever must ask for permissions, too, is told the same where they allow everything.
    assert interpret(value, children, WRITABLE, GUEST) == state


@pytest.mark.parametrize(
    ("value", "children", "perms", "state"),
    [
        (VALUE, NONE, READABLE, NodeState(VALUE, False, True, False)),
        (VALUE, error("E2BIG"), READABLE, NodeState(VALUE, True, True, False)),
        (None, NAMES, READABLE, NodeState(None, True, True, False, HASH)),
        (None, NONE, READABLE, NodeState(None, False, True, False)),
        (VALUE, NONE, error("ENOENT"), None),
        (VALUE, error("E2BIG"), error("ENOENT"), None),
        (VALUE, NONE, error("EACCES"), UNREADABLE),
        (error("ENOENT"), error("ENOENT"), error("ENOENT"), None),
        (error("EACCES"), error("EACCES"), error("EACCES"), UNREADABLE),
    ],
)
def test_of_a_guest(
    value: Reply | None, children: Reply, perms: Reply, state: NodeState | None
) -> None:
    assert interpret(value, children, perms, GUEST) == state


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EQUOTA", "EBUSY", "ENOSYS"])
def test_what_says_nothing_of_the_node(name: str) -> None:
    for value, children in (
        (error(name), NONE),
        (VALUE, error(name)),
        (None, error(name)),
        (error(name), error("E2BIG")),
    ):
        with pytest.raises(XenstoreError, match=name):
            interpret(value, children, None, 0)


def test_a_value_is_never_too_big_to_be_told() -> None:
    """E2BIG is what a store says of a listing."""
    with pytest.raises(XenstoreError, match="E2BIG"):
        interpret(error("E2BIG"), NONE, None, 0)


def test_a_listing_that_differs_has_another_hash() -> None:
    hashes = set()
    for names in (NAMES, b"a\0", b"b\0a\0", b"a\0b\0c\0"):
        state = interpret(VALUE, names, None, 0)
        assert state is not None
        assert state.children_hash
        hashes.add(state.children_hash)
    assert len(hashes) == 4


@pytest.mark.parametrize("perms", [False, True])
@pytest.mark.parametrize("value", [False, True])
def test_the_questions_about_a_node(perms: bool, value: bool) -> None:
    """Their order is that of the parameters of `interpret`."""
    expected = [protocol.read(b"/n")] * value + [protocol.directory(b"/n")]
    expected += [protocol.get_perms(b"/n")] * perms
    assert list(requests_for(b"/n", perms=perms, value=value)) == expected
