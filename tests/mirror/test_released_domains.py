"""The live mirror without a mount, over daemons that tell which domain has ended.

Xen 4.22 and xapi's oxenstored do, if the watch of `@releaseDomain` has a depth.  Here a relay to an older
daemon does it for xapi's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lying_store import LyingStore, Talk, first_of, on, says
from tests.support.messages import Message
from tests.support.mirroring import PERMS, Live, await_true, live
from tests.support.xenstored.harness import RealXenstored, XsClient
from xsfs.mirror.mirror import RELEASE
from xsfs.xenstore.protocol import Op, strings

ENDING, STAYING = 7, 8

OWNED = ("/shared/of-guest", f"/shared/{'l' * 300}", f"/shared/{'m' * 299}/below")
READABLE = "/shared/read"


class NamingStore:
    """Knows the depth of the watch of `@releaseDomain`, and sends its events when the test says so."""

    def __init__(self, liar: LyingStore) -> None:
        self.liar = liar
        self._watch: tuple[Talk, bytes] | None = None
        liar.lie = self._answer

    def _answer(self, talk: Talk, request: Message) -> bool:
        if request.op != Op.WATCH or not request.payload.startswith(RELEASE):
            return False
        _, token, depth = strings(request.payload)
        assert depth == b"1"
        talk.reply(request, b"OK\0")
        talk.event(RELEASE, token)
        self._watch = talk, token
        return True

    def send(self, event: bytes) -> None:
        assert self._watch is not None
        talk, token = self._watch
        talk.event(event, token)


@pytest.fixture
def daemon() -> Iterator[RealXenstored]:
    """oxenstored: the nodes of a domain go without events of their own, and so do its permissions."""
    with RealXenstored("ocaml", guests=(ENDING, STAYING)) as daemon:
        daemon.populate()
        with daemon.client() as client:
            # The guest's nodes outside its home, with names that need an alias, and one that it may read.
            for path in OWNED:
                client.write(path, "v")
                client.set_perms(path, [f"n{ENDING}"])
            client.write(READABLE, "v")
            client.set_perms(READABLE, ["n0", f"r{ENDING}"])
        yield daemon


@pytest.fixture
def witness(daemon: RealXenstored) -> Iterator[XsClient]:
    with daemon.client() as witness:
        yield witness


@pytest.fixture
def naming(daemon: RealXenstored, tmp_path: Path) -> Iterator[NamingStore]:
    with LyingStore(tmp_path / "liar.sock", daemon.socket) as liar:
        yield NamingStore(liar)


@pytest.fixture
def alive(naming: NamingStore, witness: XsClient) -> Iterator[Live]:
    with live(naming.liar.path, witness) as alive:
        alive.settle()
        yield alive


@pytest.mark.parametrize("replaced", [False, True], ids=["from the start", "later"])
def test_xenstored_that_knows_features_gets_no_depth(
    daemon: RealXenstored, witness: XsClient, tmp_path: Path, replaced: bool
) -> None:
    """C xenstored 4.22.0 writes too little of such a watch at a live update, and dies at the next one."""
    watches: list[bytes] = []

    def note(talk: Talk, request: Message) -> bool:
        watches.append(request.payload)
        return False

    new = first_of(on(Op.GET_FEATURE, says(b"14\0")), on(Op.WATCH, note))
    with LyingStore(tmp_path / "liar.sock", daemon.socket) as liar:
        liar.lie = on(Op.WATCH, note) if replaced else new
        with live(liar.path, witness) as alive:
            if replaced:
                assert any(len(strings(payload)) == 3 for payload in watches)
                watches.clear()
                liar.lie = new
                liar.hang_up()
                await_true(lambda: len(watches) == 2)
            alive.settle()
            assert {payload.split(b"\0")[0] for payload in watches} == {b"/", RELEASE}
            assert all(len(strings(payload)) == 2 for payload in watches)
            daemon.destroy_domain(ENDING)
            alive.settle()


def end_the_guest(daemon: RealXenstored, alive: Live) -> None:
    """Its nodes are gone, and the mirror has not heard of it."""
    daemon.destroy_domain(ENDING)
    await_true(lambda: "of-guest" not in alive.witness.ls("/shared"))
    assert any("shared/of-guest" in each for each in alive.differences())


def test_the_mirror_looks_at_the_nodes_of_the_domain_that_has_ended(
    daemon: RealXenstored, naming: NamingStore, alive: Live
) -> None:
    end_the_guest(daemon, alive)
    fetched, nodes = alive.mirror.fetched, alive.mirror.nodes
    naming.send(b"%s/%d" % (RELEASE, ENDING))
    alive.settle()
    assert 0 < alive.mirror.fetched - fetched < 0.6 * nodes
    # A domain of which there is no node.
    await_true(lambda: not alive.mirror._queue)
    fetched = alive.mirror.fetched
    naming.send(RELEASE + b"/9")
    naming.send(RELEASE + b"/nonsense")
    alive.witness.write("/after", "v")
    alive.settle()
    assert alive.mirror.fetched - fetched < 0.1 * nodes


def test_the_mirror_looks_at_all_nodes_if_it_does_not_know_the_domain(
    daemon: RealXenstored, naming: NamingStore, alive: Live
) -> None:
    end_the_guest(daemon, alive)
    naming.send(RELEASE)
    alive.settle()


def test_the_mirror_looks_at_all_nodes_if_its_files_have_no_permissions(
    daemon: RealXenstored, naming: NamingStore, alive: Live
) -> None:
    for path in alive.directory.rglob("*"):
        os.removexattr(path, PERMS)
    end_the_guest(daemon, alive)
    naming.send(b"%s/%d" % (RELEASE, ENDING))
    alive.settle()


def test_files_that_vanish_meanwhile_are_looked_at(
    daemon: RealXenstored, naming: NamingStore, alive: Live
) -> None:
    """The files' owner has moved a directory away."""
    (alive.directory / "tool").rename(alive.directory / "shared/other")
    end_the_guest(daemon, alive)
    naming.send(b"%s/%d" % (RELEASE, ENDING))
    await_true(lambda: not (alive.directory / "shared/of-guest").exists())
    naming.send(RELEASE)
    alive.settle()
