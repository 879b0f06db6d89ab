"""A store that lies: a relay to a real daemon which misbehaves on demand.  For the rings of the
client and of the mount.

    with LyingStore(tmp_path / "sock", upstream=daemon.socket) as liar:
        ...                             # relays everything, message for message
        liar.lie = on(Op.READ, says(Op.WRITE, b"OK"))
        ...                             # answers READ itself, wrongly
        liar.lie = honest               # behaves again

A lie sees each request in the thread of its connection, and returns whether it has seen to it;
what it has not goes to the daemon.  It may send any bytes, wait (for a Gate), hang up.  A connection
of the liar that has ended, ends the one to the daemon, so transactions and watches go with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Final, Self

from tests.support.messages import Message, messages_of
from xsfs.xenstore.protocol import Op, Parser, WireError, encode

TIMEOUT: Final = 60.0
"""For waits that only a broken test makes long."""


class HangUp(Exception):
    """End the connection, without another word."""


class Talk:
    """One connection, as a lie sees it."""

    def __init__(self, number: int, client: socket.socket, upstream: socket.socket) -> None:
        self.number = number
        """1 for the first connection since the liar began."""
        self.requests = 0
        """How many requests have come by this connection, the present one included."""
        self.client = client
        self.upstream = upstream
        self._parser = Parser()
        self._answers = Parser()

    def send(self, data: bytes) -> None:
        self.client.sendall(data)

    def reply(self, request: Message, payload: bytes, op: int | None = None) -> None:
        """Answer with the right numbers, and what type and payload one likes."""
        op = request.op if op is None else op
        self.send(encode(op, request.req_id, request.tx_id, payload))

    def event(self, path: bytes, token: bytes) -> None:
        self.send(encode(Op.WATCH_EVENT, 0, 0, path + b"\0" + token + b"\0"))

    def ask(self, request: Message) -> bytes:
        """The daemon's answer: the bytes of the messages up to the reply, and of those that came with it.

        Only while no other request is on its way to the daemon.
        """
        self.upstream.sendall(encode(*request))
        found, answered = b"", False
        while not answered:
            for message in self._hear():
                found += encode(*message)
                answered |= message.req_id == request.req_id and message.op != Op.WATCH_EVENT
        return found

    def _hear(self) -> list[Message]:
        """The daemon's answers, in whole messages.

        C xenstored writes a reply in two parts.  Were the first relayed by itself, what a lie sends
        next would stand in the middle of a message, which is not the lie that was asked for.
        """
        data = self.upstream.recv(65536)
        if not data:
            raise HangUp
        return messages_of(self._answers, data)

    def relay(self, lie: Callable[[], Lie]) -> None:
        """Serve the connection until either side ends it."""
        while True:
            ready = select.select((self.client, self.upstream), (), ())[0]
            if self.upstream in ready:
                self._pass_on()
            if self.client in ready:
                data = self.client.recv(65536)
                if not data:
                    return
                for request in messages_of(self._parser, data):
                    self.requests += 1
                    if not lie()(self, request):
                        self._forward(encode(*request))

    def _forward(self, data: bytes) -> None:
        """Send to the daemon.  oxenstored accepts nothing more until its replies are taken."""
        while data:
            readable, writable, _ = select.select((self.upstream,), (self.upstream,), ())
            if readable:
                self._pass_on()
            if writable:
                with contextlib.suppress(BlockingIOError):
                    data = data[self.upstream.send(data, socket.MSG_DONTWAIT) :]

    def _pass_on(self) -> None:
        self.client.sendall(b"".join(encode(*message) for message in self._hear()))

    def close(self) -> None:
        """End the connection at both ends; from another thread, too."""
        for sock in self.client, self.upstream:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


Lie = Callable[[Talk, Message], bool]


class LyingStore:
    """See the module's text.

    lie         what is done to each request; may be set at any time
    welcome     what is done to each new connection, before anything is read from it
    connections how many connections there have been
    """

    def __init__(self, path: str | os.PathLike[str], upstream: str) -> None:
        self.path = os.fspath(path)
        self.lie: Lie = honest
        self.welcome: Callable[[Talk], None] = _nothing
        self.connections = 0
        self._upstream = upstream
        self._lock = threading.Lock()
        self._talks: dict[Talk, threading.Thread] = {}
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(128)
        self._thread = threading.Thread(target=self._accept, name="lying-store", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def behave(self) -> None:
        """No more lies."""
        self.lie = honest
        self.welcome = _nothing

    def hang_up(self) -> None:
        """End all connections there are now."""
        with self._lock:
            talks = list(self._talks)
        for talk in talks:
            talk.close()

    def close(self) -> None:
        """End everything; the socket file goes, too."""
        with self._lock:
            self._closed = True
            threads = list(self._talks.values())
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join(TIMEOUT)
        self._listener.close()
        self.hang_up()
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "a lie never ends"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            with self._lock:
                if self._closed:
                    client.close()
                    return
                self.connections += 1
                upstream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                talk = Talk(self.connections, client, upstream)
                thread = threading.Thread(target=self._serve, args=(talk,), daemon=True)
                self._talks[talk] = thread
                thread.start()

    def _serve(self, talk: Talk) -> None:
        # A side that ends the connection in the middle of anything is no error here.
        with talk.client, talk.upstream, contextlib.suppress(HangUp, OSError, WireError):
            self.welcome(talk)
            talk.upstream.connect(self._upstream)
            talk.relay(lambda: self.lie)
        with self._lock:
            self._talks.pop(talk, None)


# -------------------------------------------------------------------------------------------- lies


def _nothing(_: Talk) -> None:
    pass


def honest(_: Talk, request: Message) -> bool:
    return False


def silence(_: Talk, request: Message) -> bool:
    """The request is taken, and nothing comes."""
    return True


def hang_up(_: Talk, request: Message) -> bool:
    raise HangUp


def on(op: Op, lie: Lie) -> Lie:
    """The lie for requests of one type; the truth for others."""
    return lambda talk, request: request.op == op and lie(talk, request)


def says(payload: bytes, op: int | None = None) -> Lie:
    """A reply with this payload, and of this type if it is not to be the right one."""

    def lie(talk: Talk, request: Message) -> bool:
        talk.reply(request, payload, op)
        return True

    return lie


def sends(data: bytes, *, then_hang_up: bool = False) -> Lie:
    """These bytes, whatever was asked."""

    def lie(talk: Talk, _: Message) -> bool:
        talk.send(data)
        if then_hang_up:
            raise HangUp
        return True

    return lie


def first_of(*lies: Lie) -> Lie:
    """The first of these that sees to the request."""
    return lambda talk, request: any(lie(talk, request) for lie in lies)


def quota(op: Op, gives_back: Op, most: int, error: str) -> Lie:
    """At most this many of the things that one request takes and another returns; then an error."""
    count = 0

    def lie(talk: Talk, request: Message) -> bool:
        nonlocal count
        if request.op == gives_back:
            count -= 1
        elif request.op == op and count == most:
            talk.reply(request, error.encode() + b"\0", Op.ERROR)
            return True
        elif request.op == op:
            count += 1
        return False

    return lie


def parts_of(path: str, listing: bytes, size: int) -> Lie:
    """The listing of this node comes in parts of `size` bytes, wherever they end."""
    payload = path.encode() + b"\0"

    def lie(talk: Talk, request: Message) -> bool:
        if not request.payload.startswith(payload):
            return False
        if request.op == Op.DIRECTORY:
            talk.reply(request, b"E2BIG\0", Op.ERROR)
            return True
        if request.op != Op.DIRECTORY_PART:
            return False
        start = int(request.payload.split(b"\0")[1])
        part = listing[start : start + size]
        end = b"\0" if start + size >= len(listing) else b""
        talk.reply(request, b"7\0" + part + end)
        return True

    return lie


class Gate:
    """Makes a lie wait until it is opened: by then the client has gone to sleep over its request."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def before(self, lie: Lie) -> Lie:
        def late(talk: Talk, request: Message) -> bool:
            assert self._open.wait(TIMEOUT), "the gate was never opened"
            return lie(talk, request)

        return late
