"""The embedded store as a server: sockets, the end of connections, and clients that do not read.

The store and its clients run in one trio loop.  TIMEOUT bounds each test.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from tests.support.messages import Message, messages_of
from xsfs.embedded import server
from xsfs.embedded.client_connection import OUTPUT_HIGH, OUTPUT_MAX
from xsfs.embedded.server import EmbeddedStore
from xsfs.xenstore import protocol
from xsfs.xenstore.protocol import Op, Request

TIMEOUT = 60.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(TIMEOUT):
            await test()

    trio.run(bounded)


class Client:
    def __init__(self, sock: socket.socket) -> None:
        assert not sock.getblocking()
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._parser = protocol.Parser()
        self._received: deque[Message] = deque()

    async def send(self, *requests: Request, tx_id: int = 0) -> None:
        await self.stream.send_all(
            b"".join(protocol.encode(op, 5, tx_id, body) for op, body in requests)
        )

    async def receive(self) -> Message | None:
        """The next message; None at the end of the connection."""
        while not self._received:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self._received.extend(messages_of(self._parser, data))
        return self._received.popleft()

    async def ask(self, request: Request, tx_id: int = 0) -> bytes | str:
        """The reply's payload, or the name of the error."""
        await self.send(request, tx_id=tx_id)
        message = await self.receive()
        assert message is not None
        return protocol.decode_error(message.payload) if message.op == Op.ERROR else message.payload


@asynccontextmanager
async def serving(*, populate: bool = True) -> AsyncIterator[EmbeddedStore]:
    async with trio.open_nursery() as nursery:
        yield EmbeddedStore(nursery, populate=populate)
        nursery.cancel_scope.cancel()


async def in_turn(client: Client, requests: Iterable[Request]) -> None:
    for request in requests:
        assert await client.ask(request) == b"OK\0"


# ------------------------------------------------------------------------------------ connections


def test_a_connection_only_while_its_nursery_runs() -> None:
    async def test() -> None:
        async with serving() as store:
            client = Client(store.connect())
            assert await client.ask(protocol.read(b"name")) == b"Domain-0"
        assert await client.receive() is None
        with pytest.raises(RuntimeError):
            store.connect()

    run(test)


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def test_its_nursery_ends_all_it_started() -> None:
    async def test() -> None:
        before = tasks()
        async with serving() as store:
            clients = [Client(store.connect(domid)) for domid in (0, 0, 7)]
            assert await clients[0].ask(protocol.read(b"domid")) == b"0"
            assert tasks() == before + len(clients)
        for client in clients:
            assert await client.receive() is None
        assert tasks() == before

    run(test)


def test_arguments_that_are_no_single_string() -> None:
    async def test() -> None:
        async with serving() as store:
            client = Client(store.connect())
            ops = (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.MKDIR, Op.RM, Op.GET_DOMAIN_PATH)
            for op in ops:
                for payload in b"", b"/tool", b"/tool\0x", b"/tool\0\0":
                    assert await client.ask(Request(op, payload)) == "EINVAL"
            assert await client.ask(Request(Op.TRANSACTION_START, b"")) == b"1\0"

    run(test)


def test_requests_in_small_pieces() -> None:
    async def test() -> None:
        async with serving() as store:
            client = Client(store.connect())
            op, body = protocol.write(b"/a", bytes(range(256)))
            for byte in protocol.encode(op, 9, 0, body):
                await client.stream.send_all(bytes([byte]))
            assert await client.receive() == Message(op, 9, 0, b"OK\0")
            assert await client.ask(protocol.read(b"/a")) == bytes(range(256))

    run(test)


def test_requests_sent_at_once_are_answered_in_order() -> None:
    async def test() -> None:
        async with serving() as store:
            client = Client(store.connect())
            count = 3000
            requests = [protocol.write(b"/a", b"%d" % n) for n in range(count)]
            reads = [protocol.read(b"/a")] * count
            mixed = [request for pair in zip(requests, reads, strict=True) for request in pair]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, *mixed)
                for number in range(count):
                    assert await client.receive() == Message(Op.WRITE, 5, 0, b"OK\0")
                    assert await client.receive() == Message(Op.READ, 5, 0, b"%d" % number)

    run(test)


def test_replies_reach_a_client_which_has_stopped_sending() -> None:
    async def test() -> None:
        async with serving() as store:
            client = Client(store.connect())
            await client.send(protocol.write(b"/a", b"1"), protocol.read(b"/a"))
            await client.stream.send_eof()
            assert await client.receive() == Message(Op.WRITE, 5, 0, b"OK\0")
            assert await client.receive() == Message(Op.READ, 5, 0, b"1")
            assert await client.receive() is None

    run(test)


def test_a_request_too_long_ends_the_connection_and_no_other() -> None:
    async def test() -> None:
        async with serving() as store:
            for domid in 0, 7:
                bad, good = Client(store.connect(domid)), Client(store.connect(domid))
                await bad.send(protocol.read(b"name"), Request(Op.READ, b"x" * 4097))
                message = await bad.receive()
                assert message is not None
                assert message.op == Op.READ
                assert await bad.receive() is None
                assert await good.ask(protocol.read(b"domid")) == b"%d" % domid

    run(test)


# -------------------------------------------------------------------------------------- fairness


def test_clients_that_flood_leave_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock takes as long as a fifth of the time that one round may last."""
    ticks = itertools.count(0.0, server.TURN / 5)
    monkeypatch.setattr(server, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    async def test() -> None:
        async with serving() as store:
            op, body = protocol.write(b"/flood", b"x")
            flood = protocol.encode(op, 5, 0, body) * 2000
            reply = len(protocol.encode(op, 5, 0, b"OK\0"))
            sockets = [store.connect() for _ in range(4)]
            other = Client(store.connect())

            def replies() -> int:
                """How many requests the store has handled since the last call."""
                received = 0
                for sock in sockets:
                    with suppress(BlockingIOError):
                        received += len(sock.recv(1 << 20))
                return received // reply

            for sock in sockets:
                assert sock.send(flood) > 1000 * reply
            for _ in range(20):
                assert await other.ask(protocol.read(b"/tool")) == b""
                # A round in which the request came, the round of its reply, and what trio does
                # between the reply and this task.
                assert 0 < replies() <= 4 * 3 * 3

    run(test)


FLOOD = """
import select, socket, sys
sockets = {number: socket.socket(fileno=number) for number in map(int, sys.argv[2:])}
poll = select.poll()
for number in sockets:
    poll.register(number)
while True:
    for number, ready in poll.poll():
        if ready & select.POLLIN and not sockets[number].recv(1 << 20):
            sys.exit()
        if ready & select.POLLOUT:
            sockets[number].send(bytes.fromhex(sys.argv[1]) * 100, socket.MSG_DONTWAIT)
"""
"""Sends a message over sockets, as often as the other ends allow, and reads the replies."""


def test_four_floods_hold_up_other_tasks_for_two_milliseconds_at_most() -> None:
    """By the clock of the thread, which other processes cannot make late."""
    op, body = protocol.write(b"/flood", b"x")
    message = protocol.encode(op, 5, 0, body)

    async def test() -> None:
        async with serving() as store:
            sockets = [store.connect() for _ in range(4)]
            descriptors = [str(sock.fileno()) for sock in sockets]
            flood = subprocess.Popen(
                [sys.executable, "-c", FLOOD, message.hex(), *descriptors],
                pass_fds=[sock.fileno() for sock in sockets],
            )
            with flood, ExitStack() as stack:
                stack.callback(flood.kill)
                other = Client(store.connect())
                while await other.ask(protocol.read(b"/flood")) != b"x":
                    await trio.sleep(0.01)
                times = []
                for _ in range(200):
                    assert await other.ask(protocol.read(b"/flood")) == b"x"
                    start = time.thread_time()
                    await trio.lowlevel.checkpoint()
                    times.append(time.thread_time() - start)
            times.sort()
            assert times[190] < 0.002

    run(test)


def test_a_report_does_not_wait_for_a_reader_of_a_fifo(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving() as store:
            client = Client(store.connect())
            os.mkfifo(tmp_path / "fifo")
            payload = b"memreport\0%b\0" % os.fsencode(tmp_path / "fifo")
            assert await client.ask(Request(Op.CONTROL, payload)) == "EINVAL"
            assert await client.ask(Request(Op.CONTROL, b"memreport\0")) == b"OK\0"

    run(test)


# ---------------------------------------------------------------------------- clients that do not read


def test_a_client_that_does_not_read_replies_is_not_served_further() -> None:
    async def test() -> None:
        async with serving() as store:
            sock = store.connect()
            other = Client(store.connect())
            await in_turn(other, [protocol.write(b"/a", b"x" * 4000)])
            op, body = protocol.read(b"/a")
            request = protocol.encode(op, 1, 0, body)
            sent = refusals = 0
            # The store takes fewer requests than this; the buffers of the sockets bound their number.
            while refusals < 100:
                assert sent < OUTPUT_HIGH + (4 << 20)
                try:
                    sent += sock.send(request * 100)
                    refusals = 0
                except BlockingIOError:
                    refusals += 1
                assert await other.ask(protocol.read(b"/a")) == b"x" * 4000
            slow = Client(sock)
            for _ in range(sent // len(request)):
                message = await slow.receive()
                assert message is not None
                assert message.payload == b"x" * 4000

    run(test)


def test_few_replies_are_kept_for_a_client_that_does_not_read_them() -> None:
    async def test() -> None:
        async with serving() as store:
            await Client(store.connect()).ask(protocol.write(b"/a", b"x" * 4000))
            op, body = protocol.read(b"/a")
            sockets = [store.connect() for _ in range(4)]
            for sock in sockets:
                sock.send(protocol.encode(op, 5, 0, body) * 2000)
            await trio.testing.wait_all_tasks_blocked()
            full = [each for each in store._requests.connections if each.full]
            assert len(full) == len(sockets)
            assert all(len(each.unsent) < OUTPUT_HIGH + 5000 for each in full)

    run(test)


def test_a_client_that_does_not_read_events_is_dropped_and_delays_no_other() -> None:
    async def test() -> None:
        async with serving() as store:
            slow, writer, other = (Client(store.connect()) for _ in range(3))
            assert await slow.ask(protocol.watch(b"/w", b"t" * 2000)) == b"OK\0"
            assert await other.ask(protocol.watch(b"/w", b"o")) == b"OK\0"
            count = 2 * OUTPUT_MAX // 2000
            for number in range(count):
                assert await writer.ask(protocol.write(b"/w", b"%d" % number)) == b"OK\0"
                path = b"/w/%d" % number
                assert await writer.ask(protocol.write(path, b"")) == b"OK\0"
            received = 0
            while (message := await slow.receive()) is not None:
                assert message.op == Op.WATCH_EVENT
                received += 1
            assert 0 < received < count
            assert await other.receive() is not None

    run(test)


def test_a_queued_event_is_not_queued_again() -> None:
    async def test() -> None:
        async with serving() as store:
            slow, writer = Client(store.connect()), Client(store.connect())
            await slow.send(protocol.watch(b"/w", b"t" * 2000), protocol.watch(b"/w", b"u" * 2000))
            # Far more than OUTPUT_MAX, if all were queued.
            for _ in range(2 * OUTPUT_MAX // 2000):
                assert await writer.ask(protocol.write(b"/w", b"")) == b"OK\0"
            await slow.send(protocol.read(b"/tool"))
            while True:
                message = await slow.receive()
                assert message is not None
                if message.op == Op.READ:
                    break

    run(test)


# ---------------------------------------------------------------------------------------- domains


def test_a_guest_has_a_home() -> None:
    async def test() -> None:
        async with serving() as store:
            guest, dom0 = Client(store.connect(7)), Client(store.connect())
            assert await guest.ask(protocol.read(b"domid")) == b"7"
            assert await guest.ask(protocol.get_perms(b"domid")) == b"n0\0r7\0"
            assert await guest.ask(protocol.get_perms(b"data")) == b"n7\0"
            assert await guest.ask(protocol.write(b"data/x", b"1")) == b"OK\0"
            assert await guest.ask(protocol.write(b"name", b"1")) == "EACCES"
            assert await guest.ask(protocol.directory(b"/")) == "EACCES"
            vm = await guest.ask(protocol.read(b"vm"))
            assert isinstance(vm, bytes)
            assert await guest.ask(protocol.read(vm + b"/uuid")) == vm.removeprefix(b"/vm/")
            assert await dom0.ask(protocol.is_domain_introduced(7)) == b"T\0"
            again = Client(store.connect(7))
            assert await again.ask(protocol.read(b"data/x")) == b"1"

    run(test)


def test_without_first_nodes() -> None:
    async def test() -> None:
        async with serving(populate=False) as store:
            dom0, guest = Client(store.connect()), Client(store.connect(7))
            assert await dom0.ask(protocol.directory(b"/")) == b"tool\0"
            assert await guest.ask(protocol.read(b"domid")) == "EACCES"

    run(test)


def test_domains_come_and_go() -> None:
    async def test() -> None:
        async with serving() as store:
            dom0 = Client(store.connect())
            for name in b"@introduceDomain", b"@releaseDomain":
                assert await dom0.ask(protocol.watch(name, b"t")) == b"OK\0"
                assert await dom0.receive() is not None
            store.introduce(9)
            event = await dom0.receive()
            assert event is not None
            assert event.payload == b"@introduceDomain\0t\0"
            guest = Client(store.connect(7))
            event = await dom0.receive()
            assert event is not None
            assert event.payload == b"@introduceDomain\0t\0"
            assert await guest.ask(protocol.watch(b"data", b"t")) == b"OK\0"
            unused = Client(store.connect(7))
            store.destroy(7)
            event = await dom0.receive()
            assert event is not None
            assert event.payload == b"@releaseDomain\0t\0"
            assert await dom0.ask(protocol.read(b"/local/domain/7/data")) == "ENOENT"
            assert await dom0.ask(protocol.read(b"/local/domain/7/name")) == b"domain-7"
            while await guest.receive() is not None:
                pass
            assert await unused.receive() is None
            with pytest.raises(ValueError, match="0"):
                store.destroy(0)

    run(test)


def test_introduce_makes_a_domain() -> None:
    async def test() -> None:
        async with serving() as store:
            dom0 = Client(store.connect())
            request = protocol.domain_request(Op.INTRODUCE, 9, 1, 1)
            assert await dom0.ask(request) == b"OK\0"
            assert await dom0.ask(protocol.is_domain_introduced(9)) == b"T\0"
            reserved = protocol.domain_request(Op.INTRODUCE, 0x7FF0, 1, 1)
            assert await dom0.ask(reserved) == "EINVAL"

    run(test)


def test_quotas_hold_for_a_domain_however_many_connections_it_has() -> None:
    async def test() -> None:
        async with serving() as store:
            clients = [Client(store.connect(7)) for _ in range(12)]
            start = protocol.transaction_start()
            for client in clients[:11]:
                assert await client.ask(start) == b"1\0"
            assert await clients[11].ask(start) == "ENOSPC"
            assert await Client(store.connect(8)).ask(start) == b"1\0"
            for client, commit in (clients[1], True), (clients[2], False):
                assert await client.ask(protocol.transaction_end(commit), 1) == b"OK\0"
                assert await client.ask(start) == b"2\0"
            assert await clients[11].ask(start) == "ENOSPC"
            await clients[0].stream.aclose()
            while await clients[11].ask(start) == "ENOSPC":
                await trio.lowlevel.checkpoint()

    run(test)


# ---------------------------------------------------------------------------------- a socket file


async def connected(path: str) -> Client:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    sock.connect(path)
    return Client(sock)


def test_listen(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            store = EmbeddedStore(nursery)
            await nursery.start(store.listen, path)
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            first, second = await connected(path), await connected(path)
            assert await first.ask(protocol.write(b"/a", b"1")) == b"OK\0"
            assert await second.ask(protocol.read(b"/a")) == b"1"
            with pytest.raises(OSError, match="in use") as caught:
                await EmbeddedStore(nursery).listen(path)
            assert caught.value.errno == errno.EADDRINUSE
            assert await first.ask(protocol.read(b"/a")) == b"1"
            nursery.cancel_scope.cancel()
        assert not os.path.exists(path)
        assert await first.receive() is None

    run(test)


def test_listen_for_a_guest(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            store = EmbeddedStore(nursery)
            await nursery.start(store.listen, path, 7)
            assert await (await connected(path)).ask(protocol.read(b"domid")) == b"7"
            nursery.cancel_scope.cancel()

    run(test)


def test_listen_replaces_a_socket_file_without_a_listener(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            store = EmbeddedStore(nursery)
            await nursery.start(store.listen, path)
            assert await (await connected(path)).ask(protocol.read(b"domid")) == b"0"
            nursery.cancel_scope.cancel()

    run(test)


def test_listen_leaves_other_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            with pytest.raises(OSError, match="in use"):
                await EmbeddedStore(nursery).listen(str(path))
        assert path.read_text() == "precious"

    run(test)


def test_listen_does_not_remove_its_successor_s_file(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            store = EmbeddedStore(nursery)
            await nursery.start(store.listen, path)
            os.unlink(path)
            with socket.socket(socket.AF_UNIX) as successor:
                successor.bind(path)
            nursery.cancel_scope.cancel()
        assert os.path.exists(path)

    run(test)
