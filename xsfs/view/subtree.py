"""A subtree as one text: a walk over all its nodes, in windows of pipelined requests.

`Walk` asks for READ, DIRECTORY and GET_PERMS of up to WINDOW nodes in one pipeline.  A `TextFormat` turns
each node into text.  A walk takes at most as many round trips as the subtree has levels, and one more for
each WINDOW nodes, because each window has the next nodes in the order of the text, of whatever level.

What a `Walk` owns: the text, whose start is complete; the segments that follow it, which are being filled;
and the runs, which are siblings that it has not asked about yet.  Only the task that calls `run` touches it.

What always holds:

- The runs are in the order of the text, the next one last.  Each run adds to a segment of its own.
- A segment is `closed` if no run adds to it any more.  The text grows by whole segments from the first one.
- Between two windows other tasks run.  A node that vanishes meanwhile is left out.
- Beyond the text, a walk holds the names of the nodes that it has not asked about, and one window.
"""

from __future__ import annotations

import base64
import binascii
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar, Final, NamedTuple

import trio

from xsfs.view.names import VALUE_NAME, is_shown, join, shown_names
from xsfs.view.view import NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Names
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import perms_text
from xsfs.xenstore.protocol import Request

WINDOW: Final = 96
"""How many nodes one pipeline asks about: some 300 requests, behind which others wait for a millisecond."""

TURN_NODES: Final = 32
"""After so many nodes, which take less than a millisecond, other tasks get a turn."""

SHORT_LISTING: Final = 8192
"""Names of longer listings, in bytes, are checked as the walk comes to them, as nothing may take long."""

_ABSENT: Final = frozenset(("ENOENT", "EINVAL"))
"""EINVAL: the path is longer than the store accepts, so there can be no such node."""


class SubtreeNode(NamedTuple):
    """What the store replied about one node.

    path            absolute
    perms           the reply to GET_PERMS; empty if the format does not need it
    """

    path: bytes
    name: bytes
    value: bytes
    perms: bytes
    has_children: bool


class TextFormat(ABC):
    """How a subtree becomes a text.

    top     the path of the subtree's first node
    """

    asks_perms: ClassVar[bool] = True

    def __init__(self, view: View, top: bytes) -> None:
        self.view = view
        self.top = top

    @abstractmethod
    def begin(self, node: SubtreeNode, is_first: bool) -> bytes:
        """The text of a node before that of its children.

        is_first    whether no text of a sibling, or of the parent's value, comes before it
        """

    def end(self, node: SubtreeNode) -> bytes:
        """The text of a node after that of its children."""
        return b""

    def fills(self, node: SubtreeNode) -> bool:
        """Whether the first child follows something in its parent."""
        return False

    def unreadable(self, path: bytes) -> bytes | None:
        """The text of a node that may not be read, after which the walk ends.  None: it is left out."""
        return None

    def shows(self, parent: bytes, name: bytes) -> bool:
        return is_shown(parent, name)


# ------------------------------------------------------------------------------------------- ls

_PLAIN: Final = bytes(byte for byte in range(0x20, 0x7F) if byte != ord("\\"))
_ESCAPES: Final = {0x09: b"\\t", 0x0A: b"\\n", 0x0D: b"\\r", 0x5C: b"\\\\"}


def _escape(byte: int) -> bytes:
    if byte in _PLAIN:
        return bytes((byte,))
    return _ESCAPES.get(byte) or (b"\\%03o" if byte < 8 else b"\\x%02x") % byte


_ESCAPED: Final = tuple(map(_escape, range(256)))


@lru_cache(1024)
def _ls_perms(perms: bytes) -> bytes:
    """Permissions as xenstore-ls prints them: libxenstore keeps each domid in 32 bits."""
    entries = []
    for entry in protocol.strings(perms):
        try:
            number = int(entry[1:])
        except ValueError:
            entries.append(entry)
            continue
        # strtol(3), and then an int.
        number = max(-(1 << 63), min(number, (1 << 63) - 1)) & 0xFFFFFFFF
        entries.append(b"%c%d" % (entry[0], number - (number >> 31 << 32)))
    return b",".join(entries)


class LsFormat(TextFormat):
    """What `xenstore-ls -f -p PATH` prints.

    That ends at the first node that may not be read, with a line for it, and the walk does so, too.
    """

    def begin(self, node: SubtreeNode, is_first: bool) -> bytes:
        if node.path == self.top:
            return b""
        value = node.value
        if value.translate(None, _PLAIN):
            value = b"".join([_ESCAPED[byte] for byte in value])
        return b'%s = "%s"   (%s)\n' % (node.path, value, _ls_perms(node.perms))

    def unreadable(self, path: bytes) -> bytes | None:
        return b"" if path == self.top else b"%s:\n\n" % path

    def shows(self, parent: bytes, name: bytes) -> bool:
        # oxenstored lists the special nodes in the root, and xenstore-ls prints them.
        return is_shown(parent, name) or (protocol.is_name(name) and name.startswith(b"@"))


# ------------------------------------------------------------------------------- json and dump

_encode: Final = json.JSONEncoder(ensure_ascii=False).encode


def _as_base64(value: bytes) -> bytes:
    return b'"%s"' % base64.b64encode(value)


def _json_value(value: bytes) -> bytes:
    try:
        return _encode(value.decode()).encode()
    except UnicodeDecodeError:
        return b'{"base64": %s}' % _as_base64(value)


class JsonFormat(TextFormat):
    """One object: a leaf is its value, a directory an object, with its own value under `.value`."""

    asks_perms = False

    def _is_directory(self, node: SubtreeNode) -> bool:
        if node.path == self.top or node.has_children:
            return True
        state = NodeState(node.value, False, True, True)
        return self.view.is_directory(node.path, state)

    def begin(self, node: SubtreeNode, is_first: bool) -> bytes:
        before = b"" if is_first else b", "
        if node.path != self.top:
            before += b'"%s": ' % node.name
        if not self._is_directory(node):
            return before + _json_value(node.value)
        if node.value:
            return before + b'{"%s": %s' % (VALUE_NAME, _json_value(node.value))
        return before + b"{"

    def end(self, node: SubtreeNode) -> bytes:
        if node.path == self.top:
            return b"}\n"
        return b"}" if self._is_directory(node) else b""

    def fills(self, node: SubtreeNode) -> bool:
        return bool(node.value)


@lru_cache(1024)
def _dump_perms(perms: bytes) -> bytes:
    return _encode(perms_text(perms).decode("latin-1")).encode()


class DumpFormat(TextFormat):
    """A JSON object a line for each node, parents first (see `parse_line`)."""

    def __init__(self, view: View, top: bytes) -> None:
        super().__init__(view, top)
        self._above = len(join(top, b""))

    def begin(self, node: SubtreeNode, is_first: bool) -> bytes:
        path = b"." if node.path == self.top else node.path[self._above :]
        try:
            value = b'"value": ' + _encode(node.value.decode()).encode()
        except UnicodeDecodeError:
            value = b'"base64": ' + _as_base64(node.value)
        return b'{"path": "%s", %s, "perms": %s}\n' % (path, value, _dump_perms(node.perms))


class DumpLine(NamedTuple):
    """One node of a dump.

    path    relative to the directory of the dump; `.` is that directory
    value   None if the line does not set it
    perms   as `n0,r7`; None if the line does not set them
    """

    path: bytes
    value: bytes | None
    perms: str | None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def parse_line(line: bytes) -> DumpLine:
    """A line of a dump.  ValueError for one that is wrong."""
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(fields, dict) or not all(isinstance(each, str) for each in fields.values()):
        raise ValueError("not an object of strings")
    if not {"path"} <= fields.keys() <= {"path", "value", "base64", "perms"}:
        raise ValueError("a key is missing or unknown")
    if "value" in fields and "base64" in fields:
        raise ValueError("two values")
    path = fields["path"].encode()
    if path != b"." and not all(map(protocol.is_name, path.split(b"/"))):
        raise ValueError("not a path below the directory")
    value = None
    if "value" in fields:
        value = fields["value"].encode()
    elif "base64" in fields:
        try:
            value = base64.b64decode(fields["base64"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"not base64: {error}") from error
    return DumpLine(path, value, fields.get("perms"))


def is_complete(text: bytes) -> bool:
    """Whether the text is a whole line, right or wrong, rather than the start of one."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# ----------------------------------------------------------------------------------------- walk


class _Segment:
    """A part of the text that is being filled, and the one that follows it."""

    __slots__ = ("closed", "next", "text")

    def __init__(self, following: _Segment | None) -> None:
        self.text = bytearray()
        self.closed = False
        self.next = following


class _Run:
    """Siblings that the walk has not asked about yet.

    prefix      the parent's path and a slash
    names       of all siblings
    start       how many of them it has asked about
    is_first    whether no text comes before them in their parent
    is_checked  whether all the names can be shown
    """

    __slots__ = ("is_checked", "is_first", "names", "parent", "prefix", "segment", "start")

    def __init__(
        self,
        parent: bytes,
        prefix: bytes,
        names: Sequence[bytes],
        segment: _Segment,
        is_first: bool,
        is_checked: bool,
    ) -> None:
        self.parent = parent
        self.prefix = prefix
        self.names = names
        self.segment = segment
        self.is_first = is_first
        self.is_checked = is_checked
        self.start = 0

    def take(self, most: int) -> Sequence[bytes]:
        taken = self.names[self.start : self.start + most]
        self.start += len(taken)
        return taken


class SubtreeText(NamedTuple):
    """The text of a subtree.

    error   what ended it early, after the text that comes before
    """

    text: bytearray
    error: XenstoreError | None


class Walk:
    """See the module's docstring.

    before_window   called before each pipeline with the size of the text so far in bytes; it may raise
    """

    def __init__(self, text_format: TextFormat, before_window: Callable[[int], None]) -> None:
        self._format = text_format
        self._view = text_format.view
        self._before_window = before_window
        self._text = bytearray()
        self._first: _Segment | None = _Segment(None)
        self._runs: list[_Run] = []
        self._size = 0
        """Of the text and all segments."""
        self._error: XenstoreError | None = None
        self._exists = False
        self._step = 3 if text_format.asks_perms else 2

    async def run(self) -> SubtreeText | None:
        """The text; None if the first node does not exist.

        Raises XenstoreError for an error reply that speaks of more than one node, and if the first node may
        not be read.
        """
        assert self._first is not None
        top = self._format.top
        self._runs.append(_Run(b"", b"", (top,), self._first, True, True))
        while self._runs:
            self._before_window(self._size)
            await self._next_window()
            self._flush()
        if self._error is not None and not self._text:
            raise self._error
        if not self._exists:
            return None
        return SubtreeText(self._text, self._error)

    async def _next_window(self) -> None:
        window: list[tuple[_Run, Sequence[bytes]]] = []
        count = 0
        requests: list[Request] = []
        while self._runs and count < WINDOW:
            run = self._runs[-1]
            names = run.take(WINDOW - count)
            if run.start >= len(run.names):
                self._runs.pop()
            if not run.is_checked:
                names = [name for name in names if self._format.shows(run.parent, name)]
            count += len(names)
            window.append((run, names))
            for name in names:
                path = run.prefix + name
                requests += (protocol.read(path), protocol.directory(path))
                if self._step == 3:
                    requests.append(protocol.get_perms(path))
        replies = await self._view.commands.pipeline(requests)
        position, step, text_format = 0, self._step, self._format
        found: list[_Run] = []
        earlier_error = self._error
        for run, names in window:
            for name in names:
                if position % (TURN_NODES * step) == 0:
                    await trio.lowlevel.checkpoint()
                path = run.prefix + name
                value, children = replies[position], replies[position + 1]
                perms = replies[position + 2] if step == 3 else b""
                position += step
                if children == b"" and type(value) is bytes and type(perms) is bytes:
                    # A leaf, as most nodes are.
                    node = SubtreeNode(path, name, value, perms, False)
                    text = text_format.begin(node, run.is_first) + text_format.end(node)
                    run.segment.text += text
                    run.is_first = False
                    self._size += len(text)
                    self._exists = True
                    continue
                child = await self._add(run, name, path, value, children, perms)
                if child is not None:
                    found.append(child)
                if self._error is not earlier_error:
                    # The text ends here, but what comes before is not complete yet.
                    self._runs = found[::-1]
                    run.segment.closed = True
                    run.segment.next = None
                    return
            if run.start >= len(run.names):
                run.segment.closed = True
        self._runs += found[::-1]

    async def _add(
        self, run: _Run, name: bytes, path: bytes, value: Reply, children: Reply, perms: Reply
    ) -> _Run | None:
        """Add a node to its run's segment.  Returns the run of its children, if it has any."""
        names: Names = []
        is_short = False
        listing_error = None
        if isinstance(children, XenstoreError) and children.name == "E2BIG":
            try:
                names = await self._view.commands.list(path)
            except XenstoreError as error:
                if error.name in ("ENOENT", "EACCES"):
                    children = error
                else:
                    listing_error = error
        elif isinstance(children, bytes):
            is_short = len(children) <= SHORT_LISTING and path != b"/"
            names = shown_names(path, children) if is_short else protocol.decode_names(children)
        for reply in (value, children, perms):
            if isinstance(reply, XenstoreError) and reply.name != "E2BIG":
                if reply.name in _ABSENT:
                    return None
                if reply.name != "EACCES":
                    raise reply
                self._add_unreadable(run, path, reply)
                return None
        assert isinstance(value, bytes)
        assert isinstance(perms, bytes)
        self._exists = True
        node = SubtreeNode(path, name, value, perms, bool(names))
        self._put(run.segment, self._format.begin(node, run.is_first))
        run.is_first = False
        if listing_error is not None:
            if self._format.unreadable(path) is None:
                raise listing_error
            self._error = listing_error
            return None
        child = None
        if names:
            run.segment.closed = True
            after = _Segment(run.segment.next)
            inner = run.segment.next = _Segment(after)
            run.segment = after
            child = _Run(
                path, join(path, b""), names, inner, not self._format.fills(node), is_short
            )
        self._put(run.segment, self._format.end(node))
        return child

    def _add_unreadable(self, run: _Run, path: bytes, error: XenstoreError) -> None:
        text = self._format.unreadable(path)
        if text is None:
            if path == self._format.top:
                self._error = error
            return
        self._put(run.segment, text)
        self._error = error

    def _put(self, segment: _Segment, text: bytes) -> None:
        segment.text += text
        self._size += len(text)

    def _flush(self) -> None:
        """Move what is complete to the text."""
        segment = self._first
        while segment is not None:
            self._text += segment.text
            segment.text.clear()
            if not segment.closed:
                break
            segment = segment.next
        self._first = segment
