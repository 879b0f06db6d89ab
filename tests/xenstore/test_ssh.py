"""The client's ring over ssh: a real sshd on loopback, real daemons behind it, and all the ways in
which it fails."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest
import trio

from tests.support.clients import set_time_limit, time_limit
from tests.support.mounting import LIMIT
from tests.support.sshd import Sshd, descendants, running_sshd
from tests.support.xenstored.harness import RealXenstored
from xsfs.xenstore import ssh
from xsfs.xenstore.errors import ConnectionLost, StoreError, StoreUnavailable
from xsfs.xenstore.ssh import open_forward, private_directory
from xsfs.xenstore.ssh_destination import (
    DEFAULT_SOCKET,
    SshDestination,
    is_remote,
    parse_command,
    parse_destination,
)
from xsfs.xenstore.store import Store, open_store

LONG_WAY = 0.1
"""Seconds of a round trip."""

NAME = "/local/domain/0/name"


@pytest.fixture(scope="module", params=["C", "ocaml"])
def each_daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C") as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """An sshd that stays as it is."""
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory above the private directories of the test.  ssh gets no terminal.

    Not below `tmp_path`, which is too long for the address of a socket after a hundred runs.
    """
    monkeypatch.setattr(ssh, "_own_terminal", nullcontext)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run"
        path.mkdir()
        monkeypatch.setattr(ssh, "RUN_DIRECTORY", str(path))
        yield path


@pytest.fixture
def patient_login(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command with which a short time limit leaves ssh time to log in."""
    monkeypatch.setattr(ssh, "START_TIMEOUTS", LIMIT)
    return server.command("-o", f"ConnectTimeout={LIMIT:.0f}")


@asynccontextmanager
async def remote_store(
    server: Sshd, socket: str, command: str | None = None, timeout: float = LIMIT
) -> AsyncIterator[Store]:
    destination = SshDestination(server.account, socket)
    words = shlex.split(command or server.command())
    async with (
        open_forward(destination, timeout=timeout, command=words) as forward,
        open_store(timeout=LIMIT, connect=forward.connect) as store,
    ):
        yield store


def refusal(
    server: Sshd, socket: str, command: str | None = None, timeout: float = LIMIT
) -> StoreUnavailable:
    """The error with which it cannot be opened."""

    async def main() -> None:
        async with remote_store(server, socket, command, timeout):
            pytest.fail("it was opened")

    with pytest.raises(StoreUnavailable) as caught:
        trio.run(main)
    assert "\n" not in f"{caught.value} {caught.value.hint}"
    assert not ssh_processes()
    return caught.value


def ssh_processes() -> list[int]:
    """Those of this process that are alive."""
    return [pid for pid in descendants(os.getpid()) if program_of(pid) == "ssh"]


def program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


async def until_read(store: Store) -> None:
    """Until it answers, tried for again and again."""
    with trio.fail_after(LIMIT):
        while True:
            try:
                assert await store.read(NAME) == b"Domain-0"
            except StoreError:
                await trio.sleep(0.05)
            else:
                return


# -------------------------------------------------------------------------------------- the source


@pytest.mark.parametrize(
    ("source", "account", "socket"),
    [
        ("host2:", "host2", DEFAULT_SOCKET),
        ("root@host2:", "root@host2", DEFAULT_SOCKET),
        ("root@host2:/run/x", "root@host2", "/run/x"),
        ("host2:/a:b%c d\n", "host2", "/a:b%c d\n"),
        ("root@[fe80::1%eth0]:", "root@fe80::1%eth0", DEFAULT_SOCKET),
        ("[::1]:/x", "::1", "/x"),
        ("a.user@dom0.example.org:", "a.user@dom0.example.org", DEFAULT_SOCKET),
    ],
)
def test_destinations(source: str, account: str, socket: str) -> None:
    assert is_remote(source)
    assert parse_destination(source) == (account, socket)


@pytest.mark.parametrize(
    "source",
    [
        *(":", "@host:", "user@:", "host:relative", "host:/a\0b", "::1:", "[host]:", "a@b@c:"),
        # ssh would take it for an option, its ProxyCommand for a part of a script.
        *("-oProxyCommand=x:", "-x@host:", "root@-x:", "a b:", "$(id):", "a;b:", "`id`@host:"),
    ],
)
def test_no_destinations(source: str) -> None:
    assert is_remote(source)
    with pytest.raises(ValueError, match=r"\[USER@\]HOST:\[SOCKET\]"):
        parse_destination(source)


@pytest.mark.parametrize("source", ["/run/a:b", "./a:b", "xenstore", "embedded", "/dev/xen/xenbus"])
def test_paths(source: str) -> None:
    assert not is_remote(source)


def test_commands() -> None:
    assert parse_command("ssh -o 'A b' -v") == ("ssh", "-o", "A b", "-v")
    for text, reason in ("", "must be"), (" ", "must be"), ("ssh 'x", "quotation"):
        with pytest.raises(ValueError, match=reason):
            parse_command(text)


# --------------------------------------------------------------------------------------- the store


def test_requests_watches_and_transactions(each_daemon: RealXenstored, server: Sshd) -> None:
    async def main() -> None:
        async with remote_store(server, each_daemon.socket) as store:
            assert await store.read(NAME) == b"Domain-0"
            async with store.watch("/local/domain/0/data/ssh") as events:
                await anext(events)
                async with store.transaction() as tx:
                    await tx.write("/local/domain/0/data/ssh", "1")
                with trio.fail_after(LIMIT):
                    assert await anext(events) == b"/local/domain/0/data/ssh"
            assert len(ssh_processes()) == 1
            await store.delete("/local/domain/0/data/ssh")

    trio.run(main)
    assert not ssh_processes()


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        " ",
        "c:d",
        "%h%%",
        "back\\slash\\:",
        "[x]",
        "q\"'x",
        "a\nb",
        "${HOME}",
        "${",
        "$",
        "ü",
    ],
)
def test_a_socket_path_with_odd_characters(
    name: str, daemon: RealXenstored, server: Sshd, tmp_path: Path
) -> None:
    link = tmp_path / name
    link.symlink_to(daemon.socket)

    async def main() -> None:
        async with remote_store(server, str(link)) as store:
            assert await store.read(NAME) == b"Domain-0"

    trio.run(main)


def test_the_local_socket_is_nobody_elses(daemon: RealXenstored, server: Sshd, place: Path) -> None:
    async def main() -> None:
        async with remote_store(server, daemon.socket):
            (directory,) = place.iterdir()
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            (socket,) = directory.iterdir()
            assert stat.S_IMODE(socket.stat().st_mode) == 0o600

    trio.run(main)
    assert not list(place.iterdir())


def test_ports_of_the_users_configuration_may_be_taken(
    daemon: RealXenstored, server: Sshd, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"LocalForward {server.ADDRESS}:{server.port} 127.0.0.1:1\nExitOnForwardFailure yes\n"
    )
    command = f"{server.command()} -F {config}"

    async def main() -> None:
        async with remote_store(server, daemon.socket, command) as store:
            assert await store.read(NAME) == b"Domain-0"

    trio.run(main)


def test_a_value_over_a_long_way_takes_one_round_trip(daemon: RealXenstored, server: Sshd) -> None:
    async def main() -> float:
        command = server.command(*server.delayed(LONG_WAY))
        async with remote_store(server, daemon.socket, command) as store:
            took = []
            # A busy machine only adds to it.
            for _ in range(50):
                start = time.perf_counter()
                await store.read(NAME)
                took.append(time.perf_counter() - start)
                if took[-1] < 2 * LONG_WAY:
                    break
            return min(took)

    # A second round trip would double it.
    assert LONG_WAY <= trio.run(main) < 2 * LONG_WAY


# ------------------------------------------------------------------------------------- what refuses


def test_no_such_host(server: Sshd) -> None:
    command = server.command("-o", "HostName=no-such-host.invalid")
    error = refusal(server, "/x", command)
    assert "Could not resolve hostname" in str(error)
    assert not error.denied


def test_nobody_listens(server: Sshd, tmp_path: Path) -> None:
    other = Sshd(tmp_path)  # never started
    error = refusal(other, "/x")
    assert "Connection refused" in str(error)


def test_a_key_that_the_host_does_not_know(server: Sshd) -> None:
    error = refusal(server, "/x", server.command(key=server.other_key))
    assert "Permission denied" in str(error)
    assert error.denied


def test_a_host_key_that_nobody_knows(server: Sshd) -> None:
    error = refusal(server, "/x", server.command(known_hosts=server.no_known_hosts))
    assert "Host key verification failed" in str(error)


def test_no_such_socket(server: Sshd, tmp_path: Path) -> None:
    start = time.monotonic()
    error = refusal(server, str(tmp_path / "none"))
    assert f"no access to {tmp_path}/none of {server.account}" in str(error)
    assert "AllowStreamLocalForwarding" in error.hint
    assert time.monotonic() - start < LIMIT / 2


def test_a_server_that_forwards_nothing(daemon: RealXenstored, tmp_path: Path) -> None:
    with running_sshd(tmp_path / "sshd", "AllowStreamLocalForwarding no") as server:
        error = refusal(server, daemon.socket)
    assert "AllowStreamLocalForwarding" in error.hint


def test_a_xenstored_that_never_answers(server: Sshd, patient_login: str) -> None:
    with RealXenstored("C") as daemon:
        daemon.pause()
        try:
            error = refusal(server, daemon.socket, patient_login, timeout=1.0)
        finally:
            daemon.resume()
    assert "does not answer" in str(error)


def test_no_ssh(server: Sshd) -> None:
    error = refusal(server, "/x", "/no/such/ssh")
    assert "cannot run /no/such/ssh: No such file or directory" in str(error)


def test_a_command_that_never_connects(server: Sshd) -> None:
    error = refusal(server, "/x", "sh -c 'exec sleep 1000' sh", timeout=0.2)
    assert "no login within 0.6 seconds" in str(error)


def test_messages_of_a_hostile_host_are_one_short_line(server: Sshd) -> None:
    script = "import sys; sys.stderr.write('x' * 9999 + '\\x1b[31m\\x07\\n'); sys.exit(255)"
    error = refusal(server, "/x", shlex.join([sys.executable, "-c", script]))
    assert str(error).isprintable()
    assert len(str(error)) < 500


# ----------------------------------------------------------------------- accounts that run nothing


@pytest.mark.parametrize(
    "option", ["ForceCommand /usr/sbin/nologin", "MaxSessions 0", "ForceCommand sleep 1000"]
)
def test_an_account_that_may_not_run_cat(
    option: str, daemon: RealXenstored, tmp_path: Path
) -> None:
    async def main(server: Sshd) -> None:
        async with remote_store(server, daemon.socket) as store:
            assert await store.read(NAME) == b"Domain-0"
            (process,) = ssh_processes()
            os.kill(process, signal.SIGKILL)
            await until_read(store)

    with running_sshd(tmp_path / "sshd", option) as server:
        trio.run(main, server)
    assert not ssh_processes()


# ------------------------------------------------------------------------------------ what is lost


def test_ssh_is_killed(daemon: RealXenstored, server: Sshd, place: Path) -> None:
    async def main() -> None:
        async with (
            remote_store(server, daemon.socket) as store,
            store.watch("/local/domain/0/data") as events,
        ):
            await anext(events)
            (process,) = ssh_processes()
            os.kill(process, signal.SIGKILL)
            with trio.fail_after(LIMIT):
                await anext(events)  # the watch was interrupted
            await until_read(store)
            (another,) = ssh_processes()
            assert another != process
            assert not Path(f"/proc/{process}").exists()  # reaped

    trio.run(main)
    assert not list(place.iterdir())


def test_the_server_stops_and_starts_again(daemon: RealXenstored, tmp_path: Path) -> None:
    async def main(server: Sshd) -> None:
        async with remote_store(server, daemon.socket) as store:
            server.stop()
            # Time for two starts of ssh: the first one may still find the server.
            with time_limit(store, 6.0), pytest.raises(ConnectionLost, match="Connection refused"):
                await store.read(NAME)
            server.start()
            await until_read(store)

    with running_sshd(tmp_path / "sshd") as server:
        trio.run(main, server)


def test_the_network_falls_silent(
    daemon: RealXenstored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sessions of sshd stop: ssh itself must find out."""
    monkeypatch.setattr(ssh, "START_TIMEOUTS", LIMIT)

    async def main(server: Sshd) -> None:
        command = server.command("-o", f"ConnectTimeout={LIMIT:.0f}")
        async with remote_store(server, daemon.socket, command, timeout=4.0) as store:
            (process,) = ssh_processes()
            with trio.fail_after(LIMIT), os.fdopen(os.pidfd_open(process)) as end:
                server.signal_sessions(signal.SIGSTOP)
                start = trio.current_time()
                await trio.lowlevel.wait_readable(end.fileno())
                assert trio.current_time() - start > 2.0
            await until_read(store)

    with running_sshd(tmp_path / "sshd") as server:
        trio.run(main, server)


def test_a_host_that_refuses_is_not_stormed(
    daemon: RealXenstored, server: Sshd, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.touch()
    script = f'echo x >> {shlex.quote(str(log))}; [ -e "{tmp_path}/gone" ] && exit 255; exec "$@"'
    command = shlex.join(["sh", "-c", script, "sh", *shlex.split(server.command())])

    async def main() -> None:
        async with remote_store(server, daemon.socket, command) as store:
            (tmp_path / "gone").touch()
            before = len(log.read_text().split())
            os.kill(ssh_processes()[0], signal.SIGKILL)
            set_time_limit(store, 1.0)
            with trio.move_on_after(4.0):
                while True:
                    with pytest.raises(ConnectionLost):
                        await store.read(NAME)
            # At once, and after half a second, one and two more.
            assert len(log.read_text().split()) - before <= 4
            with trio.fail_after(LIMIT):
                while len(log.read_text().split()) - before < 3:
                    with pytest.raises(ConnectionLost):
                        await store.read(NAME)

    trio.run(main)


# --------------------------------------------------------------------------------------- the ends

CLIENT = """\
import shlex, sys, trio
from xsfs.xenstore import ssh
from xsfs.xenstore.ssh_destination import SshDestination
from xsfs.xenstore.store import open_store
place, account, socket, command = sys.argv[1:]
ssh.RUN_DIRECTORY = place
async def main():
    destination = SshDestination(account, socket)
    async with ssh.open_forward(destination, timeout=20, command=shlex.split(command)) as forward:
        async with open_store(timeout=20, connect=forward.connect) as store:
            print("open", flush=True)
            await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("option", ["PermitTTY yes", "MaxSessions 0", "ForceCommand sleep 1000"])
def test_nothing_is_left_of_a_killed_client(option: str, place: Path, tmp_path: Path) -> None:
    """Not even while the daemon keeps the connections of ssh open."""
    with RealXenstored("C") as daemon, running_sshd(tmp_path / "sshd", option) as server:
        arguments = [str(place), server.account, daemon.socket, server.command()]
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "open\n"
            (process,) = [pid for pid in descendants(client.pid) if program_of(pid) == "ssh"]
            daemon.pause()
            try:
                with os.fdopen(os.pidfd_open(process)) as end:
                    client.kill()
                    trio.run(wait_for, end.fileno())
            finally:
                daemon.resume()
        assert len(list(place.iterdir())) == 1
        with private_directory() as path:
            assert [str(each) for each in place.iterdir()] == [path]
    assert not list(place.iterdir())


async def wait_for(descriptor: int) -> None:
    with trio.fail_after(LIMIT):
        await trio.lowlevel.wait_readable(descriptor)


def test_directories_of_the_living_and_of_others_stay(place: Path) -> None:
    with private_directory() as one:
        others = place / f"{ssh.PREFIX}other"
        others.mkdir()
        os.chown(others, 1234, 1234)
        (place / f"{ssh.PREFIX}link").symlink_to(one)
        with private_directory() as two:
            assert one != two
            assert Path(one).exists()
        assert others.exists()
        assert Path(one).exists()
    assert sorted(path.name for path in place.iterdir()) == [
        f"{ssh.PREFIX}link",
        f"{ssh.PREFIX}other",
    ]


def test_a_place_with_a_long_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must fit in the address of a socket."""
    long = place / ("x" * 100)
    monkeypatch.setattr(ssh, "RUN_DIRECTORY", str(long))
    with private_directory() as path:
        assert len(path) < 100
        assert not path.startswith(str(place))
    assert not list(long.iterdir())


def test_no_place_at_all(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_places", lambda: iter(["/dev/null/x"]))
    with pytest.raises(StoreUnavailable, match="Not a directory"), private_directory():
        pass


def test_the_end_waits_for_no_ssh_that_goes_on(
    daemon: RealXenstored, server: Sshd, place: Path
) -> None:
    command = shlex.join(["sh", "-c", "trap '' TERM; \"$@\" & wait; wait", "sh"])

    async def main() -> float:
        async with remote_store(server, daemon.socket, f"{command} {server.command()}"):
            end = trio.current_time()
        return trio.current_time() - end

    assert trio.run(main) < LIMIT / 2
    assert not ssh_processes()
    assert not list(place.iterdir())
