"""Permissions: as text, on the wire, and who may do what by them.  Pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsfs.xenstore.permissions import (
    DOMID_ANY,
    Permission,
    access_of,
    decode_perms,
    format_permissions,
    parse_permission,
    parse_permissions,
    perms_text,
    set_perms,
)

ACCESS = {"n": (False, False), "r": (True, False), "w": (False, True), "b": (True, True)}


@pytest.mark.parametrize("letter", "nrwb")
@pytest.mark.parametrize("domid", [0, 7, 32751, 4294967295, -1, 99999999999])
def test_a_permission_as_text_and_back(letter: str, domid: int) -> None:
    perm = parse_permission(f"{letter}{domid}")
    assert perm == Permission(domid, *ACCESS[letter])
    assert str(perm) == f"{letter}{domid}"


@pytest.mark.parametrize(
    "text",
    ["", "r", "7", "x7", "R7", "r-", "r--1", "r+1", "r7 ", " r7", "r7\n", "r٣", "r²", "rr7"],
)
def test_what_is_no_permission(text: str) -> None:
    with pytest.raises(ValueError, match="permission"):
        parse_permission(text)


@pytest.mark.parametrize("text", ["n0,r7", "n0 r7", " n0, r7 ", "n0\tr7\n", "n0,,r7,"])
def test_permissions_with_commas_or_blanks(text: str) -> None:
    perms = parse_permissions(text)
    assert perms == (Permission(0, False, False), Permission(7, True, False))
    assert format_permissions(perms) == "n0,r7"


@pytest.mark.parametrize("text", ["", " ", ",", "n0,x", "n0;r7"])
def test_what_are_no_permissions(text: str) -> None:
    with pytest.raises(ValueError, match="permission"):
        parse_permissions(text)


permissions = st.builds(Permission, st.integers(-(2**62), 2**62 - 1), st.booleans(), st.booleans())


@settings(deadline=None)
@given(st.lists(permissions, min_size=1, max_size=8))
def test_permissions_survive_text_and_wire(perms: list[Permission]) -> None:
    assert list(parse_permissions(format_permissions(perms))) == perms
    payload = set_perms(b"/a", perms).payload
    assert list(decode_perms(payload.removeprefix(b"/a\0"))) == perms
    assert perms_text(payload.removeprefix(b"/a\0")).decode() == format_permissions(perms)


@pytest.mark.parametrize(
    ("text", "domid", "access"),
    [
        ("n5", 0, "b"),  # domain 0 may do everything
        ("n5,n0", 0, "b"),
        ("n5", 5, "b"),  # and so may the owner
        ("n5,n5", 5, "b"),
        ("n5", 7, "n"),  # the owner's letter is for all others
        ("r5", 7, "r"),
        ("w5", 7, "w"),
        ("b5", 7, "b"),
        ("b5,n7", 7, "n"),  # but for those with an entry
        ("n5,b7", 7, "b"),
        ("n5,b7", 8, "n"),
        ("n5,r7,w7", 7, "r"),  # of which the first counts
        ("n5,n8,w7,b7", 7, "w"),
        ("n5,b32757", 7, "b"),  # DOMID_ANY
        ("n5,r7,b32757", 7, "r"),
        ("n5,r32757,b7", 7, "r"),
        ("b5,n32757", 7, "n"),
        ("n5,n32757", 5, "b"),
        ("n5,n32757", 0, "b"),
        ("n5,b-1", 7, "n"),  # no domain at all
        ("n5,b4294967303", 7, "n"),
    ],
)
def test_who_may_do_what(text: str, domid: int, access: str) -> None:
    assert access_of(parse_permissions(text), domid) == ACCESS[access]


@pytest.mark.parametrize(
    ("domid", "is_reserved"),
    [
        *((0, False), (7, False), (0x7FEF, False), (0x7FF0, True), (DOMID_ANY, True)),
        *((0xFFFFFFFF, True), (1 << 40, True), (-1, True)),
    ],
)
def test_domids_that_no_domain_has(domid: int, is_reserved: bool) -> None:
    assert Permission(domid, True, False).is_reserved == is_reserved


def test_numbers_that_oxenstored_shows_without_their_sign() -> None:
    shown = b"n7\0r9223372036854775807\0b32757\0"
    accepted = b"/x\0n7\0r-1\0b32757\0"
    assert set_perms(b"/x", decode_perms(shown)).payload == accepted
    assert perms_text(shown) == b"n7,r9223372036854775807,b32757"
