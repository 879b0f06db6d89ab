"""The embedded store's data: a whole xenstored 4.17 without its connections.

`Store` owns the nodes and, in `Domains`, those who use them.  It is synchronous and knows no
sockets: whoever owns it calls one method for each request, and is told of each change by the
function `changed`, which is called in the middle of a request and may only ask `Domains` then.
A request either is refused (`Refused`), and then no node has changed, or is done completely; only
in a transaction a refused request may leave marks, and the transaction then cannot succeed.

What always holds: the nodes are a flat table of absolute paths; each node but the root is among
the children of its parent, and each child is in the table; `Domain.nodes` is the number of nodes
whose first permission entry names the domain.  A node's generation is that of its last change: by
it a transaction sees conflicts, and a client that a listing has changed under it.

The order in which a request looks at nodes is xenstored's own, since in a transaction it decides
what conflicts, and in which order events come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xsfs.embedded.domains import (
    DOM0,
    INTRODUCE_DOMAIN,
    RELEASE_DOMAIN,
    Change,
    Domain,
    Domains,
)
from xsfs.embedded.record import (
    DEAD,
    OWNER,
    READ,
    ROOT,
    WRITE,
    Entry,
    Node,
    Perms,
    Refused,
    child_of,
    is_path,
    parent_of,
    parse_perms,
    record_size,
)
from xsfs.embedded.transaction import Transaction

# The quotas of a domain other than 0.
NODES_MAX: Final = 1000
NODE_SIZE_MAX: Final = 2048
PERMS_MAX: Final = 5
TRANSACTIONS_MAX: Final = 10
WATCHES_MAX: Final = 128


class Store:
    def __init__(self, changed: Callable[[Change], None]) -> None:
        self._changed = changed
        self.domains = Domains()
        self._nodes: dict[bytes, Node] = {}
        for path in (ROOT, b"/tool", b"/tool/xenstored"):
            self.domains.generation += 1
            self._place(path, Node(b"", (Entry(DOM0, 0),), self.domains.generation), None)
        self._nodes[ROOT].add_child(b"tool")
        self._nodes[b"/tool"].add_child(b"xenstored")

    # -- finding a node

    def _look(self, path: bytes, tx: Transaction | None) -> Node | None:
        """The node as the request sees it, whoever asks."""
        if tx is None:
            return self._nodes.get(path)
        touched = tx.touched.get(path)
        if touched is not None:
            return touched.node
        node = self._nodes.get(path)
        return tx.touch(path, node, None if node is None else self.domains.live(node))

    def _find(self, who: int, path: bytes, needed: int, tx: Transaction | None) -> Node | None:
        """The node, if the domain may; None if it is missing, and the domain may know that."""
        if not is_path(path):
            raise Refused("EINVAL")
        node = self._look(path, tx)
        if node is not None and (
            who == DOM0 or self.domains.access(who, self.domains.live(node)) & needed == needed
        ):
            return node
        ancestor = self._nearest(parent_of(path), tx)
        if node is not None or not self.domains.access(who, self.domains.live(ancestor)) & needed:
            raise Refused("EACCES")
        return None

    def _nearest(self, path: bytes, tx: Transaction | None) -> Node:
        """The node at `path`, or at the longest part of it at which there is one."""
        while True:
            node = self._look(path, tx)
            if node is not None:
                return node
            path = parent_of(path)

    def readable(self, who: int, path: bytes, tx: Transaction | None = None) -> Node:
        """READ, DIRECTORY and GET_PERMS: the node, to take what is asked for.  Not to be kept."""
        node = self._find(who, path, READ, tx)
        if node is None:
            raise Refused("ENOENT")
        return node

    # -- changing a node

    def _step(self, path: bytes, tx: Transaction | None) -> int:
        """A change to one node begins; returns the node's new generation."""
        self.domains.generation += 1
        if tx is not None:
            tx.touched[path].modified = True
        return self.domains.generation

    @staticmethod
    def _check_size(who: int, size: int, tx: Transaction | None) -> None:
        if who != DOM0 and size >= NODE_SIZE_MAX:
            if tx is not None:
                tx.failed = True
            raise Refused("ENOSPC")

    def _count(self, owner: int, difference: int, tx: Transaction | None) -> None:
        if tx is not None:
            tx.count(owner, difference)
            return
        if domain := self.domains.meet(owner):
            domain.nodes += difference

    def _tell(
        self, path: bytes, exact: bool, tx: Transaction | None, node: Node, *old: Perms
    ) -> None:
        if tx is not None:
            tx.queue_event(path, exact)
            return
        readable_by = (*old, self.domains.live(node))
        parent = self._nodes.get(parent_of(path))
        if parent is not None:
            readable_by += (self.domains.live(parent),)
        self._changed(Change(path, exact, readable_by))

    def write(self, who: int, path: bytes, value: bytes, tx: Transaction | None = None) -> None:
        node = self._find(who, path, WRITE, tx)
        if node is None:
            node = self._create(who, path, value, tx)
        else:
            generation = self._step(path, tx)
            self._check_size(who, record_size(value, node.perms, node.child_bytes), tx)
            node.update(generation, self.domains.live(node))
            node.value = value
        self._tell(path, False, tx, node)

    def mkdir(self, who: int, path: bytes, tx: Transaction | None = None) -> None:
        if self._find(who, path, WRITE, tx) is None:
            node = self._create(who, path, b"", tx)
            self._tell(path, False, tx, node)

    def _create(self, who: int, path: bytes, value: bytes, tx: Transaction | None) -> Node:
        """Make the node, and all parents which are missing."""
        missing = [path]
        while (parent := self._look(parent_of(missing[-1]), tx)) is None:
            missing.append(parent_of(missing[-1]))
        perms = self.domains.live(parent)
        if who != DOM0:
            # What an unprivileged domain makes is its own.
            perms = (Entry(who, perms[0].bits), *perms[1:])
        if tx is not None:
            tx.created = True
        generations = self._check_creation(who, missing, parent, perms, value, tx)

        lowest = Node(value, perms, generations[0])
        self._place(path, lowest, tx)
        for name, higher, generation in zip(missing, missing[1:], generations[1:], strict=False):
            node = Node(b"", perms, generation)
            node.add_child(name.rpartition(b"/")[2])
            self._place(higher, node, tx)
        parent.update(generations[-1], self.domains.live(parent))
        parent.add_child(missing[-1].rpartition(b"/")[2])
        return lowest

    def _place(self, path: bytes, node: Node, tx: Transaction | None) -> None:
        if tx is None:
            self._nodes[path] = node
        else:
            tx.touched[path].node = node
        self._count(node.perms[0].domid, 1, tx)

    def _check_creation(
        self,
        who: int,
        missing: list[bytes],
        parent: Node,
        perms: Perms,
        value: bytes,
        tx: Transaction | None,
    ) -> list[int]:
        """Whether the quotas allow it; returns the generations of the new nodes and the parent."""
        generations = []
        child_bytes = 0
        for count, path in enumerate(missing):
            # Within a transaction the nodes only count at its end.
            if who != DOM0 and (
                self.domains.known[who].nodes + (count if tx is None else 0) >= NODES_MAX
            ):
                raise Refused("ENOSPC")
            generations.append(self._step(path, tx))
            self._check_size(who, record_size(value, perms, child_bytes), tx)
            value = b""
            child_bytes = len(path.rpartition(b"/")[2]) + 1
        generations.append(self._step(parent_of(missing[-1]), tx))
        self._check_size(who, parent.size + child_bytes, tx)
        return generations

    def set_perms(
        self, who: int, path: bytes, texts: list[bytes], tx: Transaction | None = None
    ) -> None:
        if who != DOM0 and len(texts) > PERMS_MAX:
            raise Refused("ENOSPC")
        perms = self.domains.given(parse_perms(texts))
        owner = perms[0].domid
        if perms[0].bits & DEAD:
            raise Refused("ENOENT")
        if path.startswith(b"@"):
            self.domains.set_special_perms(who, path, perms)
            return
        node = self._find(who, path, WRITE | OWNER, tx)
        if node is None:
            raise Refused("ENOENT")
        old = self.domains.live(node)
        if who != DOM0 and owner != old[0].domid:
            raise Refused("EPERM")
        generation = self._step(path, tx)
        self._check_size(who, record_size(node.value, perms, node.child_bytes), tx)
        self._count(old[0].domid, -1, tx)
        self._count(owner, 1, tx)
        node.update(generation, perms)
        self._tell(path, False, tx, node, old)

    # -- removal

    def rm(self, who: int, path: bytes, tx: Transaction | None = None) -> None:
        if self._find(who, path, WRITE, tx) is None:
            if self._look(parent_of(path), tx) is None:
                raise Refused("ENOENT")
            return
        if path == ROOT:
            raise Refused("EINVAL")
        self._remove(path, tx)

    def _remove(self, path: bytes, tx: Transaction | None) -> None:
        """Remove the tree at `path`, the deepest nodes first; what is below has exact events."""
        parent = self._look(parent_of(path), tx)
        if parent is None:
            raise Refused("EINVAL")
        try:
            self._remove_tree(path, tx)
        except Refused as refused:
            # Only in a transaction: too many nodes, or the lists of children, fixed at different
            # times, name nodes which are not there.
            raise Refused("EIO") from refused
        name = path.rpartition(b"/")[2]
        generation = self._step(parent_of(path), tx)
        if name not in parent.children:
            raise Refused("EIO")
        parent.remove_child(name)
        parent.update(generation, self.domains.live(parent))

    def _remove_tree(self, top: bytes, tx: Transaction | None) -> None:
        node = self._look(top, tx)
        if node is None:
            raise Refused("ENOENT")
        # A path may have a thousand components: no recursion.
        stack = [(top, node, iter(tuple(node.children.values())))]
        while stack:
            path, node, names = stack[-1]
            name = next(names, None)
            if name is not None:
                below = child_of(path, name)
                child = self._look(below, tx)
                if child is None:
                    raise Refused("ENOENT")
                stack.append((below, child, iter(tuple(child.children.values()))))
                continue
            stack.pop()
            self._remove_one(path, node, path != top, tx)
            if stack:
                # xenstored writes the parent again without this child, which only shows if the
                # rest of the removal is refused.
                above, parent, _ = stack[-1]
                self._step(above, tx)
                if tx is not None:
                    parent.remove_child(path.rpartition(b"/")[2])

    def _remove_one(self, path: bytes, node: Node, exact: bool, tx: Transaction | None) -> None:
        self._step(path, tx)
        if tx is not None:
            tx.touched[path].node = None
        self._tell(path, exact, tx, node)
        if tx is None:
            del self._nodes[path]
        self._count(node.perms[0].domid, -1, tx)

    # -- transactions

    def start(self, who: int) -> Transaction:
        domain = self.domains.known[who]
        if who != DOM0 and domain.transactions > TRANSACTIONS_MAX:
            raise Refused("ENOSPC")
        domain.transactions += 1
        self.domains.generation += 1
        return Transaction(who)

    def abort(self, tx: Transaction) -> None:
        domain = self.domains.known.get(tx.domid)
        if domain is not None and domain.transactions:
            domain.transactions -= 1

    def commit(self, tx: Transaction) -> None:
        """End the transaction; if it is refused, it has ended all the same."""
        self.abort(tx)
        if tx.failed:
            raise Refused("ENOMEM")
        self._check_owned(tx)
        for path, touched in tx.touched.items():
            node = self._nodes.get(path)
            if touched.generation != (None if node is None else node.generation):
                raise Refused("EAGAIN")
        for path, touched in tx.touched.items():
            if not touched.modified:
                continue
            if touched.node is not None:
                self.domains.generation += 1
                touched.node.generation = self.domains.generation
                self._nodes[path] = touched.node
            elif touched.generation is not None:
                del self._nodes[path]
            if touched.fires:
                self._tell_committed(path, touched.exact, touched.perms)
        for owner, difference in tx.owned.items():
            self.domains.known[owner].nodes += difference

    def _check_owned(self, tx: Transaction) -> None:
        for owner, difference in tx.owned.items():
            domain = self.domains.meet(owner)
            if domain is None:
                raise Refused("ENOMEM")
            full = owner != DOM0 and domain.nodes + difference >= NODES_MAX
            if full and tx.created and tx.domid != DOM0:
                raise Refused("ENOSPC")

    def _tell_committed(self, path: bytes, exact: bool, old: Perms | None) -> None:
        # A parent which the same transaction has made may not be in the table yet: like xenstored,
        # one then only asks the node itself.
        node = self._nodes.get(path)
        if node is not None:
            self._tell(path, exact, None, node, *(() if old is None else (old,)))
        elif old is not None:
            self._changed(Change(path, exact, (old,)))

    # -- domains

    def introduce(self, domid: int) -> None:
        domain = self.domains.create(domid)
        if not domain.introduced:
            domain.introduced = True
            self._changed(self.domains.special(INTRODUCE_DOMAIN))

    def release(self, domid: int) -> None:
        """The store forgets the domain: its nodes vanish, and its permissions lose their effect."""
        domain = self.domains.known.get(domid)
        if domain is None or domid == DOM0:
            return
        self._remove_owned(domain)
        self.domains.forget(domid)
        if domain.introduced:
            self._changed(self.domains.special(RELEASE_DOMAIN))

    def destroy(self, domid: int) -> None:
        self.domains.end(domid)
        self.release(domid)

    def _remove_owned(self, domain: Domain) -> None:
        """Remove each tree whose top the domain owns, in the order of a walk from the root."""
        stack = [ROOT]
        while stack and domain.nodes > 0:
            path = stack.pop()
            node = self._nodes[path]
            owned = node.perms[0].domid == domain.domid
            if owned and path != ROOT:
                self._remove(path, None)
            else:
                if owned:
                    # xenstored would remove the root, and with it everything, for good.
                    self._count(domain.domid, -1, None)
                    self._count(DOM0, 1, None)
                    perms = (Entry(DOM0, node.perms[0].bits), *self.domains.live(node)[1:])
                    node.update(self._step(ROOT, None), perms)
                stack += [child_of(path, name) for name in reversed(node.children.values())]
