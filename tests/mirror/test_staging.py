"""Ring: the files of the live mirror in process: no store, no mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mirroring import scratch
from xsfs.mirror.staging import MirrorFiles
from xsfs.view.ownership import Ownership


@pytest.fixture
def shm() -> Iterator[Path]:
    with scratch() as path:
        yield path


def test_the_owner_leads_nobody_outside_when_a_copy_is_given_up(shm: Path) -> None:
    """What was put into DIR meanwhile is moved out and removed, while its owner still has it open."""
    precious = shm / "outside" / "y" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    files = MirrorFiles(str(shm / "mirror"), Ownership(0, 0, 0o077))
    files.open()
    files.begin()
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


def test_the_workshop_is_exchanged(shm: Path) -> None:
    """By the owner of the directory above, while a copy is made in it."""
    outside = shm / "outside"
    (outside / "tree").mkdir(parents=True)
    files = MirrorFiles(str(shm / "mirror"), Ownership(0, 0, 0o022))
    files.open()
    files.begin()
    workshop = shm / ".mirror.xsfs"
    workshop.rename(shm / "gone")
    workshop.symlink_to(outside)
    try:
        files.make_directory(b"d")
        files.set_perms(b"d", b"n0", new=True)
        files.put(b"d/f", b"v", b"", new=True)
        assert files.content(b"d/f") == b"v"
        assert os.listdir(outside / "tree") == []
    finally:
        workshop.unlink()
        (shm / "gone").rename(workshop)
        files.close()


def test_a_directory_that_was_taken_away_is_none(shm: Path) -> None:
    """Even one that is held open, since something was just put into it."""
    files = MirrorFiles(str(shm / "mirror"), Ownership(0, 0, 0o077))
    files.open()
    try:
        files.begin()
        files.make_directory(b"d")
        files.put(b"d/f", b"v", b"")
        assert files.is_directory(b"d")
        for _ in files.publish():
            pass
        files.put(b"d/f", b"w", b"")
        assert files.is_directory(b"d")
        (shm / "mirror" / "d").rename(shm / "away")
        assert not files.is_directory(b"d")
    finally:
        files.close()
    assert (shm / "away" / "f").read_bytes() == b"w"


def test_what_was_made_ahead_is_used_or_goes(shm: Path) -> None:
    files = MirrorFiles(str(shm / "mirror"), Ownership(0, 0, 0o077))
    files.open()
    new = shm / ".mirror.xsfs" / "new"
    try:
        files.begin()
        files.make_directory(b"d")
        for _ in files.publish():
            pass
        files.rest()
        descriptors = os.listdir("/proc/self/fd")

        files.expect()
        assert new.exists()
        files.put(b"d/f", b"value", b"")
        assert not new.exists()
        assert (shm / "mirror" / "d" / "f").read_bytes() == b"value"

        files.expect()
        files.expect()
        files.rest()
        assert not new.exists()
        assert os.listdir("/proc/self/fd") == descriptors

        files.expect()
        for _ in files.clear():
            pass
        assert not new.exists()
        files.begin()
        files.expect()
    finally:
        files.close()
    assert os.listdir(shm) == []


def test_an_empty_file_that_was_made_ahead_is_from_now(shm: Path) -> None:
    """Nothing is written into it that would tell when."""
    files = MirrorFiles(str(shm / "mirror"), Ownership(0, 0, 0o077))
    files.open()
    try:
        files.expect()
        os.utime(shm / ".mirror.xsfs" / "new", (0, 0))
        files.put(b"f", b"", b"")
        assert (shm / "mirror" / "f").stat().st_mtime > 0
    finally:
        files.close()


def test_the_last_inode_is_not_kept_for_a_file_that_does_not_come(shm: Path) -> None:
    small = shm / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=8", "none", small], check=True)
    try:
        files = MirrorFiles(str(small / "mirror"), Ownership(0, 0, 0o077))
        files.open()
        try:
            made = 0
            while os.statvfs(small).f_ffree > 1:
                files.put(b"f%d" % made, b"", b"")
                made += 1
            files.expect()
            assert os.statvfs(small).f_ffree == 0
            files.make_directory(b"d")
        finally:
            files.close()
    finally:
        subprocess.run(["umount", small], check=True)
