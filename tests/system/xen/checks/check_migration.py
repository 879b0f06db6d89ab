"""The domU is saved and restored, as in a migration: it has another domid and home afterwards."""

from __future__ import annotations

from pathlib import Path

from tests.support.mounting import Mount
from tests.system.xen.checks.check_domains import heard, lines
from tests.system.xen.checks.guest import Guest
from tests.system.xen.checks.machine import until

BEFORE = """
mkdir -p /mnt/mirrored
xsfs -o mirror=/run/mirror /mnt/mirrored
cd /mnt/xenstore
echo 1 > data/before
mkdir .transaction/migrated
cat .transaction/migrated/data/before
python3 /lab/share/xsfs/cli/watch.py data > /tmp/watched 2>&1 & echo $! > /tmp/watcher
cat data/.watch > /tmp/heard 2>&1 & echo $! > /tmp/reader
"""

STOPPED = """
kill -STOP $(cat /tmp/reader)
until grep -q '^State:.T' /proc/$(cat /tmp/reader)/status; do sleep 0.1; done
"""
"""A program that waits in read(2) of a watch file keeps the kernel from freezing it."""


def test_saved_and_restored(guest: Guest, dom0: Mount, tmp_path: Path) -> None:
    """Mounts, the mirror and readers of `.watch` go on in the new home."""
    guest.bash(BEFORE)
    until(lambda: guest.bash("cat /tmp/watched") == "data\n", "xsfs-watch watches")
    until(lambda: guest.bash("cat /tmp/heard") == ".\n", "the watch is armed")
    guest.bash(STOPPED)
    before = guest.domid
    with heard(dom0, tmp_path, guest.home) as said:
        wanted = f"{guest.home[1:]}/control/shutdown"  # by this node xl asks it to suspend
        guest.save_and_restore()
        until(lambda: wanted in lines(said), "xl's request")
    guest.bash("kill -CONT $(cat /tmp/reader)")
    assert guest.domid != before
    data = dom0.path / guest.home[1:] / "data"
    until(
        lambda: guest.bash("cat /mnt/xenstore/.domid") == f"{guest.domid}\n", "it knows its domid"
    )
    assert guest.bash("cat /mnt/xenstore/domid") == f"{guest.domid}\n"
    guest.bash("echo 2 > /mnt/xenstore/data/mine")
    assert (data / "mine").read_text() == "2\n"
    path = guest.bash(
        "getfattr --absolute-names --only-values -n user.xs.path /mnt/xenstore/data/mine"
    )
    assert path == f"{guest.home}/data/mine"
    (data / "from-dom0").write_text("3\n")
    _heard(guest, "/tmp/watched", "data", "data/from-dom0")
    _heard(guest, "/tmp/heard", ".", "from-dom0")
    mirrored = "cat /run/mirror/domid /run/mirror/data/from-dom0"
    until(lambda: guest.run(mirrored) == (0, f"{guest.domid}\n3\n"), "the mirror")
    assert guest.bash("ls /mnt/xenstore/.transaction") == ""
    guest.bash(
        "kill $(cat /tmp/watcher /tmp/reader); umount /mnt/mirrored;"
        " cd /mnt/xenstore/.transaction && mkdir t && echo commit > t/.control"
    )


def _heard(guest: Guest, output: str, first: str, changed: str) -> None:
    """A reader was told once more to look at everything, and then of a change."""

    def told() -> list[str]:
        return guest.bash(f"cat {output}").splitlines()

    until(lambda: changed in told(), f"{output} has the change")
    assert told().index(first, 1) < told().index(changed)
