"""Listing hints: kept for a while, bounded, and used up."""

from __future__ import annotations

import pytest

from xsfs.view.bounded import Bounded
from xsfs.view.hints import LISTED_MAX, SEEN_MAX, SIZE_MAX, ListingHints

LISTING = b"a\0b\0"


def test_what_was_seen_is_a_hint_once() -> None:
    hints = ListingHints()
    assert hints.take(b"/a") == b""
    hints.saw(b"/a", LISTING)
    assert hints.take(b"/a") == LISTING
    assert hints.take(b"/a") == b""


def test_what_was_listed_is_a_hint_again_and_again() -> None:
    hints = ListingHints()
    hints.was_listed(b"/a", LISTING)
    for _ in range(3):
        assert hints.take(b"/a") == LISTING
    hints.was_listed(b"/a", b"c\0")
    assert hints.take(b"/a") == b"c\0"


def test_what_was_seen_is_newer_than_what_was_listed() -> None:
    hints = ListingHints()
    hints.was_listed(b"/a", LISTING)
    hints.saw(b"/a", b"c\0")
    assert hints.take(b"/a") == b"c\0"
    assert hints.take(b"/a") == LISTING


@pytest.mark.parametrize("listing", [b"", b"x" * SIZE_MAX + b"\0", b"a\0b"])
def test_what_is_no_hint(listing: bytes) -> None:
    """Empty, too long, or nonsense; and what was known before is no longer true."""
    hints = ListingHints()
    for keep in (hints.saw, hints.was_listed):
        keep(b"/a", LISTING)
        keep(b"/a", listing)
        assert hints.take(b"/a") == b""


def test_the_longest_hint() -> None:
    hints = ListingHints()
    longest = b"x" * (SIZE_MAX - 1) + b"\0"
    hints.saw(b"/a", longest)
    assert hints.take(b"/a") == longest


def test_they_are_bounded() -> None:
    hints = ListingHints()
    for number in range(SEEN_MAX + 1):
        hints.saw(b"/%d" % number, LISTING)
    for number in range(LISTED_MAX + 1):
        hints.was_listed(b"/l%d" % number, LISTING)
    assert hints.take(b"/0") == hints.take(b"/l0") == b""
    assert hints.take(b"/1") == hints.take(b"/l1") == LISTING
    assert len(hints._seen) == SEEN_MAX - 1  # one was taken
    assert len(hints._listed) == LISTED_MAX


def test_a_bounded_dict_forgets_the_oldest() -> None:
    kept: Bounded[str, int] = Bounded(2)
    kept.put("a", 1)
    kept.put("b", 2)
    kept.put("a", 3)  # now the newest
    kept.put("c", 4)
    assert kept == {"a": 3, "c": 4}
    assert list(kept) == ["a", "c"]
