"""Ring: how many round trips to the store operations of a mount take, however far it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.distant_store import DistantStore
from tests.support.mirroring import await_true, scratch
from tests.support.mounting import Mount, mounted
from tests.support.xenstored.harness import RealXenstored, XsClient, strings

DATA = "/local/domain/0/data"

CHILDREN = 100


@pytest.fixture(scope="module", params=["C", "ocaml"])
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon, daemon.client() as client:
        daemon.populate()
        write_all(client, [f"{DATA}/list/{n}" for n in range(CHILDREN)])
        # Ten nodes with ten children each, which have ten each, which have ten each.
        leaves = ["/".join(f"{n:04}") for n in range(10_000)]
        write_all(client, [f"{DATA}/deep/{leaf}" for leaf in leaves])
        yield daemon


def write_all(client: XsClient, paths: list[str]) -> None:
    for start in range(0, len(paths), 500):
        client.pipeline(("WRITE", strings(path) + b"v") for path in paths[start : start + 500])


@pytest.fixture
def distant(daemon: RealXenstored, tmp_path: Path) -> Iterator[DistantStore]:
    with DistantStore(tmp_path / "distant", daemon.socket) as distant:
        yield distant


@pytest.fixture
def mount(distant: DistantStore, tmp_path: Path) -> Iterator[Mount]:
    with mounted([distant.path], tmp_path / "m") as mount:
        yield mount


@contextmanager
def trips_at_most(limit: int, distant: DistantStore) -> Iterator[None]:
    before = distant.trips
    yield
    assert distant.trips - before <= limit


@contextmanager
def looked_up(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_value(mount: Mount, distant: DistantStore) -> None:
    """If the kernel opens the file within a millisecond after the look-up.  A busy machine may not."""

    def is_one_trip() -> bool:
        before = distant.trips
        assert (mount.path / "name").read_text() == "Domain-0\n"
        return distant.trips - before == 1

    await_true(is_one_trip)


def test_a_listing(mount: Mount, distant: DistantStore) -> None:
    """The names and the kinds.  Between them fstat(2), as all programs that list a directory do, takes a
    third round trip if it comes a millisecond later, as on a busy machine."""

    def is_two_trips() -> bool:
        with looked_up(mount.path / "data/list") as directory:
            before = distant.trips
            assert len(os.listdir(f"/proc/self/fd/{directory}")) == CHILDREN
            return distant.trips - before == 2

    await_true(is_two_trips)


@pytest.mark.parametrize("name", [".ls", ".json", ".dump"])
def test_a_subtree(mount: Mount, distant: DistantStore, name: str) -> None:
    """Of 11,111 nodes on five levels, with the look-up."""
    with (
        looked_up(mount.path / "data/deep") as directory,
        trips_at_most(5 + 2, distant),
        open(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file,
    ):
        assert file.read().count(b"v") >= 10_000


def test_many_subtrees_at_once_and_a_value(mount: Mount, distant: DistantStore) -> None:
    """In step, their windows would be more requests than one connection may have in flight."""
    with ExitStack() as stack, trips_at_most(40, distant):
        paths = []
        for name in (".ls", ".dump"):
            # The kernel looks up one name after the other, but opens files together.
            descriptor = os.open(mount.path / "data/deep" / name, os.O_PATH)
            stack.callback(os.close, descriptor)
            paths += [Path(f"/proc/self/fd/{descriptor}")] * 3
        threads = stack.enter_context(ThreadPoolExecutor(len(paths)))
        reads = [threads.submit(path.read_bytes) for path in paths]
        while wait(reads, 0).not_done:
            assert (mount.path / "name").read_text() == "Domain-0\n"
    for each in reads:
        assert each.result().count(b"v") >= 4000


def test_a_mirror(distant: DistantStore, daemon: RealXenstored, tmp_path: Path) -> None:
    """The whole start of the mount, and then a change.  The mirror has 11,111 nodes."""
    with scratch() as directory, daemon.client() as client:
        options = ["-o", f"root={DATA}/deep,mirror={directory}/mirror", distant.path]
        with trips_at_most(30, distant), mounted(options, tmp_path / "m") as mount:
            before = distant.trips
            client.write(f"{DATA}/deep/0/0/0/0", "changed")
            copy = mount.path / ".mirror/0/0/0/0"
            await_true(lambda: copy.read_text() == "changed\n")
            assert distant.trips - before <= 2
