"""Ring: a mount over daemons that are not installed here.  A relay to a real daemon answers as they would:
xapi's oxenstored, and the C xenstored of Xen 4.22."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.test_values import fails
from tests.fs.test_watch_files import add, control
from tests.support.lying_store import LyingStore, Talk, first_of, on, parts_of, quota, says
from tests.support.messages import Message
from tests.support.mirroring import scratch
from tests.support.mounting import Mount, mounted
from tests.support.xenstored.harness import RealXenstored, strings
from xsfs.xenstore.protocol import Op

GUEST = 7
HOME = "/local/domain/0"


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealXenstored]:
    with RealXenstored("C", guests=(GUEST,)) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture
def store(daemon: RealXenstored, tmp_path: Path) -> Iterator[LyingStore]:
    with LyingStore(tmp_path / "store", daemon.socket) as store:
        yield store


@pytest.fixture
def mount(store: LyingStore, tmp_path: Path) -> Iterator[Mount]:
    with mounted([store.path], tmp_path / "m") as mount:
        yield mount


@pytest.mark.parametrize("size", [7, 1000, 4000])
def test_parts_of_a_listing_that_end_in_the_middle_of_a_name(
    size: int, daemon: RealXenstored, store: LyingStore, tmp_path: Path
) -> None:
    """xapi's oxenstored cuts a listing every so many bytes."""
    path = f"{HOME}/data/long"
    names = [str(number) for number in range(1000)]
    with daemon.client() as client:
        client.pipeline(("WRITE", strings(f"{path}/{name}") + b"v") for name in names)
        listing = b"".join(b"%s\0" % name.encode() for name in client.ls(path))
    store.lie = parts_of(path, listing, size)
    with (
        scratch() as directory,
        mounted(["-o", f"mirror={directory}/mirror", store.path], tmp_path / "m") as mount,
    ):
        assert set(os.listdir(mount.path / "data/long")) == set(names)
        assert len((mount.path / "data/long/.ls").read_text().splitlines()) == len(names)
        assert set(os.listdir(mount.path / ".mirror/data/long")) == set(names)


def test_one_watch_and_one_transaction_less(mount: Mount, store: LyingStore) -> None:
    """In Xen 4.22 each quota is one less than before, and too many watches are ENOSPC."""
    watches, transactions = 127, 9
    store.lie = first_of(
        quota(Op.WATCH, Op.UNWATCH, watches, "ENOSPC"),
        quota(Op.TRANSACTION_START, Op.TRANSACTION_END, transactions, "ENOSPC"),
    )
    descriptor = os.open(mount.path / "data/.watch", os.O_RDWR | os.O_NONBLOCK)
    for number in range(watches):
        os.write(descriptor, b"n%d\n" % number)
    with fails(errno.ENOSPC):
        os.write(descriptor, b"another\n")
    os.write(descriptor, b"-n0\n")
    os.write(descriptor, b"another\n")
    os.close(descriptor)
    directories = [mount.path / ".transaction" / f"t{number}" for number in range(transactions)]
    for directory in directories:
        directory.mkdir()
    with fails(errno.ENOSPC):
        (mount.path / ".transaction/another").mkdir()
    for directory in directories:
        directory.rmdir()


def test_a_daemon_that_tells_its_features_gets_no_reserved_domid(
    mount: Mount, store: LyingStore
) -> None:
    """C xenstored 4.22.0 dies of one."""
    sent: list[bytes] = []

    def note(talk: Talk, request: Message) -> bool:
        sent.append(request.payload)
        return False

    store.lie = first_of(on(Op.GET_FEATURE, says(b"14\0")), on(Op.SET_PERMS, note))
    path = mount.path / "data/features"
    path.write_text("v")
    with fails(errno.EINVAL):
        os.setxattr(path, "user.xs.perms", b"n0,r32757")
    assert sent == []
    os.setxattr(path, "user.xs.perms", b"n0,r7")
    assert sent == [f"{HOME}/data/features\0n0\0r7\0".encode()]


def test_permissions_of_every_domain_count_in_modes(daemon: RealXenstored, tmp_path: Path) -> None:
    """In Xen 4.22 the domid 32757 means every domain."""
    with (
        LyingStore(tmp_path / "store", daemon.guest_socket(GUEST)) as store,
        mounted([store.path], tmp_path / "m") as mount,
    ):
        for perms, mode in (b"n0\0b32757\0", 0o600), (b"n0\0r32757\0", 0o400):
            store.lie = on(Op.GET_PERMS, says(perms))
            assert stat.S_IMODE((mount.path / "name").stat().st_mode) == mode


def test_special_watches_of_one_domain(mount: Mount, store: LyingStore) -> None:
    watches: list[tuple[Talk, bytes]] = []

    def takes(talk: Talk, request: Message) -> bool:
        path, token = request.payload.split(b"\0")[:2]
        if not path.startswith(b"@"):
            return False
        watches.append((talk, token))
        talk.reply(request, b"OK\0")
        talk.event(path, token)
        return True

    store.lie = on(Op.WATCH, takes)
    with control(mount.path / "data") as (descriptor, lines):
        for name in "@releaseDomain/9", "@introduceDomain/9":
            add(descriptor, name)
            assert lines.next() == name
            talk, token = watches[-1]
            talk.event(name.encode(), token)
            assert lines.next() == name
