"""A dict with a limit."""

from __future__ import annotations

from xsfs.view.bounded import Bounded


def test_a_bounded_dict_forgets_the_oldest() -> None:
    kept: Bounded[str, int] = Bounded(2)
    kept.put("a", 1)
    kept.put("b", 2)
    kept.put("a", 3)  # now the newest
    kept.put("c", 4)
    assert kept == {"a": 3, "c": 4}
    assert list(kept) == ["a", "c"]
