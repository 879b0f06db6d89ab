"""The table of inodes, and the hand-over from one request of a thread to the next.

An `InodeTable` owns each `Node` for which the kernel holds a lookup count, and the few facts that all nodes
of a mount share.  Only the tasks that handle FUSE requests touch it.  The table may change while a task
waits, so no task relies on a node that it has kept across an await.

Invariants:

- A node is a position in the mount (its parent, its name) seen as one kind.  A file and a directory at one
  position are two nodes with two numbers: an inode whose type changes breaks the files that are open on it.
- An inode number is the hash of the position, so it stays when the kernel forgets a node and comes back.  A
  renamed node keeps its number.  Python's hash of bytes has a new key in each process, so no guest can
  choose names that collide.  If two positions collide, or the kernel still knows an old node of the
  position, the later node takes the next free number.
- A node is in the table while its lookup count is above 0 (the root always) and its view has not ended.  The
  numbers of the nodes of an ended view mean ESTALE, and no other node gets them.
- `paths` holds paths of directories.  A rename of a directory, which may change any, empties it.
- A node that was removed or replaced through the mount is `gone`.  A new node at its position is another
  one.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol, TypeVar, cast

import pyfuse3

from xsfs.fs.dumps import TEXTS_MAX
from xsfs.fs.fuse_loop import KernelDescriptor
from xsfs.fs.nodes import FORGOTTEN, Node, refuse
from xsfs.fs.open_files import OpenFiles
from xsfs.fs.quotas import Quota
from xsfs.fs.watch_files import READERS_MAX
from xsfs.view.bounded import Bounded
from xsfs.view.names import file_name, join
from xsfs.view.ownership import Ownership
from xsfs.view.view import LEAF, NodeState, View

PATHS_MAX: Final = 256

ALIASES_MAX: Final = 4096
"""How many names behind aliases are kept: 8 MiB at most.  Without them each look-up of an alias lists all
children of the directory."""

HANDOVER_SECONDS: Final = 0.001
HANDOVERS_MAX: Final = 64

LISTING_BYTES_MAX: Final = 64 << 20
"""The memory of all open listings."""

N = TypeVar("N", bound=Node)


class LiveMirror(Protocol):
    """The part of a mirror that the link to it needs."""

    @property
    def is_current(self) -> bool:
        """Whether the copy exists and follows the store."""

    @property
    def directory(self) -> bytes:
        """Its absolute path."""


class Handover:
    """States that one request has fetched for the next: a LOOKUP for the OPEN of the same open(2), and an
    OPENDIR for the GETATTR of the fstat(2) that follows, as programs that list a directory do.

    The kernel sends both in the name of one thread, one right after the other.  A state is given once, to
    that thread, for that inode, and within HANDOVER_SECONDS.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, tuple[int, NodeState, float]] = {}
        self.changes = 0
        """How many changes were carried out through the mount."""

    def put(self, pid: int, inode: int, state: NodeState, changes: int) -> None:
        """Keep a state that was fetched when there were so many `changes`, if there are no more now."""
        if changes != self.changes:
            return
        if len(self._by_thread) >= HANDOVERS_MAX:
            self._by_thread.clear()
        self._by_thread[pid] = inode, state, time.monotonic()

    def take(self, pid: int, inode: int) -> tuple[NodeState, float] | None:
        """The state, and when it was fetched, in seconds of time.monotonic()."""
        found, state, fetched_at = self._by_thread.pop(pid, (None, LEAF, 0.0))
        if found != inode or time.monotonic() - fetched_at > HANDOVER_SECONDS:
            return None
        return state, fetched_at

    def clear(self) -> None:
        """Something was written through the mount, so what was fetched before may be outdated."""
        self.changes += 1
        self._by_thread.clear()


class InodeTable:
    """See the module's docstring.

    counters    gives the lines of `.stats`
    allow_other whether other users can use the mount
    visible     whether the root of the mount lists xsfs's own names
    """

    def __init__(
        self,
        ownership: Ownership,
        counters: Callable[[], Mapping[str, int | str]],
        *,
        allow_other: bool = False,
        visible: bool = False,
    ) -> None:
        self.ownership = ownership
        self.kernel = KernelDescriptor()
        self.allow_other = allow_other
        self.counters = counters
        self.visible = visible
        self.mounted_ns = time.time_ns()
        self.handover = Handover()
        self._aliases: Bounded[bytes, bytes] = Bounded(ALIASES_MAX)
        self.mirror: LiveMirror | None = None
        self.readers = Quota(READERS_MAX, errno.EMFILE)
        self.listing_bytes = Quota(LISTING_BYTES_MAX, errno.ENFILE)
        self.text_bytes = Quota(TEXTS_MAX, errno.ENFILE)
        self._open_files: dict[View, OpenFiles] = {}
        self._nodes: dict[int, Node] = {}
        self.root_view: View | None = None
        self._inside: dict[View, set[int]] = {}
        """The inodes of the nodes of other views."""
        self._moved: dict[tuple[type[Node], Node, bytes], Node] = {}
        """By position, the nodes whose numbers are not its hash: renamed, or renumbered."""
        self.paths: dict[Node, bytes] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def path_of(self, directory: Node) -> bytes:
        """The path of a directory, which is kept for the next call."""
        names = []
        node = directory
        # A path may have 1,500 levels, too many for recursion.  A root has a property `path` of its own.
        while node not in self.paths and type(node).path is type(directory).path:
            names.append(node.name)
            assert node.parent is not None
            node = node.parent
        path = self.paths.get(node) or node.path
        for name in reversed(names):
            path = join(path, name)
        if len(self.paths) >= PATHS_MAX:
            self.paths.clear()
        self.paths[directory] = path
        return path

    def alias(self, name: bytes) -> bytes:
        """The file name of a child whose name is too long for one.  `name_behind` knows it from now on."""
        alias = file_name(name)
        self._aliases.put(alias, name)
        return alias

    def name_behind(self, alias: bytes) -> bytes | None:
        """The name that had this alias in a listing lately.  There may be no such child any more."""
        return self._aliases.get(alias)

    def peek(self, inode: int) -> Node | None:
        return self._nodes.get(inode)

    def add_root(self, root: Node) -> None:
        root.inode = pyfuse3.ROOT_INODE
        root.lookups = 1
        self.root_view = root.view
        self._nodes[root.inode] = root

    def open_files_of(self, view: View) -> OpenFiles:
        found = self._open_files.get(view)
        if found is None:
            found = self._open_files[view] = OpenFiles(view)
        return found

    def get(self, inode: int) -> Node:
        """The node with this number.  Fails with ESTALE if there is none any more."""
        node = self._nodes.get(inode)
        if node is None or node.view.ended:
            refuse(errno.ESTALE)
        return node

    def node(self, kind: type[N], parent: Node, name: bytes) -> N:
        """The node at this position, a new one if need be.  Its lookup count stays as it is."""
        found, number, renumbered = self._search(kind, parent, name)
        if found is not None:
            return found
        node = kind(self, parent.view, parent, name)
        node.inode = number
        node.renumbered = renumbered
        return node

    def find(self, kind: type[N], parent: Node, name: bytes) -> N | None:
        """The node at this position if the kernel knows one."""
        return self._search(kind, parent, name)[0]

    def _search(self, kind: type[N], parent: Node, name: bytes) -> tuple[N | None, int, bool]:
        """The node at this position if the table has it; its number, or the one that it would get; and
        whether that number is not the position's hash."""
        if self._moved and (moved := self._moved.get((kind, parent, name))) is not None:
            if not moved.gone:
                return cast(N, moved), moved.inode, True
            del self._moved[kind, parent, name]
        # 2 and up: 1 is the root's.
        first = number = (hash((kind, parent.position_of(name))) & 0x3FFF_FFFF_FFFF_FFFF) + 2
        while (found := self._nodes.get(number)) is not None:
            if (
                type(found) is kind
                and found.parent is parent
                and found.name == name
                and not (found.gone or found.view.ended)
            ):
                return found, number, number != first
            number += 1
        return None, number, number != first

    def move(self, node: Node, parent: Node, name: bytes) -> None:
        """The node was renamed.  It keeps its number, which is not the hash of its new position."""
        self._unmove(node)
        if node.kind == stat.S_IFDIR:
            self.paths.clear()
        node.parent = parent
        node.name = name
        self._moved[type(node), parent, name] = node

    def remember(self, node: Node) -> None:
        """Count one more lookup of the node by the kernel.  No await may lie between `node` and this
        call, or two tasks could have created the node."""
        if node.view is not self.root_view and not self._joins(node):
            return  # its view has ended meanwhile
        if node.renumbered and not node.lookups:
            # To be found even if the node that has its position's number goes first.
            assert node.parent is not None
            self._moved[type(node), node.parent, node.name] = node
        node.lookups += 1
        self._nodes[node.inode] = node

    def _joins(self, node: Node) -> bool:
        """Whether the node can be kept with the nodes of its view, which all go when it ends."""
        view = node.view
        if view.ended:
            return False
        if view not in self._inside:
            self._inside[view] = set()
            view.at_end[self] = partial(self._drop, view)
        self._inside[view].add(node.inode)
        return True

    def _drop(self, view: View) -> None:
        self.paths.clear()
        self._open_files.pop(view, None)
        for inode in self._inside.pop(view):
            self._unmove(self._nodes.pop(inode))

    def forget(self, inode: int, lookups: int) -> None:
        node = self._nodes.get(inode)
        if node is None:
            return
        node.lookups -= lookups
        if node.lookups <= 0 and inode != pyfuse3.ROOT_INODE:
            del self._nodes[inode]
            node.lookups = FORGOTTEN
            if self._moved:
                self._unmove(node)
            if node.view is not self.root_view:
                self._inside[node.view].discard(inode)

    def _unmove(self, node: Node) -> None:
        """The node leaves its position."""
        if node.parent is not None:
            position = type(node), node.parent, node.name
            if self._moved.get(position) is node:
                del self._moved[position]
