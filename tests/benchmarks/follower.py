"""The least that follows a node: `python3 -m tests.benchmarks.follower SOCKET NODE DIRECTORY`.

At each event of a watch it asks for the value, and puts it into DIRECTORY, under the node's name, by
rename.  It waits for nothing else and checks nothing: the floor under every mirror in Python.
"""

from __future__ import annotations

import os
import sys

from tests.support.xenstored.harness import XsClient


def main(socket: str, node: str, directory: str) -> None:
    new, target = os.path.join(directory, ".new"), os.path.join(directory, os.path.basename(node))
    with XsClient(socket) as watcher, XsClient(socket) as reader:
        watcher.watch(node, "t")
        while True:
            watcher.event()
            value = reader.read(node)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, value + b"\n")
            os.close(descriptor)
            os.rename(new, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
