"""The kernel's device, as far as it can be had without Xen: a pair of sockets that keep messages apart.

What the real one does is checked on real Xen (tests/xen).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from xsfs.connection import Connection, Reply
from xsfs.transport import DeviceTransport
from xsfs.wire import Op, Parser, encode, read

LIMIT = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    with theirs:
        yield ours, theirs


@trio_test
async def test_each_request_waits_for_the_reply_to_the_one_before(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """The device has one buffer for each descriptor, and the next write overwrites what the kernel has
    not passed on yet."""
    ours, theirs = pair
    connection = Connection(DeviceTransport(ours.detach()), LIMIT)
    answers: dict[str, list[Reply]] = {}

    async def ask(name: str, paths: list[bytes]) -> None:
        answers[name] = await connection.burst([read(path) for path in paths])

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            nursery.start_soon(ask, "first", [b"/a", b"/b", b"/c"])
            nursery.start_soon(ask, "second", [b"/d", b"/e"])
            for number in range(5):
                await wait_all_tasks_blocked()
                parser = Parser()
                parser.feed(theirs.recv(65536))
                message = parser.next()
                assert message is not None
                op, req_id, tx_id, payload = message
                with pytest.raises(BlockingIOError):
                    theirs.recv(65536)
                assert op == Op.READ, number
                theirs.send(encode(Op.READ, req_id, tx_id, b"value of " + payload[:-1]))
            await wait_all_tasks_blocked()
            connection.close()
    assert answers == {
        "first": [b"value of /a", b"value of /b", b"value of /c"],
        "second": [b"value of /d", b"value of /e"],
    }
