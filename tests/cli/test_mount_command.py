"""mount(8), umount(8) and /etc/fstab, on a host of its own (tests/support/host.py)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import REPOSITORY, Host, open_host
from tests.support.mounting import LIMIT
from tests.support.xenstored.harness import RealXenstored

NOBODY = 65534

GENERATOR = "/usr/lib/systemd/system-generators/systemd-fstab-generator"


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C") as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture(scope="module")
def machine(daemon: RealXenstored) -> Iterator[Host]:
    with open_host(daemon.socket) as machine:
        yield machine


@pytest.fixture
def host(machine: Host) -> Iterator[Host]:
    """With nothing mounted, and nothing in its fstab."""
    yield machine
    machine.unmount_all()
    machine.fstab.write_text("")


def shown(host: Host, mountpoint: str = "/mnt/xenstore") -> tuple[str, str, set[str]]:
    """The source, type and options that findmnt(8) shows."""
    source, kind, options = host.sh(
        'findmnt -n -o SOURCE,FSTYPE,OPTIONS --mountpoint "$1"', mountpoint
    ).split()
    return source, kind, set(options.split(","))


@pytest.mark.parametrize("kind", ["fuse.xsfs", "xsfs"])
def test_mount_and_umount(host: Host, kind: str) -> None:
    host.sh('mount -t "$1" xenstore /mnt/xenstore -o root=/,ro', kind)
    source, shown_kind, options = shown(host)
    assert (source, shown_kind) == ("xenstore", "fuse.xsfs")
    assert {"ro", "nosuid", "nodev", "noexec"} <= options
    assert host.sh("cat /mnt/xenstore/local/domain/0/name") == "Domain-0\n"
    assert "Read-only" in host.run("mkdir /mnt/xenstore/tool/x").stdout
    host.sh("umount /mnt/xenstore")
    assert host.sh("ls -A /mnt/xenstore") == ""


def test_a_file_called_like_the_source(host: Host) -> None:
    """mount(8) then turns the source into a path, which is no Xenstore."""
    host.sh("cd /mnt && mount -t xsfs xenstore /mnt/xenstore")
    assert shown(host)[0] == "xenstore"
    host.sh(
        "mkdir -p /tmp/m/embedded && cd /tmp/m && mount -t xsfs embedded /tmp/m; rmdir embedded"
    )
    assert shown(host, "/tmp/m")[0] == "embedded"


def test_df_shows_what_it_shows_of_sysfs(host: Host) -> None:
    host.sh("xsfs /mnt/xenstore")
    head, line = host.sh("df /mnt/xenstore").splitlines()
    assert head.startswith("Filesystem")
    assert line.split() == ["xenstore", "0", "0", "0", "-", "/mnt/xenstore"]
    assert host.sh("df -i /mnt/xenstore").split()[-6:] == line.split()
    # Without arguments df omits file systems that have no blocks.
    assert "/mnt/xenstore" not in host.sh("df")


def test_the_source_is_shown(host: Host, daemon: RealXenstored) -> None:
    odd = "/run/xenstored/a,b\\c d"
    host.sh('ln -s socket "$1"; xsfs "$1" /mnt/xenstore', odd)
    assert host.sh("findmnt -n -o SOURCE /mnt/xenstore").rstrip("\n") == odd
    host.sh("umount /mnt/xenstore; xsfs embedded /mnt/xenstore")
    assert shown(host)[0] == "embedded"
    host.sh('umount /mnt/xenstore; ln -s socket "$1"; xsfs "$1" /mnt/xenstore', "/run/xenstored/é")
    assert shown(host)[0] == "xenstore"


@pytest.mark.quick_if(kind=["fuse.xsfs"])
@pytest.mark.parametrize("kind", ["fuse.xsfs", "xsfs"])
@pytest.mark.parametrize("source", ["xenstore", "none", "/run/xenstored/socket", "embedded"])
def test_a_line_in_fstab(host: Host, kind: str, source: str) -> None:
    host.fstab.write_text(
        f"{source} /mnt/xenstore {kind} root=/,ro,nofail,_netdev,x-systemd.automount,"
        "x-systemd.requires=xenstored.service,x-systemd.after=xenstored.service,"
        "x-systemd.device-timeout=10 0 0\n"
    )
    host.sh("mount /mnt/xenstore")
    assert shown(host)[:2] == (source, "fuse.xsfs")
    assert host.sh("cat /mnt/xenstore/local/domain/0/name") == "Domain-0\n"
    host.sh("umount /mnt/xenstore")
    # mount(8) recognizes an existing mount by its source and its mountpoint.
    assert host.sh("cd /; mount -a; mount -a") == ""
    assert host.mounts() == ["/mnt/xenstore"]


@pytest.mark.parametrize("kind", ["fuse.xsfs", "xsfs"])
def test_mounted_at_the_first_use(host: Host, kind: str) -> None:
    """The mountpoint is an autofs, which lets only the process group of mount(8) through."""
    host.fstab.write_text(f"xenstore /mnt/xenstore {kind} noauto,x-systemd.automount 0 0\n")
    said = host.sh(
        "/mnt/.python/bin/python /mnt/.repository/tests/support/automount.py /mnt/xenstore"
        " mount /mnt/xenstore"
    )
    assert said == "Domain-0\n"


def test_mount_with_another_fstab(host: Host) -> None:
    host.sh(
        "echo 'xenstore /mnt/xenstore xsfs umask=022,noauto 0 0' > /tmp/fstab.xsfs;"
        "mount -T /tmp/fstab.xsfs -a; findmnt /mnt/xenstore && exit 1;"
        "mount -T /tmp/fstab.xsfs /mnt/xenstore; rm /tmp/fstab.xsfs"
    )
    assert host.sh("stat -c %A /mnt/xenstore/name") == "-rw-r--r--\n"


def test_a_user_mounts_what_fstab_lets_him(host: Host) -> None:
    """mount(8) gives its helpers the rights of the user, who can mount the embedded store."""
    mountpoint = "/tmp/mine"
    host.fstab.write_text(f"embedded {mountpoint} fuse.xsfs user,noauto 0 0\n")
    host.sh(f"mkdir -p {mountpoint}; chown {NOBODY} {mountpoint}")
    host.sh(f"mount {mountpoint}", user=NOBODY)
    assert f"user_id={NOBODY}" in shown(host, mountpoint)[2]
    assert host.sh(f"cat {mountpoint}/name", user=NOBODY) == "Domain-0\n"
    assert "Permission denied" in host.run(f"cat {mountpoint}/name").stdout  # root, too
    host.sh(f"umount {mountpoint}", user=NOBODY)
    assert host.mounts() == []
    # The real Xenstore belongs to root.
    host.fstab.write_text(f"xenstore {mountpoint} xsfs user,noauto 0 0\n")
    done = host.run(f"mount {mountpoint}", user=NOBODY)
    assert done.returncode == 4
    assert done.stdout.startswith("xsfs: permission denied: /var/run/xenstored/socket (")


def test_remount(host: Host) -> None:
    host.sh("mount -t xsfs xenstore /mnt/xenstore")
    done = host.run("mount -o remount,ro /mnt/xenstore")
    assert done.returncode == 2
    assert "mount -i -o remount,bind,ro" in done.stdout
    host.sh("mount -i -o remount,bind,ro /mnt/xenstore")
    assert "Read-only" in host.run("mkdir /mnt/xenstore/data/x").stdout
    host.sh("mount -i -o remount,bind,rw /mnt/xenstore; mkdir /mnt/xenstore/data/x")


def test_options_that_the_kernel_shows(host: Host) -> None:
    """mount(8) of util-linux 2.41 reads them from the mount that it is to remount."""
    host.sh("mount -t xsfs -o allow_other,umask=022 xenstore /mnt/xenstore")
    shows = host.sh("awk '$2 == \"/mnt/xenstore\" { print $4 }' /proc/mounts").strip()
    assert {"user_id=0", "group_id=0", "allow_other"} <= set(shows.split(","))
    done = host.run(f"mount.xsfs xenstore /mnt/xenstore -o {shows},remount,ro")
    assert done.returncode == 2
    assert "mount -i -o remount,bind,ro" in done.stdout
    host.sh(f"umount /mnt/xenstore; mount.xsfs xenstore /mnt/xenstore -o {shows},max_read=4096")
    assert host.mounts() == ["/mnt/xenstore"]


def test_flags_of_mount(host: Host) -> None:
    # -f: xsfs checks the options, and does not mount.
    host.sh("mount -f -t xsfs xenstore /mnt/xenstore")
    assert host.mounts() == []
    assert host.run("mount -f -t xsfs -o nonsense xenstore /mnt/xenstore").returncode == 2
    # -s: xsfs ignores unknown options.
    assert host.run("mount -t xsfs -o nonsense xenstore /mnt/xenstore").returncode == 2
    host.sh("mount -s -n -t xsfs -o nonsense,root=/ xenstore /mnt/xenstore")
    assert "local" in host.sh("ls /mnt/xenstore").split()
    host.sh("umount /mnt/xenstore")
    said = host.sh("mount -v -r -t xsfs xenstore /mnt/xenstore")
    assert said == "xsfs: xenstore mounted on /mnt/xenstore\n"
    assert "ro" in shown(host)[2]
    host.sh("umount /mnt/xenstore; mount -w -t xsfs xenstore /mnt/xenstore")
    assert "rw" in shown(host)[2]


def test_failures_reach_mount(host: Host) -> None:
    for arguments, status, words in (
        ("/run/nothing /mnt/xenstore", 3, "No such file"),
        ("xenstore /mnt/missing", 5, "does not exist"),
        ("xenstore /mnt/xenstore -o root=x", 2, "must begin with /"),
        ("/etc/passwd /mnt/xenstore", 3, "neither a socket nor a device (SOURCE must be"),
    ):
        done = host.run(f"mount -t xsfs {arguments}")
        assert done.returncode == status
        assert words in done.stdout


def line_of_the_manual() -> str:
    """The line that it recommends for /etc/fstab."""
    found = re.search(r"^\.Dl (xenstore .*)$", (REPOSITORY / "docs" / "xsfs.8").read_text(), re.M)
    assert found is not None
    return found[1]


def test_the_line_of_the_manual(host: Host) -> None:
    host.fstab.write_text(f"{line_of_the_manual()}\n")
    host.sh("cd /; mount -a")
    assert host.sh("cat /mnt/xenstore/name") == "Domain-0\n"


def test_systemd_makes_a_unit_of_it(tmp_path: Path) -> None:
    """systemd passes the options of the unit to mount(8)."""
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{line_of_the_manual()}\n")
    options = line_of_the_manual().split()[3]
    units = tmp_path / "units"
    units.mkdir()
    subprocess.run(
        [GENERATOR, units, units, units],
        env={"SYSTEMD_FSTAB": str(fstab), "SYSTEMD_LOG_TARGET": "console"},
        check=True,
        timeout=LIMIT,
    )
    unit = (units / "mnt-xenstore.mount").read_text().splitlines()
    assert {"What=xenstore", "Where=/mnt/xenstore", "Type=fuse.xsfs"} <= set(unit)
    assert {"After=xen.service", f"Options={options}"} <= set(unit)
    # Xenstore's services start after local-fs.target: the mount must not come before it.
    assert not [line for line in unit if line.startswith("Before=")]
