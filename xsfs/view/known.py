"""Which nodes have been directories since the mount: all that it remembers of the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

KNOWN_MAX: Final = 100_000
"""How many nodes are remembered as directories.  Past it the oldest are forgotten, and fall back on
the conventions: a host whose guests come and go for years must not grow."""


class KnownDirectories:
    """The nodes that have been directories since the mount, by path.

    An empty node without a value could be either; one that was made by mkdir, or had children once,
    stays a directory.  A directory whose `.value` was made through the mount stays one even with a
    value and without children, or restoring a backup would turn it into a file before its children
    are there; and its `.value` is there even while it is empty, or the tool that made it would miss
    it.

    Whoever keeps a copy of the tree sets `on_change`, which is called with each path of which
    something else is known now.
    """

    def __init__(self) -> None:
        self._paths: dict[bytes, bool] = {}
        """Whether `.value` was made, of each path."""
        self._made: dict[bytes, int] = {}
        """The moment when it was made a directory, of those that were."""
        self.moment = 0
        """Grows with each of them."""
        self.on_change: Callable[[bytes], None] | None = None

    def _tell(self, path: bytes) -> None:
        if self.on_change is not None:
            self.on_change(path)

    def add(self, path: bytes, *, with_value: bool = False) -> None:
        self.moment += 1
        self._made[path] = self.moment
        self._remember(path, with_value)

    def seen(self, path: bytes) -> None:
        """An answer of the store showed it with children."""
        if self.get(path) is None:
            self._remember(path, False)

    def missed(self, path: bytes, asked: int) -> None:
        """An answer says that there is no such node.  It is of no weight where the node was made a
        directory after the moment at which the store was `asked`."""
        if self._made.get(path, 0) <= asked:
            self.discard(path)

    def _remember(self, path: bytes, with_value: bool) -> None:
        known = self._paths.pop(path, None)
        self._paths[path] = with_value = bool(known) or with_value
        if with_value is not known:
            self._tell(path)
        if len(self._paths) > KNOWN_MAX:
            self.discard(next(iter(self._paths)))

    def discard(self, path: bytes) -> None:
        self._made.pop(path, None)
        if self._paths.pop(path, None) is not None:
            self._tell(path)

    def discard_value(self, path: bytes) -> None:
        """The `.value` of this directory was removed."""
        if self._paths.get(path):
            self._paths[path] = False
            self._tell(path)

    def move(self, source: bytes, target: bytes) -> None:
        """A subtree was renamed."""
        for path in self.below(source):
            with_value = self._paths[path]
            self.discard(path)
            self.add(target + path[len(source) :], with_value=with_value)

    def below(self, top: bytes) -> list[bytes]:
        """The known ones at and below `top`."""
        below = top + b"/"
        return [path for path in self._paths if path == top or path.startswith(below)]

    def get(self, path: bytes) -> bool | None:
        """Whether `.value` was made here; None where no directory is known."""
        return self._paths.get(path)

    def has_value(self, path: bytes) -> bool:
        """Whether `.value` was made here."""
        return bool(self.get(path))
