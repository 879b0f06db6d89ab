"""Ring: real mounts, and the directory of the live mirror: where it can be, whose it is, what is left.

Each mistake is one line on stderr, and exit status 7; nothing is left behind, and nothing of others is
touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.mirroring import HOME, Mirrored, await_true, mirrored, scratch, tmpfs
from tests.support.mounting import LIMIT, Mount, Place, mounted, open_place
from tests.support.xenstored.harness import strings
from xsfs.cli.exit_statuses import EXIT_MIRROR
from xsfs.cli.mount import ENDING
from xsfs.mirror.staging import MirrorDirectory, MirrorPlaceError
from xsfs.view.ownership import Ownership


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with open_place("C", tmp_path_factory.mktemp("place")) as place:
        yield place


@pytest.fixture
def shm() -> Iterator[Path]:
    with scratch() as path:
        yield path


def refused(place: Place, directory: object, mountpoint: Path, *options: str) -> str:
    """The one line that says why there can be no mirror there."""
    mountpoint.mkdir(exist_ok=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "xsfs", "-f", "-o"),
            *(",".join([*options, f"mirror={directory}"]), place.socket, str(mountpoint)),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == EXIT_MIRROR, done.stderr
    assert not os.path.ismount(mountpoint)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("xsfs: ")
    return done.stderr


# ------------------------------------------------------------------------------------ refused


def test_directories_that_cannot_be_it(place: Place, shm: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "m"
    (shm / "file").write_text("mine")
    (shm / "loop").symlink_to("loop")
    (shm / "full").mkdir()
    (shm / "full" / "mine").write_text("mine")
    (shm / "to-full").symlink_to("full")
    said = {
        "file": "is not a directory",
        "loop": "is not a directory",
        "full": "is not empty",
        "to-full": "is not empty",
        "nowhere/m": "No such file or directory",
        "file/m": "Not a directory",
        "n" * 252: "File name too long",
        "p" * 200 + "/" + "q" * 250 + "/" + "r" * 100: "is too long",
    }
    for name, reason in said.items():
        # One of each kind is enough in a process of its own.
        if name in ("full", "nowhere/m"):
            said_there = refused(place, shm / name, mountpoint)
        else:
            files = MirrorDirectory(str(shm / name), Ownership(0, 0, 0o077))
            with pytest.raises(MirrorPlaceError) as caught:
                files.open()
            said_there = str(caught.value)
        assert reason in said_there, name
    assert sorted(os.listdir(shm)) == ["file", "full", "loop", "to-full"]
    assert (shm / "full" / "mine").read_text() == "mine"
    assert "is inside the mount" in refused(place, mountpoint / "below", mountpoint)


def test_mountpoints_and_read_only_parents(place: Place, shm: Path, tmp_path: Path) -> None:
    with tmpfs(shm / "t", "size=1m") as inside:
        assert "is a mountpoint itself" in refused(place, inside, tmp_path / "m")
        (inside / "d").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", inside], check=True)
        assert "Read-only file system" in refused(place, inside / "d", tmp_path / "m")
        assert "Read-only file system" in refused(place, inside / "e", tmp_path / "m")
    assert os.listdir(shm) == ["t"]


def test_two_mounts_with_one_mirror(place: Place, shm: Path, tmp_path: Path) -> None:
    with mounted(["-o", f"mirror={shm}/m", place.socket], tmp_path / "m") as first:
        before = os.listdir(shm / "m")
        assert "is that of another mount" in refused(place, shm / "m", tmp_path / "n")
        assert os.listdir(shm / "m") == before
        assert (first.path / ".mirror").exists()
    assert os.listdir(shm) == []


def test_no_room_at_the_start(place: Place, shm: Path, tmp_path: Path) -> None:
    with place.witness() as store:
        # More than one burst: the next is asked while the files of the last are made.
        store.pipeline(("WRITE", strings(f"{HOME}/many/{n}") + b"x") for n in range(400))
    for options in ("size=64k", "nr_inodes=30", "nr_inodes=300"):
        with tmpfs(shm / "t", options) as small:
            assert "No space left on device" in refused(place, small / "m", tmp_path / "m")
            assert os.listdir(small) == []
    with place.witness() as store:
        store.rm(f"{HOME}/many")


# ------------------------------------------------------------------------------------ no room


def test_no_room_while_it_lives(place: Place, shm: Path, tmp_path: Path) -> None:
    """It is gone then, and comes back when there is room."""
    with tmpfs(shm / "t", "size=8m") as small, place.witness() as store:
        mirror = small / "m"
        with mounted(["-o", f"mirror={mirror}", place.socket], tmp_path / "m") as mount:
            alive = Mirrored(mount, mirror, HOME, store)
            alive.settle()
            with (small / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(bytes(4096))
            store.pipeline(("WRITE", strings(f"{HOME}/filling/{n}") + b"x" * 999) for n in range(9))
            await_true(lambda: not (mount.path / ".mirror").exists())
            await_true(lambda: os.listdir(mirror) == [])
            assert "No space left on device" in mount.stderr
            assert (mount.path / "filling/3").read_text() == "x" * 999 + "\n"
            os.unlink(small / "filler")
            await_true((mount.path / ".mirror").exists)
            alive.settle()
            store.rm(f"{HOME}/filling")
            alive.settle()
        assert os.listdir(small) == []


# --------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("number", ENDING, ids=lambda number: signal.Signals(number).name)
def test_a_signal_leaves_nothing(place: Place, shm: Path, tmp_path: Path, number: int) -> None:
    mount = Mount(["-o", f"mirror={shm}/m", place.socket], tmp_path / "m")
    try:
        mount.wait_mounted()
        assert os.listdir(shm / "m")
        assert mount.end(number) == 0
        assert os.listdir(shm) == []
    finally:
        mount.clear()


@pytest.mark.parametrize("how", [["umount"], ["umount", "-l"], ["fusermount3", "-u"]])
def test_unmounting_leaves_nothing(place: Place, shm: Path, tmp_path: Path, how: list[str]) -> None:
    mount = Mount(["-o", f"mirror={shm}/m", place.socket], tmp_path / "m")
    try:
        mount.wait_mounted()
        subprocess.run([*how, mount.path], check=True, timeout=LIMIT)
        assert mount.end() == 0
        assert os.listdir(shm) == []
    finally:
        mount.clear()


def test_an_empty_directory_is_given_back_as_it_was(
    place: Place, shm: Path, tmp_path: Path
) -> None:
    mine = shm / "mine"
    mine.mkdir()
    mine.chmod(0o751)
    os.chown(mine, 0, 34)
    before = mine.stat()
    with mounted(["-o", f"umask=022,uid=99,mirror={mine}", place.socket], tmp_path / "m"):
        now = mine.stat()
        assert (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (99, 0, 0o555)
    after = mine.stat()
    for name in ("st_ino", "st_mode", "st_uid", "st_gid"):
        assert getattr(after, name) == getattr(before, name), name
    assert os.listdir(mine) == []
    assert os.listxattr(mine) == []
    assert os.listdir(shm) == ["mine"]


def kill(place: Place, directory: Path, mountpoint: Path) -> None:
    mount = Mount(["-o", f"mirror={directory}", place.socket], mountpoint)
    try:
        mount.wait_mounted()
        mount.process.kill()
        mount.process.wait(LIMIT)
    finally:
        mount.clear()
    assert os.listdir(directory)


def test_what_sigkill_leaves_the_next_start_clears(place: Place, shm: Path, tmp_path: Path) -> None:
    kill(place, shm / "m", tmp_path / "m")
    (shm / "m" / "stale").write_text("old")
    with (
        place.witness() as store,
        mounted(["-o", f"mirror={shm}/m", place.socket], tmp_path / "m") as mount,
    ):
        Mirrored(mount, shm / "m", HOME, store).settle()
        assert not (shm / "m" / "stale").exists()
    assert os.listdir(shm) == []


def test_a_directory_of_others_in_the_same_place_is_not_cleared(
    place: Place, shm: Path, tmp_path: Path
) -> None:
    """Not even where its inode has the number that the dead xsfs's had: ext4 gives them again."""
    for above in (shm, tmp_path):
        directory = above / "k"
        kill(place, directory, tmp_path / "m")
        subprocess.run(["rm", "-rf", directory], check=True)
        directory.mkdir()
        (directory / "precious").write_text("mine")
        said = refused(place, directory, tmp_path / "m")
        assert "is not empty" in said
        assert (directory / "precious").read_text() == "mine"
        (directory / "precious").unlink()
        with mounted(["-o", f"mirror={directory}", place.socket], tmp_path / "m") as mount:
            assert (mount.path / ".mirror").exists()
        assert os.listdir(directory) == []
        assert not (above / ".k.xsfs").exists()


def test_it_may_be_taken_away_while_it_lives(place: Place, shm: Path, tmp_path: Path) -> None:
    with mounted(["-o", f"mirror={shm}/m", place.socket], tmp_path / "m", tracebacks=True) as mount:
        subprocess.run(["rm", "-rf", shm / "m", shm / ".m.xsfs"], check=True)
        assert (mount.path / "name").read_text() == "Domain-0\n"
    assert os.listdir(shm) == []


# ----------------------------------------------------------------------------- modes and owners


def modes(top: Path) -> set[tuple[str, int, int, int]]:
    found = set()
    for path in [top, *top.rglob("*")]:
        status = path.lstat()
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "file"
        found.add((kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid))
    return found


@pytest.mark.parametrize("mask", [0o077, 0o000, 0o027])
def test_modes_and_owners(place: Place, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with mirrored(place, tmp_path / "m", "uid=99,gid=98,umask=022") as alive:
            alive.witness.write(f"{HOME}/modes/d/f", "v")
            alive.settle()
            expected = {("directory", 0o555, 99, 98), ("file", 0o444, 99, 98)}
            assert modes(alive.directory) == expected
            alive.witness.rm(f"{HOME}/modes")
    finally:
        os.umask(before)


def as_nobody() -> None:
    os.setgid(65534)
    os.setuid(65534)


def test_an_unprivileged_user(tmp_path: Path, shm: Path) -> None:
    """Directories are read-only for their owner, too, who has to unlock them for each change."""
    os.chown(shm, 65534, 65534)
    socket = shm / "socket"
    mountpoint = shm / "mount"
    mountpoint.mkdir()
    os.chown(mountpoint, 65534, 65534)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "xsfs", "-f", "-o", f"mirror={shm}/m,listen={socket}"),
            *("embedded", mountpoint),
        ],
        preexec_fn=as_nobody,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await_true(lambda: (shm / "m").exists() and os.listdir(shm / "m"))
        place = Place("embedded", str(socket), 0)
        with place.witness() as store:
            store.write(f"{HOME}/a/b/c", "v")
            store.write(f"{HOME}/a/b", "w")
            await_true((shm / "m/a/b/c").exists)
            store.write(f"{HOME}/a/b/c", "x")
            await_true(lambda: (shm / "m/a/b/c").read_text() == "x\n")
            store.rm(f"{HOME}/a/b")
            await_true(lambda: not (shm / "m/a/b").exists())
            expected = {("directory", 0o500, 65534, 65534), ("file", 0o400, 65534, 65534)}
            await_true(lambda: modes(shm / "m") == expected)
    finally:
        process.terminate()
        said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    os.chown(shm, 0, 0)
    assert os.listdir(shm) == ["mount"]


# -------------------------------------------------------------------------------- hostile owners


def is_file(path: Path) -> bool:
    return path.is_file()


def test_the_owner_leads_nobody_outside(place: Place, tmp_path: Path, shm: Path) -> None:
    """The files' owner puts links, pipes and directories where xsfs has to write and remove."""
    outside = shm / "outside"
    (outside / "d").mkdir(parents=True)
    (outside / "f").write_text("mine")
    (outside / "d" / "f").write_text("mine")
    with mirrored(place, tmp_path / "m", "uid=99") as alive:
        home = alive.directory
        for number, trick in enumerate(("link", "link above", "pipe", "pipe value", "directory")):
            path = f"{HOME}/trick{number}"
            alive.witness.write(f"{path}/d/f", "v")
            alive.witness.write(f"{path}/d", "v")
            alive.settle()
            top = home / f"trick{number}"
            if trick == "link":
                (top / "d").rename(alive.directory.parent / "away")
                (top / "d").symlink_to(outside / "d")
            elif trick == "link above":
                top.rename(alive.directory.parent / "away")
                top.symlink_to(outside)
            elif trick == "pipe":
                (top / "d" / "f").unlink()
                os.mkfifo(top / "d" / "f")
            elif trick == "pipe value":
                (top / "d" / ".value").unlink()
                os.mkfifo(top / "d" / ".value")
                # What is in it is looked at again, and compared.
                alive.witness.write(path, "v")
                await_true(partial(is_file, top / "d" / ".value"))
            else:
                (top / "d" / "f").unlink()
                (top / "d" / "f").mkdir()
            alive.witness.write(f"{path}/d/f", "w")
            alive.witness.write(f"{path}/d/g", "w")
            alive.witness.set_perms(f"{path}/d", ["n0", "r3"])
            alive.settle()
            alive.witness.rm(path)
            alive.settle()
            shutil.rmtree(alive.directory.parent / "away", ignore_errors=True)
        assert (outside / "f").read_text() == "mine"
        assert (outside / "d" / "f").read_text() == "mine"
        assert sorted(str(p.relative_to(outside)) for p in outside.rglob("*")) == ["d", "d/f", "f"]
        assert os.listxattr(outside / "d") == []


@pytest.mark.parametrize("when", ["while it lives", "before the next start"])
def test_another_user_swaps_the_directory_for_a_link(
    place: Place, tmp_path: Path, shm: Path, when: str
) -> None:
    """Who may write to the directory above it: with a mirror there, any directory could be had."""
    shm.chmod(0o711)
    victim, theirs = shm / "victim", shm / "theirs"
    for directory in (victim, theirs):
        directory.mkdir()
    (victim / "precious").write_text("mine")
    os.chown(theirs, 65534, 65534)
    script = "mkdir m" if when == "while it lives" else "ln -s ../victim m; mkdir .m.xsfs"

    def attack(script: str) -> None:
        subprocess.run(["sh", "-ec", script], cwd=theirs, preexec_fn=as_nobody, check=True)

    attack(script)
    before = victim.stat()
    mount = Mount(["-o", f"mirror={theirs}/m", place.socket], tmp_path / "m")
    try:
        with suppress(AssertionError):
            mount.wait_mounted()
            attack("mv m away; mv .m.xsfs away2; ln -s ../victim m; ln -s ../victim .m.xsfs")
            subprocess.run(["umount", mount.path], check=False)
        status = mount.process.wait(LIMIT)
    finally:
        mount.clear()
    after = victim.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, 0, before.st_mode)
    assert os.listdir(victim) == ["precious"]
    assert status == EXIT_MIRROR
    reason = "belongs to another user" if when == "while it lives" else "is not"
    assert reason in mount.stderr


def test_every_parent_is_checked(place: Place, tmp_path: Path, shm: Path) -> None:
    shm.chmod(0o777)
    (shm / "own").mkdir()
    said = refused(place, shm / "own" / "m", tmp_path / "m")
    assert f"the mirror is not safe in {shm}: it can be written by others" in said
    shm.chmod(0o1777)
    with mirrored(place, tmp_path / "m") as alive:
        alive.settle()
