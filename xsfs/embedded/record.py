"""One node of the embedded store: the rules for its path, and its record.

Nothing here knows a database.  The rules follow C xenstored 4.17.  A record lists its children
in the order of their creation, because xenstored lists them in that order.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

ROOT: Final = b"/"

PATH_MAX: Final = 2048
"""XENSTORE_REL_PATH_MAX, and xenstored's default for the quota `path-max`."""

RECORD_HEADER: Final = 24
RECORD_ENTRY: Final = 8
"""The sizes that xenstored adds up to check the quota `node-size` (struct xs_tdb_record_hdr and
struct xs_permissions)."""


class Refused(Exception):
    """The store refuses a request; `name` is the error name in the ERROR reply."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


# ---------------------------------------------------------------------------------------- numbers


_DECIMAL = re.compile(rb"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_LONG_MAX: Final = (1 << 63) - 1


def _from_long(number: int) -> int:
    """The unsigned int that C makes of the result of strtol(), which stops at the limits of long."""
    return min(max(number, -_LONG_MAX - 1), _LONG_MAX) & 0xFFFFFFFF


def signed(number: int) -> int:
    """The int with the bits of an unsigned int."""
    return number - (number >> 31 << 32)


def unsigned(text: bytes) -> int:
    """The number at the start of `text`, 0 if there is none: C's atoi() as an unsigned int.

    xenstored reads domids and ports in this way.
    """
    match = _DECIMAL.match(text)
    return _from_long(int(match[1])) if match else 0


# ---------------------------------------------------------------------------------------- paths

_PATH = re.compile(rb"/|(?:/[A-Za-z0-9_@-]+)+")
# xenstored reads the domid with %5u, which accepts a sign and at most five characters.
_HOME = re.compile(rb"/local/domain/(?:-[0-9]{1,4}|[0-9]{1,5})/")


def is_path(path: bytes, path_max: int = PATH_MAX) -> bool:
    """Whether a node can have this absolute path.

    `path_max` limits the bytes after /local/domain/<domid>/, or of the whole path elsewhere.
    """
    if not _PATH.fullmatch(path):
        return False
    if len(path) <= path_max:
        return True
    home = _HOME.match(path)
    return home is not None and len(path) <= home.end() + path_max


def home_of(domid: int) -> bytes:
    return b"/local/domain/%d" % domid


def absolute(path: bytes, domid: int) -> bytes:
    """The path that the domain means: a relative path starts at the domain's home."""
    if path.startswith((b"/", b"@")):
        return path
    return b"%b/%b" % (home_of(domid), path)


def parent_of(path: bytes) -> bytes:
    """The root's parent is the root."""
    return path.rpartition(b"/")[0] or ROOT


def name_of(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]


def child_of(path: bytes, name: bytes) -> bytes:
    return b"%b/%b" % (path, name) if path != ROOT else b"/" + name


# ---------------------------------------------------------------------------------- permissions

READ: Final = 1
WRITE: Final = 2
OWNER: Final = 4
ALL: Final = READ | WRITE | OWNER


class PermissionEntry(NamedTuple):
    """`bits` are READ and WRITE.

    `incarnation` tells which of the domains that have had this domid the entry means; None if no
    such domain existed.
    """

    domid: int
    bits: int
    incarnation: int | None = None


Perms = tuple[PermissionEntry, ...]
"""The first entry is the owner and what all other domains may do."""

_BITS: Final = {b"n": 0, b"r": READ, b"w": WRITE, b"b": READ | WRITE}
_LETTERS: Final = {bits: letter for letter, bits in _BITS.items()}
# strtol() with base 0 accepts white space, a sign, hexadecimal and octal numbers.
_ENTRY = re.compile(
    rb"([nrwb])[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9A-Fa-f]+)|(0[0-7]*)|([1-9][0-9]*))"
)


def _parse_entry(text: bytes) -> PermissionEntry:
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise Refused("EINVAL")
    letter, sign, hexadecimal, octal, decimal = match.groups()
    domid = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return PermissionEntry(_from_long(-domid if sign == b"-" else domid), _BITS[letter])


def parse_perms(texts: list[bytes]) -> Perms:
    """Permissions such as `n0`, `r7`; Refused (EINVAL) if one is malformed."""
    return tuple(map(_parse_entry, texts))


def format_perms(perms: Perms) -> bytes:
    """The payload of a GET_PERMS reply, which shows domids as signed numbers."""
    return b"".join(b"%b%d\0" % (_LETTERS[entry.bits], signed(entry.domid)) for entry in perms)


# ------------------------------------------------------------------------------------- the record


class Record(NamedTuple):
    """The value, permissions and children of one node.  A change makes another record.

    children    the names, each with its NUL.  As in xenstored, a name may occur twice in a transaction:
                another client has removed the child, and then the transaction creates it.  (Such a
                transaction cannot succeed.)
    generation  the number of the node's last change
    """

    value: bytes
    perms: Perms
    children: bytes = b""
    generation: int = 0

    @property
    def names(self) -> list[bytes]:
        return self.children.split(b"\0")[:-1]

    @property
    def size(self) -> int:
        """The bytes that count for the quota `node-size`."""
        return RECORD_HEADER + RECORD_ENTRY * len(self.perms) + len(self.value) + len(self.children)

    def with_child(self, name: bytes) -> Record:
        return Record(self.value, self.perms, b"%b%b\0" % (self.children, name))

    def without_child(self, name: bytes) -> Record:
        """Refused (EIO) if there is no such child."""
        before, found, after = (b"\0" + self.children).partition(b"\0%b\0" % name)
        if not found:
            raise Refused("EIO")
        return Record(self.value, self.perms, (before + b"\0" + after)[1:])
