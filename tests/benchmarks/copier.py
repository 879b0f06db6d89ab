"""The least that copies a tree: `python3 -m tests.benchmarks.copier SOCKET TOP DIRECTORY`.

It loads what every file system on pyfuse3 loads, asks what the mirror asks, as many nodes at once and
the next ones while it makes the files of the last.  It mounts nothing, watches nothing and checks
nothing: the floor under the start of every mirror in Python.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Final

import pyfuse3  # noqa: F401  to load it is part of the work
import trio  # noqa: F401

from xsfs.wire import Op

from .connection import Connection, message

WINDOW: Final = 128
"""How many nodes are asked for at once: the mirror's."""

PERMS: Final = "user.xs.perms"


def main(socket: str, top: str, target: str) -> None:
    connection = Connection(socket)
    above = os.fsencode(top).rstrip(b"/")
    due: list[bytes] = [above]
    # As the mirror does: tmpfs has user attributes since Linux 6.6.
    with_perms = has_attributes(os.path.dirname(target))
    ops = (Op.READ, Op.DIRECTORY, Op.GET_PERMS) if with_perms else (Op.READ, Op.DIRECTORY)

    def ask() -> Sequence[bytes]:
        paths = [due.pop() for _ in range(min(WINDOW, len(due)))]
        connection.send(b"".join([message(op, path) for path in paths for op in ops]))
        return paths

    asked = ask()
    while asked:
        replies = connection.replies(len(ops) * len(asked))
        paths, asked = asked, ask()
        for number, path in enumerate(paths):
            value, names, *perms = replies[number * len(ops) : (number + 1) * len(ops)]
            place = os.fsencode(target) + path[len(above) :]
            due += make(path, place, value or b"", names or b"", perms[0] if perms else None)
        asked = asked or ask()


def has_attributes(directory: str) -> bool:
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.setxattr(file.fileno(), PERMS, b"n0")
        except OSError:
            return False
    return True


def make(
    path: bytes, place: bytes, value: bytes, names: bytes, perms: bytes | None
) -> Sequence[bytes]:
    """The node's file or directory; its children."""
    text = b"" if perms is None else b",".join(perms[:-1].split(b"\0"))
    if names:
        os.mkdir(place)
        if text:
            os.setxattr(place, PERMS, text)
        place += b"/.value"
    if value or not names:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        if value:
            os.write(descriptor, value + b"\n")
        if text:
            os.setxattr(descriptor, PERMS, text)
        os.close(descriptor)
    if not names:
        return ()
    return [b"%s/%s" % (path, name) for name in names[:-1].split(b"\0") if name[:1] != b"@"]


if __name__ == "__main__":
    main(*sys.argv[1:])
