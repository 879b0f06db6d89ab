"""Fixtures of the checks: they run inside the lab's dom0, and some of them inside its domU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import mounting
from tests.support.mounting import Mount, mounted
from tests.system.xen.checks.guest import Guest
from tests.system.xen.checks.machine import (
    DEVICE,
    IN_DOM0,
    LIMIT,
    MACHINE,
    SETTINGS,
    SOCKET,
    Witness,
    shell,
    until,
)

mounting.LIMIT = LIMIT


@pytest.fixture(scope="session")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """This domain's Xenstore by the kernel's device.

    One for all checks, since xsfs takes seconds to start here.  `dom0` is by the daemon's socket.  Without
    systemd it begins before there is a daemon, which is started then.
    """
    mount = Mount(["-o", "timeout=100", DEVICE], tmp_path_factory.mktemp("mount") / "m")
    try:
        if IN_DOM0 and SETTINGS["INIT"] == "lab":
            until(lambda: DEVICE in _open_files(mount), "xsfs waits for the daemon")
            assert not os.path.exists(SOCKET)
            shell(f"{MACHINE}/start-xenstored")
        mount.wait_mounted()
        yield mount
        assert mount.end() == 0, mount.stderr
        assert "Traceback" not in mount.stderr, mount.stderr
    finally:
        mount.clear()


def _open_files(mount: Mount) -> list[str]:
    listed = shell(f"readlink /proc/{mount.process.pid}/fd/*; true")
    return listed.splitlines()


@pytest.fixture
def witness(mount: Mount) -> Witness:
    return Witness()


@pytest.fixture
def box(request: pytest.FixtureRequest, mount: Mount, witness: Witness) -> Iterator[Path]:
    """An empty directory in `mount`, for one check alone."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]
    path = mount.path / "data" / name
    path.mkdir()
    yield path
    witness.remove(f"data/{name}")


@pytest.fixture(scope="session")
def guest(mount: Mount) -> Iterator[Guest]:
    """A domU with this domain's Xenstore mounted at /mnt/xenstore, for checks that share one."""
    with Guest("guest") as guest:
        guest.bash("xsfs /mnt/xenstore")
        yield guest
        if guest.alive:
            guest.bash("umount /mnt/xenstore")


@pytest.fixture(scope="session")
def dom0(mount: Mount, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """The whole store, seen from dom0."""
    with mounted(["-o", "root=/"], tmp_path_factory.mktemp("whole") / "m") as mount:
        yield mount


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Why a check has failed, at once: the machine may not live to tell it at the end."""
    if report.failed:
        print(f"\n{report.longreprtext}\n{report.capstdout}{report.capstderr}", flush=True)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """With the seconds that a check took."""
    if report.when != "call":
        return None
    return report.outcome, report.outcome[0], f"{report.outcome.upper()} in {report.duration:.0f} s"
