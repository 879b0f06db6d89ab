"""Inodes: the table of what the kernel knows, and what every kind of node answers by default.

What `Tree` owns: each `Node` for which the kernel holds a lookup count, and the few facts that all
nodes of a mount share.  Only the tasks that handle FUSE requests touch it, and none while it waits: who
has kept a node over a wait asks whether it still `stands`.

What always holds:

- A node is a position in the mount (its parent, its name) seen as one kind.  A file and a directory
  at the same place are two nodes, and have two inode numbers: an inode whose type changes breaks the
  files that are open on it.
- An inode number is the hash of that position, so it stays the same when the kernel forgets a node
  and comes back; a renamed node keeps its number.  Python's hash of bytes is keyed anew in each
  process, so no guest can choose names that collide; should two collide all the same, or an old node
  of the same position be known to the kernel, the later takes the next number.
- A node is in the table while its lookup count is above 0 (the root always), and its view has not
  ended.  The kernel may know the nodes of an ended view until its memory runs short; their numbers
  are never given again, and mean ESTALE.
- A path in `paths` is the node's: a rename, which may change any, empties the table.
- A node that was removed or replaced through the mount is `gone`: its old handles say ESTALE, and
  never bring it back.  So do all nodes of a view that has ended, and a new node at the same position
  is another one.
"""

from __future__ import annotations

import errno
import select
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Final, NamedTuple, NoReturn, Protocol, TypeVar, cast

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError

from xsfs.fs.prefetched import Prefetched
from xsfs.view.names import Aliases, join
from xsfs.view.ownership import Ownership
from xsfs.view.view import View
from xsfs.xenstore.eventual import Eventual

DIRECTORY_ENTRY_TIMEOUT: Final = 3600.0
"""Seconds.  A path means the same Xenstore path forever; whether it is still there each operation
finds out by itself, and answers ESTALE, upon which the kernel looks it up again."""

FILE_ENTRY_TIMEOUT: Final = 0.0
"""A file that got children meanwhile would be ENOTDIR without xsfs being asked."""

ATTRIBUTES_TIMEOUT: Final = 0.001
"""Seconds, which the kernel rounds up to its tick.  Spares the fstat(2) that follows an open(2) or a
listing at once a request of its own; whoever looks a file up gets new attributes anyway."""

PATHS_MAX: Final = 256

FORGOTTEN: Final = -1
"""The lookup count of a node that has left the table.  It never comes back: the number may be that of
another place, from which it was renamed."""

N = TypeVar("N", bound="Node")


def refuse(number: int) -> NoReturn:
    raise FUSEError(number)


class Caller(NamedTuple):
    """Whose system call it is."""

    pid: int
    uid: int
    foreign: bool
    """Whether that is neither root nor the one who mounted."""


class LiveCopy(Protocol):
    """What is to be known of a mirror in order to lead there."""

    @property
    def true(self) -> bool:
        """Whether the copy is there, and follows the store."""

    @property
    def directory(self) -> bytes:
        """Its absolute path."""


class Handle:
    """An open file or directory.  Each kind answers what it can."""

    __slots__ = ("node",)

    stream: ClassVar[bool] = False
    """Whether it has no positions: lseek(2) and pread(2) are ESPIPE."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def read(self, offset: int, size: int) -> Eventual[bytes]:
        refuse(errno.EINVAL)

    async def write(self, offset: int, data: bytes) -> int:
        refuse(errno.EINVAL)

    async def truncate(self, size: int) -> None:
        refuse(errno.EINVAL)

    async def fsync(self) -> None:
        """Carry out what is still due, and report its failure."""

    def release(self) -> Eventual[None]:
        """The last descriptor was closed."""
        return None

    def prepare(self) -> None:
        """Do what is left of the opening once it was answered.  What it raises, who reads must meet."""

    def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> Eventual[None]:
        refuse(errno.ENOTDIR)

    async def poll(self, poll_handle: pyfuse3.PollHandle | None) -> int:
        """What can be done without waiting, as poll(2) has it.

        Never ENOSYS, which would turn poll off for the whole mount.
        """
        return select.POLLIN | select.POLLOUT


class Node(ABC):
    """One inode.  Subclasses are the kinds; each answers the operations that make sense on it."""

    __slots__ = ("displaced", "gone", "inode", "lookups", "name", "parent", "tree", "view")

    kind: ClassVar[int] = stat.S_IFREG
    entry_timeout: ClassVar[float] = FILE_ENTRY_TIMEOUT

    def __init__(self, tree: Tree, view: View, parent: Node | None, name: bytes) -> None:
        self.tree = tree
        self.view = view
        self.parent = parent
        self.name = name
        self.inode = 0
        self.lookups = 0
        self.displaced = False
        """Whether its number is not the hash of its position, since another node has that."""
        self.gone = False

    @property
    def path(self) -> bytes:
        """The absolute Xenstore path.  Not stored here: a rename of a parent changes it."""
        assert self.parent is not None
        return join(self.parent.path, self.name)

    @property
    def label(self) -> bytes:
        """For the log: the path, and the transaction that it is seen in."""
        return self.realm + self.path

    @property
    def realm(self) -> bytes:
        return self.parent.realm if self.parent is not None else b""

    def require(self) -> None:
        """ESTALE if it has gone for good, itself or with its whole view."""
        if self.gone or self.view.ended:
            refuse(errno.ESTALE)

    def place_of(self, name: bytes) -> tuple[object, ...]:
        """What tells a child of this name from all others in the mount."""
        return self.inode, name

    # ---------------------------------------------------------------------------- attributes

    def entry(self, size: int, read: bool = True, write: bool = True) -> EntryAttributes:
        """The attributes of this node as the kernel takes them."""
        ownership = self.tree.ownership
        entry = EntryAttributes()
        entry.st_ino = self.inode
        entry.st_mode = ownership.mode(self.kind, read, write)
        entry.st_uid = ownership.uid
        entry.st_gid = ownership.gid
        entry.st_size = size
        entry.entry_timeout = self.entry_timeout
        entry.attr_timeout = ATTRIBUTES_TIMEOUT
        return entry

    @abstractmethod
    async def getattr(self) -> EntryAttributes:
        """The attributes as they are now; ESTALE if the node is not there, or of another kind."""

    async def looked_up(self, pid: int) -> EntryAttributes:
        """The same for the LOOKUP of one of xsfs's own names by thread `pid`."""
        return await self.getattr()

    async def truncate(self, size: int) -> None:
        refuse(errno.EISDIR if self.kind == stat.S_IFDIR else errno.EACCES)

    # ------------------------------------------------------------------------------- entries

    def lookup(self, name: bytes, pid: int) -> Eventual[EntryAttributes]:
        refuse(errno.ENOTDIR)

    async def create(self, name: bytes, flags: int) -> tuple[Handle, EntryAttributes]:
        refuse(errno.ENOTDIR)

    async def make_file(self, name: bytes) -> EntryAttributes:
        refuse(errno.ENOTDIR)

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        refuse(errno.ENOTDIR)

    async def unlink(self, name: bytes) -> None:
        refuse(errno.ENOTDIR)

    async def rmdir(self, name: bytes) -> None:
        refuse(errno.ENOTDIR)

    async def rename(self, name: bytes, target: Node, target_name: bytes, flags: int) -> None:
        refuse(errno.ENOTDIR)

    async def readlink(self) -> bytes:
        refuse(errno.EINVAL)

    # ------------------------------------------------------------------------------- handles

    async def open(self, flags: int, caller: Caller) -> Handle:
        refuse(errno.EISDIR)

    def opendir(self) -> Eventual[Handle]:
        refuse(errno.ENOTDIR)

    # ---------------------------------------------------------------------------- attributes

    async def getxattr(self, name: bytes) -> bytes:
        refuse(pyfuse3.ENOATTR)

    async def setxattr(self, name: bytes, value: bytes) -> None:
        refuse(errno.EOPNOTSUPP)

    async def listxattr(self) -> list[bytes]:
        return []

    async def removexattr(self, name: bytes) -> None:
        refuse(pyfuse3.ENOATTR)


class Tree:
    """See the module's text."""

    def __init__(self, ownership: Ownership, counters: Callable[[], dict[str, int | str]]) -> None:
        self.ownership = ownership
        self.counters = counters
        self.prefetched: Prefetched[Handle] = Prefetched()
        self.aliases = Aliases()
        self.alike: tuple[EntryAttributes, EntryAttributes] | None = None
        """What most of the entries in listings look like, but for the inode."""
        self.mirror: LiveCopy | None = None
        self.readers = 0
        """How many watch files are open."""
        self.foreign_readers = 0
        """How many of them by users who are neither root nor the one who mounted."""
        self._nodes: dict[int, Node] = {}
        self._view: View | None = None
        """The root's."""
        self._inside: dict[View, set[int]] = {}
        """Which nodes are those of other views."""
        self._moved: dict[tuple[type[Node], Node, bytes], Node] = {}
        """By position, those whose numbers are not its hash: renamed, or displaced by another."""
        self.paths: dict[Node, bytes] = {}
        """Of directories that are in use: a bounded number, and none any more after a rename."""

    def __len__(self) -> int:
        return len(self._nodes)

    def path_of(self, directory: Node) -> bytes:
        """The path of a directory that is in use from now on."""
        if len(self.paths) >= PATHS_MAX:
            self.paths.clear()
        assert directory.parent is not None
        path = self.paths[directory] = join(directory.parent.path, directory.name)
        return path

    def peek(self, inode: int) -> Node | None:
        return self._nodes.get(inode)

    def add_root(self, root: Node) -> None:
        root.inode = pyfuse3.ROOT_INODE
        root.lookups = 1
        self._view = root.view
        self._nodes[root.inode] = root

    def get(self, inode: int) -> Node:
        """The node with this number; ESTALE if there is none (any more)."""
        node = self._nodes.get(inode)
        if node is None or node.view.ended:
            refuse(errno.ESTALE)
        return node

    def node(self, kind: type[N], parent: Node, name: bytes) -> N:
        """The node at this position, a new one if need be.  Its lookup count stays as it is."""
        found, number, displaced = self._search(kind, parent, name)
        if found is not None:
            return found
        node = kind(self, parent.view, parent, name)
        node.inode = number
        node.displaced = displaced
        return node

    def find(self, kind: type[N], parent: Node, name: bytes) -> N | None:
        """The node at this position if the kernel knows one."""
        return self._search(kind, parent, name)[0]

    def _search(self, kind: type[N], parent: Node, name: bytes) -> tuple[N | None, int, bool]:
        """The node at this position if the table has it; its number, or the one that it would get,
        and whether that is not the position's hash."""
        if self._moved and (moved := self._moved.get((kind, parent, name))) is not None:
            if not moved.gone:
                return cast(N, moved), moved.inode, True
            del self._moved[kind, parent, name]
        # 2 and up: 1 is the root's.
        first = number = (hash((kind, parent.place_of(name))) & 0x3FFF_FFFF_FFFF_FFFF) + 2
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

    def stands(self, node: Node, parent: Node, name: bytes) -> bool:
        """Whether a node that was made for this position before a wait may still be remembered: the
        kernel knows it, here; or it never knew one here, and the node's number is still the next."""
        if node.gone or node.view.ended or node.lookups == FORGOTTEN:
            return False
        if node.lookups:  # it is in the table, where no other has its place
            return node.parent is parent and node.name == name
        if not (node.displaced or self._moved):  # who had its place would have its number
            return node.inode not in self._nodes
        known, number, _ = self._search(type(node), parent, name)
        return known is None and number == node.inode

    def move(self, node: Node, parent: Node, name: bytes) -> None:
        """The node has been renamed: it keeps its number, which is not its new position's hash."""
        self._unmove(node)
        self.paths.clear()
        node.parent = parent
        node.name = name
        self._moved[type(node), parent, name] = node

    def remember(self, node: Node) -> None:
        """The kernel was told of the node.  No await may lie between `node`, or `stands`, and this, or
        two tasks could have made it."""
        if node.view is not self._view and not self._joins(node):
            return  # its view has ended meanwhile
        if node.displaced and not node.lookups:
            # To be found even if what is at its position's number goes first.
            assert node.parent is not None
            self._moved[type(node), node.parent, node.name] = node
        node.lookups += 1
        self._nodes[node.inode] = node

    def _joins(self, node: Node) -> bool:
        """Whether the node can be kept with those of its view, all of which go when it ends."""
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
            self._unmove(node)
            if node.view is not self._view:
                self._inside[node.view].discard(inode)

    def _unmove(self, node: Node) -> None:
        """The node leaves its place."""
        if self._moved and node.parent is not None:
            place = type(node), node.parent, node.name
            if self._moved.get(place) is node:
                del self._moved[place]
