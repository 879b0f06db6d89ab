"""install.sh, on a copy of this machine's whole file system that takes all changes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import REPOSITORY

INSTALL_LIMIT = 1800.0
"""Seconds that packages, the build and a mount may take on a busy machine."""

_SETUP = """\
set -eu
root=$1 sources=$2
# A copy of a mount keeps its xsfs running when the mount itself has gone.
umount -l -a -t fuse.xsfs || :
mount -t tmpfs none "$root"
mkdir "$root/changes" "$root/work" "$root/all"
mount -t overlay -o "lowerdir=/,upperdir=$root/changes,workdir=$root/work" overlay "$root/all"
cd "$root/all"
mount --rbind /dev dev
mount -t proc proc proc
for directory in run mnt tmp; do mount -t tmpfs none "$directory"; done
rm -rf opt/xsfs usr/local/bin/xsfs* usr/sbin/mount.xsfs
cp -R "$sources" tmp/xsfs
echo ready
# The end of stdin is the end of it.
cat
umount -l -a -t fuse.xsfs
"""


class Machine:
    def __init__(self, holder: subprocess.Popen[str], root: Path) -> None:
        self._holder = holder
        self._root = root / "all"

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """A shell in the copied sources; stderr is part of stdout."""
        return subprocess.run(
            [
                *("nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--wdns=/"),
                *("chroot", str(self._root), "sh", "-c", f"cd /tmp/xsfs\n{script}"),
            ],
            # The installed xsfs must not find the sources under test, nor the machine another's TMPDIR, and
            # no virtual environment may come first.
            env={
                name: value
                for name, value in os.environ.items()
                if name not in ("PYTHONPATH", "TMPDIR")
            }
            | {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_LIMIT,
            check=False,
        )

    def sh(self, script: str) -> str:
        """The output of a shell that must succeed."""
        done = self.run(f"set -e\n{script}")
        assert done.returncode == 0, f"{script!r}: {done.stdout}"
        return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    sources, root = tmp_path / "sources", tmp_path / "root"
    left = shutil.ignore_patterns(".?*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, sources, ignore=left)
    root.mkdir()
    command = ["unshare", "--mount", "--propagation=private", "sh", "-c", _SETUP, "sh"]
    with subprocess.Popen(
        [*command, str(root), str(sources)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        try:
            yield Machine(holder, root)
        finally:
            holder.stdin.close()
            holder.wait(INSTALL_LIMIT)


@pytest.mark.slow
@pytest.mark.ci
def test_install_upgrade_and_uninstall(machine: Machine) -> None:
    before = machine.sh("find . | sort")
    assert machine.sh("./install.sh").endswith("to unmount: umount /mnt/xenstore\n")
    assert machine.sh("cat /mnt/xenstore/name; echo 42 > /mnt/xenstore/data/x") == "Domain-0\n"
    assert machine.sh("xsfs-watch -n 1 /mnt/xenstore/data") == "/mnt/xenstore/data\n"
    assert "mount Xenstore" in machine.sh("man -M /usr/local/share/man xsfs")
    assert machine.sh("find . | sort") == before, "the build has left something"

    # Again, with another version: what the mounted store contains is not lost.
    machine.sh("echo '__version__ = \"0.1.99\"' > xsfs/__init__.py")
    assert "mounted at /mnt/xenstore already" in machine.sh("./install.sh")
    assert machine.sh("xsfs --version; cat /mnt/xenstore/data/x") == "xsfs 0.1.99\n42\n"

    # A mount whose process has died is replaced.
    machine.sh(
        "umount /mnt/xenstore; /opt/xsfs/bin/xsfs -f embedded /mnt/xenstore & xsfs=$!;"
        "until mountpoint -q /mnt/xenstore; do sleep 0.1; done; kill -KILL $xsfs; wait || true"
    )
    assert "not connected" in machine.run("ls /mnt/xenstore").stdout
    machine.sh("./install.sh")
    assert machine.sh("cat /mnt/xenstore/name") == "Domain-0\n"

    # A running xsfs needs its files.
    refused = machine.run("./install.sh --uninstall")
    assert refused.returncode == 1
    assert "umount first: /mnt/xenstore" in refused.stdout
    machine.sh("umount /mnt/xenstore; ./install.sh --uninstall")
    left = "! test -e /opt/xsfs; find /usr/local /usr/sbin -name '*xsfs*'"
    assert machine.sh(left) == ""
