"""Ring: the lying store itself, which the rings of the client and of the mount rely on."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.support.lying_store import LyingStore, on, says
from tests.support.messages import Message, messages_of
from xsfs.xenstore.protocol import HEADER_SIZE, Op, Parser, encode

SECONDS = 60.0


def receive(sock: socket.socket, count: int) -> list[Message]:
    parser = Parser()
    messages: list[Message] = []
    while len(messages) < count:
        data = sock.recv(65536)
        assert data, "the end"
        messages += messages_of(parser, data)
    return messages


def test_a_lie_stands_between_messages(tmp_path: Path) -> None:
    """Not in one: xenstored writes a reply in two parts, here with a lie told meanwhile."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.settimeout(SECONDS)
        client.settimeout(SECONDS)
        listener.bind(str(tmp_path / "daemon"))
        listener.listen()
        with LyingStore(tmp_path / "liar", str(tmp_path / "daemon")) as liar:
            liar.lie = on(Op.DIRECTORY, says(b"lie\0"))
            client.connect(liar.path)
            client.sendall(encode(Op.READ, 1, 0, b"/a\0"))
            daemon = listener.accept()[0]
            with daemon:
                daemon.settimeout(SECONDS)
                assert receive(daemon, 1) == [Message(Op.READ, 1, 0, b"/a\0")]
                reply = encode(Op.READ, 1, 0, b"truth")
                daemon.sendall(reply[:HEADER_SIZE])
                client.sendall(encode(Op.DIRECTORY, 2, 0, b"/a\0"))
                assert receive(client, 1) == [Message(Op.DIRECTORY, 2, 0, b"lie\0")]
                daemon.sendall(reply[HEADER_SIZE:])
                assert receive(client, 1) == [Message(Op.READ, 1, 0, b"truth")]
