"""The names and values of Xenstore as names and contents of files.  Pure functions and tables.

A name of Xenstore is a file name.  A name longer than NAME_MAX appears under an alias.  A name that
contains a dot cannot be Xenstore's, so xsfs's own names never collide.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from xsfs.xenstore.protocol import NAME, PATH_MAX, decode_names, is_name

NAME_MAX: Final = 255
ALIAS_PREFIX: Final = 200
_ALIAS = re.compile(rb"[A-Za-z0-9_@-]{%d}~[0-9a-f]{16}" % ALIAS_PREFIX)

FORCED_SUFFIX: Final = b".d"
"""NAME.d is the node NAME as a directory, even if it looks like a file now."""

VALUE_NAME: Final = b".value"


def file_name(name: bytes) -> bytes:
    """The file name of a child: its own, or an alias for one longer than file names can be."""
    if len(name) <= NAME_MAX:
        return name
    return name[:ALIAS_PREFIX] + b"~" + hashlib.sha256(name).hexdigest()[:16].encode()


def is_alias(name: bytes) -> bool:
    return _ALIAS.fullmatch(name) is not None


def forced_name(name: bytes) -> bytes | None:
    """NAME of `NAME.d`, or None for other names."""
    plain = name.removesuffix(FORCED_SUFFIX)
    return plain if plain != name and (is_name(plain) or is_alias(plain)) else None


OWN_NAMES: Final = frozenset(
    b".value .watch .ls .json .dump .diff"
    b" .root .domid .stats .domain .transaction .mirror .control".split()
)
"""xsfs's own names, of all directories together."""

SCRATCH_SUFFIXES: Final = (b"~", b".bak", b".tmp", b".swp", b".swo", b".swx", b".orig", b".rej")

_PATCH_OUTPUT = re.compile(rb".+\.[or][A-Za-z0-9]{6}", re.DOTALL)
"""The temporary files of patch(1), which has no option for other names."""


def is_scratch_name(name: bytes) -> bool:
    """Whether a file of this name is a scratch file: Xenstore cannot hold the name, and editors and other
    programs give it to files that they will rename or remove."""
    if is_name(name) or name in OWN_NAMES:
        return False
    return (
        name.startswith(b".")
        or name.endswith(SCRATCH_SUFFIXES)
        or (name.startswith(b"#") and name.endswith(b"#") and len(name) > 1)
        or _PATCH_OUTPUT.fullmatch(name) is not None
    )


def is_shown(path: bytes, name: bytes) -> bool:
    """Whether a listing shows a child.  Names of a broken or hostile store are left out."""
    if not is_name(name) or len(path) + 1 + len(name) > PATH_MAX:
        return False
    # A domain's special nodes, which oxenstored lists in the root, can only be watched.
    return not (name.startswith(b"@") and path == b"/")


# `++` because no other split of a name could match, either.
_LISTING = re.compile(rb"(?:%s+\0)+" % NAME)


def shown_names(path: bytes, listing: bytes) -> list[bytes]:
    """The names in a listing of the protocol that are shown as children of `path`."""
    names = decode_names(listing)
    # One match of the whole listing is several times faster than one of each name.
    if path != b"/" and _LISTING.fullmatch(listing) and len(path) + len(listing) < PATH_MAX:
        return names
    return [name for name in names if is_shown(path, name)]


def join(path: bytes, name: bytes) -> bytes:
    """The path of a child."""
    return path + name if path == b"/" else b"%s/%s" % (path, name)


def parent_path(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


# ---------------------------------------------------------------------------------------- values


class ValueFormat(NamedTuple):
    """How a value looks as the content of a file.  parse(render(value)) always returns the value."""

    render: Callable[[bytes], bytes]
    parse: Callable[[bytes], bytes]


def _render_text(value: bytes) -> bytes:
    return value + b"\n" if value else b""


def _parse_text(content: bytes) -> bytes:
    return content.removesuffix(b"\n")


TEXT: Final = ValueFormat(_render_text, _parse_text)
"""sysfs's convention: a value ends with a newline, and an empty value is an empty file."""

RAW: Final = ValueFormat(bytes, bytes)
