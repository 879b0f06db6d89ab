"""Names and values as files have them, and as Xenstore has them.  Pure functions and tables.

A name of Xenstore is a file name, but for those over NAME_MAX: they appear under an alias.  A name
that begins with a dot, or holds one, cannot be Xenstore's, so xsfs's own names never collide.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from xsfs.xenstore.protocol import NAME, PATH_MAX, is_name

NAME_MAX: Final = 255
ALIAS_PREFIX: Final = 200
ALIASES_MAX: Final = 4096
"""How many names behind aliases are kept: 8 MiB at most."""
_ALIAS = re.compile(rb"[A-Za-z0-9_@-]{%d}~[0-9a-f]{16}" % ALIAS_PREFIX)

FORCED_SUFFIX: Final = b".d"
"""NAME.d is the node NAME as a directory, whatever it looks like now."""

VALUE_NAME: Final = b".value"


def file_name(name: bytes) -> bytes:
    """The file name of a child: its own, or an alias for one longer than file names can be."""
    if len(name) <= NAME_MAX:
        return name
    return name[:ALIAS_PREFIX] + b"~" + hashlib.sha256(name).hexdigest()[:16].encode()


def is_alias(name: bytes) -> bool:
    return _ALIAS.fullmatch(name) is not None


class Aliases:
    """Which names are behind aliases, as far as was seen lately: to find one otherwise, all children
    of a directory must be listed.

    An alias follows from the name alone, so what is kept can be no longer there, but not wrong; but a
    guest can make another name with the same alias, in a directory of its own.  So who asks has to
    look whether there is such a child, and else to list.
    """

    def __init__(self) -> None:
        self._names: dict[bytes, bytes] = {}

    def file_name(self, name: bytes) -> bytes:
        """As the function of this name; an alias is kept."""
        if len(name) <= NAME_MAX:
            return name
        alias = file_name(name)
        self._names.pop(alias, None)
        self._names[alias] = name
        if len(self._names) > ALIASES_MAX:
            del self._names[next(iter(self._names))]
        return alias

    def get(self, alias: bytes) -> bytes | None:
        return self._names.get(alias)


def forced_name(name: bytes) -> bytes | None:
    """NAME of `NAME.d`, or None for other names."""
    if name.endswith(FORCED_SUFFIX):
        name = name[: -len(FORCED_SUFFIX)]
        if is_name(name) or is_alias(name):
            return name
    return None


# `++` as no other split of a name could match, either.
_NAMES = re.compile(rb"(?:%s+\0)+" % NAME)


def are_names(listing: bytes) -> bool:
    """Whether all that is in a listing of the protocol passes `is_name`; False for an empty one."""
    return _NAMES.fullmatch(listing) is not None


def is_shown(path: bytes, name: bytes) -> bool:
    """Whether a listing shows a child: names of a broken or hostile store are left out."""
    if not is_name(name) or len(path) + 1 + len(name) > PATH_MAX:
        return False
    # A domain's special nodes, which oxenstored lists in the root, are watched, not read.
    return not (name.startswith(b"@") and path == b"/")


def shown_names(path: bytes, names: list[bytes], listing: bytes | None = None) -> list[bytes]:
    """Those of a node's children that a listing shows.

    listing     the same names as they came
    """
    if listing is None:
        listing = b"".join([b"%s\0" % name for name in names])
    longest = PATH_MAX - len(path) - 1
    if (
        path != b"/"
        and are_names(listing)
        and (len(listing) <= longest or max(map(len, names)) <= longest)
    ):
        return names
    return [name for name in names if is_shown(path, name)]


def join(path: bytes, name: bytes) -> bytes:
    """The path of a child."""
    return path + name if path == b"/" else b"%s/%s" % (path, name)


def parent_path(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


# ---------------------------------------------------------------------------------------- values


class Format(NamedTuple):
    """How a value looks as the content of a file.  parse(render(value)) is always the value."""

    render: Callable[[bytes], bytes]
    parse: Callable[[bytes], bytes]


def _render_text(value: bytes) -> bytes:
    return value + b"\n" if value else b""


def _parse_text(content: bytes) -> bytes:
    return content[:-1] if content.endswith(b"\n") else content


def _exact(data: bytes) -> bytes:
    return data


TEXT: Final = Format(_render_text, _parse_text)
"""sysfs's convention: a value ends with a newline, an empty value is an empty file."""

RAW: Final = Format(_exact, _exact)
