"""Ring: real mounts.  The script of docs/transactions.md keeps its promises."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.fs.test_values import node
from tests.support.mounting import GUEST, LIMIT, Mount, Place, mounted
from tests.support.transaction_dirs import (
    SHELLS,
    until,
)
from tests.support.xenstored.harness import XsClient, XsError

DOCUMENT = Path(__file__).parents[2] / "docs" / "transactions.md"


def the_script() -> str:
    (script,) = re.findall(r"^```sh\n(#!/bin/sh\n.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.M)
    return str(script)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "increment"
    path.write_text(the_script())
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run_many(script: Path, name: str, mounts: list[Mount], key: str, times: int) -> None:
    """One process for each of the given mounts adds one, `times` times."""
    command = f'i=0; while [ $i -lt {times} ]; do {name} "$0" "$1" "$2" || exit 1; i=$((i+1)); done'
    processes = [
        subprocess.Popen(
            ["sh", "-c", command, script, mount.path, key],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mount in mounts
    ]
    printed: list[int] = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=LIMIT * 6)
            assert (process.returncode, err) == (0, "")
            printed += map(int, out.split())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # Every process saw different numbers.
    assert len(set(printed)) == len(mounts) * times


@pytest.mark.quick_if(place=["C"], name=["dash"])
@pytest.mark.parametrize("name", SHELLS)
def test_the_script_loses_no_increment(
    place: Place, mount: Mount, box: Path, witness: XsClient, script: Path, name: str
) -> None:
    (box / "n").write_text("0\n")
    run_many(script, name, [mount] * 4, f"data/{box.name}/n", 20)
    assert witness.read(node(place, box) + "/n") == b"80"
    assert os.listdir(mount.path / ".transaction") == []


@pytest.mark.quick_if(place=["ocaml-guest"])
def test_two_mounts_and_another_program_lose_no_increment(
    place: Place, mount: Mount, box: Path, witness: XsClient, script: Path, tmp_path: Path
) -> None:
    path = node(place, box) + "/n"
    (box / "n").write_text("0\n")
    done = 0

    def increment() -> None:
        nonlocal done
        with place.witness() as other:
            while done < 40:
                number = other.start()
                value = int(other.read(path, number)) + 1
                other.write(path, str(value), number)
                try:
                    other.end(number)
                    done += 1
                except XsError as error:
                    if error.name != "EAGAIN":
                        raise

    with mounted([place.socket], tmp_path / "second") as second:
        thread = threading.Thread(target=increment)
        thread.start()
        run_many(script, "dash", [mount, second, mount, second], f"data/{box.name}/n", 10)
        thread.join(LIMIT * 3)
        assert not thread.is_alive()
    assert done == 40
    assert witness.read(path) == b"80"


def test_the_script_says_what_is_wrong_and_leaves_nothing(
    place: Place, mount: Mount, box: Path, script: Path
) -> None:
    done = mount.run(f"dash {script} {mount.path} data/{box.name}/missing; echo $?")
    assert "No such file or directory" in done.stderr
    assert done.stdout == "1\n"
    assert os.listdir(mount.path / ".transaction") == []


def test_a_script_that_is_ended_leaves_nothing(
    place: Place, mount: Mount, box: Path, script: Path
) -> None:
    """The trap rolls back what a signal has interrupted."""
    os.mkfifo(script.with_name("blocks"))
    blocking = the_script().replace("n=$((n + 1))", f"read n < {script.with_name('blocks')}")
    (box / "n").write_text("0\n")
    words = ["dash", "-c", blocking, "increment", str(mount.path), f"data/{box.name}/n"]
    process = subprocess.Popen(words)
    until(lambda: os.listdir(mount.path / ".transaction") == [f"increment-{process.pid}"])
    # The shell waits in open(2), which the signal ends.
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 1
    assert os.listdir(mount.path / ".transaction") == []
    assert (box / "n").read_text() == "0\n"


def test_a_domain_has_the_transactions_of_its_own_rights(
    place: Place, mount: Mount, tx: Path
) -> None:
    """Xenstore refuses a write inside a transaction at the time of the write."""
    tx.mkdir()
    name = Path(f"{tx}/.root/local/domain/{GUEST}/name")
    if place.guest:
        with pytest.raises(PermissionError):
            name.write_text("mine\n")
    elif place.kind != "embedded":
        name.write_text("renamed\n")
        assert name.read_text() == "renamed\n"
