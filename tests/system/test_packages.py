"""What is installed.  The wheel and the source distribution are built from a copy of the project,
installed where nothing of it is, and used.  test_debian_package.py does so with the Debian package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.host import REPOSITORY
from tests.support.mounting import LIMIT
from tests.support.roots import copy_checkout
from xsfs import __version__

BUILD_LIMIT = 1800.0
"""Seconds that building, or fetching what is needed for it, may take on a busy machine."""


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
    copy_checkout(copy)
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
        f"{data}/man/man1/xsfs-watch.1",
        *(f"{data}/bash-completion/completions/{name}" for name in ("xsfs", "xsfs-watch")),
        *(f"{data}/zsh/site-functions/_{name}" for name in ("xsfs", "xsfs-watch")),
    }


def test_the_licence_is_in_the_metadata(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"xsfs-{__version__}.dist-info/METADATA").decode()
    assert re.search("^License(-Expression)?: MIT$", metadata, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.ci
def test_the_newest_setuptools_has_no_complaint(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What it is to refuse one day it warns of today; Debian 12's reads the metadata in other tests."""
    directory = tmp_path_factory.mktemp("newest")
    run("/usr/bin/python3", "-m", "venv", directory / "environment")
    run(directory / "environment" / "bin" / "pip", "install", "-q", "--upgrade", "setuptools")
    build = "import os, sys; from setuptools import build_meta as b; "
    build += "os.chdir(sys.argv[1]); b.prepare_metadata_for_build_wheel(sys.argv[2])"
    python = directory / "environment" / "bin" / "python"
    printed = run(python, "-W", "default", "-c", build, project, directory)
    assert "deprecated" not in printed.lower()
    (metadata,) = directory.glob("*.dist-info/METADATA")
    assert "\nLicense: MIT\n" in metadata.read_text()


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


@pytest.mark.slow
@pytest.mark.ci
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


@pytest.mark.slow
@pytest.mark.ci
def test_pipx_installs_it(wheel: Path, tmp_path: Path) -> None:
    places = [f"PIPX_HOME={tmp_path}/pipx", f"PIPX_BIN_DIR={tmp_path}/bin"]
    run("env", *places, "pipx", "install", "--python", "/usr/bin/python3", wheel)
    check_command(tmp_path / "bin" / "xsfs", tmp_path / "m")


# --------------------------------------------------------------------------------- the RPM package


def test_the_rpm_package_has_a_source(source: Path, tmp_path: Path) -> None:
    """What Debian's rpm can do of it: the spec is understood, and a source package built of it."""
    top = ("--define", f"_topdir {tmp_path}", "--define", "_unitdir /usr/lib/systemd/system")
    (tmp_path / "SOURCES").mkdir()
    shutil.copy(source, tmp_path / "SOURCES")
    spec = REPOSITORY / "packaging" / "xsfs.spec"
    run("rpmbuild", *top, "--nodeps", "-bs", spec)
    (package,) = (tmp_path / "SRPMS").iterdir()
    assert package.name == f"xsfs-{__version__}-1.src.rpm"
    inside = run("rpm", "-q", "--package", "--nosignature", "--list", package).splitlines()
    assert sorted(inside) == sorted(["xsfs.spec", source.name])
    # Of the spec alone: rpmlint without Fedora's settings wants tags that Fedora forbids.
    assert " 0 errors, " in run("rpmlint", spec)
