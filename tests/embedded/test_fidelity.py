"""The embedded store behaves like the real daemons.

One table of scenarios runs against all three, and random requests against the embedded store and
the C daemon side by side.  The tests send real bytes over real sockets.  TIMEOUT bounds each wait,
and nothing sleeps: the reply to a later request on a connection shows that all its events have come.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scenarios import (
    CONNECTIONS,
    E2BIG,
    EACCES,
    EINVAL,
    ENOENT,
    ENOSPC,
    GUESTS_PATHS,
    HOMES,
    OK,
    OWN_QUOTAS,
    QUOTA_NAMES,
    SCENARIOS,
    SMALLER_RECORD,
    Ask,
    Close,
    Create,
    Destroy,
    DestroyTarget,
    Differs,
    Error,
    Event,
    Many,
    Order,
    Oversize,
    Part,
    Reply,
    Scenario,
    Step,
    Told,
    changed,
    end,
    node,
    set_perms,
    start,
)
from tests.support.xenstored.harness import (
    DAEMONS,
    XENSTORE_CONTROL,
    RealXenstored,
    XsClient,
    XsEOF,
    XsError,
)
from xsfs.embedded.server import EmbeddedStore
from xsfs.xenstore import protocol
from xsfs.xenstore.protocol import HEADER, Op

TIMEOUT = 60.0
KINDS = ("embedded", "C", "ocaml")
MODEL = (4, 17)
"""The version of Xen whose C xenstored is the embedded store's model."""
GUESTS = (7, 8)

T = TypeVar("T")


# ------------------------------------------------------------------------------ the kinds of store


class Backend(Protocol):
    """One store, fresh, with the domains GUESTS."""

    def connect(self, domid: int) -> XsClient: ...
    def create(self, domid: int) -> None: ...
    def destroy(self, domid: int) -> None: ...
    def destroy_target(self, domid: int) -> None: ...
    def socket(self, domid: int) -> str: ...


class Embedded:
    """The embedded store, in a thread of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ready: queue.Queue[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = queue.Queue()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))
        self._thread.start()
        self._token, self._scope = self._ready.get(timeout=TIMEOUT)

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._store = EmbeddedStore(nursery, populate=False)
            self._nursery = nursery
            for domid in (0, *GUESTS):
                await self._listen(domid)
            self._ready.put((trio.lowlevel.current_trio_token(), nursery.cancel_scope))

    async def _listen(self, domid: int) -> None:
        await self._nursery.start(self._store.listen, self.socket(domid), domid)

    def socket(self, domid: int) -> str:
        return str(self._directory / f"{domid}.sock")

    def connect(self, domid: int) -> XsClient:
        return XsClient(self.socket(domid), TIMEOUT)

    def create(self, domid: int) -> None:
        trio.from_thread.run_sync(self._store.introduce, domid, trio_token=self._token)

    def destroy(self, domid: int) -> None:
        trio.from_thread.run_sync(self._store.destroy, domid, trio_token=self._token)

    destroy_target = destroy

    def close(self) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        assert os.listdir(self._directory) == []


class Real:
    def __init__(self, daemon: RealXenstored) -> None:
        self._daemon = daemon

    def socket(self, domid: int) -> str:
        return self._daemon.guest_socket(domid) if domid else self._daemon.socket

    def connect(self, domid: int) -> XsClient:
        return self._daemon.client(domid or None, TIMEOUT)

    def create(self, domid: int) -> None:
        if domid in GUESTS:
            self._daemon.add_guest(domid)
        else:
            self._daemon.create_domain(domid)
            self._daemon.introduce(domid)

    def destroy(self, domid: int) -> None:
        self._daemon.destroy_domain(domid)
        # The daemon hears of it through its event channel, not through the socket.
        with self._daemon.client(timeout=TIMEOUT) as dom0:
            deadline = time.monotonic() + TIMEOUT
            while dom0.introduced(domid):
                assert time.monotonic() < deadline

    def destroy_target(self, domid: int) -> None:
        self._daemon.destroy_domain(domid)
        with self._daemon.client(timeout=TIMEOUT) as dom0:
            deadline = time.monotonic() + TIMEOUT
            if self._daemon.kind == "ocaml":
                while dom0.introduced(domid):
                    assert time.monotonic() < deadline
                return
            # The C daemon goes on reporting it as introduced, and refuses RESUME.
            while True:
                dom0.send("RESUME", b"%d\0" % domid)
                if dom0.receive()[0] == Op.ERROR:
                    return
                assert time.monotonic() < deadline


@contextlib.contextmanager
def backend(kind: str, directory: Path) -> Iterator[Backend]:
    if kind == "embedded":
        embedded = Embedded(directory)
        try:
            yield embedded
        finally:
            embedded.close()
    else:
        with RealXenstored(kind, guests=GUESTS) as daemon:
            yield Real(daemon)


# -------------------------------------------------------------------------------------- the runner


class Run:
    """One scenario on one store."""

    def __init__(self, store: Backend, kind: str) -> None:
        self._store = store
        self._kind = kind
        self.version = DAEMONS[kind].version if kind in DAEMONS else MODEL
        self._clients: dict[str, XsClient] = {}
        self._transactions: dict[str, int] = {}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def client(self, who: str) -> XsClient:
        if who not in self._clients:
            self._clients[who] = self._store.connect(CONNECTIONS[who])
        return self._clients[who]

    def expected(self, value: T | Differs[T]) -> T:
        return value.of(self._kind, self.version) if isinstance(value, Differs) else value

    def expected_reply(self, value: Reply | Differs[Reply]) -> Reply:
        return value.of(self._kind, self.version) if isinstance(value, Differs) else value

    def ask(self, step: Ask) -> None:
        client = self.client(step.who)
        op, payload = step.request
        tx_id = self._transactions[step.tx] if step.tx else 0
        req_id = client.send(op, payload, tx_id)
        got_op, got_req_id, got_tx_id, got = self.receive_reply(client)
        assert got_req_id == req_id
        # The OCaml daemon forgets the tx_id of a WATCH.  A guest's kernel puts that right.
        watches = op in (Op.WATCH, Op.UNWATCH) and CONNECTIONS[step.who] == 0
        forgets = self._kind == "ocaml" and watches
        assert got_tx_id == (0 if forgets else tx_id)
        expected = self.expected_reply(step.reply)
        if step.starts and not isinstance(expected, Error):
            assert got_op == op
            self._transactions[step.starts] = int(got.rstrip(b"\0"))
        else:
            check_reply(op, got_op, got, expected)

    @staticmethod
    def receive_reply(client: XsClient) -> tuple[int, int, int, bytes]:
        while (message := client.receive())[0] == Op.WATCH_EVENT or not message[1]:
            assert message[1:3] == (0, 0)
            if message[0] == Op.ERROR:
                client.events.append((message[3].rstrip(b"\0").decode(), ""))
                continue
            path, token, rest = message[3].split(b"\0")
            assert rest == b""
            client.events.append((path.decode(), token.decode()))
        return message

    def many(self, step: Many) -> None:
        tx_id = self._transactions[step.tx] if step.tx else 0
        expected = self.expected_reply(step.reply)
        for request, got in zip(
            step.requests,
            self.client(step.who).pipeline((op, payload, tx_id) for op, payload in step.requests),
            strict=True,
        ):
            if isinstance(got, XsError):
                check_reply(request.op, Op.ERROR, got.name.encode() + b"\0", expected)
            else:
                check_reply(request.op, request.op, got, expected)

    def events(self, who: str) -> tuple[Event, ...]:
        """The events of a connection: all that the requests so far have caused."""
        client = self.client(who)
        client.send("GET_DOMAIN_PATH", b"0\0")
        self.receive_reply(client)
        found = tuple(client.events)
        client.events.clear()
        return found

    def told(self, step: Told) -> None:
        assert self.events(step.who) == self.expected(step.events)

    def order(self, step: Order) -> None:
        client = self.client(step.who)
        client.send(*step.request)
        client.send("GET_DOMAIN_PATH", b"0\0")
        ops = [client.receive()[0] for _ in range(3)]
        order = [Op.WATCH_EVENT, step.request.op]
        if not self.expected(step.event_first):
            order.reverse()
        assert ops == [*order, Op.GET_DOMAIN_PATH]

    def oversize(self, step: Oversize) -> None:
        client = self._clients.pop(step.who, None) or self.client(step.who)
        client.sock.sendall(HEADER.pack(Op.READ, 1, 0, 4097) + b"/" * 4097)
        if self.expected(step.ends):
            with pytest.raises(XsEOF):
                client.receive()
        else:
            assert client.receive()[0] == Op.ERROR
        client.close()

    def shut(self, step: Close) -> None:
        self._clients.pop(step.who).close()

    def step(self, step: Step) -> None:
        match step:
            case Ask():
                self.ask(step)
            case Many():
                self.many(step)
            case Told():
                self.told(step)
            case Order():
                self.order(step)
            case Oversize():
                self.oversize(step)
            case Create():
                self._store.create(step.domid)
            case Destroy():
                self._store.destroy(step.domid)
            case DestroyTarget():
                self._store.destroy_target(step.domid)
            case Close():
                self.shut(step)

    def finish(self) -> None:
        for who in self._clients:
            assert self.events(who) == (), who


def check_reply(op: int, got_op: int, got: bytes, expected: Reply) -> None:
    if isinstance(expected, Error):
        assert (got_op, got) == (Op.ERROR, expected.name.encode() + b"\0")
    elif isinstance(expected, Part):
        assert got_op == op, got
        generation, _, part = got.partition(b"\0")
        assert generation.isdigit()
        assert part == expected.names
    else:
        assert (got_op, got) == (op, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, kind: str, tmp_path: Path) -> None:
    with backend(kind, tmp_path) as store:
        run = Run(store, kind)
        try:
            for number, step in enumerate((*HOMES, *SCENARIOS[name])):
                try:
                    run.step(step)
                except Exception as error:
                    error.add_note(f"step {number - len(HOMES)}: {step!r:.300}")
                    raise
            run.finish()
        finally:
            run.close()


# ----------------------------------------------------------------------------------- CONTROL


def set_quota(name: str, value: int, reply: Reply | Differs[Reply] = OK) -> Ask:
    return Ask("dom0", (Op.CONTROL, b"quota\0set\0%b\0%d\0" % (name.encode(), value)), reply)


def own(before: Reply, after: Reply) -> Differs[Reply]:
    """The replies until domains have quotas of their own, and from then on."""
    return changed(before, after, OWN_QUOTAS, (4, 22))


EVENTS: tuple[Event, ...] = tuple(("@releaseDomain", str(n)) for n in range(3))

QUOTAS: Scenario = (
    set_quota("watches", 1),
    *(Ask("guest", protocol.watch(b"@releaseDomain", b"%d" % n)) for n in range(2)),
    Ask("guest", protocol.watch(b"@releaseDomain", b"2"), own(E2BIG, OK)),
    Told("guest", Differs(EVENTS[:2], EVENTS[:2], {(4, 22): (EVENTS, OWN_QUOTAS)})),
    set_quota("transactions", 1),
    *(start("guest", name) for name in ("first", "second")),
    replace(start("guest", "one more"), reply=own(ENOSPC, OK)),
    end("guest", name="first"),
    set_quota("transaction-nodes", 2),
    start("guest", "third"),
    Ask("guest", protocol.read(b"data"), b"", tx="third"),
    Ask("guest", protocol.read(b"name"), b"g7", tx="third"),
    Ask("guest", protocol.read(b""), EINVAL, tx="third"),
    Ask("guest", protocol.read(b"data/missing"), own(ENOSPC, ENOENT), tx="third"),
    set_quota("nodes", 2),
    Ask("guest", protocol.mkdir(b"data/a")),
    Ask("guest", protocol.mkdir(b"data/b"), own(ENOSPC, OK)),
    set_quota("node-size", 40),
    Ask("guest", protocol.write(b"data/a", b"x" * 7)),
    Ask("guest", protocol.write(b"data/a", b"x" * 8), changed(ENOSPC, OK, SMALLER_RECORD)),
    Ask("guest", protocol.write(b"data/a", b"x" * 17), own(ENOSPC, OK)),
    Ask("dom0", protocol.write(b"/local/domain/7/data/a", b"x" * 8)),
    set_quota("node-size", 2048),
    set_quota("permissions", 1, changed(OK, EINVAL, QUOTA_NAMES)),
    set_quota("node-permissions", 1, changed(EINVAL, OK, QUOTA_NAMES)),
    Ask("guest", set_perms(b"data/a", "n7")),
    Ask("guest", set_perms(b"data/a", "n7 r8"), own(ENOSPC, OK)),
    set_quota("path-max", 10),
    Ask("dom0", protocol.mkdir(b"/234567890")),
    Ask("dom0", protocol.mkdir(b"/2345678901"), changed(EINVAL, OK, GUESTS_PATHS)),
    Ask("guest", protocol.read(b"data/a"), b"x" * 8),
    Ask("guest", protocol.watch(b"/2345678901", b"t"), own(EINVAL, OK)),
    Told(
        "guest",
        Differs[tuple[Event, ...]]((), (), {(4, 22): ((("/2345678901", "t"),), OWN_QUOTAS)}),
    ),
    *(set_quota(*wrong, EINVAL) for wrong in (("nodes", 0), ("nodes", -1), ("node", 1))),
    set_quota("nodes", 99999999999999999999, EINVAL),
    set_quota("nodes", 1 << 31, EINVAL),
    *(
        Ask("dom0", (Op.CONTROL, payload), EINVAL)
        for payload in (
            b"",
            b"quota",
            b"quota\0set\0",
            b"quota\0set\0nodes\0",
            b"quota\x007\x008\0",
        )
    ),
    Ask("dom0", (Op.CONTROL, b"quota\x0099\0"), ENOENT),
    Ask("guest", (Op.CONTROL, b"quota\0"), EACCES),
)


@pytest.mark.parametrize("kind", ["embedded", "C"])
def test_quotas_can_be_set(kind: str, tmp_path: Path) -> None:
    with backend(kind, tmp_path) as store:
        run = Run(store, kind)
        for number, step in enumerate((*HOMES, *QUOTAS)):
            try:
                run.step(step)
            except Exception as error:
                error.add_note(f"step {number - len(HOMES)}: {step!r:.300}")
                raise
        run.finish()
        run.close()


def xenstore_control(path: str, *arguments: str) -> str:
    """The output of the real program; empty if it fails."""
    environment = os.environ | {"XENSTORED_PATH": path}
    found = subprocess.run(
        [XENSTORE_CONTROL, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=TIMEOUT,
    )
    assert (found.returncode == 0) is bool(found.stdout)
    return found.stdout


@pytest.mark.parametrize("kind", ["embedded", "C"])
def test_xenstore_control(kind: str, tmp_path: Path) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with backend(kind, sockets) as store:
        run = Run(store, kind)
        for step in (*HOMES, Ask("guest", protocol.watch(b"data", b"t")), start("guest")):
            run.step(step)
        path = store.socket(0)
        assert xenstore_control(path, "check") == "OK\n"
        assert xenstore_control(path, "print", "hello") == "OK\n"
        assert xenstore_control(path, "quota", "set", "nodes", "1234") == "OK\n"
        settings = xenstore_control(path, "quota").splitlines()
        assert settings[0] == "Quota settings:"
        differ = {
            "transactions     :       10 Transactions per domain",
            "permissions      :        5 Max. number of permissions per node",
        }
        if run.version >= (4, 20):
            differ = {
                "transactions     :       10 Active transactions per domain",
                "node-permissions :        5 Max. number of permissions per node",
            }
        assert {
            *differ,
            "nodes            :     1234 Nodes per domain",
            "watches          :      128 Watches per domain",
            "transaction-nodes:     1024 Max. number of accessed nodes per transaction",
            "node-size        :     2048 Max. size of a node",
            "path-max         :     2048 Max. length of a node path",
        } < set(settings)
        domain, *usage = xenstore_control(path, "quota", "7").splitlines()
        assert domain == "Domain 7:"
        # Since 4.20 C xenstored has other quotas between them, and adds the most that was used.
        used = {tuple(line.split()[:3]) for line in usage}
        assert {(name, ":", "1") for name in ("nodes", "watches", "transactions")} <= used
        # Since 4.20 with spaces instead of the tab, and more for quota.
        helps = {tuple(line.split()[:2]) for line in xenstore_control(path, "help").splitlines()}
        assert {("check",), ("print", "<string>"), ("memreport", "[<file>]"), ("help",)} < helps
        assert ("quota", "[set") in helps
        report = tmp_path / "report"
        for _ in range(2):
            size = report.stat().st_size if report.exists() else 0
            assert xenstore_control(path, "memreport", str(report)) == "OK\n"
            assert report.stat().st_size > size
        assert "connection" in report.read_text()
        for arguments in (
            ("memreport", str(tmp_path / "missing" / "report")),
            ("memreport", str(report), "more"),
            *(("check", "x"), ("help", "x"), ("print",), ("quota", "99")),
        ):
            assert xenstore_control(path, *arguments) == "", arguments
        assert run.events("guest") == (("data", "t"),)
        run.close()


# ------------------------------------------------------------------------- random requests, twice

STEPS = 60

NODES = (
    *(b"/w", b"/w/a", b"/w/a/b", b"/w/a/c", b"/w/b", b"data", b"data/a", b"data/a/b"),
    *(b"/w/a", b"/w/a/b", b"/local/domain/7/data/a"),
)
PATHS = (*NODES, *NODES, b"/", b"name", b"/local/domain/7", b"@releaseDomain", b"/bad//path")
PERMS = (
    *("n0", "n7", "n9", "r0", "b0", "w0", "n0 r7", "n0 b7", "n0 w7", "n7 r0", "n7 b9", "n9 b7"),
    *("b7 n9", "r9", "n0 r9 w7", "n0 n7 b7", "n0 r8", "n7 r1 r2 r3 r4 r5", "n99"),
)
VALUES = (b"", b"1", b"2", b"n\0ul", b"v" * 1990, b"v" * 2020)
MORTAL = 9
"""The domain that comes and goes."""

FIRST: Scenario = (
    Create(MORTAL),
    *node(b"/w", "b7 r9"),
    *node(b"/w/a", "n0 b7"),
    *node(b"/w/a/b", "n9 r7"),
    Ask("dom0", set_perms(b"@releaseDomain", "n0 r7")),
    *(Ask("dom0", protocol.watch(path, b"t")) for path in (b"/w/a", b"/", b"@releaseDomain")),
    *(
        Ask("second", protocol.watch(path, b"t"))
        for path in (b"/w/a/b", b"/w/b", b"@introduceDomain")
    ),
    *(Ask("guest", protocol.watch(path, b"t")) for path in (b"/w", b"data", b"data/a")),
    *(Ask("guest", protocol.watch(path, b"u")) for path in (b"/w/a", b"@releaseDomain")),
)
"""Nodes of all owners and watches of all kinds, so most steps cause events."""


@dataclass(frozen=True)
class Random:
    """A request.  `tx` picks one of the transactions that the connection has open (None: none)."""

    who: str
    request: tuple[int, bytes]
    tx: int | None = None


@dataclass(frozen=True)
class LifeOrDeath:
    """MORTAL starts to exist, or ends."""


def survivable(permissions: tuple[bytes, str]) -> bool:
    """When the domain that owns the root ends, xenstored loses its whole store."""
    path, perms = permissions
    return path != b"/" or perms[1:2] != str(MORTAL)


def weighted(*choices: tuple[int, st.SearchStrategy[T]]) -> st.SearchStrategy[T]:
    """One of the strategies, as often as its weight says.  (one_of() drops repetitions.)"""
    indices = [index for index, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(indices).flatmap(lambda index: choices[index][1])


def requests() -> st.SearchStrategy[tuple[int, bytes]]:
    path = st.sampled_from(PATHS)
    token = st.sampled_from((b"t", b"u"))
    reading = st.sampled_from((Op.READ, Op.DIRECTORY, Op.GET_PERMS))
    # SET_PERMS of special names is left to the table: xenstored forgets to set the error's name.
    permissions = st.tuples(st.sampled_from((*NODES, b"/")), st.sampled_from(PERMS))
    return weighted(
        (10, st.builds(protocol.write, path, st.sampled_from(VALUES))),
        (4, path.map(lambda path: (Op.RM, path + b"\0"))),
        (2, path.map(protocol.mkdir)),
        (4, permissions.filter(survivable).map(lambda pair: set_perms(*pair))),
        (3, st.builds(lambda op, path: (op, path + b"\0"), reading, path)),
        (1, st.builds(protocol.directory_part, path, st.integers(0, 9))),
        (1, st.builds(protocol.watch, path, token)),
        (1, st.builds(protocol.unwatch, path, token)),
        (6, st.just(protocol.transaction_start())),
        (6, st.just(protocol.transaction_end(True))),
        (1, st.just(protocol.transaction_end(False))),
    )


STEP: st.SearchStrategy[Random | LifeOrDeath] = weighted(
    (
        50,
        st.builds(
            Random,
            st.sampled_from(("dom0", "second", "guest")),
            requests(),
            st.sampled_from((None, 0, 1)),
        ),
    ),
    (1, st.builds(Random, st.just("guest"), st.just((Op.RESET_WATCHES, b"\0")))),
    (2, st.just(LifeOrDeath())),
)


class Side:
    """One of the two stores compared."""

    def __init__(self, store: Backend, kind: str) -> None:
        self._store = store
        self._run = Run(store, kind)
        for step in (*HOMES, *FIRST):
            self._run.step(step)
        self._open: dict[str, list[int]] = {"dom0": [], "second": [], "guest": []}
        self._generations: dict[bytes, bytes] = {}
        self._mortal = True

    def close(self) -> None:
        self._run.close()

    def step(self, step: Random | LifeOrDeath) -> object:
        """The reply and the events of each connection, which must agree on both sides."""
        seen: object = None
        if isinstance(step, Random):
            seen = self._ask(step)
        elif self._mortal:
            self._store.destroy(MORTAL)
        else:
            self._store.create(MORTAL)
        if isinstance(step, LifeOrDeath):
            self._mortal = not self._mortal
        return seen, [self._run.events(who) for who in self._open]

    def _ask(self, step: Random) -> object:
        client = self._run.client(step.who)
        op, payload = step.request
        started = self._open[step.who]
        tx_id = 0
        choice = 0 if op == Op.TRANSACTION_END else step.tx
        if started and choice is not None and op not in (Op.RESET_WATCHES, Op.TRANSACTION_START):
            tx_id = started[choice % len(started)]
        client.send(op, payload, tx_id, req_id=77)
        reply = self._run.receive_reply(client)
        if op == Op.TRANSACTION_START and reply[0] == op:
            started.append(int(reply[3].rstrip(b"\0")))
        elif op == Op.TRANSACTION_END and tx_id:
            started.remove(tx_id)
        elif op == Op.RESET_WATCHES:
            started.clear()
        elif op == Op.DIRECTORY_PART and reply[0] == op:
            return reply[:3], self._listing(payload, tx_id, reply[3])
        return reply

    def _listing(self, payload: bytes, tx_id: int, reply: bytes) -> object:
        """A part of a listing, and whether the generation differs from the last one outside of
        transactions.  The numbers themselves mean nothing."""
        generation, _, names = reply.partition(b"\0")
        path = payload.partition(b"\0")[0]
        changed = self._generations.get(path) != generation
        if not tx_id:
            self._generations[path] = generation
        return changed, names


@pytest.mark.skipif(
    DAEMONS["C"].version != MODEL, reason="the embedded store does what C xenstored 4.17 does"
)
@pytest.mark.quick_if(examples=[20])
@pytest.mark.parametrize("examples", [20, 200])
def test_random_requests(examples: int) -> None:
    run = given(steps=st.lists(STEP, min_size=STEPS // 2, max_size=STEPS))(take_both)
    settings(max_examples=examples, deadline=None)(run)()


def take_both(steps: list[Random | LifeOrDeath]) -> None:
    """The embedded store and C xenstored take the same steps."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = []
        for kind in ("embedded", "C"):
            side = Side(stack.enter_context(backend(kind, directory)), kind)
            stack.callback(side.close)
            sides.append(side)
        embedded, real = sides
        for number, step in enumerate(steps):
            assert embedded.step(step) == real.step(step), f"step {number}: {step}"
