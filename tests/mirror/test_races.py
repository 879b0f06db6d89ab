"""Ring: the live mirror without a mount, over every store, when things happen at bad moments.

Events that were merged or come in another order than the changes, replies that are older than an event,
listings cut short, domains that die, permissions that a guest loses.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.lying_store import LyingStore, Talk
from tests.support.messages import Message
from tests.support.mirroring import Live, await_true, has_user_attributes, live
from tests.support.mounting import GUEST, LIMIT, Place, each_place, open_place
from tests.support.storming import REFUSED
from tests.support.xenstored.harness import RealXenstored, XsClient, XsError, strings
from xsfs.xenstore.protocol import Op

STORES = ("C", "ocaml", "embedded")

SEEDS = int(os.environ.get("XSFS_TEST_SEEDS", "2"))
"""How many runs of random changes there are.  More of them find more."""


place = each_place(*STORES, quick=("C", "ocaml"))


# --------------------------------------------------------------------------------- at once


def test_what_has_changed_together_is_looked_at_once(place: Place) -> None:
    """However many events lead to it: its own, and those of all above it."""
    with place.witness() as store, live(place.socket, store, root="/late") as alive:
        children = [f"/late/a/{number}" for number in range(150)]  # more than are asked together
        below = [*children, *(f"{path}/x" for path in children)]
        store.pipeline(("WRITE", strings(path) + b"v") for path in below)
        alive.settle()
        mirror = alive.mirror

        def at_rest() -> bool:
            return bool(mirror._idle)  # its task is parked there

        def looks_after(paths: Iterable[str]) -> int:
            def tell() -> None:
                for path in paths:
                    mirror._changes.put(path.encode())

            await_true(at_rest)
            before = mirror.fetched
            alive.tell(tell)
            await_true(lambda: mirror.fetched > before and at_rest())
            return mirror.fetched - before

        # A directory comes first: a file would be looked at on the spot.
        for others in ([], below, below[::-1]):
            assert looks_after(["/late/a", *others]) == 1 + len(below)
        store.rm("/late")


# ------------------------------------------------------------------------------- at random

HOME = "/local/domain/0"
NAMES = ("data", "b", "c")


class Chance:
    """Random changes, by several clients."""

    def __init__(self, seed: int, clients: list[XsClient], alive: Live) -> None:
        self.random = random.Random(seed)
        self.clients = clients
        self.alive = alive
        self.done: list[object] = []

    def path(self) -> str:
        names = [self.random.choice(NAMES) for _ in range(self.random.choice((0, 1, 1, 2, 2, 3)))]
        return "/".join((HOME, *names))

    def step(self, client: XsClient, tx: int = 0) -> None:
        path = self.path()
        what = self.random.choice(("write", "write", "empty", "mkdir", "rm", "perms", "known"))
        self.done.append((what, path, tx))
        try:
            if what == "write":
                client.write(path, f"{self.random.random()}", tx)
            elif what == "empty":
                client.write(path, "", tx)
            elif what == "mkdir":
                client.mkdir(path, tx)
            elif what == "rm":
                client.rm(path, tx)
            elif what == "perms":
                client.set_perms(path, ["n0", f"r{self.random.randrange(9)}"], tx)
            else:
                client.mkdir(path)
                sticky = self.alive.sticky
                sticky.add(path.encode(), with_value=self.random.random() < 0.3)
        except XsError as error:
            if error.name not in REFUSED:
                raise

    def round(self) -> None:
        for _ in range(self.random.randrange(1, 12)):
            client = self.random.choice(self.clients)
            if self.random.random() < 0.3:
                tx = client.start()
                for _ in range(self.random.randrange(1, 6)):
                    self.step(client, tx)
                try:
                    client.end(tx)
                except XsError as error:
                    if error.name not in REFUSED:
                        raise
            else:
                self.step(client)


@pytest.mark.quick_if(place=["ocaml"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_changes(place: Place, seed: int) -> None:
    """In each other round the mirror sleeps meanwhile, and finds all events at once: it goes through
    them in another order than they came in."""
    with (
        place.witness() as store,
        place.witness() as first,
        place.witness() as second,
        live(place.socket, store, root=HOME) as alive,
    ):
        chance = Chance(seed, [first, second], alive)
        for number in range(100):
            if number % 2:
                alive.tell(chance.round)
            else:
                for _ in range(3):
                    # What is known is the mirror's thread's.
                    alive.tell(chance.round)
            try:
                alive.settle()
            except AssertionError:
                print(*chance.done[-60:], sep="\n")
                raise
            chance.done.append("at rest")
        store.rm(HOME)
        store.write(f"{HOME}/domid", "0")
        alive.settle()


# ------------------------------------------------------------------------- late and cut short


class Late:
    """Asks the store at once, and withholds the reply to one request until it is let go."""

    def __init__(self, op: Op, path: bytes) -> None:
        self.op = op
        self.path = path
        self.asked = threading.Event()
        self.go = threading.Event()

    def __call__(self, talk: Talk, request: Message) -> bool:
        if request.op in (Op.WATCH, Op.UNWATCH):
            return False
        answer = talk.ask(request)
        if request.op == self.op and request.payload == self.path + b"\0":
            self.asked.set()
            assert self.go.wait(LIMIT)
        talk.send(answer)
        return True


@contextmanager
def behind(place: Place, root: str, directory: Path) -> Iterator[tuple[LyingStore, Live]]:
    with (
        place.witness() as store,
        LyingStore(directory / "liar.sock", place.socket) as liar,
        live(liar.path, store, root=root) as alive,
    ):
        alive.settle()
        yield liar, alive
        liar.behave()
        store.rm(root)


LATE: dict[str, tuple[Op, Callable[[XsClient], None], Callable[[XsClient], None]]] = {
    "written again": (
        Op.READ,
        lambda store: store.write("/late/a", "1"),
        lambda store: store.write("/late/a", "2"),
    ),
    "removed": (
        Op.READ,
        lambda store: store.write("/late/a", "1"),
        lambda store: store.rm("/late/a"),
    ),
    "made again": (
        Op.GET_PERMS,
        lambda store: store.rm("/late/a"),
        lambda store: store.write("/late/a/b/c", "1"),
    ),
    "made a directory": (
        Op.DIRECTORY,
        lambda store: store.write("/late/a", "1"),
        lambda store: store.write("/late/a/b", "1"),
    ),
    "made a file": (
        Op.DIRECTORY,
        lambda store: store.write("/late/a/b", "1"),
        lambda store: store.rm("/late/a/b"),
    ),
    "permissions": (
        Op.GET_PERMS,
        lambda store: store.set_perms("/late/a", ["n0", "r3"]),
        lambda store: store.set_perms("/late/a", ["n0", "r4"]),
    ),
    "another's end": (
        Op.DIRECTORY,
        lambda store: store.write("/late/a", "1"),
        lambda store: store.rm("/late"),
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_a_reply_older_than_an_event(place: Place, tmp_path: Path, case: str) -> None:
    op, before, after = LATE[case]
    with behind(place, "/late", tmp_path) as (liar, alive):
        alive.witness.write("/late/a", "0")
        alive.settle()
        liar.lie = late = Late(op, b"/late/a")
        before(alive.witness)
        assert late.asked.wait(LIMIT)
        after(alive.witness)
        late.go.set()
        alive.settle()


@pytest.mark.quick_if(place=["ocaml"])
def test_a_subtree_removed_and_made_again_while_it_is_read(place: Place, tmp_path: Path) -> None:
    with behind(place, "/late", tmp_path) as (liar, alive):
        store = alive.witness
        count = 150  # more than are looked at together
        store.pipeline(("WRITE", strings(f"/late/a/{n}/x") + b"old") for n in range(count))
        alive.settle()
        for path in (b"/late/a/7", b"/late/a/149/x", b"/late/a"):
            liar.lie = late = Late(Op.READ, path)
            store.write("/late/a", "again")
            alive.tell(lambda: alive.mirror._queue.update({b"/late": False}))
            assert late.asked.wait(LIMIT)
            store.rm("/late/a")
            for number in range(0, count, 3):
                store.write(f"/late/a/{number}", "new")
                store.write(f"/late/a/{number}/y", "new")
            late.go.set()
            alive.settle()
            store.pipeline(("WRITE", strings(f"/late/a/{n}/x") + b"old") for n in range(count))
            alive.settle()


def test_a_listing_that_is_begun_anew(tmp_path: Path) -> None:
    """Only xenstored gives listings in parts."""
    with open_place("C", tmp_path) as place, behind(place, "/late", tmp_path) as (liar, alive):
        store = alive.witness
        store.pipeline(("WRITE", strings(f"/late/a/{n}-{'x' * 50}")) for n in range(300))
        alive.settle()
        parts = 0

        def disturb(talk: Talk, request: Message) -> bool:
            nonlocal parts
            if request.op == Op.DIRECTORY_PART:
                parts += 1
                if parts in (2, 5, 9):
                    with place.witness() as client:
                        client.rm(f"/late/a/{parts}-{'x' * 50}")
                        client.write(f"/late/a/new{parts}", "v")
            return False

        liar.lie = disturb
        store.write("/late/a", "again")
        alive.settle()
        assert parts > 9


def test_a_node_gone_between_its_answers(place: Place, tmp_path: Path) -> None:
    """READ still found it, DIRECTORY did not."""
    with behind(place, "/late", tmp_path) as (liar, alive):
        alive.witness.write("/late/a/b", "v")
        alive.settle()

        def remove(talk: Talk, request: Message) -> bool:
            if request.op == Op.DIRECTORY and request.payload == b"/late/a\0":
                liar.behave()
                with place.witness() as client:
                    client.rm("/late/a")
            return False

        liar.lie = remove
        alive.witness.write("/late/a", "again")
        await_true(lambda: not alive.path("a").exists())
        alive.settle()


# -------------------------------------------------------------------------- domains that die


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_domain_dies(kind: str) -> None:
    """What it owned goes, with all below, and its entries in permissions: with few events, or none."""
    with RealXenstored(kind) as daemon, daemon.client() as store:
        store.write("/local", "")
        with live(daemon.socket, store) as alive:
            for number in range(3):
                daemon.add_guest(8)
                store.write("/local/domain/8/name", "guest")
                store.write("/local/domain/8/data/of/mine", "v")
                store.set_perms("/local/domain/8/data", ["n8"])
                store.set_perms("/local/domain/8/data/of", ["n8"])
                store.write("/shared/deep/of-8", "v")
                store.write("/shared/deep/of-8/but/not/this", "v")
                store.set_perms("/shared/deep/of-8", ["n8", "r0"])
                store.write("/shared/lonely/child", "v")
                store.write("/shared/lonely", "v")
                store.set_perms("/shared/lonely/child", ["b8"])
                store.write("/shared/read-by-8", "v")
                store.set_perms("/shared/read-by-8", ["n0", "r8", "w3"])
                store.set_perms("/shared/deep", ["n0", "b8"])
                alive.settle()
                if number == 1:
                    daemon.shutdown_domain(8)
                    alive.settle()
                daemon.destroy_domain(8)
                await_true(lambda: not alive.path("shared/deep/of-8").exists())
                alive.settle()
                assert alive.path("shared/lonely").is_file()
                store.rm("/local/domain/8")
                alive.settle()


# ------------------------------------------------------------------------------------- guests


@pytest.fixture(scope="module", params=["C-guest", "ocaml-guest"])
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    with open_place(request.param, tmp_path_factory.mktemp("guest")) as place:
        yield place


def test_what_a_guest_may_not_read_is_not_in_it(guest: Place) -> None:
    home = guest.home
    with (
        guest.witness() as witness,
        guest.dom0() as dom0,
        live(guest.socket, witness, root=home, domid=GUEST) as alive,
    ):
        alive.settle()
        for path in (f"{home}/data/s", f"{home}/data/s/t"):
            dom0.write(f"{home}/data/s/t/u", "v")
            dom0.write(f"{home}/data/s", "v")
            for node in ("s", "s/t", "s/t/u"):
                dom0.set_perms(f"{home}/data/{node}", ["n0", f"r{GUEST}"])
            alive.settle()
            assert alive.path("data/s/t/u").read_text() == "v\n"
            dom0.set_perms(path, ["n0"])
            alive.settle()
            assert not alive.path(path.removeprefix(home + "/")).exists()
            dom0.write(f"{home}/data/s/t/u", "w")
            dom0.write(f"{home}/data/s/t/n", "w")
            alive.settle()
            dom0.set_perms(path, ["n0", f"r{GUEST}"])
            alive.settle()
            assert alive.path(path.removeprefix(home + "/")).exists()
            dom0.rm(f"{home}/data/s")
            alive.settle()


def test_a_guests_home_may_be_hidden_for_a_time(guest: Place) -> None:
    home = guest.home
    with (
        guest.witness() as witness,
        guest.dom0() as dom0,
        live(guest.socket, witness, root=home, domid=GUEST) as alive,
    ):
        perms = dom0.get_perms(home)
        dom0.set_perms(home, ["n0"])
        await_true(lambda: os.listdir(alive.directory) == ["data"])
        dom0.write(f"{home}/data/x", "v")
        await_true(alive.path("data/x").exists)
        dom0.set_perms(home, perms)
        alive.settle()
        dom0.rm(f"{home}/data/x")
        alive.settle()


def test_a_guest_writes_itself(guest: Place) -> None:
    with (
        guest.witness() as witness,
        live(guest.socket, witness, root=guest.home, domid=GUEST) as alive,
    ):
        for number in range(50):
            witness.write(f"data/{number % 5}/{number}", f"{number}")
        alive.settle()
        witness.rm("data/3")
        witness.set_perms("data/4", [f"n{GUEST}", "r0"])
        alive.settle()
        for number in range(5):
            witness.rm(f"data/{number}")
        alive.settle()


def test_a_guest_gives_its_nodes_any_permissions(guest: Place) -> None:
    """Both daemons take them.  The mirror of domain 0 shows them as they came, and all the rest."""
    path = f"{guest.home}/data/theirs"
    assert guest.daemon is not None
    with (
        guest.witness() as witness,
        guest.dom0() as dom0,
        live(guest.daemon.socket, dom0, root=guest.home) as alive,
    ):
        reconnects = alive.mirror.store.reconnects
        for entry in ("r-1", "b32757", "w4294967295", "n99999999999999999999"):
            witness.write(path, entry)
            try:
                witness.set_perms(path, [f"n{GUEST}", entry])
            except XsError:
                continue  # this daemon takes it for what it is
            dom0.write(f"{guest.home}/data/after", entry)
            after, theirs = alive.path("data/after"), alive.path("data/theirs")
            alive.settle()
            assert after.read_text() == theirs.read_text() == f"{entry}\n"
            if has_user_attributes(alive.directory.parent):
                shown = os.getxattr(theirs, "user.xs.perms").decode()
                assert shown == ",".join(dom0.get_perms(path))
        assert alive.mirror.store.reconnects == reconnects
        # And from the start.
        with live(guest.daemon.socket, dom0, root=guest.home) as another:
            another.settle()
        dom0.rm(path)
