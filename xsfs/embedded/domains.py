"""The domains which the embedded store knows, and what permissions mean for each.

`Domains` plays the hypervisor's part (which domains exist) and xenstored's (which it has met, what
they use of their quotas).  It also owns the generation, which counts every change ever made to a
node: a domain remembers at which generation it was met, and a permission which was written before
that was meant for an earlier domain with the same domid.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from xsfs.embedded.record import ALL, DEAD, OWNER, READ, WRITE, Entry, Node, Perms, Refused

DOM0: Final = 0
DOMID_LIMIT: Final = 0x7FF0
"""DOMID_FIRST_RESERVED, which is DOMID_SELF too."""

INTRODUCE_DOMAIN: Final = b"@introduceDomain"
RELEASE_DOMAIN: Final = b"@releaseDomain"


class Change(NamedTuple):
    """Something happened at `path`: to all which is watched at or above it, or, if `exact`, to
    what is watched at `path` alone.  Who may read one of `readable_by` may know."""

    path: bytes
    exact: bool
    readable_by: tuple[Perms, ...]


class Domain:
    """A domain which the store has met; `generation` is when."""

    __slots__ = ("domid", "generation", "introduced", "nodes", "target", "transactions", "watches")

    def __init__(self, domid: int, generation: int) -> None:
        self.domid = domid
        self.generation = generation
        self.introduced = False
        self.target: int | None = None
        self.nodes = 0
        self.watches = 0
        self.transactions = 0


def dead(entry: Entry) -> Entry:
    return Entry(entry.domid, entry.bits | DEAD)


class Domains:
    def __init__(self) -> None:
        self.generation = 0
        self._existing = {DOM0}
        dom0 = Domain(DOM0, 0)
        dom0.introduced = True
        self.known = {DOM0: dom0}
        self._special: dict[bytes, Perms] = dict.fromkeys(
            (INTRODUCE_DOMAIN, RELEASE_DOMAIN), (Entry(DOM0, 0),)
        )

    # -- who may do what

    def access(self, who: int, perms: Perms) -> int:
        """READ, WRITE and OWNER, as far as `perms` give them to the domain."""
        if who == DOM0:
            return ALL
        domain = self.known.get(who)
        target = None if domain is None else domain.target
        owner, others = perms[0]
        if owner in (who, target):
            return ALL
        for domid, bits in perms[1:]:
            if not bits & DEAD and domid in (who, target):
                return bits
        return others

    def may_know(self, who: int, change: Change) -> bool:
        return any(self.access(who, perms) & READ for perms in change.readable_by)

    def live(self, node: Node) -> Perms:
        """The node's permissions, with the entries of domains marked which do not exist, or came
        into being after the node was last written."""
        perms = node.perms
        if len(perms) == 1:
            return perms
        return perms[:1] + tuple(
            entry if self._was_there(entry.domid, node.generation) else dead(entry)
            for entry in perms[1:]
        )

    def _was_there(self, domid: int, generation: int) -> bool:
        domain = self.known.get(domid)
        return domain is not None and domain.generation <= generation

    def given(self, perms: Perms) -> Perms:
        """New permissions, with the entries of domains marked which do not exist."""
        return tuple(entry if self.meet(entry.domid) else dead(entry) for entry in perms)

    # -- the domains themselves

    def meet(self, domid: int) -> Domain | None:
        """What the store knows of a domain, from now on if need be; None if there is no such."""
        domain = self.known.get(domid)
        if domain is None and domid in self._existing:
            domain = self.known[domid] = Domain(domid, self.generation)
        return domain

    def create(self, domid: int) -> Domain:
        """The domain exists from now on, and can own nodes; it need not be introduced."""
        if not 0 < domid < DOMID_LIMIT:
            raise ValueError(f"not the domid of a guest: {domid}")
        self._existing.add(domid)
        return self.known.get(domid) or self.known.setdefault(domid, Domain(domid, self.generation))

    def is_introduced(self, domid: int) -> bool:
        domain = self.known.get(domid)
        return domain is not None and domain.introduced

    def end(self, domid: int) -> None:
        """The domain exists no longer; what the store knows of it stays until `forget`."""
        self._existing.discard(domid)

    def forget(self, domid: int) -> None:
        for name, perms in self._special.items():
            owner = Entry(DOM0, perms[0].bits) if perms[0].domid == domid else perms[0]
            others = (entry for entry in perms[1:] if entry.domid != domid)
            self._special[name] = (owner, *others)
        del self.known[domid]
        for other in self.known.values():
            if other.target == domid:
                other.target = None

    # -- special watches

    def set_special_perms(self, who: int, name: bytes, perms: Perms) -> None:
        if name not in self._special:
            raise Refused("EINVAL")
        if self.access(who, self._special[name]) & (WRITE | OWNER) != WRITE | OWNER:
            raise Refused("EACCES")
        self._special[name] = perms

    def special(self, name: bytes) -> Change:
        """What is told when a domain comes or goes."""
        return Change(name, True, (self._special[name],))
