"""What a guest sees in `.domain`: mostly itself."""

from __future__ import annotations

import os

from tests.support.mounting import GUEST, Mount, Place, each_place

place = each_place("C-guest", "ocaml-guest")


def test_a_guest_sees_itself(place: Place, mount: Mount) -> None:
    name = (mount.path / "name").read_text().strip()
    assert os.listdir(mount.path / ".domain") == [name]
    assert os.readlink(mount.path / ".domain" / name) == f"../.root/local/domain/{GUEST}"
    assert (mount.path / ".domain" / name / "domid").read_text() == f"{GUEST}\n"
