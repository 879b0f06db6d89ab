"""Ring: the programs of docs/python.md and docs/examples, with a Python that cannot import pyfuse3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.documents import blocks
from tests.support.host import REPOSITORY
from tests.support.mirroring import await_true
from tests.support.mounting import LIMIT
from tests.support.programs import Program, program
from tests.support.xenstored.harness import RealXenstored, XsClient, XsError

AGENT_PROGRAM = REPOSITORY / "docs" / "examples" / "guest_agent.py"

GUEST = 7
AGENT = f"/local/domain/{GUEST}/data/agent"
DATA = "/local/domain/0/data"

RUN = """\
import runpy, sys
sys.modules["pyfuse3"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program that cannot import pyfuse3."""


@pytest.fixture(params=["C", "ocaml"])
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param, guests=(GUEST,)) as daemon:
        daemon.populate(introduce=True)
        yield daemon


def running(socket: str, path: Path, *arguments: str) -> AbstractContextManager[Program]:
    command = (sys.executable, "-c", RUN, str(path), *arguments)
    return program(*command, XENSTORED_PATH=socket, PYTHONPATH=str(REPOSITORY))


# ------------------------------------------------------------------------ the programs of the page


@pytest.mark.parametrize("first_line", ["import xsfs.sync", "import trio", "import asyncio"])
def test_a_program_of_the_page(daemon: RealXenstored, first_line: str, tmp_path: Path) -> None:
    (text,) = (
        text for text in blocks("docs/python.md", "python") if text.startswith(f"{first_line}\n")
    )
    path = tmp_path / "program.py"
    path.write_text(text)
    with daemon.client() as dom0, running(daemon.socket, path) as run:
        assert run.lines.next() == "b'Domain-0'"
        run.lines.until("b'data'")
        dom0.write(f"{DATA}/new", "1")
        run.lines.until("b'data/new'")
        assert dom0.read(f"{DATA}/n") == (b"1" if "asyncio" in text else b"2")
        # Ctrl-C ends it, also while a thread waits for an event.
        run.process.send_signal(signal.SIGINT)
        # asyncio.run misses a signal that arrives just before epoll_wait(2), until the loop wakes.
        dom0.write(f"{DATA}/new", "2")
        run.process.wait(LIMIT)


def test_every_program_of_the_page_is_run() -> None:
    assert len(list(blocks("docs/python.md", "python"))) == 3


# ---------------------------------------------------------------------------------------- examples


def read(client: XsClient, path: str) -> bytes | None:
    try:
        return client.read(path)
    except XsError:
        return None


def test_the_guest_agent(daemon: RealXenstored) -> None:
    def outcome_of(request: str) -> bytes | None:
        dom0.write(f"{AGENT}/request", request)
        await_true(lambda: read(dom0, f"{AGENT}/request") == b"", LIMIT)
        return read(dom0, f"{AGENT}/result")

    # It publishes at its start, when it is asked to, when a device comes or goes, and after an hour.
    with running(daemon.guest_socket(GUEST), AGENT_PROGRAM, "3600") as agent:
        with daemon.client() as dom0:
            await_true(lambda: read(dom0, f"{AGENT}/hostname"), LIMIT)
            assert read(dom0, f"{AGENT}/hostname") == os.uname().nodename.encode()
            assert read(dom0, f"{AGENT}/kernel") == os.uname().release.encode()
            assert b"lo" in (read(dom0, f"{AGENT}/interfaces") or b"").split()
            assert outcome_of("sync") == b"done: sync"
            assert outcome_of("dance") == b"unknown: dance"
            dom0.rm(f"{AGENT}/uptime")
            assert outcome_of("publish") == b"done: publish"
            assert float(read(dom0, f"{AGENT}/uptime") or "") > 0
            dom0.rm(f"{AGENT}/uptime")
            dom0.mkdir(f"/local/domain/{GUEST}/device/vif/1")
            await_true(lambda: read(dom0, f"{AGENT}/uptime"), LIMIT)
        daemon.restart()
        daemon.populate()
        with daemon.client() as dom0:
            await_true(lambda: read(dom0, f"{AGENT}/hostname"), LIMIT)
            assert outcome_of("publish") == b"done: publish"
        assert agent.process.poll() is None


def test_the_guest_agent_publishes_at_intervals(daemon: RealXenstored) -> None:
    with (
        daemon.client() as dom0,
        running(daemon.guest_socket(GUEST), AGENT_PROGRAM, "0.1"),
    ):
        for _ in range(3):
            await_true(lambda: read(dom0, f"{AGENT}/uptime"), LIMIT)
            dom0.rm(f"{AGENT}/uptime")


def test_the_guest_agent_without_xenstore(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, AGENT_PROGRAM],
        env={
            **os.environ,
            "XENSTORED_PATH": str(tmp_path / "missing"),
            "PYTHONPATH": str(REPOSITORY),
        },
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("guest_agent: cannot connect to Xenstore")
    assert "Traceback" not in done.stderr


def test_the_examples_are_programs() -> None:
    examples = list((REPOSITORY / "docs" / "examples").glob("*.py"))
    assert examples
    assert all(os.access(path, os.X_OK) for path in examples)
