"""Ring: mounts of another host's Xenstore, by a real sshd on loopback."""

from __future__ import annotations

import errno
import os
import pty
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.commands import let_others_reach, process_at, refused, wait_for_end, xsfs
from tests.support.documents import check_dialogue
from tests.support.host import Host, open_host
from tests.support.lying_store import Gate, LyingStore, honest, on
from tests.support.mirroring import await_true, scratch
from tests.support.mounting import LIMIT, Mount, mounted, refusal
from tests.support.programs import program
from tests.support.sshd import Sshd, descendants, reachable, running_sshd
from tests.support.xenstored.harness import RealXenstored, XsClient
from xsfs.cli.exit_statuses import EXIT_INTERRUPTED, EXIT_NO_STORE
from xsfs.xenstore.protocol import Op

GUEST = 7
NOBODY = 65534

LONG_WAY = 0.1
"""Seconds of a round trip."""

SLOWER = 5
"""How many times longer a value may take over loopback than by the socket."""


@pytest.fixture(scope="module", params=["C", "ocaml"])
def each_daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param, guests=(GUEST,)) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C", guests=(GUEST,)) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def witness(daemon: RealXenstored) -> Iterator[XsClient]:
    with daemon.client() as client:
        yield client


def arguments(server: Sshd, path: str, *options: str, command: str | None = None) -> list[str]:
    """The arguments of xsfs before the mountpoint."""
    ssh = (command or server.command()).replace(",", "\\,")
    return ["-o", ",".join((f"ssh_command={ssh}", *options)), f"{server.account}:{path}"]


def ssh_of(process: int) -> int:
    """The one ssh that this process runs."""
    (found,) = (
        pid for pid in descendants(process) if Path(f"/proc/{pid}/comm").read_text() == "ssh\n"
    )
    return found


def without_terminal(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """xsfs, to its end.  It must not ask at the terminal of the tests."""
    return subprocess.run(
        [sys.executable, "-m", "xsfs", *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        start_new_session=True,
    )


def directories_of_ssh() -> list[str]:
    return [name for name in os.listdir("/run/xsfs") if name.startswith(".xsfs-ssh-")]


# ------------------------------------------------------------------------------------- the mount


def test_the_tree(each_daemon: RealXenstored, server: Sshd, tmp_path: Path) -> None:
    with mounted(arguments(server, each_daemon.socket), tmp_path / "m") as mount:
        ssh = ssh_of(mount.process.pid)
        assert mount.bash("cat name .domid") == "Domain-0\n0\n"
        assert mount.bash(f"cat .root/local/domain/{GUEST}/name") == f"guest-{GUEST}\n"
        assert mount.bash("mkdir data/ssh && echo 42 > data/ssh/x && cat data/ssh/x") == "42\n"
        assert "n0" in mount.bash("getfattr --only-values -n user.xs.perms data/ssh/x")
        with program("stdbuf", "-oL", "cat", mount.path / "data/ssh/.watch") as watch:
            assert watch.lines.next() == "."
            mount.bash("mkdir .transaction/t && echo 43 > .transaction/t/data/ssh/x")
            mount.bash("echo commit > .transaction/t/.control")
            assert watch.lines.next() == "x"
        assert mount.bash("cat data/ssh/x; rm -r data/ssh") == "43\n"
        source = subprocess.check_output(
            ["findmnt", "-n", "-o", "SOURCE", mount.path], text=True, timeout=LIMIT
        )
        assert source.strip() == f"{server.account}:{each_daemon.socket}"
    assert not Path(f"/proc/{ssh}").exists()
    assert directories_of_ssh() == []


@pytest.mark.slow
def test_a_value_takes_a_few_times_what_the_socket_takes(
    daemon: RealXenstored, server: Sshd, tmp_path: Path
) -> None:
    """In turn, so that a busy machine is busy for both."""
    near: list[float] = []
    far: list[float] = []
    with (
        mounted([daemon.socket], tmp_path / "near") as local,
        mounted(arguments(server, daemon.socket), tmp_path / "far") as remote,
    ):
        for _ in range(300):
            for mount, times in (local, near), (remote, far):
                start = time.perf_counter()
                (mount.path / "name").read_bytes()
                times.append(time.perf_counter() - start)
    assert statistics.median(far) <= SLOWER * statistics.median(near)


def test_a_value_over_a_long_way_takes_one_round_trip(
    daemon: RealXenstored, server: Sshd, tmp_path: Path
) -> None:
    options = arguments(server, daemon.socket, command=server.command(*server.delayed(LONG_WAY)))
    times = []
    with mounted(options, tmp_path / "m") as mount:
        for _ in range(50):
            start = time.perf_counter()
            (mount.path / "name").read_bytes()
            times.append(time.perf_counter() - start)
            if times[-1] < 2 * LONG_WAY:  # a busy machine only adds to it
                break
    # A second round trip would double it.
    assert LONG_WAY <= min(times) < 2 * LONG_WAY


def test_two_mounts_of_one_host(
    daemon: RealXenstored, server: Sshd, witness: XsClient, tmp_path: Path
) -> None:
    """Each has its own ssh: the end of one is nothing to the other."""
    with mounted(arguments(server, daemon.socket), tmp_path / "one") as one:
        with mounted(arguments(server, daemon.socket, "root=/"), tmp_path / "two") as two:
            assert ssh_of(one.process.pid) != ssh_of(two.process.pid)
            assert len(directories_of_ssh()) == 2
            assert two.bash("cat local/domain/0/name") == "Domain-0\n"
        witness.write("/local/domain/0/data/two", "2")
        assert one.bash("cat data/two; rm data/two") == "2\n"


def test_the_mirror_and_a_watch_come_back(
    daemon: RealXenstored, server: Sshd, witness: XsClient, tmp_path: Path
) -> None:
    witness.write("/local/domain/0/data/m", "1")
    with scratch() as directory:
        options = arguments(server, daemon.socket, f"mirror={directory}/mirror")
        with mounted(options, tmp_path / "m") as mount:
            copy = mount.path / ".mirror/data/m"
            assert copy.read_text() == "1\n"
            with program("stdbuf", "-oL", "cat", mount.path / "data/.watch") as watch:
                assert watch.lines.next() == "."
                witness.write("/local/domain/0/data/m", "2")
                assert watch.lines.next() == "m"
                await_true(lambda: copy.read_text() == "2\n")
                os.kill(ssh_of(mount.process.pid), signal.SIGKILL)
                assert watch.lines.next() == "."
                witness.write("/local/domain/0/data/m", "3")

                def shown() -> bool:
                    try:
                        return copy.read_text() == "3\n"
                    except OSError:
                        return False  # while there is no connection

                await_true(shown)
                assert mount.counter("reconnects") > 0
        witness.rm("/local/domain/0/data/m")


def test_a_socket_with_odd_characters(daemon: RealXenstored, server: Sshd, tmp_path: Path) -> None:
    link = tmp_path / "a, b:%h\\${HOME}'\".sock"
    link.symlink_to(daemon.socket)
    with mounted(arguments(server, str(link)), tmp_path / "m") as mount:
        assert mount.bash("cat name") == "Domain-0\n"


def test_another_user(daemon: RealXenstored, server: Sshd, tmp_path: Path) -> None:
    """A user who is not root here, but may log in as root there."""
    let_others_reach(server.known_hosts)
    let_others_reach(tmp_path / "m")
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    key = tmp_path / "key"
    shutil.copy(server.key, key)
    server.known_hosts.chmod(0o644)
    mountpoint = tmp_path / "m"
    mountpoint.mkdir()
    for path in runtime, key, mountpoint:
        os.chown(path, NOBODY, NOBODY)
    command = [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *(sys.executable, "-m", "xsfs", "-f"),
        *arguments(server, daemon.socket, command=server.command(key=key)),
        str(mountpoint),
    ]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            # Nobody else can see what is at the mountpoint.
            mounted_there = ["findmnt", "-n", "-o", "TARGET", str(mountpoint)]
            await_true(
                lambda: process.poll() is not None or subprocess.run(mounted_there).returncode == 0
            )
            assert process.poll() is None, process.stderr and process.stderr.read()
            read = subprocess.check_output(
                [*command[:4], "cat", mountpoint / "name"], text=True, timeout=LIMIT
            )
            assert read == "Domain-0\n"
            assert len(list((runtime / "xsfs").iterdir())) == 1
            process.terminate()
            assert process.wait(LIMIT) == 0
            assert not list((runtime / "xsfs").iterdir())
        finally:
            process.kill()
            subprocess.run(["umount", "-l", mountpoint], stderr=subprocess.DEVNULL, check=False)


# -------------------------------------------------------------------------------------- the ends


def test_in_the_background(daemon: RealXenstored, server: Sshd, mountpoint: Path) -> None:
    done = xsfs(*arguments(server, daemon.socket), mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    process = process_at(mountpoint)
    ssh = ssh_of(process)
    # No terminal, no session and no pipe of the caller's.
    assert os.getsid(ssh) == ssh
    subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
    wait_for_end(process)
    assert not Path(f"/proc/{ssh}").exists()
    assert directories_of_ssh() == []


def test_a_killed_xsfs(daemon: RealXenstored, server: Sshd, tmp_path: Path) -> None:
    killed = Mount(arguments(server, daemon.socket), tmp_path / "killed")
    try:
        killed.wait_mounted()
        ssh = ssh_of(killed.process.pid)
        killed.process.kill()
        killed.process.wait(LIMIT)
        wait_for_end(ssh)
    finally:
        killed.clear()
    await_true(lambda: not server.sessions())
    assert len(directories_of_ssh()) == 1
    with mounted(arguments(server, daemon.socket), tmp_path / "m"):
        assert len(directories_of_ssh()) == 1
    assert directories_of_ssh() == []


@pytest.mark.quick_if(option=["PermitTTY yes"])
@pytest.mark.parametrize("option", ["PermitTTY yes", "ForceCommand /usr/sbin/nologin"])
def test_the_server_ends_its_sessions(option: str, daemon: RealXenstored, tmp_path: Path) -> None:
    with running_sshd(tmp_path / "sshd", option) as server:
        options = arguments(server, daemon.socket, "timeout=5")
        with mounted(options, tmp_path / "m") as mount:
            name = mount.path / "name"
            server.stop()
            assert refusal(name.read_text) == errno.EIO
            server.start()
            await_true(lambda: refusal(name.read_text) == 0)
            assert name.read_text() == "Domain-0\n"


def test_what_refuses(daemon: RealXenstored, server: Sshd, mountpoint: Path) -> None:
    def attempt(socket: str, command: str) -> subprocess.CompletedProcess[str]:
        return without_terminal(*arguments(server, socket, command=command), mountpoint)

    host = server.command("-o", "HostName=no-such-host.invalid")
    refused(attempt(daemon.socket, host), 3, "by ssh: Could not resolve hostname")
    key = server.command(key=server.other_key)
    refused(attempt(daemon.socket, key), 4, "Permission denied (")
    known = server.command(known_hosts=server.no_known_hosts)
    refused(attempt(daemon.socket, known), 3, "Host key verification failed.")
    refused(attempt("/no/socket", server.command()), 3, "no access to /no/socket of", "xenstored")
    refused(attempt(daemon.socket, "/no/ssh"), 3, "cannot run /no/ssh")
    refused(xsfs("-oProxyCommand=x:", "--", mountpoint), 2)
    refused(xsfs("host:socket", mountpoint), 2, "[USER@]HOST:[SOCKET]")
    refused(xsfs("-o", "ssh_command=ssh 'x", "host:", mountpoint), 2, "ssh_command")
    assert directories_of_ssh() == []


# ---------------------------------------------------------------------------------- the terminal


class Terminal:
    """A terminal in which xsfs runs in the foreground, as if a shell had started it."""

    def __init__(self, *command: str | Path) -> None:
        self.master, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *map(str, command)], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)

    def read(self) -> bool:
        """Whether it is still open."""
        readable, _, _ = select.select([self.master], [], [], LIMIT)
        assert readable, f"nothing comes: {self.text}"
        try:
            self.text += os.read(self.master, 4096).decode()
        except OSError:
            return False  # EIO: nobody has it open
        return True

    def read_until(self, words: str) -> None:
        while words not in self.text:
            assert self.read(), self.text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@contextmanager
def terminal(*command: str | Path) -> Iterator[Terminal]:
    running = Terminal(*command)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(LIMIT)
        os.close(running.master)


@pytest.fixture
def locked(server: Sshd, tmp_path: Path) -> Path:
    """A key that needs a passphrase."""
    path = tmp_path / "locked"
    shutil.copy(server.key, path)
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", path],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=LIMIT,
    )
    return path


def command_of(server: Sshd, daemon: RealXenstored, key: Path, *flags: str) -> list[str]:
    options = arguments(server, daemon.socket, command=server.command(key=key))
    return [sys.executable, "-m", "xsfs", *flags, *options]


def test_a_passphrase_is_asked_for_at_a_terminal(
    daemon: RealXenstored, server: Sshd, locked: Path, mountpoint: Path
) -> None:
    with terminal(*command_of(server, daemon, locked), mountpoint) as user:
        user.read_until("Enter passphrase for key")
        user.type("secret\n")
        assert user.process.wait(LIMIT) == 0
        process = process_at(mountpoint)
        ssh = ssh_of(process)
        while user.read():
            pass  # until nobody holds the terminal
        assert (mountpoint / "name").read_text() == "Domain-0\n"
        assert os.readlink(f"/proc/{ssh}/fd/0").startswith("pipe:")
    # The terminal has gone; the mount stays.
    assert (mountpoint / "name").read_text() == "Domain-0\n"
    subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
    wait_for_end(process)
    assert not Path(f"/proc/{ssh}").exists()


def test_a_passphrase_is_not_asked_for_without_a_terminal(
    daemon: RealXenstored, server: Sshd, locked: Path, mountpoint: Path
) -> None:
    options = arguments(server, daemon.socket, command=server.command(key=locked))
    refused(without_terminal(*options, mountpoint), 4, "Permission denied (")


def test_an_interrupt_at_the_passphrase(
    daemon: RealXenstored, server: Sshd, locked: Path, mountpoint: Path
) -> None:
    with terminal(*command_of(server, daemon, locked), mountpoint) as user:
        user.read_until("Enter passphrase for key")
        deadline = time.monotonic() + LIMIT
        # ssh does not notice one that comes between its prompt and its read(2).
        while user.process.poll() is None:
            user.type("\x03")
            assert time.monotonic() < deadline
            with suppress(subprocess.TimeoutExpired):
                user.process.wait(0.5)
        assert user.process.returncode in (EXIT_NO_STORE, EXIT_INTERRUPTED)
    assert directories_of_ssh() == []
    assert not os.path.ismount(mountpoint)


def test_an_interrupt_ends_the_mount_before_ssh(
    daemon: RealXenstored, server: Sshd, witness: XsClient, mountpoint: Path
) -> None:
    """A truncation that is still pending goes to the store by ssh."""
    witness.write("/local/domain/0/data/owed", "old")
    with terminal(*command_of(server, daemon, server.key, "-f"), mountpoint) as user:
        await_true(lambda: os.path.ismount(mountpoint))
        owed = os.open(mountpoint / "data/owed", os.O_WRONLY | os.O_TRUNC)
        user.type("\x03")
        assert user.process.wait(LIMIT) == 0
        with suppress(OSError):
            os.close(owed)  # its file system has gone
    assert witness.read("/local/domain/0/data/owed") == b""
    witness.rm("/local/domain/0/data/owed")


def test_the_progress_of_a_mirror(
    daemon: RealXenstored, server: Sshd, mountpoint: Path, tmp_path: Path
) -> None:
    """A copy that takes long shows how far it is: at a terminal, and to systemd."""
    gate = Gate()
    with (
        LyingStore(tmp_path / "slow", daemon.socket) as slow,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        scratch() as directory,
    ):
        slow.lie = on(Op.GET_PERMS, gate.before(honest))  # which only the mirror sends
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(LIMIT)
        options = arguments(server, slow.path, f"mirror={directory}/mirror", f"timeout={LIMIT:g}")
        command = ["env", f"NOTIFY_SOCKET={tmp_path}/notify", sys.executable, "-m", "xsfs"]
        with terminal(*command, *options, mountpoint) as user:
            user.read_until("\rmaking the mirror: 0 nodes")
            assert manager.recv(4096) == b"STATUS=making the mirror: 0 nodes"
            gate.open()
            assert user.process.wait(LIMIT) == 0
            while user.read():
                pass
            assert user.text.endswith("\r\x1b[K")
            while (said := manager.recv(4096)).startswith(b"STATUS=making"):
                pass
            assert said.startswith(b"READY=1\nSTATUS=/local/domain/0 of ")
        process = process_at(mountpoint)
        subprocess.run(["umount", mountpoint], check=True, timeout=LIMIT)
        wait_for_end(process)


# -------------------------------------------------------------------------- hosts of their own


@pytest.fixture
def dom0() -> Iterator[Host]:
    """A host without Xen, whose ssh knows host2 and host3."""
    with ExitStack() as stack:
        here = stack.enter_context(open_host())
        for name, guests in ("host2", (GUEST,)), ("host3", (GUEST + 1,)):
            daemon = stack.enter_context(RealXenstored("C", guests=guests))
            daemon.populate()
            there = stack.enter_context(open_host(daemon.socket))
            stack.enter_context(reachable(here, name, there))
        yield here


@pytest.mark.slow
@pytest.mark.ci
def test_the_document(dom0: Host) -> None:
    check_dialogue("docs/other-hosts.md", dom0)


def test_an_automount(dom0: Host) -> None:
    """An automount by autofs and systemd: the first look at a host's directory waits in the kernel."""
    dom0.fstab.write_text(
        "root@host2: /mnt/host2 fuse.xsfs ro,_netdev,noauto,x-systemd.automount 0 0\n"
    )
    automount = "/mnt/.python/bin/python /mnt/.repository/tests/support/automount.py"
    said = dom0.sh(f"mkdir /mnt/host2; {automount} /mnt/host2 mount /mnt/host2")
    assert said == "Domain-0\n"


def test_fstab_and_mount(dom0: Host) -> None:
    dom0.fstab.write_text("root@host2: /mnt/host2 fuse.xsfs ro,_netdev,noauto,nofail 0 0\n")
    dom0.sh("mkdir /mnt/host2 /mnt/host3; mount /mnt/host2")
    assert dom0.sh("cat /mnt/host2/name; findmnt -n -o SOURCE,OPTIONS /mnt/host2").startswith(
        "Domain-0\nroot@host2: ro,"
    )
    dom0.sh("mount -t fuse.xsfs root@host3: /mnt/host3 -o root=/local/domain/8")
    assert dom0.sh("cat /mnt/host3/name; mount -a; ls /mnt/host2/.root") == (
        "guest-8\nlibxl\nlocal\ntool\nvm\n"
    )
    dom0.sh("umount /mnt/host2 /mnt/host3")
