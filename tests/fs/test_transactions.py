"""Ring: a real mount, of every store.  The contents of the directory of a transaction.

The stores differ in what is a conflict: xenstored and the embedded store compare nodes.  oxenstored repeats
all requests and compares the answers.
"""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fs.test_values import fails, node
from tests.support.mounting import LIMIT, Mount, Place, mounted
from tests.support.transaction_dirs import (
    SHELLS,
    control,
    inside,
    shell,
    start,
)
from tests.support.xenstored.harness import RealXenstored, XsClient
from xsfs.view.kinds import StickyDirectories

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
    assert {path for path, _ in witness.events_so_far()} == {f"{top}/new", f"{top}/old"}
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
    # A directory of the transaction alone is none when another client creates the node.
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
    # A directory of the transaction stays one.
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
    with os.scandir(inside(tx, box)) as entries:
        assert {entry.name: entry.is_dir() for entry in entries}["empty"]
    empty = inside(tx, box) / "empty"
    # By a directory that is open already, of which the kernel is not to believe what it knows.
    look = 'cd "$1" && ls -A && stat --cached=never -c %F .'
    assert shell("bash", look, mount, str(empty)).stdout == "directory\n"
    (empty / "file").touch()
    assert os.listdir(empty) == ["file"]


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
    # oxenstored repeats the requests, and the answers are equal.
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


# ------------------------------------------------------------------------------------- the rest


def test_a_watch_file_of_an_ended_one_is_stale(
    place: Place, mount: Mount, box: Path, tx: Path, witness: XsClient
) -> None:
    """It reports changes of the store outside, and its waiting readers get an error at the end."""
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


def take(known: StickyDirectories, step: tuple[Any, ...]) -> None:
    if step[0] == "add":
        known.add(step[1], with_value=step[2])
    elif step[0] == "move":
        known.move(*step[1])
    else:
        getattr(known, step[0])(step[1])


def known_of(sticky: StickyDirectories, paths: Sequence[bytes]) -> list[bool | None]:
    return [sticky.has_value(path) if path in sticky else None for path in paths]


@given(before=STEPS, within=STEPS)
def test_what_a_transaction_knows_of_directories(
    before: list[tuple[Any, ...]], within: list[tuple[Any, ...]]
) -> None:
    """Its changes count within the transaction, and outside it only after the commit."""
    outside, model = StickyDirectories(), StickyDirectories()
    for step in before:
        take(outside, step)
        take(model, step)
    all_paths = [b"/a", b"/a/b", b"/a/b/c", b"/d", b"/d/b", b"/d/b/c", b"/x", b"/x/b", b"/x/b/c"]
    first = known_of(outside, all_paths)
    layer = StickyDirectories(outside)
    for step in within:
        take(layer, step)
        take(model, step)
    assert known_of(layer, all_paths) == known_of(model, all_paths)
    assert known_of(outside, all_paths) == first
    outside.carry_out(layer)
    assert known_of(outside, all_paths) == known_of(model, all_paths)
