"""Ring: the live mirror without a mount, over every store.  Everyone's turn comes, whatever goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.mirroring import Live, await_true, live_at
from tests.support.mounting import Place, each_place
from tests.support.xenstored.harness import XsClient, strings
from xsfs.mirror.mirror import BATCH, RELEASE

ROOT = "/test"

place = each_place("C", "ocaml", "embedded", quick=("C", "ocaml"))


@pytest.fixture(scope="module")
def alive(place: Place) -> Iterator[Live]:
    with live_at(place, ROOT) as alive:
        yield alive


@pytest.fixture
def store(alive: Live) -> XsClient:
    return alive.emptied()


@contextmanager
def without_end(alive: Live, event: Callable[[], object]) -> Iterator[None]:
    """Something comes whenever the mirror looks."""
    ends = False

    def again() -> None:
        event()
        if not ends:
            alive.token.run_sync_soon(again)

    alive.tell(again)
    try:
        yield
    finally:
        ends = True
    alive.settle()


def changes(alive: Live, *paths: bytes) -> Callable[[], object]:
    def come() -> None:
        for path in paths:
            alive.mirror._changes.put(path)

    return come


def domain_ends(alive: Live) -> None:
    alive.mirror._domain_ends.put(RELEASE)


@pytest.mark.parametrize("many", [1, 2 * BATCH])
def test_one_who_writes_without_end_does_not_keep_new_directories_out(
    alive: Live, store: XsClient, many: int
) -> None:
    """Not even if more events come than one pipeline has room for."""
    store.pipeline(("WRITE", strings(f"/test/counter/{n}") + b"v") for n in range(many))
    paths = [b"/test/counter/%d" % n for n in range(many)]
    with without_end(alive, changes(alive, *paths)):
        for number in range(5):
            store.write(f"/test/new/{number}/a/b", "v")
            await_true(alive.path(f"new/{number}/a/b").exists)


@pytest.mark.parametrize("many", [50, 100, 300])
def test_nor_is_the_rest_kept_from_being_looked_at(alive: Live, store: XsClient, many: int) -> None:
    """When a domain ends, or the mount learns something, while the children of a directory that changes
    must always be looked at, too."""
    demands: list[Callable[[], None]] = [
        lambda: domain_ends(alive),
        lambda: alive.mirror._queue.update({b"/test/far": False, b"/test/deep": False}),
    ]
    places = ("far", "deep/down/there", "many/0", f"many/{many - 1}")
    files = [alive.path(place) for place in places]

    def are_right() -> bool:
        return all(file.read_bytes() == b"v\n" for file in files)

    store.pipeline(("WRITE", strings(f"/test/many/{n}") + b"v") for n in range(many))
    store.write("/test/far", "v")
    store.write("/test/deep/down/there", "v")
    alive.settle()
    with without_end(alive, changes(alive, b"/test/many")):
        for demand in demands * 2:
            for file in files:
                file.write_bytes(b"what no event tells of")
            alive.tell(demand)
            await_true(are_right)


def test_domains_that_end_without_end_do_not_keep_the_depth_from_being_looked_at(
    alive: Live, store: XsClient
) -> None:
    """Whenever everything is looked at, another one has ended before that is done."""
    store.pipeline(("WRITE", strings(f"/test/{n}/a/b/c") + b"v") for n in range(100))
    alive.settle()
    files = [alive.path(f"{n}/a/b/c") for n in (0, 50, 99)]

    def are_right() -> bool:
        return all(file.read_bytes() == b"v\n" for file in files)

    with without_end(alive, lambda: domain_ends(alive)):
        for _ in range(3):
            for file in files:
                file.write_bytes(b"what no event tells of")
            await_true(are_right)
