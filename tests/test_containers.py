"""Which empty nodes are directories by custom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsfs.containers import EMPTY, container_at, is_container
from xsfs.names import join

HOME = b"/local/domain/5"

NAMES = st.sampled_from(
    b"local domain pool vm libxl tool xenstored device remus error attr backend device-model cpu vbd "
    b"suspend backends image qdisk 5 51712 x A-b".split()
)


@pytest.mark.parametrize(
    "path",
    [
        *(b"/", b"/local", b"/local/pool/0", b"/local/domain", b"/vm/a-b/rtc", b"/tool/xenstored"),
        *(b"/libxl", b"/libxl/5", b"/libxl/5/device"),
        *(HOME, HOME + b"/data", HOME + b"/bios-strings", HOME + b"/cpu/0"),
        *(HOME + b"/attr/PVAddons", HOME + b"/feature/hotplug", HOME + b"/error/vif"),
        *(HOME + b"/backend/vbd", HOME + b"/backend/vbd/7", HOME + b"/backend/a_2/7/51712"),
        *(HOME + b"/device/vif/0", HOME + b"/device/suspend", HOME + b"/error/backend/qdisk/7/1"),
        *(HOME + b"/error/device/vkbd/0", HOME + b"/device-model/7/backends"),
    ],
)
def test_what_is_a_container(path: bytes) -> None:
    assert is_container(path)


@pytest.mark.parametrize(
    "path",
    [
        *(b"/other", b"/vm/x/name", b"/local/pool/x", b"/local/domain/x", b"/libxl/5/vif"),
        *(HOME + b"/name", HOME + b"/data/x", HOME + b"/backend/A", HOME + b"/backend/vbd/7/1/2"),
        *(HOME + b"/device/vif/x", HOME + b"/device/vif/0/mac", HOME + b"/error/device/suspend"),
        *(HOME + b"/feature/device/vbd", HOME + b"/device-model/7/x", HOME + b"/cpu/0/x"),
    ],
)
def test_what_is_none(path: bytes) -> None:
    assert not is_container(path)


@given(st.lists(NAMES, max_size=7), NAMES)
def test_a_child_is_one_if_its_container_says_so(above: list[bytes], name: bytes) -> None:
    """A listing relies on it: below anything else it looks for none."""
    path = b"/" + b"/".join(above)
    container = container_at(path)
    child = container_at(join(path, name))
    assert child is (None if container is None else container.get(name))
    assert not (container is EMPTY and child)
