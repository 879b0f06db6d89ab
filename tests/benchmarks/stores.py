"""Real daemons without Xen, with as many nodes as asked for."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from tests.support.xenstored.harness import RealXenstored, dom0_nodes, guest_nodes

from .mounting import PROJECT, Mount, xsfs

DOMAINS_MIN: Final = 4
"""So that a quarter of them is one."""

HOME: Final = "/local/domain/0"
NAME: Final = f"{HOME}/name"
NAME_VALUE: Final = "Domain-0"
"""What populate() writes there."""

SCRATCH: Final = f"{HOME}/scratch"
"""A node to write to."""


PART: Final = "/part"
"""In a store of which only a part is read: that part, made like a store of its own."""


@dataclass(frozen=True)
class Store:
    """A daemon, its nodes, and xsfs over them."""

    socket: str
    nodes: int
    top: str
    """What is read of it, and how many nodes that has."""
    read: int
    mount: Mount
    environment: Mapping[str, str]
    """That of programs which are to find this daemon."""
    project: Path = PROJECT
    """The checkout whose xsfs is mounted."""

    def file(self, node: str) -> str:
        return f"{self.mount.path}{node}"


@contextlib.contextmanager
def store(kind: str, domains: int, part: int = 0) -> Iterator[Store]:
    """`part`: of so many domains there is a copy of all nodes below PART; 0: all is read."""
    with RealXenstored(kind) as daemon:
        daemon.populate(range(1, domains + 1))
        with daemon.client() as client:
            client.write(SCRATCH, b"0")
            for domid in range(1, part + 1):
                for path, value, _ in guest_nodes(domid):
                    client.write(f"{PART}{path}", value)
        # One locale, or grep's speed would be that of the user's.
        environment = os.environ | {"XENSTORED_PATH": daemon.socket, "LC_ALL": "C"}
        top = PART if part else "/"
        nodes, read = _count(environment, "/"), _count(environment, top)
        with xsfs(daemon.socket) as mount:
            yield Store(daemon.socket, nodes, top, read, mount, environment)


def _count(environment: Mapping[str, str], top: str) -> int:
    """Of all that the daemon has: it makes some nodes by itself."""
    listing = subprocess.run(
        ["xenstore-ls", "-f", top], env=environment, stdout=subprocess.PIPE, check=True
    )
    return listing.stdout.count(b"\n")


def domains_for(nodes: int) -> int:
    """How many domains it takes to have at least so many nodes."""
    domains = 0
    paths = _paths(path for path, _, _ in dom0_nodes())
    while len(paths) < nodes:
        domains += 1
        paths |= _paths(path for path, _, _ in guest_nodes(domains))
    return domains


def _paths(written: Iterator[str]) -> set[PurePosixPath]:
    """The nodes, and those which are made on the way to them."""
    return {node for path in map(PurePosixPath, written) for node in (path, *path.parents)}
