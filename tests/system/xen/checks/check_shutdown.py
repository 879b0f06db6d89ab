"""The end of the domU that the other checks share."""

from __future__ import annotations

from pathlib import Path

from tests.support.mounting import Mount
from tests.system.xen.checks.check_domains import heard, lines
from tests.system.xen.checks.guest import Guest
from tests.system.xen.checks.machine import until


def test_poweroff(guest: Guest, dom0: Mount, tmp_path: Path) -> None:
    """The mount ends it: `echo poweroff > control/shutdown`."""
    home = dom0.path / guest.home[1:]
    with heard(dom0, tmp_path, "@releaseDomain") as said:
        released = lines(said).count("@releaseDomain")
        dom0.bash(f"echo poweroff > .{guest.home}/control/shutdown")
        guest.wait_end()
        until(lambda: lines(said).count("@releaseDomain") > released, "its death")
        until(lambda: not home.exists(), "its nodes are gone")
