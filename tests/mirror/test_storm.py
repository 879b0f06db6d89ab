"""Ring: real mounts with live mirrors, of every store, in a storm of changes.

Outside clients, programs at the mounts, and transactions change random nodes; when they stop, every
name, value, permission and kind in the mirrors is the store's within QUIET seconds.  XSFS_TEST_STORM
says how many seconds each storm lasts: `XSFS_TEST_STORM=60 ./test.sh tests/mirror/test_storm.py`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.mirroring import Mirrored, await_true, mirrored
from tests.support.mounting import LIMIT, Mount, Place, open_place
from tests.support.storming import is_whole, storming, whole
from tests.support.xenstored.harness import RealXenstored, XsError, domain_uuid

SECONDS = float(os.environ.get("XSFS_TEST_STORM", "2"))

NAMES = ("a", "b", "data", "device", "n-1")

QUIET = 0.2
"""How long a mirror may take to become true after the last change, where nothing else goes on."""

ROOT = "/local/domain/0"


class Readers:
    """Threads that read a mirror all the time, and look whether what they see was ever written."""

    def __init__(self, directory: Path, count: int = 2) -> None:
        self.directory = directory
        self.read = 0
        self.torn: list[bytes] = []
        self._stop = False
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive()

    def _run(self) -> None:
        while not self._stop:
            for top in NAMES:
                for above, _, names in os.walk(self.directory / top):
                    for name in names:
                        # Whatever is gone by now, or on its way.
                        with suppress(OSError):
                            content = Path(above, name).read_bytes()
                            self.read += 1
                            if not is_whole(content):
                                self.torn.append(content)


class Programs:
    """The work at the mountpoints meanwhile: ordinary tools, and transactions."""

    def __init__(self, mounts: list[Mount]) -> None:
        self.changes = 0
        self._stop = False
        self._threads = [
            threading.Thread(target=self._run, args=(mount, seed))
            for seed, mount in enumerate(mounts)
        ]

    def __enter__(self) -> Programs:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join(LIMIT * 2)
            assert not thread.is_alive()

    def _run(self, mount: Mount, seed: int) -> None:
        chance = random.Random(1000 + seed)
        while not self._stop:
            # Others change the same nodes, and the store itself may go.
            with suppress(OSError):
                self._change(mount.path, chance)
                self.changes += 1

    def _change(self, top: Path, chance: random.Random) -> None:
        if chance.random() < 0.2:
            transaction = top / ".transaction" / f"t{chance.random()}".replace(".", "-")
            transaction.mkdir()
            try:
                for _ in range(chance.randrange(4)):
                    with suppress(OSError):
                        self._change_one(transaction, chance)
                (transaction / ".control").write_text(chance.choice(("commit\n", "rollback\n")))
            finally:
                with suppress(OSError):
                    transaction.rmdir()
        else:
            self._change_one(top, chance)

    def _change_one(self, top: Path, chance: random.Random) -> None:
        path = top.joinpath(*(chance.choice(NAMES) for _ in range(chance.randrange(1, 4))))
        other = top.joinpath(*(chance.choice(NAMES) for _ in range(chance.randrange(1, 4))))
        what = chance.choice(("write", "write", "mkdir", "remove", "rmtree", "move", "value"))
        if what == "write":
            path.write_bytes(whole(chance) + b"\n")
        elif what == "mkdir":
            path.mkdir(parents=True)
        elif what == "remove":
            path.rmdir() if path.is_dir() else path.unlink()
        elif what == "rmtree":
            shutil.rmtree(path)
        elif what == "move":
            path.rename(other)
        else:
            (path / ".value").write_bytes(whole(chance) + b"\n")


def of_domain(domid: int) -> list[str]:
    """The paths of a domain's nodes."""
    return [
        f"/local/domain/{domid}",
        f"/libxl/{domid}",
        f"/vm/{domain_uuid(domid)}",
        *(f"{ROOT}/backend/{kind}/{domid}" for kind in ("vbd", "vif", "vfb", "vkbd", "console")),
        f"{ROOT}/device-model/{domid}",
    ]


def true_at_rest(*mirrors: Mirrored) -> None:
    for mirror in mirrors:
        mirror.settle()
        shown_alike(mirror)


def shown_alike(mirrored: Mirrored) -> None:
    """`diff -r` finds nothing, and there is something to find."""
    done = subprocess.run(
        ["diff", "-r", str(mirrored.mount.path), str(mirrored.directory)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(mirrored.directory.iterdir())


def wait(seconds: float, broken: Callable[[], object] = lambda: None) -> None:
    """As long as the storm lasts."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        broken()


@pytest.mark.quick_if(name=["C"])
@pytest.mark.parametrize("name", ["C", "ocaml", "embedded"])
def test_a_storm(name: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        place = stack.enter_context(open_place(name, tmp_path))
        first = stack.enter_context(mirrored(place, tmp_path / "m1"))
        second = stack.enter_context(mirrored(place, tmp_path / "m2", root="/"))
        second_home = second.mount.path / "local/domain/0"
        assert second_home.is_dir()
        with (
            Readers(first.directory) as readers,
            Programs([first.mount, second.mount]) as programs,
            storming(place.socket, ROOT, range(3)),
        ):
            wait(SECONDS)
            await_true(lambda: readers.read > 100 and programs.changes > 10)
            await_true(lambda: first.mount.counter("mirror_looks") > 100)
        true_at_rest(first, second)
        assert readers.torn == []


@pytest.mark.quick_if(kind=["ocaml"])
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_storm_in_which_the_daemon_restarts(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        place = stack.enter_context(open_place(kind, tmp_path))
        daemon = place.daemon
        assert daemon is not None
        alive = stack.enter_context(mirrored(place, tmp_path / "m"))
        link = alive.mount.path / ".mirror"
        with (
            Readers(alive.directory) as readers,
            Programs([alive.mount]),
            storming(place.socket, ROOT, range(2)),
        ):
            for _ in range(3):
                wait(SECONDS / 3)
                daemon.restart()
                await_true(link.exists)
            wait(SECONDS / 3)
        alive.witness = stack.enter_context(place.witness())
        true_at_rest(alive)
        assert readers.torn == []
        assert alive.mount.counter("reconnects") > 0


@pytest.mark.quick_if(kind=["ocaml"])
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_storm_in_which_domains_come_and_go(kind: str, tmp_path: Path) -> None:
    """oxenstored sends no events for the nodes that go with a domain."""
    with ExitStack() as stack:
        daemon = stack.enter_context(RealXenstored(kind))
        place = Place(kind, daemon.socket, 0, daemon)
        store = stack.enter_context(daemon.client())
        alive = stack.enter_context(mirrored(place, tmp_path / "m", root="/"))
        with storming(place.socket, ROOT, range(2)):
            end = time.monotonic() + SECONDS
            domid = 20
            while time.monotonic() < end or domid < 22:
                domid += 1
                daemon.add_guest(domid)
                daemon.populate([domid], small=True)
                store.write(f"/shared/of-{domid}/deep", "v")
                store.set_perms(f"/shared/of-{domid}", [f"n{domid}"])
                store.set_perms("/shared", ["n0", f"r{domid}"])
                if domid % 2:
                    daemon.shutdown_domain(domid)
                daemon.destroy_domain(domid)
                wait(0.1)
                # As a toolstack does, late.
                for path in of_domain(domid - 1):
                    with suppress(XsError):
                        store.rm(path)
        true_at_rest(alive)
        # And one that the mirror has shown before it goes, with nothing else going on.
        daemon.add_guest(domid + 1)
        store.write("/shared/last/deep", "v")
        store.set_perms("/shared/last", [f"n{domid + 1}"])
        true_at_rest(alive)
        daemon.destroy_domain(domid + 1)
        true_at_rest(alive)
        with pytest.raises(XsError):
            store.read("/shared/last")


@pytest.mark.quick_if(kind=["C"])
@pytest.mark.parametrize("kind", ["C", "embedded"])
def test_a_value_is_never_torn(kind: str, tmp_path: Path) -> None:
    """Nor empty in between: one node whose values are long, and written as fast as can be."""
    chance = random.Random(1)
    values = [whole(chance) * (1 + number % 2) for number in range(50)]
    seen: list[set[bytes]] = [set(), set()]
    with ExitStack() as stack:
        place = stack.enter_context(open_place(kind, tmp_path))
        alive = stack.enter_context(mirrored(place, tmp_path / "m"))
        path = alive.directory / "a"
        alive.witness.write(f"{ROOT}/a", values[0])
        await_true(path.exists)
        stop = threading.Event()

        def read(found: set[bytes]) -> None:
            while not stop.is_set():
                found.add(path.read_bytes())

        threads = [threading.Thread(target=read, args=(found,)) for found in seen]
        for thread in threads:
            thread.start()
        end = time.monotonic() + SECONDS / 2
        while time.monotonic() < end or min(map(len, seen)) <= 10:
            assert time.monotonic() < end + LIMIT
            alive.witness.write(f"{ROOT}/a", chance.choice(values))
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
    for found in seen:
        assert found <= {value + b"\n" for value in values}
