"""The permissions of a node: as tools write them, as the protocol carries them, and their meaning.

A guest chooses the permissions of its nodes, and the daemons accept entries for domains that cannot
exist (`r-1`, `b4294967295`).  Such an entry is data like any other: it is shown, and grants nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from xsfs.xenstore.protocol import Op, Request, WireError, strings

DOMID_FIRST_RESERVED: Final = 0x7FF0
"""No domain has this domid or a higher one: some have a special meaning (xen/include/public/xen.h)."""

DOMID_ANY: Final = 0x7FF5
"""An entry for this domid is one for every domain (since Xen 4.22)."""


class Permission(NamedTuple):
    """One entry of a node's permissions: what `domid` may do.

    The first entry names the node's owner, which may do everything, and says what each domain without an
    entry may do.
    """

    domid: int
    read: bool
    write: bool

    def __str__(self) -> str:
        return f"{_LETTERS[self.read, self.write]}{self.domid}"

    @property
    def is_reserved(self) -> bool:
        """Whether no domain can have this domid."""
        return not 0 <= self.domid < DOMID_FIRST_RESERVED


_LETTERS: Final = {(False, False): "n", (True, False): "r", (False, True): "w", (True, True): "b"}
_ACCESS: Final = {letter: access for access, letter in _LETTERS.items()}
_PERMISSION = re.compile(r"([nrwb])(-?[0-9]+)")

Permissions = tuple[Permission, ...]


def parse_permission(text: str) -> Permission:
    """`r7` as a Permission.  ValueError for anything else."""
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

    Domain 0 and the owner may do everything.  Of two entries for a domain the first counts.
    """
    if domid == 0 or perms[0].domid == domid:
        return True, True
    for entry in perms[1:]:
        if entry.domid in (domid, DOMID_ANY):
            return entry.read, entry.write
    return perms[0].read, perms[0].write


def signed_domid(domid: int) -> int:
    """A domid as SET_PERMS accepts it.  oxenstored has numbers of 63 bits: it shows -1 as 2**63 - 1, and does
    not accept that."""
    return domid - (1 << 63) if domid >= 1 << 62 else domid


def set_perms(path: bytes, perms: Iterable[Permission]) -> Request:
    entries = (entry._replace(domid=signed_domid(entry.domid)) for entry in perms)
    return Request(Op.SET_PERMS, path + b"\0" + encode_perms(entries))


def encode_perms(perms: Iterable[Permission]) -> bytes:
    """The permissions as in SET_PERMS and in a reply to GET_PERMS."""
    return b"".join(b"%s\0" % str(entry).encode() for entry in perms)


def decode_perms(payload: bytes) -> Permissions:
    """The permissions in a GET_PERMS reply.  WireError for anything else."""
    try:
        perms = tuple(parse_permission(entry.decode("ascii")) for entry in strings(payload))
    except ValueError:
        raise WireError(f"{len(payload)} bytes that are no permissions") from None
    if not perms:
        raise WireError("a GET_PERMS reply without an owner")
    return perms


def perms_text(payload: bytes) -> bytes:
    """A GET_PERMS reply as `n0,r7`, with its entries as they came."""
    return b",".join(strings(payload))
