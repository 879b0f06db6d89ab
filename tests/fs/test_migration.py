"""A guest is migrated while its Xenstore is mounted: it has another domid and home afterwards."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from trio.testing import trio_test

from tests.support.clients import time_limit
from tests.support.lying_store import LyingStore, Talk, honest, silence
from tests.support.messages import Message
from tests.support.mounting import Mount, mounted
from tests.support.operating import ROOT, operations_on
from tests.support.xenstored.harness import RealXenstored
from xsfs.fs.migration import follow_home
from xsfs.fs.transaction_dirs import MountRoot
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT
from xsfs.view.view import View
from xsfs.xenstore.background import open_background
from xsfs.xenstore.protocol import Op
from xsfs.xenstore.store import open_store

OLD, NEW = 7, 12
"""Of different length, so that a path that is cut wrongly is noticed."""

HOME = f"/local/domain/{NEW}"

WATCHES = {
    "data": "exec cat data/.watch",
    "home": "exec cat .watch",
    "chosen": "exec 3<> data/.watch; echo box/x >&3; exec cat <&3",
}
"""By name, what readers of watch files do."""

LIMIT = 60.0


def _has_text(path: Path) -> bool:
    return path.stat().st_size > 0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


class Migrated(NamedTuple):
    """A guest that was migrated, with its mount, which has a mirror.

    heard   by the names of WATCHES, the outputs of their readers
    held    a descriptor of data/held, opened for writing before
    """

    server: RealXenstored
    mount: Mount
    mirror: Path
    heard: dict[str, Path]
    held: int

    def write(self, path: str, value: str) -> None:
        """As the toolstack."""
        with self.server.client() as dom0:
            dom0.write(path, value)

    def read(self, path: str) -> str:
        with self.server.client() as dom0:
            return dom0.read(path).decode()


@pytest.fixture(scope="module", params=["C", "ocaml"])
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Migrated]:
    tmp = tmp_path_factory.mktemp("migration")
    mirror = tmp / "mirror"
    with RealXenstored(request.param, [OLD]) as server:
        server.populate([OLD], introduce=True, small=True)
        options = ("-o", f"mirror={mirror}", server.guest_socket(OLD))
        with mounted(options, tmp / "m") as mount:
            mount.bash(
                "mkdir data/box data/empty; echo 1 > data/box/x; echo scratch > data/.note~;"
                " mkdir .transaction/t; cat .transaction/t/data/box/x"
            )
            heard = {name: tmp / name for name in WATCHES}
            readers = []
            for name, script in WATCHES.items():
                with open(heard[name], "wb") as file:
                    readers.append(
                        subprocess.Popen(["bash", "-c", script], cwd=mount.path, stdout=file)
                    )
            held = os.open(mount.path / "data/held", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                until(lambda: all(map(_has_text, heard.values())), "all watches are set")
                server.populate([NEW], introduce=True, small=True)
                found = Migrated(server, mount, mirror, heard, held)
                found.write(f"{HOME}/data/box/x", "new")
                with server.client() as dom0:
                    dom0.set_perms(f"{HOME}/data/box/x", [f"n{NEW}"])
                server.migrate(OLD, NEW)
                until(lambda: mount.bash("cat .domid") == f"{NEW}\n", "it knows its domid")
                yield found
            finally:
                os.close(held)
                for reader in readers:
                    reader.kill()
                    reader.wait()


def test_the_new_home_is_read_and_written(guest: Migrated) -> None:
    mount = guest.mount
    assert mount.bash("cat data/box/x domid") == f"new\n{NEW}\n"
    assert mount.bash("ls -A") == mount.bash(f"ls -A .root{HOME}")
    assert mount.bash("stat -c %a data/box/x data/box") == "600\n700\n"
    mount.bash("echo mine > data/box/y; mkdir data/more; mv data/box/y data/more/y")
    assert guest.read(f"{HOME}/data/more/y") == "mine"


def test_paths_are_those_of_the_new_home(guest: Migrated) -> None:
    shown = guest.mount.bash("getfattr --only-values -n user.xs.path data/box/x .")
    assert shown == f"{HOME}/data/box/x{HOME}"


def test_the_old_home_is_another_domains(guest: Migrated) -> None:
    """Its number may belong to another domain on the new host."""
    old = f"/local/domain/{OLD}/data/secret"
    guest.server.create_domain(OLD)
    guest.write(old, "of another domain")
    with guest.server.client() as dom0:
        dom0.set_perms(old, ["n0"])
    assert "Permission denied" in guest.mount.run(f"cat .root{old}").stderr
    with guest.server.client() as dom0:
        dom0.set_perms(old, ["r0"])
    assert guest.mount.bash(f"cat .root{old}") == "of another domain\n"
    assert not (guest.mount.path / "data/secret").exists()


@pytest.mark.parametrize("name", WATCHES)
def test_readers_of_watch_files_go_on(guest: Migrated, name: str) -> None:
    """They learn that they may have missed something, and then hear of changes in the new home."""
    heard = guest.heard[name]
    first = "box/x" if name == "chosen" else "."
    until(lambda: heard.read_text().split()[1:2] == [first], "the migration is told")
    before = len(heard.read_text())
    guest.write(f"{HOME}/data/box/x", "newer")
    wanted = {"data": "box/x", "home": "data/box/x", "chosen": "box/x"}[name]
    until(lambda: wanted in heard.read_text()[before:].split(), "the change")
    assert not any(line.startswith("/") for line in heard.read_text().split())


def test_the_mirror_is_of_the_new_home(guest: Migrated) -> None:
    mirror = guest.mirror
    until(lambda: (mirror / "domid").exists(), "the mirror is back")
    assert (mirror / "domid").read_text() == f"{NEW}\n"
    guest.write(f"{HOME}/data/mirrored", "1")
    until((mirror / "data/mirrored").exists, "the mirror follows")
    names = sorted(path.name for path in mirror.iterdir())
    assert names == sorted(os.listdir(guest.mount.path))


def test_a_new_transaction_is_of_the_new_home(guest: Migrated) -> None:
    mount = guest.mount
    until(lambda: mount.bash("ls .transaction") == "", "the old one is lost")
    mount.bash("mkdir .transaction/t; echo 5 > .transaction/t/data/in-transaction")
    assert "data/in-transaction" in mount.bash("cat .transaction/t/.diff")
    mount.bash("echo commit > .transaction/t/.control")
    assert guest.read(f"{HOME}/data/in-transaction") == "5"


def test_what_was_open_stays_open(guest: Migrated) -> None:
    """A file that was open before is written in the new home, and a scratch file is still there."""
    os.write(guest.held, b"later\n")
    assert guest.read(f"{HOME}/data/held") == "later"
    assert guest.mount.bash("cat data/.note~") == "scratch\n"


def test_another_migration(guest: Migrated) -> None:
    """Again, and at no time is anything missing: neither the home nor a node in it."""
    mount, target = guest.mount, 7777
    guest.server.populate([target], introduce=True, small=True)
    seen: set[str] = set()
    listed: list[int] = []
    failures: list[OSError] = []
    has_moved = threading.Event()

    def read_on() -> None:
        while not has_moved.is_set():
            try:
                seen.add((mount.path / "domid").read_text())
                listed.append(len(os.listdir(mount.path)))
            except OSError as error:
                failures.append(error)

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        until(lambda: bool(seen), "it reads")
        guest.server.migrate(NEW, target)
        until(lambda: mount.bash("cat .domid") == f"{target}\n", "it knows its domid")
        until(lambda: f"{target}\n" in seen or bool(failures), "the new home is read")
    finally:
        has_moved.set()
        reader.join()
    assert failures == []
    assert seen == {f"{NEW}\n", f"{target}\n"}
    assert min(listed) > 5
    mount.bash("echo 1 > data/last")
    assert guest.read(f"/local/domain/{target}/data/last") == "1"


@trio_test
async def test_a_domid_that_cannot_be_read_at_first(tmp_path: Path) -> None:
    """No second event tells of it."""
    with (
        RealXenstored("C") as daemon,
        daemon.client() as dom0,
        LyingStore(tmp_path / "sock", daemon.socket) as liar,
    ):
        dom0.write("/local/domain/0/domid", str(NEW))
        asked = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def silent_at_first(talk: Talk, request: Message) -> bool:
            if request.op != Op.READ or asked.is_set():
                return honest(talk, request)
            token.run_sync_soon(asked.set)
            return silence(talk, request)

        with trio.fail_after(LIMIT):
            async with open_store(liar.path, timeout=LIMIT) as store, open_background() as nursery:
                liar.lie = silent_at_first
                view = View(store, OLD, b"/local/domain/%d" % OLD, TEXT, StickyDirectories())
                operations = operations_on(view, nursery)
                root = operations.table.get(ROOT)
                assert isinstance(root, MountRoot)
                has_moved = trio.Event()
                nursery.start_soon(follow_home, view, operations, root.transactions, has_moved.set)
                with time_limit(store, 3.0):
                    await asked.wait()
                await has_moved.wait()
                assert view.domid == NEW
