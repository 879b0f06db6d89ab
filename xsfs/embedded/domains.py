"""The domains that the embedded store knows, their quotas, and what permissions give them.

`Domains` plays the hypervisor's part (which domains exist) and xenstored's (which domains it knows
and how many nodes they own).  Each domain that it gets to know has an incarnation number.
Permission entries keep that number, so a later domain with the same domid does not inherit them.

Only the `Database` that owns it changes it, and only while it handles a request.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from xsfs.embedded.record import ALL, OWNER, PATH_MAX, READ, WRITE, PermissionEntry, Perms, Refused

DOM0: Final = 0
DOMID_LIMIT: Final = 0x7FF0
"""DOMID_FIRST_RESERVED, which is also DOMID_SELF."""

INTRODUCE_DOMAIN: Final = b"@introduceDomain"
RELEASE_DOMAIN: Final = b"@releaseDomain"


QUOTAS: Final = {
    b"nodes": (1000, "Nodes per domain"),
    b"watches": (128, "Watches per domain"),
    b"transactions": (10, "Transactions per domain"),
    b"transaction-nodes": (1024, "Max. number of accessed nodes per transaction"),
    b"node-size": (2048, "Max. size of a node"),
    b"path-max": (PATH_MAX, "Max. length of a node path"),
    b"permissions": (5, "Max. number of permissions per node"),
}
"""xenstored's names, defaults and descriptions.

They limit domains other than 0, and `path-max` limits domain 0, too.  As in xenstored, a domain may have
one watch and one transaction more than its quota.
"""


class Change(NamedTuple):
    """A change at `path`.

    Its event goes to the watches at or above `path`; if `exact`, only to those at `path`.  A domain
    gets the event only if one of the permissions in `readable_by` lets it read.
    """

    path: bytes
    exact: bool
    readable_by: tuple[Perms, ...]


@dataclass(slots=True, eq=False)
class Domain:
    """A domain that the store knows.

    nodes    how many nodes it owns
    target   the domain whose permissions it has, too
    holders  the domains that have had this one as their target, in the order of SET_TARGET.  As in
             xenstored, a domain that ends stays known until the last of them ends.
    """

    domid: int
    incarnation: int
    introduced: bool = False
    target: Domain | None = None
    holders: dict[Domain, None] = field(default_factory=dict)
    nodes: int = 0


class Domains:
    def __init__(self) -> None:
        self.existing: set[int] = set()
        """The domids of the domains that exist.  If a known domain is not among them, it has ended, and only
        its holders keep it known."""
        self._incarnations = itertools.count()
        self.known: dict[int, Domain] = {}
        self.create(DOM0).introduced = True
        self._special: dict[bytes, Perms] = dict.fromkeys(
            (INTRODUCE_DOMAIN, RELEASE_DOMAIN), self.resolve((PermissionEntry(DOM0, 0),))
        )

    def access(self, domid: int, perms: Perms) -> int:
        """READ, WRITE and OWNER, as far as `perms` give them to the domain or to its target."""
        if domid == DOM0:
            return ALL
        domain = self.known[domid]
        actors = [domain.incarnation]
        if domain.target is not None:
            actors.append(domain.target.incarnation)
        if perms[0].incarnation in actors:
            return ALL
        for entry in perms[1:]:
            if entry.incarnation in actors:
                return entry.bits
        return perms[0].bits

    def may_read(self, domid: int, change: Change) -> bool:
        """Whether the domain gets the event of the change."""
        return any(self.access(domid, perms) & READ for perms in change.readable_by)

    def resolve(self, perms: Perms) -> Perms:
        """The permissions with the incarnations of the domains that they name now."""
        found = []
        for domid, bits, _ in perms:
            domain = self.find(domid)
            found.append(PermissionEntry(domid, bits, domain.incarnation if domain else None))
        return tuple(found)

    def find(self, domid: int) -> Domain | None:
        """The domain, which the store knows from now on; None if it does not exist."""
        return self.create(domid) if domid in self.existing else self.known.get(domid)

    def create(self, domid: int) -> Domain:
        """For `Database.create`."""
        self.existing.add(domid)
        return self.known.setdefault(domid, Domain(domid, next(self._incarnations)))

    def is_introduced(self, domid: int) -> bool:
        domain = self.known.get(domid)
        return domain is not None and domain.introduced

    def is_connected(self, domid: int) -> bool:
        """Whether the domain is introduced and exists."""
        return self.is_introduced(domid) and domid in self.existing

    def connected(self, domid: int) -> Domain:
        """The domain; Refused if it is not introduced (ENOENT) or has ended (EINVAL)."""
        if not self.is_introduced(domid):
            raise Refused("ENOENT")
        if domid not in self.existing:
            raise Refused("EINVAL")
        return self.known[domid]

    def set_target(self, domid: int, target_domid: int) -> None:
        domain, target = self.connected(domid), self.connected(target_domid)
        domain.target = target
        target.holders.pop(domain, None)
        target.holders[domain] = None

    def forget(self, domain: Domain) -> None:
        del self.known[domain.domid]
        for other in self.known.values():
            if other.target is domain:
                other.target = None

    def set_special_perms(self, domid: int, name: bytes, perms: Perms) -> None:
        if name not in self._special:
            raise Refused("EINVAL")
        if self.access(domid, self._special[name]) & (WRITE | OWNER) != WRITE | OWNER:
            raise Refused("EACCES")
        self._special[name] = perms

    def special(self, name: bytes) -> Change:
        """The change that reports a domain's introduction or end."""
        return Change(name, True, (self._special[name],))
