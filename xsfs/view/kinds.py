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
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

_NUMBER: Final = re.compile(rb"[0-9]+")
_TYPE: Final = re.compile(rb"[a-z0-9_]+")
_ANY: Final = re.compile(rb"[^/]+")


class Container(NamedTuple):
    """A container, and the containers that may be in it."""

    named: Mapping[bytes, Container]
    pattern: re.Pattern[bytes] | None = None
    """Matches the names of further containers, which are all alike: `each`."""
    each: Container | None = None

    def get(self, name: bytes) -> Container | None:
        """The child of this name, if it is a container."""
        found = self.named.get(name)
        if found is None and self.pattern is not None and self.pattern.fullmatch(name):
            return self.each
        return found


EMPTY: Final = Container({})
"""It has no containers in it."""


def _all(names: str, each: Container = EMPTY) -> Mapping[bytes, Container]:
    return dict.fromkeys(names.encode().split(), each)


def _numbered(each: Container = EMPTY) -> Container:
    return Container({}, _NUMBER, each)


_ABOUT = _all("vif vbd hotplug PVAddons device backend")
_BACKENDS = Container({}, _TYPE, _numbered(_numbered()))
_DEVICES = _all("console pvcalls vbd vfb vif vkbd vscsi vusb", _numbered())

_DOMAIN = Container(
    {
        **_all("bios-strings console control data drivers hvmloader image libxl memory"),
        **_all("platform serial store"),
        b"attr": Container(_ABOUT),
        b"backend": _BACKENDS,
        b"cpu": _numbered(),
        b"device": Container({**_DEVICES, b"suspend": EMPTY}),
        b"device-model": _numbered(Container(_all("backends"))),
        b"error": Container({**_ABOUT, b"backend": _BACKENDS, b"device": Container(_DEVICES)}),
        b"feature": Container(_ABOUT),
    }
)

_ROOT = Container(
    {
        b"libxl": _numbered(Container(_all("device remus"))),
        b"local": Container({b"domain": _numbered(_DOMAIN), b"pool": _numbered()}),
        b"tool": Container(_all("xenstored")),
        b"vm": Container({}, _ANY, Container(_all("image rtc device"))),
    }
)


def container_at(path: bytes) -> Container | None:
    """The container at this absolute path, if there is one.  A container's parent is a container, too."""
    container: Container | None = _ROOT
    if path != b"/":
        for name in path.split(b"/")[1:]:
            if container is None:
                return None
            container = container.get(name)
    return container


def is_container(path: bytes) -> bool:
    """Whether a node without value and children is a directory by Xen's conventions."""
    return container_at(path) is not None


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

    def _get(self, path: bytes) -> bool | None:
        """Whether its `.value` was created; None if it is not a sticky directory."""
        if self._outer is None or path in self._has_value:
            return self._has_value.get(path)
        return self._outer._get(path)

    def _set(self, path: bytes, has_value: bool | None) -> None:
        is_changed = has_value is not self._get(path)
        if is_changed or self._outer is None:
            self._has_value.pop(path, None)  # so that it becomes the newest
            if has_value is not None or self._outer is not None:
                self._has_value[path] = has_value
        if is_changed:
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
        self._set(path, with_value or self.has_value(path))

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
        return self._get(path) is not None

    def has_value(self, path: bytes) -> bool:
        """Whether it is a sticky directory in which `.value` was created."""
        return bool(self._get(path))
