"""Ring: temporary names on real mounts, with the programs that make them."""

from __future__ import annotations

import errno
import fcntl
import fileinput
import itertools
import os
import sqlite3
import stat
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.fs.test_hostile_users import NOBODY
from tests.fs.test_tree import RENAME_NOREPLACE, renameat2
from tests.fs.test_values import fails, node
from tests.support.commands import let_others_reach
from tests.support.lying_store import LyingStore, on, says
from tests.support.mounting import LIMIT, Mount, Place, mounted, open_place
from tests.support.programs import await_screen, on_terminal
from tests.support.xenstored.harness import XsClient
from xsfs.fs import memory_content
from xsfs.view.names import is_scratch_name
from xsfs.xenstore.protocol import Op

on_one_store = pytest.mark.quick_if(place=["C"])
"""Temporary files never reach the store."""


def value(place: Place, witness: XsClient, path: Path) -> bytes:
    return witness.read(node(place, path))


def perms(place: Place, witness: XsClient, path: Path) -> str:
    return ",".join(witness.get_perms(node(place, path)))


# ------------------------------------------------------------------------------------- programs


@on_one_store
def test_vim_with_backups(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one\n")
    # By its default vim makes no backups below /tmp, which contains the mount.
    options = "-c 'set backup writebackup backupskip='"
    mount.bash(f"vim -u NONE -N -es {options} -c s/one/two/ -c wq {box}/f </dev/null")
    assert value(place, witness, box / "f") == b"two"
    assert sorted(os.listdir(box)) == ["f", "f~"]
    assert (box / "f~").read_text() == "one\n"
    assert witness.ls(node(place, box)) == ["f"]


@on_one_store
def test_vim_with_its_defaults(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one\n")
    script = "-c 'set backupskip=' -c s/one/two/ -c preserve -c '!ls -A' -c wq"
    shown = mount.bash(f"cd {box}; vim -u DEFAULTS -es {script} f </dev/null")
    assert ".f.swp" in shown
    assert value(place, witness, box / "f") == b"two"
    assert os.listdir(box) == ["f"]


@on_one_store
def test_nano(place: Place, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one\n")
    with on_terminal("nano", "-I", "--backup", "--locking", box / "f") as terminal:
        await_screen(terminal, b"one")
        os.write(terminal, b"two ")
        await_screen(terminal, b"two")
        os.write(terminal, b"\x0f\r")  # write out, under the same name
        await_screen(terminal, b"Wrote")
        os.write(terminal, b"\x18")
        await_screen(terminal, None)
    assert value(place, witness, box / "f") == b"two one"
    assert (box / "f~").read_text() == "one\n"
    assert sorted(os.listdir(box)) == ["f", "f~"]


@on_one_store
def test_emacs(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one\n")
    # By its default emacs makes no backups below /tmp, which contains the mount.
    backups = "(setq backup-enable-predicate (lambda (name) t))"
    script = """(progn (auto-save-mode 1) (goto-char (point-max)) (insert "two\n") (do-auto-save)
        (princ (directory-files "." nil "^[.#f]")) (save-buffer))"""
    shown = mount.bash(f"cd {box}; emacs --batch -Q --eval '{backups}' f --eval '{script}'")
    assert "#f#" in shown
    assert value(place, witness, box / "f") == b"one\ntwo"
    assert (box / "f~").read_text() == "one\n"
    assert sorted(os.listdir(box)) == ["f", "f~"]
    assert witness.ls(node(place, box)) == ["f"]


def test_rsync_without_inplace(
    place: Place, mount: Mount, box: Path, witness: XsClient, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "f").write_text("1\n")
    (source / "sub" / "g").write_text("2\n")
    mount.bash(f"rsync -r {source}/ {box}/")
    assert value(place, witness, box / "f") == b"1"
    assert value(place, witness, box / "sub" / "g") == b"2"
    os.setxattr(box / "f", "user.xs.perms", f"b{place.domid}".encode())
    (source / "f").write_text("longer\n")
    mount.bash(f"rsync -rt {source}/ {box}/")
    assert value(place, witness, box / "f") == b"longer"
    assert perms(place, witness, box / "f") == f"b{place.domid}"
    (source / "f").write_text("other\n")
    os.setxattr(source / "f", "user.xs.perms", f"r{place.domid}".encode())
    mount.bash(f"rsync -X {source}/f {box}/")
    assert value(place, witness, box / "f") == b"other"
    assert perms(place, witness, box / "f") == f"r{place.domid}"
    assert sorted(os.listdir(box)) == ["f", "sub"]


def test_sed_and_perl_with_backups(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    for command in ("sed -i.bak s/one/two/", "perl -i.bak -pe s/one/two/"):
        (box / "f").write_text("one\n")
        mount.bash(f"{command} {box}/f")
        assert value(place, witness, box / "f") == b"two"
        assert (box / "f.bak").read_text() == "one\n"
        assert witness.ls(node(place, box)) == ["f"]


def test_patch(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one\n")
    script = f"cd {box}; printf -- '--- f\\n+++ f\\n@@ -1 +1 @@\\n-one\\n+two\\n' | patch -b f"
    mount.bash(script)
    assert value(place, witness, box / "f") == b"two"
    assert (box / "f.orig").read_text() == "one\n"
    done = mount.run(script)  # does not apply any more
    assert done.returncode == 1
    assert "+two" in (box / "f.rej").read_text()
    assert value(place, witness, box / "f") == b"two"
    assert witness.ls(node(place, box)) == ["f"]


def test_ed(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one\n")
    mount.bash(f"printf 's/one/two/\\nw\\nw f.bak\\nq\\n' | (cd {box}; ed -s f)")
    assert value(place, witness, box / "f") == b"two"
    assert (box / "f.bak").read_text() == "two\n"


def test_python_fileinput(place: Place, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one\n")
    with fileinput.input([str(box / "f")], inplace=True) as lines:
        for line in lines:
            print(line.replace("one", "two"), end="")
    assert value(place, witness, box / "f") == b"two"
    assert os.listdir(box) == ["f"]


def test_python_atomic_write(place: Place, box: Path, witness: XsClient) -> None:
    for text in ("1\n", "2\n"):
        with tempfile.NamedTemporaryFile(
            "w", dir=box, prefix=".f", suffix=".tmp", delete=False
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        os.replace(file.name, box / "f")
        assert value(place, witness, box / "f").decode() + "\n" == text
        assert os.listdir(box) == ["f"]


def test_what_ansible_does(place: Place, box: Path, witness: XsClient) -> None:
    """atomic_move of Ansible's basic.py: a temporary file beside the target, with its mode, owner and
    times, and a rename."""
    (box / "f").write_text("old\n")
    os.setxattr(box / "f", "user.xs.perms", f"b{place.domid}".encode())
    with tempfile.NamedTemporaryFile(
        prefix=".ansible_tmp", dir=box, suffix="f", delete=False
    ) as new:
        pass
    Path(new.name).write_text("new\n")
    there = os.stat(box / "f")
    os.chmod(new.name, stat.S_IMODE(there.st_mode))
    os.chown(new.name, there.st_uid, there.st_gid)
    os.utime(new.name, ns=(there.st_atime_ns, there.st_mtime_ns))
    os.rename(new.name, box / "f")
    assert value(place, witness, box / "f") == b"new"
    assert perms(place, witness, box / "f") == f"b{place.domid}"


PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - copy: {{content: "one\\ntwo\\n", dest: {box}/f}}
    - copy: {{content: "three\\n", dest: {box}/g, mode: "0644"}}
    - copy: {{content: "four\\n", dest: {box}/g, backup: true}}
    - template: {{src: {tmp_path}/t.j2, dest: {box}/t}}
    - lineinfile: {{path: {box}/f, regexp: "^two", line: "zwei"}}
    - lineinfile: {{path: {box}/f, line: "three", backup: true}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["C-guest", "embedded"], indirect=True, scope="module")
def test_ansible(place: Place, mount: Mount, box: Path, witness: XsClient, tmp_path: Path) -> None:
    (box / "f").write_text("old\n")
    os.setxattr(box / "f", "user.xs.perms", f"b{place.domid}".encode())
    (tmp_path / "t.j2").write_text("{{ 1 + 1 }}\n")
    (tmp_path / "playbook.yml").write_text(PLAYBOOK.format(box=box, tmp_path=tmp_path))
    settings = {"LC_ALL": "C.UTF-8", "HOME": str(tmp_path)}
    command = [
        "ansible-playbook",
        "-i",
        "localhost,",
        "-c",
        "local",
        str(tmp_path / "playbook.yml"),
    ]
    for _ in range(2):
        subprocess.run(command, env={**os.environ, **settings}, check=True, timeout=LIMIT * 30)
        assert value(place, witness, box / "f") == b"one\nzwei\nthree"
        assert value(place, witness, box / "g") == b"four"
        assert value(place, witness, box / "t") == b"2"
    assert perms(place, witness, box / "f") == f"b{place.domid}"
    assert sorted(witness.ls(node(place, box))) == ["f", "g", "t"]
    backups = {name for name in os.listdir(box) if name.endswith("~")}
    assert "three\n" in {(box / name).read_text() for name in backups}


def test_other_patterns_are_refused(box: Path) -> None:
    """Qt and older Go writers make NAME.XXXXXX."""
    with fails(errno.EINVAL):
        (box / "f.Ab12Cd").write_text("1\n")
    with fails(errno.EPERM):
        os.symlink("user@host.1", box / ".#f")  # emacs goes on without its lock


def test_a_database_of_large_pages_does_not_fit_a_value(box: Path) -> None:
    with closing(sqlite3.connect(box / "db", timeout=1)) as database:
        database.execute("PRAGMA journal_mode=DELETE")
        with pytest.raises(sqlite3.Error):
            database.execute("CREATE TABLE t (x)")


# ------------------------------------------------------------------------------------- as files


@pytest.mark.parametrize("name", [".x", "x~", "#x#", "x.bak"])
def test_a_scratch_file_is_a_file(
    place: Place, mount: Mount, box: Path, witness: XsClient, name: str
) -> None:
    file, other = box / name, box / "plain"
    other.write_text("1\n")
    file.write_bytes(b"12345")
    found = os.stat(file)
    assert (found.st_size, found.st_blocks, found.st_nlink) == (5, 1, 1)
    for field in ("st_mode", "st_uid", "st_gid"):
        assert getattr(found, field) == getattr(os.stat(other), field)
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    assert (os.stat(file).st_atime_ns, os.stat(file).st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    with open(file, "ab") as appending:
        appending.write(b"67")
    assert os.stat(file).st_mtime_ns > found.st_mtime_ns
    with open(file, "r+b") as changing:
        changing.seek(2)
        changing.write(b"xx")
        assert os.stat(file).st_size == 7
        changing.seek(0)
        assert changing.read() == b"12xx567"
        changing.truncate(3)
    os.truncate(file, 5)
    assert file.read_bytes() == b"12x\0\0"
    os.chmod(file, 0o600)
    with fails(errno.EPERM):
        os.chmod(file, 0o4600)
    with fails(errno.EPERM):
        os.link(file, box / "hard")
    with fails(errno.EEXIST):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    with fails(errno.EEXIST):
        file.mkdir()
    assert sorted(os.listdir(box)) == sorted([name, "plain"])
    assert {entry.name for entry in os.scandir(box) if entry.is_file()} == {name, "plain"}
    assert mount.bash(f"cat '{mount.path}/.root{node(place, file)}'") == "12x\0\0"
    assert witness.ls(node(place, box)) == ["plain"]
    file.unlink()
    assert not file.exists()
    with fails(errno.ENOENT):
        file.unlink()
    os.mknod(file)
    with fails(errno.EEXIST):
        os.mknod(file)
    assert file.read_bytes() == b""


@pytest.mark.parametrize("name", [".x", "x~", "#x#", "x.bak"])
def test_directories_of_such_names_are_refused(box: Path, name: str) -> None:
    with fails(errno.EINVAL):
        (box / name).mkdir()
    (box / "d").mkdir()
    with fails(errno.EINVAL):
        (box / "d").rename(box / name)
    assert os.listdir(box) == ["d"]


def test_a_removed_file_lives_while_it_is_open(box: Path) -> None:
    file = box / ".x"
    with open(file, "w+b") as opened:
        opened.write(b"old")
        opened.flush()
        file.unlink()
        file.write_bytes(b"another")
        opened.write(b"er")
        opened.seek(0)
        assert opened.read() == b"older"
        assert os.fstat(opened.fileno()).st_nlink == 0
    assert file.read_bytes() == b"another"
    with tempfile.NamedTemporaryFile(dir=box, prefix=".t") as temporary:
        temporary.write(b"1")
    assert os.listdir(box) == [".x"]


def test_locks_work(box: Path) -> None:
    with open(box / ".lock", "w") as first, open(box / ".lock") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_attributes(place: Place, box: Path, witness: XsClient) -> None:
    file = box / ".x"
    file.write_text("1\n")
    me = place.domid
    assert os.listxattr(file) == []
    with fails(errno.ENODATA):
        os.getxattr(file, "user.xs.perms")
    assert os.getxattr(file, "user.xs.value") == b"1"
    os.setxattr(file, "user.xs.value", b"22")
    assert file.read_text() == "22\n"
    for bad in (b"", b"x0", b"n", b"n99999999999"):
        with fails(errno.EINVAL):
            os.setxattr(file, "user.xs.perms", bad)
    with fails(errno.EOPNOTSUPP):
        os.setxattr(file, "user.other", b"1")
    with fails(errno.EPERM):
        os.setxattr(file, "user.xs.path", b"/x")
    os.setxattr(file, "user.xs.perms", f"n{me} r{me + 1}\n".encode())
    assert os.getxattr(file, "user.xs.perms") == f"n{me},r{me + 1}".encode()
    assert os.listxattr(file) == ["user.xs.perms"]
    with fails(errno.EPERM):
        os.removexattr(file, "user.xs.value")
    file.rename(box / "f")
    assert value(place, witness, box / "f") == b"22"
    assert perms(place, witness, box / "f") == f"n{me},r{me + 1}"
    file.write_text("3\n")
    os.setxattr(file, "user.xs.perms", f"b{me}".encode())
    os.removexattr(file, "user.xs.perms")
    with fails(errno.ENODATA):
        os.removexattr(file, "user.xs.perms")
    file.rename(box / "f")
    assert perms(place, witness, box / "f") == f"n{me},r{me + 1}"


# ------------------------------------------------------------------------------------- renaming


def test_renaming_to_a_node_is_one_write(place: Place, box: Path, witness: XsClient) -> None:
    (box / ".x").write_text("new\n")
    (box / "f").write_text("old\n")
    os.setxattr(box / "f", "user.xs.perms", f"b{place.domid}".encode())
    with place.witness() as watcher:
        watcher.watch(node(place, box / "f"), "token")
        watcher.event(LIMIT)
        (box / ".x").rename(box / "f")
        assert value(place, witness, box / "f") == b"new"
        assert watcher.event(LIMIT)
        witness.write(node(place, box / "last"), b"")
        watcher.watch(node(place, box / "last"), "last")
        assert watcher.event(LIMIT)[1] == "last", "more than one event"
    assert perms(place, witness, box / "f") == f"b{place.domid}"
    assert sorted(os.listdir(box)) == ["f", "last"]
    (box / ".empty").write_text("")
    (box / ".empty").rename(box / "e")
    assert value(place, witness, box / "e") == b""


@pytest.mark.parametrize("options", ["umask=077", "allow_other,umask=022"])
def test_modes_are_kept_until_the_rename(
    place: Place, box: Path, tmp_path: Path, witness: XsClient, options: str
) -> None:
    """The rename fails if it would let other users in.  Then both files stay."""
    (box / "child").write_text("or the other mount takes it for a file\n")
    witness.write(f"{node(place, box)}/f", b"old")
    umask = int(options[-3:], 8)
    with mounted(["-o", options, place.socket], tmp_path / "m") as mount:
        directory = mount.path / "data" / box.name
        scratch, file = directory / ".f.Qw3k1Z", directory / "f"

        def mode() -> int:
            return stat.S_IMODE(scratch.stat().st_mode)

        scratch.write_text("new\n")
        assert mode() == 0o666 & ~umask
        for wanted in (0o600, 0o755, 0o400):
            scratch.chmod(wanted)
            assert mode() == wanted & ~umask
            with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
                scratch.chmod(0o4755)
        if "allow_other" in options:
            with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
                scratch.rename(file)
            assert (mode(), scratch.read_text(), file.read_text()) == (0o400, "new\n", "old\n")
            scratch.chmod(0o644)
        scratch.rename(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
        assert witness.read(f"{node(place, box)}/f") == b"new"


def test_too_large_a_content_stays(place: Place, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("old\n")
    (box / ".x").write_bytes(b"x" * 5000)
    with fails(errno.EFBIG):
        (box / ".x").rename(box / "f")
    assert value(place, witness, box / "f") == b"old"
    assert (box / ".x").read_bytes() == b"x" * 5000
    with fails(errno.EFBIG):
        os.truncate(box / ".x", memory_content.FILE_MAX + 1)
    os.truncate(box / ".x", memory_content.FILE_MAX)
    with open(box / ".x", "ab", buffering=0) as full, fails(errno.EFBIG):
        full.write(b"x")


def test_renaming_a_node_takes_value_and_permissions_along(
    place: Place, box: Path, witness: XsClient
) -> None:
    me = place.domid
    (box / "f").write_text("1\n")
    os.setxattr(box / "f", "user.xs.perms", f"b{me}".encode())
    with open(box / "f") as opened:
        (box / "f").rename(box / "f~")
        assert opened.read() == "1\n"
    assert witness.ls(node(place, box)) == []
    assert os.listdir(box) == ["f~"]
    assert os.getxattr(box / "f~", "user.xs.perms") == f"b{me}".encode()
    (box / "f~").rename(box / "g")
    assert value(place, witness, box / "g") == b"1"
    assert perms(place, witness, box / "g") == f"b{me}"


def test_renaming_scratch_to_scratch(box: Path) -> None:
    (box / "d").mkdir()
    (box / ".x").write_text("1")
    (box / ".y").write_text("2")
    with fails(errno.EEXIST):
        renameat2(box / ".x", box / ".y", RENAME_NOREPLACE)
    with open(box / ".x", "r+") as opened, open(box / ".y") as replaced:
        (box / ".x").rename(box / ".y")
        assert (box / ".y").read_text() == "1"
        opened.write("3")
        opened.flush()
        assert replaced.read() == "2"
    (box / ".y").rename(box / "d" / ".z")
    assert os.listdir(box) == ["d"]
    assert (box / "d" / ".z").read_text() == "3"
    (box / "d" / ".z").rename(box / "d" / ".z")
    (box / ".x").write_text("4")
    assert (box / "d" / ".z").read_text() == "3"
    assert (box / ".x").read_text() == "4"


def test_refused_renames(place: Place, box: Path, witness: XsClient, tmp_path: Path) -> None:
    (box / ".x").write_text("1\n")
    (box / "d").mkdir()
    (box / "f").write_text("2\n")
    with fails(errno.EISDIR):
        (box / ".x").rename(box / "d")
    for source, target in ((".x", "f"), ("f", ".x")):
        with fails(errno.EEXIST):
            renameat2(box / source, box / target, RENAME_NOREPLACE)
    for target in ("a.b", "f.Ab12Cd"):
        with fails(errno.EINVAL):
            (box / ".x").rename(box / target)
    for target in (".watch", "g.d"):
        with fails(errno.EPERM):
            (box / ".x").rename(box / target)
    with fails(errno.ENOENT):
        (box / ".missing").rename(box / "g")
    with fails(errno.ENOENT):
        (box / "missing").rename(box / ".g")
    assert sorted(os.listdir(box)) == [".x", "d", "f"]
    assert (box / ".x").read_text() == "1\n"
    assert value(place, witness, box / "f") == b"2"
    renameat2(box / ".x", box / "g", RENAME_NOREPLACE)
    renameat2(box / "f", box / ".f", RENAME_NOREPLACE)
    assert witness.ls(node(place, box)) == ["d", "g"]


def test_open_handles_follow_the_rename(place: Place, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("old\n")
    with open(box / "f") as before, open(box / ".x", "w") as opened:
        opened.write("1")
        opened.flush()
        (box / ".x").rename(box / "f")
        assert before.read() == "old\n", "a replaced file lives on for those who have it open"
        opened.write("2\n")
        opened.flush()
        assert os.fstat(opened.fileno()).st_size == 3
    assert value(place, witness, box / "f") == b"12"
    (box / "f").unlink()
    (box / ".x").write_text("again\n")
    assert os.listdir(box) == [".x"]


def test_directories_with_scratch_files(place: Place, box: Path, witness: XsClient) -> None:
    (box / "d").mkdir()
    (box / "d" / ".x").write_text("1")
    with fails(errno.ENOTEMPTY):
        (box / "d").rmdir()
    (box / "e").mkdir()
    with fails(errno.ENOTEMPTY):
        (box / "e").rename(box / "d")
    (box / "d").rename(box / "moved")
    assert (box / "moved" / ".x").read_text() == "1"
    (box / "moved" / ".x").unlink()
    (box / "moved").rmdir()
    (box / "e" / "sub").mkdir()
    (box / "e" / "sub" / ".x").write_text("1")
    witness.rm(node(place, box / "e"))
    assert not (box / "e" / "sub" / ".x").exists()
    witness.write(node(place, box / "e" / "sub" / "f"), b"1")
    assert os.listdir(box / "e" / "sub") == ["f"]
    with pytest.raises(FileNotFoundError):
        (box / "gone" / ".x").write_text("1")


def test_a_directory_that_is_removed_under_its_user(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    (box / "d").mkdir()
    (box / "d" / ".x").write_text("1")
    inside = os.open(box / "d", os.O_DIRECTORY)
    try:
        witness.rm(node(place, box / "d"))
        with fails(errno.ENOENT):
            os.stat(".x", dir_fd=inside)
        with fails(errno.ENOENT):
            os.mknod(".y", dir_fd=inside)
        with pytest.raises(OSError, match=r"Stale|No such"):
            os.close(os.open(".y", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
        witness.write(node(place, box / "d" / "f"), b"1")
        assert os.listdir(box / "d") == ["f"]
    finally:
        os.close(inside)


def test_rm_and_cp_and_tar(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    mount.bash(f"cd {box}; mkdir d; echo 1 > d/f; echo 2 > d/.x; cp -a d e; mv d/.x d/g; rm -r d")
    assert sorted(os.listdir(box / "e")) == [".x", "f"]
    mount.bash(f"cd {box}; tar cf - e | (mkdir t; cd t; tar xf -); cat t/e/.x")
    assert witness.ls(node(place, box / "t" / "e")) == ["f"]


def test_a_file_that_is_open_and_moved_aside(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """The open file follows its names: what is written to it reaches the file under the name that it has."""
    (box / "f").write_text("1\n")
    with open(box / "f", "r+b", buffering=0) as file:
        mount.bash(f"cd {box}; mv f f~")
        assert file.read() == b"1\n"
        file.write(b"2\n")
        assert (box / "f~").read_text() == "1\n2\n"
        assert (os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_nlink) == (4, 1)
        (box / "f").write_text("another\n")
        file.truncate(2)
        assert (box / "f~").read_text() == "1\n"
        assert value(place, witness, box / "f") == b"another"
        mount.bash(f"cd {box}; mv f~ f")
        assert value(place, witness, box / "f") == b"1"
        file.write(b"3\n")
        assert value(place, witness, box / "f") == b"1\n\0\x003"
        mount.bash(f"cd {box}; mv f f~; rm f~; echo new > f~")
        file.truncate(1)
        file.seek(0)
        assert file.read() == b"1"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert (box / "f~").read_text() == "new\n"
    assert witness.ls(node(place, box)) == []


def test_permissions_that_cannot_be_taken_along(tmp_path: Path) -> None:
    with (
        open_place("C", tmp_path) as place,
        LyingStore(tmp_path / "liar", place.socket) as liar,
        mounted([liar.path], tmp_path / "m") as mount,
    ):
        file = mount.path / "data" / "kept"
        file.write_text("1\n")
        for error, number in ((b"ENOMEM\0", errno.ENOMEM), (b"EACCES\0", errno.EACCES)):
            liar.lie = on(Op.GET_PERMS, says(error, Op.ERROR))
            with fails(number):
                file.rename(mount.path / "data" / "kept~")
            liar.behave()
            assert file.read_text() == "1\n"


# --------------------------------------------------------------------------------- transactions


def test_transactions_have_none(place: Place, box: Path, tx: Path) -> None:
    (box / ".x").write_text("1")
    tx.mkdir()
    inside = tx / "data" / box.name
    assert os.listdir(inside) == []
    assert not (inside / ".x").exists()
    for name in (".x", ".y", "x~"):
        with fails(errno.EINVAL):
            (inside / name).write_text("1")
    (inside / "f").write_text("1\n")
    with fails(errno.EINVAL):
        (inside / "f").rename(inside / "f~")
    tx.rmdir()
    assert (box / ".x").read_text() == "1"


def test_the_mirror_has_none(place: Place, tmp_path: Path, witness: XsClient) -> None:
    with mounted(["-o", f"mirror={tmp_path}/mirror", place.socket], tmp_path / "m") as mount:
        data = mount.path / "data"
        (data / ".x").write_text("1")
        (data / "f").write_text("1\n")
        (data / "f").rename(data / "f~")
        (data / "last").write_text("1\n")
        deadline = time.monotonic() + LIMIT
        mirror = tmp_path / "mirror" / "data"
        while not (mirror / "last").exists() or (mirror / "f").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)  # until the mirror has followed
        assert not [name for name in os.listdir(mirror) if is_scratch_name(name.encode())]
        assert (data / "f~").read_text() == "1\n"
        mount.bash("rm data/last data/.x data/f~")


# ----------------------------------------------------------------------------- limits and the end


@on_one_store
def test_the_log_says_how_many_were_left(place: Place, tmp_path: Path) -> None:
    with mounted(["-d", place.socket], tmp_path / "m") as mount:
        data = mount.path / "data"
        for name in (".a", ".\udcff\nb", "c~"):
            (data / name).write_text("1")
            assert (data / name).read_text() == "1"
        (data / ".a").unlink()
        with open(data / ".d", "w") as opened:
            os.unlink(opened.name)
    lines = [line for line in mount.stderr.splitlines() if "scratch files" in line]
    assert len(lines) == 1
    assert lines[0].endswith("scratch files lost at the unmount: 2")
    assert not [line for line in mount.stderr.splitlines() if line.startswith("b")]
    with mounted([place.socket], tmp_path / "m") as mount:
        assert not [
            name for name in os.listdir(mount.path / "data") if is_scratch_name(name.encode())
        ]
    assert "scratch" not in mount.stderr


def fill(directory: Path, data: bytes) -> tuple[int, int]:
    """How many scratch files of this content can be made, and why no more."""
    for number in itertools.count():
        try:
            (directory / f".{number}").write_bytes(data)
        except OSError as error:
            return number, error.errno or -1
    raise AssertionError


@on_one_store
def test_number_and_bytes_are_bounded(place: Place, tmp_path: Path, witness: XsClient) -> None:
    with mounted([place.socket], tmp_path / "m") as mount:
        full = mount.path / "data" / "full"
        full.mkdir()
        assert fill(full, b"") == (memory_content.FILES_MAX, errno.ENOSPC)
        (full / "f").write_text("1\n")
        with fails(errno.ENOSPC):
            (full / "f").rename(full / "f~")
        assert (full / "f").read_text() == "1\n"
        witness.rm(node(place, full))
        other = mount.path / "data" / "other"
        other.mkdir()
        # The lost directory has given its room back.
        count = memory_content.BYTES_MAX // memory_content.FILE_MAX
        assert fill(other, b"x" * memory_content.FILE_MAX) == (count, errno.ENOSPC)
        assert os.stat(other / f".{count}").st_size == 0
        (other / ".0").unlink()
        (other / f".{count}").write_bytes(b"x" * memory_content.FILE_MAX)
        mount.bash("rm -r data/other")
        witness.rm(node(place, mount.path / "data" / "full"))


FILL = """
import itertools, os, sys
for number in itertools.count():
    try:
        with open(f"{sys.argv[1]}/.{number}-{os.getuid()}", "wb", buffering=0) as file:
            file.write(b"x" * int(sys.argv[2]))
    except OSError as error:
        print(number, error.errno)
        break
"""


@on_one_store
@pytest.mark.parametrize(
    ("size", "count"),
    [
        (0, memory_content.EACH_UNPRIVILEGED_FILES_MAX),
        (
            memory_content.FILE_MAX,
            memory_content.EACH_UNPRIVILEGED_BYTES_MAX // memory_content.FILE_MAX,
        ),
    ],
)
def test_each_user_has_a_share(place: Place, tmp_path: Path, size: int, count: int) -> None:
    let_others_reach(tmp_path / "m")
    with mounted(["-o", "allow_other,umask=000", place.socket], tmp_path / "m") as mount:
        data = mount.path / "data"
        for uid in (65534, 65533):
            user = ["setpriv", f"--reuid={uid}", *NOBODY[2:]]
            command = [*user, "/usr/bin/python3", "-c", FILL, str(data), str(size)]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT, check=True
            )
            assert done.stdout.split() == [str(count), str(errno.EDQUOT)]
            renamed = subprocess.run(
                [*user, "sh", "-c", f"cd {data} && echo 1 > f && mv f f~"],
                env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
            )
            if size == 0:
                assert "Disk quota exceeded" in renamed.stderr
        (data / ".mine").write_bytes(b"x" * 1000)
