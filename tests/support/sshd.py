"""A real OpenSSH server on loopback, with keys and a configuration of its own in one directory.

Nothing of the machine's own ssh is read or changed.  `Sshd.command` is what reaches it.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.support.host import REPOSITORY, Host
from tests.support.mounting import LIMIT

SSHD: Final = "/usr/sbin/sshd"
"""It executes itself for each connection, and needs its whole path for that."""

PRIVILEGE_SEPARATION: Final = Path("/run/sshd")
"""Where Debian's sshd does what needs no rights; it must exist."""


class Sshd:
    """A server that `start` starts and `stop` ends; ADDRESS:port stays.

    options     lines of sshd_config(5)
    enter       words before the command that starts it, for a host of its own
    """

    ADDRESS: Final = "127.0.0.1"

    def __init__(self, directory: Path, *options: str, enter: Sequence[str] = ()) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.log_file = directory / "sshd.log"
        self.host_key = self._key("host-key")
        self.key = self._key("key")
        self.other_key = self._key("other-key")
        """One that the server does not know."""
        self.known_hosts = directory / "known-hosts"
        self.known_hosts.write_text(f"[{self.ADDRESS}]:{self.port} {_public(self.host_key)}\n")
        self.no_known_hosts = directory / "no-known-hosts"
        self.no_known_hosts.touch()
        authorized = directory / "authorized-keys"
        authorized.write_text(f"{_public(self.key)}\n")
        self._config = directory / "sshd_config"
        self._lines = [
            *options,  # the first line of a keyword counts
            f"ListenAddress {self.ADDRESS}:{self.port}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {authorized}",
            "PidFile none",
            "StrictModes no",
            "PermitRootLogin yes",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxStartups 100",
            # Debian's bash reads .bashrc for each session of ssh.  The machine's may do anything.
            f"SetEnv HOME={directory}",
        ]
        self._enter = enter
        self.process: subprocess.Popen[bytes] | None = None

    def _key(self, name: str) -> Path:
        path = self.directory / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=LIMIT
        )
        return path

    @property
    def account(self) -> str:
        return f"{pwd.getpwuid(os.geteuid()).pw_name}@{self.ADDRESS}"

    def command(
        self, *options: str, key: Path | None = None, known_hosts: Path | None = None
    ) -> str:
        """The option `ssh_command=` that reaches this server."""
        words = [
            *("ssh", "-F", "none", "-p", str(self.port)),
            *("-i", str(key or self.key), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"),
            *("-o", f"UserKnownHostsFile={known_hosts or self.known_hosts}"),
            *("-o", "GlobalKnownHostsFile=none"),
            *options,
        ]
        return shlex.join(words)

    def client_config(self) -> str:
        """Lines of ssh_config(5) that reach this server."""
        return (
            f"HostName {self.ADDRESS}\nPort {self.port}\nIdentityFile {self.key}\n"
            f"IdentitiesOnly yes\nIdentityAgent none\nUserKnownHostsFile {self.known_hosts}\n"
        )

    def delayed(self, seconds: float) -> tuple[str, str]:
        """Options that make each round trip last so long."""
        relay = [sys.executable, "-m", "tests.support.delay", self.ADDRESS, str(self.port)]
        words = ["env", f"PYTHONPATH={REPOSITORY}", *relay, str(seconds)]
        return "-o", f"ProxyCommand={shlex.join(words)}"

    def start(self) -> None:
        assert self.process is None
        self._config.write_text("".join(f"{line}\n" for line in self._lines))
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._enter, SSHD, "-D", "-e", "-f", self._config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + LIMIT
        while True:
            with suppress(OSError), socket.create_connection((self.ADDRESS, self.port), LIMIT):
                return
            assert self.process.poll() is None, self.log_file.read_text()
            assert time.monotonic() < deadline, "sshd does not listen"
            time.sleep(0.01)

    def stop(self) -> None:
        """End it, and all of its sessions."""
        if self.process is None:
            return
        sessions = self.sessions()
        self.process.kill()
        self.process.wait(LIMIT)
        self.process = None
        for session in sessions:
            with suppress(ProcessLookupError):
                os.kill(session, signal.SIGKILL)

    def sessions(self) -> list[int]:
        """The processes that serve connections, and what they run."""
        assert self.process is not None
        return descendants(self.process.pid)

    def signal_sessions(self, number: int) -> None:
        for session in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(session, number)


def descendants(process: int) -> list[int]:
    """The processes below this one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    left = [process]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


PLACE_OF_ALL: Final = "/dev/shm"
"""One that each host of the tests has."""


@contextmanager
def reachable(here: Host, name: str, there: Host) -> Iterator[None]:
    """`ssh NAME` on one host leads to the other, which runs its own server."""
    there.sh("mkdir -p -m 755 /run/sshd")
    directory = Path(tempfile.mkdtemp(dir=PLACE_OF_ALL))
    here.sh("mountpoint -q /etc/ssh || mount -t tmpfs none /etc/ssh")
    with running_sshd(directory, enter=there.enter) as server:
        with (here.root / "etc/ssh/ssh_config").open("a") as config:
            config.write(f"Host {name}\n{server.client_config()}")
        yield
        here.unmount_all()  # while the server answers


@contextmanager
def running_sshd(directory: Path, *options: str, enter: Sequence[str] = ()) -> Iterator[Sshd]:
    server = Sshd(directory, *options, enter=enter)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _public(key: Path) -> str:
    return " ".join(key.with_name(f"{key.name}.pub").read_text().split()[:2])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((Sshd.ADDRESS, 0))
        port: int = sock.getsockname()[1]
        return port
