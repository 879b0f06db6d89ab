"""What domains may do with a node: permissions, as tools write them, as the wire carries them, and as
they are understood.  Pure functions and tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Final, NamedTuple, TypeVar

from xsfs.xenstore.protocol import Op, Request, WireError, strings


class Permission(NamedTuple):
    """One entry of a node's permissions: what `domid` may do.  The first entry of a node names its
    owner, who may do everything, and says what all domains without an entry may do."""

    domid: int
    read: bool
    write: bool

    def __str__(self) -> str:
        return f"{_LETTERS[self.read, self.write]}{self.domid}"


_LETTERS: Final = {
    (False, False): "n",
    (True, False): "r",
    (False, True): "w",
    (True, True): "b",
}
_ACCESS: Final = {letter: access for access, letter in _LETTERS.items()}
_PERMISSION = re.compile(r"([nrwb])([0-9]{1,10})")

Permissions = tuple[Permission, ...]


def parse_permission(text: str) -> Permission:
    """`r7` as a Permission; ValueError for anything else."""
    match = _PERMISSION.fullmatch(text)
    if not match:
        raise ValueError(f"not a permission (n, r, w or b, and a domid): {text[:40]!r}")
    return Permission(int(match[2]), *_ACCESS[match[1]])


def parse_permissions(text: str) -> Permissions:
    """`n0,r7` or `n0 r7`, as xenstore-ls -p and xenstore-chmod write them."""
    entries = text.replace(",", " ").split()
    if not entries:
        raise ValueError("permissions need at least one entry, the owner's")
    return tuple(map(parse_permission, entries))


def format_permissions(perms: Iterable[Permission]) -> str:
    """The permissions as `n0,r7`."""
    return ",".join(map(str, perms))


def access_of(perms: Permissions, domid: int) -> tuple[bool, bool]:
    """Whether `domid` may (read, write) a node: perm_for_conn() of xenstored_core.c.

    Domain 0 and the owner may do everything; of two entries for a domain the first counts.
    """
    if domid == 0 or perms[0].domid == domid:
        return True, True
    for entry in perms[1:]:
        if entry.domid == domid:
            return entry.read, entry.write
    return perms[0].read, perms[0].write


def set_perms(path: bytes, perms: Iterable[Permission]) -> Request:
    return Request(Op.SET_PERMS, path + b"\0" + b"".join(b"%s\0" % str(p).encode() for p in perms))


USUAL_MAX: Final = 64
"""Bytes of a reply that is taken apart once only: a host has few different ones, for many nodes.  Those
of a broken store may be very long, and are not kept."""

Result = TypeVar("Result")


def once_if_usual(decode: Callable[[bytes], Result]) -> Callable[[bytes], Result]:
    """The same function, which keeps what it made of usual replies."""
    decode_usual = lru_cache(maxsize=1024)(decode)

    @wraps(decode)
    def decode_once(payload: bytes) -> Result:
        return decode_usual(payload) if len(payload) <= USUAL_MAX else decode(payload)

    return decode_once


@once_if_usual
def decode_perms(payload: bytes) -> Permissions:
    """The permissions in a GET_PERMS reply; WireError for anything else."""
    try:
        perms = tuple(parse_permission(entry.decode("ascii")) for entry in strings(payload))
    except ValueError as error:
        raise WireError(f"a GET_PERMS reply with {error}") from error
    if not perms:
        raise WireError("a GET_PERMS reply without an owner")
    return perms


@once_if_usual
def perms_text(payload: bytes) -> bytes:
    """The same as `n0,r7`."""
    return format_permissions(decode_perms(payload)).encode()
