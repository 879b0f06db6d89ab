"""Which empty nodes are directories: the containers of Xen's conventions.

From docs/misc/xenstore-paths.pandoc and libxl: what the toolstack makes empty, and fills later.  Only
the outermost levels matter, as what a container has in it makes it a directory anyway.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

_NUMBER: Final = re.compile(rb"[0-9]+")
_TYPE: Final = re.compile(rb"[a-z0-9_]+")
_ANY: Final = re.compile(rb"[^/]+")


class Container(NamedTuple):
    """A container, and the containers that may be in it."""

    named: Mapping[bytes, Container]
    pattern: re.Pattern[bytes] | None = None
    """Of the names of others, which are all alike: `each`."""
    each: Container | None = None

    def get(self, name: bytes) -> Container | None:
        """The child of this name, if it is one."""
        found = self.named.get(name)
        if found is None and self.pattern is not None and self.pattern.fullmatch(name):
            return self.each
        return found


EMPTY: Final = Container({})
"""None is in it."""


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
    """The container of this absolute path, if it is one.  What a container is in is one, too."""
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
