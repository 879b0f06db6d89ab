"""The kernel's device has traps that the socket has not (docs/dev/real-xen.md lists them); xsfs
steps on none of them.  Run in dom0 and in the domU."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mounting import Mount
from tests.system.xen.checks.machine import (
    DAEMON,
    DEVICE,
    IN_DOM0,
    LIMIT,
    Witness,
    shell,
    until_text,
)
from tests.system.xen.checks.tracing import traced

ROUNDS = 6

LOAD = """
import os, sys, threading, time

mount, rounds = sys.argv[1], int(sys.argv[2])
end = threading.Event()
done = []

def ask(number):
    while not end.is_set():
        for name in os.listdir(f"{mount}/data/load"):
            with open(f"{mount}/data/load/{name}/value") as file:
                file.read()

def watch(number):
    for _ in range(rounds):
        with open(f"{mount}/data/load/d{number}/.watch", "rb", buffering=0) as file:
            assert file.read(100) == b".\\n"
    done.append(number)

askers = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
watchers = [threading.Thread(target=watch, args=(n,)) for n in range(4)]
for thread in askers + watchers:
    thread.start()
for thread in watchers:
    thread.join()
end.set()
for thread in askers:
    thread.join()
assert len(done) == len(watchers)
"""


def test_started_before_xenstored(mount: Mount) -> None:
    """`mount` was begun before there was a daemon (conftest.py), and has waited for it."""
    if not IN_DOM0:
        return  # there a domain starts with its Xenstore
    assert mount.bash("cat name") == "Domain-0\n"


def test_watches_under_load(mount: Mount, witness: Witness) -> None:
    """WATCH and UNWATCH while other requests of the same descriptor are unanswered can deadlock the
    kernel's whole driver; and a request written while another one is unanswered can overwrite it, of
    which C xenstored even died.  Here are many of all of them."""
    for number in range(4):
        witness.write(f"data/load/d{number}/value", str(number))
    load = subprocess.Popen([sys.executable, "-c", LOAD, mount.path, str(ROUNDS)])
    deadline = time.monotonic() + LIMIT * 2
    while load.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    if load.poll() is None:
        # Nothing that asks Xenstore by this domain's kernel will ever be answered.
        states = shell("ps -eLo pid,tid,state,wchan:30,args | grep ' D '")
        for abort in Path("/sys/fs/fuse/connections").glob("*/abort"):
            abort.write_text("1")
        pytest.exit(f"the kernel's Xenstore driver is stuck:\n{states}", returncode=1)
    assert load.returncode == 0
    assert witness.read("data/load/d1/value") == "1"
    witness.remove("data/load")


def test_each_answer_is_to_its_question(box: Path, witness: Witness) -> None:
    """The kernel does not copy what is written: while the processor is busy, requests written without
    waiting go out with each other's bodies, two in five of them when tried."""
    values = {f"n{'x' * (number % 7)}{number}": str(number) for number in range(24)}
    for name, value in values.items():
        witness.write(f"data/{box.name}/{name}", value)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        found = dict(line.split(":") for line in shell(f"cd {box}; grep -r .").splitlines())
        assert found == values
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_what_goes_over_the_device(witness: Witness, tmp_path: Path) -> None:
    """One whole message in each write(2); none while another is unanswered on its descriptor;
    RESET_WATCHES, which takes the kernel's own watches away, never."""
    with traced(tmp_path / "m", tmp_path / "trace") as mount:
        mount.bash(
            """
            mkdir data/seen; for n in 1 2 3 4 5 6 7 8; do echo $n > data/seen/$n; done
            cat data/seen/*; ls -l data/seen; mv data/seen/1 data/seen/9; echo x >> data/seen/2
            mkdir .transaction/t; echo 5 > .transaction/t/data/seen/5
            echo commit > .transaction/t/.control
            for n in 1 2 3; do head -n 1 data/seen/.watch 2>/dev/null; done
            exec 3<> data/.watch; echo seen/3 >&3; echo seen/4 >&3; echo -seen/3 >&3
            rm -r data/seen
            """
        )
    seen = mount.seen()
    assert {"READ", "WRITE", "DIRECTORY", "WATCH", "UNWATCH", "RM"} <= set(seen.requests)
    assert seen.requests["TRANSACTION_START"] == seen.requests["TRANSACTION_END"] >= 2
    assert seen.requests["RESET_WATCHES"] == 0
    assert seen.not_one_message == []
    assert seen.longest <= 4096
    assert seen.not_alone == []


def test_the_longest_value(box: Path, witness: Witness) -> None:
    """A message and its header may have 4096 bytes; more is an error of write(2) on the device.  The
    store's own limits are lower for a domU, and with oxenstored."""
    path = f"/local/domain/{(box / '../../.domid').read_text().strip()}/data/{box.name}/x"
    (box / "x").write_text("old")
    limit = 4080 - len(path) - 1
    with pytest.raises(OSError, match="too large"):
        (box / "x").write_bytes(b"v" * (limit + 1) + b"\n")
    assert (box / "x").read_text() == "old\n"
    if IN_DOM0 and DAEMON == "C":
        (box / "x").write_bytes(b"v" * limit + b"\n")
        assert witness.read(path) == "v" * limit
        return
    (box / "x").write_bytes(b"v" * 1900 + b"\n")
    with pytest.raises(OSError, match=r"too large|No space left"):
        (box / "x").write_bytes(b"w" * 2100 + b"\n")
    assert witness.read(path) == "v" * 1900


def until_heard(watch: io.FileIO, paths: set[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while paths:
        assert time.monotonic() < deadline, paths
        paths = paths - set(os.read(watch.fileno(), 65536).decode().splitlines())


def test_refused_watches(box: Path, mount: Mount, witness: Witness) -> None:
    """What the daemon refuses comes as an error of write(2) on the device, and ends nothing."""
    with open(box / ".watch", "r+b", buffering=0) as watch:
        armed = 0
        refused = None
        while armed < 150 and refused is None:
            try:
                watch.write(b"n%d\n" % armed)
                armed += 1
            except OSError as error:
                refused = error.errno
        if IN_DOM0:
            assert (armed, refused) == (150, None)
        else:
            assert 50 < armed < 150
            assert refused == (errno.ENOSPC if DAEMON == "C" else errno.EDQUOT)
        until_heard(watch, {f"n{number}" for number in range(armed)})
        (box / "n3").write_text("x")
        until_heard(watch, {"n3"})
    # There is room again.
    with open(box / ".watch", "rb", buffering=0) as watch:
        assert watch.read(100) == b".\n"
    witness.write(f"data/{box.name}/after", "1")
    assert (box / "after").read_text() == "1\n"


def test_each_event_once(box: Path, witness: Witness, tmp_path: Path) -> None:
    """The device lets a watch be made twice, and then tells everything twice.  And replies and events
    come in any order."""
    outputs = [tmp_path / f"heard-{number}" for number in range(2)]
    readers = []
    for output in outputs:
        with open(output, "wb") as file:
            readers.append(subprocess.Popen(["cat", box / ".watch"], stdout=file))
    try:
        expected = ".\n"
        for number in range(20):
            for output in outputs:
                until_text(output, expected)
            (box / f"x{number}").write_text("1")
            expected += f"x{number}\n"
        witness.write(f"data/{box.name}/last", "1")
        for output in outputs:
            until_text(output, f"{expected}last\n")
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def test_transactions_end_with_their_mount(mount: Mount, tmp_path: Path) -> None:
    """Killed, xsfs leaves none open: a domU, which may have 11, could not begin others.  What has ended
    is ESTALE."""
    killed = Mount([DEVICE], tmp_path / "killed")
    try:
        killed.wait_mounted()
        killed.bash(
            "for n in 1 2 3 4 5 6 7 8 9; do"
            " mkdir .transaction/t$n || exit 1; cat .transaction/t$n/domid; done; true"
        )
        killed.process.kill()
        killed.process.wait(LIMIT)
    finally:
        killed.clear()
    mount.bash("for n in 1 2 3; do mkdir .transaction/t$n || exit 1; done; rmdir .transaction/t?")
    mount.bash("mkdir .transaction/t; cd .transaction/t; echo commit > .control")
    done = mount.run(
        "mkdir .transaction/u; exec 3> .transaction/u/.control; echo commit >&3; echo commit >&3"
    )
    assert "Stale file handle" in done.stderr
