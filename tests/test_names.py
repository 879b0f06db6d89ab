"""Names: which empty nodes are directories by custom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xsfs.names import _CONTAINER, is_container, parent_path


@given(st.from_regex(_CONTAINER, fullmatch=True))
def test_what_a_container_is_in_is_one_too(path: bytes) -> None:
    """A listing relies on it: below anything else it looks for none."""
    assert is_container(parent_path(path))


def test_what_is_a_container() -> None:
    home = b"/local/domain/5"
    for path in (
        b"/vm",
        b"/libxl/5/device",
        home + b"/device/vif/0",
        home + b"/error/backend/qdisk/7/1",
    ):
        assert is_container(path)
    for path in (b"/vm/x/name", home + b"/name", home + b"/device/vif/0/mac", b"/other"):
        assert not is_container(path)
