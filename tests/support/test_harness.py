"""The harness itself: guests behind a real ring, many clients at once, restarts and pauses.

Unlike most tests these do without xsfs: they prove the ground on which the others stand.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.support.xenstored import shim
from tests.support.xenstored.bridge import GUEST_PORT
from tests.support.xenstored.client import HEADER
from tests.support.xenstored.harness import (
    OPS,
    MissingProgramError,
    RealXenstored,
    XsClient,
    XsEOF,
    XsError,
    XsTimeout,
    strings,
)
from tests.support.xenstored.ring import Ring

GUEST = 7
HOME = f"/local/domain/{GUEST}"
TRANSACTIONS = 9
WATCHES = 100
"""Every daemon allows a guest this many at once; C allows it 27 watches more."""


@pytest.fixture(params=["C", "ocaml"])
def xs(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param, guests=(GUEST,)) as daemon:
        furnish(daemon)
        yield daemon


def furnish(daemon: RealXenstored, domid: int = GUEST) -> None:
    """A node which the guest may do as it likes with."""
    with daemon.client() as dom0:
        dom0.write(f"/local/domain/{domid}/data", "")
        dom0.set_perms(f"/local/domain/{domid}/data", [f"n{domid}"])


@contextlib.contextmanager
def clients(xs: RealXenstored, count: int) -> Iterator[list[XsClient]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(xs.client(GUEST)) for _ in range(count)]


def settle(xs: RealXenstored) -> None:
    """The daemon has forgotten closed clients when this returns.

    A client that connects later is heard later, and the daemon serves a ring in its order; what was
    still under way at the close is undone right after the reply to it, so before another request.
    """
    with xs.client(GUEST) as guest:
        guest.read("data")


def fails_with(name: str, call: object, *args: object) -> None:
    assert callable(call)
    with pytest.raises(XsError) as caught:
        call(*args)
    assert caught.value.name == name


# ------------------------------------------------------------------------------ several clients


def test_replies_find_their_client_and_request(xs: RealXenstored) -> None:
    with clients(xs, 3) as guests:
        # All use the same req_ids, and read only when all have sent.
        for number, guest in enumerate(guests):
            guest.write(f"data/{number}", f"value {number}")
        for _ in range(20):
            sent = [
                [guest.send("READ", strings(f"data/{(number + i) % 3}")) for i in range(15)]
                for number, guest in enumerate(guests)
            ]
            assert sent[0] == sent[1] == sent[2]
            for number, guest in enumerate(guests):
                for i, req_id in enumerate(sent[number]):
                    assert guest.reply(req_id) == b"value %d" % ((number + i) % 3)


def test_any_req_id_comes_back(xs: RealXenstored) -> None:
    with clients(xs, 2) as guests:
        for guest in guests:
            for req_id in (0, 0, 0xFFFFFFFF, 5):
                guest.send("READ", strings("data"), req_id=req_id)
        for guest in guests:
            assert [guest.receive()[1] for _ in range(4)] == [0, 0, 0xFFFFFFFF, 5]


def test_pipelines_of_three_clients_at_once(xs: RealXenstored) -> None:
    rounds = 300
    failures: list[BaseException] = []

    def run(number: int, guest: XsClient) -> None:
        try:
            value = b"%d" % number * 500
            guest.write(f"data/{number}", value)
            for reply in guest.pipeline([("READ", strings(f"data/{number}"))] * rounds):
                assert reply == value
        except BaseException as err:
            failures.append(err)

    with clients(xs, 3) as guests:
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(guests)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not failures


def test_a_client_that_closes_in_the_middle_disturbs_nobody(xs: RealXenstored) -> None:
    with xs.client(GUEST) as other:
        other.write("data/x", "1")
        for _ in range(20):
            with xs.client(GUEST) as guest:
                for _ in range(30):
                    guest.send("READ", strings("data/x"))
                guest.sock.sendall(b"half a header"[:9])
            assert other.read("data/x") == b"1"


def test_all_that_was_sent_before_the_close_is_done(xs: RealXenstored) -> None:
    with xs.client(GUEST) as guest:
        for i in range(200):
            guest.send("WRITE", strings(f"data/{i}") + bytes(400))
    with xs.client(GUEST) as guest:
        assert len(guest.ls("data")) == 200


def test_a_payload_too_long_ends_that_client_only(xs: RealXenstored) -> None:
    with clients(xs, 2) as (bad, good):
        bad.send("WRITE", strings("data/long") + bytes(4097))
        with pytest.raises(XsEOF):
            bad.receive()
        good.write("data/short", "1")
        assert good.ls("data") == ["short"]
    with xs.client(GUEST) as again:
        assert again.read("data/short") == b"1"


# --------------------------------------------------------------------------------- transactions


def test_transactions_belong_to_their_client(xs: RealXenstored) -> None:
    with clients(xs, 3) as guests:
        mine = [guest.start() for guest in guests]
        assert len(set(mine)) == 3
        for number, guest in enumerate(guests):
            guest.write(f"data/{number}", "in a transaction", mine[number])
            other = mine[(number + 1) % 3]
            fails_with("ENOENT", guest.read, "data", other)
            fails_with("ENOENT", guest.write, "data/x", "1", other)
            fails_with("ENOENT", guest.end, other)
            fails_with("ENOENT", guest.end, 0x7ABCDEF0)
        assert guests[0].ls("data") == []
        for number, guest in enumerate(guests):
            assert guest.ls("data", mine[number]) == [str(number)]
        guests[0].end(mine[0], commit=False)
        guests[1].end(mine[1])
        fails_with("ENOENT", guests[1].end, mine[1])
        assert guests[0].ls("data") == ["1"]
        guests[2].read("data/2", mine[2])


def test_a_transaction_ends_as_it_says_or_not_at_all(xs: RealXenstored) -> None:
    with xs.client(GUEST) as guest:
        tx = guest.start()
        fails_with("EINVAL", guest.call, "TRANSACTION_END", b"X\0", tx)
        guest.write("data/x", "1", tx)
        guest.end(tx)
        assert guest.read("data/x") == b"1"


def test_a_client_leaves_no_transaction_behind(xs: RealXenstored) -> None:
    for _ in range(5):
        with xs.client(GUEST) as guest:
            for tx in [guest.start() for _ in range(TRANSACTIONS)]:
                guest.write(f"data/{tx}", "never committed", tx)
    for _ in range(5):
        with xs.client(GUEST) as guest:
            for _ in range(TRANSACTIONS):
                guest.send("TRANSACTION_START", b"\0")
        settle(xs)
    with xs.client(GUEST) as guest:
        assert guest.ls("data") == []
        found = [guest.start() for _ in range(TRANSACTIONS)]
        assert len(set(found)) == TRANSACTIONS


# -------------------------------------------------------------------------------------- watches


def test_equal_watches_of_two_clients(xs: RealXenstored) -> None:
    with clients(xs, 3) as (one, two, writer):
        for guest, path in ((one, "data/one"), (two, "data/two"), (one, "data/both")):
            guest.watch(path, "token")
            assert guest.event() == (path, "token")
        two.watch("data/both", "token")
        assert two.event() == ("data/both", "token")
        fails_with("EEXIST", two.watch, "data/both", "token")

        writer.write("data/one", "")
        assert one.event() == ("data/one", "token")
        writer.write("data/two", "")
        assert two.event() == ("data/two", "token")
        writer.write("data/both", "")
        assert one.event() == ("data/both", "token")
        assert two.event() == ("data/both", "token")

        one.unwatch("data/both", "token")
        fails_with("ENOENT", one.unwatch, "data/both", "token")
        writer.write("data/both", "")
        writer.write("data/one", "")
        assert one.event() == ("data/one", "token")
        assert two.event() == ("data/both", "token")
        assert not writer.events


@pytest.mark.parametrize("token", ["", "5:x", ":", "with space", "long" * 500])
def test_any_token_comes_back(xs: RealXenstored, token: str) -> None:
    with clients(xs, 2) as guests:
        for guest in guests:
            guest.watch("data", token)
            assert guest.event() == ("data", token)
        guests[0].unwatch("data", token)
        guests[0].write("data", "")
        assert guests[1].event() == ("data", token)


def test_ill_formed_watches_are_refused(xs: RealXenstored) -> None:
    with xs.client(GUEST) as guest:
        for payload in (b"\0", b"data", b"data\0", strings("da ta", "token")):
            fails_with("EINVAL", guest.call, "WATCH", payload)
        fails_with("EINVAL", guest.watch, "data", "x" * (4096 - len("data") - 2))
        guest.read("data")


def test_a_client_leaves_no_watch_behind(xs: RealXenstored) -> None:
    watches = [("WATCH", strings(f"data/{i}", "token")) for i in range(WATCHES)]
    for _ in range(5):
        with xs.client(GUEST) as guest:
            assert guest.pipeline(watches) == [b"OK\0"] * WATCHES
    for _ in range(5):
        with xs.client(GUEST) as guest:
            for watch in watches:
                guest.send(*watch)
        settle(xs)
    for _ in range(5):
        with xs.client(GUEST) as guest:
            guest.watch("data", "token")
            guest.unwatch("data", "token")
    with xs.client(GUEST) as guest:
        assert guest.pipeline(watches) == [b"OK\0"] * WATCHES


def test_reset_watches_goes_to_the_daemon(xs: RealXenstored) -> None:
    with clients(xs, 2) as (one, two):
        one.watch("data", "token")
        assert one.event() == ("data", "token")
        tx = one.start()
        one.call("RESET_WATCHES", b"\0")
        two.write("data", "")
        one.watch("data/other", "token")
        assert one.event() == ("data/other", "token")
        with pytest.raises(XsError):
            one.read("data", tx)
    with xs.client(GUEST) as again:
        again.watch("data", "token")
        assert again.event() == ("data", "token")


# --------------------------------------------------------------------------- who does not read


def flood(client: XsClient) -> None:
    """Send, and never read, until nothing more is taken."""
    requests = b"".join(HEADER.pack(OPS["READ"], i, 0, 7) + b"data/x\0" for i in range(100))
    rest = requests
    while select.select([], [client.sock], [], 0.5)[1]:
        rest = rest[client.sock.send(rest) :] or requests


def read_to_the_end(client: XsClient) -> None:
    with contextlib.suppress(XsEOF):
        while True:
            client.receive()


def test_who_never_reads_replies_does_not_stop_others(xs: RealXenstored) -> None:
    with clients(xs, 2) as (mute, other):
        other.write("data/x", bytes(1500))
        mute.sock.setblocking(False)
        flood(mute)
        for _ in range(100):
            assert len(other.read("data/x")) == 1500
    with xs.client(GUEST) as again:
        assert len(again.read("data/x")) == 1500


def test_who_never_reads_events_is_dropped_in_the_end(xs: RealXenstored) -> None:
    path = "data/" + "/".join(["x" * 250] * 7)
    with clients(xs, 2) as (mute, other):
        mute.watch("data", "token")
        other.write(path, "")
        gone = select.poll()
        gone.register(mute.sock, 0)
        for _ in range(2000):
            other.write(path, "")
            if gone.poll(0):
                break
        assert gone.poll(60_000)
        assert other.read(path) == b""
        read_to_the_end(mute)


# ---------------------------------------------------------------------------- ends and restarts


def test_restart_gives_an_empty_store_at_the_same_place(xs: RealXenstored) -> None:
    paths = xs.dir, xs.socket, xs.guest_socket(GUEST)
    with xs.client() as dom0, clients(xs, 3) as guests:
        dom0.write("/old", "1")
        for guest in guests:
            guest.watch("data", "token")
            guest.start()
        guests[0].send("READ", strings("data"))
        xs.restart()
        for client in (dom0, *guests):
            read_to_the_end(client)
    assert paths == (xs.dir, xs.socket, xs.guest_socket(GUEST))
    with xs.client() as dom0, xs.client(GUEST) as guest:
        fails_with("ENOENT", dom0.read, "/old")
        assert dom0.introduced(GUEST)
        furnish(xs)
        guest.write("data/x", "1")
        assert dom0.read(f"{HOME}/data/x") == b"1"


def test_kill_alone_leaves_guests_hanging(xs: RealXenstored) -> None:
    with clients(xs, 2) as (one, two):
        one.read("data")
        xs.kill()
        assert not xs.alive
        for guest in one, two:
            guest.send("READ", strings("data"))
            with pytest.raises(XsTimeout):
                guest.receive(0.2)
        with xs.client(GUEST) as late, pytest.raises(XsTimeout):
            late.call("READ", strings("data"), timeout=0.2)
        xs.start()
        for guest in one, two:
            with pytest.raises(XsEOF):
                guest.receive()


def test_pause_and_resume(xs: RealXenstored) -> None:
    for _ in range(3):
        with xs.client() as dom0, clients(xs, 2) as guests:
            xs.pause()
            everyone = (dom0, *guests)
            sent = [client.send("READ", strings(f"{HOME}/data")) for client in everyone]
            for client in everyone:
                with pytest.raises(XsTimeout):
                    client.receive(0.1)
            xs.resume()
            for client, req_id in zip(everyone, sent, strict=True):
                assert client.reply(req_id) == b""


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_paused_daemon_ends(kind: str) -> None:
    with RealXenstored(kind) as daemon:
        daemon.pause()
        daemon.restart()
        daemon.pause()
        process = daemon.process
    assert process
    assert process.returncode is not None


def test_more_requests_than_may_be_outstanding_wait(xs: RealXenstored) -> None:
    with clients(xs, 3) as guests:
        xs.pause()
        sent = [[g.send("READ", strings("data")) for _ in range(100)] for g in guests]
        xs.resume()
        for guest, req_ids in zip(guests, sent, strict=True):
            for req_id in req_ids:
                assert guest.reply(req_id) == b""


# ------------------------------------------------------------------------------------- domains


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_many_domains(kind: str) -> None:
    domids = range(1, 41)
    with RealXenstored(kind, guests=domids) as daemon, contextlib.ExitStack() as stack:
        daemon.populate(range(1, 101), introduce=True, small=True)
        with daemon.client() as dom0:
            assert all(dom0.introduced(domid) for domid in range(1, 101))
            guests = [stack.enter_context(daemon.client(domid)) for domid in domids]
            for guest in guests:
                guest.watch("data", "token")
                assert guest.event() == ("data", "token")
            # A burst of wake-ups for all of them.
            for reply in dom0.pipeline(
                ("WRITE", strings(f"/local/domain/{domid}/data") + b"1") for domid in domids
            ):
                assert reply == b"OK\0"
            for guest in guests:
                assert guest.event() == ("data", "token")
            daemon.destroy_domain(1)
            assert not os.path.exists(f"{daemon.dir}/guest.1.sock")
            daemon.restart()
            assert daemon.guest_socket(2)
            with pytest.raises(KeyError):
                daemon.guest_socket(1)


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_wake_ups_are_not_lost_while_others_are_slow(kind: str) -> None:
    """More wake-ups under way, to domains that do not take them, than the daemon may send."""
    slow = range(1000, 1100)
    with RealXenstored(kind, guests=(GUEST,)) as daemon, contextlib.ExitStack() as stack:
        furnish(daemon)
        for domid in slow:
            daemon.create_domain(domid)
        deaf = [stack.enter_context(DeafDomain(daemon, domid)) for domid in slow]
        daemon.introduce(*slow)
        with daemon.client(GUEST) as guest:
            for _ in range(8):
                for domain in deaf:
                    domain.ask()
            for _ in range(20):
                assert guest.read("data") == b""
        for domain in deaf:
            assert select.select([domain.evtchn], [], [], 60.0)[0]


class DeafDomain:
    """A domain that asks, but takes neither wake-ups nor replies."""

    def __init__(self, daemon: RealXenstored, domid: int) -> None:
        self._directory, self._domid = daemon.dir, domid
        self._ring = Ring(f"{daemon.dir}/ring.{domid}")
        self.evtchn = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.evtchn.settimeout(60.0)
        self.evtchn.bind(f"{daemon.dir}/evtchn.{domid}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.evtchn.close()
        self._ring.close()

    def ask(self) -> None:
        request = HEADER.pack(OPS["GET_DOMAIN_PATH"], 1, 0, 2) + b"1\0"
        assert self._ring.put(request) == len(request)
        self.evtchn.sendto(struct.pack("=II", self._domid, GUEST_PORT), f"{self._directory}/evtchn")


# ----------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_directory_of_ones_own(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "xs"
    for _ in range(2):
        with RealXenstored(kind, guests=(GUEST,), directory=directory) as daemon:
            assert daemon.socket == str(directory / "run" / "socket")
            daemon.restart()
            assert daemon.socket == str(directory / "run" / "socket")
            with daemon.client(GUEST) as guest:
                assert guest.domain_path(GUEST) == HOME
        assert not directory.exists()
    (tmp_path / "file").touch()
    daemon = RealXenstored(kind, directory=tmp_path)
    with pytest.raises(FileExistsError):
        daemon.start()
    daemon.close()
    assert (tmp_path / "file").exists()


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shim.DAEMONS, "C", shim.find_daemon("xenstored", None, "/nonexistent"))
    with pytest.raises(MissingProgramError, match=r"xen-utils-4\.17"):
        RealXenstored("C")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingProgramError, match="gcc"):
        shim.build_shim.__wrapped__()


def test_the_newest_daemon_is_found(tmp_path: Path) -> None:
    for version in "4.9", "4.17", "4.20":
        directory = tmp_path / f"xen-{version}" / "bin"
        directory.mkdir(parents=True)
        (directory / "xenstored").touch()
    (tmp_path / "xen-4.21" / "bin").mkdir(parents=True)
    newest = shim.Daemon(f"{tmp_path}/xen-4.20/bin/xenstored", (4, 20))
    assert shim.find_daemon("xenstored", None, f"{tmp_path}/xen-*/bin") == newest


def test_a_daemon_can_be_chosen() -> None:
    assert shim.find_daemon("xenstored", "4.22:/opt/x") == shim.Daemon("/opt/x", (4, 22))
    for wrong in "/opt/x", "4:/opt/x", "4.22:":
        with pytest.raises(ValueError, match="VERSION:PROGRAM"):
            shim.find_daemon("xenstored", wrong)


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_daemon_that_does_not_start_says_why(kind: str) -> None:
    daemon = RealXenstored(kind, options=["--help"])
    with pytest.raises(RuntimeError, match=r"exit code 0(.|\n)*--no-fork"):
        daemon.start()
    daemon.close()
