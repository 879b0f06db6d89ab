"""Ring: the command as a user starts it: options, background, exit statuses, ends."""

from __future__ import annotations

import grp
import os
import pwd
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.commands import let_others_reach, process_at, refused, wait_for_end, xsfs
from tests.support.mounting import GUEST, LIMIT, Mount, mounted
from tests.support.xenstored.harness import RealXenstored, XsClient


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C", guests=(GUEST,)) as daemon:
        daemon.populate()
        yield daemon


# ------------------------------------------------------------------------------------- mounting


def test_it_returns_when_the_tree_answers(daemon: RealXenstored, mountpoint: Path) -> None:
    done = xsfs(daemon.socket, mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (mountpoint / "name").read_text() == "Domain-0\n"
    process = process_at(mountpoint)
    assert os.readlink(f"/proc/{process}/cwd") == "/"
    assert {os.readlink(f"/proc/{process}/fd/{n}") for n in range(3)} == {"/dev/null"}
    mounts = Path("/proc/self/mountinfo").read_text()
    (line,) = [line for line in mounts.splitlines() if f" {mountpoint} " in line]
    assert f" - fuse.xsfs {daemon.socket} " in line
    assert {"nosuid", "nodev", "noexec"} <= set(line.split(" ")[5].split(","))
    subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
    wait_for_end(process)
    assert os.listdir(mountpoint) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly(
    daemon: RealXenstored, mountpoint: Path, number: signal.Signals
) -> None:
    mount = Mount([daemon.socket], mountpoint)
    mount.wait_mounted()
    # Also with a file open, and with one that is still to be emptied.
    opened = os.open(mountpoint / "domid", os.O_RDONLY)
    emptied = os.open(mountpoint / "data" / "due", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    assert mount.end(number) == 0
    assert not os.path.ismount(mountpoint)
    with pytest.raises(OSError, match="not connected"):
        os.read(opened, 10)
    for file in (opened, emptied):
        with suppress(OSError):
            os.close(file)
    assert "Traceback" not in mount.stderr
    with XsClient(daemon.socket) as client:
        assert client.read("/local/domain/0/data/due") == b""
        client.rm("/local/domain/0/data/due")
    with mounted([daemon.socket], mountpoint):
        assert (mountpoint / "domid").read_text() == "0\n"


def test_fusermount_ends_it(daemon: RealXenstored, mountpoint: Path) -> None:
    mount = Mount([daemon.socket], mountpoint)
    mount.wait_mounted()
    subprocess.run(["fusermount3", "-u", mountpoint], check=True, timeout=LIMIT)
    assert mount.process.wait(LIMIT) == 0


def test_killed_and_mounted_again(daemon: RealXenstored, mountpoint: Path) -> None:
    mount = Mount([daemon.socket], mountpoint)
    mount.wait_mounted()
    mount.process.kill()
    mount.process.wait(LIMIT)
    refused(xsfs(daemon.socket, mountpoint), 5, "umount")
    subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
    with mounted([daemon.socket], mountpoint):
        assert (mountpoint / "domid").read_text() == "0\n"


def test_unmounted_while_files_are_being_closed(daemon: RealXenstored, mountpoint: Path) -> None:
    """The kernel then says ECONNABORTED, and drops the RELEASEs that are still in its queue."""
    with mounted([daemon.socket], mountpoint):
        data = mountpoint / "data"
        opened = [os.open(data / "f", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(500)]
        opened += [os.open(data / "e", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for _ in range(500)]
        for file in opened:
            os.close(file)
    with XsClient(daemon.socket) as client:
        for name in ("f", "e"):
            assert client.read(f"/local/domain/0/data/{name}") == b""
            client.rm(f"/local/domain/0/data/{name}")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_files_may_be_closed(daemon: RealXenstored, mountpoint: Path, closed: str) -> None:
    command = f'"{sys.executable}" -m xsfs {daemon.socket} {mountpoint} {closed}'
    subprocess.run(["bash", "-c", command], check=True, timeout=LIMIT)
    assert (mountpoint / "name").read_text() == "Domain-0\n"
    process = process_at(mountpoint)
    subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
    wait_for_end(process)


def test_relative_paths(daemon: RealXenstored, mountpoint: Path, tmp_path: Path) -> None:
    os.symlink(daemon.socket, tmp_path / "relative.sock")
    command = [sys.executable, "-m", "xsfs", "relative.sock", mountpoint.name]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=LIMIT)
    process = process_at(Path(mountpoint.name))
    # A rename has a connection of its own, made later, from another working directory.
    (mountpoint / "data" / "a").write_text("1\n")
    (mountpoint / "data" / "a").rename(mountpoint / "data" / "b")
    (mountpoint / "data" / "b").unlink()
    subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
    wait_for_end(process)


def test_mounting_twice_at_a_name_of_any_letters(daemon: RealXenstored, tmp_path: Path) -> None:
    path = tmp_path / "é \\ x"
    with mounted([daemon.socket], path):
        refused(xsfs(daemon.socket, path), 5, "already an xsfs mount")


def test_listening_where_one_cannot(mountpoint: Path, tmp_path: Path) -> None:
    refused(xsfs("-o", f"listen={tmp_path}/none/s", "embedded", mountpoint), 3, "cannot listen")
    (tmp_path / "file").write_text("")
    refused(xsfs("-o", f"listen={tmp_path}/file", "embedded", mountpoint), 3, "cannot listen")


def test_a_domain_that_cannot_tell_its_number(mountpoint: Path) -> None:
    with RealXenstored("C", guests=(GUEST,)) as other:
        other.populate()
        with other.client() as client:
            client.set_perms(f"/local/domain/{GUEST}/domid", ["n0"])
        refused(xsfs(other.guest_socket(GUEST), mountpoint), 4, "which domain")
        with other.client() as client:
            client.set_perms(f"/local/domain/{GUEST}/domid", ["n0", f"r{GUEST}"])
            client.write(f"/local/domain/{GUEST}/domid", b"seven")
        refused(xsfs(other.guest_socket(GUEST), mountpoint), 4, "its domid is not a number")


@pytest.mark.parametrize("source", [(), ("xenstore",), ("none",), ("auto",)])
def test_the_store_is_found(
    daemon: RealXenstored,
    mountpoint: Path,
    source: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in (
        ("XENSTORED_PATH", daemon.socket),
        ("XENSTORED_RUNDIR", os.path.dirname(daemon.socket)),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with mounted(source, mountpoint) as mount:
                assert mount.bash("cat name") == "Domain-0\n"


def test_as_mount_calls_it(daemon: RealXenstored, mountpoint: Path) -> None:
    """mount.fuse3 runs `TYPE SOURCE MOUNTPOINT -o ...`, with all that fstab and systemd add."""
    options = "rw,nosuid,nodev,noexec,relatime,_netdev,nofail,noauto,user,x-systemd.automount,"
    options += "x-systemd.after=xenstored.service,comment=hello,defaults,dev,suid"
    done = xsfs(daemon.socket, mountpoint, "-o", options, "-o", "root=/,raw")
    assert done.returncode == 0, done.stderr
    assert (mountpoint / "local/domain/0/name").read_bytes() == b"Domain-0"
    process = process_at(mountpoint)
    subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
    wait_for_end(process)


# -------------------------------------------------------------------------------------- options


def test_option_root(daemon: RealXenstored, mountpoint: Path) -> None:
    with mounted(["-o", f"root=/local/domain/{GUEST}", daemon.socket], mountpoint) as mount:
        assert mount.bash("cat domid .domid") == f"{GUEST}\n0\n"
        assert mount.bash("cat .root/local/domain/0/name") == "Domain-0\n"
    with mounted(["-o", "root=/not/there", daemon.socket], mountpoint) as mount:
        assert os.listdir(mountpoint) == []
        assert mount.bash("mkdir x; echo 1 > y; ls") == "x\ny\n"
        with XsClient(daemon.socket) as client:
            client.rm("/not")


def test_option_raw(daemon: RealXenstored, mountpoint: Path) -> None:
    with mounted(["-o", "raw", daemon.socket], mountpoint) as mount:
        assert (mountpoint / "name").read_bytes() == b"Domain-0"
        mount.bash("echo 42 > data/raw; printf '\\n' >> data/raw")
        with XsClient(daemon.socket) as client:
            assert client.read("/local/domain/0/data/raw") == b"42\n\n"
        assert (mountpoint / "data" / "raw").stat().st_size == 4


def test_option_ro(daemon: RealXenstored, mountpoint: Path) -> None:
    with mounted(["-o", "ro,rw", daemon.socket], mountpoint) as mount:
        mount.bash("echo 1 > data/x; rm data/x")
    with mounted(["-o", "ro", daemon.socket], mountpoint):
        assert (mountpoint / "name").read_text() == "Domain-0\n"
        for attempt in (
            lambda: (mountpoint / "name").write_text("1"),
            lambda: (mountpoint / "d").mkdir(),
            lambda: (mountpoint / "name").unlink(),
            lambda: os.setxattr(mountpoint / "name", "user.xs.perms", b"b0"),
        ):
            with pytest.raises(OSError, match="Read-only file system"):
                attempt()


def test_options_of_ownership(daemon: RealXenstored, mountpoint: Path) -> None:
    let_others_reach(mountpoint)
    options = "uid=1234,gid=5678,umask=027,allow_other"
    with mounted(["-o", options, daemon.socket], mountpoint):
        found = (mountpoint / "name").stat()
        assert (found.st_uid, found.st_gid) == (1234, 5678)
        assert stat.filemode(found.st_mode) == "-rw-r-----"
        assert stat.filemode(mountpoint.stat().st_mode) == "drwxr-x---"
        # The kernel enforces them: the group may read, others may not even enter.
        read = ["cat", str(mountpoint / "name")]
        for user, group, allowed in ((1234, 1, True), (99, 5678, True), (99, 99, False)):
            done = subprocess.run(
                ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *read],
                capture_output=True,
                timeout=LIMIT,
                check=False,
            )
            assert (done.returncode == 0) is allowed, done.stderr


def test_owners_by_name(mountpoint: Path) -> None:
    with mounted(["-o", "uid=daemon,gid=adm", "embedded"], mountpoint):
        found = (mountpoint / "name").stat()
    assert found.st_uid == pwd.getpwnam("daemon").pw_uid
    assert found.st_gid == grp.getgrnam("adm").gr_gid


def test_without_allow_other_nobody_else_gets_in(daemon: RealXenstored, mountpoint: Path) -> None:
    let_others_reach(mountpoint)
    with mounted(["-o", "umask=000", daemon.socket], mountpoint):
        done = subprocess.run(
            ["setpriv", "--reuid=99", "--regid=99", "--clear-groups", "ls", str(mountpoint)],
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode != 0
        assert b"Permission denied" in done.stderr


def test_debug_logs_each_operation(daemon: RealXenstored, mountpoint: Path) -> None:
    with mounted(["-d", daemon.socket], mountpoint) as mount:
        mount.bash("cat name; cat nothing || true; echo 1 > data/x")
        mount.bash("head -c 1 data/.watch; mkdir .transaction/t1; cat .transaction/t1/data/x")
        mount.bash("rmdir .transaction/t1; rm data/x; echo v > data/.value; rm -r data")
        log = mount.stderr
    assert "lookup /local/domain/0 'name': ok" in log
    assert "lookup /local/domain/0 'nothing': ENOENT" in log
    assert "write /local/domain/0/data/x 0 2 bytes: ok" in log
    # What is not Xenstore's, and in which transaction.
    assert "read /local/domain/0/data/.watch 0" in log
    assert "write /local/domain/0/data/.value 0 2 bytes: ok" in log
    assert "mkdir /local/domain/0/.transaction 't1'" in log
    assert "read t1:/local/domain/0/data/x 0" in log
    for line in log.splitlines():
        assert re.fullmatch(r"xsfs: [a-z]+( .+)?: (ok|E[A-Z0-9]+), \d+ us", line), line


def test_a_signal_shows_the_tasks(daemon: RealXenstored, mountpoint: Path) -> None:
    with mounted([daemon.socket], mountpoint) as mount:
        mount.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + LIMIT
        while "Watches.run" not in mount.stderr:
            assert time.monotonic() < deadline, mount.stderr
            time.sleep(0.01)
        lines = mount.stderr.splitlines()
        assert lines[0] == "xsfs: all tasks:"
        assert all(line.startswith("xsfs: ") for line in lines)
        assert any(re.search(r"/mount\.py:\d+ _serve$", line) for line in lines)
        assert mount.bash("cat name") == "Domain-0\n"


def test_embedded(tmp_path: Path, mountpoint: Path) -> None:
    socket = tmp_path / "store.sock"
    with mounted(["-o", f"listen={socket}", "embedded"], mountpoint) as mount:
        assert mount.bash("cat name domid; echo 42 > data/x; cat data/x") == "Domain-0\n0\n42\n"
        tools = {"XENSTORED_PATH": str(socket)}
        assert mount.bash("xenstore-read data/x", **tools) == "42\n"
        mount.bash("xenstore-write data/y 43", **tools)
        assert mount.bash("cat data/y") == "43\n"
        assert "Domain-0" in mount.bash("xenstore-ls /local", **tools)
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert not socket.exists()


def test_embedded_as_a_guest(mountpoint: Path) -> None:
    with mounted(["-o", "domid=5", "embedded"], mountpoint) as mount:
        assert mount.bash("cat .domid domid; echo 1 > data/x; cat data/x") == "5\n5\n1\n"
        assert "Permission denied" in mount.run("echo 1 > name").stderr
        assert "Permission denied" in mount.run("ls .root/local/domain").stderr
