"""One transaction of the embedded store.

A transaction is not a snapshot.  It keeps a node's record when it first accesses the node, and
others' changes to that node show until then.  Access means reading, writing, finding nothing, and
the search for the nearest ancestor of a missing node.  From then on the transaction sees and
changes only its own record.  If the database has another record at the end, that is a conflict.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from xsfs.embedded.record import Record


@dataclass(slots=True, eq=False)
class AccessedNode:
    """One node of a transaction.

    found     the database's record at the first access; None if the node did not exist
    record    the record that the transaction sees, and that its commit stores
    exact     whether the event goes only to watches at the node's path; None if there is no event.
              All changes to one node make one event, which is exact only if all of them are.
    """

    found: Record | None
    record: Record | None
    exact: bool | None = None


@dataclass(slots=True, eq=False)
class DatabaseTransaction:
    """See the module's docstring.

    accessed    in the order of first access, in which a commit sends the events
    owned       by how many the commit changes the number of each domain's nodes
    created     it has tried to create a node, so the commit checks the quota `nodes`
    failed      a request could not be undone: the commit fails with ENOMEM
    """

    domid: int
    accessed: dict[bytes, AccessedNode] = field(default_factory=dict)
    owned: Counter[int] = field(default_factory=Counter)
    created: bool = False
    failed: bool = False
