"""A subtree as one text: a walk over all its nodes, in windows of pipelined requests.

`Walk` asks for READ, DIRECTORY and GET_PERMS of up to WINDOW nodes in one pipeline.  A `TextFormat` turns
each node into text.  A walk takes at most as many round trips as the subtree has levels, and one more for
each WINDOW nodes, because each window has the next nodes in the order of the text, of whatever level.

A `Walk` owns the text, whose start is complete; the segments that follow it, which are being filled;
and the runs, which are siblings that it has not asked about yet.  Only the task that calls `run` touches it.

Invariants:

- The runs are in the order of the text; `runs[-1]` comes next.  Each run adds to a segment of its own.
- A segment is `closed` if no run adds to it any more.  The text grows by whole segments from the first one.
- Between two windows other tasks run.  A node that vanishes meanwhile is left out.
- Beyond the text, a walk holds the names of the nodes that it has not asked about, and one window.
"""

from __future__ import annotations

import base64
import binascii
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle, repeat
from time import perf_counter
from typing import ClassVar, Final, NamedTuple

import trio

from xsfs.view.names import VALUE_NAME, join, shown_names
from xsfs.view.view import ABSENT, NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.background import BackgroundCall, open_background
from xsfs.xenstore.commands import Names, Pipeline
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import perms_text
from xsfs.xenstore.protocol import Op, Request

WINDOW: Final = 16
"""How many nodes one pipeline asks about."""

WINDOWS_MIN: Final = 2
"""How many windows are in flight on a single connection: the store replies to one while xsfs works on the
other.  If there are more connections, each has one window in flight."""

FAR_WINDOWS: Final = 640
"""How many windows of all walks are in flight to a store that is far: 10,000 nodes in a round trip."""

TURN_SECONDS: Final = 0.0005
"""After so long other tasks get a turn."""


class TextFormat(ABC):
    """How a subtree becomes a text.

    top     the path of the subtree's first node

    Its methods get a node's absolute path, its name, and the replies to READ and GET_PERMS; `perms` is empty
    if the format does not ask for it.  If `is_first`, no text of a sibling or of the parent's value comes
    before the node's.
    """

    asks_perms: ClassVar[bool] = True

    def __init__(self, view: View, top: bytes) -> None:
        self.view = view
        self.top = top

    @abstractmethod
    def leaf(self, path: bytes, name: bytes, value: bytes, perms: bytes, is_first: bool) -> bytes:
        """The text of a node without children."""

    def begin(self, path: bytes, name: bytes, value: bytes, perms: bytes, is_first: bool) -> bytes:
        """The text of a node with children before theirs."""
        return self.leaf(path, name, value, perms, is_first)

    def end(self, path: bytes) -> bytes:
        """The text of a node with children after theirs."""
        return b""

    def unreadable(self, path: bytes) -> bytes | None:
        """The text of a node that may not be read, after which the walk ends.  None: it is left out."""
        return None

    def shown(self, parent: bytes, names: Sequence[bytes]) -> Sequence[bytes]:
        """Those of the children's names that are shown."""
        return shown_names(parent, b"%s\0" % b"\0".join(names))


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

    def leaf(self, path: bytes, name: bytes, value: bytes, perms: bytes, is_first: bool) -> bytes:
        if path == self.top:
            return b""
        if value.translate(None, _PLAIN):
            value = b"".join([_ESCAPED[byte] for byte in value])
        return b'%s = "%s"   (%s)\n' % (path, value, _ls_perms(perms))

    def unreadable(self, path: bytes) -> bytes | None:
        return b"" if path == self.top else b"%s:\n\n" % path

    def shown(self, parent: bytes, names: Sequence[bytes]) -> Sequence[bytes]:
        if parent != b"/":
            return super().shown(parent, names)
        # oxenstored lists the special nodes in the root, and xenstore-ls prints them.
        return [name for name in names if protocol.is_name(name)]


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

    def leaf(self, path: bytes, name: bytes, value: bytes, perms: bytes, is_first: bool) -> bytes:
        state = NodeState(value, False, True, True)
        if path == self.top or self.view.is_directory(path, state):
            return self.begin(path, name, value, perms, is_first) + self.end(path)
        return b'%s"%s": %s' % (b"" if is_first else b", ", name, _json_value(value))

    def begin(self, path: bytes, name: bytes, value: bytes, perms: bytes, is_first: bool) -> bytes:
        key = b"" if path == self.top else b'"%s": ' % name
        own = b'"%s": %s' % (VALUE_NAME, _json_value(value)) if value else b""
        return b"%s%s{%s" % (b"" if is_first else b", ", key, own)

    def end(self, path: bytes) -> bytes:
        return b"}\n" if path == self.top else b"}"


@lru_cache(1024)
def _dump_perms(perms: bytes) -> bytes:
    return _encode(perms_text(perms).decode("latin-1")).encode()


class DumpFormat(TextFormat):
    """A JSON object a line for each node, parents first (see `parse_line`)."""

    def __init__(self, view: View, top: bytes) -> None:
        super().__init__(view, top)
        self._above = len(join(top, b""))

    def leaf(self, path: bytes, name: bytes, value: bytes, perms: bytes, is_first: bool) -> bytes:
        path = b"." if path == self.top else path[self._above :]
        try:
            shown = b'"value": ' + _encode(value.decode()).encode()
        except UnicodeDecodeError:
            shown = b'"base64": ' + _as_base64(value)
        return b'{"path": "%s", %s, "perms": %s}\n' % (path, shown, _dump_perms(perms))


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


@dataclass(slots=True)
class _Segment:
    """A part of the text, and the one that follows it."""

    following: _Segment | None
    text: bytearray = field(default_factory=bytearray)
    closed: bool = False
    is_dropped: bool = False
    """Whether the text ends before it, or within it, so that nothing is added any more."""


@dataclass(slots=True)
class _Run:
    """Siblings that the walk has not asked about yet.

    prefix      the parent's path and a slash; empty for the first node of the walk
    names       of all siblings, those that are not shown among them
    segment     the part of the text to which they add
    is_first    whether no text comes before theirs in their parent
    start       how many of them the walk has asked about
    """

    prefix: bytes
    names: Sequence[bytes]
    segment: _Segment
    is_first: bool
    start: int = 0


Answer = tuple[Reply, Reply, Reply]
"""The replies to READ, DIRECTORY and GET_PERMS of one node."""


@dataclass(slots=True)
class _Window:
    """Nodes that one pipeline asks about: of each its run, its name and its path.

    finished    the runs of which it has the last nodes
    """

    nodes: list[tuple[_Run, bytes, bytes]] = field(default_factory=list)
    finished: list[_Run] = field(default_factory=list)


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

    async def run(self) -> SubtreeText | None:
        """The text; None if the first node does not exist.

        Raises XenstoreError for an error reply that speaks of more than one node, and if the first node may
        not be read.
        """
        self._view.store.walks += 1
        try:
            return await self._walk()
        finally:
            self._view.store.walks -= 1

    async def _walk(self) -> SubtreeText | None:
        assert self._first is not None
        top = _Run(b"", (self._format.top,), self._first, True)
        self._runs.append(top)
        pipelines = self._view.commands.pipelines()
        turns = cycle(pipelines)
        async with open_background() as nursery:
            asked: deque[tuple[_Window, BackgroundCall[Iterator[Answer]]]] = deque()
            while self._runs or asked:
                # The store replies to the next windows while this task works on one.
                while self._runs and len(asked) < self._windows_max(len(pipelines)):
                    self._before_window(self._size)
                    window = self._next_window()
                    ask = partial(self._ask, window, next(turns))
                    asked.append((window, BackgroundCall(nursery, ask)))
                window, answers = asked.popleft()
                await self._add_window(window, await answers.result())
                self._flush()
        if self._error is not None:
            if not self._text:
                raise self._error
        elif top.is_first:
            return None
        return SubtreeText(self._text, self._error)

    def _windows_max(self, connections: int) -> int:
        store = self._view.store
        return max(WINDOWS_MIN, connections, FAR_WINDOWS // store.walks if store.is_far else 0)

    def _next_window(self) -> _Window:
        window = _Window()
        room = WINDOW
        while self._runs and room:
            run = self._runs[-1]
            names = run.names[run.start : run.start + room]
            room -= len(names)
            run.start += len(names)
            if run.start == len(run.names):
                window.finished.append(self._runs.pop())
            prefix = run.prefix
            if prefix:
                names = self._format.shown(prefix[:-1] or b"/", names)
            window.nodes += [(run, name, prefix + name) for name in names]
        return window

    async def _ask(self, window: _Window, pipeline: Pipeline) -> Iterator[Answer]:
        asks_perms = self._format.asks_perms
        requests: list[Request] = []
        for _, _, path in window.nodes:
            payload = path + b"\0"
            requests.append(Request(Op.READ, payload))
            requests.append(Request(Op.DIRECTORY, payload))
            if asks_perms:
                requests.append(Request(Op.GET_PERMS, payload))
        replies = iter(await pipeline(requests))
        return zip(replies, replies, replies if asks_perms else repeat(b""), strict=False)

    async def _add_window(self, window: _Window, answers: Iterator[Answer]) -> None:
        leaf = self._format.leaf
        found: list[_Run] = []
        turn_end = perf_counter() + TURN_SECONDS
        for (run, name, path), (value, listing, perms) in zip(window.nodes, answers, strict=True):
            if perf_counter() > turn_end:
                await trio.lowlevel.checkpoint()
                turn_end = perf_counter() + TURN_SECONDS
            if run.segment.is_dropped:
                continue
            if listing == b"" and type(value) is bytes and type(perms) is bytes:
                # A leaf, as most nodes are.
                self._put(run, leaf(path, name, value, perms, run.is_first))
                continue
            child = await self._add(run, name, path, value, listing, perms)
            if child is not None:
                found.append(child)
        for run in window.finished:
            run.segment.closed = True
        self._runs += reversed(found)
        if self._error is not None:
            self._runs = [run for run in self._runs if not run.segment.is_dropped]

    async def _add(
        self, run: _Run, name: bytes, path: bytes, value: Reply, listing: Reply, perms: Reply
    ) -> _Run | None:
        """Add a node that need not be a leaf, nor readable.  Returns the run of its children, if any."""
        names: Names = []
        if isinstance(listing, bytes):
            names = protocol.decode_names(listing)
        elif listing.name == "E2BIG":
            try:
                names, listing = await self._view.commands.list(path), b""
            except XenstoreError as error:
                listing = error
        if isinstance(value, bytes) and isinstance(perms, bytes) and isinstance(listing, bytes):
            if not names:
                self._put(run, self._format.leaf(path, name, value, perms, run.is_first))
                return None
            self._put(run, self._format.begin(path, name, value, perms, run.is_first))
            end = self._format.end(path)
            self._size += len(end)
            run.segment.closed = True
            after = _Segment(run.segment.following, bytearray(end))
            inner = run.segment.following = _Segment(after)
            run.segment = after
            return _Run(join(path, b""), names, inner, not value)
        failure = next(each for each in (value, perms, listing) if isinstance(each, XenstoreError))
        if failure.name in ABSENT:
            return None
        text = self._format.unreadable(path)
        if failure.name != "EACCES":
            if text is None or not isinstance(value, bytes) or not isinstance(perms, bytes):
                raise failure
            text = self._format.leaf(path, name, value, perms, run.is_first)
        if text is not None:
            self._put(run, text)
        if text is not None or path == self._format.top:
            self._end_text(run.segment, failure)
        return None

    def _end_text(self, segment: _Segment, error: XenstoreError) -> None:
        """End the text here.  What comes before need not be complete yet."""
        self._error = error
        segment.closed = True
        following, segment.following = segment.following, None
        segment.is_dropped = True
        while following is not None:
            following.is_dropped = True
            following = following.following

    def _put(self, run: _Run, text: bytes) -> None:
        run.segment.text += text
        run.is_first = False
        self._size += len(text)

    def _flush(self) -> None:
        """Move what is complete to the text."""
        segment = self._first
        while segment is not None:
            self._text += segment.text
            segment.text.clear()
            if not segment.closed:
                break
            segment = segment.following
        self._first = segment
