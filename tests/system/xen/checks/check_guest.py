"""The checks of the tree and of the device, inside the domU."""

from __future__ import annotations

import pytest

from tests.system.xen.checks.guest import Guest


@pytest.mark.parametrize("name", ["tree", "device"])
def test_inside(name: str, guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"/lab/share/tests/system/xen/machine/run-checks tests/system/xen/checks/check_{name}.py"
    )
    status, output = guest.run(command, limit=600)
    with capsys.disabled():
        print(*("", *output.splitlines()), sep="\n  [domU] ")
    assert status == 0, guest.bash("free -m; dmesg | tail -n 20")
