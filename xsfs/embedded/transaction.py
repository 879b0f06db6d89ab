"""One transaction of the embedded store.

A transaction is not a snapshot.  It copies a node's record when it first accesses the node, and
others' changes to that node show until then.  Access means reading, writing, finding nothing, and
the search for the nearest ancestor of a missing node.  From then on the transaction sees and
changes only its copy.  At the end the database compares the generation of each accessed node with
the generation that the transaction found: a difference is a conflict.

`accessed` keeps the order of first access, because a commit sends its events in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from xsfs.embedded.record import Perms, Record, Refused

MISSING: Final = -1
"""The generation of a node that does not exist."""


@dataclass(slots=True, eq=False)
class AccessedNode:
    """The copy of one node's record, and what the transaction found when it made the copy.

    record      None if the node does not exist
    perms       a domain that these permissions let read the node gets the event
    modified    the commit writes or removes the node
    fires       the commit sends an event for the node; `exact`: only to watches at its path
    """

    record: Record | None = None
    generation: int = MISSING
    perms: Perms | None = None
    modified: bool = False
    fires: bool = False
    exact: bool = False


@dataclass(slots=True, eq=False)
class DatabaseTransaction:
    """See the module's docstring.

    nodes_max   how many nodes it may access; None: any number
    owned       by how many the commit changes the number of each domain's nodes
    created     it has tried to create a node, so the commit checks the quota `nodes`
    failed      a request could not be undone: the commit fails with ENOMEM
    """

    domid: int
    nodes_max: int | None
    accessed: dict[bytes, AccessedNode] = field(default_factory=dict)
    owned: dict[int, int] = field(default_factory=dict)
    created: bool = False
    failed: bool = False

    def access(self, path: bytes, found: Record | None) -> Record | None:
        """Copy the node that the database has now, and return the copy."""
        if self.nodes_max is not None and len(self.accessed) >= self.nodes_max:
            self.failed = True
            raise Refused("ENOSPC")
        accessed = AccessedNode()
        if found is not None:
            accessed = AccessedNode(found.copy(), found.generation, found.perms)
        self.accessed[path] = accessed
        return accessed.record

    def count(self, owner: int, difference: int) -> None:
        self.owned[owner] = self.owned.get(owner, 0) + difference

    def queue_event(self, path: bytes, exact: bool) -> None:
        """All changes to one node make one event, which is exact only if all of them are."""
        accessed = self.accessed[path]
        accessed.exact = exact and (accessed.exact or not accessed.fires)
        accessed.fires = True
