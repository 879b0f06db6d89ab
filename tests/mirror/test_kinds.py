"""Ring: the live mirror without a mount, over every store.  What a node is, and becomes.

Each test changes the store by an independent client and waits until the mirror is what the store is:
every name, value, permission and kind.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator

import pytest

from tests.support.mirroring import Live, await_true, live, live_at
from tests.support.mounting import Place, each_place
from tests.support.xenstored.harness import XsClient, strings
from xsfs.view import kinds
from xsfs.view.names import RAW
from xsfs.xenstore import watches

ROOT = "/test"


place = each_place("C", "ocaml", "embedded", quick=("C", "ocaml"))


@pytest.fixture(scope="module")
def alive(place: Place) -> Iterator[Live]:
    with live_at(place, ROOT) as alive:
        yield alive


@pytest.fixture
def store(alive: Live) -> XsClient:
    return alive.emptied()


def kind(alive: Live, place: str) -> str:
    path = alive.path(place)
    return "directory" if path.is_dir() else "file" if path.exists() else "nothing"


def transaction(store: XsClient, *changes: tuple[str, bytes]) -> None:
    tx = store.start()
    for op, payload in changes:
        store.call(op, payload, tx)
    store.end(tx)


def write(path: str, value: str = "") -> tuple[str, bytes]:
    return "WRITE", strings(ROOT + path) + value.encode()


def rm(path: str) -> tuple[str, bytes]:
    return "RM", strings(ROOT + path)


# ---------------------------------------------------------------------------- file or directory


def test_a_file_becomes_a_directory_by_children(alive: Live, store: XsClient) -> None:
    store.write("/test/n", "v")
    alive.settle()
    assert kind(alive, "n") == "file"
    store.write("/test/n/c", "w")
    alive.settle()
    assert kind(alive, "n") == "directory"
    assert alive.path("n/.value").read_text() == "v\n"


def test_a_directory_becomes_a_file_when_its_last_child_goes(alive: Live, store: XsClient) -> None:
    store.write("/test/n", "v")
    store.write("/test/n/a", "")
    store.write("/test/n/b/c", "")
    alive.settle()
    store.rm("/test/n/b")
    alive.settle()
    assert kind(alive, "n") == "directory"
    store.rm("/test/n/a")
    alive.settle()
    assert kind(alive, "n") == "file"


def test_what_has_been_a_directory_stays_one_without_a_value(alive: Live, store: XsClient) -> None:
    store.write("/test/n/c", "")
    alive.settle()
    store.rm("/test/n/c")
    alive.settle()
    assert kind(alive, "n") == "directory"
    store.write("/test/n", "v")
    alive.settle()
    assert kind(alive, "n") == "file"
    store.write("/test/n", "")
    alive.settle()
    assert kind(alive, "n") == "directory"


def test_a_value_comes_and_goes_in_a_directory(alive: Live, store: XsClient) -> None:
    store.write("/test/n/c", "")
    alive.settle()
    assert kind(alive, "n/.value") == "nothing"
    store.write("/test/n", "v")
    alive.settle()
    assert kind(alive, "n/.value") == "file"
    store.write("/test/n", "")
    alive.settle()
    assert kind(alive, "n/.value") == "nothing"


def test_containers_by_custom_are_directories(place: Place) -> None:
    with place.witness() as store, live(place.socket, store) as alive:
        store.mkdir("/local/domain/99/data")
        store.mkdir("/local/domain/99/other")
        alive.settle()
        assert kind(alive, "local/domain/99/data") == "directory"
        assert kind(alive, "local/domain/99/other") == "file"
        store.write("/local/domain/99/data", "v")
        alive.settle()
        assert kind(alive, "local/domain/99/data") == "file"
        store.rm("/local/domain/99")
        alive.settle()


def test_what_the_mount_knows_is_told(alive: Live, store: XsClient) -> None:
    """mkdir, `.value`, and their ends: no event tells of them."""
    store.mkdir("/test/n")
    alive.settle()
    assert kind(alive, "n") == "file"
    alive.tell(lambda: alive.sticky.add(b"/test/n"))
    alive.settle()
    assert kind(alive, "n") == "directory"
    alive.tell(lambda: alive.sticky.add(b"/test/n", with_value=True))
    alive.settle()
    assert kind(alive, "n/.value") == "file"
    store.write("/test/n", "v")
    alive.settle()
    assert kind(alive, "n/.value") == "file"
    alive.tell(lambda: alive.sticky.discard_value(b"/test/n"))
    alive.settle()
    assert kind(alive, "n") == "file"
    store.write("/test/n", "")
    alive.tell(lambda: alive.sticky.discard(b"/test/n"))
    alive.settle()
    assert kind(alive, "n") == "file"


def test_an_empty_value_is_forgotten_beside_children(alive: Live, store: XsClient) -> None:
    """As when more directories are known than can be remembered."""
    store.write("/test/n/c", "v")
    alive.settle()
    alive.tell(lambda: alive.sticky.add(b"/test/n", with_value=True))
    alive.settle()
    assert kind(alive, "n/.value") == "file"
    alive.tell(lambda: alive.sticky.discard(b"/test/n"))
    alive.settle()
    assert kind(alive, "n/.value") == "nothing"


def test_a_directory_is_forgotten_without_a_free_descriptor(alive: Live, store: XsClient) -> None:
    """The operation that forgets it has nothing to do with the mirror, and must not fail."""
    store.write("/test/n/c", "v")
    alive.settle()

    def forget() -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            alive.sticky.discard(b"/test/n")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    alive.tell(forget)
    alive.settle()
    assert kind(alive, "n") == "directory"


def test_more_directories_than_can_be_remembered(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is forgotten is not looked at for that: another would be forgotten then, for ever."""
    monkeypatch.setattr(kinds, "STICKY_MAX", 5)
    with place.witness() as store:
        for number in range(20):
            store.write(f"/many/d{number}", "v")
            store.write(f"/many/d{number}/c", "v")
        with live(place.socket, store, root="/many") as alive:
            alive.settle()
            looks = alive.mirror.fetched
            for number in range(20):
                store.write(f"/many/d{number}", "w")
            alive.settle()
            for number in range(50):
                store.write("/many/d0/c", f"{number}")
                alive.settle()
            # Of all and of their children, and of the one child each time.
            assert alive.mirror.fetched - looks <= 100
        store.rm("/many")


def test_what_was_made_a_directory_while_its_removal_is_looked_at(
    alive: Live, store: XsClient
) -> None:
    """An old look at what was not there yet must not undo what is known since."""
    for number in range(200):
        path = b"/test/d%d" % number

        def learn(path: bytes = path) -> None:
            store.mkdir(path.decode())
            alive.sticky.add(path)

        store.mkdir(path.decode())
        store.rm(path.decode())
        alive.tell(learn)
    alive.settle()
    assert {kind(alive, f"d{number}") for number in range(200)} == {"directory"}


# -------------------------------------------------------------------- parents, and all below


def test_parents_are_made_implicitly(alive: Live, store: XsClient) -> None:
    store.write("/test/a/b/c/d", "v")
    alive.settle()
    assert kind(alive, "a/b/c/d") == "file"


def test_a_subtree_goes_at_once(alive: Live, store: XsClient) -> None:
    for number in range(300):
        store.write(f"/test/a/{number % 7}/{number}/x", "v")
    alive.settle()
    store.rm("/test/a")
    alive.settle()
    assert os.listdir(alive.directory) == []


def test_a_subtree_is_removed_and_made_again_in_one_transaction(
    alive: Live, store: XsClient
) -> None:
    store.write("/test/a", "old")
    store.write("/test/a/b", "old")
    store.write("/test/a/b/c", "old")
    store.write("/test/a/b/gone/d", "old")
    alive.settle()
    transaction(store, rm("/a"), write("/a/b/c", "new"), write("/a/b/e", "new"))
    alive.settle()
    assert sorted(os.listdir(alive.path("a/b"))) == ["c", "e"]


@pytest.mark.parametrize("top", ["/a", "/a/b", "/a/b/c"])
def test_a_removed_parent_comes_back_implicitly(alive: Live, store: XsClient, top: str) -> None:
    """Its value and permissions are others then, and no event names it."""
    store.write("/test/a/b/c", "old")
    store.write("/test/a/b/c/d", "old")
    store.set_perms("/test/a/b/c", ["n0", "r5"])
    store.write("/test/a/b/c/e", "old")
    alive.settle()
    store.pipeline([rm(top), write("/a/b/c/d", "new")])
    alive.settle()
    assert kind(alive, "a/b/c/.value") == "nothing"


def test_the_root_itself_goes_with_its_parent(place: Place) -> None:
    with place.witness() as store, live(place.socket, store, root="/far/above/here") as alive:
        store.write("/far/above/here", "v")
        store.write("/far/above/here/n", "v")
        alive.settle()
        assert kind(alive, ".value") == "file"
        store.rm("/far")
        alive.settle()
        assert os.listdir(alive.directory) == []
        store.write("/far/above/here/n/m", "v")
        alive.settle()
        store.pipeline(
            [
                ("RM", strings("/far")),
                ("WRITE", strings("/far/above/here/k") + b"v"),
            ]
        )
        alive.settle()
        store.rm("/far")


def test_data_at_home_lasts(place: Place) -> None:
    home = "/local/domain/0"
    with place.witness() as store, live(place.socket, store, root=home) as alive:
        store.mkdir(f"{home}/data")
        store.rm(f"{home}/data")
        alive.settle()
        assert kind(alive, "data") == "directory"
        store.write(f"{home}/data", "v")
        alive.settle()
        assert kind(alive, "data") == "file"
        store.rm(f"{home}/data")
        alive.settle()
        assert kind(alive, "data") == "directory"
        store.write(f"{home}/data/x/y", "v")
        alive.settle()
        store.rm(home)
        alive.settle()
        assert os.listdir(alive.directory) == ["data"]
        store.write(f"{home}/domid", "0")


# ------------------------------------------------------------------------- names and values


def test_long_names_have_aliases(alive: Live, store: XsClient) -> None:
    longest = "n" * 2000
    for name in ("m" * 255, "m" * 256, longest, "x" * 254 + "y" * 46, "x" * 254 + "z" * 46):
        store.write(f"/test/{name}", name[-4:])
    alive.settle()
    store.write(f"/test/{longest}/child", "v")
    store.write(f"/test/{'m' * 256}", "other")
    alive.settle()
    store.rm(f"/test/{'x' * 254}{'y' * 46}")
    store.rm(f"/test/{longest}/child")
    alive.settle()
    assert len(os.listdir(alive.directory)) == 4


@pytest.mark.quick_if(place=["C"])
def test_the_longest_path(alive: Live, store: XsClient) -> None:
    store.write("/test" + "/d" * 1015, "v")
    await_true(alive.path("d/" * 1014 + "d").exists)
    store.rm("/test/d/d/d")
    alive.settle()


def test_special_nodes_are_not_in_it(place: Place) -> None:
    with place.witness() as store, live(place.socket, store) as alive:
        store.write("/@foo", "v")
        store.write("/@foo/bar", "v")
        store.write("/test/@foo", "v")
        alive.settle()
        assert kind(alive, "test/@foo") == "file"
        assert not [name for name in os.listdir(alive.directory) if name.startswith("@")]
        store.rm("/@foo")


VALUES = (b"", b"\n", b"a\n", b"\0\xff" * 100, b"x" * 2000)


def test_values_are_as_the_mount_gives_them(alive: Live, store: XsClient) -> None:
    for number, value in enumerate(VALUES):
        store.write(f"/test/{number}", value)
    alive.settle()


def test_values_are_exact_if_raw(place: Place) -> None:
    with place.witness() as store, live(place.socket, store, root="/raw", content=RAW) as alive:
        for number, value in enumerate(VALUES):
            store.write(f"/raw/{number}", value)
            store.write(f"/raw/d{number}", value)
            store.write(f"/raw/d{number}/child", value)
        alive.settle()
        assert [alive.path(str(number)).read_bytes() for number in range(5)] == list(VALUES)
        store.rm("/raw")


def test_permissions(alive: Live, store: XsClient) -> None:
    store.write("/test/d/f", "v")
    store.write("/test/d", "v")
    alive.settle()
    for perms in (["n0", "r7"], ["b0"], ["r0", "w3", "n4"]):
        store.set_perms("/test/d", perms)
        store.set_perms("/test/d/f", perms[:1])
        alive.settle()


# ------------------------------------------------------------------------------- one or many


@pytest.mark.quick_if(place=["C"])
def test_a_large_directory_that_changes_all_the_time(place: Place) -> None:
    """A listing that is never the same twice is taken in a transaction in the end."""
    with place.witness() as store:
        store.pipeline(("WRITE", strings(f"/large/{number}")) for number in range(5000))
        stop = False

        def changes() -> Iterator[tuple[str, bytes]]:
            number = 0
            while not stop:
                number += 1
                yield "WRITE", strings(f"/large/new-{number % 50}")
                yield "RM", strings(f"/large/new-{(number - 25) % 50}")

        def change() -> None:
            with place.witness() as client:
                client.pipeline(changes(), window=4096)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            with live(place.socket, store, root="/large") as alive:
                assert len(os.listdir(alive.directory)) >= 5000
                store.write("/large/0/child", "v")
                await_true(alive.path("0/child").exists)
                stop = True
                thread.join()
                alive.settle()
        finally:
            stop = True
            thread.join()
        store.rm("/large")


@pytest.mark.quick_if(place=["C"])
def test_more_changes_than_can_be_remembered(
    alive: Live, store: XsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "EVENTS_MAX", 20)
    store.pipeline(("WRITE", strings(f"/test/{n % 10}/{n}") + b"v") for n in range(1000))
    alive.settle()
    store.pipeline(("RM", strings(f"/test/{n % 10}/{n}")) for n in range(990))
    alive.settle()
