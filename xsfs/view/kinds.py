"""Which nodes without children are directories.

Two things decide: Xen's conventions, as a table of containers, and what has happened in this mount.  The
table comes from docs/misc/xenstore-paths.pandoc, libxl, XAPI and Qubes: nodes that a toolstack creates
empty and fills later.  Only the outermost levels matter, since a container with children is a directory
anyway.

A `StickyDirectories` owns the paths of nodes that have been directories since the mount.  The tasks of FUSE
operations and the mirror's task change it.  It calls `on_change` at each change, for the mirror.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

_ABOUT: Final = "vif|vbd|hotplug|PVAddons|device|backend"

_OF_A_DOMAIN: Final = (
    "bios-strings|console|control|data|drivers|hvmloader|image|libxl",
    "memory|messages|platform|rrd|serial|store|vm-data|xenserver|data/vchan",
    f"(attr|error|feature)(/({_ABOUT}))?",
    "(error/)?backend(/[a-z0-9_]+(/N(/N)?)?)?",
    "(device|device-misc|error/device)(/[a-z0-9_]+(/N)?)?",
    "cpu(/N)?",
    "device-model(/N(/backends)?)?",
)
"""Patterns of paths relative to a domain's home, with N for a number."""

_CONTAINERS: Final = (
    "/",
    "/libxl(/N(/(device|remus))?)?",
    "/local(/pool(/N)?)?",
    f"/local/domain(/N(/({'|'.join(_OF_A_DOMAIN)}))?)?",
    "/(guest_agent_features|mh|vss|xapi)",
    "/tool(/xenstored)?",
    "/vm(/[^/]+(/(image|rtc|device))?)?",
)
"""Patterns of absolute paths.  A container's parent is a container, too."""

_CONTAINER: Final = re.compile("|".join(_CONTAINERS).replace("N", "[0-9]+").encode())


def is_container(path: bytes) -> bool:
    """Whether a node without value and children is a directory by Xen's conventions."""
    return _CONTAINER.fullmatch(path) is not None


STICKY_MAX: Final = 100_000
"""How many paths are remembered.  Past it the oldest are forgotten, and the conventions decide about them:
a host whose guests come and go for years must not grow."""


class StickyDirectories:
    """The nodes that have been directories since the mount, by path.

    A node with neither value nor children could be a file or a directory.  One that mkdir created, or that
    had children once, stays a directory.

    A directory whose `.value` was created through the mount stays one even with a value and without
    children.  Otherwise a tool that restores a backup would turn it into a file before its children exist.
    Its `.value` exists even while it is empty, because the tool that created it looks for it.
    """

    def __init__(self, outer: StickyDirectories | None = None) -> None:
        """`outer` are those of the mount if these are a transaction's."""
        self._outer = outer
        self._has_value: dict[bytes, bool | None] = {}
        """By path of a directory: whether its `.value` was created.  In a transaction, only those that it has
        changed; None for a directory that it has removed."""
        self.on_change: Callable[[bytes], None] | None = None
        """Called with each path about which something changes."""

    def carry_out(self, committed: StickyDirectories) -> None:
        """Carry out the changes of a transaction that was committed."""
        for path, has_value in committed._has_value.items():
            self._set(path, has_value)

    def has_value(self, path: bytes) -> bool | None:
        """Whether its `.value` was created; None if it is not a sticky directory."""
        if self._outer is None or path in self._has_value:
            return self._has_value.get(path)
        return self._outer.has_value(path)

    def _set(self, path: bytes, has_value: bool | None) -> None:
        if has_value is self.has_value(path):
            return
        self._has_value.pop(path, None)  # so that it becomes the newest
        if has_value is not None or self._outer is not None:
            self._has_value[path] = has_value
        self._tell(path)
        if len(self._has_value) > STICKY_MAX:
            oldest = next(iter(self._has_value))
            del self._has_value[oldest]
            self._tell(oldest)

    def _tell(self, path: bytes) -> None:
        if self.on_change is not None:
            self.on_change(path)

    def add(self, path: bytes, *, with_value: bool = False) -> None:
        """The node is a directory; `with_value` if its `.value` was created."""
        known = self.has_value(path)
        if known is None or with_value > known:
            self._set(path, with_value)
        elif self._outer is None:
            self._has_value[path] = self._has_value.pop(path)  # now the newest

    def discard(self, path: bytes) -> None:
        """The node was removed, or renamed, through the mount."""
        self._set(path, None)

    def discard_value(self, path: bytes) -> None:
        """The `.value` of this directory was removed."""
        if self.has_value(path):
            self._set(path, False)

    def move(self, source: bytes, target: bytes) -> None:
        """A subtree was renamed."""
        below = source + b"/"
        everything = self._has_value
        if self._outer is not None:
            everything = self._outer._has_value | everything
        moved = {
            path: has_value
            for path, has_value in everything.items()
            if has_value is not None and (path == source or path.startswith(below))
        }
        for path in moved:
            self.discard(path)
        for path, has_value in moved.items():
            self.add(target + path[len(source) :], with_value=has_value)

    def __contains__(self, path: bytes) -> bool:
        return path in self._has_value if self._outer is None else self.has_value(path) is not None
