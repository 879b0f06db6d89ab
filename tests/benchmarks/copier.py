"""The least that copies a tree: `python3 -m tests.benchmarks.copier`
with SOCKET TOP DIRECTORY WINDOW AHEAD PERMS.

It loads what every file system on pyfuse3 loads, asks what the mirror asks, WINDOW nodes at once and
AHEAD such bursts before the files of the last are made, by as many connections.  PERMS is the attribute
for permissions, empty where DIRECTORY can have none.  It mounts nothing, watches nothing and checks
nothing: the floor under the start of every mirror in Python.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from xsfs.xenstore.protocol import Op

from .connection import Asked, Connection

RECEIVE_NODES: Final = 16
"""After how many nodes the replies that have come are taken, that xenstored can go on."""


def main(socket: str, top: str, target: str, window: str, ahead: str, attribute: str) -> None:
    import_module("pyfuse3")  # to load it, and trio, is part of the work
    connections = deque(Connection(socket) for _ in range(int(ahead)))
    above = os.fsencode(top).rstrip(b"/")
    due: list[bytes] = [above]
    bursts: deque[tuple[Sequence[bytes], Connection, Asked]] = deque()
    ops = (Op.READ, Op.DIRECTORY, Op.GET_PERMS) if attribute else (Op.READ, Op.DIRECTORY)

    def ask() -> None:
        while due and len(bursts) < int(ahead):
            nodes = [due.pop() for _ in range(min(int(window), len(due)))]
            connection = connections[0]
            connections.rotate()
            asked = connection.ask([(op, path) for path in nodes for op in ops])
            bursts.append((nodes, connection, asked))

    ask()
    while bursts:
        nodes, connection, asked = bursts.popleft()
        replies = connection.replies(asked)
        ask()
        for number, path in enumerate(nodes):
            if number % RECEIVE_NODES == 0:
                for each in connections:
                    each.receive()
            value, names, *perms = replies[number * len(ops) : (number + 1) * len(ops)]
            place = os.fsencode(target) + path[len(above) :]
            text = b",".join((perms[0] or b"")[:-1].split(b"\0")) if perms else b""
            due += make(path, place, value or b"", names or b"", text, attribute)
        ask()


def make(
    path: bytes, place: bytes, value: bytes, names: bytes, perms: bytes, attribute: str
) -> Sequence[bytes]:
    """The node's file or directory; its children."""
    if names:
        os.mkdir(place)
        if perms:
            os.setxattr(place, attribute, perms)
        place += b"/.value"
    if value or not names:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        if value:
            os.write(descriptor, value + b"\n")
        if perms:
            os.setxattr(descriptor, attribute, perms)
        os.close(descriptor)
    if not names:
        return ()
    return [b"%s/%s" % (path, name) for name in names[:-1].split(b"\0") if name[:1] != b"@"]


if __name__ == "__main__":
    main(*sys.argv[1:])
