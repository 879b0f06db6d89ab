"""The end of the domU that the other checks share."""

from __future__ import annotations

from pathlib import Path

from tests.support.mounting import Mount
from tests.system.xen.checks.check_domains import heard, lines
from tests.system.xen.checks.guest import Guest
from tests.system.xen.checks.machine import shell, until


def test_xl_shutdown(guest: Guest, dom0: Mount, tmp_path: Path) -> None:
    """xl asks it to halt by the node that the mount shows, and tidies up."""
    with heard(dom0, tmp_path, guest.home) as said:
        wanted = f"{guest.home[1:]}/control/shutdown"
        shell(f"xl shutdown {guest.name}")
        until(lambda: wanted in lines(said), "the request")
        guest.wait_end()
        until(lambda: not (dom0.path / guest.home[1:]).exists(), "its nodes are gone")
