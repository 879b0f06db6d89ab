"""Ring: a real mount, of every store.  The tree: kinds, names, modes, attributes, changes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.fs.test_values import fails, node
from tests.support.mounting import GUEST, LIMIT, Mount, Place, of_guests, refusal, winners
from tests.support.xenstored.harness import XsClient, XsError, strings
from xsfs.fs.nodes import DIRECTORY_ENTRY_TIMEOUT

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def renameat2(source: Path, target: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, bytes(source), -100, bytes(target), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---------------------------------------------------------------------------------------- kinds


def test_kinds(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    witness.write(f"{top}/file", b"1")
    witness.write(f"{top}/both", b"2")
    witness.write(f"{top}/both/child", b"3")
    witness.mkdir(f"{top}/neither")
    assert mount.bash(f"cd {box}; find . | sort; cat both/.value file") == (
        ".\n./both\n./both/.value\n./both/child\n./file\n./neither\n2\n1\n"
    )
    assert (box / "neither").is_file()
    assert (box / "neither.d").is_dir()
    assert (box / "file.d" / ".value").read_text() == "1\n"
    (box / "file.d" / "child").write_text("4\n")
    assert (box / "file").is_dir()
    assert (box / "file" / ".value").read_text() == "1\n"


def test_containers_by_convention(place: Place, mount: Mount, witness: XsClient) -> None:
    witness.mkdir(f"{place.home}/data")
    assert (mount.path / "data").is_dir()
    if place.guest:
        # libxl leaves it empty, and it is a command's place, not a directory.
        mount.bash("[ -f control/shutdown ] && echo reboot > control/shutdown")
        assert witness.read(f"{place.home}/control/shutdown") == b"reboot"
        assert (mount.path / "drivers").is_dir()


def test_an_emptied_directory_stays_one(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    witness.write(f"{node(place, box)}/d/child", b"1")
    assert os.listdir(box / "d") == ["child"]
    witness.rm(f"{node(place, box)}/d/child")
    assert os.listdir(box / "d") == []
    # With a value and without children it is a file, says the design of Xenstore's users.
    witness.write(f"{node(place, box)}/d", b"5")
    assert (box / "d").read_text() == "5\n"


def test_a_file_becomes_a_directory_and_back(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    path = f"{node(place, box)}/n"
    for _ in range(3):
        witness.write(path, b"1")
        assert (box / "n").read_text() == "1\n"
        witness.write(f"{path}/child", b"2")
        assert (box / "n" / "child").read_text() == "2\n"
        assert (box / "n").is_dir()
        witness.rm(f"{path}/child")


def test_a_directory_removed_by_others_is_gone(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    (box / "d").mkdir()
    (box / "d" / "x").write_text("1\n")
    inside = os.open(box / "d", os.O_PATH)
    witness.rm(f"{node(place, box)}/d")
    for name in ("d", "d/x"):
        with pytest.raises(FileNotFoundError):
            (box / name).stat()
    with pytest.raises(FileNotFoundError):
        os.listdir(box / "d")
    with pytest.raises(FileNotFoundError):
        (box / "d" / "new").write_text("1\n")
    with pytest.raises(FileNotFoundError):
        (box / "d" / "sub").mkdir()
    with pytest.raises(FileNotFoundError):
        os.stat("x", dir_fd=inside)
    os.close(inside)
    with pytest.raises(XsError, match="ENOENT"):
        witness.read(f"{node(place, box)}/d")


def test_own_files(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    assert mount.bash("cat .domid") == f"{place.domid}\n"
    assert mount.counter("requests") > 0
    assert mount.counter("reconnects") == 0
    assert not {".root", ".domid", ".stats", ".watch"} & set(os.listdir(mount.path))
    assert os.getxattr(mount.path / ".root" / "local", "user.xs.path") == b"/local"
    (box / "x").write_text("7\n")
    assert Path(f"{mount.path}/.root{node(place, box)}/x").read_text() == "7\n"
    for name in (".domid", ".stats"):
        with pytest.raises(PermissionError):
            (mount.path / name).write_text("1")
        with pytest.raises(PermissionError):
            (mount.path / name).unlink()


def test_find_and_grep_meet_nothing_twice(mount: Mount, box: Path) -> None:
    (box / "only").write_text("needle-in-a-store\n")
    assert mount.bash("grep -r needle-in-a-store . | wc -l") == "1\n"
    listed = mount.bash("find . -name '.*' | grep -v '^.$' | grep -v '/.value$' || true")
    assert listed == ""


def test_dot_value(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "d").mkdir()
    value = box / "d" / ".value"
    assert not value.exists()
    assert (box / "d.d" / ".value").read_text() == ""
    assert os.listdir(box / "d") == []
    value.write_text("9\n")
    assert witness.read(f"{node(place, box)}/d") == b"9"
    assert os.listdir(box / "d") == [".value"]
    # Written through the mount it does not make a file of the directory.
    assert (box / "d").is_dir()
    with fails(errno.ENOTEMPTY):
        (box / "d").rmdir()
    value.unlink()
    assert not value.exists()
    assert witness.read(f"{node(place, box)}/d") == b""
    os.close(os.open(value, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    assert value.exists()
    (box / "d").rmdir()


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["a.b", "a b", "ä", "a:b", "a+", "#", "a~b", "a.XXXXXX", "*"])
def test_names_that_xenstore_refuses(mount: Mount, box: Path, name: str) -> None:
    with fails(errno.EINVAL):
        (box / name).write_text("1")
    with fails(errno.EINVAL):
        (box / name).mkdir()
    (box / "good").write_text("1\n")
    with fails(errno.EINVAL):
        (box / "good").rename(box / name)
    assert not (box / name).exists()
    assert os.listdir(box) == ["good"]


def test_names_too_long(mount: Mount, box: Path) -> None:
    (box / ("n" * 255)).write_text("1\n")
    with fails(errno.ENAMETOOLONG):
        (box / ("n" * 256)).write_text("1\n")
    with fails(errno.ENAMETOOLONG):
        (box / ("n" * 256)).stat()
    deep = os.open(box, os.O_PATH)
    for _ in range(15):
        try:
            os.mkdir("d" * 250, dir_fd=deep)
        except OSError as error:
            assert error.errno == errno.ENAMETOOLONG  # noqa: PT017
            break
        inner = os.open("d" * 250, os.O_PATH, dir_fd=deep)
        os.close(deep)
        deep = inner
    else:
        pytest.fail("a path over 3072 bytes was taken")
    os.close(deep)


def test_long_names_of_others_have_an_alias(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    # A guest's quota for one node is less than one such name.
    length = 300 if place.guest else 1500
    long, twin = "L" * length, "L" * (length - 1) + "M"
    for name in (long, twin):
        witness.write(f"{node(place, box)}/{name}", name[-1].encode())
        witness.write(f"{node(place, box)}/{name}-dir/child", b"2")
    alias = long[:200] + "~" + hashlib.sha256(long.encode()).hexdigest()[:16]
    listed = os.listdir(box)
    assert len(listed) == 4
    assert alias in listed
    assert (box / alias).read_text() == "L\n"
    assert {(box / name).read_text() for name in listed if (box / name).is_file()} == {"L\n", "M\n"}
    (box / alias).write_text("changed\n")
    assert witness.read(f"{node(place, box)}/{long}") == b"changed"
    mount.bash(f"ls -lR {box}; find {box}; grep -r changed {box}")
    (box / alias).rename(box / "short")
    assert witness.read(f"{node(place, box)}/short") == b"changed"
    mount.bash(f"rm -r {box}/L*")
    assert os.listdir(box) == ["short"]


def test_a_long_name_made_by_a_guest_does_not_break_dom0(place: Place, mount: Mount) -> None:
    if place.guest or place.daemon is None:
        return  # seen from dom0 of a daemon that has guests
    data = f"/local/domain/{GUEST}/data"
    with place.daemon.client(GUEST) as guest:
        guest.write(f"{data}/{'G' * 1500}", b"hostile")
        top = mount.path / ".root" / "local" / "domain" / str(GUEST)
        (alias,) = [name for name in os.listdir(top / "data") if name.startswith("G")]
        assert len(alias) == 217
        assert (top / "data" / alias).read_text() == "hostile\n"
        mount.bash(f"ls -lR {top} && find {top} && grep -r hostile {top}")
        (top / "data" / alias).unlink()
        assert guest.ls(data).count("G" * 1500) == 0


# ------------------------------------------------------------------------------- creation, removal


def test_mkdir_is_a_lock(mount: Mount, box: Path) -> None:
    assert winners((box / "lock").mkdir) == 1
    (box / "lock").rmdir()


def test_removal_as_posix_has_it(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "d" / "e").mkdir(parents=True)
    (box / "f").write_text("1\n")
    with fails(errno.ENOTEMPTY):
        (box / "d").rmdir()
    with fails(errno.EISDIR):
        (box / "d").unlink()
    with fails(errno.ENOTDIR):
        (box / "f").rmdir()
    with pytest.raises(FileNotFoundError):
        (box / "nothing").unlink()
    # The kernel thinks that it is empty: the store knows better.
    witness.write(f"{node(place, box)}/d/e/came-meanwhile", b"")
    with fails(errno.ENOTEMPTY):
        (box / "d" / "e").rmdir()
    mount.bash(f"rm -r {box}/d {box}/f")
    assert os.listdir(box) == []


def test_what_cannot_be_made(mount: Mount, box: Path) -> None:
    (box / "f").write_text("1\n")
    for attempt in (
        lambda: os.symlink("f", box / "link"),
        lambda: os.link(box / "f", box / "link"),
        lambda: os.mkfifo(box / "fifo"),
        lambda: (box / ".value").rename(box / "v"),
        lambda: (box / "f.d").rmdir(),
    ):
        assert refusal(attempt)
    os.mknod(box / "node")
    assert (box / "node").read_text() == ""


# ---------------------------------------------------------------------------------------- rename


def test_rename_a_file(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "a").write_text("1\n")
    (box / "b").write_text("2\n")
    with open(box / "a", "r+b", buffering=0) as opened:
        (box / "a").rename(box / "c")
        assert os.listdir(box) == ["b", "c"] or sorted(os.listdir(box)) == ["b", "c"]
        opened.write(b"7")  # the handle follows the file
    assert (box / "c").read_text() == "7\n"
    (box / "c").rename(box / "b")
    assert (box / "b").read_text() == "7\n"
    assert os.listdir(box) == ["b"]
    with fails(errno.EEXIST):
        (box / "n").write_text("")
        renameat2(box / "b", box / "n", RENAME_NOREPLACE)
    with fails(errno.EINVAL):
        renameat2(box / "b", box / "n", RENAME_EXCHANGE)
    renameat2(box / "b", box / "m", RENAME_NOREPLACE)
    assert (box / "m").read_text() == "7\n"


def test_rename_a_subtree_with_values_and_permissions(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    top = node(place, box)
    me = place.domid
    nodes = {"": b"top", "/x": b"1", "/x/y": b"\0binary\n", "/empty": b"", "/z": b"3"}
    for name, value in nodes.items():
        witness.write(f"{top}/old{name}", value)
    perms = [f"n{me}", "r0" if me else f"r{me}"] if me else ["b0"]
    witness.set_perms(f"{top}/old/x/y", perms)
    (box / "new").mkdir()
    assert (box / "old").is_dir()
    inside = os.open(box / "old", os.O_RDONLY)
    (box / "old").rename(box / "new")
    for name, value in nodes.items():
        assert witness.read(f"{top}/new{name}") == value
    assert witness.get_perms(f"{top}/new/x/y") == perms
    with pytest.raises(XsError, match="ENOENT"):
        witness.read(f"{top}/old")
    assert (box / "new" / "x" / ".value").read_text() == "1\n"
    assert os.stat("z", dir_fd=inside).st_size == 2  # an open directory moves along
    os.close(inside)
    (box / "old").mkdir()
    assert os.listdir(box / "old") == []


def test_rename_refused(place: Place, mount: Mount, box: Path) -> None:
    (box / "d" / "sub").mkdir(parents=True)
    (box / "e").mkdir()
    (box / "e" / "x").write_text("1\n")
    (box / "f").write_text("1\n")
    other = Path(f"{mount.path}/.root{node(place, box)}")
    for source, target, number in (
        (box / "d", box / "e", errno.ENOTEMPTY),
        (box / "d", box / "f", errno.ENOTDIR),
        (box / "f", box / "d", errno.EISDIR),
        (box / "d", box / "d" / "sub" / "deeper", errno.EINVAL),
        # The same place by another way, which the kernel cannot know.
        (box / "d", other / "d" / "sub" / "deeper", errno.EINVAL),
        (box / "f", box / ".value", errno.EXDEV),
        (box / "nothing", box / "d", errno.ENOENT),
    ):
        with fails(number):
            source.rename(target)
    (box / "f").rename(other / "f")
    assert sorted(os.listdir(box)) == ["d", "e", "f"]


def test_renamed_back_and_forth(mount: Mount, box: Path) -> None:
    script = f"""
        cd {box}
        echo one > a; mv a b; mv b a; echo two > b; cat a b
        mkdir m1; echo 1 > m1/x; mv m1 m2; mv m2 m3; mkdir m2; echo 2 > m2/y; ls m3; rm -r m2; ls m3
    """
    assert mount.bash(script) == "one\ntwo\nx\nx\n"


def test_data_can_be_renamed_and_is_there_again(
    place: Place, mount: Mount, witness: XsClient
) -> None:
    if place.guest:
        return  # its home is not the guest's to change
    script = (
        "echo keep > data/k; mkdir data/d; echo 1 > data/d/x; mv data other; ls other; ls -A data"
    )
    assert set(mount.bash(script).split()) >= {"k", "d"}
    assert (
        mount.bash("cat other/k other/d/x; ls data; cp -r other/. data; rm -r other") == "keep\n1\n"
    )
    assert mount.bash("cat data/k; rm -r data/k data/d") == "keep\n"


def test_a_directory_by_custom_stays_one(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    if place.guest:
        return
    witness.mkdir("/local/domain/97/device")
    domain = mount.path / ".root" / "local" / "domain" / "97"
    (domain / "device").rename(domain / "devold")
    assert (domain / "devold").is_dir()
    witness.rm("/local/domain/97")


def test_what_may_not_be_read_is_not_removed_as_empty(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    if not place.guest:
        return  # nothing is unreadable to dom0
    path = f"{node(place, box)}/drop"
    with place.dom0() as dom0:
        dom0.write(f"{path}/kid/deep", b"precious")
        dom0.set_perms(path, ["n0", f"w{place.domid}"])
        with fails(errno.EACCES):
            (box / "drop").rmdir()
        (box / "d").mkdir()
        with fails(errno.EACCES):
            (box / "d").rename(box / "drop")
        assert "Permission denied" in mount.run(f"rm -r {box}/drop").stderr
        assert dom0.read(f"{path}/kid/deep") == b"precious"
        dom0.rm(path)


# ----------------------------------------------------------------------------- modes, attributes


def test_modes(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("1\n")
    assert stat.filemode((box / "f").stat().st_mode) == "-rw-------"
    assert stat.filemode(box.stat().st_mode) == "drwx------"
    assert (box / "f").stat().st_uid == os.getuid()
    os.chmod(box / "f", 0o600)
    os.utime(box / "f", (1, 1))
    os.chown(box / "f", os.getuid(), os.getgid())
    os.chmod(box / "f", 0o644)
    os.chmod(box / "f", 0o755)
    assert stat.filemode((box / "f").stat().st_mode) == "-rw-------"
    with fails(errno.EPERM):
        os.chmod(box / "f", 0o4755)
    with fails(errno.EPERM):
        os.chown(box / "f", 1234, -1)
    if place.guest:
        name = mount.path / "name"
        assert stat.filemode(name.stat().st_mode) == "-r--------"
        with fails(errno.EACCES):
            name.write_text("mine")


def test_access_is_as_the_modes_say(mount: Mount, box: Path) -> None:
    (box / "f").write_text("1\n")
    stats = mount.path / ".stats"
    for path, asked, allowed in (
        (box / "f", os.R_OK | os.W_OK, True),
        (box / "f", os.X_OK, False),
        (box, os.R_OK | os.W_OK | os.X_OK, True),
        (stats, os.R_OK, True),
        (stats, os.W_OK, False),
        (mount.path / ".domid", os.W_OK, False),
        (box / ".ls", os.R_OK, True),
        (box / ".ls", os.W_OK, False),
    ):
        assert os.access(path, asked) == allowed, path
    assert mount.bash("test -w .stats || echo no; test -r .stats && echo yes") == "no\nyes\n"


@of_guests
def test_access_in_a_guest(place: Place, mount: Mount) -> None:
    name = mount.path / "name"
    assert os.access(name, os.R_OK)
    assert not os.access(name, os.W_OK)


def test_a_name_that_was_a_directory_is_one_for_a_second_at_most(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    uses = ("echo 1 > X", "cp f X && [ ! -e X/f ]", "rm -f X", "mkdir X", "mv g X && [ ! -e X/g ]")
    for number, use in enumerate(uses):
        directory = box / str(number)
        for name in ("f", "g", "X/child"):
            witness.write(f"{node(place, directory)}/{name}", b"1")
        mount.bash(f"cd {directory}; ls X; cat X/child")
        witness.rm(f"{node(place, directory)}/X")
        time.sleep(DIRECTORY_ENTRY_TIMEOUT + 0.1)
        done = mount.run(f"cd {directory}; {use}")
        assert (done.returncode, done.stderr) == (0, ""), use
    # A directory that became a value meanwhile.
    witness.write(f"{node(place, box)}/0/X", b"1")
    assert (box / "0" / "X").read_text() == "1\n"


def test_a_directory_that_is_renamed_to_its_other_name(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """For the kernel it replaces another directory, which a program may have open."""
    witness.write(f"{node(place, box)}/d/child", b"1")
    paths = box / "d", mount.path / ".root" / node(place, box / "d").lstrip("/")
    with ExitStack() as stack:
        for path in paths:
            stack.callback(os.close, os.open(path, os.O_DIRECTORY))
        paths[0].rename(paths[1])
        time.sleep(DIRECTORY_ENTRY_TIMEOUT + 0.1)
        for path in paths:
            assert os.listdir(path) == ["child"]
    mount.bash(f"rm -r {paths[0]}")


@pytest.mark.quick_if(place=["C"])
def test_a_directory_is_renamed_while_others_make_and_remove_nodes_in_it(
    place: Place, box: Path, witness: XsClient
) -> None:
    """At worst that is a conflict.  It is never said that there is no such directory."""
    top, stop = node(place, box), threading.Event()
    witness.write(f"{top}/a/stays", b"1")

    def churn() -> None:
        with place.witness() as client:
            while not stop.is_set():
                # In a transaction, or the node would come back right after the directory was renamed.
                with suppress(XsError):
                    number = client.start()
                    try:
                        client.read(f"{top}/a/stays", number)
                        client.write(f"{top}/a/n", b"1", number)
                    except XsError:
                        client.end(number, commit=False)
                        continue
                    client.end(number)
                    client.rm(f"{top}/a/n")

    here, there = box / "a", box / "c"
    outcomes: list[int] = []
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(5):
            outcomes.append(refusal(partial(here.rename, there)))
            if not outcomes[-1]:
                here, there = there, here
    finally:
        stop.set()
        thread.join(LIMIT)
    assert set(outcomes) <= {0, errno.EAGAIN}
    assert (here / "stays").read_text() == "1\n"


def test_unreadable_nodes(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    if not place.guest:
        # Nothing is unreadable to dom0.
        witness.write(f"{node(place, box)}/secret", b"1")
        witness.set_perms(f"{node(place, box)}/secret", ["n0"])
        assert (box / "secret").read_text() == "1\n"
        return
    with place.dom0() as dom0:
        dom0.write(f"{node(place, box)}/secret", b"1")
        dom0.write(f"{node(place, box)}/secret/open", b"2")
        dom0.set_perms(f"{node(place, box)}/secret", ["n0"])
        dom0.set_perms(f"{node(place, box)}/secret/open", ["n0", f"r{place.domid}"])
        listed = mount.bash(f"ls -l {box}")
        assert "d-wx------" in listed
        with fails(errno.EACCES):
            os.listdir(box / "secret")
        assert (box / "secret" / "open").read_text() == "2\n"
        root = mount.path / ".root"
        assert (root / "local" / "domain" / str(place.domid) / "name").read_text()
        with fails(errno.EACCES):
            os.listdir(root / "local" / "domain")
        dom0.rm(f"{node(place, box)}/secret")


def test_extended_attributes(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    file, path = box / "f", node(place, box / "f")
    file.write_text("1\n")
    me = place.domid
    for target in (file, box):
        assert os.listxattr(target) == ["user.xs.perms"]
        assert os.getxattr(target, "user.xs.path").decode() == node(place, target)
    for text in (f"n{me},r0", f"n{me} w0", f"b{me}"):
        os.setxattr(file, "user.xs.perms", text.encode())
        assert ",".join(witness.get_perms(path)) == text.replace(" ", ",")
    for bad in (b"", b"x0", b"n", b"n0,,q1", b"r--1", b"n0;r1", b"n99999999999", b"\xff"):
        with fails(errno.EINVAL):
            os.setxattr(file, "user.xs.perms", bad)
    assert ",".join(witness.get_perms(path)) == f"b{me}"
    for name in ("user.xs.path", "user.xs.value"):
        with fails(errno.EPERM):
            os.removexattr(file, name)
    with fails(errno.ENODATA):
        os.removexattr(file, "user.other")
    with fails(errno.EPERM):
        os.setxattr(file, "user.xs.path", b"/elsewhere")
    with fails(errno.ENODATA):
        os.getxattr(file, "user.other")
    with fails(errno.EOPNOTSUPP):
        os.setxattr(file, "user.other", b"1")
    with fails(errno.EFBIG):
        os.setxattr(file, "user.xs.value", b"v" * 4096)
    with fails(errno.E2BIG):
        os.setxattr(file, "user.xs.perms", b"n0," * 10000)
    os.setxattr(box, "user.xs.perms", f"b{me},r{me + 1}".encode())
    for _ in range(2):
        os.removexattr(file, "user.xs.perms")
        assert ",".join(witness.get_perms(path)) == f"b{me},r{me + 1}", "those of its parent"
    os.setxattr(box, "user.xs.value", b"of the directory")
    assert witness.read(node(place, box)) == b"of the directory"
    if me:
        # Only dom0 gives nodes away.
        with pytest.raises(PermissionError):
            os.setxattr(file, "user.xs.perms", b"n0")


def test_statfs(place: Place, mount: Mount) -> None:
    assert os.statvfs(mount.path).f_namemax == 255
    assert mount.bash("df --output=source,target . | tail -n 1").split() == [
        *(place.socket, str(mount.path)),
    ]


# ----------------------------------------------------------------------------------------- quotas


@pytest.mark.quick_if(place=["ocaml-guest"])
def test_a_full_quota_is_a_clear_error(place: Place, mount: Mount, box: Path) -> None:
    if not place.guest:
        # Dom0 has no quota of nodes; what it has is the size of a message.
        for number in range(1100):
            os.mknod(box / f"n{number}")
        return
    made, refused = 0, 0
    try:
        for directory in range(40):
            (box / f"d{directory}").mkdir()
            for number in range(50):
                (box / f"d{directory}" / f"n{number}").write_text("1\n")
                made += 1
    except OSError as error:
        refused = error.errno or 0
    assert refused == (errno.ENOSPC if place.kind == "C" else errno.EDQUOT)
    assert made > 200
    # Nothing is lost, and the mount is alive.
    assert (box / "d0" / "n0").read_text() == "1\n"
    mount.bash(f"rm -r {box}/d*")
    (box / "again").write_text("1\n")


# ------------------------------------------------------------------------------ large directories


def fill(client: XsClient, top: str, names: list[str]) -> None:
    replies = client.pipeline([("WRITE", strings(f"{top}/{name}") + b"v") for name in names])
    assert not any(isinstance(reply, XsError) for reply in replies)


def test_sizes_are_those_of_the_moment_whatever_a_listing_knew(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """A listing does not ask for the values, and a size of 0 from it would be believed by tar."""
    names = [f"n{number}" for number in range(20)]
    fill(witness, node(place, box), names)
    descriptor = os.open(box / "n0", os.O_RDWR | os.O_APPEND)
    try:
        with os.scandir(box) as entries:
            assert {entry.name: entry.stat().st_size for entry in entries} == dict.fromkeys(
                names, 2
            )
        os.listdir(box)
        assert os.fstat(descriptor).st_size == 2
        os.listdir(box)
        assert os.lseek(descriptor, 0, os.SEEK_END) == 2
        os.listdir(box)
        os.write(descriptor, b"w")
    finally:
        os.close(descriptor)
    assert witness.read(f"{node(place, box)}/n0") == b"v\nw"


@pytest.mark.quick_if(place=["C"])
def test_a_directory_of_5000_children(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    names = [f"child-{number}" for number in range(5000)]
    if not place.guest:
        fill(witness, node(place, box), names)
        assert sorted(os.listdir(box)) == sorted(names)
        assert mount.bash(f"ls -l {box} | wc -l") == "5001\n"
        mount.bash(f"rm {box}/child-1*")
        assert sorted(os.listdir(box)) == sorted(n for n in names if not n.startswith("child-1"))
        return
    # A guest may not make so many; dom0 makes them for it.
    with place.dom0() as dom0:
        dom0.mkdir(f"{node(place, box)}/big")
        dom0.set_perms(f"{node(place, box)}/big", ["n0", f"b{place.domid}"])
        fill(dom0, f"{node(place, box)}/big", names)
        if place.kind == "C":
            assert sorted(os.listdir(box / "big")) == sorted(names)
        else:
            # oxenstored has no way to list so many to a guest: the names still open.
            with fails(errno.E2BIG):
                os.listdir(box / "big")
        assert (box / "big" / "child-4999").read_text() == "v\n"
        dom0.rm(f"{node(place, box)}/big")


def test_a_listing_while_children_come_and_go(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    kept = [f"kept-{number}" for number in range(300 if not place.guest else 60)]
    fill(witness, node(place, box), kept)
    stop = threading.Event()

    def churn() -> None:
        with place.witness() as client:
            while not stop.is_set():
                fill(client, node(place, box), [f"passing-{n}" for n in range(20)])
                client.pipeline(
                    [("RM", strings(f"{node(place, box)}/passing-{n}")) for n in range(20)]
                )

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            listed = os.listdir(box)
            assert len(listed) == len(set(listed))
            assert set(kept) <= set(listed)
            for entry in os.scandir(box):
                assert entry.is_file()
    finally:
        stop.set()
        thread.join(LIMIT)


def test_a_listing_is_of_the_moment_whatever_was_listed_before(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """The children that a directory had when its parent was listed are only a hint."""
    top = f"{node(place, box)}/d"

    def replace() -> None:
        witness.rm(f"{top}/b")
        witness.write(f"{top}/b/c", b"")

    changes: list[Callable[[], None]] = [
        lambda: witness.write(f"{top}/new", b"1"),
        lambda: witness.rm(f"{top}/a"),
        replace,
        lambda: witness.write(top, b"a value"),
        lambda: None,
    ]
    for change in changes:
        witness.rm(top)
        for name in ("a", "b"):
            witness.write(f"{top}/{name}", b"1")
        os.listdir(box)
        change()
        expected = set(witness.ls(top)) | ({".value"} if witness.read(top) else set())
        with os.scandir(box / "d") as entries:
            found = {entry.name: entry.is_dir() for entry in entries}
        assert set(found) == expected
        assert found.get("b", False) is bool(witness.ls(f"{top}/b"))


def test_a_listing_can_be_sought_in(mount: Mount, box: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    for function in (libc.telldir, libc.readdir, libc.seekdir, libc.closedir):
        function.argtypes = [ctypes.c_void_p]
    libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
    libc.telldir.restype = ctypes.c_long
    libc.readdir.restype = ctypes.c_void_p
    (box / "d").mkdir()
    (box / "d" / ".value").write_text("v\n")
    for number in range(150):
        os.mknod(box / "d" / f"n{number}")
    stream = libc.opendir(bytes(box / "d"))
    begin = libc.telldir(stream)
    first = 0
    while libc.readdir(stream):
        first += 1
    libc.seekdir(stream, begin)
    second = 0
    while libc.readdir(stream):
        second += 1
    libc.closedir(stream)
    assert first == second == 2 + 1 + 150


def test_many_open_files(mount: Mount, box: Path) -> None:
    (box / "f").write_text("1\n")
    opened = [os.open(box / "f", os.O_RDONLY) for _ in range(500)]
    assert {os.read(file, 100) for file in opened} == {b"1\n"}
    for file in opened:
        os.close(file)
    assert subprocess.run(["cat", box / "f"], capture_output=True, check=True).stdout == b"1\n"
