"""What a transaction of the embedded store holds.

A transaction is no snapshot: a node is fixed when the transaction first touches it, and until then
others' changes show.  Touching is reading, missing, writing, or looking at on the way (the nearest
ancestor of a missing node).  For each touched path the transaction keeps the generation it found
(None: no such node), and its own copy of the node, which alone it sees and changes from then on.
The end compares each generation with the store's: one which differs is a conflict.

The paths stay in the order of their first touch, because the events of a commit come in that order.
"""

from __future__ import annotations

from typing import Final

from xsfs.embedded.record import Node, Perms, Refused

NODES_MAX: Final = 1024
"""quota_trans_nodes, for unprivileged domains."""


class Touched:
    """One path in a transaction."""

    __slots__ = ("exact", "fires", "generation", "modified", "node", "perms")

    def __init__(self, node: Node | None, perms: Perms | None) -> None:
        self.node = node
        self.generation = None if node is None else node.generation
        # As they were found: who could read the node then gets the event of its change.
        self.perms = perms
        self.modified = False
        self.fires = False
        self.exact = False


class Transaction:
    __slots__ = ("created", "domid", "failed", "number", "owned", "touched")

    def __init__(self, domid: int) -> None:
        self.domid = domid
        self.number = 0
        """The tx_id; whoever owns the connection chooses it."""
        self.touched: dict[bytes, Touched] = {}
        self.owned: dict[int, int] = {}
        """By how many nodes the commit changes what each domain owns."""
        self.created = False
        self.failed = False
        """Something could not be undone: the commit will be refused (ENOMEM)."""

    def touch(self, path: bytes, node: Node | None, perms: Perms | None) -> Node | None:
        """Fix `path` as the store has it now; returns the transaction's own copy."""
        if self.domid and len(self.touched) >= NODES_MAX:
            self.failed = True
            raise Refused("ENOSPC")
        copied = None if node is None or perms is None else node.copy(perms)
        self.touched[path] = Touched(copied, perms)
        return copied

    def count(self, owner: int, difference: int) -> None:
        self.owned[owner] = self.owned.get(owner, 0) + difference

    def queue_event(self, path: bytes, exact: bool) -> None:
        """All changes to one node make one event; it is an exact one only if all of them are."""
        touched = self.touched[path]
        touched.exact = exact and (touched.exact or not touched.fires)
        touched.fires = True
