"""Ring: the recipes, on a host of their own (tests/support/documents.py)."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.documents import check_session, install_scripts
from tests.support.host import Host, open_host
from tests.support.mounting import LIMIT, quick_params
from tests.support.sshd import reachable
from tests.support.xenstored.harness import RealXenstored, XsClient, XsError

RECIPES = "docs/recipes.md"
GUEST = 7


@pytest.fixture(scope="module", params=quick_params(["C"], ["C", "ocaml"]))
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param, guests=(GUEST,)) as daemon:
        daemon.populate(introduce=True)
        yield daemon


@contextmanager
def prepared(socket: str) -> Iterator[Host]:
    with open_host(socket) as host:
        install_scripts(RECIPES, host)
        install_scripts("docs/transactions.md", host)
        host.sh("xsfs /mnt/xenstore")
        yield host


@pytest.fixture
def host(daemon: RealXenstored) -> Iterator[Host]:
    with prepared(daemon.socket) as host:
        yield host


@pytest.fixture
def dom0(daemon: RealXenstored) -> Iterator[XsClient]:
    with daemon.client() as client:
        yield client


@contextmanager
def running(host: Host, command: str) -> Iterator[subprocess.Popen[str]]:
    """A program that runs until the block ends."""
    with host.start(f"exec {command}") as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line that the program prints."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], LIMIT)
    assert readable, "it prints nothing"
    return process.stdout.readline().rstrip("\n")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.01)


@pytest.mark.quick_if(kind=["C"])
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_what_the_recipes_show(kind: str) -> None:
    guests = (GUEST, GUEST + 2)
    with (
        RealXenstored(kind, guests=guests) as daemon,
        RealXenstored(kind, guests=guests) as other,
    ):
        daemon.populate()
        other.populate()
        with other.client() as there:
            there.write("/local/domain/0/memory/target", "2097152")
            there.write(f"/local/domain/{GUEST}/data/os_name", "Alpine")
            there.write("/from-host2", "1")
            # A mount shows the home's `data` always, and everybody else only if it exists.
            there.mkdir("/local/domain/0/data")
        with (
            open_host(other.socket) as host2,
            prepared(daemon.socket) as host,
            reachable(host, "host2", host2),
        ):
            host2.sh("xsfs /mnt/xenstore")
            check_session(RECIPES, host)


def test_wait_for(host: Host, dom0: XsClient) -> None:
    path = "/local/domain/0/backend/vbd/7/999/state"
    with running(host, f"wait-for {path} 4 {LIMIT}") as process:
        for state in "1", "2", "3", "4":
            assert process.poll() is None
            dom0.write(path, state)
        assert process.wait(LIMIT) == 0
    dom0.rm("/local/domain/0/backend/vbd/7/999")
    assert host.run("wait-for 'no such name' 4").returncode == 1


def test_the_hotplug_script_reports_its_failure(host: Host, dom0: XsClient) -> None:
    dom0.write("/local/domain/0/backend/vif/7/1/frontend-id", "7")
    assert host.run("vif-dhcp online", XENBUS_PATH="backend/vif/7/1").returncode == 1
    assert dom0.read("/local/domain/0/backend/vif/7/1/hotplug-status") == b"error"
    assert b"no mac" in dom0.read("/local/domain/0/backend/vif/7/1/hotplug-error")
    dom0.rm("/local/domain/0/backend/vif/7/1")


def test_the_guest_agent(daemon: RealXenstored, dom0: XsClient, host: Host) -> None:
    agent = f"/local/domain/{GUEST}/data/agent"

    def has_told() -> bool:
        try:
            return dom0.read(f"{agent}/state") == b"told"
        except XsError:
            return False

    with prepared(daemon.guest_socket(GUEST)) as guest, running(guest, "guest-agent"):
        until(has_told)
        assert dom0.read(f"{agent}/hostname").decode() == os.uname().nodename
        assert dom0.read(f"{agent}/kernel").decode() == os.uname().release
        # dom0 asks through its own mount.
        dom0.write(f"{agent}/state", "old")
        host.sh(f"cd /mnt/xenstore/.root{agent}; echo now > refresh")
        until(has_told)


def test_the_log_of_changes(host: Host, dom0: XsClient) -> None:
    dom0.write("/local/domain/0/data/log/x", "1")
    with running(host, "store-log /mnt/xenstore/data/log") as process:

        def logged() -> str:
            stamp, _, rest = next_line(process).partition(" ")
            assert re.fullmatch(r"\d\d:\d\d:\d\d", stamp)
            return rest

        assert logged() == ". /"
        dom0.write("/local/domain/0/data/log/x", "2")
        assert logged() == "x 2"
        dom0.write("/local/domain/0/data/log/d", "old")
        assert logged() == "d old"
        dom0.write("/local/domain/0/data/log/d/e", "3")
        assert logged() == "d/e 3"
        dom0.write("/local/domain/0/data/log/d", "both")
        assert logged() == "d both/"
        dom0.rm("/local/domain/0/data/log/x")
        assert logged() == "x is gone"


def test_domains_that_come_and_go(host: Host, daemon: RealXenstored, dom0: XsClient) -> None:
    with running(host, "domains") as process:
        assert {next_line(process), next_line(process)} == {"0 Domain-0", "7 guest-7"}
        daemon.create_domain(11)
        dom0.write("/local/domain/11/name", "eleven")
        daemon.introduce(11)
        assert next_line(process) == "11 eleven"
        dom0.rm("/local/domain/11")
        daemon.destroy_domain(11)
        assert next_line(process) == "11 is gone"


def test_the_lock(host: Host, dom0: XsClient) -> None:
    host.sh("mkfifo /tmp/end")
    with running(host, "with-lock one sh -c 'echo mine; cat /tmp/end'") as holder:
        assert next_line(holder) == "mine"
        with running(host, "with-lock one echo mine") as waiting:
            # A change of another lock does not let the waiting program in.
            dom0.write("/local/domain/0/data/lock-two", "")
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(1)
            host.sh(": > /tmp/end")
            assert next_line(waiting) == "mine"
            assert waiting.wait(LIMIT) == 0
    assert "lock-one" not in dom0.ls("/local/domain/0/data")
    dom0.rm("/local/domain/0/data")
    # An error is not mistaken for a lock that is held.
    done = host.run("with-lock 'a b' echo mine")
    assert done.returncode == 1
    assert "mine" not in done.stdout


def test_many_programs_want_the_lock(host: Host) -> None:
    """Each program reads a number and writes the next one.  Without the lock some would be lost."""
    one_more = "n=$(cat /mnt/xenstore/data/n); echo $((n + 1)) > /mnt/xenstore/data/n"
    host.sh(
        "mkdir -p /mnt/xenstore/data; echo 0 > /mnt/xenstore/data/n;"
        "script=$(type -p with-lock);"
        f"for i in 1 2 3 4; do $script n sh -c '{one_more}' & bash $script n sh -c '{one_more}' & done;"
        "wait"
    )
    assert host.sh("cat /mnt/xenstore/data/n") == "8\n"
