"""Ring: a subtree goes from one host to another, by the lines that the documents print."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.host import REPOSITORY, Host, open_host
from tests.support.mounting import quick_params
from tests.support.sshd import running_sshd
from tests.support.xenstored.harness import RealXenstored, XsClient, XsError

GUESTS = (7, 9)

RESTORE = (
    "mkdir $M/.transaction/r && cat backup > $M/.transaction/r/data/.dump"
    " && echo commit > $M/.transaction/r/.control"
)
COPY = (
    "ssh host1 cat /mnt/xenstore/.root/local/domain/7/data/.dump"
    " > /mnt/xenstore/.root/local/domain/9/data/.dump"
)

Nodes = dict[str, tuple[bytes, list[str]]]
"""The value and the permissions of each node, by its path relative to a directory."""


@pytest.fixture(params=quick_params(["C"], ["C", "ocaml"]))
def daemons(request: pytest.FixtureRequest) -> Iterator[tuple[RealXenstored, RealXenstored]]:
    """That of host1, and that of this host."""
    other = {"C": "ocaml", "ocaml": "C"}[request.param]
    with (
        RealXenstored(request.param, guests=GUESTS) as there,
        RealXenstored(other, guests=GUESTS) as here,
    ):
        there.populate()
        here.populate()
        yield there, here


@pytest.fixture
def here(daemons: tuple[RealXenstored, RealXenstored]) -> Iterator[Host]:
    """A host whose ssh knows host1.  Xenstore is mounted on both."""
    with ExitStack() as stack:
        host1, here = (stack.enter_context(open_host(daemon.socket)) for daemon in daemons)
        host1.sh("mkdir -m 755 /run/sshd; xsfs /mnt/xenstore")
        here.sh("mount -t tmpfs none /etc/ssh; xsfs /mnt/xenstore")
        directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        server = stack.enter_context(running_sshd(directory, enter=host1.enter))
        (here.root / "etc/ssh/ssh_config").write_text(f"Host host1\n{server.client_config()}")
        yield here


def names_of(client: XsClient, path: str) -> list[str]:
    try:
        return client.ls_part(path)
    except XsError:
        return client.ls(path)  # oxenstored has no parts


def nodes_below(client: XsClient, top: str) -> Nodes:
    found: Nodes = {}
    left = [""]
    while left:
        way = left.pop()
        found[way] = client.read(top + way), client.get_perms(top + way)
        left += [f"{way}/{name}" for name in names_of(client, top + way)]
    return found


def fill(client: XsClient, top: str) -> None:
    client.mkdir(top)
    for number, value in enumerate((b"", b"plain", b"two\nlines\n", bytes(range(256)))):
        client.write(f"{top}/values/{number}", value)
    for number in range(300):
        client.write(f"{top}/many/{number}", b"%d" % number)
    client.set_perms(f"{top}/values/1", ["b7", "r9", "n0"])
    client.set_perms(f"{top}/values", ["n0", "b9"])


@pytest.mark.parametrize("line", [RESTORE, COPY])
def test_the_document_has_the_lines_that_the_tests_run(line: str) -> None:
    assert f"    {line}\n" in (REPOSITORY / "docs" / "subtree.md").read_text()


def test_a_copy_by_ssh(daemons: tuple[RealXenstored, RealXenstored], here: Host) -> None:
    with daemons[0].client() as source, daemons[1].client() as target:
        fill(source, "/local/domain/7/data")
        target.write("/local/domain/9/data/own", b"stays")
        here.sh(COPY)
        found = nodes_below(target, "/local/domain/9/data")
        assert found.pop("/own")[0] == b"stays"
        assert found == nodes_below(source, "/local/domain/7/data")


def test_an_atomic_restore(daemons: tuple[RealXenstored, RealXenstored], here: Host) -> None:
    data = "/local/domain/0/data"
    with daemons[0].client() as source, daemons[1].client() as target:
        fill(source, data)
        here.sh("cd /tmp; ssh host1 cat /mnt/xenstore/data/.dump > backup")
        here.sh(f"cd /tmp; {RESTORE}", M="/mnt/xenstore")
        assert nodes_below(target, data) == nodes_below(source, data)
        # A wrong line ends the commands before the commit.
        target.rm(data)
        here.sh('cd /tmp; echo \'{"path": ".."}\' >> backup')
        assert here.run(f"cd /tmp; {RESTORE}", M="/mnt/xenstore").returncode != 0
        here.sh("rmdir /mnt/xenstore/.transaction/r")
        with pytest.raises(XsError, match="ENOENT"):
            target.read(data)
