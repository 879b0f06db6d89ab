"""The checks of the tree and of the device, inside the domU."""

from __future__ import annotations

import pytest

from tests.system.xen.checks.guest import Guest

CHECKS = "tests/system/xen/checks"


def test_inside(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"/lab/share/tests/system/xen/machine/run-checks"
        f" {CHECKS}/check_tree.py {CHECKS}/check_device.py"
    )
    status, output = guest.run(command, limit=900)
    with capsys.disabled():
        print(*("", *output.splitlines()), sep="\n  [domU] ")
    assert status == 0, guest.bash("free -m; dmesg | tail -n 20")
