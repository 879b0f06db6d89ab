"""Which empty nodes are directories by custom."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsfs.view.kinds import EMPTY, container_at, is_container
from xsfs.view.names import join

HOME = b"/local/domain/5"

NAMES = st.sampled_from(
    b"local domain pool vm libxl tool xenstored device remus error attr backend device-model cpu vbd "
    b"suspend backends image qdisk 5 51712 x A-b".split()
)


IN: Mapping[bytes, str] = {
    b"/": "libxl local tool vm",
    b"/libxl": "0 12",
    b"/libxl/5": "device remus",
    b"/local": "domain pool",
    b"/local/domain": "0 12",
    b"/local/pool": "0 12",
    b"/tool": "xenstored",
    b"/vm": "a-B_c 0",
    b"/vm/x": "device image rtc",
    HOME: "attr backend bios-strings console control cpu data device device-model drivers error "
    "feature hvmloader image libxl memory platform serial store",
    HOME + b"/attr": "PVAddons backend device hotplug vbd vif",
    HOME + b"/backend": "vbd 9pfs a_2",
    HOME + b"/backend/vbd": "0 12",
    HOME + b"/backend/vbd/7": "51712",
    HOME + b"/cpu": "0 12",
    HOME + b"/device": "console pvcalls suspend vbd vfb vif vkbd vscsi vusb",
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
"""What of libxl and xenstore-paths.pandoc is made empty, by what it is in."""

OTHERS = b"x a-b 5x 5a x5 A name suspend".split()


@pytest.mark.parametrize("above", IN)
def test_what_is_a_container(above: bytes) -> None:
    for name in IN[above].encode().split():
        assert is_container(join(above, name)), name


@pytest.mark.parametrize("above", [above for above in IN if above != b"/vm"])
def test_what_is_none(above: bytes) -> None:
    own = IN[above].encode().split()
    types = above.endswith(b"/backend")
    for name in OTHERS:
        if name not in own and not (types and re.fullmatch(rb"[a-z0-9]+", name)):
            assert not is_container(join(above, name)), name


@pytest.mark.parametrize("above", [b"/vm/x/rtc", HOME + b"/data", HOME + b"/cpu/0", b"/other"])
def test_what_none_is_in(above: bytes) -> None:
    for name in (*OTHERS, b"0", b"device"):
        assert not is_container(join(above, name)), name


@given(st.lists(NAMES, max_size=7), NAMES)
def test_a_child_is_one_if_its_container_says_so(above: list[bytes], name: bytes) -> None:
    """A listing relies on it: below anything else it looks for none."""
    path = b"/" + b"/".join(above)
    container = container_at(path)
    child = container_at(join(path, name))
    assert child is (None if container is None else container.get(name))
    assert not (container is EMPTY and child)
