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

from xsfs.view.bounded import Bounded

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

    def __init__(self) -> None:
        self._has_value: dict[bytes, bool] = {}
        """By path of a directory: whether its `.value` was created."""
        self.on_change: Callable[[bytes], None] | None = None
        """Called with each path about which something changes."""
        self._changed: Bounded[bytes, None] = Bounded(STICKY_MAX)
        """In a copy for a transaction: the paths about which something has changed."""

    def copy(self) -> StickyDirectories:
        """A copy for a transaction, which remembers what changes."""
        copied = StickyDirectories()
        copied._has_value = dict(self._has_value)
        copied.on_change = lambda path: copied._changed.put(path, None)
        return copied

    def carry_out(self, committed: StickyDirectories) -> None:
        """Carry out the changes of a copy whose transaction was committed."""
        for path in committed._changed:
            if path not in committed:
                self.discard(path)
            elif committed.has_value(path):
                self.add(path, with_value=True)
            else:
                self.add(path)
                self.discard_value(path)

    def _tell(self, path: bytes) -> None:
        if self.on_change is not None:
            self.on_change(path)

    def add(self, path: bytes, *, with_value: bool = False) -> None:
        """The node is a directory; `with_value` if its `.value` was created."""
        known = self._has_value.pop(path, None)
        self._has_value[path] = is_now = bool(known) or with_value
        if is_now is not known:
            self._tell(path)
        if len(self._has_value) > STICKY_MAX:
            self.discard(next(iter(self._has_value)))

    def discard(self, path: bytes) -> None:
        """The node was removed, or renamed, through the mount."""
        if self._has_value.pop(path, None) is not None:
            self._tell(path)

    def discard_value(self, path: bytes) -> None:
        """The `.value` of this directory was removed."""
        if self._has_value.get(path):
            self._has_value[path] = False
            self._tell(path)

    def move(self, source: bytes, target: bytes) -> None:
        """A subtree was renamed."""
        below = source + b"/"
        for path in [path for path in self._has_value if path == source or path.startswith(below)]:
            with_value = self._has_value[path]
            self.discard(path)
            self.add(target + path[len(source) :], with_value=with_value)

    def __contains__(self, path: bytes) -> bool:
        return path in self._has_value

    def has_value(self, path: bytes) -> bool:
        """Whether it is a sticky directory in which `.value` was created."""
        return self._has_value.get(path, False)
