"""Ring: a real mount, of every store.  Transactions as directories, and the script of their document.

What a conflict is differs among the stores, and is written down here where it matters: xenstored (and
the embedded store) compares nodes, oxenstored asks all questions again and compares the answers.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lying_store import LyingStore, hang_up, silence
from tests.mounting import GUEST, LIMIT, Mount, Place, mounted, open_place
from tests.test_mount_values import fails, node
from tests.xenstored.harness import RealXenstored, XsClient, XsError
from xsfs.known import KnownDirectories
from xsfs.transactions import OPEN_MAX, KnownInTransaction
from xsfs.wire import Message, Op

SHELLS = ["bash", "dash"]

DOCUMENT = Path(__file__).parents[1] / "docs" / "transactions.md"

GUEST_OPEN_MAX = 11
"""How many transactions a guest may have open: ten, and one more is let in."""


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


def start(mount: Mount, name: str) -> Path:
    path = mount.path / ".transaction" / name
    path.mkdir()
    return path


def inside(tx: Path, box: Path) -> Path:
    """The box as the transaction sees it."""
    return tx / "data" / box.name


def control(tx: Path, word: str) -> None:
    """As `echo WORD > .control`."""
    # Not by a file object, which takes EAGAIN for a pipe that is full.
    file = os.open(tx / ".control", os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(file, word.encode() + b"\n")
    finally:
        os.close(file)


def shell(name: str, script: str, mount: Mount, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [name, "-c", script, name, *words],
        cwd=mount.path,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=LIMIT * 3,
        check=False,
    )


def until(condition: Callable[[], bool]) -> None:
    """Until it is so, which it must be in time."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline


# ---------------------------------------------------------------------------------- the ordinary


@pytest.mark.parametrize("name", SHELLS)
def test_four_lines(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient, name: str
) -> None:
    witness.write(node(place, box) + "/n", b"41")
    tx.mkdir()
    done = shell(
        name,
        'cd .transaction/t1 && echo $(( $(cat "$1/n") + 1 )) > "$1/n" && cat "$1/n"'
        ' && echo commit > .control; echo $?; cat "$1/n"',
        mount,
        f"data/{box.name}",
    )
    assert done.stdout == "42\n0\n", done.stderr
    assert "Stale file handle" in done.stderr
    assert witness.read(node(place, box) + "/n") == b"42"
    assert not tx.exists()


def test_nobody_outside_sees_it_before_the_commit_and_then_all_at_once(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    top = node(place, box)
    (box / "old").write_text("1\n")
    tx.mkdir()
    work = inside(tx, box)
    (work / "new").write_text("2\n")
    (work / "old").write_text("3\n")
    assert (work / "old").read_text() == "3\n"
    assert sorted(os.listdir(work)) == ["new", "old"]
    assert (box / "old").read_text() == "1\n"
    assert os.listdir(box) == ["old"]
    assert witness.ls(top) == ["old"]
    witness.watch(top, "t")
    assert witness.event() == (top, "t")
    control(tx, "commit")
    assert {path for path, _ in witness.drain_events(0.1)} == {f"{top}/new", f"{top}/old"}
    witness.unwatch(top, "t")
    assert (witness.read(f"{top}/new"), witness.read(f"{top}/old")) == (b"2", b"3")
    assert sorted(os.listdir(box)) == ["new", "old"]
    assert mount.counter("transactions") == 0


@pytest.mark.parametrize("by", ["rmdir", "control"])
def test_rollback_undoes_all(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient, by: str
) -> None:
    (box / "x").write_text("1\n")
    tx.mkdir()
    work = inside(tx, box)
    (work / "x").write_text("2\n")
    (work / "d").mkdir()
    if by == "rmdir":
        tx.rmdir()
    else:
        control(tx, "rollback")
    assert not tx.exists()
    assert witness.ls(node(place, box)) == ["x"]
    assert witness.read(node(place, box) + "/x") == b"1"
    # What was a directory only in there is none when somebody makes such a node.
    witness.mkdir(node(place, box) + "/d")
    assert (box / "d").is_file()


def test_the_whole_tree_is_in_it(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    top = node(place, box)
    for name in ("gone", "moved", "log", "private", "dir/sub/leaf", "dir/other"):
        witness.write(f"{top}/{name}", b"1")
    (box / "empty").mkdir()
    tx.mkdir()
    work = inside(tx, box)
    assert sorted(os.listdir(work)) == ["dir", "empty", "gone", "log", "moved", "private"]
    assert (work / "empty").is_dir()
    (work / "gone").unlink()
    (work / "moved").rename(work / "here")
    (work / "dir").rename(work / "folder")
    (work / "empty").rmdir()
    (work / "made").mkdir()
    with open(work / "log", "ab", buffering=0) as log:
        log.write(b"2\n")
        log.write(b"3\n")
    os.close(os.open(work / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    with pytest.raises(FileExistsError):
        os.open(work / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with pytest.raises(FileExistsError):
        (work / "made").mkdir()
    with fails(errno.ENOTEMPTY):
        (work / "folder").rmdir()
    (work / "folder" / ".value").write_text("4\n")
    (work / "here.d" / "child").write_text("5\n")
    owner = place.domid
    os.setxattr(work / "private", "user.xs.perms", f"n{owner},r3".encode())
    assert os.getxattr(work / "private", "user.xs.path") == f"{top}/private".encode()
    assert (tx / ".domid").read_text() == f"{place.domid}\n"
    assert Path(f"{tx}/.root{top}/folder/sub/leaf").read_text() == "1\n"
    os.truncate(work / "private", 0)
    with fails(errno.EFBIG):
        (work / "private").write_bytes(b"x" * 5000)
    assert witness.read(f"{top}/gone") == b"1"
    control(tx, "commit")
    assert sorted(witness.ls(top)) == ["folder", "here", "lock", "log", "made", "private"]
    assert witness.read(f"{top}/log") == b"1\n2\n3"
    assert witness.read(f"{top}/folder") == b"4"
    assert witness.read(f"{top}/folder/sub/leaf") == b"1"
    assert witness.read(f"{top}/here/child") == b"5"
    assert witness.read(f"{top}/private") == b""
    assert witness.get_perms(f"{top}/private") == [f"n{owner}", "r3"]
    # What has been a directory in there stays one.
    assert (box / "made").is_dir()
    assert (box / "folder").is_dir()
    assert (box / "lock").is_file()


@pytest.mark.parametrize("name", SHELLS)
def test_tools_work_in_it(mount: Mount, box: Path, tx: Path, name: str) -> None:
    tx.mkdir()
    done = shell(
        name,
        "set -e; cd .transaction/t1/data/$1; mkdir -p a/b; echo 1 > a/b/x; cp -a a c; mv c/b d;"
        " echo 2 >> d/x; rm -r a; grep -r . .; cd ../..; echo commit > .control",
        mount,
        box.name,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["./d/x:1", "./d/x:2"]
    assert mount.bash(f"cd {box}; find . | sort; cat d/x") == ".\n./c\n./d\n./d/x\n1\n2\n"


def test_appends_within_one_by_many_lose_nothing(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    tx.mkdir()
    script = f"for i in {{1..10}}; do echo $0.$i >> {inside(tx, box)}/log || exit 1; done"
    writers = [subprocess.Popen(["bash", "-c", script, name]) for name in "abcd"]
    for writer in writers:
        assert writer.wait(LIMIT * 3) == 0
    control(tx, "commit")
    lines = witness.read(node(place, box) + "/log").decode().splitlines()
    assert sorted(lines) == sorted(f"{n}.{i}" for n in "abcd" for i in range(1, 11))


def test_what_was_closed_before_the_commit_is_in_it(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    (box / "emptied").write_text("1\n")
    tx.mkdir()
    done = shell(
        "dash",
        "cd .transaction/t1; : > data/$1/emptied; : > data/$1/new; echo commit > .control",
        mount,
        box.name,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert witness.read(node(place, box) + "/emptied") == b""
    assert witness.read(node(place, box) + "/new") == b""


# ----------------------------------------------------------------------- the directories themselves


def test_what_is_listed(mount: Mount, box: Path, tx: Path) -> None:
    tx.mkdir()
    other = start(mount, "Other_one-2@x")
    assert sorted(os.listdir(mount.path / ".transaction")) == ["Other_one-2@x", "t1"]
    assert mount.bash("ls -ld .transaction/t1 .transaction | cut -c1-10") == "drwx------\n" * 2
    assert ".transaction" not in os.listdir(mount.path)
    assert set(os.listdir(tx)) == set(os.listdir(mount.path))
    assert not {".control", ".transaction", ".root"} & set(os.listdir(tx))
    assert not (tx / ".transaction").exists()
    assert mount.counter("transactions") == 2
    other.rmdir()
    assert os.listdir(mount.path / ".transaction") == ["t1"]
    assert mount.counter("transactions") == 1


def test_an_empty_directory_that_was_made_before_is_one_inside(
    mount: Mount, box: Path, tx: Path
) -> None:
    (box / "empty").mkdir()
    tx.mkdir()
    inside = tx / box.relative_to(mount.path)
    with os.scandir(inside) as entries:
        assert {entry.name: entry.is_dir() for entry in entries}["empty"]
    empty = os.open(inside / "empty", os.O_RDONLY | os.O_DIRECTORY)
    try:
        time.sleep(0.02)  # until the kernel asks again
        assert stat.S_ISDIR(os.fstat(empty).st_mode)
        assert os.listdir(empty) == []
    finally:
        os.close(empty)
    (inside / "empty" / "file").touch()
    assert os.listdir(inside / "empty") == ["file"]


def test_names(mount: Mount, tx: Path) -> None:
    tx.mkdir()
    transactions = mount.path / ".transaction"
    with pytest.raises(FileExistsError):
        tx.mkdir()
    for name in ("a.b", ".control", "a b", "a:b", "ü", ".d"):
        with fails(errno.EINVAL):
            (transactions / name).mkdir()
    with fails(errno.ENAMETOOLONG):
        (transactions / ("n" * 256)).mkdir()
    with fails(errno.EPERM):
        (transactions / "file").write_text("1\n")
    with fails(errno.EPERM):
        os.mknod(transactions / "file")
    with pytest.raises(IsADirectoryError):
        tx.unlink()
    with fails(errno.EPERM):
        tx.rename(transactions / "t2")
    with pytest.raises(FileNotFoundError):
        (transactions / "none").rmdir()
    with fails(errno.EPERM):
        transactions.rmdir()
    with fails(errno.EPERM):
        transactions.rename(mount.path / "data" / "transactions")
    with fails(errno.EINVAL):
        (tx / ".transaction").mkdir()
    with fails(errno.EPERM):
        (tx / ".control").unlink()
    assert os.listdir(transactions) == ["t1"]


def test_moving_in_and_out_copies(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    tx.mkdir()
    work = inside(tx, box)
    (box / "in").write_text("1\n")
    (work / "out").write_text("2\n")
    for source, target in ((box / "in", work / "in2"), (work / "out", box / "out2")):
        with fails(errno.EXDEV):
            source.rename(target)
        mount.bash(f"mv {source} {target}")
    assert (work / "in2").read_text() == "1\n"
    assert witness.ls(node(place, box)) == ["out2"]
    with fails(errno.EXDEV):
        (box / "out2").rename(mount.path / ".transaction" / "out2")


@pytest.mark.parametrize("name", SHELLS)
def test_words_that_mean_nothing_change_nothing(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient, name: str
) -> None:
    tx.mkdir()
    (inside(tx, box) / "x").write_text("1\n")
    for word in ("Commit", "commit now", "commit\nrollback", "", "x" * 5000):
        with fails(errno.EINVAL):
            control(tx, word)
    done = shell(name, "echo abort > .transaction/t1/.control", mount)
    assert done.returncode != 0
    os.truncate(tx / ".control", 0)
    assert (inside(tx, box) / "x").read_text() == "1\n"
    assert witness.ls(node(place, box)) == []
    control(tx, " commit ")
    assert witness.ls(node(place, box)) == ["x"]


def report(tx: Path) -> dict[str, str]:
    lines = (tx / ".control").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def test_control_says_what_it_is(mount: Mount, box: Path, tx: Path) -> None:
    tx.mkdir()
    before = report(tx)
    assert list(before) == ["started", "idle", "operations", "state"]
    assert before["operations"] == "0"
    assert before["state"] == "open"
    started = datetime.fromisoformat(before["started"])
    assert abs(datetime.now(UTC) - started) < timedelta(seconds=LIMIT)
    assert int(before["idle"]) < LIMIT
    # Looking at it from outside is no use of it.
    mount.bash("ls -l .transaction; stat .transaction/t1 .transaction/t1/.control")
    assert report(tx)["operations"] == "0"
    (inside(tx, box) / "x").write_text("1\n")
    assert int(report(tx)["operations"]) > 0
    assert len((tx / ".control").read_bytes()) == (tx / ".control").stat().st_size


# -------------------------------------------------------------------------------------- conflicts


@pytest.mark.parametrize("name", SHELLS)
def test_a_conflict_is_eagain_and_the_transaction_is_gone(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient, name: str
) -> None:
    path = node(place, box)
    witness.write(f"{path}/seen", b"1")
    tx.mkdir()
    work = inside(tx, box)
    assert (work / "seen").read_text() == "1\n"
    (work / "x").write_text("2\n")
    witness.write(f"{path}/seen", b"3")
    said = shell(name, "env echo commit > .transaction/t1/.control", mount)
    assert "Resource temporarily unavailable" in said.stderr
    assert not tx.exists()
    assert witness.ls(path) == ["seen"]
    again = start(mount, "t1")
    assert (inside(again, box) / "seen").read_text() == "3\n"
    (inside(again, box) / "x").write_text("2\n")
    control(again, "commit")
    assert witness.read(f"{path}/x") == b"2"


def commit_fails(tx: Path) -> bool:
    """Whether the commit is a conflict; no other error is let."""
    try:
        control(tx, "commit")
    except BlockingIOError:
        return True
    return False


def test_conflicts_of_one_that_only_read(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    witness.write(node(place, box) + "/x", b"1")
    tx.mkdir()
    assert (inside(tx, box) / "x").read_text() == "1\n"
    witness.write(node(place, box) + "/x", b"2")
    # oxenstored's was a snapshot; what xenstored showed is true only if the commit succeeds.
    assert commit_fails(tx) == (place.kind != "ocaml")


def test_conflicts_of_the_same_value_written_again(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    witness.write(node(place, box) + "/x", b"1")
    tx.mkdir()
    assert (inside(tx, box) / "x").read_text() == "1\n"
    (inside(tx, box) / "y").write_text("1\n")
    witness.write(node(place, box) + "/x", b"1")
    # oxenstored asks again, and hears the same.
    assert commit_fails(tx) == (place.kind != "ocaml")


def test_conflicts_on_the_way(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    """Looking up a name reads the list of children of all directories on the way."""
    tx.mkdir()
    (inside(tx, box) / "x").write_text("1\n")
    witness.write(node(place, box) + "/other", b"1")
    assert commit_fails(tx)


def test_no_conflict_with_what_lies_elsewhere(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    top = node(place, box)
    for name in ("mine/x", "others/x"):
        witness.write(f"{top}/{name}", b"1")
    tx.mkdir()
    (inside(tx, box) / "mine" / "x").write_text("2\n")
    witness.write(f"{top}/others/x", b"2")
    witness.write(f"{top}/others/y", b"2")
    assert not commit_fails(tx)
    assert witness.read(f"{top}/mine/x") == b"2"


def test_two_of_one_mount_conflict(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    (box / "n").write_text("1\n")
    tx.mkdir()
    other = start(mount, "other")
    for each in (tx, other):
        (inside(each, box) / "n").write_text((inside(each, box) / "n").read_text() + each.name)
    control(tx, "commit")
    assert commit_fails(other)
    assert witness.read(node(place, box) + "/n") == b"1\nt1"


# ---------------------------------------------------------------------------------- after the end


def end_by(how: str, tx: Path) -> None:
    if how == "rmdir":
        tx.rmdir()
    else:
        control(tx, how)


@pytest.mark.parametrize("how", ["commit", "rollback", "rmdir"])
def test_what_it_opened_is_stale_after_its_end(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient, how: str
) -> None:
    (box / "x").write_text("1\n")
    tx.mkdir()
    work = inside(tx, box)
    (work / "dir").mkdir()
    reader = os.open(work / "x", os.O_RDWR)
    assert os.read(reader, 1) == b"1"
    files = [reader, os.open(tx / ".domid", os.O_RDONLY), os.open(tx / ".control", os.O_RDWR)]
    found = os.open(work / "x", os.O_PATH)
    directories = [os.open(path, os.O_RDONLY) for path in (tx, work, work / "dir")]
    inode = tx.stat().st_ino
    end_by(how, tx)
    try:
        for file in files:
            with fails(errno.ESTALE):
                os.pread(file, 1, 0)
            with fails(errno.ESTALE):
                os.fstat(file)
        with fails(errno.ESTALE):
            os.pwrite(reader, b"2", 0)
        with fails(errno.ESTALE):
            os.ftruncate(reader, 0)
        with fails(errno.ESTALE):
            os.pwrite(files[2], b"commit\n", 0)
        with fails(errno.ESTALE):
            os.getxattr(f"/proc/self/fd/{found}", "user.xs.value")
        for directory in directories:
            with fails(errno.ESTALE):
                os.listdir(directory)
            # A directory that rmdir(2) has removed Linux does not look into.
            number = (
                errno.ENOENT if how == "rmdir" and directory == directories[0] else errno.ESTALE
            )
            with fails(number):
                os.stat("x", dir_fd=directory)
            with fails(number):
                os.mkdir("new", dir_fd=directory)
            with fails(number):
                os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
    finally:
        for file in (*files, found, *directories):
            os.close(file)
    # The next of that name is another one, and the mount is alive.
    again = start(mount, "t1")
    assert again.stat().st_ino != inode
    assert (inside(again, box) / "x").read_text() == "1\n"
    assert (inside(again, box) / "dir").exists() == (how == "commit")
    again.rmdir()
    assert mount.counter("transactions") == 0


@pytest.mark.parametrize("name", SHELLS)
def test_a_working_directory_in_an_ended_one(mount: Mount, box: Path, tx: Path, name: str) -> None:
    tx.mkdir()
    done = shell(
        name,
        "cd .transaction/t1/data/$1; echo 1 > x; echo rollback > ../../.control;"
        ' cat x; ls; echo 2 > x; cd "$2" && cat .domid && ls .transaction | wc -l',
        mount,
        box.name,
        str(mount.path),
    )
    assert done.stderr.count("Stale file handle") + done.stderr.count("Cannot create") >= 2
    assert done.stdout.split() == [(mount.path / ".domid").read_text().strip(), "0"]
    assert os.listdir(box) == []


def test_a_name_used_again_and_again_shares_nothing(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    opened = []
    for number in range(20):
        path = start(mount, "again")
        assert not (inside(path, box) / "x").exists()
        (inside(path, box) / "x").write_text(f"{number}\n")
        opened.append(os.open(inside(path, box), os.O_RDONLY))
        control(path, "rollback")
    for directory in opened:
        with fails(errno.ESTALE):
            os.stat("x", dir_fd=directory)
        os.close(directory)
    assert witness.ls(node(place, box)) == []


def test_those_that_have_ended_leave_nothing_in_memory(mount: Mount, box: Path) -> None:
    """Whenever the kernel, for which it is a cache, forgets them."""
    before = mount.counter("inodes")
    for number in range(40):
        path = start(mount, f"forgotten{number}")
        (inside(path, box) / f"x{number}").write_text("1\n")
        control(path, "rollback") if number % 2 else path.rmdir()
    until(lambda: mount.counter("inodes") < before + 10)


# ------------------------------------------------------------------------------------------ limits


def test_how_many_can_be_open(place: Place, mount: Mount) -> None:
    opened = []
    most = GUEST_OPEN_MAX if place.guest else OPEN_MAX
    for number in range(most):
        opened.append(start(mount, f"many{number}"))
    with fails(errno.EDQUOT if place.name == "ocaml-guest" else errno.ENOSPC):
        start(mount, "one-more")
    assert mount.counter("transactions") == most
    assert len(os.listdir(mount.path / ".transaction")) == most
    opened.pop().rmdir()
    opened.append(start(mount, "one-more"))
    for path in opened:
        path.rmdir()
    assert mount.counter("transactions") == 0


NONE_OPEN = "total 0\ncat: '.transaction/*/.control': No such file or directory\n"


def test_idle_ones_are_rolled_back(
    place: Place, box: Path, witness: XsClient, tmp_path: Path
) -> None:
    (box / "old").write_text("1\n")
    with mounted(["-o", "tx_timeout=0.5", place.socket], tmp_path / "m") as mount:
        path = start(mount, "idle")
        (inside(path, box) / "x").write_text("1\n")
        held = os.open(inside(path, box), os.O_RDONLY)
        # Neither listing it nor reading its state is use.
        look = "ls -l .transaction; cat .transaction/*/.control 2>&1 || true"
        until(lambda: mount.bash(look) == NONE_OPEN)
        with fails(errno.ESTALE):
            os.stat("x", dir_fd=held)
        os.close(held)
        assert mount.counter("transactions") == 0
        assert "transaction idle was not used for 0.5 s" in mount.stderr
        assert witness.ls(node(place, box)) == ["old"]


def test_one_in_use_stays(place: Place, box: Path, witness: XsClient, tmp_path: Path) -> None:
    (box / "old").write_text("1\n")
    with mounted(["-o", "tx_timeout=1", place.socket], tmp_path / "m") as mount:
        path = start(mount, "used")
        (inside(path, box) / "x").write_text("1\n")
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert (inside(path, box) / "x").read_text() == "1\n"
            witness.drain_events(0.2)
        control(path, "commit")
        assert witness.read(node(place, box) + "/x") == b"1"


# ----------------------------------------------------------------------------- ends of all kinds


def open_at_once(witness: XsClient) -> int:
    """How many transactions a guest can open now, by the daemon's own count."""
    opened = []
    try:
        while True:
            opened.append(witness.start())
    except XsError as error:
        full = error.name
    assert full in ("ENOSPC", "EQUOTA")
    for number in opened:
        witness.end(number, commit=False)
    return len(opened)


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("name", ["C-guest", "ocaml-guest"])
def test_the_end_of_the_mount_leaves_none_behind(tmp_path: Path, name: str, how: str) -> None:
    with open_place(name, tmp_path) as place, place.witness() as witness:
        assert open_at_once(witness) == GUEST_OPEN_MAX
        mount = Mount([place.socket], tmp_path / "m")
        try:
            mount.wait_mounted()
            for number in range(GUEST_OPEN_MAX):
                path = start(mount, f"t{number}")
                (path / "data" / f"x{number}").write_text("1\n")
            assert open_at_once(witness) == 0
            if how == "umount":
                assert mount.end() == 0
            else:
                status = mount.end(signal.Signals[how])
                assert status == (0 if how == "SIGTERM" else -signal.SIGKILL)
            until(lambda: open_at_once(witness) == GUEST_OPEN_MAX)
            assert not [name for name in witness.ls(f"{place.home}/data") if name.startswith("x")]
        finally:
            mount.clear()


@pytest.mark.parametrize("how", ["commit", "rollback", "rmdir"])
@pytest.mark.parametrize("name", ["C-guest", "ocaml-guest"])
def test_one_that_has_grown_too_big(tmp_path: Path, name: str, how: str) -> None:
    """What oxenstored takes more than xsfs lets it have, it does not let go of any more."""
    with (
        open_place(name, tmp_path) as place,
        place.witness() as witness,
        mounted([place.socket], tmp_path / "m") as mount,
    ):
        path = start(mount, "t1")
        too_big = errno.EDQUOT if place.kind == "ocaml" else errno.ENOSPC
        with fails(too_big):
            for number in range(2000):
                (path / "data" / f"d{number // 100}").mkdir(exist_ok=True)
                (path / "data" / f"d{number // 100}" / f"x{number}").write_text("1\n")
        if how == "commit" and place.kind == "C":
            with fails(errno.ENOMEM):
                end_by(how, path)
        else:
            end_by(how, path)
        assert not path.exists()
        assert open_at_once(witness) == GUEST_OPEN_MAX
        assert ("d0" in witness.ls(f"{place.home}/data")) == (
            how == "commit" and place.kind == "ocaml"
        )


@pytest.mark.parametrize("how", [None, signal.SIGTERM, signal.SIGKILL])
def test_oxenstored_ends_when_the_mount_has(tmp_path: Path, how: signal.Signals | None) -> None:
    """It serves on after SIGTERM for as long as anybody has a transaction open."""
    with RealXenstored("ocaml") as daemon:
        daemon.populate()
        mount = Mount([daemon.socket], tmp_path / "m")
        try:
            mount.wait_mounted()
            start(mount, "t1")
            mount.end(how)
            assert daemon.process is not None
            process = daemon.process
            daemon.kill(signal.SIGTERM, timeout=LIMIT)
            assert process.wait(LIMIT) == 0
        finally:
            mount.clear()


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_the_daemon_restarts(tmp_path: Path, kind: str) -> None:
    with RealXenstored(kind) as daemon:
        daemon.populate()
        with mounted([daemon.socket], tmp_path / "m") as mount:
            path = start(mount, "t1")
            (path / "data" / "x").write_text("1\n")
            top, file = os.open(path, os.O_RDONLY), os.open(path / "data" / "x", os.O_RDWR)
            held = os.open(path / ".control", os.O_WRONLY)
            daemon.restart()
            daemon.populate()
            for _ in range(2):
                with fails(errno.ESTALE):
                    os.stat("data", dir_fd=top)
                with fails(errno.ESTALE):
                    os.listdir(top)
                with fails(errno.ESTALE):
                    os.pread(file, 10, 0)
                with fails(errno.ESTALE):
                    os.pwrite(file, b"2", 0)
                with fails(errno.ESTALE):
                    os.write(held, b"commit\n")
            until(lambda: os.listdir(mount.path / ".transaction") == [])
            assert "transaction t1 lost its connection" in mount.stderr
            again = start(mount, "t1")
            (again / "data" / "y").write_text("2\n")
            control(again, "commit")
            assert (mount.path / "data" / "y").read_text() == "2\n"
            assert not (mount.path / "data" / "x").exists()
            for number in (top, file, held):
                os.close(number)


@pytest.mark.parametrize("lie", [hang_up, silence])
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_commit_whose_outcome_is_unknown_is_not_tried_again(
    tmp_path: Path, kind: str, lie: Callable[[object, Message], bool]
) -> None:
    ends = []

    def at_the_end(talk: object, request: Message) -> bool:
        if request.op != Op.TRANSACTION_END:
            return False
        ends.append(request.payload)
        return lie(talk, request)

    with RealXenstored(kind) as daemon, LyingStore(tmp_path / "liar.sock", daemon.socket) as liar:
        daemon.populate()
        with mounted(["-o", "timeout=0.5", liar.path], tmp_path / "m") as mount:
            path = start(mount, "t1")
            (path / "data" / "x").write_text("1\n")
            liar.lie = at_the_end
            with fails(errno.EIO):
                control(path, "commit")
            assert not path.exists()
            assert ends == [b"T\0"]
            assert "whether transaction t1 was committed is unknown" in mount.stderr
            # A rollback needs no answer.
            path = start(mount, "t1")
            path.rmdir()
            liar.behave()
            assert mount.counter("transactions") == 0
            path = start(mount, "t1")
            (path / "data" / "x").write_text("2\n")
            control(path, "commit")
            with daemon.client() as witness:
                assert witness.read("/local/domain/0/data/x") == b"2"


def test_ends_at_the_same_time_are_one_end(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """Commits, rollbacks, rmdirs and uses, all at once: one end, and no wait is left."""
    for number in range(20):
        path = start(mount, f"race{number}")
        (inside(path, box) / f"x{number}").write_text("1\n")
        outcomes: list[str] = []

        def attempt(how: str, path: Path = path, outcomes: list[str] = outcomes) -> None:
            try:
                if how == "use":
                    for _ in range(5):
                        os.listdir(inside(path, box))
                    return
                end_by(how, path)
            except OSError as error:
                if error.errno not in (errno.ESTALE, errno.ENOENT):
                    outcomes.append(str(error))
                return
            outcomes.append(how)

        threads = [
            threading.Thread(target=attempt, args=(how,))
            for how in ("use", "commit", "rollback", "rmdir", "use", "commit")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert not any(thread.is_alive() for thread in threads)
        assert len(outcomes) == 1
        assert (f"x{number}" in witness.ls(node(place, box))) == (outcomes == ["commit"])
    assert mount.counter("transactions") == 0


# ---------------------------------------------------------------------------------- the document


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
    """One process at each of the mounts given, each adding one so many times."""
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
    # Each saw a number of its own.
    assert len(set(printed)) == len(mounts) * times


@pytest.mark.parametrize("name", SHELLS)
def test_the_script_loses_no_increment(
    place: Place, mount: Mount, box: Path, witness: XsClient, script: Path, name: str
) -> None:
    (box / "n").write_text("0\n")
    run_many(script, name, [mount] * 4, f"data/{box.name}/n", 20)
    assert witness.read(node(place, box) + "/n") == b"80"
    assert os.listdir(mount.path / ".transaction") == []


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
    # It is a shell which waits in open(2): that ends with the signal.
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 1
    assert os.listdir(mount.path / ".transaction") == []
    assert (box / "n").read_text() == "0\n"


def test_a_domain_has_the_transactions_of_its_own_rights(
    place: Place, mount: Mount, tx: Path
) -> None:
    """What Xenstore refuses, it refuses inside, at the time of the write."""
    tx.mkdir()
    name = Path(f"{tx}/.root/local/domain/{GUEST}/name")
    if place.guest:
        with pytest.raises(PermissionError):
            name.write_text("mine\n")
    elif place.kind != "embedded":
        name.write_text("renamed\n")
        assert name.read_text() == "renamed\n"


# ------------------------------------------------------------------------------------- the rest


def test_a_watch_file_of_an_ended_one_is_stale(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    """It tells of the store outside, and who waits in it hears of the end."""
    (box / "x").write_text("1\n")
    tx.mkdir()
    outcomes: list[bytes | int | None] = []
    watch = os.open(inside(tx, box) / ".watch", os.O_RDONLY)
    assert os.read(watch, 100) == b".\n"
    (inside(tx, box) / "x").write_text("2\n")
    witness.write(node(place, box) + "/y", b"1")
    assert os.read(watch, 100) == b"y\n"

    def wait() -> None:
        try:
            outcomes.append(os.read(watch, 100))
        except OSError as error:
            outcomes.append(error.errno)

    reader = threading.Thread(target=wait)
    reader.start()
    tx.rmdir()
    reader.join(LIMIT)
    assert outcomes == [errno.ESTALE]
    os.close(watch)


def test_the_embedded_store_in_the_same_process(tmp_path: Path) -> None:
    with mounted(["embedded"], tmp_path / "m") as mount:
        (mount.path / "data" / "n").write_text("1\n")
        first, second = start(mount, "first"), start(mount, "second")
        for path in (first, second):
            number = int((path / "data" / "n").read_text())
            (path / "data" / "n").write_text(f"{number + 1}\n")
        control(first, "commit")
        assert commit_fails(second)
        assert (mount.path / "data" / "n").read_text() == "2\n"
        assert mount.counter("transactions") == 0


def test_with_other_options(tmp_path: Path) -> None:
    with RealXenstored("C") as daemon:
        daemon.populate()
        with mounted(["-o", "root=/,raw", daemon.socket], tmp_path / "root") as mount:
            path = start(mount, "t1")
            file = path / "local" / "domain" / "0" / "x"
            file.write_bytes(b"exact")
            assert file.read_bytes() == b"exact"
            control(path, "commit")
            with daemon.client() as witness:
                assert witness.read("/local/domain/0/x") == b"exact"
        with mounted(["-o", "ro", daemon.socket], tmp_path / "ro") as mount:
            with fails(errno.EROFS):
                start(mount, "t1")
            assert os.listdir(mount.path / ".transaction") == []


PATHS = st.sampled_from([b"/a", b"/a/b", b"/a/b/c", b"/d", b"/d/b"])
STEPS = st.lists(
    st.tuples(st.just("add"), PATHS, st.booleans())
    | st.tuples(st.sampled_from(["discard", "discard_value"]), PATHS)
    | st.tuples(st.just("move"), st.sampled_from([(b"/a", b"/x"), (b"/a/b", b"/d/b")])),
    max_size=12,
)


def take(known: KnownDirectories, step: tuple[Any, ...]) -> None:
    if step[0] == "add":
        known.add(step[1], with_value=step[2])
    elif step[0] == "move":
        known.move(*step[1])
    else:
        getattr(known, step[0])(step[1])


@given(before=STEPS, within=STEPS)
def test_what_a_transaction_knows_of_directories(
    before: list[tuple[Any, ...]], within: list[tuple[Any, ...]]
) -> None:
    """The same as if it were true, and what it knew becomes true by the commit, not before."""
    outside, model = KnownDirectories(), KnownDirectories()
    for step in before:
        take(outside, step)
        take(model, step)
    all_paths = [b"/a", b"/a/b", b"/a/b/c", b"/d", b"/d/b", b"/d/b/c", b"/x", b"/x/b", b"/x/b/c"]
    first = [outside.get(path) for path in all_paths]
    layer = KnownInTransaction(outside)
    for step in within:
        take(layer, step)
        take(model, step)
    assert [layer.get(path) for path in all_paths] == [model.get(path) for path in all_paths]
    assert [outside.get(path) for path in all_paths] == first
    layer.committed()
    assert [outside.get(path) for path in all_paths] == [model.get(path) for path in all_paths]
