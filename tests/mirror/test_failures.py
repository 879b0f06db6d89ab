"""Ring: a real mount with a live mirror, of a store that fails, stops or lies.

While the mirror can't be true it says so: `.mirror` does not resolve, and the files go.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mirror.test_places import refused
from tests.support.lying_store import HangUp, Lie, LyingStore, Talk, on, says, silence
from tests.support.messages import Message
from tests.support.mirroring import (
    HOME,
    Mirrored,
    await_true,
    has_user_attributes,
    live,
    mirrored,
    scratch,
)
from tests.support.mounting import LIMIT, Place, each_place, mounted
from tests.support.xenstored.harness import XsClient, strings
from xsfs.xenstore.protocol import Op

place = each_place("C", "ocaml", quick=("ocaml",))


@pytest.fixture
def liar(place: Place, tmp_path: Path) -> Iterator[LyingStore]:
    with LyingStore(tmp_path / "liar.sock", place.socket) as liar:
        yield liar


def behind(place: Place, liar: LyingStore) -> Place:
    return Place(place.name, liar.path, 0, place.daemon)


def is_gone(alive: Mirrored) -> bool:
    return not os.path.exists(alive.mount.path / ".mirror") and not os.listdir(alive.directory)


# ------------------------------------------------------------------------------- restarts


def test_it_is_gone_while_there_is_no_daemon(place: Place, tmp_path: Path) -> None:
    daemon = place.daemon
    assert daemon is not None
    with mirrored(place, tmp_path / "m") as alive:
        alive.settle()
        link = alive.mount.path / ".mirror"
        assert os.readlink(link) == str(alive.directory)
        assert alive.mount.counter("mirror") > 0
        assert link.name not in os.listdir(alive.mount.path)
        daemon.kill()
        await_true(lambda: is_gone(alive))
        with pytest.raises(FileNotFoundError):
            os.readlink(link)
        assert alive.mount.counter("mirror") == 0
        daemon.start()
        alive.witness.close()
        alive.witness = place.witness()
        await_true(link.exists)
        alive.settle()
        daemon.populate()
        alive.settle()


def test_a_stopped_daemon(place: Place, tmp_path: Path) -> None:
    """The copy stays while the store is silent, and gets the missing changes when it continues."""
    daemon = place.daemon
    assert daemon is not None
    with mirrored(place, tmp_path / "m", "timeout=4") as alive:
        daemon.pause()
        try:
            assert (alive.directory / "name").read_text() == "Domain-0\n"
            assert (alive.mount.path / ".mirror").exists()
        finally:
            daemon.resume()
        alive.settle()
        # Now in the middle of something.
        with place.witness() as store:
            requests = [("WRITE", strings(f"{HOME}/stopped/{n}") + b"v") for n in range(3000)]
            thread = threading.Thread(target=store.pipeline, args=(requests,))
            thread.start()
            await_true((alive.directory / "stopped").exists)
            daemon.pause()
            time.sleep(5.0)  # longer than any request may take
            daemon.resume()
            thread.join(LIMIT)
            assert not thread.is_alive()
        await_true((alive.mount.path / ".mirror").exists)
        alive.settle()
        alive.witness.rm(f"{HOME}/stopped")
        alive.settle()


def test_a_watch_that_is_not_answered_is_set_again(
    place: Place, liar: LyingStore, tmp_path: Path
) -> None:
    with mirrored(behind(place, liar), tmp_path / "m", "timeout=2") as alive:
        liar.lie = on(Op.WATCH, silence)
        liar.hang_up()
        await_true(lambda: is_gone(alive))
        time.sleep(3.0)  # longer than the watch may take
        liar.behave()
        alive.witness.close()
        alive.witness = place.witness()
        await_true((alive.mount.path / ".mirror").exists)
        alive.settle()


def test_a_watch_that_is_refused_is_tried_again(
    place: Place, liar: LyingStore, tmp_path: Path
) -> None:
    with mirrored(behind(place, liar), tmp_path / "m") as alive:
        liar.lie = on(Op.WATCH, says(b"E2BIG\0", Op.ERROR))
        liar.hang_up()
        await_true(lambda: is_gone(alive))
        await_true(lambda: "refuses the watch" in alive.mount.stderr)
        liar.behave()
        alive.witness.close()
        alive.witness = place.witness()
        await_true((alive.mount.path / ".mirror").exists)
        alive.settle()


def test_hung_up_on_in_the_middle(place: Place, liar: LyingStore, tmp_path: Path) -> None:
    with mirrored(behind(place, liar), tmp_path / "m") as alive:
        alive.witness.close()
        alive.witness = place.witness()
        for number in range(5):
            for n in range(20):
                alive.witness.write(f"{HOME}/hung/{n}", str(number))
            liar.hang_up()
            for n in range(20):
                alive.witness.write(f"{HOME}/hung/{n}", f"{number}+")
            alive.settle()
        alive.witness.rm(f"{HOME}/hung")


# ---------------------------------------------------------------------------------- lies


FOREIGN = (
    b"/",
    b"/local",
    b"/local/domain/0x",
    b"/local/domain/1/name",
    b"/local/domain/0/../../../etc/passwd",
    b"/local/domain/0/./name",
    b"/local/domain/0/a//b",
    b"/local/domain/0/",
    b"/local/domain/0/" + b"n/" * 2000 + b"n",
    b"/local/domain/0/.value",
    b"/local/domain/0/a.b",
    b"/local/domain/0/\xff\xfe",
    b"local/domain/0/name",
    b"name",
    b"../x",
    b"",
    b"@releaseDomain",
)


def test_events_of_other_places(place: Place, liar: LyingStore, tmp_path: Path) -> None:
    tokens: list[tuple[Talk, bytes]] = []

    def remember(talk: Talk, request: Message) -> bool:
        if request.op == Op.WATCH:
            tokens.append((talk, request.payload.split(b"\0")[1]))
        return False

    liar.lie = remember
    with scratch() as above, mirrored(behind(place, liar), tmp_path / "m") as alive:
        alive.witness.close()
        alive.witness = place.witness()
        for talk, token in tokens:
            for path in FOREIGN:
                talk.event(path, token)
            talk.event(b"/local/domain/0/name", token + b"?")
        alive.witness.write(f"{HOME}/after", "v")
        await_true((alive.directory / "after").exists)
        alive.settle()
        alive.witness.rm(f"{HOME}/after")
        assert os.listdir(above) == []


def test_names_of_no_file(place: Place, liar: LyingStore, tmp_path: Path) -> None:
    """A listing with names that lead elsewhere."""
    names = b"..\0.\0a/b\0/etc\0\0.value\0ok\0" + b"\xff\0"

    def lie(talk: Talk, request: Message) -> bool:
        return request.payload == b"/local/domain/0/lies\0" and says(names)(talk, request)

    with place.witness() as store:
        store.write(f"{HOME}/lies/ok", "v")
        liar.lie = on(Op.DIRECTORY, lie)
        with live(liar.path, store, root=f"{HOME}/lies") as alive:
            assert os.listdir(alive.directory) == ["ok"]
            assert alive.path("ok").read_text() == "v\n"
        store.rm(f"{HOME}/lies")


@pytest.mark.parametrize(
    "lie",
    [
        on(Op.WATCH, silence),
        on(Op.READ, says(b"EIO\0", Op.ERROR)),
    ],
    ids=["no watch", "no values"],
)
def test_no_mirror_of_nonsense(place: Place, liar: LyingStore, tmp_path: Path, lie: object) -> None:
    def later(talk: Talk, request: Message) -> bool:
        # The mount gets what it needs.
        if request.payload == b"domid\0":
            return False
        assert callable(lie)
        return bool(lie(talk, request))

    liar.lie = later
    with scratch() as above:
        said = refused(behind(place, liar), above / "m", tmp_path / "m", "timeout=2")
        assert "cannot make the mirror" in said
        assert os.listdir(above) == []


MANY = 400
"""Nodes: the mirror looks at the next ones while it makes the files of the last."""


def many(store: XsClient, directory: str) -> None:
    store.pipeline(("WRITE", strings(f"{directory}/{n}") + b"%d" % n) for n in range(MANY))


def contains(path: Path, content: str) -> bool:
    return path.exists() and path.read_text() == content


NONSENSE: dict[str, tuple[Op, Lie]] = {
    "an error of a value": (Op.READ, says(b"EIO\0", Op.ERROR)),
    "an unknown error": (Op.DIRECTORY, says(b"EWHATEVER\0", Op.ERROR)),
    "a listing without its end": (Op.DIRECTORY, says(b"child")),
    "too many children to list": (Op.DIRECTORY, says(b"E2BIG\0", Op.ERROR)),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_node_that_makes_no_sense_costs_that_node(
    place: Place, liar: LyingStore, caplog: pytest.LogCaptureFixture, nonsense: str
) -> None:
    """The mirror has all the others, at the start and later, and the log tells once."""
    top = "/sense"
    bad = [f"{top}/bad", f"{top}/many/{MANY // 2}"]
    op, reply = NONSENSE[nonsense]

    def lie(talk: Talk, request: Message) -> bool:
        path = request.payload.partition(b"\0")[0].decode()
        if path not in bad:
            return False
        if nonsense == "too many children to list" and request.op == Op.DIRECTORY_PART:
            return says(b"ENOSYS\0", Op.ERROR)(talk, request)
        return request.op == op and reply(talk, request)

    with place.witness() as store:
        many(store, f"{top}/many")
        store.write(f"{top}/bad", "v")
        liar.lie = lie
        with live(liar.path, store, root=top) as alive:
            for number in range(3):
                for path in bad:
                    store.write(path, str(number))
                store.write(f"{top}/good", str(number))
                await_true(partial(contains, alive.path("good"), f"{number}\n"))
            assert alive.mirror.is_current
            assert sorted(os.listdir(alive.directory)) == ["good", "many"]
            assert len(os.listdir(alive.path("many"))) == MANY - 1
            for path in bad:
                said = f"left out of the mirror: {path.encode()!r}"
                assert sum(said in line for line in caplog.messages) == 1
            liar.behave()
            for path in bad:
                store.write(path, "good")
            alive.settle()
        store.rm(top)


@pytest.mark.parametrize(
    "perms", [b"garbage", b"", b"n0\0x7\0", b"n0\0r-1\0", b"\xff" * 3000 + b"\0"]
)
def test_permissions_that_make_no_sense_are_shown_as_they_came(
    place: Place, liar: LyingStore, perms: bytes
) -> None:
    """Domain 0 may do everything with the node, and sees it."""
    path = "/sense/bad"

    def lie(talk: Talk, request: Message) -> bool:
        return request.payload == f"{path}\0".encode() and says(perms)(talk, request)

    with place.witness() as store:
        store.write(path, "v")
        liar.lie = on(Op.GET_PERMS, lie)
        with live(liar.path, store, root="/sense") as alive:
            store.write(path, "w")
            await_true(lambda: alive.path("bad").read_text() == "w\n")
            if has_user_attributes(alive.directory.parent) and perms:
                shown = os.getxattr(alive.path("bad"), "user.xs.perms")
                assert shown == perms.rstrip(b"\0").replace(b"\0", b",")
        store.rm("/sense")


def test_a_root_that_makes_no_sense_has_no_mirror(
    place: Place, liar: LyingStore, tmp_path: Path
) -> None:
    top = f"{HOME}/many"

    def lie(talk: Talk, request: Message) -> bool:
        about = request.payload == f"{top}\0".encode()
        return about and says(b"EIO\0", Op.ERROR)(talk, request)

    with place.witness() as store:
        many(store, top)
        liar.lie = on(Op.READ, lie)
        with scratch() as above:
            said = refused(behind(place, liar), above / "m", tmp_path / "m", f"root={top}")
            assert "cannot make the mirror" in said
            assert os.listdir(above) == []
        store.rm(top)


def test_hung_up_on_while_many_are_looked_at(
    place: Place, liar: LyingStore, tmp_path: Path
) -> None:
    top = f"{HOME}/many"
    hung_up = 0

    def lie(talk: Talk, request: Message) -> bool:
        nonlocal hung_up
        if hung_up < 3 and request.payload == f"{top}/200\0".encode():
            hung_up += 1
            raise HangUp
        return False

    with place.witness() as store:
        many(store, top)
        liar.lie = on(Op.READ, lie)
        with live(liar.path, store, root=top) as alive:
            alive.settle()
            assert len(os.listdir(alive.directory)) == MANY
        assert hung_up == 3
        store.rm(top)


def test_nonsense_later_withdraws_it(place: Place, liar: LyingStore, tmp_path: Path) -> None:
    def about_home(talk: Talk, request: Message) -> bool:
        about = request.payload == f"{HOME}\0".encode()
        return about and says(b"EIO\0", Op.ERROR)(talk, request)

    with scratch() as above, place.witness() as store:
        options = f"timeout=5,mirror={above}/m"
        with mounted(["-o", options, liar.path], tmp_path / "m", tracebacks=True) as mount:
            alive = Mirrored(mount, above / "m", HOME, store)
            alive.settle()
            liar.lie = on(Op.READ, about_home)
            store.write(f"{HOME}/nonsense", "v")
            store.write(HOME, "v")
            await_true(lambda: is_gone(alive))
            assert (mount.path / "nonsense").read_text() == "v\n"
            liar.behave()
            store.rm(f"{HOME}/nonsense")
            store.write(HOME, "")
            await_true((mount.path / ".mirror").exists, 70)
            alive.settle()
        assert os.listdir(above) == []
