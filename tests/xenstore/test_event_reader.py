"""Ring: the watches' socket, and what a flood of events does to those who write."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.fs.test_values import fails
from tests.support.mounting import LIMIT, mounted
from tests.support.programs import program
from tests.support.xenstored.harness import RealXenstored, strings
from xsfs.xenstore.event_reader import MUCH, DrainedTransport
from xsfs.xenstore.transport import SocketTransport

HOME = "/local/domain/0"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline


@contextmanager
def pair() -> Iterator[tuple[DrainedTransport, socket.socket]]:
    ours, peer = socket.socketpair()
    drained = DrainedTransport(SocketTransport(ours))
    with peer:
        yield drained, peer


def received(drained: DrainedTransport) -> bytes:
    """The next chunk, waited for."""
    chunk: list[bytes] = []

    def come() -> bool:
        try:
            chunk.append(drained.receive())
        except BlockingIOError:
            return False
        return True

    until(come)
    return chunk[0]


def received_to_the_end(drained: DrainedTransport) -> None:
    while received(drained):
        pass


def rush(drained: DrainedTransport, peer: socket.socket) -> None:
    """Have the thread take over."""
    assert not drained.rushing
    peer.sendall(bytes(MUCH))
    assert len(received(drained)) == MUCH
    assert drained.rushing
    assert threads()


def threads() -> int:
    return sum(thread.name == "xsfs-watches" for thread in threading.enumerate())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_little_is_read_by_the_loop() -> None:
    with pair() as (drained, peer):
        for number in range(100):
            peer.sendall(b"%d" % number)
            assert received(drained) == b"%d" % number
            assert not drained.rushing
        assert not threads()
        drained.close()


def test_what_is_sent_comes_in_order_while_nobody_takes_it() -> None:
    sent = b"".join(b"%07d\n" % number for number in range(100_000))
    with pair() as (drained, peer):
        peer.settimeout(LIMIT)
        rush(drained, peer)
        # Several times what a socket holds: the peer does not wait for the one who takes.
        peer.sendall(sent)
        found = bytearray()
        while len(found) < len(sent):
            found += received(drained)
        assert found == sent
        drained.close()


def test_the_loop_reads_again_when_little_comes() -> None:
    """Nothing is lost, doubled or reordered while the socket changes hands, again and again."""
    with pair() as (drained, peer):
        peer.settimeout(LIMIT)
        for _ in range(3):
            rush(drained, peer)
            found, number = b"", 0
            while drained.rushing:
                peer.sendall(b"<%d>" % number)
                number += 1
                found += received(drained)
            assert found == b"".join(b"<%d>" % each for each in range(number))
            until(lambda: not threads())
        drained.close()


def test_the_end_of_the_peer_is_the_end() -> None:
    for rushing in (False, True):
        with pair() as (drained, peer):
            if rushing:
                rush(drained, peer)
            peer.sendall(b"last words")
            peer.close()
            assert received(drained) == b"last words"
            assert received(drained) == b""
            drained.close()


def test_more_than_can_be_held_is_the_end() -> None:
    with pair() as (drained, peer):
        peer.settimeout(LIMIT)
        rush(drained, peer)
        # The sender is let go of at once, not when somebody takes what has come.
        with fails(errno.EPIPE):
            while True:
                peer.sendall(bytes(1 << 16))
        with pytest.raises(OSError, match="more events than can be taken"):
            received_to_the_end(drained)
        drained.close()


def test_nothing_is_left_of_it() -> None:
    before = threads(), descriptors()
    for rushing in (False, True):
        for peer_first in (False, True):
            with pair() as (drained, peer):
                if rushing:
                    rush(drained, peer)
                if peer_first:
                    peer.close()
                    assert received(drained) == b""
                drained.close()
    until(lambda: (threads(), descriptors()) == before)


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_flood_of_pipelined_writes_stops_nobody(kind: str, tmp_path: Path) -> None:
    """Under oxenstored one whose watcher is too slow never gets another reply."""
    requests = [
        ("WRITE", strings(f"{HOME}/data/n{number % 5000}") + b"%d" % number)
        for number in range(60_000)
    ]
    with RealXenstored(kind) as daemon, ExitStack() as stack:
        daemon.populate()
        mount = stack.enter_context(mounted([daemon.socket], tmp_path / "m"))
        witness = stack.enter_context(daemon.client())
        witness.pipeline(requests[:5000])
        readers = [
            stack.enter_context(program("cat", mount.path / "data" / ".watch")) for _ in range(3)
        ]
        for reader in readers:
            assert reader.lines.next() == "."
        replies = witness.pipeline(requests)
        assert set(replies) == {b"OK\0"}
        witness.write(f"{HOME}/data/end", b"")
        for reader in readers:
            assert reader.lines.until("end")
