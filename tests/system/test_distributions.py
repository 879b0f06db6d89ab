"""The two commands of the README, in a fresh root of each Debian that they serve; and the oldest versions
of pyfuse3 and trio.

On Debian 13 the daemons are those of Xen 4.20, and xsfs runs with the pyfuse3 of the distribution.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.roots import Root, copy_checkout, debian_root
from tests.system.test_packages import run

# Once more over its own mount; the embedded store; watches, transactions and the mirror; the service.
INSTALLED = """\
cd /root/xsfs
./install.sh
./install.sh
git_status=$(find . -name build -o -name '*.egg-info')
test -z "$git_status"
cd /
umount /mnt/xenstore
cat > /tmp/session << 'end'
set -eux
cat /mnt/xenstore/name
cd /mnt/xenstore
mkdir .transaction/t
echo 42 > .transaction/t/data/x
echo commit > .transaction/t/.control
head -c 2 data/.watch
xsfs-watch -n 1 data
grep -r . data
cat .mirror/name
end
xsfs embedded -o mirror /mnt/xenstore
sh /tmp/session
umount /mnt/xenstore
mount -t fuse.xsfs embedded /mnt/xenstore
umount /mnt/xenstore
test -e /usr/local/share/man/man8/xsfs.8
/root/xsfs/install.sh --uninstall
test ! -L /usr/local/bin/xsfs
"""

# What is compared with the daemons of the distribution, and what uses them most.
SUITE = {
    "bookworm": ["tests/mirror/test_places.py::test_an_unprivileged_user"],
    "trixie": [
        "tests/support/test_harness.py",
        "tests/embedded/test_fidelity.py",
        "tests/cli/test_mount_command.py",
        "tests/fs/test_values.py",
        "tests/fs/test_watch_files.py",
        "tests/fs/test_transactions.py",
        "tests/fs/test_transaction_ends.py",
        "tests/fs/test_live_update.py",
        "tests/mirror/test_inotify.py",
        "tests/mirror/test_places.py::test_an_unprivileged_user",
    ],
}


@pytest.fixture(params=sorted(SUITE))
def suite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.slow
def test_the_commands_of_the_readme(suite: str, tmp_path: Path) -> None:
    """The checkout lies where root alone can reach it."""
    with debian_root(suite, tmp_path / "root") as root:
        copy_checkout(root.path / "root" / "xsfs")
        (root.path / "root").chmod(0o700)
        check_installation(root, compiled=suite == "bookworm")
        command = f"./test.sh -m 'not slow or ci' {' '.join(SUITE[suite])}"
        printed = root.sh(f"cd /root/xsfs && exec {command}")
        assert " passed" in printed
        assert "failed" not in printed


def check_installation(root: Root, *, compiled: bool) -> None:
    printed = root.sh(INSTALLED)
    assert "xsfs is mounted at /mnt/xenstore; " in printed
    assert "xsfs is mounted at /mnt/xenstore already" in printed
    assert printed.count("\nDomain-0\n") == 2
    assert "\n.\n" in printed
    assert "\ndata\n" in printed
    assert "\ndata/x:42\n" in printed
    compiler = root.sh("command -v gcc || echo none").strip()
    assert (compiler != "none") == compiled


OLDEST = ("pyfuse3==3.4.2", "trio==0.22.0")
"""Versions that are as old as those that distributions have, or nearly so."""

TESTED_WITH_OLDEST = (
    ("-k", "embedded", "tests/fs", "tests/embedded/test_server.py"),
    ("tests/cli/test_command.py::test_a_signal_shows_the_tasks",),
    (
        *("tests/fs/test_opening.py", "tests/mirror/test_inotify.py"),
        *(f"tests/xenstore/test_{name}.py" for name in ("store", "connection", "watches")),
    ),
)


@pytest.mark.slow
def test_the_oldest_versions(tmp_path: Path) -> None:
    """What poll(2) needs is skipped, and nothing else."""
    python = tmp_path / "environment/bin/python"
    tools = ("pytest", "pytest-xdist", "hypothesis", "pyxs", "watchdog")
    run("/usr/bin/python3", "-m", "venv", tmp_path / "environment")
    run(python, "-m", "pip", "install", "-q", *OLDEST, *tools)
    command = (python, "-m", "pytest", "-q", "-n", "4", "--dist", "loadfile", "-m", "not slow")
    printed = "".join(run(*command, *tests, limit=3600.0) for tests in TESTED_WITH_OLDEST)
    reasons = [line for line in printed.splitlines() if line.startswith("SKIPPED")]
    assert reasons
    assert all("pyfuse3 older than 3.5 has no poll" in line for line in reasons)
