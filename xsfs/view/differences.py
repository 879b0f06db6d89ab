"""The changes that a commit would make: the nodes that a transaction has touched, compared with the store.

A `TouchedPaths` owns the paths for which a transaction has sent changes.  Only the tasks that use the
transaction touch it.  It has TOUCHED_MAX paths at most.  With one more it `overflows`, and the
differences are unknown from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import Final

from xsfs.view.names import join, parent_path
from xsfs.view.view import ABSENT, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import NotFound, XenstoreError
from xsfs.xenstore.protocol import Op, Request

TOUCHED_MAX: Final = 65_536
"""How many paths are remembered: 8 MiB of usual ones."""

COMPARE_WINDOW: Final = 32
"""How many nodes one pipeline asks about.  In a transaction of many nodes on long paths C xenstored takes
some 30 milliseconds for each request, and the pipeline has a time limit."""


class TouchedPaths:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.paths: set[bytes] = set()
        self.removed: set[bytes] = set()
        """Those that were removed, with all below."""
        self.overflows = False

    def add(self, requests: Iterable[Request]) -> None:
        """These requests are about to be sent."""
        for request in requests:
            if self.overflows or request.op not in (Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS):
                continue
            self.paths.add(request.path)
            if request.op == Op.RM:
                self.removed.add(request.path)
            if len(self.paths) > TOUCHED_MAX:
                self.paths.clear()
                self.removed.clear()
                self.overflows = True


def _above(path: bytes) -> Iterator[bytes]:
    """The paths of the nodes above, the nearest first."""
    while path != b"/":
        path = parent_path(path)
        yield path


_Content = tuple[bytes | None, bytes | None]
"""The value and the permissions of a node; None for what may not be read."""


async def differences(
    inside: View, outside: View, touched: TouchedPaths, before_window: Callable[[int], None]
) -> bytearray:
    """A line for each difference, parents first: `+ PATH`, `- PATH`, `* PATH` if the value differs, and
    `p PATH` if the permissions do.

    inside          the transaction's view
    before_window   called between pipelines with the size of the paths or of the text so far in bytes
    """
    paths = set(touched.paths)
    above = {way for path in paths for way in _above(path)}
    tops = [path for path in touched.removed if touched.removed.isdisjoint(_above(path))]
    size = 0
    for top, commands in product(tops, (inside.commands, outside.commands)):
        with suppress(NotFound):
            async for nodes in commands.walk_in_windows(top):
                paths.update(path for path, _, _ in nodes)
                size += sum(len(path) for path, _, _ in nodes)
                before_window(size)
    ordered = sorted(paths | above, key=lambda path: path.split(b"/"))
    text = bytearray()
    for start in range(0, len(ordered), COMPARE_WINDOW):
        before_window(len(text))
        window = ordered[start : start + COMPARE_WINDOW]
        now = await _contents(outside.commands, window)
        # Nodes above others are compared only if the transaction has made them.  If it read the others, their
        # later changes would be conflicts.
        window = [path for path in window if path in paths or now[path] is None]
        then = await _contents(inside.commands, window)
        for path in window:
            shown = b"." if path == inside.root else path.removeprefix(join(inside.root, b""))
            for mark in _marks(now[path], then[path]):
                text += b"%s %s\n" % (mark, shown)
    return text


async def _contents(commands: Commands, paths: Sequence[bytes]) -> dict[bytes, _Content | None]:
    """The contents of the nodes; None for a node that does not exist."""
    replies = iter(
        await commands.pipeline(
            [each for path in paths for each in (protocol.read(path), protocol.get_perms(path))]
        )
    )
    return {path: _content(*pair) for path, *pair in zip(paths, replies, replies, strict=True)}


def _content(*replies: Reply) -> _Content | None:
    for reply in replies:
        if isinstance(reply, XenstoreError) and reply.name != "EACCES":
            if reply.name in ABSENT:
                return None
            raise reply
    value, perms = (reply if isinstance(reply, bytes) else None for reply in replies)
    return value, perms


def _marks(old: _Content | None, new: _Content | None) -> list[bytes]:
    if old is None or new is None:
        return [] if old is new else [b"+" if old is None else b"-"]
    return [mark for mark, was, now in zip((b"*", b"p"), old, new, strict=True) if was != now]
