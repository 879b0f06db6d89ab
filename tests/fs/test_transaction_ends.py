"""Ring: real mounts.  How transactions end: by themselves, and with their connection or mount."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fs.test_values import fails, node
from tests.support.lying_store import LyingStore, hang_up, silence
from tests.support.messages import Message
from tests.support.mounting import LIMIT, Mount, Place, mounted, open_place
from tests.support.transaction_dirs import (
    GUEST_OPEN_MAX,
    SHELLS,
    control,
    end_by,
    inside,
    open_at_once,
    shell,
    start,
    until,
)
from tests.support.xenstored.harness import DAEMONS, RealXenstored, XsClient
from xsfs.fs.transactions import OPEN_MAX
from xsfs.xenstore.protocol import Op

# ---------------------------------------------------------------------------------- after the end


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
    with mounted(["-o", "tx_timeout=3", place.socket], tmp_path / "m") as mount:
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
        assert "rolled back transaction idle: idle for 3 s" in mount.stderr
        assert witness.ls(node(place, box)) == ["old"]


def test_one_in_use_stays(place: Place, box: Path, witness: XsClient, tmp_path: Path) -> None:
    (box / "old").write_text("1\n")
    with mounted(["-o", "tx_timeout=8", place.socket], tmp_path / "m") as mount:
        path = start(mount, "used")
        (inside(path, box) / "x").write_text("1\n")
        end = time.monotonic() + 9
        while time.monotonic() < end:
            assert (inside(path, box) / "x").read_text() == "1\n"
            time.sleep(0.2)
        control(path, "commit")
        assert witness.read(node(place, box) + "/x") == b"1"


# ----------------------------------------------------------------------------- ends of all kinds


@pytest.mark.quick_if(name=["ocaml-guest"])
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


@pytest.mark.quick_if(how=["commit"], name=["ocaml-guest"])
@pytest.mark.parametrize("how", ["commit", "rollback", "rmdir"])
@pytest.mark.parametrize("name", ["C-guest", "ocaml-guest"])
def test_one_that_has_grown_too_big(tmp_path: Path, name: str, how: str) -> None:
    """oxenstored could not end a transaction with more requests than xsfs allows."""
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
            # Up to Xen 4.17 the daemon takes it for a lack of memory.
            with fails(errno.ENOSPC if DAEMONS["C"].version >= (4, 20) else errno.ENOMEM):
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
            assert "rolled back transaction t1: its connection was closed" in mount.stderr
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
        with mounted(["-o", "timeout=3", liar.path], tmp_path / "m") as mount:
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
