"""Which empty nodes are directories: by Xen's conventions, and by the history of the mount."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsfs.view.kinds import STICKY_MAX, StickyDirectories, is_container
from xsfs.view.names import join

HOME = b"/local/domain/5"

NAMES = st.sampled_from(
    b"local domain pool vm libxl tool xenstored device remus error attr backend device-model cpu vbd "
    b"suspend backends image qdisk 5 51712 x A-b".split()
)


IN: Mapping[bytes, str] = {
    b"/": "guest_agent_features libxl local mh tool vm vss xapi",
    b"/libxl": "0 12",
    b"/libxl/5": "device remus",
    b"/local": "domain pool",
    b"/local/domain": "0 12",
    b"/local/pool": "0 12",
    b"/tool": "xenstored",
    b"/vm": "a-B_c 0",
    b"/vm/x": "device image rtc",
    HOME: "attr backend bios-strings console control cpu data device device-misc device-model "
    "drivers error feature hvmloader image libxl memory messages platform rrd serial store vm-data "
    "xenserver",
    HOME + b"/attr": "PVAddons backend device hotplug vbd vif",
    HOME + b"/backend": "vbd 9pfs a_2",
    HOME + b"/backend/vbd": "0 12",
    HOME + b"/backend/vbd/7": "51712",
    HOME + b"/cpu": "0 12",
    HOME + b"/data": "vchan",
    HOME + b"/device": "console pvcalls suspend vbd vfb vif vkbd vscsi vusb 9pfs",
    HOME + b"/device-misc": "vif vbd",
    HOME + b"/device-misc/vif": "0 12",
    HOME + b"/device-model": "0 12",
    HOME + b"/device-model/7": "backends",
    HOME + b"/device/vif": "0 12",
    HOME + b"/error": "PVAddons backend device hotplug vbd vif",
    HOME + b"/error/backend": "vbd 9pfs a_2",
    HOME + b"/error/backend/vbd": "0 12",
    HOME + b"/error/backend/vbd/7": "51712",
    HOME + b"/error/device": "console pvcalls vbd vfb vif vkbd vscsi vusb",
    HOME + b"/error/device/vkbd": "0 12",
    HOME + b"/feature": "PVAddons backend device hotplug vbd vif",
}
"""The nodes of xenstore-paths.pandoc, libxl, XAPI and Qubes that are created empty, by their parents."""

OTHERS = b"x a-b 5x 5a x5 A name suspend".split()


@pytest.mark.parametrize("above", IN)
def test_what_is_a_container(above: bytes) -> None:
    for name in IN[above].encode().split():
        assert is_container(join(above, name)), name


@pytest.mark.parametrize("above", [above for above in IN if above != b"/vm"])
def test_what_is_none(above: bytes) -> None:
    own = IN[above].encode().split()
    types = above.endswith((b"/backend", b"/device", b"/device-misc"))
    for name in OTHERS:
        if name not in own and not (types and re.fullmatch(rb"[a-z0-9]+", name)):
            assert not is_container(join(above, name)), name


@pytest.mark.parametrize("above", [b"/vm/x/rtc", HOME + b"/data", HOME + b"/cpu/0", b"/other"])
def test_what_none_is_in(above: bytes) -> None:
    for name in (*OTHERS, b"0", b"device"):
        assert not is_container(join(above, name)), name


@given(st.lists(NAMES, max_size=7), NAMES)
def test_a_container_is_in_a_container(above: list[bytes], name: bytes) -> None:
    path = b"/" + b"/".join(above)
    assert is_container(path) or not is_container(join(path, name))


# ------------------------------------------------------------------------------ sticky directories


def content(sticky: StickyDirectories, *paths: bytes) -> dict[bytes, bool | None]:
    return {path: sticky.has_value(path) if path in sticky else None for path in paths}


def test_a_directory_stays_one() -> None:
    sticky = StickyDirectories()
    assert b"/a" not in sticky
    sticky.add(b"/a")
    assert content(sticky, b"/a", b"/a/b", b"/") == {b"/a": False, b"/a/b": None, b"/": None}
    sticky.add(b"/b", with_value=True)
    sticky.add(b"/b")  # its children were seen; that its `.value` was created still counts
    assert sticky.has_value(b"/b")
    sticky.add(b"/a", with_value=True)
    assert sticky.has_value(b"/a")
    sticky.discard_value(b"/a")
    assert b"/a" in sticky
    assert not sticky.has_value(b"/a")
    sticky.discard(b"/a")
    sticky.discard(b"/never")
    sticky.discard_value(b"/never")
    assert content(sticky, b"/a", b"/b", b"/never") == {b"/a": None, b"/b": True, b"/never": None}


def test_a_subtree_that_is_renamed_takes_all_along() -> None:
    sticky = StickyDirectories()
    for path, with_value in ((b"/a", False), (b"/a/b", True), (b"/ab", False), (b"/c/a", True)):
        sticky.add(path, with_value=with_value)
    sticky.move(b"/a", b"/x/y")
    assert content(sticky, b"/a", b"/a/b", b"/ab", b"/c/a", b"/x/y", b"/x/y/b") == {
        b"/a": None,
        b"/a/b": None,
        b"/ab": False,
        b"/c/a": True,
        b"/x/y": False,
        b"/x/y/b": True,
    }


def test_each_change_is_told_and_nothing_else() -> None:
    sticky = StickyDirectories()
    told: list[bytes] = []
    sticky.on_change = told.append
    steps: list[tuple[Callable[[], None], list[bytes]]] = [
        (lambda: sticky.add(b"/a"), [b"/a"]),
        (lambda: sticky.add(b"/a"), []),
        (lambda: sticky.discard_value(b"/a"), []),
        (lambda: sticky.add(b"/a", with_value=True), [b"/a"]),
        (lambda: sticky.add(b"/a"), []),
        (lambda: sticky.discard_value(b"/a"), [b"/a"]),
        (lambda: sticky.move(b"/a", b"/b"), [b"/a", b"/b"]),
        (lambda: sticky.move(b"/a", b"/b"), []),
        (lambda: sticky.discard(b"/a"), []),
        (lambda: sticky.discard(b"/b"), [b"/b"]),
    ]
    for number, (step, expected) in enumerate(steps):
        told.clear()
        step()
        assert told == expected, number


def test_the_oldest_are_forgotten() -> None:
    sticky = StickyDirectories()
    told: list[bytes] = []
    sticky.add(b"/first")
    sticky.add(b"/second")
    for number in range(STICKY_MAX - 2):
        sticky.add(b"/%d" % number)
    sticky.add(b"/first")  # seen again, so it is no longer the oldest
    sticky.on_change = told.append
    sticky.add(b"/one more")
    assert told == [b"/one more", b"/second"]
    assert content(sticky, b"/first", b"/second") == {b"/first": False, b"/second": None}


FEW = (b"/a", b"/a/b", b"/a/b/c", b"/ab", b"/d")
PATHS = st.sampled_from(FEW)
CHANGES = st.one_of(
    st.tuples(st.just("add"), PATHS, st.booleans()),
    st.tuples(st.just("discard"), PATHS),
    st.tuples(st.just("discard_value"), PATHS),
    st.tuples(st.just("move"), PATHS, PATHS),
)
Change = tuple[str, bytes] | tuple[str, bytes, bytes] | tuple[str, bytes, bool]


def carry_out(sticky: StickyDirectories, changes: list[Change]) -> None:
    for name, *arguments in changes:
        if name == "add":
            path, with_value = arguments
            assert isinstance(path, bytes)
            sticky.add(path, with_value=bool(with_value))
        else:
            getattr(sticky, name)(*arguments)


@given(st.lists(CHANGES, max_size=8), st.lists(CHANGES, max_size=8))
def test_a_commit_makes_the_changes_of_the_transaction(
    before: list[Change], within: list[Change]
) -> None:
    """In the mount they are as if they had been made there, and until then it knows nothing of them."""
    sticky, expected = StickyDirectories(), StickyDirectories()
    for each in (sticky, expected):
        carry_out(each, before)
    told: list[bytes] = []
    sticky.on_change = told.append
    copy = StickyDirectories(sticky)
    known = {*sticky._has_value, *FEW}
    assert content(copy, *known) == content(sticky, *known)
    carry_out(copy, within)
    assert sticky._has_value == expected._has_value
    assert told == []
    carry_out(expected, within)
    known = {*copy._has_value, *expected._has_value, *sticky._has_value}
    assert content(copy, *known) == content(expected, *known)
    sticky.carry_out(copy)
    assert sticky._has_value == expected._has_value
    # Each path whose state differs now was told.
    carry_out(unchanged := StickyDirectories(), before)
    for path in {*sticky._has_value, *unchanged._has_value}:
        assert path in told or sticky._has_value.get(path) == unchanged._has_value.get(path)


def test_what_happens_in_the_mount_meanwhile_stays() -> None:
    sticky = StickyDirectories()
    sticky.add(b"/removed")
    copy = StickyDirectories(sticky)
    copy.add(b"/created")
    sticky.add(b"/meanwhile")
    sticky.discard(b"/removed")
    sticky.carry_out(copy)
    assert content(sticky, b"/created", b"/meanwhile", b"/removed") == {
        b"/created": False,
        b"/meanwhile": False,
        b"/removed": None,
    }


def test_a_long_transaction_remembers_paths_not_changes() -> None:
    """A lock directory may be created and removed many thousand times in one transaction."""
    sticky = StickyDirectories()
    copy = StickyDirectories(sticky)
    for _ in range(1000):
        copy.add(b"/lock")
        copy.discard(b"/lock")
    copy.add(b"/lock")
    told: list[bytes] = []
    sticky.on_change = told.append
    sticky.carry_out(copy)
    assert told == [b"/lock"]


def test_a_transaction_copies_nothing() -> None:
    """Many transactions may be open in the mount of a large host."""
    sticky = StickyDirectories()
    for number in range(STICKY_MAX):
        sticky.add(b"/%d" % number)
    tracemalloc.start()
    try:
        transactions = [StickyDirectories(sticky) for _ in range(256)]
        assert b"/0" in transactions[0]
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
