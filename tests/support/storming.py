"""An outside client that changes random nodes until its stdin ends:
`python -m tests.support.storming SOCKET ROOT SEED [PACE]`, with PACE changes a second at most.

Values have a structure that can be checked (`is_whole`).  It starts again with the daemon.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.support.xenstored.harness import XsClient, XsEOF, XsError, XsTimeout

NAMES = ("a", "b", "data", "device", "x" * 300, "n-1")

REFUSED = {"ENOENT", "EAGAIN", "EINVAL", "EIO", "EBUSY", "ENOMEM", "EEXIST"}
"""Errors that a client may get if other clients make changes, too."""


def whole(chance: random.Random) -> bytes:
    """A value of up to 1,600 bytes, of which no part could be another's."""
    body = b"%x" % chance.getrandbits(64) * chance.randrange(1, 100)
    return body + hashlib.md5(body).hexdigest().encode()


def is_whole(content: bytes) -> bool:
    """Whether a file's content is a value as it was written, or an empty one."""
    if not content:
        return True
    body, check = content[:-33], content[-33:]
    return check == hashlib.md5(body).hexdigest().encode() + b"\n"


class Storm:
    def __init__(self, client: XsClient, root: str, chance: random.Random) -> None:
        self.client = client
        self.root = root
        self.chance = chance

    def path(self) -> str:
        depth = self.chance.choice((1, 1, 2, 2, 3, 4))
        return "/".join((self.root, *(self.chance.choice(NAMES) for _ in range(depth))))

    def change(self, tx: int = 0) -> None:
        path = self.path()
        kinds = ("write", "mkdir", "rm", "perms", "tx")
        (kind,) = self.chance.choices(kinds, (10, 2, 2, 3, 0 if tx else 2))
        try:
            if kind == "write":
                self.client.write(path, whole(self.chance), tx)
            elif kind == "mkdir":
                self.client.mkdir(path, tx)
            elif kind == "rm":
                self.client.rm(path, tx)
            elif kind == "perms":
                self.client.set_perms(path, ["n0", f"r{self.chance.randrange(5)}"], tx)
            else:
                self.transaction()
        except XsError as error:
            if error.name not in REFUSED:
                raise

    def transaction(self) -> None:
        tx = self.client.start()
        for _ in range(self.chance.randrange(1, 8)):
            self.change(tx)
        self.client.end(tx, self.chance.random() < 0.8)


def storm(socket: str, root: str, seed: int, pace: float, stop: threading.Event) -> None:
    chance = random.Random(seed)
    while not stop.is_set():
        with suppress(OSError, XsEOF, XsTimeout), XsClient(socket) as client:
            it = Storm(client, root, chance)
            while not stop.is_set():
                it.change()
                if pace:
                    time.sleep(1 / pace)


def main() -> None:
    socket, root, seed, *pace = sys.argv[1:]
    stop = threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=await_end, daemon=True).start()
    storm(socket, root, int(seed), float(pace[0]) if pace else 0, stop)


@contextmanager
def storming(socket: str, root: str, seeds: range, pace: float = 0) -> Iterator[None]:
    """Clients that storm, one for each seed, until the end of the block."""
    clients = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.storming"),
                *(socket, root, str(seed), str(pace)),
            ],
            stdin=subprocess.PIPE,
        )
        for seed in seeds
    ]
    try:
        yield
    finally:
        for client in clients:
            assert client.stdin is not None
            client.stdin.close()
        statuses = [client.wait(60) for client in clients]
    assert statuses == [0] * len(clients)


if __name__ == "__main__":
    main()
