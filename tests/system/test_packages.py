"""Ring: what is installed.  The wheel, the source distribution and the Debian package are built from a
copy of the project, installed where nothing of it is, and used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import REPOSITORY
from tests.support.mounting import LIMIT
from xsfs import __version__

BUILD_LIMIT = 300.0
"""Seconds that building, or fetching what is needed for it, may take."""


def run(*command: str | Path, limit: float = BUILD_LIMIT) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, without what a build or a test has left there."""
    copy = tmp_path_factory.mktemp("project") / "xsfs"
    left = shutil.ignore_patterns(".?*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, copy, ignore=left)
    return copy


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", directory, project)
    (path,) = directory.iterdir()
    return path


@pytest.fixture(scope="module")
def source(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    build = "import os, sys; from setuptools import build_meta as b; "
    build += "os.chdir(sys.argv[1]); b.build_sdist(sys.argv[2])"
    run(sys.executable, "-c", build, project, directory)
    (path,) = directory.iterdir()
    return path


def test_the_version_stands_in_one_place(wheel: Path, source: Path) -> None:
    assert wheel.name == f"xsfs-{__version__}-py3-none-any.whl"
    assert source.name == f"xsfs-{__version__}.tar.gz"
    newest = re.search(
        r"^## \[(\d.*)\] - ", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert newest is not None
    assert newest[1] == __version__
    assert __version__ not in (REPOSITORY / "pyproject.toml").read_text()


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "xsfs").rglob("*.py")}
    data = f"xsfs-{__version__}.data/data/share"
    assert inside == modules | {
        "xsfs/py.typed",
        f"{data}/man/man8/xsfs.8",
        f"{data}/man/man8/mount.xsfs.8",
        f"{data}/bash-completion/completions/xsfs",
        f"{data}/zsh/site-functions/_xsfs",
    }


def test_the_source_has_all_that_the_project_has(project: Path, source: Path) -> None:
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    # Building leaves something in the copy.
    left = re.compile("build/|xsfs.egg-info/|.*__pycache__")
    assert {name for name in files if not left.match(name)} <= inside


def check_command(command: Path, mountpoint: Path) -> None:
    """The program works: it mounts the embedded store."""
    assert run(command, "--version", limit=LIMIT) == f"xsfs {__version__}\n"
    mountpoint.mkdir()
    run(command, "embedded", mountpoint, limit=LIMIT)
    try:
        assert (mountpoint / "name").read_text() == "Domain-0\n"
    finally:
        run("umount", mountpoint, limit=LIMIT)


@pytest.mark.parametrize("kind", ["wheel", "source"])
def test_pip_installs_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run("/usr/bin/python3", "-m", "venv", environment)
    package = request.getfixturevalue(kind)
    run(environment / "bin" / "pip", "install", "-q", package)
    check_command(environment / "bin" / "xsfs", tmp_path / "m")
    found = run("env", f"PATH={environment}/bin:/usr/bin:/bin", "man", "-w", "mount.xsfs")
    assert str(environment) in found
    for name in ("bash-completion/completions/xsfs", "zsh/site-functions/_xsfs"):
        assert (environment / "share" / name).is_file()


def test_pipx_installs_it(wheel: Path, tmp_path: Path) -> None:
    places = [f"PIPX_HOME={tmp_path}/pipx", f"PIPX_BIN_DIR={tmp_path}/bin"]
    run("env", *places, "pipx", "install", "--python", "/usr/bin/python3", wheel)
    check_command(tmp_path / "bin" / "xsfs", tmp_path / "m")


# ---------------------------------------------------------------------------- the Debian package


@pytest.fixture(scope="module")
def debian_package(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("debian")
    run(project / "debian" / "build.sh", directory)
    (path,) = directory.iterdir()
    return path


@pytest.fixture
def chroot(tmp_path: Path) -> Iterator[Path]:
    """A Debian 12 with nothing in it that a Debian need not have."""
    root = tmp_path / "root"
    run("debootstrap", "--variant=minbase", "bookworm", root)
    yield root
    shutil.rmtree(root)


def test_lintian_finds_nothing(debian_package: Path) -> None:
    run("lintian", "--fail-on", "error,warning,info", debian_package)


# In a mount namespace of its own: all that is mounted here ends with it.
IN_CHROOT = """\
set -eu
root=$1
# A copy of a mount keeps its xsfs running when the mount itself has gone.
umount -l -a -t fuse.xsfs
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
chroot "$root" sh -eux << 'end'
apt-get update -qq
apt-get install -y -qq --no-install-recommends /tmp/xsfs.deb
xsfs --version
mkdir -p /mnt/xenstore
mount -t xsfs embedded /mnt/xenstore
cat /mnt/xenstore/name
umount /mnt/xenstore
echo 'embedded /mnt/xenstore fuse.xsfs mirror 0 0' >> /etc/fstab
mount /mnt/xenstore
cat /mnt/xenstore/.mirror/name
cd /mnt/xenstore
mkdir .transaction/t
echo 42 > .transaction/t/data/x
echo commit > .transaction/t/.control
head -c 2 data/.watch
grep -r . data
cd /
umount /mnt/xenstore
python3 -c 'import xsfs.xenstore.store'
for file in man/man8/xsfs.8.gz man/man8/mount.xsfs.8.gz bash-completion/completions/xsfs \
    zsh/vendor-completions/_xsfs doc/xsfs/changelog.gz; do test -e "/usr/share/$file"; done
for unit in $(cd /tmp/systemd && ls); do test -f "/lib/systemd/system/$unit"; done
apt-get purge -y -qq xsfs
! test -e /usr/lib/xsfs
! test -e /usr/lib/python3/dist-packages/xsfs
echo "all is well"
end
"""


def test_the_debian_package_in_a_clean_chroot(debian_package: Path, chroot: Path) -> None:
    shutil.copy(debian_package, chroot / "tmp" / "xsfs.deb")
    units = chroot / "tmp" / "systemd"
    units.mkdir()
    for path in (REPOSITORY / "systemd").glob("*.*"):
        shutil.copy(path, units)
    namespace = ("unshare", "--mount", "--propagation=private")
    said = run(*namespace, "sh", "-c", IN_CHROOT, "chroot", chroot)
    assert f"\nxsfs {__version__}\n" in said
    assert said.count("\nDomain-0\n") == 2
    # Debian's trio is an old one.
    assert "\n.\n" in said
    assert "\ndata/x:42\n" in said
    assert said.endswith("all is well\n")
