"""Open files on real mounts: what they owe, what others see of it, and how they end.

A file can go while it is open: this mount, another mount or another client removes or replaces it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.mounting import LIMIT, Mount, Place, each_place, mounted
from tests.support.xenstored.harness import XsClient, XsError

# The state of open files does not depend on the store.
place = each_place("C", "ocaml", "C-guest", "embedded", quick=("C",))

Outcome = object


def node(place: Place, path: Path) -> str:
    """The Xenstore path of a file below `data`."""
    parts = path.parts
    return place.home + "/" + "/".join(parts[parts.index("data") :])


def by_root(place: Place, mount: Mount, path: Path) -> Path:
    """The other name of a file below `data`."""
    return mount.path / ".root" / node(place, path).lstrip("/")


def value_of(witness: XsClient, path: str) -> bytes | None:
    """None if there is no node."""
    try:
        return witness.read(path)
    except XsError as error:
        if "ENOENT" not in str(error):
            raise
        return None


def slow() -> None:
    """Wait longer than the kernel keeps attributes."""
    time.sleep(0.02)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


# ------------------------------------------------- every operation, every way in which a file can go

OPERATIONS: dict[str, Callable[[int], Outcome]] = {
    "read": lambda fd: os.pread(fd, 100, 0),
    "read at the end": lambda fd: os.pread(fd, 100, os.fstat(fd).st_size),
    "write": lambda fd: os.pwrite(fd, b"written, and longer\n", 0),
    "write in the middle": lambda fd: os.pwrite(fd, b"x", 2),
    "ftruncate": lambda fd: os.ftruncate(fd, 2),
    "ftruncate to nothing": lambda fd: os.ftruncate(fd, 0),
    "fsync": os.fsync,
    "fstat": lambda fd: (os.fstat(fd).st_size, os.fstat(fd).st_nlink),
    "nothing": lambda fd: None,
}

STATES = {
    "opened": os.O_RDWR,
    "opened to append": os.O_RDWR | os.O_APPEND,
    "emptied": os.O_RDWR | os.O_TRUNC,
    "created": os.O_RDWR | os.O_CREAT,
    "created exclusively": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}


def unlinked(file: Path) -> None:
    file.unlink()


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_text("replacement\n")
    other.rename(file)


def made_again(file: Path) -> None:
    file.unlink()
    file.write_text("another\n")


def removed_with_its_directory(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()


def directory_replaced(file: Path) -> None:
    file.unlink()
    other = file.parent.with_name("other")
    other.mkdir()
    (other / file.name).write_text("another\n")
    other.rename(file.parent)


def renamed(file: Path) -> None:
    file.rename(file.with_name("renamed"))
    file.write_text("another\n")


def renamed_over_another(file: Path) -> None:
    other = file.with_name("other")
    other.write_text("another\n")
    file.rename(other)


def directory_renamed(file: Path) -> None:
    file.parent.rename(file.parent.with_name("renamed"))
    file.parent.mkdir()
    file.write_text("another\n")


WAYS: dict[str, Callable[[Path], None]] = {
    "unlinked": unlinked,
    "replaced": replaced,
    "made again": made_again,
    "with its directory": removed_with_its_directory,
    "directory replaced": directory_replaced,
}

RENAMES: dict[str, Callable[[Path], None]] = {
    "renamed": renamed,
    "renamed over another": renamed_over_another,
    "directory renamed": directory_renamed,
}


def outcome(attempt: Callable[[], Outcome]) -> Outcome:
    try:
        return attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def tree(top: Path) -> dict[str, str | None]:
    """All that is below a directory: the content of each file, None for a directory."""
    return {
        str(path.relative_to(top)): None if path.is_dir() else path.read_text()
        for path in sorted(top.rglob("*"))
    }


def history(
    top: Path,
    flags: int,
    go: Callable[[Path], None],
    operation: Callable[[int], Outcome],
    opened_by: Callable[[Path], Path] = lambda path: path,
) -> list[Outcome]:
    """The outcomes for a program that has a file open, goes on when the file has gone, and closes it."""
    directory = top / "d"
    directory.mkdir(parents=True)
    file = directory / "f"
    if not flags & os.O_CREAT:
        file.write_text("old value\n")
    seen: list[Outcome] = []
    with opened(opened_by(file), flags) as fd:
        go(file)
        slow()
        seen.append(outcome(lambda: operation(fd)))
        seen.append(outcome(lambda: os.pread(fd, 100, 0)))
        seen.append(outcome(lambda: OPERATIONS["fstat"](fd)))
        seen.append(tree(top))
    seen.append(tree(top))
    return seen


@pytest.mark.parametrize(
    ("way", "name"),
    [*((way, "own") for way in WAYS), ("unlinked", ".root"), ("replaced", ".root")],
)
@pytest.mark.parametrize("state", STATES)
def test_a_file_that_this_mount_removes_is_as_on_tmpfs(
    place: Place,
    mount: Mount,
    box: Path,
    witness: XsClient,
    state: str,
    way: str,
    name: str,
) -> None:
    def opened_by(path: Path) -> Path:
        return path if name == "own" else by_root(place, mount, path)

    with tempfile.TemporaryDirectory(dir="/dev/shm") as tmpfs:
        for number, (operation, run) in enumerate(OPERATIONS.items()):
            expected = history(Path(tmpfs) / str(number), STATES[state], WAYS[way], run)
            top = box / str(number)
            seen = history(top, STATES[state], WAYS[way], run, opened_by)
            assert seen == expected, operation
            in_store = value_of(witness, f"{node(place, top)}/d/f")
            shown = expected[-1]
            assert isinstance(shown, dict)
            content = shown.get("d/f")
            assert in_store == (None if content is None else content.rstrip("\n").encode())


@pytest.fixture(scope="module")
def raw_mount(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """Reading gives exactly what was written, as on tmpfs."""
    with mounted(["-o", "raw", place.socket], tmp_path_factory.mktemp("raw") / "m") as mount:
        yield mount


@pytest.mark.parametrize("name", ["own", ".root"])
@pytest.mark.parametrize("way", RENAMES)
@pytest.mark.parametrize("state", ["opened", "emptied", "created"])
def test_a_file_that_this_mount_renames_is_as_on_tmpfs(
    place: Place, raw_mount: Mount, box: Path, state: str, way: str, name: str
) -> None:
    """Whatever name it was opened by."""

    def opened_by(path: Path) -> Path:
        return path if name == "own" else by_root(place, raw_mount, path)

    (box / "child").write_text("or the other mount takes it for a file\n")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as tmpfs:
        for number, (operation, run) in enumerate(OPERATIONS.items()):
            expected = history(Path(tmpfs) / str(number), STATES[state], RENAMES[way], run)
            top = raw_mount.path / "data" / box.name / str(number)
            assert history(top, STATES[state], RENAMES[way], run, opened_by) == expected, operation


@pytest.mark.parametrize("state", STATES)
def test_the_value_of_a_directory_that_is_renamed(
    place: Place, mount: Mount, box: Path, witness: XsClient, state: str
) -> None:
    directory, other = box / "d", box / "other"
    directory.mkdir()
    (directory / "child").write_text("1\n")
    if not STATES[state] & os.O_CREAT:
        (directory / ".value").write_text("old\n")
    with opened(by_root(place, mount, directory) / ".value", STATES[state]) as fd:
        directory.rename(other)
        slow()
        assert os.fstat(fd).st_size == len(os.pread(fd, 100, 0))
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"new\n", 0)
        assert os.getxattr(fd, "user.xs.path").decode() == node(place, other)
    assert witness.read(node(place, other)) == b"new"
    assert not directory.exists()


@pytest.mark.parametrize("state", STATES)
def test_attributes_of_a_removed_file_are_its_own(
    place: Place, box: Path, witness: XsClient, state: str
) -> None:
    file = box / "f"
    if not STATES[state] & os.O_CREAT:
        file.write_text("old\n")
    with opened(file, STATES[state]) as fd:
        perms = os.getxattr(fd, "user.xs.perms")
        file.unlink()
        assert os.getxattr(fd, "user.xs.perms") == perms
        os.setxattr(fd, "user.xs.value", b"new")
        assert os.getxattr(fd, "user.xs.value") == b"new"
        assert os.pread(fd, 100, 0) == b"new\n"
        os.setxattr(fd, "user.xs.perms", f"b{place.domid} r1\n".encode())
        assert os.getxattr(fd, "user.xs.perms") == f"b{place.domid},r1".encode()
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            os.setxattr(fd, "user.xs.perms", b"x0")
        assert os.getxattr(fd, "user.xs.perms") == f"b{place.domid},r1".encode()
        file.write_text("another\n")
        os.setxattr(fd, "user.xs.value", b"newer")
        assert file.read_text() == "another\n"
        assert os.getxattr(file, "user.xs.perms") == perms
    assert witness.read(node(place, file)) == b"another"


@pytest.mark.parametrize("state", STATES)
def test_a_removed_file_is_no_larger_than_a_value(box: Path, state: str) -> None:
    """Any number of them may be open, so their memory must be bounded."""
    file = box / "f"
    if not STATES[state] & os.O_CREAT:
        file.write_text("old\n")
    with opened(file, STATES[state]) as fd:
        file.unlink()
        os.pwrite(fd, b"x" * 3000, 0)
        size = os.fstat(fd).st_size
        for grow in (
            lambda: os.pwrite(fd, b"x" * 3000, 3000),
            lambda: os.ftruncate(fd, 6000),
            lambda: os.setxattr(fd, "user.xs.value", b"x" * 4096),
        ):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                grow()
        assert os.fstat(fd).st_size == size


MORE: dict[str, Callable[[int], Outcome]] = {
    **OPERATIONS,
    "getxattr": lambda fd: os.getxattr(fd, "user.xs.value"),
    "setxattr": lambda fd: os.setxattr(fd, "user.xs.value", b"set"),
    "getxattr perms": lambda fd: os.getxattr(fd, "user.xs.perms"),
}


@pytest.fixture(scope="module")
def other_mount(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted([place.socket], tmp_path_factory.mktemp("other") / "m") as mount:
        yield mount


@pytest.mark.parametrize("by", ["another client", "another mount"])
@pytest.mark.parametrize("with_directory", [False, True])
@pytest.mark.parametrize("state", ["opened", "opened to append", "emptied", "created exclusively"])
def test_a_file_that_others_remove_is_stale_and_stays_away(
    place: Place,
    mount: Mount,
    other_mount: Mount,
    box: Path,
    witness: XsClient,
    state: str,
    with_directory: bool,
    by: str,
) -> None:
    for number, (operation, run) in enumerate(MORE.items()):
        directory = box / str(number)
        directory.mkdir()
        file = directory / "f"
        if not STATES[state] & os.O_CREAT:
            file.write_text("old value\n")
        path = node(place, file)
        with opened(file, STATES[state]) as fd:
            if by == "another client":
                witness.rm(path.rpartition("/")[0] if with_directory else path)
            else:
                there = other_mount.path / file.relative_to(mount.path)
                there.unlink()
                if with_directory:
                    there.parent.rmdir()
            slow()
            seen = outcome(partial(run, fd))
            if operation in ("fsync", "nothing"):
                assert seen is None
            else:
                assert seen == "ESTALE", operation
            assert not file.exists()
            assert value_of(witness, path) is None, operation
        assert not file.exists()
        assert value_of(witness, path) is None, operation


@pytest.mark.parametrize("by", ["another client", "another mount"])
@pytest.mark.parametrize("state", ["opened", "emptied", "created"])
def test_a_value_that_others_put_there_meanwhile_stays(
    place: Place,
    mount: Mount,
    other_mount: Mount,
    box: Path,
    witness: XsClient,
    state: str,
    by: str,
) -> None:
    """Nothing but a write through the handle changes it."""
    (box / "child").write_text("or the other mount takes it for a file\n")
    for number, operation in enumerate(("read", "fsync", "fstat", "getxattr", "nothing")):
        file = box / str(number)
        if not STATES[state] & os.O_CREAT:
            file.write_text("old value\n")
        path = node(place, file)
        with opened(file, STATES[state]) as fd:
            if by == "another client":
                with contextlib.suppress(XsError):
                    witness.rm(path)
                witness.write(path, b"of others")
            else:
                there = other_mount.path / file.relative_to(mount.path)
                there.with_name("new").write_text("of others\n")
                there.with_name("new").rename(there)
            outcome(partial(MORE[operation], fd))
            assert file.read_text() == "of others\n", operation
        assert file.read_text() == "of others\n", operation
        assert witness.read(path) == b"of others"


def mknod(file: Path) -> None:
    os.mknod(file)


def make_exclusively(file: Path) -> None:
    os.close(os.open(file, os.O_CREAT | os.O_EXCL))


@pytest.mark.parametrize("make", [replaced, mknod, make_exclusively])
@pytest.mark.parametrize("state", ["opened", "opened to append", "emptied"])
def test_a_handle_never_reaches_the_file_after_the_one_that_another_client_removed(
    place: Place, box: Path, witness: XsClient, state: str, make: Callable[[Path], None]
) -> None:
    for number, (operation, run) in enumerate(MORE.items()):
        file = box / str(number)
        file.write_text("old value\n")
        with opened(file, STATES[state]) as fd:
            witness.rm(node(place, file))
            make(file)
            slow()
            content = file.read_text()
            seen = outcome(partial(run, fd))
            assert seen == (None if operation in ("fsync", "nothing") else "ESTALE"), operation
            assert file.read_text() == content, operation
        assert file.read_text() == content, operation


def test_a_handle_of_a_value_does_not_bring_its_directory_back(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    directory = box / "d"
    for again in (False, True):
        for operation in ("write", "ftruncate", "fsync", "read"):
            directory.mkdir()
            (directory / "child").write_text("1\n")
            (directory / ".value").write_text("old value\n")
            with opened(directory / ".value", os.O_RDWR) as fd:
                mount.bash(f"rm -r {directory}")
                if again:
                    directory.mkdir()
                    (directory / "child").write_text("1\n")
                    (directory / ".value").write_text("new\n")
                OPERATIONS[operation](fd)
            if again:
                assert (directory / ".value").read_text() == "new\n"
                assert witness.read(node(place, directory)) == b"new"
                mount.bash(f"rm -r {directory}")
            assert not directory.exists()
            assert value_of(witness, node(place, directory)) is None


# ----------------------------------------------------------------- a close never wipes what came since


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("options", [[], ["-o", "raw"]])
def test_what_is_written_while_an_emptied_file_is_open_stays(
    place: Place, box: Path, tmp_path: Path, options: list[str], exists: bool, witness: XsClient
) -> None:
    path = node(place, box / "pid")
    (box / "child").write_text("or the other mount takes it for a file\n")
    if exists:
        witness.write(path, b"old")
    with mounted([*options, place.socket], tmp_path / "m") as mount:
        file = f"data/{box.name}/pid"
        seen = mount.bash(f"( exec 9> {file}; flock -n 9; echo 123 > {file} ); cat {file}")
        assert seen == "123\n"
        assert mount.bash(f"{{ echo a >> {file}; }} > {file}; cat {file}") == "a\n"


def test_what_is_written_while_an_emptied_value_is_open_stays(mount: Mount, box: Path) -> None:
    seen = mount.bash(
        f"cd {box}; mkdir d; echo 1 > d/x; echo old > d/.value;"
        "( exec 9> d/.value; echo 123 > d/.value ); cat d/.value;"
        "( exec 9> d/.value; echo 456 > ../$(basename $PWD)/d.d/.value ); cat d/.value"
    )
    assert seen == "123\n456\n"


@pytest.mark.parametrize("exists", [False, True])
def test_what_another_client_writes_while_an_emptied_file_is_open_stays(
    place: Place, box: Path, witness: XsClient, exists: bool
) -> None:
    file, path = box / "o", node(place, box / "o")
    if exists:
        witness.write(path, b"old")
    with opened(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        witness.write(path, b"by another")
        assert file.read_text() == "by another\n"
    assert file.read_text() == "by another\n"
    assert witness.read(path) == b"by another"


def test_what_is_written_stays_when_the_holder_of_an_emptied_file_is_killed(
    place: Place, box: Path, tmp_path: Path, witness: XsClient
) -> None:
    path = node(place, box / "f")
    witness.write(path, b"old")
    with mounted([place.socket], tmp_path / "m") as mount:
        file = mount.path / "data" / box.name / "f"
        holder = subprocess.Popen(
            ["bash", "-c", f"exec 9> {file}; echo ready; read"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            file.write_text("123\n")
            holder.kill()
    # The unmount comes after the release of the killed process's file.
    assert witness.read(path) == b"123"


def test_after_a_refused_write_the_next_one_replaces_everything(mount: Mount, box: Path) -> None:
    done = mount.run(
        f"cd {box}; echo oldvalue > f; {{ head -c 5000 /dev/zero; echo ok; }} > f; cat f"
    )
    assert "File too large" in done.stderr
    assert done.stdout == "ok\n"


def test_a_commit_settles_what_the_files_of_its_transaction_owe(
    place: Place, box: Path, tx: Path, witness: XsClient
) -> None:
    (box / "emptied").write_text("old\n")
    tx.mkdir()
    inside = tx / "data" / box.name
    for mode in ("closed before", "open"):
        names = [f"{mode[0]}{number}" for number in range(60)]
        if mode == "open":
            tx.mkdir()
        files = [os.open(inside / name, os.O_CREAT | os.O_WRONLY, 0o600) for name in names]
        files.append(os.open(inside / "emptied", os.O_WRONLY | os.O_TRUNC))
        control = os.open(tx / ".control", os.O_WRONLY)
        if mode == "closed before":
            for fd in files:
                os.close(fd)
        os.write(control, b"commit\n")
        os.close(control)
        if mode == "open":
            for fd in files:
                os.close(fd)
        for name in names:
            assert value_of(witness, f"{node(place, box)}/{name}") == b""
        assert witness.read(node(place, box / "emptied")) == b""
        (box / "emptied").write_text("old\n")


# ------------------------------------------------------------------ what is owed is true in the mount


def test_an_emptied_file_is_empty_by_every_name(place: Place, mount: Mount, box: Path) -> None:
    file = box / "f"
    file.write_text("long value\n")
    other = by_root(place, mount, file)
    with opened(file, os.O_WRONLY | os.O_TRUNC) as fd:
        assert file.stat().st_size == other.stat().st_size == os.fstat(fd).st_size == 0
        assert file.read_bytes() == other.read_bytes() == b""
        os.write(fd, b"ab\n")
        assert file.stat().st_size == other.stat().st_size == 3
        os.write(fd, b"cd\n")
    assert file.read_text() == "ab\ncd\n"


def test_a_file_is_empty_right_after_the_close_that_emptied_it(mount: Mount, box: Path) -> None:
    file = box / "f"
    for number in range(300):
        file.write_text(f"value {number}\n")
        os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))
        assert file.read_bytes() == b"", number


@pytest.mark.parametrize("flags", [os.O_CREAT, os.O_CREAT | os.O_EXCL])
def test_a_file_that_is_being_created_is_there(
    place: Place, mount: Mount, box: Path, witness: XsClient, flags: int
) -> None:
    directory = box / "d"
    directory.mkdir()
    file = directory / "f"
    with opened(file, os.O_WRONLY | flags):
        assert os.listdir(directory) == ["f"]
        assert os.listdir(by_root(place, mount, directory)) == ["f"]
        for name in (file, by_root(place, mount, file)):
            assert name.stat().st_size == 0
            assert mount.bash(f"cat {name}; flock -n {name} echo locked") == "locked\n"
        mount.bash(f"ls -l {directory}")  # which asks for attributes of its own
        in_store = value_of(witness, node(place, file))
        assert in_store == (b"" if flags & os.O_EXCL else None)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
            directory.rmdir()
    assert os.listdir(directory) == ["f"]


def test_a_file_that_is_being_created_can_be_a_directory(
    place: Place, box: Path, witness: XsClient
) -> None:
    file = box / "f"
    forced = box / "f.d"
    with opened(file, os.O_WRONLY | os.O_CREAT) as fd:
        assert (forced / ".value").read_bytes() == b""
        (forced / "child").mkdir()
        os.write(fd, b"value\n")
    assert witness.ls(node(place, file)) == ["child"]
    assert (file / ".value").read_text() == "value\n"


def test_flock_by_processes_that_make_the_lock_file(mount: Mount, box: Path) -> None:
    (box / "n").write_text("0\n")
    loop = "for i in {1..25}; do flock lock sh -c 'read n < n; echo $((n + 1)) > n' || exit 1; done"
    workers = [subprocess.Popen(["bash", "-c", loop], cwd=box) for _ in range(4)]
    for worker in workers:
        assert worker.wait(LIMIT * 6) == 0
    assert (box / "n").read_text() == "100\n"


LOCK_LOOP = """
import fcntl, os, sys
for number in range(60):
    while True:
        fd = os.open("lock", os.O_CREAT | os.O_WRONLY, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.stat("lock").st_ino == os.fstat(fd).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    os.unlink("lock")
    os.close(fd)
"""


def test_locks_that_are_removed_by_their_holders(mount: Mount, box: Path) -> None:
    """Open, lock, see that it still is that file, remove: with 240 locks none fails with ESTALE."""
    workers = [subprocess.Popen([sys.executable, "-c", LOCK_LOOP], cwd=box) for _ in range(4)]
    for worker in workers:
        assert worker.wait(LIMIT * 6) == 0
    assert os.listdir(box) == []


# -------------------------------------------------------------- fsync, locks, tail, and replacement


@pytest.mark.parametrize("way", ["replaced", "made again", "unlinked"])
def test_fsync_of_an_emptied_file_that_has_gone_changes_nothing(
    place: Place, box: Path, witness: XsClient, way: str
) -> None:
    file = box / "f"
    file.write_text("old\n")
    with opened(file, os.O_WRONLY | os.O_TRUNC) as fd:
        WAYS[way](file)
        before = tree(box)
        os.fsync(fd)
        assert tree(box) == before
    assert tree(box) == before
    assert (
        value_of(witness, node(place, file))
        == {"replaced": b"replacement", "made again": b"another", "unlinked": None}[way]
    )


def test_dd_with_fsync_beside_mv(mount: Mount, box: Path) -> None:
    script = """
        cd $0; echo old > f; echo new > g; mkfifo $1/fifo
        dd of=f conv=fsync status=none < $1/fifo & exec 7> $1/fifo
        until [ -e /proc/$!/fd/1 ] && [ "$(readlink /proc/$!/fd/1)" = "$PWD/f" ]; do :; done
        mv g f; exec 7>&-; wait $!; cat f
    """
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            ["bash", "-c", script, box, directory],
            capture_output=True,
            text=True,
            timeout=LIMIT * 3,
            check=True,
        )
    assert done.stdout == "new\n"


INCREMENTS = {
    "one descriptor": """
import fcntl, os, sys
lock = getattr(fcntl, sys.argv[1])
for _ in range(100):
    fd = os.open("n", os.O_RDWR)
    lock(fd, fcntl.LOCK_EX)
    number = int(os.read(fd, 100))
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"%d\\n" % (number + 1))
    os.close(fd)
""",
    "two descriptors": """
import fcntl, os, sys
lock = getattr(fcntl, sys.argv[1])
locked, other = (os.open("n", os.O_RDWR) for _ in range(2))
for _ in range(100):
    lock(locked, fcntl.LOCK_EX)
    number = int(os.pread(locked, 100, 0))
    os.pwrite(other, b"%d\\n" % (number + 1), 0)
    lock(locked, fcntl.LOCK_UN)
""",
}


@pytest.mark.parametrize("how", INCREMENTS)
@pytest.mark.parametrize("lock", ["flock", "lockf"])
def test_increments_under_a_lock_lose_nothing(mount: Mount, box: Path, lock: str, how: str) -> None:
    (box / "n").write_text("0\n")
    command = [sys.executable, "-c", INCREMENTS[how], lock]
    workers = [subprocess.Popen(command, cwd=box) for _ in range(4)]
    for worker in workers:
        assert worker.wait(LIMIT * 6) == 0
    assert (box / "n").read_text() == "400\n"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_read_in_the_middle_is_of_that_moment(
    place: Place, box: Path, witness: XsClient, flags: int
) -> None:
    """As a program reads that takes locks and looks at a part of a file alone."""
    file = box / "f"
    file.write_text("abcdef\n")
    with opened(file, flags) as fd:
        assert os.pread(fd, 7, 0) == b"abcdef\n"
        for text in ("ABCDEF", "123456"):
            witness.write(node(place, file), text.encode())
            slow()
            assert os.pread(fd, 2, 2) == text[2:4].encode()


def test_a_value_is_read_in_pieces_of_one_moment(
    place: Place, box: Path, witness: XsClient
) -> None:
    file = box / "f"
    file.write_text("abcdef\n")
    with opened(file, os.O_RDONLY) as fd:
        assert os.read(fd, 2) == b"ab"
        witness.write(node(place, file), b"ABCDEFGH")
        slow()
        assert os.read(fd, 2) == b"cd"
        assert os.read(fd, 100) == b"ef\n"


MAKE_DATABASE = """
import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as database:
    database.execute("PRAGMA page_size=512")
    assert database.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    database.execute("CREATE TABLE t (n)")
    database.execute("INSERT INTO t VALUES (0)")
"""

UPDATE_DATABASE = """
import sqlite3, sys
for _ in range(25):
    database = sqlite3.connect(sys.argv[1], timeout=300)
    with database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE t SET n = n + 1")
    database.close()
"""


def test_a_database_that_fits_a_value_loses_no_update(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """sqlite with pages of 512 bytes: the database and its journal are nodes."""
    python = [sys.executable, "-c"]
    subprocess.run([*python, MAKE_DATABASE, box / "db"], check=True, timeout=LIMIT)
    workers = [subprocess.Popen([*python, UPDATE_DATABASE, box / "db"]) for _ in range(4)]
    for worker in workers:
        assert worker.wait(LIMIT * 15) == 0
    with contextlib.closing(sqlite3.connect(box / "db")) as database:
        assert database.execute("SELECT n FROM t").fetchall() == [(100,)]
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert witness.ls(node(place, box)) == ["db"]


def test_tail_follows_what_is_appended(
    place: Place, mount: Mount, other_mount: Mount, box: Path, witness: XsClient
) -> None:
    """By this mount, another client, and another mount."""
    (box / "child").write_text("or the other mount takes it for a file\n")
    file = box / "log"
    file.write_text("first\n")
    tail = subprocess.Popen(["tail", "-f", "-s", "0.1", file], stdout=subprocess.PIPE)
    assert tail.stdout is not None

    def line() -> bytes:
        assert tail.stdout is not None
        assert select.select([tail.stdout], (), (), LIMIT * 3)[0], "tail prints nothing"
        return tail.stdout.readline()

    try:
        assert line() == b"first\n"
        mount.bash(f"echo second >> {file}")
        assert line() == b"second\n"
        witness.write(node(place, file), b"first\nsecond\nthird")
        assert line() == b"third\n"
        other_mount.bash(f"echo fourth >> {file.relative_to(mount.path)}")
        assert line() == b"fourth\n"
    finally:
        tail.kill()
        tail.wait()
        tail.stdout.close()


def test_a_file_that_is_replaced_all_the_time_can_always_be_read(mount: Mount, box: Path) -> None:
    file, other = box / "f", box / "g"
    file.write_text("value\n")
    stop = threading.Event()
    errors: list[Exception] = []

    def replace() -> None:
        try:
            while not stop.is_set():
                other.write_text("value\n")
                other.rename(file)
        except Exception as error:
            errors.append(error)

    mover = threading.Thread(target=replace)
    mover.start()
    try:
        for number in range(500):
            with open(file, "rb", buffering=0) as reader:
                assert reader.read() == b"value\n", number
                assert os.fstat(reader.fileno()).st_size == len(b"value\n")
            assert file.stat().st_size == len(b"value\n")
    finally:
        stop.set()
        mover.join(LIMIT)
    assert not mover.is_alive()
    assert errors == []


@pytest.mark.slow
def test_cat_beside_mv_never_fails(mount: Mount, box: Path, tmp_path: Path) -> None:
    """10,000 times, with the real programs."""
    (box / "f").write_text("value\n")
    mover = subprocess.Popen(
        [
            "bash",
            "-c",
            "while [ ! -e $0/stop ]; do echo value > g && mv g f || exit 1; done",
            tmp_path,
        ],
        cwd=box,
    )
    script = "for ((i = 0; i < 10000; i++)); do [ $(cat f) = value ] || exit 1; done"
    try:
        subprocess.run(["bash", "-c", script], cwd=box, check=True, timeout=LIMIT * 60)
        assert mover.poll() is None
    finally:
        (tmp_path / "stop").touch()
        assert mover.wait(LIMIT) == 0


def test_an_always_present_directory_can_always_be_opened(
    place: Place, mount: Mount, box: Path
) -> None:
    loop = "for i in {1..100}; do : > x$$; rm x$$; done"
    workers = [subprocess.Popen(["bash", "-c", loop], cwd=box) for _ in range(2)]
    while any(worker.poll() is None for worker in workers):
        assert (mount.path / "data").stat()
        assert os.listdir(mount.path / "data")
    assert [worker.returncode for worker in workers] == [0, 0]


# ---------------------------------------------------------------------- directories that others remove


def test_nothing_is_made_in_a_directory_that_another_client_removed(
    place: Place, box: Path, witness: XsClient
) -> None:
    makers: list[Callable[[Path], object]] = [
        os.mkdir,
        os.mknod,
        lambda path: os.symlink("target", path),
        lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL)),
        lambda path: path.write_text("1\n"),
        lambda path: os.rename(box / "file", path),
    ]
    (box / "file").write_text("1\n")
    for number, make in enumerate(makers):
        directory = box / str(number)
        directory.mkdir()
        os.listdir(directory)
        witness.rm(node(place, directory))
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                make(directory / "x")
        assert value_of(witness, node(place, directory)) is None
    assert (box / "file").read_text() == "1\n"


# ------------------------------------------------------------------------------------ temporary files


def test_temporary_files(place: Place, box: Path, witness: XsClient) -> None:
    with tempfile.TemporaryFile("w+", dir=box) as file:
        file.write("one\ntwo\n")
        file.seek(0)
        assert file.read() == "one\ntwo\n"
        file.seek(4)
        file.write("TWO\n")
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        assert file.readlines() == ["one\n", "TWO\n"]
        assert os.listdir(box) == []
    with tempfile.NamedTemporaryFile("w", dir=box) as named:
        named.write("1\n")
        named.flush()
        assert Path(named.name).read_text() == "1\n"
    with tempfile.TemporaryDirectory(dir=box) as directory:
        Path(directory, "f").write_text("1\n")
    assert os.listdir(box) == []


def test_the_first_append_of_an_emptied_file_keeps_what_others_appended(
    place: Place, box: Path, witness: XsClient
) -> None:
    file = box / "f"
    file.write_text("old\n")
    with opened(file, os.O_WRONLY | os.O_TRUNC | os.O_APPEND) as fd:
        witness.write(node(place, file), b"of others\n")
        os.write(fd, b"own\n")
    assert witness.read(node(place, file)) == b"of others\n\nown"
    with opened(file, os.O_WRONLY | os.O_TRUNC | os.O_APPEND) as fd:
        os.write(fd, b"own\n")
    assert witness.read(node(place, file)) == b"own"


def test_a_new_file_of_a_size_is_one_change(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    path = node(place, box / "new")
    witness.watch(path, "t")
    assert witness.event() == (path, "t")
    mount.bash(f"truncate -s 5 {box}/new")
    assert [event for event, _ in witness.events_so_far()] == [path]
    witness.unwatch(path, "t")
    assert witness.read(path) == b"\0" * 5


# ------------------------------------------------------------- operations beside a rename or a removal


def beside(change: Callable[[], None], attempt: Callable[[], None], times: int) -> None:
    """Attempt something so often while another thread changes something all the time."""
    stop = threading.Event()
    errors: list[Exception] = []

    def run() -> None:
        try:
            while not stop.is_set():
                change()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(times):
            attempt()
    finally:
        stop.set()
        thread.join(LIMIT)
    assert not thread.is_alive()
    assert errors == []


def test_an_open_file_works_while_it_is_renamed(place: Place, box: Path, witness: XsClient) -> None:
    file, other = box / "f", box / "g"
    file.write_text("0\n")
    with opened(file, os.O_RDWR) as fd:
        numbers = iter(range(10**9))

        def rename() -> None:
            file.rename(other)
            other.rename(file)

        def use() -> None:
            content = b"%d\n" % next(numbers)
            os.pwrite(fd, content, 0)
            assert os.pread(fd, 100, 0) == content
            os.ftruncate(fd, len(content))
            assert os.fstat(fd).st_nlink == 1

        beside(rename, use, 200)
    assert file.read_text() == "199\n"
    assert not other.exists()
    assert witness.ls(node(place, box)) == ["f"]


def test_an_open_file_works_while_it_is_removed(box: Path) -> None:
    file = box / "f"
    opened_now: list[int] = []
    for number in range(60):
        file.write_text(f"{number}\n")
        fd = os.open(file, os.O_RDWR)
        opened_now.append(fd)
        thread = threading.Thread(target=file.unlink)
        thread.start()
        for _ in range(5):
            content = os.pread(fd, 100, 0)
            assert content.endswith(b"\n")
            os.pwrite(fd, content, 0)
            os.fstat(fd)
        thread.join(LIMIT)
        assert os.fstat(fd).st_nlink in (0, 1)
    for fd in opened_now:
        os.close(fd)
    assert os.listdir(box) == []
