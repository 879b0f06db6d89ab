"""Ring: the copy of a live mirror in process: what one look after the other makes of its files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple, cast

import pytest

from tests.mirroring import scratch
from xsfs.client import Store
from xsfs.known import KnownDirectories
from xsfs.looks import Look
from xsfs.mirror_copy import Copy
from xsfs.mirror_files import PERMS_ATTRIBUTE, MirrorFiles
from xsfs.names import TEXT
from xsfs.ownership import Ownership
from xsfs.view import Sight, View

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
        {os.path.relpath(path, top): os.getxattr(path, PERMS_ATTRIBUTE) for path in attributes},
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
    return Shown(contents, of_all if has_perms else {})


@pytest.fixture
def shm() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.mark.parametrize("staged", [True, False], ids=["in the workshop", "seen by readers"])
@pytest.mark.parametrize(("first", "second"), list(product(SEEN, SEEN)))
def test_a_node_is_shown_as_it_was_seen_last(
    first: str, second: str, staged: bool, shm: Path
) -> None:
    view = View(cast(Store, None), 0, b"/", TEXT, KnownDirectories())
    files = MirrorFiles(str(shm / "mirror"), Ownership(0, 0, 0o077))
    files.open()
    try:
        copy = Copy(view, files)

        def look(path: bytes, sight: Sight) -> None:
            copy.again.pop(path, None)
            for _ in copy.apply(path, sight, renew=False):
                pass

        def publish() -> None:
            for _ in files.publish():
                pass

        files.begin()
        copy.begin()
        look(b"/", seen(b"", b"node"))
        if not staged:
            publish()
        for sight in (SEEN[first], SEEN[second]):
            look(NODE, sight)
            assert (CHILD in copy.again) == bool(sight.names)
            if sight.names:
                look(CHILD, seen(b"of the child"))
        if staged:
            publish()
        result = shown(shm / "mirror", has_perms=files.has_perms)
        assert result == expected(SEEN[second], has_perms=files.has_perms)
        nodes = [name for name in result.contents if not name.endswith(".value")]
        assert copy.nodes == len(nodes)
    finally:
        files.close()
