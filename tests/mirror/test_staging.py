"""Ring: the files of the live mirror in process: no store, no mount."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.mirroring import scratch, tmpfs
from xsfs.mirror import staging
from xsfs.mirror.staging import MirrorDirectory, MirrorPlaceError, Steps, default_directory
from xsfs.view.ownership import Ownership

NOBODY = 65534


@pytest.fixture
def shm() -> Iterator[Path]:
    with scratch() as path:
        yield path


@contextmanager
def opened(directory: Path, umask: int = 0o077) -> Iterator[MirrorDirectory]:
    files = MirrorDirectory(str(directory), Ownership(0, 0, umask))
    files.open()
    try:
        yield files
    finally:
        files.close()


def carry_out(steps: Steps) -> None:
    for _ in steps:
        pass


def why_not(directory: Path) -> str:
    """Why there can be no mirror there."""
    files = MirrorDirectory(str(directory), Ownership(0, 0, 0o077))
    with pytest.raises(MirrorPlaceError) as caught:
        files.open()
    assert "mirror=DIR" in caught.value.hint
    return str(caught.value)


# ------------------------------------------------------------------------------- swapped for links


def test_the_owner_leads_nobody_outside_when_a_copy_is_given_up(shm: Path) -> None:
    """xsfs moves out and removes what was put into DIR meanwhile, while its owner still has it open."""
    precious = shm / "outside" / "y" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    files = MirrorDirectory(str(shm / "mirror"), Ownership(0, 0, 0o077))
    files.open()
    (shm / "mirror" / "D" / "x" / "y").mkdir(parents=True)
    for name in ("x/b", "x/y/precious"):
        (shm / "mirror" / "D" / name).touch()
    directory = os.open(shm / "mirror" / "D", os.O_RDONLY)
    try:
        steps = files.clear()
        for step in steps:
            if step.endswith(b"/x/b"):
                os.rename("x", "gone", src_dir_fd=directory, dst_dir_fd=directory)
                os.symlink(shm / "outside", "x", dir_fd=directory)
                break
        with pytest.raises(NotADirectoryError):
            list(steps)
        assert precious.exists()
    finally:
        os.close(directory)
        files.close()
    assert precious.exists()
    assert os.listdir(shm) == ["outside"]


def every_operation(files: MirrorDirectory) -> None:
    files.make_directory(b"d", b"n0")
    files.put(b"d/f", b"v", b"n0")
    carry_out(files.publish())
    files.put(b"d/f", b"w", b"n0")
    files.put(b"f", b"w", b"n0")
    files.make_directory(b"d/e", b"")
    files.set_perms(b"d", b"n1")
    files.set_perms(b"", b"n1")
    files.close_directories()
    assert files.read(b"d/f") == (b"w", b"n0" if files.has_perms else b"")
    carry_out(files.removing(b"d/f"))
    carry_out(files.removing(b"d"))
    assert list(files.scan(b"")) == [(b"f", False)]
    carry_out(files.clear())
    files.put(b"g", b"w", b"")


@pytest.mark.parametrize("swapped", ["the directory", "the staging directory", "the parent"])
def test_a_directory_that_is_swapped_leads_nobody_outside(shm: Path, swapped: str) -> None:
    """A symbolic link takes its place."""
    outside = shm / "outside"
    parent = shm / "parent"
    for directory in ("tree/d", "old/d", "d", "mirror/d"):
        (outside / directory).mkdir(parents=True)
        (outside / directory / "f").write_text("mine")
    outside.chmod(0o751)
    parent.mkdir()
    before = {path: path.lstat() for path in (outside, *outside.rglob("*"))}
    path = {
        "the directory": parent / "mirror",
        "the staging directory": parent / ".mirror.xsfs",
        "the parent": parent,
    }[swapped]
    files = MirrorDirectory(str(parent / "mirror"), Ownership(NOBODY, NOBODY, 0o022))
    files.open()
    path.rename(shm / "away")
    path.symlink_to(outside)
    try:
        every_operation(files)
    finally:
        files.close()
    assert path.is_symlink()
    after = {path: path.lstat() for path in (outside, *outside.rglob("*"))}
    for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_ctime_ns"):
        assert {path: getattr(found, name) for path, found in after.items()} == {
            path: getattr(found, name) for path, found in before.items()
        }


def test_a_directory_that_was_taken_away_is_none(shm: Path) -> None:
    """Even one that was open, since something was just put into it."""
    with opened(shm / "mirror") as files:
        files.make_directory(b"d", b"")
        files.put(b"d/f", b"v", b"")
        assert files.first_missing(b"d") is None
        carry_out(files.publish())
        files.put(b"d/f", b"w", b"")
        assert files.first_missing(b"d") is None
        files.close_directories()
        (shm / "mirror" / "d").rename(shm / "away")
        assert files.first_missing(b"d") == b"d"
        assert files.kind(b"d") == 0
    assert (shm / "away" / "f").read_bytes() == b"w"


def test_a_directory_in_the_place_of_a_file_is_not_read(shm: Path) -> None:
    """The files' owner can make it, and xsfs may read it again and again."""
    with opened(shm / "mirror") as files:
        carry_out(files.publish())
        (shm / "mirror" / "d").mkdir()
        os.mkfifo(shm / "mirror" / "p")
        before = os.listdir("/proc/self/fd")
        assert files.read(b"d") is None
        assert files.read(b"p") == (b"", b"")
        assert os.listdir("/proc/self/fd") == before


def test_others_may_read_while_a_user_changes_the_copy(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user needs the right to write for each change; root does not."""
    modes = set()
    real_rename = os.rename

    def rename(*args: Any, **named: Any) -> None:
        modes.add(stat.S_IMODE((shm / "mirror").stat().st_mode))
        real_rename(*args, **named)

    with opened(shm / "mirror", 0o022) as files:
        files._is_root = False
        carry_out(files.publish())
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            files.put(b"f", b"v", b"")
        assert modes == {0o755}
        assert stat.S_IMODE((shm / "mirror").stat().st_mode) == 0o555


# ---------------------------------------------------------------------------------- trusted places


def others_write(path: Path) -> None:
    path.chmod(0o777)


def a_group_writes(path: Path) -> None:
    path.chmod(0o775)


def anothers(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def sticky(path: Path) -> None:
    path.chmod(0o1777)


UNSAFE: dict[str, Callable[[Path], None]] = {
    "can be written by others": others_write,
    "can be written by others ": a_group_writes,
    "belongs to another user": anothers,
    "can be written by others, sticky": sticky,
}


@pytest.mark.parametrize("why", UNSAFE)
@pytest.mark.parametrize("where", ["parent", "parent/mirror", ""])
def test_nobody_else_can_write_where_the_mirror_is(shm: Path, where: str, why: str) -> None:
    """Nor swap anything above it.  A sticky bit prevents that, as in /tmp."""
    (shm / "parent" / "mirror").mkdir(parents=True)
    UNSAFE[why](shm / where)
    if (where, why) == ("", "can be written by others, sticky"):
        with opened(shm / "parent" / "mirror"):
            pass
    else:
        said = why_not(shm / "parent" / "mirror")
        assert why.partition(",")[0].strip() in said
        assert str(shm / where) in said
    shm.chmod(0o700)
    os.chown(shm, 0, 0)
    assert os.listdir(shm / "parent") == ["mirror"]


def test_a_user_trusts_root_and_oneself(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shm.chmod(0o755)
    (shm / "own").mkdir()
    (shm / "own" / "mirror").mkdir()
    for path in ("own", "own/mirror"):
        os.chown(shm / path, NOBODY, NOBODY)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    monkeypatch.setattr(MirrorDirectory, "_open_staging", lambda *_: pytest.fail("is trusted"))
    with pytest.raises(pytest.fail.Exception, match="is trusted"):
        MirrorDirectory(str(shm / "own" / "mirror"), Ownership(0, 0, 0o077)).open()
    os.chown(shm / "own", 1, 1)
    assert "belongs to another user" in why_not(shm / "own" / "mirror")


def test_the_default_directory_lets_others_pass(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask is.  The systemd unit sets 077."""
    run = shm / "run"
    monkeypatch.setattr(staging, "RUN_DIRECTORY", str(run))
    mask = os.umask(0o077)
    try:
        directory = default_directory("/mnt/xen/store")
    finally:
        os.umask(mask)
    assert directory == f"{run}/mnt-xen-store"
    assert stat.S_IMODE(run.stat().st_mode) == 0o755
    with opened(Path(directory), 0o022):
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o555
        run.chmod(0o711)
        assert default_directory("/mnt") == f"{run}/mnt"
        assert stat.S_IMODE(run.stat().st_mode) == 0o711, "an administrator's choice"
    assert not run.exists()


# ---------------------------------------------------------------------------------------- no room


def fill(files: MirrorDirectory, content: bytes) -> None:
    for number in range(100_000):
        files.put(b"%d" % number, content, b"n0")


@pytest.mark.parametrize(
    ("options", "content"),
    [("size=8m", b"x" * 4000), ("size=40m", b"x" * 4000), ("nr_inodes=900", b"")],
)
def test_a_reserve_stays_free(shm: Path, options: str, content: bytes) -> None:
    with tmpfs(shm / "small", options) as small, opened(small / "mirror") as files:
        whole = os.statvfs(small)
        with pytest.raises(OSError, match="No space left on device"):
            fill(files, content)
        left = os.statvfs(small)
        if content:
            reserve = max(1 << 20, whole.f_blocks * whole.f_frsize // 20)
            assert 0.85 * reserve < left.f_bavail * left.f_frsize < 1.15 * reserve
        else:
            assert 40 <= left.f_favail < 70
        (small / "others").write_bytes(b"y" * 100_000 if content else b"")
        carry_out(files.clear())
        files.put(b"f", content, b"")


def test_nothing_is_begun_where_there_is_no_room(shm: Path) -> None:
    with tmpfs(shm / "small", "size=8m") as small, opened(small / "mirror") as files:
        (small / "others").write_bytes(bytes(7 * 1024 * 1024 + 100_000))
        for change in (partial(files.make_directory, b"d"), partial(files.put, b"f", b"")):
            with pytest.raises(OSError, match="No space left on device"):
                change(b"")
        assert list(files.scan(b"")) == []
        (small / "others").unlink()
        files.put(b"f", b"", b"")


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("is_new", [False, True])
def test_a_file_that_cannot_be_finished_leaves_nothing(
    shm: Path, published: bool, is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(shm / "mirror") as files:
        files.make_directory(b"d", b"n0")
        if published:
            carry_out(files.publish())
        with monkeypatch.context() as patch:
            patch.setattr(os, "fchmod", fail)
            with pytest.raises(OSError, match="Input/output"):
                files.put(b"d/f", b"v", b"n0", is_new=is_new)
        assert list(files.scan(b"d")) == []
        files.put(b"d/f", b"v", b"n0", is_new=is_new)
        assert files.read(b"d/f") == (b"v", b"n0" if files.has_perms else b"")


# ------------------------------------------------------------------------------------------- depth


def test_no_path_is_too_deep(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the number of open files, nor for the time that each step takes."""
    opens = 0
    real_open = os.open

    def counted_open(*args: Any, **named: Any) -> int:
        nonlocal opens
        opens += 1
        return real_open(*args, **named)

    depth = 1500
    paths = [b"/".join([b"d"] * levels) for levels in range(1, depth + 1)]
    with opened(shm / "mirror") as files:
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", counted_open)
            for path in paths:
                files.make_directory(path, b"")
        assert opens <= 2 * depth
        assert len(os.listdir("/proc/self/fd")) - before <= staging.OPEN_MAX
        assert files.first_missing(paths[-1] + b"/d/d/d") == paths[-1] + b"/d"
        files.put(paths[-1] + b"/f", b"v", b"")
        carry_out(files.publish())
        assert files.read(paths[-1] + b"/f") is not None
        files.close_directories()
        assert len(os.listdir("/proc/self/fd")) <= before
        carry_out(files.removing(b"d"))
        assert list(files.scan(b"")) == []


def test_permissions_that_are_too_long_for_the_file_system_are_left_out(tmp_path: Path) -> None:
    """A guest can make them; ext4, for one, has room for about one block of them."""
    with suppress(OSError):
        tmp_path.chmod(0o700)
    image = tmp_path / "image"
    subprocess.run(["truncate", "-s", "16M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^ea_inode", "-b", "1024", image], check=True)
    (tmp_path / "ext4").mkdir()
    subprocess.run(["mount", "-o", "loop", image, tmp_path / "ext4"], check=True)
    try:
        with opened(tmp_path / "ext4" / "mirror") as files:
            files.make_directory(b"d", b"n0," * 1300)
            files.put(b"d/f", b"v", b"n0," * 1300)
            assert files.read(b"d/f") == (b"v", b"")
            assert files.perms(b"d") == b""
            files.set_perms(b"d", b"n0,r1")
            assert files.perms(b"d") == b"n0,r1"
            for _ in range(2):
                files.set_perms(b"d", b"n0," * 1300)
                assert files.perms(b"d") == b"", "none rather than old ones"
    finally:
        subprocess.run(["umount", tmp_path / "ext4"], check=True)
