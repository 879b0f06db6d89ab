"""Ring: the wire, with any bytes at all.  The long run is `python3 -m tests.support.fuzz`."""

from __future__ import annotations

import pytest

from tests.support import fuzz
from xsfs.xenstore import protocol


@pytest.mark.quick_if(inputs=[10_000])
@pytest.mark.parametrize("inputs", [10_000, 100_000])
def test_a_bounded_run(inputs: int) -> None:
    assert fuzz.fuzz(inputs, 60.0) >= 5000


def test_it_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that trusts what it gets is found out."""
    monkeypatch.setattr(fuzz, "DECODERS", (lambda payload: payload[0], protocol.decode_error))
    with pytest.raises(IndexError):
        fuzz.fuzz(5000, 20.0)
