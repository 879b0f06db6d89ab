"""dom0 and a domU at once: each has the same nodes mounted, one sees what the other does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import Mount
from tests.system.xen.checks.guest import Guest
from tests.system.xen.checks.machine import LIMIT, shell, until, until_text

INCREMENT = """
n=0
while [ $n -lt {times} ]; do
    tx={mount}/.transaction/increment-$$
    mkdir $tx || exit 1
    value=$(cat $tx/{key}) || exit 1
    echo $((value + 1)) > $tx/{key} || exit 1
    said=$(LC_ALL=C env echo commit 2>&1 > $tx/.control) && n=$((n + 1)) && continue
    case $said in *"temporarily unavailable"*) ;; *) echo "$said"; exit 1 ;; esac
done
"""
"""That of docs/transactions.md."""


@pytest.fixture
def shared(dom0: Mount, guest: Guest) -> Path:
    """The domU's `data`, as dom0 sees it; in the domU it is /mnt/xenstore/data."""
    return dom0.path / f"local/domain/{guest.domid}/data"


@pytest.fixture
def listening(guest: Guest) -> Iterator[None]:
    """The domU writes down what its data's .watch says, in /tmp/heard."""
    guest.bash("cat /mnt/xenstore/data/.watch > /tmp/heard 2>&1 & echo $! > /tmp/reader")
    until(lambda: guest.bash("cat /tmp/heard") == ".\n", "the domU's watch is armed")
    yield
    guest.bash("kill $(cat /tmp/reader)")


def test_each_knows_itself(guest: Guest, shared: Path) -> None:
    assert guest.bash("cat /mnt/xenstore/.domid").strip() == str(guest.domid)
    assert (shared.parent / "name").read_text() == f"{guest.name}\n"
    assert guest.bash("findmnt -n -o SOURCE,FSTYPE /mnt/xenstore").split() == [
        "xenstore",
        "fuse.xsfs",
    ]


def test_dom0_writes_the_domu_hears(guest: Guest, shared: Path, listening: None) -> None:
    (shared / "from-dom0").write_text("hello\n")
    until(lambda: guest.bash("cat /tmp/heard") == ".\nfrom-dom0\n", "the domU hears")
    assert guest.bash("cat /mnt/xenstore/data/from-dom0") == "hello\n"
    (shared / "from-dom0").unlink()
    until(lambda: guest.bash("cat /tmp/heard").count("from-dom0") == 2, "the domU hears again")


def test_the_domu_writes_dom0_hears(guest: Guest, shared: Path, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    with open(heard, "wb") as output:
        reader = subprocess.Popen(["cat", shared / ".watch"], stdout=output)
    try:
        until_text(heard, ".\n")
        guest.bash("echo hello > /mnt/xenstore/data/from-domu")
        until_text(heard, ".\nfrom-domu\n")
        assert (shared / "from-domu").read_text() == "hello\n"
    finally:
        reader.kill()
        reader.wait()


def test_dom0_loses_a_conflict(guest: Guest, dom0: Mount, shared: Path) -> None:
    guest.bash("echo 1 > /mnt/xenstore/data/n")
    path = f".transaction/dom0/{shared.relative_to(dom0.path)}/n"
    dom0.bash(f"mkdir .transaction/dom0; cat {path}")
    guest.bash("echo 10 > /mnt/xenstore/data/n")
    done = dom0.run(f"echo 2 > {path}; echo commit > .transaction/dom0/.control")
    assert "temporarily unavailable" in done.stderr
    assert (shared / "n").read_text() == "10\n"


def test_the_domu_loses_a_conflict(guest: Guest, shared: Path) -> None:
    guest.bash("cd /mnt/xenstore; echo 1 > data/n; mkdir .transaction/t; cat .transaction/t/data/n")
    (shared / "n").write_text("10")
    status, output = guest.run(
        "cd /mnt/xenstore; echo 2 > .transaction/t/data/n; LC_ALL=C;"
        " echo commit > .transaction/t/.control"
    )
    assert status != 0
    assert "temporarily unavailable" in output
    assert guest.bash("cat /mnt/xenstore/data/n") == "10\n"


def test_none_of_their_increments_is_lost(guest: Guest, dom0: Mount, shared: Path) -> None:
    (shared / "n").write_text("0")
    there = INCREMENT.format(times=2, mount="/mnt/xenstore", key="data/n")
    guest.bash(f"({there}echo done) > /tmp/increments 2>&1 &")
    key = (shared / "n").relative_to(dom0.path)
    shell(INCREMENT.format(times=2, mount=dom0.path, key=key), limit=LIMIT * 3)
    until(lambda: guest.bash("cat /tmp/increments"), "the domU is done", LIMIT * 3)
    assert guest.bash("cat /tmp/increments") == "done\n"
    assert (shared / "n").read_text() == "4\n"


def test_one_of_them_gets_the_lock(guest: Guest, shared: Path) -> None:
    mine = 0
    for _ in range(2):
        guest.bash(
            "(mkdir /mnt/xenstore/data/lock && echo won || echo lost) > /tmp/lock 2>/dev/null &"
        )
        try:
            (shared / "lock").mkdir()
            mine += 1
            expected = "lost\n"
        except FileExistsError:
            expected = "won\n"
        until(lambda: guest.bash("cat /tmp/lock") != "", "the other one has lost or won")
        assert guest.bash("cat /tmp/lock") == expected
        (shared / "lock").rmdir()
    print(f"dom0 won {mine} of 2")


def test_permissions_hold_for_the_domu(guest: Guest, shared: Path) -> None:
    node = shared.parent / "given"
    node.write_text("secret\n")
    for perms, reads, writes in (
        ("n0", False, False),
        (f"n0,r{guest.domid}", True, False),
        (f"n0,b{guest.domid}", True, True),
    ):
        subprocess.run(
            ["setfattr", "-n", "user.xs.perms", "-v", perms, node], check=True, timeout=LIMIT
        )
        assert (guest.run("cat /mnt/xenstore/given")[0] == 0) == reads, perms
        assert (guest.run("echo x > /mnt/xenstore/given")[0] == 0) == writes, perms
    node.unlink()
