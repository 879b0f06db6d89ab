"""Ring: the copy of a live mirror in process: what fetched nodes make of its files, one after the other."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple, cast

import pytest

from tests.support.mirroring import scratch
from xsfs.mirror.reconcile import GONE, FetchedNode, Reconciler
from xsfs.mirror.staging import PERMS_ATTRIBUTE, MirrorDirectory
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT
from xsfs.view.ownership import Ownership
from xsfs.view.view import NodeState, View
from xsfs.xenstore.store import Store

NODE: Final = b"/node"
CHILD: Final = NODE + b"/child"


def seen(value: bytes, *names: bytes, perms: bytes = b"n0\0") -> FetchedNode:
    return FetchedNode(NodeState(value, bool(names), True, True), names, perms)


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


def expected(node: FetchedNode, *, has_perms: bool) -> Shown:
    state = node.state
    if state is None:
        return Shown({}, {})
    assert state.value is not None
    child = "node/child"
    contents: dict[str, bytes | None] = {"node": TEXT.render(state.value)}
    if state.has_children:
        contents = {"node": None, child: b"of the child\n"}
        if state.value:
            contents["node/.value"] = TEXT.render(state.value)
    perms = node.perms.rstrip(b"\0").replace(b"\0", b",")
    of_all = {name: b"n0" if name == child else perms for name in contents}
    of_all = {name: text for name, text in of_all.items() if text}
    return Shown(contents, of_all if has_perms else {})


class Copied(NamedTuple):
    files: MirrorDirectory
    copy: Reconciler
    queue: OrderedDict[bytes, bool]

    def apply(self, path: bytes, node: FetchedNode, *, renew: bool = False) -> int:
        """How many steps that took."""
        return sum(1 for _ in self.copy.apply(path, node, renew=renew))

    def publish(self) -> None:
        for _ in self.files.publish():
            pass


@contextmanager
def copied(directory: Path) -> Iterator[Copied]:
    """A copy in the staging directory, of a root with one node that was not fetched."""
    view = View(cast(Store, None), 0, b"/", TEXT, StickyDirectories())
    files = MirrorDirectory(str(directory), Ownership(0, 0, 0o077))
    files.open()
    try:
        queue: OrderedDict[bytes, bool] = OrderedDict()
        it = Copied(files, Reconciler(view, files, queue), queue)
        it.copy.begin()
        it.apply(b"/", seen(b"", b"node"))
        yield it
    finally:
        files.close()


@pytest.fixture
def shm() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.mark.parametrize("renew", [True, False], ids=["an event names it", "none does"])
@pytest.mark.parametrize("staged", [True, False], ids=["staged", "seen by readers"])
@pytest.mark.parametrize(("first", "second"), list(product(SEEN, SEEN)))
def test_a_node_is_shown_as_it_was_seen_last(
    first: str, second: str, staged: bool, renew: bool, shm: Path
) -> None:
    with copied(shm / "mirror") as it:
        if not staged:
            it.publish()
        for node in (SEEN[first], SEEN[second]):
            it.apply(NODE, node, renew=renew)
            assert (CHILD in it.queue) == bool(node.names)
            if node.names:
                it.apply(CHILD, seen(b"of the child"))
        if staged:
            it.publish()
        has_perms = it.files.has_perms
        result = shown(shm / "mirror", has_perms=has_perms)
        assert result == expected(SEEN[second], has_perms=has_perms)
        nodes = [name for name in result.contents if not name.endswith(".value")]
        assert it.copy.nodes == len(nodes)
        assert "new" not in os.listdir(shm / ".mirror.xsfs")


def test_a_file_is_replaced_by_an_equal_one_if_an_event_names_the_node(shm: Path) -> None:
    with copied(shm / "mirror") as it:
        it.publish()
        file = shm / "mirror" / "node"
        inodes = []
        for renew in (True, False, True):
            it.apply(NODE, seen(b"value"), renew=renew)
            with file.open("rb"):
                inodes.append(file.stat().st_ino)
        assert inodes[0] == inodes[1] != inodes[2]


def test_no_step_goes_through_all_children(shm: Path) -> None:
    many = [b"%d" % number for number in range(10_000)]
    with copied(shm / "mirror") as it:
        assert it.apply(NODE, seen(b"", *many)) >= len(many)
        for name in many:
            it.apply(NODE + b"/" + name, seen(b""))
        it.publish()
        assert it.apply(NODE, seen(b"", *many)) >= 2 * len(many)
        assert it.apply(NODE, GONE) > len(many)


@pytest.mark.parametrize("staged", [True, False], ids=["staged", "seen by readers"])
@pytest.mark.parametrize("parent", ["nothing", "a file"])
def test_a_child_waits_for_its_parent(parent: str, staged: bool, shm: Path) -> None:
    """Where it cannot be shown, the way down to it begins at the parent."""
    with copied(shm / "mirror") as it:
        if not staged:
            it.publish()
        it.apply(NODE, SEEN[parent])
        it.apply(CHILD, seen(b"of the child"))
        assert list(it.queue) == [NODE]
        it.apply(NODE, SEEN["a directory"])
        it.apply(CHILD, seen(b"of the child"))
        assert not it.queue
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
        sticky = it.copy._view.sticky

        def changed(path: bytes) -> None:  # as the mirror does
            if it.copy.contradicts(path):
                it.queue[path] = False

        sticky.on_change = changed
        names = [b"%d" % number for number in range(5)]
        it.apply(NODE, seen(b"", *names))
        for name in names:
            it.apply(NODE + b"/" + name, seen(b"value"))
        if becomes == "a file":
            sticky.add(NODE)
        assert not it.queue

        steps = it.copy.apply(NODE, EMPTY, renew=True)
        for _ in range(moment):
            next(steps, None)
        if becomes == "a file":
            sticky.discard(NODE)
        else:
            sticky.add(NODE)
        for _ in steps:
            pass
        while it.queue:
            assert list(it.queue) == [NODE]
            it.apply(NODE, EMPTY)
        assert list((shm / "mirror").iterdir()) == [shm / "mirror/node"]
        assert (shm / "mirror/node").is_dir() == (becomes == "a directory")
        assert list(it.files.scan(b"node") if becomes == "a directory" else []) == []


@pytest.mark.parametrize("moment", range(3))
def test_what_is_learned_while_the_copy_moves_to_its_place(moment: int, shm: Path) -> None:
    with copied(shm / "mirror") as it:
        it.apply(NODE, EMPTY)
        steps = it.files.publish()
        for _ in range(moment):
            next(steps, None)
        it.copy._view.sticky.add(NODE)
        assert it.copy.contradicts(NODE)
        for _ in steps:
            pass
        it.apply(NODE, EMPTY)
        assert (shm / "mirror/node").is_dir()
