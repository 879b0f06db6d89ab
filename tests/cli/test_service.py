"""What systemd is told: the protocol, with real sockets.  A real systemd is in the lab
(tests/system/xen)."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mounting import LIMIT

UNITS = Path(__file__).parents[2] / "systemd"


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_ready_status_and_stopping(tmp_path: Path, abstract: bool) -> None:
    name = f"@xsfs-test-{os.getpid()}" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0") if abstract else name)
        manager.settimeout(LIMIT)
        (tmp_path / "m").mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "xsfs", "-f", "embedded", tmp_path / "m"],
            env={**os.environ, "NOTIFY_SOCKET": name},
        )
        try:
            assert manager.recv(4096).decode().splitlines() == [
                "READY=1",
                f"STATUS=/local/domain/0 of embedded at {tmp_path / 'm'}",
            ]
            assert (tmp_path / "m/name").read_text() == "Domain-0\n"
            process.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1"
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()
            process.wait(LIMIT)
            subprocess.run(["umount", "-lq", tmp_path / "m"], check=False)


def test_a_failure_is_the_status(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(LIMIT)
        done = subprocess.run(
            [sys.executable, "-m", "xsfs", "-f", f"{tmp_path}/none", tmp_path],
            env={**os.environ, "NOTIFY_SOCKET": f"{tmp_path}/notify"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 3
        said = manager.recv(4096).decode()
        assert said.startswith("STATUS=")
        assert said.removeprefix("STATUS=") == done.stderr.strip().removeprefix("xsfs: ")


def test_a_manager_that_has_gone_is_no_matter(tmp_path: Path) -> None:
    """Nobody listens: a mount is a mount all the same."""
    (tmp_path / "m").mkdir()
    environment = {**os.environ, "NOTIFY_SOCKET": f"{tmp_path}/nobody"}
    command = [sys.executable, "-m", "xsfs", "-f", "embedded", str(tmp_path / "m")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + LIMIT
        while not os.path.ismount(tmp_path / "m"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        subprocess.run(["umount", tmp_path / "m"], check=True, timeout=LIMIT)
        _, said = process.communicate(timeout=LIMIT)
        assert process.returncode == 0
        assert "cannot notify the service manager" in said
    finally:
        process.kill()
        process.wait(LIMIT)


def test_the_journal_gets_levels(tmp_path: Path) -> None:
    """Only where standard error is the journal itself, as JOURNAL_STREAM says."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "xsfs", "-f", f"{tmp_path}/none", str(tmp_path)]
    for matches in True, False:
        with open(log, "w+b") as stderr:
            found = os.fstat(stderr.fileno())
            stream = f"{found.st_dev}:{found.st_ino if matches else found.st_ino + 1}"
            environment = {**os.environ, "JOURNAL_STREAM": stream}
            subprocess.run(command, env=environment, stderr=stderr, timeout=LIMIT, check=False)
        said = log.read_text()
        assert (said.startswith("<3>"), said.startswith("xsfs: ")) == (matches, not matches), said
        assert said.count("\n") == 1


def test_both_units_are_the_same_but_for_the_place() -> None:
    one = (UNITS / "xsfs.service").read_text()
    template = (UNITS / "xsfs@.service").read_text()
    same = one.replace("/mnt/xenstore", "%f").replace(
        "/etc/default/xsfs\n", "/etc/default/xsfs-%i\n"
    )
    assert same.splitlines()[1:] == template.splitlines()[1:]


def test_the_units_are_in_order(tmp_path: Path) -> None:
    """As the systemd here sees them, with the command where a package has it."""
    for name in "xsfs.service", "xsfs@.service":
        text = (UNITS / name).read_text().replace("ExecStart=xsfs ", "ExecStart=/bin/true ")
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.glob("*.service"))],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_directories_of_the_units_can_be_passed() -> None:
    """`mkdir -p` of the unit makes the directories on the way to the mountpoint, too."""
    for unit in UNITS.glob("*.service"):
        (umask,) = re.findall("^UMask=(.*)$", unit.read_text(), re.MULTILINE)
        assert int(umask, 8) & 0o055 == 0, unit


NAMESPACES = (
    *("Private", "ReadOnly", "ReadWrite", "Inaccessible", "Exec", "NoExec", "Bind", "Temporary"),
    *("DynamicUser", "Root", "Mount", "ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset"),
    *("ProtectControlGroups", "ProtectKernel"),
)


def test_no_hardening_hides_the_mount() -> None:
    """Settings that give a service a mount namespace (systemd.exec(5)): what it mounts would be seen
    by itself alone."""
    for unit in UNITS.glob("*.service"):
        for line in unit.read_text().splitlines():
            name = line.partition("=")[0]
            if name.startswith(("ExecStart", "ExecStop")) or line.startswith("#"):
                continue
            assert not name.startswith(NAMESPACES), line
