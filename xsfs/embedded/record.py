"""A node of the embedded store: its path, who may do what with it, and its record.

Everything here is about one node and knows no store: the rules are those of C xenstored 4.17.
A node's children are kept in the order in which they were made, because that is the order in which
xenstored lists them.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

ROOT: Final = b"/"

PATH_LENGTH_MAX: Final = 2048
"""quota_max_path_len: it counts from behind /local/domain/<domid>/, where a path begins so."""

RECORD_HEADER: Final = 24
RECORD_ENTRY: Final = 8
"""The sizes xenstored adds up (struct xs_tdb_record_hdr, struct xs_permissions) to see whether a
node is too large."""


class Refused(Exception):
    """The store says no to a request; `name` is what the ERROR reply carries."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


# ---------------------------------------------------------------------------------------- paths

_PATH = re.compile(rb"/|(?:/[A-Za-z0-9_@-]+)+")
# xenstored reads the domid with %5u, which takes a sign and at most five characters.
_HOME = re.compile(rb"/local/domain/(?:-[0-9]{1,4}|[0-9]{1,5})/")


def is_path(path: bytes) -> bool:
    """Whether this can be the (absolute) path of a node."""
    if not _PATH.fullmatch(path):
        return False
    if len(path) <= PATH_LENGTH_MAX:
        return True
    home = _HOME.match(path)
    return home is not None and len(path) <= home.end() + PATH_LENGTH_MAX


def home_of(domid: int) -> bytes:
    return b"/local/domain/%d" % domid


def absolute(path: bytes, domid: int) -> bytes:
    """`path` as the domain means it: what is neither absolute nor special is below its home."""
    if path.startswith((b"/", b"@")):
        return path
    return b"%b/%b" % (home_of(domid), path)


def parent_of(path: bytes) -> bytes:
    """The root's parent is the root."""
    return path.rpartition(b"/")[0] or ROOT


def child_of(path: bytes, name: bytes) -> bytes:
    return b"%b/%b" % (path, name) if path != ROOT else b"/" + name


# ---------------------------------------------------------------------------------- permissions

READ: Final = 1
WRITE: Final = 2
OWNER: Final = 4
ALL: Final = READ | WRITE | OWNER
DEAD: Final = 8
"""Marks the entry of a domain which no longer exists: it is shown, but has no effect, not even if
another domain gets the same domid."""


class Entry(NamedTuple):
    domid: int
    bits: int


Perms = tuple[Entry, ...]

_LETTERS: Final = {b"n"[0]: 0, b"r"[0]: READ, b"w"[0]: WRITE, b"b"[0]: READ | WRITE}
_BY_BITS: Final = {bits: chr(letter) for letter, bits in _LETTERS.items()}
# strtol() with base 0: white space, a sign, and hexadecimal and octal numbers are all let in.
_DOMID = re.compile(rb"[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9A-Fa-f]+)|(0[0-7]*)|([1-9][0-9]*))")


def _parse_entry(text: bytes) -> Entry:
    bits = _LETTERS.get(text[0]) if text else None
    number = _DOMID.fullmatch(text, 1)
    if bits is None or number is None:
        raise Refused("EINVAL")
    sign, hexadecimal, octal, decimal = number.groups()
    domid = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return Entry((-domid if sign == b"-" else domid) & 0xFFFFFFFF, bits)


def parse_perms(texts: list[bytes]) -> Perms:
    return tuple(map(_parse_entry, texts))


def format_perms(perms: Perms) -> bytes:
    """As GET_PERMS replies; a domid is shown as a signed number."""
    return b"".join(
        b"%b%d\0" % (_BY_BITS[bits & ALL].encode(), domid - (domid >> 31 << 32))
        for domid, bits in perms
    )


# ------------------------------------------------------------------------------------- the node


class Node:
    """One node's record.  Who changes a node sets its generation; nobody else can tell.

    A transaction keeps copies of nodes.  A copy shares `children` with the original until one of
    the two changes them, so that copying costs the same for a node of any size.

    `children` has the names as its values.  A key is the name too, but for a name that is there
    once more: as in xenstored, a transaction's list can name a child twice, if others have removed
    it and the transaction makes it anew.  (Such a transaction cannot succeed.)
    """

    __slots__ = ("_listing", "_shared", "child_bytes", "children", "generation", "perms", "value")

    def __init__(self, value: bytes, perms: Perms, generation: int) -> None:
        self.value = value
        self.perms = perms
        self.generation = generation
        self.children: dict[bytes, bytes] = {}
        self.child_bytes = 0
        self._shared = False
        self._listing: bytes | None = b""

    def copy(self, perms: Perms) -> Node:
        """A copy with these permissions instead."""
        copied = Node(self.value, perms, self.generation)
        copied.children = self.children
        copied.child_bytes = self.child_bytes
        copied._listing = self._listing
        copied._shared = self._shared = True
        return copied

    def update(self, generation: int, perms: Perms) -> None:
        """The node is written; `perms` have the marks of the dead, whom the new generation would
        make look alive."""
        self.perms = perms
        self.generation = generation

    def add_child(self, name: bytes) -> None:
        self._own_children()
        self._append(name)
        self.child_bytes += len(name) + 1

    def _append(self, name: bytes) -> None:
        key = name
        while key in self.children:
            key += b"\0"
        self.children[key] = name

    def remove_child(self, name: bytes) -> None:
        self._own_children()
        if name + b"\0" in self.children:
            names = list(self.children.values())
            names.remove(name)
            self.children = {}
            for kept in names:
                self._append(kept)
        else:
            del self.children[name]
        self.child_bytes -= len(name) + 1

    def _own_children(self) -> None:
        self._listing = None
        if self._shared:
            self.children = dict(self.children)
            self._shared = False

    @property
    def listing(self) -> bytes:
        """The children's names, each with its NUL.  Kept, since DIRECTORY_PART asks repeatedly."""
        if self._listing is None:
            self._listing = b"".join(name + b"\0" for name in self.children.values())
        return self._listing

    @property
    def size(self) -> int:
        return record_size(self.value, self.perms, self.child_bytes)


def record_size(value: bytes, perms: Perms, child_bytes: int) -> int:
    """What counts against the quota for the size of a node."""
    return RECORD_HEADER + RECORD_ENTRY * len(perms) + len(value) + child_bytes
