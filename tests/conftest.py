"""Fixtures of the outer rings: every store, mounted."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.clock import LeapingClock
from tests.support.mounting import PLACES, Mount, Place, each_place, mounted
from tests.support.xenstored.harness import XsClient

# A busy machine may take long for an example, and long to make one.
settings.register_profile("xsfs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("xsfs")

NEEDED = {
    "fusermount3": "fuse3",
    "getfattr": "attr",
    "gcc": "gcc",
    "inotifywait": "inotify-tools",
    "xenstore-ls": "xenstore-utils",
    "nsenter": "util-linux",
    "mount": "mount",
    "ssh": "openssh-client",
    "/usr/sbin/sshd": "openssh-server",
}

PROGRAMS = {
    "rsync": "rsync",
    "gawk": "gawk",
    "mawk": "mawk",
    "column": "bsdextrautils",
    "lua5.4": "lua5.4",
    "busybox": "busybox",
    "xxd": "xxd",
    "man": "man-db",
    "mandoc": "mandoc",
    "zsh": "zsh",
    "vim": "vim",
    "nano": "nano",
    "ed": "ed",
    "patch": "patch",
    "perl": "perl",
    "emacs": "emacs-nox",
    "git": "git",
    "make": "make",
    "cpio": "cpio",
    "jq": "jq",
    "node": "nodejs",
    "sqlite3": "sqlite3",
    "zip": "zip",
    "unzip": "unzip",
    "less": "less",
    "restic": "restic",
    "borg": "borgbackup",
    "ansible": "ansible-core",
    "ansible-playbook": "ansible-core",
    "rg": "ripgrep",
    "/usr/lib/cargo/bin/coreutils/cat": "rust-coreutils",
    "debootstrap": "debootstrap",
    "lintian": "lintian",
    "pipx": "pipx",
    "rpmbuild": "rpm",
    "rpmlint": "rpmlint",
}
"""What else is run in a mount, and what builds packages and machines."""

WITHOUT_PROGRAMS = ("xenstore", "embedded", "view", "mirror")
"""The rooms whose tests need none of PROGRAMS.  test.sh knows them, too."""


def pytest_sessionstart(session: pytest.Session) -> None:
    # A child made by vfork(2) holds this process up until it has changed its directory.  If that leads into
    # a mount of a guest, whose ring a thread of this process serves, both would wait.
    vars(subprocess)["_USE_VFORK"] = False
    faulthandler.enable()
    # A command that a script starts by `&` ignores it, and the processes of the tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    named = [Path(argument.partition("::")[0]).resolve() for argument in session.config.args]
    rooms = [Path(__file__).parent / room for room in WITHOUT_PROGRAMS]
    is_few = all(any(path.is_relative_to(room) for room in rooms) for path in named)
    for program, package in (NEEDED if is_few else NEEDED | PROGRAMS).items():
        if shutil.which(program) is None:
            pytest.exit(f"{program} is missing: apt-get install {package}", returncode=3)


LONGEST = {
    "fs/test_dumps.py",
    "fs/test_open_files.py",
    "fs/test_waiting_readers.py",
    "fs/test_restarts.py",
    "fs/test_tree.py",
    "fs/test_watch_files.py",
    "system/test_documents.py",
    "system/test_recipes.py",
    "system/test_ssh_mount.py",
    "system/test_subtree_copies.py",
    "xenstore/test_event_reader.py",
    "xenstore/test_lying_store.py",
    "xenstore/test_outages.py",
    "xenstore/test_ssh.py",
}
"""The files of which each takes more than 20 seconds."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Obey `quick_if`: of a large matrix the quick set runs a part, and CI everything.  The longest files
    come first: if one process were still busy with one of them at the end, the others would wait."""
    for item in items:
        for marker in item.iter_markers("quick_if"):
            assert isinstance(item, pytest.Function)
            if any(
                item.callspec.params[name] not in quick for name, quick in marker.kwargs.items()
            ):
                item.add_marker("slow")
                item.add_marker("ci")
    items.sort(key=lambda item: f"{item.path.parent.name}/{item.path.name}" not in LONGEST)


place = each_place(*PLACES, quick=("C", "ocaml-guest", "embedded"))


@pytest.fixture(scope="module")
def mount(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """The store, mounted with no options."""
    with mounted([place.socket], tmp_path_factory.mktemp("mount") / "m") as mount:
        yield mount


@pytest.fixture
def witness(place: Place) -> Iterator[XsClient]:
    """An independent client of the same domain."""
    with place.witness() as client:
        yield client


@pytest.fixture
def box(
    request: pytest.FixtureRequest, place: Place, mount: Mount, witness: XsClient
) -> Iterator[Path]:
    """An empty directory of the mount, for one test alone."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]
    path = mount.path / "data" / name
    path.mkdir()
    yield path
    witness.rm(f"{place.home}/data/{name}")


@pytest.fixture
def tx(mount: Mount, box: Path) -> Iterator[Path]:
    """The directory of a transaction to be started, which is rolled back at the end if it is open.

    Not started here: oxenstored's transactions do not see what is prepared after their start.
    """
    path = mount.path / ".transaction" / "t1"
    yield path
    if path.exists():
        path.rmdir()
    assert os.listdir(mount.path / ".transaction") == []


@pytest.fixture
def clock() -> LeapingClock:
    return LeapingClock()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The end of a pipe to read from, and the end to write to."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "m"
    path.mkdir()
    yield path
    subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL, check=False)
