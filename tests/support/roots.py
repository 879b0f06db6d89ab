"""A Debian of its own: a root directory with nothing in it that a Debian need not have, and commands
that run there.

Roots are made by debootstrap, or from what it made before if /var/cache/xsfs-roots is a directory.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.host import REPOSITORY
from tests.support.mirroring import await_true

CACHE: Final = Path("/var/cache/xsfs-roots")

LIMIT: Final = 4 * 3600.0
"""Seconds that one command in a root may take.  On a quiet machine a thousand tests take six minutes."""

# What the machine trusts, and where it fetches from, hold in its roots, too.
_CERTIFICATES: Final = "/etc/certificates-of-the-machine"
_PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy")

_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "PIP_CERT": _CERTIFICATES,
    **{name: os.environ[name] for name in _PROXIES if name in os.environ},
}

# Mounts and processes are those of namespaces of their own: all end with the first process in them.
_NAMESPACES: Final = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"),
    *("env", "-i", *(f"{name}={value}" for name, value in _ENVIRONMENT.items())),
)

_BOOT_NAMESPACES: Final = ("unshare", "--uts", "--ipc", "--cgroup", *_NAMESPACES)

_SETUP: Final = """\
set -eu
root=$1
# A copy of a mount keeps its xsfs running when the mount itself has gone.
umount -l -a -t fuse.xsfs
# One root at a time has the downloads of its suite: apt does not wait for another's lock.
exec 9> "$2/lock"
flock 9
# A mount, as "/" is on a machine.
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc "$root/proc"
mount --bind "$2/archives" "$root/var/cache/apt/archives"
mkdir -p "$root/root/.cache/pip"
mount --bind "$2/pip" "$root/root/.cache/pip"
mount -t tmpfs -o mode=1777 none "$root/tmp"
mount -t tmpfs -o mode=755 none "$root/run"
[ ! -e /etc/resolv.conf ] || cp -L /etc/resolv.conf "$root/etc/resolv.conf"
"""

_ENTER: Final = f"""\
{_SETUP}
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
pivot_root . .
umount -l .
# This shell stays: as the first process it reaps what daemons leave.
sh -euc "$3" &
wait "$!"
"""

# With devices of its own, as systemd changes what is in /dev.
_BOOT: Final = f"""\
{_SETUP}
mount -t tmpfs -o mode=755 none "$root/dev"
for device in null zero full random urandom tty fuse; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
pivot_root . .
umount -l .
exec env container=xsfs-test /lib/systemd/systemd --unit=basic.target --log-target=console --show-status=0
"""


def _call(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{command[:2]}: {done.stdout}"
    return done.stdout


@functools.cache
def _downloads(suite: str) -> Path:
    """Where all roots of a suite keep what apt and pip have downloaded, and what pip has compiled."""
    if CACHE.is_dir():
        directory = CACHE / suite
    else:
        directory = Path(tempfile.mkdtemp(prefix=f"xsfs-{suite}-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name in ("archives", "pip"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return directory


class Root:
    """See the module's text."""

    def __init__(self, path: Path, suite: str) -> None:
        self.path = path
        self._downloads = _downloads(suite)

    def sh(self, script: str) -> str:
        """What the script prints, run there by a shell as root; it must succeed."""
        return _call(*_NAMESPACES, "sh", "-c", _ENTER, "enter", self.path, self._downloads, script)

    @contextmanager
    def booted(self) -> Iterator[Booted]:
        """The root with its systemd running as the first process."""
        log = self.path.with_suffix(".log")
        with log.open("wb") as output:
            outer = subprocess.Popen(
                [
                    *_BOOT_NAMESPACES,
                    "sh",
                    "-c",
                    _BOOT,
                    "boot",
                    str(self.path),
                    str(self._downloads),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        with outer:
            try:
                await_true(lambda: _child_of(outer.pid) is not None)
                booted = Booted(outer.pid)
                await_true(booted.is_up)
                yield booted
            except BaseException:
                print(log.read_text(errors="replace"))
                raise
            finally:
                outer.kill()


class Booted:
    """A root whose systemd runs.  Its mounts and processes last until it ends."""

    def __init__(self, outer: int) -> None:
        """`outer` has the first process as its only child."""
        pid = _child_of(outer)
        self._enter = ("nsenter", f"--target={pid}", "--mount", "--pid", "--ipc", "--cgroup")

    def is_up(self) -> bool:
        command = (*self._enter, "systemctl", "is-system-running")
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        return done.stdout.strip() in ("running", "degraded")

    def sh(self, script: str) -> str:
        """What the script prints, run there by a shell as root; it must succeed."""
        environment = (f"{name}={value}" for name, value in _ENVIRONMENT.items())
        return _call(*self._enter, "env", "-i", *environment, "sh", "-euc", script)


def _child_of(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


@contextmanager
def debian_root(suite: str, path: Path) -> Iterator[Root]:
    """A fresh Debian of that suite ("bookworm") at `path`, removed at the end."""
    saved = CACHE / f"{suite}.tar"
    try:
        if saved.exists():
            path.mkdir()
            _call("tar", "-x", "--numeric-owner", "-f", saved, "-C", path)
        else:
            _call("debootstrap", "--variant=minbase", suite, path)
            if CACHE.is_dir():
                part = saved.with_suffix(".part")
                _call("tar", "-c", "--numeric-owner", "-f", part, "-C", path, ".")
                part.rename(saved)
        trusted = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        shutil.copy(trusted, f"{path}{_CERTIFICATES}")
        yield Root(path, suite)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def copy_checkout(target: Path) -> None:
    """A copy of the project, without what a build or a test has left there."""
    left = shutil.ignore_patterns(".?*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, target, ignore=left)
