"""Turns one node's state into files of the mirror.

`Reconciler` owns the number of nodes shown, and the set of directories that are shown without a node.  It
keeps no copy in memory: `_show_file` decides by a file whether it is stale, and `MirrorDirectory.put`
replaces it.  Nodes that must be fetched as a consequence go into the work queue.  Only the mirror's task may
call `apply`.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Collection, Iterable
from itertools import chain
from typing import Final, NamedTuple

from xsfs.mirror.staging import MirrorDirectory, Steps, below
from xsfs.view.names import NAME_MAX, VALUE_NAME, file_name, is_alias, join, parent_path
from xsfs.view.view import EMPTY_NODE, NodeState, View

WorkQueue = OrderedDict[bytes, bool]
"""The nodes to be fetched, first in, first out.  True: an event named the node, so its file is replaced even
by an equal one.  `setdefault` queues a node without such an event."""


class FetchedNode(NamedTuple):
    state: NodeState | None
    """None: there is no such node."""
    names: Iterable[bytes]
    """The names of its children that a listing shows."""
    perms: bytes
    """The permissions as GET_PERMS gave them; b"" if they are unknown."""


GONE: Final = FetchedNode(None, (), b"")


class Reconciler:
    """See the module's text."""

    def __init__(self, view: View, files: MirrorDirectory, queue: WorkQueue) -> None:
        self._view = view
        self._files = files
        self._queue = queue
        self.nodes = 0
        """How many files and directories there are, `.value` and the root not counted."""
        self._nodeless: set[bytes] = set()
        """The directories that are always shown whose node was missing, or hidden, when last fetched."""

    def begin(self) -> None:
        """There are no files: the root must be fetched."""
        self._queue.clear()
        self._queue[self._view.root] = False
        self._nodeless.clear()
        self.nodes = 0

    def place(self, path: bytes) -> bytes:
        """The path of a node's file, relative to the mirror's directory."""
        inside = path[len(self._view.root) :].lstrip(b"/")
        if len(inside) <= NAME_MAX:
            return inside
        return b"/".join(map(file_name, inside.split(b"/")))

    def contradicts(self, path: bytes) -> bool:
        """Whether the files may contradict the sticky directories by now.  These tell whether the node is a
        directory, and whether its `.value` was made."""
        if self._files.is_publishing:
            return True
        place = self.place(path)
        kind = self._files.kind(place)
        if kind != stat.S_IFDIR:
            return kind == stat.S_IFREG and path in self._view.sticky
        value = self._files.read(below(place, VALUE_NAME))
        # A `.value` that is not empty is shown whatever is known.
        is_empty = value is None or not value[0]
        if is_empty and bool(self._view.sticky.has_value(path)) != (value is not None):
            return True
        return path != self._view.root and not self._has_children(place)

    def _has_children(self, place: bytes) -> bool:
        return any(name != VALUE_NAME for name, _ in self._files.scan(place))

    def is_within_reach(self, path: bytes) -> bool:
        """Whether a node that an event named can be shown.  If not, an ancestor is queued instead: it may be
        one for many nodes, and the store walks up the path of each missing node that is fetched."""
        for directory in self._nodeless:
            # The store may have made it implicitly with this node, without an event for it.
            if path.startswith(directory + b"/"):
                self._queue.setdefault(directory, False)
        return self._has_parent(path, self.place(path))

    def _has_parent(self, path: bytes, place: bytes) -> bool:
        """Whether the mirror has the directory of this node.  If not, its highest missing ancestor is queued,
        from which the way down leads to the node."""
        missing = self._files.first_missing(place.rpartition(b"/")[0])
        if missing is None:
            return True
        names = path[len(self._view.root) :].lstrip(b"/").split(b"/")
        ancestor = b"/".join(names[: missing.count(b"/") + 1])
        self._queue.setdefault(join(self._view.root, ancestor), False)
        return False

    def queue_nodes_of(self, domids: Collection[bytes]) -> Steps:
        """Queue the nodes whose permissions, as the mirror shows them, name one of these domains.

        Permissions that the file system could not store may name any.
        """
        left = [(self._view.root, b"", True)]
        while left:
            path, place, is_directory = left.pop()
            perms = self._files.perms(place)
            if not perms or any(entry[1:] in domids for entry in perms.split(b",")):
                self._queue.setdefault(path, False)
            elif is_directory:
                for name, is_below in self._files.scan(place):
                    if is_alias(name):
                        self._queue.setdefault(path, False)  # its children follow
                    elif name != VALUE_NAME:
                        left.append((join(path, name), below(place, name), is_below))
                    yield b""
            yield b""

    # ---------------------------------------------------------------------------------- apply

    def apply(self, path: bytes, node: FetchedNode, *, renew: bool) -> Steps:
        """Make the files agree with a node that was just fetched, and queue its children.

        renew   an event named the node: its file is replaced even by an equal one
        """
        # It may have been queued since it was fetched: by a node that was fetched earlier, or because the
        # mount has learned something.  Neither is newer than the reply and what the mount knows now.
        self._queue.pop(path, None)
        self._nodeless.discard(path)
        state = node.state
        if state is None or not state.readable:
            state = None
            if self._view.is_always_there(path):
                state = EMPTY_NODE
                self._nodeless.add(path)
        place = self.place(path)
        kind = self._files.kind(place)
        if not (kind or self._has_parent(path, place)):
            return
        if state is not None:
            yield from self._show(path, place, kind, state, node, renew=renew)
        elif kind or renew:
            yield from self._remove(place)
            parent = parent_path(path)
            if self._view.root not in (path, parent) and not self._has_children(self.place(parent)):
                self._queue.setdefault(parent, False)  # without children, it may be a file

    def _is_directory(self, path: bytes, state: NodeState) -> bool:
        return path == self._view.root or self._view.is_directory(path, state)

    def _show(
        self,
        path: bytes,
        place: bytes,
        kind: int,
        state: NodeState,
        node: FetchedNode,
        *,
        renew: bool,
    ) -> Steps:
        """`kind` is the type of the present file, or 0."""
        is_directory = self._is_directory(path, state)
        if kind not in (0, stat.S_IFDIR if is_directory else stat.S_IFREG):
            yield from self._remove(place)
            kind = 0
            is_directory = self._is_directory(path, state)  # the mount may have learned more
        content = self._view.value_format.render(state.value or b"")
        perms = node.perms.rstrip(b"\0").replace(b"\0", b",") if self._files.has_perms else b""
        if not is_directory:
            self._show_file(place, content, perms, is_new=not kind, renew=renew)
        elif kind:
            self._files.set_perms(place, perms)
        else:
            self._files.make_directory(place, perms)
        self.nodes += not kind
        if is_directory:
            value_place = below(place, VALUE_NAME)
            has_value = state is not EMPTY_NODE and self._view.has_dot_value(path, state)
            if kind and not (has_value and self._files.kind(value_place) == stat.S_IFREG):
                yield from self._files.removing(value_place)
            if has_value:
                self._show_file(value_place, content, perms, is_new=not kind, renew=renew)
            yield from self._queue_children(path, place, node.names, is_new=not kind)
            if not self._is_directory(path, state):
                # The mount has learned this while the files did not contradict it yet.
                self._queue.setdefault(path, False)

    def _show_file(
        self, place: bytes, content: bytes, perms: bytes, *, is_new: bool, renew: bool
    ) -> None:
        if is_new or renew or self._files.read(place) != (content, perms):
            self._files.put(place, content, perms, is_new=is_new)

    def _queue_children(
        self, path: bytes, place: bytes, names: Iterable[bytes], *, is_new: bool
    ) -> Steps:
        """Queue the children of a directory, and remove the files of all others if it is not new."""
        shown = {VALUE_NAME}
        for name in chain(names, self._view.always_there_below(path)):
            self._queue.setdefault(join(path, name), False)
            shown.add(file_name(name))
            yield b""
        if is_new:
            return
        for name, _ in self._files.scan(place):
            if name not in shown:
                yield from self._remove(below(place, name))
            yield b""

    def _remove(self, place: bytes) -> Steps:
        for removed in self._files.removing(place):
            self.nodes -= removed != b"" and not removed.endswith(b"/" + VALUE_NAME)
            yield removed
