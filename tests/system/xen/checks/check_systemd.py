"""xsfs as a service, and in fstab, of a real systemd: in dom0, and in a domU at the end."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.xen.checks.guest import Guest
from tests.system.xen.checks.machine import DAEMON, LIMIT, shell, until

MOUNT = Path("/mnt/xenstore")
UNIT = "xsfs.service"
XEN = "/usr/lib/xen-4.17/bin"


def show(unit: str, name: str) -> str:
    return shell(f"systemctl show --value -p {name} {unit}").strip()


def answers(path: Path = MOUNT) -> bool:
    try:
        return (path / "name").read_text() == "Domain-0\n"
    except OSError:
        return False


def journal(unit: str) -> list[tuple[int, str]]:
    """The level and the text of each line."""
    lines = shell(f"journalctl --no-pager -o json -u {unit} SYSLOG_IDENTIFIER=xsfs").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(int(entry["PRIORITY"]), entry["MESSAGE"]) for entry in entries]


@pytest.fixture
def running() -> Iterator[str]:
    """The service, active; it is so again afterwards."""
    shell(f"systemctl start {UNIT}")
    yield UNIT
    shell(f"systemctl start {UNIT}")
    assert answers()


def test_the_units_are_in_order() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", UNIT, "xsfs@srv-xen.service"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, "xsfs" in done.stderr) == (0, False), done.stderr


def test_mounted_after_boot() -> None:
    """Enabled, it is there when the machine is up, and began after the daemons."""
    assert show(UNIT, "ActiveState") == "active"
    assert answers()
    started = int(show(UNIT, "ExecMainStartTimestampMonotonic"))
    assert 0 < int(show("xen.service", "ActiveEnterTimestampMonotonic")) <= started
    assert show(UNIT, "NRestarts") == "0"
    assert shell("systemctl --failed --no-legend --plain") == "", shell("journalctl -p warning")


def test_what_status_shows(running: str) -> None:
    said = shell(f"systemctl status --no-pager {running}")
    print(said)
    assert "Active: active (running)" in said
    assert 'Status: "/local/domain/0 of /var/run/xenstored/socket at /mnt/xenstore"' in said
    assert "Docs: man:xsfs(8)" in said


def test_the_mount_is_the_hosts(running: str) -> None:
    """Hardened as it is, it has no mount namespace of its own."""
    process = show(running, "MainPID")
    assert os.readlink(f"/proc/{process}/ns/mnt") == os.readlink("/proc/1/ns/mnt")
    assert shell("nsenter -t 1 -m cat /mnt/xenstore/name") == "Domain-0\n"


def test_stop_and_start(running: str) -> None:
    """Each is done when the command returns."""
    shell(f"systemctl stop {running}")
    assert not os.path.ismount(MOUNT)
    assert show(running, "Result") == "success"
    shell(f"systemctl start {running}")
    assert answers()
    shell(f"systemctl restart {running}")
    assert answers()


def test_umount_is_an_end_like_any_other(running: str) -> None:
    shell(f"umount {MOUNT}")
    until(lambda: show(running, "ActiveState") == "inactive", "it has ended")
    assert show(running, "Result") == "success"


def test_killed_it_comes_again(running: str) -> None:
    """With a clean mountpoint, though a process was there."""
    before = show(running, "MainPID")
    with subprocess.Popen(["sleep", "1000"], cwd=MOUNT) as user:
        shell(f"systemctl kill --signal=KILL {running}")
        until(lambda: show(running, "MainPID") not in ("0", before), "it was started again")
        until(answers, "it answers again")
        user.kill()
    assert shell(f"findmnt -n -o TARGET {MOUNT}").split() == [str(MOUNT)]
    assert show(running, "NRestarts") == "1"


def test_in_a_domu() -> None:
    """The same unit, where there is no daemon to wait for."""
    with Guest("service") as guest:
        status = guest.bash("systemctl status --no-pager xsfs.service")
        print(status)
        assert "Active: active (running)" in status
        assert f'Status: "{guest.home} of /dev/xen/xenbus at /mnt/xenstore"' in status
        assert guest.bash("cat /mnt/xenstore/.domid").strip() == str(guest.domid)
        assert guest.bash("systemctl --failed --no-legend --plain") == ""
        guest.bash("systemctl kill --signal=KILL xsfs.service")
        until(lambda: guest.run("cat /mnt/xenstore/.domid")[0] == 0, "it is there again")
        assert guest.bash("systemctl show --value -p NRestarts xsfs.service").strip() == "1"


def test_xenstored_starts_again_under_it(running: str) -> None:
    process = show(running, "MainPID")
    (MOUNT / "data/before").write_text("1")
    program = "oxenstored" if DAEMON == "ocaml" else "xenstored"
    shell(f"kill -KILL $(pidof {program}); rm -f /run/xenstore.pid")
    assert not answers()
    shell(f"{XEN}/{program} --pid-file /run/xenstore.pid")
    until(lambda: subprocess.run(["xenstore-read", "-s", "/"]).returncode == 0, "a new daemon")
    shell(f"{XEN}/xen-init-dom0")
    until(answers, "the new daemon's store")
    assert not (MOUNT / "data/before").exists()
    assert show(running, "MainPID") == process
    # If somebody has waited for half the time limit meanwhile, xsfs says it in other words.
    back = (4, "connected to Xenstore again"), (4, "Xenstore answers again")
    until(lambda: any(each in journal(running) for each in back), "the log says that it is back")


def test_a_template_for_other_places() -> None:
    unit = "xsfs@srv-a\\x20b.service"  # systemd-escape --path "/srv/a b"
    shell(f"systemctl start '{unit}'")
    try:
        assert answers(Path("/srv/a b"))
    finally:
        shell(f"systemctl stop '{unit}'")
    assert not os.path.ismount("/srv/a b")


def test_what_cannot_be_mended_is_not_tried_again() -> None:
    Path("/etc/default/xsfs-srv-bad").write_text("OPTIONS=-o nonsense\n")
    assert subprocess.run(["systemctl", "start", "xsfs@srv-bad.service"]).returncode != 0
    assert show("xsfs@srv-bad.service", "ActiveState") == "failed"
    assert show("xsfs@srv-bad.service", "NRestarts") == "0"
    shell("systemctl reset-failed xsfs@srv-bad.service")


def test_a_store_that_comes_late() -> None:
    """Tried again until there is one; the log says why, as an error, and the status too."""
    unit = "xsfs@srv-late.service"
    Path("/etc/default/xsfs-srv-late").write_text("SOURCE=/run/late\n")
    shell(f"systemctl start --no-block {unit}")
    try:
        until(lambda: show(unit, "NRestarts") not in ("", "0"), "it is tried again")
        until(
            lambda: any(level == 3 and "/run/late" in text for level, text in journal(unit)),
            "the log says why",
        )
        os.symlink("/var/run/xenstored/socket", "/run/late")
        until(lambda: answers(Path("/srv/late")), "it is there")
        assert "/run/late" in show(unit, "StatusText")
    finally:
        shell(f"systemctl stop {unit}")


def test_fstab_at_boot() -> None:
    state = show("srv-fstab.mount", "ActiveState")
    assert state == "active", shell("journalctl --no-pager -u srv-fstab.mount")
    assert {"local", "tool"} <= set(os.listdir("/srv/fstab"))
    kind, options = shell("findmnt -n -o FSTYPE,OPTIONS /srv/fstab").split()
    assert kind == "fuse.xsfs"
    assert "ro" in options.split(",")


def test_fstab_by_hand() -> None:
    """mount -a mounts what is not mounted, and nothing twice."""
    shell("umount /srv/fstab")
    assert not os.path.ismount("/srv/fstab")
    until(lambda: show("srv-fstab.mount", "ActiveState") == "inactive", "systemd has seen it")
    for _ in range(2):
        shell("mount -a")
        assert shell("findmnt -n -o TARGET /srv/fstab").split() == ["/srv/fstab"]
    assert "local" in os.listdir("/srv/fstab")
    shell("systemctl stop srv-fstab.mount; systemctl start srv-fstab.mount")
    assert "local" in os.listdir("/srv/fstab")


def test_fstab_at_first_use() -> None:
    """Mounted for who comes, and gone when it has not been used for a while."""

    def mounted() -> bool:
        return "/srv/automatic" in shell("findmnt -n -l -o TARGET -t fuse.xsfs").split()

    assert show("srv-automatic.automount", "ActiveState") == "active"
    for _ in range(2):
        assert not mounted()
        assert (Path("/srv/automatic") / "domain/0/name").read_text() == "Domain-0\n"
        assert mounted()
        until(lambda: not mounted(), "it is unmounted")
    assert show("srv-automatic.mount", "Result") == "success"
