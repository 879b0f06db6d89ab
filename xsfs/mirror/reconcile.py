"""A copy of a tree in files: what a look at one node changes in it.

`Copy` holds no copy of its own: what is shown is what the files are.  `again` are the nodes that must
be looked at before the copy can be true; whoever looks brings what was seen to `apply`.
"""

from __future__ import annotations

import stat
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from xsfs.mirror.staging import MirrorDirectory, Steps
from xsfs.view.looks import NOTHING, Look
from xsfs.view.names import NAME_MAX, VALUE_NAME, file_name, join, parent_path
from xsfs.view.view import Sight, View
from xsfs.xenstore.permissions import perms_text

READY_SECONDS: Final = 0.002
"""How long what was found out about a node's place is good: others could have changed it then."""


class _Ready(NamedTuple):
    """What was found out about a node's place while the store was asked for the node."""

    path: bytes
    place: bytes
    kind: int
    until: float


class Copy:
    """See the module's text."""

    def __init__(self, view: View, files: MirrorDirectory) -> None:
        self._view = view
        self._files = files
        self.again: OrderedDict[bytes, None] = OrderedDict()
        self.all_again = False
        """Whether everything is to be looked at again, when that is done which is under way."""
        self.nodes = 0
        """How many files and directories there are, `.value` and the root not counted."""
        self._ready: _Ready | None = None
        self._moves = False
        """Whether all of it is on its way to where it is shown."""
        self._missing: set[bytes] = set()
        """Those shown that last, but were not there, or not to be read, when they were looked at."""

    def begin(self) -> None:
        """There are no files: all must be looked at."""
        self.again.clear()
        self.again[self._view.root] = None
        self.all_again = False
        self.nodes = 0
        self._ready = None
        self._missing.clear()

    def publish(self) -> Steps:
        """Show all of it."""
        self._moves = True
        try:
            yield from self._files.publish()
        finally:
            self._moves = False

    def place(self, path: bytes) -> bytes:
        """Where a node's file is."""
        root = self._view.root
        inside = path[1:] if root == b"/" else path[len(root) + 1 :]
        if len(inside) <= NAME_MAX:
            return inside
        return b"/".join(map(file_name, inside.split(b"/")))

    def contradicts(self, path: bytes) -> bool:
        """Whether what is shown of a node may not be what is known of it as a directory."""
        if self._moves:
            return True  # it may be on its way
        place = self.place(path)
        kind = self._files.kind(place)
        known = self._view.known.get(path)
        if kind != stat.S_IFDIR:
            return kind == stat.S_IFREG and known is not None
        names = self._files.names(place)
        # A `.value` that is not empty is there whatever is known.
        empty = self._files.content(self._in(place, VALUE_NAME)) == b""
        if (known and VALUE_NAME not in names) or (empty and not known):
            return True
        return path != self._view.root and not self._has_children(names)

    @staticmethod
    def _in(place: bytes, name: bytes) -> bytes:
        return place + b"/" + name if place else name

    @staticmethod
    def _has_children(names: list[bytes]) -> bool:
        return len(names) > (VALUE_NAME in names)

    # ---------------------------------------------------------------------------------- apply

    def apply(self, path: bytes, sight: Sight, *, renew: bool) -> Steps:
        """Make the files agree with what was just seen of a node.

        A file that is to be renewed is replaced even by an equal one.  The children of a directory
        are to be looked at `again`, whether they were shown or not.  Of nodes to be renewed that were
        asked for together those above come first.
        """
        if renew:
            # Who has wanted it since it was asked for is above it, and was asked for before it; or has
            # learned something of it, which counts from here on.
            self.again.pop(path, None)
        if self._files.staged and self._show_at_first(path, sight):
            yield b""
            return
        look = sight.look
        if look is not None and look.hidden:
            look = None
        self._missing.discard(path)
        if look is None and self._lasts(path):
            look = NOTHING
            self._missing.add(path)
        ready, self._ready = self._ready, None
        if ready is not None and ready.path == path and time.perf_counter() < ready.until:
            place, kind = ready.place, ready.kind
        else:
            if not self._can_be_shown(path):
                return
            place = self.place(path)
            kind = self._files.kind(place)
        if look is not None:
            yield from self._show(path, place, look, sight, kind, renew=renew)
            return
        if kind:
            yield from self._remove(place, kind)
        if kind or renew:
            self._look_at_parent(path)

    def _show_at_first(self, path: bytes, sight: Sight) -> bool:
        """In the workshop nodes are new, but for the root, and the few that are looked at twice: make
        this one.  Whether that could be done; if not, it was there, or what is above it was not."""
        look = sight.look
        if look is None or look.hidden:
            return False
        try:
            self._show_new(path, self.place(path), look, sight, self._wanted(path, look))
        except (FileExistsError, FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _show(
        self, path: bytes, place: bytes, look: Look, sight: Sight, kind: int, *, renew: bool
    ) -> Steps:
        """`kind`: what is shown there now."""
        wanted = self._wanted(path, look)
        if kind not in (0, wanted):
            yield from self._remove(place, kind)
        if kind != wanted:
            self._show_new(path, place, look, sight, wanted)
        elif wanted == stat.S_IFDIR:
            yield from self._show_directory(path, place, look, sight, renew=renew)
        else:
            self._show_file(place, look, sight, renew=renew)
        yield place
        if self._wanted(path, look) != wanted:
            # It was learned when not enough was shown to be contradicted.
            self.again[path] = None

    def _show_new(self, path: bytes, place: bytes, look: Look, sight: Sight, wanted: int) -> None:
        """Nothing is shown there."""
        perms = self._perms(sight)
        if wanted == stat.S_IFREG:
            self._files.put(place, self._view.content.render(look.value), perms, new=True)
            self.nodes += 1
            return
        self._files.make_directory(place)
        self.nodes += 1
        if self._view.has_dot_value(path, look):
            content = self._view.content.render(look.value)
            self._files.put(self._in(place, VALUE_NAME), content, perms, new=True)
        if perms:
            self._files.set_perms(place, perms, new=True)
        self._look_at_children(path, sight)

    def _look_at_children(self, path: bytes, sight: Sight) -> Iterable[bytes]:
        above = join(path, b"")
        names = self._children(path, sight)
        self.again.update(dict.fromkeys([above + name for name in names]))
        return names

    def _children(self, path: bytes, sight: Sight) -> Iterable[bytes]:
        return dict.fromkeys((*sight.names, *self._view.lasting_children(path)))

    def _look_at_missing(self, path: bytes) -> bool:
        """Whether a directory above, which is shown all the time, was missing.  It has been made
        implicitly then: the way down from there leads to the node."""
        above = [missing for missing in self._missing if path.startswith(missing + b"/")]
        self.again.update(dict.fromkeys(above))
        return bool(above)

    def _lasts(self, path: bytes) -> bool:
        """Whether it is shown even if there is no such node."""
        if path == self._view.root:
            return True
        parent, name = parent_path(path), path.rpartition(b"/")[2]
        return name in self._view.lasting_children(parent)

    def _wanted(self, path: bytes, look: Look) -> int:
        if path == self._view.root or self._view.is_directory(path, look):
            return stat.S_IFDIR
        return stat.S_IFREG

    def within_reach(self, paths: Sequence[bytes]) -> list[bytes]:
        """Those of them that can be shown.  For the others nobody need be asked: what is to be looked
        at instead may be one node for very many."""
        shown: dict[bytes, bool] = {}
        return [
            path
            for path in paths
            if not self._look_at_missing(path) and self._can_be_shown(path, shown)
        ]

    def make_ready(self, path: bytes) -> None:
        """While the store is asked for a node: find out whether it can be shown, and get ready for a
        file that has changed."""
        self._ready = None
        if self.within_reach((path,)):
            place = self.place(path)
            until = time.perf_counter() + READY_SECONDS
            self._ready = _Ready(path, place, self._files.kind(place), until)
            self._files.expect(place)

    def is_ready(self, path: bytes) -> bool:
        """Whether it was found that the node can be shown."""
        return self._ready is not None and self._ready.path == path

    def is_one_file(self, path: bytes, sight: Sight) -> bool:
        """Whether only one file, for which all was made ready, has to be changed, or removed.  (A node
        that may not be read is no file.)"""
        if self._ready is None or (self._ready.path, self._ready.kind) != (path, stat.S_IFREG):
            return False
        return sight.look is None or self._wanted(path, sight.look) == stat.S_IFREG

    def shows_file(self, path: bytes) -> bool:
        return self._files.kind(self.place(path)) == stat.S_IFREG

    def _can_be_shown(self, path: bytes, shown: dict[bytes, bool] | None = None) -> bool:
        """Whether its parent is shown as a directory.

        Where it isn't, the highest ancestor of which that is so is to be looked at instead: the way
        down from there leads to the node.

        shown       what this call, and others right before it, found of directories
        """
        if shown is None:
            shown = {}
        top = path
        while top != self._view.root:
            parent = parent_path(top)
            if parent not in shown:
                is_root = parent == self._view.root
                shown[parent] = is_root or self._files.is_directory(self.place(parent))
            if shown[parent]:
                break
            top = parent
        if top != path:
            self.again[top] = None
        return top == path

    def _look_at_parent(self, path: bytes) -> None:
        """A node went: without children its parent may be a file now."""
        parent = parent_path(path)
        if self._view.root in (path, parent):
            return
        if not self._has_children(self._files.names(self.place(parent))):
            self.again[parent] = None

    def _remove(self, place: bytes, kind: int) -> Steps:
        if kind != stat.S_IFDIR:
            self._files.remove_file(place)
            self.nodes -= 1
            yield place
            return
        for removed in self._files.removing(place):
            self.nodes -= not removed.endswith(VALUE_NAME)
            yield removed

    def _show_directory(
        self, path: bytes, place: bytes, look: Look, sight: Sight, *, renew: bool
    ) -> Steps:
        value_place = self._in(place, VALUE_NAME)
        if self._view.has_dot_value(path, look):
            self._show_file(value_place, look, sight, renew=renew)
        elif self._files.kind(value_place):
            self._files.remove_file(value_place)
        self._files.set_perms(place, self._perms(sight))
        # An event need not lead further down on the eve of a look at everything.
        further = self._children if renew and self.all_again else self._look_at_children
        kept = {VALUE_NAME, *map(file_name, further(path, sight))}
        for name in self._files.names(place):
            if name not in kept:
                child = self._in(place, name)
                yield from self._remove(child, self._files.kind(child))

    def _show_file(self, place: bytes, look: Look, sight: Sight, *, renew: bool) -> None:
        content = self._view.content.render(look.value)
        perms = self._perms(sight)
        if (
            renew
            or self._files.content(place) != content
            or (perms and self._files.perms(place) != perms)
        ):
            self._files.put(place, content, perms)

    def _perms(self, sight: Sight) -> bytes:
        if self._files.has_perms and isinstance(sight.perms, bytes) and sight.perms:
            return perms_text(sight.perms)
        return b""
