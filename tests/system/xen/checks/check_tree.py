"""Each thing that the tree can do, by the kernel's device; run in dom0 and in the domU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.mounting import Mount, winners
from tests.system.xen.checks.machine import DAEMON, IN_DOM0, Witness, shell, until_text


def test_read(mount: Mount, witness: Witness) -> None:
    assert mount.bash("cat .domid") == ("0\n" if IN_DOM0 else mount.bash("cat .domid"))
    if IN_DOM0:
        assert mount.bash("cat name domid") == "Domain-0\n0\n"
    else:
        assert mount.bash("cat vm").strip() == witness.read("vm")


def test_write(box: Path, mount: Mount, witness: Witness) -> None:
    mount.bash(f"echo 42 > data/{box.name}/x; echo more >> data/{box.name}/x")
    assert witness.read(f"data/{box.name}/x") == r"42\nmore"  # as xenstore-read shows a newline
    mount.bash(f"rm data/{box.name}/x")
    assert witness.run("list", f"data/{box.name}") == ""


def test_list(box: Path, mount: Mount, witness: Witness) -> None:
    for name in ("a", "b/c", "b/d/e"):
        witness.write(f"data/{box.name}/{name}", name)
    assert sorted(mount.bash(f"cd {box}; find . -type f").split()) == ["./a", "./b/c", "./b/d/e"]
    assert mount.bash(f"ls {box}").split() == ["a", "b"]
    assert mount.bash(f"cd {box}; grep -r . | sort") == "a:a\nb/c:b/c\nb/d/e:b/d/e\n"


def test_list_of_many(box: Path, witness: Witness) -> None:
    """In dom0 a listing past what one message takes; a domU may not have that many."""
    names = [f"number-{number:0200}" for number in range(24 if IN_DOM0 else 8)]
    witness.write(*(word for n in names for word in (f"data/{box.name}/{n}", n)))
    if DAEMON == "ocaml" and IN_DOM0:
        # It has no DIRECTORY_PART: nobody can list that.
        with pytest.raises(OSError, match="too long"):
            os.listdir(box)
        assert (box / names[7]).read_text() == names[7] + "\n"
    else:
        assert sorted(os.listdir(box)) == names
        assert shell(f"cat {box}/* | wc -l").strip() == str(len(names))


def test_permissions(box: Path, mount: Mount, witness: Witness) -> None:
    mount.bash(f"echo 1 > data/{box.name}/x")
    domid = mount.bash("cat .domid").strip()
    mount.bash(f"setfattr -n user.xs.perms -v n{domid},r9 data/{box.name}/x")
    assert f"(n{domid},r9)" in witness.run("ls", "-p", f"data/{box.name}")
    shown = mount.bash(f"getfattr --only-values -n user.xs.perms data/{box.name}/x")
    assert shown == f"n{domid},r9"


def test_locks(box: Path) -> None:
    assert winners(lambda: (box / "lock").mkdir()) == 1
    assert winners(lambda: os.close(os.open(box / "file", os.O_CREAT | os.O_EXCL))) == 1


def test_rename_of_a_subtree(box: Path, mount: Mount, witness: Witness) -> None:
    witness.write(f"data/{box.name}/old/a", "1", f"data/{box.name}/old/b/c", "2")
    mount.bash(f"mv data/{box.name}/old data/{box.name}/new")
    assert witness.read(f"data/{box.name}/new/b/c") == "2"
    assert witness.run("list", f"data/{box.name}").split() == ["new"]


def test_backup_and_restore(box: Path, mount: Mount, witness: Witness, tmp_path: Path) -> None:
    witness.write(f"data/{box.name}/old/a", "1", f"data/{box.name}/old/b/c", "2")
    shell(f"tar -C {box} --xattrs --xattrs-include='user.*' -cf {tmp_path}/t old")
    shell(f"rm -r {box}/old; tar -C {box} --xattrs --xattrs-include='user.*' -xf {tmp_path}/t")
    assert witness.read(f"data/{box.name}/old/b/c") == "2"


def test_watch(box: Path, mount: Mount, witness: Witness, tmp_path: Path) -> None:
    """Own changes and those of others, each within moments, each once."""
    heard = tmp_path / "heard"
    with open(heard, "wb") as output:
        reader = subprocess.Popen(["cat", box / ".watch"], stdout=output)
    try:
        until_text(heard, ".\n")
        for number in range(5):
            before = heard.read_text()
            witness.write(f"data/{box.name}/theirs", str(number))
            until_text(heard, f"{before}theirs\n")
            (box / "ours").write_text(str(number))
            until_text(heard, f"{before}theirs\nours\n")
    finally:
        reader.kill()
        reader.wait()


def test_transaction_commits(box: Path, mount: Mount, witness: Witness) -> None:
    inside = f".transaction/t/data/{box.name}"
    mount.bash(f"mkdir .transaction/t; echo 1 > {inside}/a; echo 2 > {inside}/b")
    assert witness.run("list", f"data/{box.name}") == ""
    mount.bash("echo commit > .transaction/t/.control")
    assert sorted(witness.run("list", f"data/{box.name}").split()) == ["a", "b"]


def test_transaction_conflicts(box: Path, mount: Mount, witness: Witness) -> None:
    witness.write(f"data/{box.name}/n", "1")
    mount.bash(f"mkdir .transaction/t; cat .transaction/t/data/{box.name}/n")
    witness.write(f"data/{box.name}/n", "7")
    mount.bash(f"echo 2 > .transaction/t/data/{box.name}/n")
    done = mount.run("echo commit > .transaction/t/.control")
    assert done.returncode != 0
    assert "temporarily unavailable" in done.stderr
    assert witness.read(f"data/{box.name}/n") == "7"


def test_the_store_beyond_home(mount: Mount, witness: Witness) -> None:
    """dom0 sees all of it; a domU what it is let see, though not the way there."""
    if IN_DOM0:
        assert {"local", "tool"} <= set(os.listdir(mount.path / ".root"))
        found = set(mount.bash("cd .root; find . -path ./local/domain/0/name").split())
        assert found == {"./local/domain/0/name"}
        return
    domid = mount.bash("cat .domid").strip()
    assert mount.run("ls .root/local/domain").returncode != 0
    assert mount.bash(f"cat .root/local/domain/{domid}/vm").strip() == witness.read("vm")
    assert mount.run("echo x > .root/tool/x").returncode != 0
