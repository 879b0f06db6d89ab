"""Ring: every end that a mount can come to, with files, watches and transactions open.

A guest's quotas show what the daemon still keeps: both daemons count a guest's watches and transactions,
and no longer count one that has ended.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.lying_store import LyingStore, on, silence
from tests.support.mounting import LIMIT, Mount, Place, each_place, mounted, open_place
from tests.support.transaction_dirs import open_at_once, until
from tests.support.xenstored.harness import XsClient, XsError
from xsfs.xenstore.protocol import Op

CONNECTIONS = Path("/sys/fs/fuse/connections")

WATCHES = 60
"""More than half of the quota of either daemon for a guest."""

TRANSACTIONS = 6


place = each_place("C-guest", "ocaml-guest", quick=("ocaml-guest",))


def watches_at_once(witness: XsClient) -> int:
    """How many watches a guest can set now, by the daemon's own count."""
    tokens = 0
    try:
        while True:
            witness.watch("data", f"t{tokens}")
            tokens += 1
    except XsError as error:
        full = error.name
    assert full in ("E2BIG", "EQUOTA")
    for number in range(tokens):
        witness.unwatch("data", f"t{number}")
    witness.events.clear()
    return tokens


@dataclass
class Open:
    """The files of a mount that this process has open."""

    path: Path
    files: list[int] = field(default_factory=list)

    def fill(self) -> None:
        self.files.append(os.open(self.path / "name", os.O_RDONLY))
        watch = os.open(self.path / ".watch", os.O_RDWR | os.O_NONBLOCK)
        self.files.append(watch)
        for number in range(WATCHES):
            line = f"data/w{number}\n".encode()
            assert os.write(watch, line) == len(line)
        for number in range(TRANSACTIONS):
            inside = self.path / ".transaction" / f"t{number}"
            inside.mkdir()
            (inside / "data" / f"never{number}").write_text("1\n")
            self.files.append(os.open(inside / "data", os.O_RDONLY))

    def close(self) -> None:
        for file in self.files:
            with suppress(OSError):
                os.close(file)
        self.files.clear()


@dataclass
class Quotas:
    """How many watches and transactions the daemon allows the guest."""

    witness: XsClient
    watches: int = 0
    transactions: int = 0

    def __post_init__(self) -> None:
        self.watches = watches_at_once(self.witness)
        self.transactions = open_at_once(self.witness)

    def check_in_use(self) -> None:
        assert watches_at_once(self.witness) <= self.watches - WATCHES
        assert open_at_once(self.witness) <= self.transactions - TRANSACTIONS

    def check_free(self) -> None:
        until(lambda: watches_at_once(self.witness) == self.watches)
        until(lambda: open_at_once(self.witness) == self.transactions)


def unmount(*options: str) -> Callable[[Mount], None]:
    def end(mount: Mount) -> None:
        subprocess.run(["umount", *options, mount.path], check=True, timeout=LIMIT)

    return end


def fusermount(mount: Mount) -> None:
    subprocess.run(["fusermount3", "-uz", mount.path], check=True, timeout=LIMIT)


def by(number: signal.Signals) -> Callable[[Mount], None]:
    def end(mount: Mount) -> None:
        mount.process.send_signal(number)
        mount.process.wait(LIMIT)
        if number == signal.SIGKILL:
            assert (
                os.path.ismount(mount.path) or mount.path.name in Path("/proc/mounts").read_text()
            )
            # One command, whatever is still open.
            unmount("-l")(mount)

    return end


ENDS: dict[str, Callable[[Mount], None]] = {
    "SIGTERM": by(signal.SIGTERM),
    "SIGINT": by(signal.SIGINT),
    "SIGHUP": by(signal.SIGHUP),
    "SIGKILL": by(signal.SIGKILL),
    "umount": unmount(),
    "umount -l": unmount("-l"),
    "fusermount3 -uz": fusermount,
}


@pytest.mark.parametrize("how", ENDS)
def test_nothing_is_left(place: Place, tmp_path: Path, how: str) -> None:
    with place.witness() as witness:
        quotas = Quotas(witness)
        mount = Mount([place.socket], tmp_path / "m")
        opened = Open(mount.path)
        try:
            mount.wait_mounted()
            opened.fill()
            quotas.check_in_use()
            if how == "umount":
                # Busy, as any file system is that has open files; it goes on.
                with pytest.raises(subprocess.CalledProcessError):
                    unmount()(mount)
                assert (mount.path / "name").read_text()
                opened.close()
                for number in range(TRANSACTIONS):
                    (mount.path / ".transaction" / f"t{number}").rmdir()
            ENDS[how](mount)
            assert not os.path.ismount(mount.path)
            assert os.listdir(mount.path) == []
            if how in ("umount -l", "fusermount3 -uz"):
                # A process that has one of its files open can go on.  The mount ends with the last one.
                assert os.pread(opened.files[0], 100, 0)
                opened.close()
            status = mount.process.wait(LIMIT)
            assert status == (-signal.SIGKILL if how == "SIGKILL" else 0)
            assert "Traceback" not in mount.stderr
            quotas.check_free()
            assert not [name for name in witness.ls("data") if name.startswith("never")]
            # At the same place, also while files of the old one are still open.
            with mounted([place.socket], mount.path) as again:
                assert (again.path / "name").read_text()
        finally:
            opened.close()
            mount.clear()


@pytest.mark.parametrize("foreground", [True, False])
def test_the_user_who_mounted_logs_out(place: Place, tmp_path: Path, foreground: bool) -> None:
    """The terminal hangs up.  A mount in the foreground ends with it; one in the background has let
    go of the terminal, and one command ends it."""
    path = tmp_path / "m"
    path.mkdir()
    with place.witness() as witness:
        quotas = Quotas(witness)
        opened = Open(path)
        child, terminal = pty.fork()
        if not child:
            flags = ["-f"] if foreground else []
            script = f'"$@"; {"" if foreground else "cat"}'
            command = [sys.executable, "-m", "xsfs", *flags, place.socket, str(path)]
            os.execvp("bash", ["bash", "-c", script, "bash", *command])
        try:
            until(lambda: os.path.ismount(path))
            opened.fill()
            quotas.check_in_use()
            os.close(terminal)
            os.waitpid(child, 0)
            if foreground:
                until(lambda: not os.path.ismount(path))
            else:
                assert (path / "name").read_text()
                opened.close()
                subprocess.run(["umount", "-l", path], check=True, timeout=LIMIT)
            quotas.check_free()
            with mounted([place.socket], path) as again:
                assert (again.path / "name").read_text()
        finally:
            opened.close()
            subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL, check=False)


def test_the_end_does_not_wait_for_a_daemon_that_stands_still(tmp_path: Path) -> None:
    for name in ("C", "ocaml"):
        directory = tmp_path / name
        directory.mkdir()
        with open_place(name, directory) as place:
            assert place.daemon is not None
            mount = Mount([place.socket], directory / "m")
            opened = Open(mount.path)
            try:
                mount.wait_mounted()
                opened.fill()
                place.daemon.pause()
                start = time.monotonic()
                assert mount.end(signal.SIGTERM) == 0
                assert time.monotonic() - start < LIMIT / 2
                assert os.listdir(mount.path) == []
            finally:
                place.daemon.resume()
                opened.close()
                mount.clear()


def test_a_copy_in_another_mount_namespace_goes_on(place: Place, tmp_path: Path) -> None:
    mount = Mount([place.socket], tmp_path / "m")
    try:
        mount.wait_mounted()
        script = 'echo; read x; cat "$0"/name'
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", script, mount.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as elsewhere:
            assert elsewhere.stdout is not None
            assert elsewhere.stdout.readline() == b"\n"
            unmount()(mount)
            assert os.listdir(mount.path) == []
            with mounted([place.socket], mount.path) as again:
                assert (again.path / "name").read_text()
                name, _ = elsewhere.communicate(b"\n", LIMIT)
                assert name
        assert mount.process.wait(LIMIT) == 0
        assert "Traceback" not in mount.stderr
    finally:
        mount.clear()


@pytest.mark.quick_if(name=["ocaml"])
@pytest.mark.parametrize("how", ["commit", "rollback", "rmdir", "idle"])
@pytest.mark.parametrize("name", ["C", "ocaml"])
def test_killed_while_one_transaction_begins_and_another_ends(
    tmp_path: Path, name: str, how: str
) -> None:
    """mkdir(2) holds the directory until it is answered.  Whatever xsfs tells the kernel of the end of
    another transaction must not wait for that: a thread of xsfs that waits in the kernel keeps the
    killed process from letting go, and so the one who made the directory waits for ever."""
    if not os.path.ismount(CONNECTIONS):  # systemd mounts it, and a container may have none
        subprocess.run(["mount", "-t", "fusectl", "fusectl", CONNECTIONS], check=True)
    with (
        open_place(name, tmp_path) as place,
        LyingStore(tmp_path / "liar.sock", place.socket) as liar,
    ):
        idle = 3 if how == "idle" else 60
        mount = Mount(["-o", f"timeout={LIMIT},tx_timeout={idle}", liar.path], tmp_path / "m")
        transactions = mount.path / ".transaction"
        connection = Path()
        identity = 0
        programs: list[subprocess.Popen[bytes]] = []

        def is_left() -> bool:
            # Another mount may have the number by now.
            with suppress(FileNotFoundError):
                return connection.stat().st_ino == identity
            return False

        def start(program: str, name: str) -> None:
            command: list[str | Path] = [program, transactions / name]
            programs.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

        try:
            mount.wait_mounted()
            connection = CONNECTIONS / str(os.minor(mount.path.stat().st_dev))
            identity = connection.stat().st_ino
            (transactions / "ends").mkdir()
            control = os.open(transactions / "ends" / ".control", os.O_WRONLY)
            inside = os.open(transactions / "ends" / "data", os.O_RDONLY)
            liar.lie = on(Op.TRANSACTION_START, silence)
            connections = liar.connections
            start("mkdir", "begins")
            until(lambda: liar.connections > connections)
            if how == "idle":
                until(lambda: "rolled back transaction" in mount.stderr)
            elif how == "rmdir":
                start("rmdir", "ends")
            else:
                os.write(control, how.encode())
            mount.process.kill()
            assert [program.wait(LIMIT) for program in programs] == [1] * len(programs)
            assert mount.process.wait(LIMIT) == -signal.SIGKILL
            os.close(control)
            os.close(inside)
            subprocess.run(["umount", "-l", mount.path], check=True, timeout=LIMIT)
            assert not is_left()
            with mounted([place.socket], mount.path) as again:
                assert os.listdir(again.path / ".transaction") == []
        finally:
            if is_left():
                # Otherwise the mount would stay until the machine is restarted.
                with suppress(OSError):
                    (connection / "abort").write_text("1")
            mount.clear()


def test_the_end_while_the_home_is_not_watched_yet(tmp_path: Path) -> None:
    """A guest's mount watches its domid.  The wait for that ends before its store does."""
    with (
        open_place("C-guest", tmp_path) as place,
        LyingStore(tmp_path / "liar.sock", place.socket) as liar,
    ):
        liar.lie = on(Op.WATCH, silence)
        with mounted([liar.path], tmp_path / "m") as mount:
            assert (mount.path / ".domid").read_text() == f"{place.domid}\n"
