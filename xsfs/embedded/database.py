"""The embedded store's database: a whole xenstored 4.17 without its connections.

`Database` owns the records of all nodes, the quotas and, in `Domains`, the domains.  It is
synchronous and knows no sockets.  Its owner calls one method per request, from any task, and never
from two threads.  The database reports each change by calling `changed` in the middle of a request;
`changed` may only query `Domains`.  A refused request (`Refused`) has changed no node.

Invariants:

- `_records` maps the absolute path of each node to its record.  Each node but the root is among its
  parent's children, and each child is in `_records`.
- `Domain.nodes` is the number of nodes whose first permission entry names the domain.
- Each change of a node makes another record with another generation.  By the record a transaction
  finds conflicts; by the generation a client finds that a listing has changed.

The order in which a request accesses nodes is xenstored's.  In a transaction this order decides
which nodes conflict, and the order of the events.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from xsfs.embedded.domains import (
    DOM0,
    DOMID_LIMIT,
    INTRODUCE_DOMAIN,
    QUOTAS,
    RELEASE_DOMAIN,
    Change,
    Domain,
    Domains,
)
from xsfs.embedded.record import (
    OWNER,
    READ,
    ROOT,
    WRITE,
    PermissionEntry,
    Perms,
    Record,
    Refused,
    child_of,
    is_path,
    name_of,
    parent_of,
    parse_perms,
)
from xsfs.embedded.transaction import AccessedNode, DatabaseTransaction

Tx = DatabaseTransaction | None
"""The transaction of a request; None for a request outside of transactions."""


class Database:
    def __init__(self, changed: Callable[[Change], None]) -> None:
        self._changed = changed
        self.quotas = {name: default for name, (default, _) in QUOTAS.items()}
        self.domains = Domains()
        self._generations = itertools.count(1)
        root = Record(b"", self.domains.resolve((PermissionEntry(DOM0, 0),)))
        self._records = {ROOT: root}
        self._count(DOM0, 1, None)
        self.mkdir(DOM0, b"/tool/xenstored")

    @property
    def node_count(self) -> int:
        return len(self._records)

    # -- finding a node

    def _lookup(self, path: bytes, tx: Tx) -> Record | None:
        """The record that the request sees, whatever its permissions."""
        if tx is None:
            return self._records.get(path)
        accessed = tx.accessed.get(path)
        if accessed is None:
            if tx.domid != DOM0 and len(tx.accessed) >= self.quotas[b"transaction-nodes"]:
                tx.failed = True
                raise Refused("ENOSPC")
            found = self._records.get(path)
            accessed = tx.accessed[path] = AccessedNode(found, found)
        return accessed.record

    def _find(self, domid: int, path: bytes, needed: int, tx: Tx) -> Record | None:
        """The record, if the domain has all the permissions `needed`.

        None if the node is missing and the domain may know that; otherwise Refused (EACCES).
        """
        if not is_path(path, self.quotas[b"path-max"]):
            raise Refused("EINVAL")
        record = self._lookup(path, tx)
        if record is not None and self.domains.access(domid, record.perms) & needed == needed:
            return record
        ancestor = None
        while ancestor is None:
            path = parent_of(path)
            ancestor = self._lookup(path, tx)
        if record is not None or not self.domains.access(domid, ancestor.perms) & needed:
            raise Refused("EACCES")
        return None

    def readable(self, domid: int, path: bytes, tx: Tx = None) -> Record:
        """The record for READ, DIRECTORY and GET_PERMS."""
        record = self._find(domid, path, READ, tx)
        if record is None:
            raise Refused("ENOENT")
        return record

    # -- changing a node

    def _store(self, domid: int, changed: dict[bytes, Record], tx: Tx) -> None:
        """Store records by path.  Refused (ENOSPC) if the domain may not make one so large."""
        for record in changed.values():
            if domid != DOM0 and record.size >= self.quotas[b"node-size"]:
                if tx is not None:
                    tx.failed = True
                raise Refused("ENOSPC")
        for path, record in changed.items():
            record = Record(record.value, record.perms, record.children, next(self._generations))
            if tx is None:
                self._records[path] = record
            else:
                tx.accessed[path].record = record

    def _count(self, owner: int, difference: int, tx: Tx) -> None:
        if tx is not None:
            tx.owned[owner] += difference
        elif domain := self.domains.find(owner):
            domain.nodes += difference

    def _notify(self, path: bytes, exact: bool, tx: Tx, *perms: Perms) -> None:
        """Report a change of a node.  These are its permissions before and after."""
        if tx is not None:
            accessed = tx.accessed[path]
            accessed.exact = exact and accessed.exact is not False
            return
        parent = self._records.get(parent_of(path))
        # A commit may have removed the node already, or not stored the parent yet.  As in xenstored,
        # only the node's own permissions count then.
        if path in self._records and parent is not None:
            perms += (parent.perms,)
        self._changed(Change(path, exact, perms))

    def write(self, domid: int, path: bytes, value: bytes, tx: Tx = None) -> None:
        record = self._find(domid, path, WRITE, tx)
        if record is None:
            self._create(domid, path, value, tx)
        else:
            self._store(domid, {path: Record(value, record.perms, record.children)}, tx)
            self._notify(path, False, tx, record.perms)

    def mkdir(self, domid: int, path: bytes, tx: Tx = None) -> None:
        if self._find(domid, path, WRITE, tx) is None:
            self._create(domid, path, b"", tx)

    def _create(self, domid: int, path: bytes, value: bytes, tx: Tx) -> None:
        """Create the node and all its missing ancestors."""
        missing = [path]
        while (parent := self._lookup(parent_of(missing[-1]), tx)) is None:
            missing.append(parent_of(missing[-1]))
        if tx is not None:
            tx.created = True
        perms = parent.perms
        if domid != DOM0:
            owner = self.domains.known[domid]
            # The nodes that a transaction creates count when it ends.
            created = 0 if tx is not None else len(missing) - 1
            if owner.nodes + created >= self.quotas[b"nodes"]:
                raise Refused("ENOSPC")
            # An unprivileged domain owns what it creates.
            perms = (PermissionEntry(domid, perms[0].bits, owner.incarnation), *perms[1:])
        changed = {path: Record(value, perms)}
        for below, above in itertools.pairwise(missing):
            changed[above] = Record(b"", perms).with_child(name_of(below))
        changed[parent_of(missing[-1])] = parent.with_child(name_of(missing[-1]))
        self._store(domid, changed, tx)
        self._count(perms[0].domid, len(missing), tx)
        self._notify(path, False, tx, perms)

    def set_perms(self, domid: int, path: bytes, texts: list[bytes], tx: Tx = None) -> None:
        if domid != DOM0 and len(texts) > self.quotas[b"permissions"]:
            raise Refused("ENOSPC")
        perms = self.domains.resolve(parse_perms(texts))
        owner = perms[0]
        if owner.incarnation is None:
            raise Refused("ENOENT")
        if path.startswith(b"@"):
            self.domains.set_special_perms(domid, path, perms)
            return
        record = self._find(domid, path, WRITE | OWNER, tx)
        if record is None:
            raise Refused("ENOENT")
        old = record.perms
        if domid != DOM0 and owner.domid != old[0].domid:
            raise Refused("EPERM")
        self._store(domid, {path: Record(record.value, perms, record.children)}, tx)
        self._count(old[0].domid, -1, tx)
        self._count(owner.domid, 1, tx)
        self._notify(path, False, tx, old, perms)

    # -- removal

    def rm(self, domid: int, path: bytes, tx: Tx = None) -> None:
        record = self._find(domid, path, WRITE, tx)
        if record is None:
            if self._lookup(parent_of(path), tx) is None:
                raise Refused("ENOENT")
            return
        if path == ROOT:
            raise Refused("EINVAL")
        self._remove(path, record, tx)

    def _remove(self, path: bytes, record: Record, tx: Tx) -> None:
        """Remove the tree at `path`, the deepest nodes first.  Events below `path` are exact."""
        parent = self._lookup(parent_of(path), tx)
        if parent is None:
            raise Refused("EINVAL")
        try:
            self._remove_tree(path, record, tx)
        except Refused as refused:
            # Only in a transaction: it accesses too many nodes, or it copied the lists of children
            # at different times and they name missing nodes.
            raise Refused("EIO") from refused
        self._store(DOM0, {parent_of(path): parent.without_child(name_of(path))}, tx)

    def _remove_tree(self, top: bytes, record: Record, tx: Tx) -> None:
        # A path may have a thousand components, too many for recursion.
        stack = [(top, record, iter(record.names))]
        while stack:
            path, record, names = stack[-1]
            name = next(names, None)
            if name is not None:
                below = child_of(path, name)
                child = self._lookup(below, tx)
                if child is None:
                    raise Refused("ENOENT")
                stack.append((below, child, iter(child.names)))
                continue
            stack.pop()
            self._notify(path, path != top, tx, record.perms)
            self._count(record.perms[0].domid, -1, tx)
            if tx is None:
                del self._records[path]
                continue
            tx.accessed[path].record = None
            if stack:
                # It shows if the database refuses the rest of the removal.
                above, parent, names = stack.pop()
                parent = parent.without_child(name_of(path))
                self._store(DOM0, {above: parent}, tx)
                stack.append((above, parent, names))

    # -- transactions

    def commit(self, tx: DatabaseTransaction) -> None:
        """Carry out the changes.  The transaction has ended even if the commit is refused."""
        if tx.failed:
            raise Refused("ENOMEM")
        for owner, difference in tx.owned.items():
            domain = self.domains.find(owner)
            if domain is None:
                raise Refused("ENOMEM")
            full = owner != DOM0 and domain.nodes + difference >= self.quotas[b"nodes"]
            if full and tx.created and tx.domid != DOM0:
                raise Refused("ENOSPC")
        for path, accessed in tx.accessed.items():
            if self._records.get(path) is not accessed.found:
                raise Refused("EAGAIN")
        for path, accessed in tx.accessed.items():
            if accessed.record is not None:
                self._records[path] = accessed.record
            else:
                self._records.pop(path, None)
            if accessed.exact is not None:
                records = (accessed.found, accessed.record)
                perms = (record.perms for record in records if record is not None)
                self._notify(path, accessed.exact, None, *perms)
        for owner, difference in tx.owned.items():
            self.domains.known[owner].nodes += difference

    # -- domains

    def create(self, domid: int) -> Domain:
        """The domain exists from now on and can own nodes.  It need not be introduced.

        ValueError if no guest can have this domid.
        """
        if not 0 < domid < DOMID_LIMIT:
            raise ValueError(f"not the domid of a guest: {domid}")
        earlier = self.domains.known.get(domid)
        if earlier is not None and domid not in self.domains.existing:
            # xenstored crashes here.
            self.forget(earlier)
        return self.domains.create(domid)

    def introduce(self, domid: int) -> None:
        """The domain exists and is introduced from now on.  ValueError as for `create`."""
        domain = self.create(domid)
        if not domain.introduced:
            domain.introduced = True
            self._changed(self.domains.special(INTRODUCE_DOMAIN))

    def destroy(self, domid: int) -> None:
        """The domain no longer exists.  The store forgets it when no other domain holds it."""
        self.domains.existing.discard(domid)
        domain = self.domains.known.get(domid)
        if domain is not None and not domain.holders:
            self.forget(domain)

    def forget(self, domain: Domain) -> None:
        """Remove the domain's nodes and void its permissions; so for all it was the last to hold.

        The domain may still exist.
        """
        ending = [domain]
        for one in ending:
            for other in self.domains.known.values():
                if one in other.holders:
                    del other.holders[one]
                    ended = other.domid not in self.domains.existing and not other.holders
                    if ended and other not in ending:
                        ending.append(other)
        # As in xenstored, a target ends before the domain that held it.
        for one in reversed(ending):
            self._remove_owned(one)
            self.domains.forget(one)
            if one.introduced:
                self._changed(self.domains.special(RELEASE_DOMAIN))

    def _remove_owned(self, domain: Domain) -> None:
        """Remove each tree whose top the domain owns, in the order of a walk from the root."""
        stack = [ROOT]
        while stack and domain.nodes > 0:
            path = stack.pop()
            record = self._records[path]
            owned = record.perms[0].domid == domain.domid
            if owned and path != ROOT:
                self._remove(path, record, None)
            else:
                if owned:
                    # xenstored removes the root, and the whole store with it.
                    self._count(domain.domid, -1, None)
                    self._count(DOM0, 1, None)
                    owner = PermissionEntry(DOM0, record.perms[0].bits)
                    perms = (*self.domains.resolve((owner,)), *record.perms[1:])
                    self._store(DOM0, {ROOT: record._replace(perms=perms)}, None)
                stack += [child_of(path, name) for name in reversed(record.names)]
