"""Ring: the copy of a live mirror in process: what one look after the other makes of its files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from operator import add
from pathlib import Path
from typing import Final, NamedTuple, cast

import pytest

from tests.support.mirroring import scratch
from xsfs.mirror.reconcile import READY_SECONDS, Copy
from xsfs.mirror.staging import PERMS_ATTRIBUTE, MirrorFiles
from xsfs.view.known import KnownDirectories
from xsfs.view.looks import Look
from xsfs.view.names import TEXT
from xsfs.view.ownership import Ownership
from xsfs.view.view import Sight, View
from xsfs.xenstore.store import Store

NODE: Final = b"/node"
CHILD: Final = NODE + b"/child"


def seen(value: bytes, *names: bytes, perms: bytes = b"n0\0") -> Sight:
    return Sight(Look(value, bool(names), True, True), list(names), perms)


GONE: Final = Sight(None, [], b"")

SEEN: Final = {
    "nothing": GONE,
    "a file": seen(b"value"),
    "another file": seen(b"other", perms=b"r7\0"),
    "an empty file": seen(b""),
    "a directory": seen(b"", b"child"),
    "a directory with other perms": seen(b"", b"child", perms=b"n0\0r7\0"),
    "a directory of unknown perms": seen(b"", b"child", perms=b""),
    "a directory with a value": seen(b"value", b"child"),
}


class Shown(NamedTuple):
    """All that is below a directory, and what is in the files; None: a directory."""

    contents: dict[str, bytes | None]
    perms: dict[str, bytes]


def shown(top: Path, *, has_perms: bool) -> Shown:
    paths = [
        os.path.join(directory, name)
        for directory, directories, files in os.walk(top)
        for name in (*directories, *files)
    ]
    contents = {
        os.path.relpath(path, top): None if os.path.isdir(path) else Path(path).read_bytes()
        for path in paths
    }
    attributes = paths if has_perms else []
    return Shown(
        contents,
        {
            os.path.relpath(path, top): os.getxattr(path, PERMS_ATTRIBUTE)
            for path in attributes
            if PERMS_ATTRIBUTE in os.listxattr(path)
        },
    )


def expected(sight: Sight, *, has_perms: bool) -> Shown:
    look = sight.look
    if look is None:
        return Shown({}, {})
    node, child = "node", "node/child"
    contents: dict[str, bytes | None] = {node: TEXT.render(look.value)}
    if look.has_children:
        contents = {node: None, child: b"of the child\n"}
        if look.value:
            contents["node/.value"] = TEXT.render(look.value)
    perms = cast(bytes, sight.perms).rstrip(b"\0").replace(b"\0", b",")
    of_all = {name: b"n0" if name == child else perms for name in contents}
    of_all = {name: text for name, text in of_all.items() if text}
    return Shown(contents, of_all if has_perms else {})


class Copied(NamedTuple):
    files: MirrorFiles
    copy: Copy

    def look(self, path: bytes, sight: Sight) -> None:
        self.copy.again.pop(path, None)
        for _ in self.copy.apply(path, sight, renew=False):
            pass

    def publish(self) -> None:
        for _ in self.files.publish():
            pass


@contextmanager
def copied(directory: Path) -> Iterator[Copied]:
    """A copy in the workshop, of a root with one node that was not looked at."""
    view = View(cast(Store, None), 0, b"/", TEXT, KnownDirectories())
    files = MirrorFiles(str(directory), Ownership(0, 0, 0o077))
    files.open()
    try:
        it = Copied(files, Copy(view, files))
        files.begin()
        it.copy.begin()
        it.look(b"/", seen(b"", b"node"))
        yield it
    finally:
        files.close()


@pytest.fixture
def shm() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.mark.parametrize("staged", [True, False], ids=["in the workshop", "seen by readers"])
@pytest.mark.parametrize(("first", "second"), list(product(SEEN, SEEN)))
def test_a_node_is_shown_as_it_was_seen_last(
    first: str, second: str, staged: bool, shm: Path
) -> None:
    with copied(shm / "mirror") as it:
        if not staged:
            it.publish()
        for sight in (SEEN[first], SEEN[second]):
            it.look(NODE, sight)
            assert (CHILD in it.copy.again) == bool(sight.names)
            if sight.names:
                it.look(CHILD, seen(b"of the child"))
        if staged:
            it.publish()
        has_perms = it.files.has_perms
        result = shown(shm / "mirror", has_perms=has_perms)
        assert result == expected(SEEN[second], has_perms=has_perms)
        nodes = [name for name in result.contents if not name.endswith(".value")]
        assert it.copy.nodes == len(nodes)


@pytest.mark.parametrize("staged", [True, False], ids=["in the workshop", "seen by readers"])
@pytest.mark.parametrize("parent", ["nothing", "a file"])
def test_a_child_waits_for_its_parent(parent: str, staged: bool, shm: Path) -> None:
    """Where it cannot be shown, the way down to it begins at the parent."""
    with copied(shm / "mirror") as it:
        if not staged:
            it.publish()
        it.look(NODE, SEEN[parent])
        it.look(CHILD, seen(b"of the child"))
        assert list(it.copy.again) == [NODE]
        it.look(NODE, SEEN["a directory"])
        it.look(CHILD, seen(b"of the child"))
        assert not it.copy.again
        if staged:
            it.publish()
        has_perms = it.files.has_perms
        result = shown(shm / "mirror", has_perms=has_perms)
        assert result == expected(SEEN["a directory"], has_perms=has_perms)


EMPTY: Final = SEEN["an empty file"]


@pytest.mark.parametrize("moment", range(8))
@pytest.mark.parametrize("becomes", ["a directory", "a file"])
def test_what_is_learned_of_a_node_while_its_children_go(
    becomes: str, moment: int, shm: Path
) -> None:
    """It is empty now: whether it is a directory is a matter of what is known."""
    with copied(shm / "mirror") as it:
        it.publish()
        known = it.copy._view.known

        def changed(path: bytes) -> None:  # as the mirror does
            if it.copy.contradicts(path):
                it.copy.again[path] = None

        known.on_change = changed
        names = [b"%d" % number for number in range(5)]
        it.look(NODE, seen(b"", *names))
        for name in names:
            it.look(NODE + b"/" + name, seen(b"value"))
        if becomes == "a file":
            known.add(NODE)
        assert not it.copy.again

        steps = it.copy.apply(NODE, EMPTY, renew=True)
        for _ in range(moment):
            next(steps, None)
        if becomes == "a file":
            known.discard(NODE)
        else:
            known.add(NODE)
        for _ in steps:
            pass
        while it.copy.again:
            assert list(it.copy.again) == [NODE]
            it.look(NODE, EMPTY)
        assert list((shm / "mirror").iterdir()) == [shm / "mirror/node"]
        assert (shm / "mirror/node").is_dir() == (becomes == "a directory")
        assert list(it.files.names(b"node") if becomes == "a directory" else []) == []


@pytest.mark.parametrize("moment", range(3))
def test_what_is_learned_while_the_copy_moves_to_its_place(moment: int, shm: Path) -> None:
    with copied(shm / "mirror") as it:
        it.look(NODE, EMPTY)
        steps = it.copy.publish()
        for _ in range(moment):
            next(steps, None)
        it.copy._view.known.add(NODE)
        assert it.copy.contradicts(NODE)
        for _ in steps:
            pass
        it.look(NODE, EMPTY)
        assert (shm / "mirror/node").is_dir()


# ----------------------------------------------------------------- what is made ready meanwhile


@pytest.mark.parametrize(("first", "second"), list(product(SEEN, SEEN)))
def test_a_change_whose_file_was_made_ready(first: str, second: str, shm: Path) -> None:
    """Whatever it turns out to be, and whatever was there."""
    with copied(shm / "mirror") as it:
        it.publish()
        it.look(NODE, SEEN[first])
        if SEEN[first].names:
            it.look(CHILD, seen(b"of the child"))
        it.copy.make_ready(NODE)
        assert it.copy.is_ready(NODE)
        for _ in it.copy.apply(NODE, SEEN[second], renew=True):
            pass
        if SEEN[second].names:
            it.look(CHILD, seen(b"of the child"))
        it.files.rest()
        has_perms = it.files.has_perms
        result = shown(shm / "mirror", has_perms=has_perms)
        assert result == expected(SEEN[second], has_perms=has_perms)
        assert "new" not in os.listdir(shm / ".mirror.xsfs")


def test_what_cannot_be_shown_is_not_made_ready(shm: Path) -> None:
    with copied(shm / "mirror") as it:
        it.publish()
        it.look(NODE, SEEN["a file"])
        it.copy.make_ready(CHILD)
        assert not it.copy.is_ready(CHILD)
        assert list(it.copy.again) == [NODE]
        assert "new" not in os.listdir(shm / ".mirror.xsfs")


def test_what_is_ready_is_of_one_node_and_of_a_moment(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the place is looked at anew: what was a file may be a directory by now."""
    with copied(shm / "mirror") as it:
        it.publish()
        it.look(NODE, SEEN["a file"])

        def becomes_a_directory() -> None:
            it.copy.make_ready(NODE)
            assert it.copy.is_ready(NODE)
            (shm / "mirror" / "node").unlink()
            (shm / "mirror" / "node").mkdir()

        becomes_a_directory()
        it.look(b"/", seen(b"", b"node"))
        it.look(NODE, SEEN["another file"])
        assert (shm / "mirror" / "node").read_bytes() == b"other\n"
        becomes_a_directory()
        monkeypatch.setattr(time, "perf_counter", partial(add, time.perf_counter(), READY_SECONDS))
        it.look(NODE, SEEN["a file"])
        assert (shm / "mirror" / "node").read_bytes() == b"value\n"
