"""A subtree as one text: a walk over all its nodes, in windows of pipelined requests.

`Walk` asks for READ, DIRECTORY and GET_PERMS of up to WINDOW nodes in one pipeline: of the next nodes in the
order of the text, of whatever level.  So a walk takes at most as many round trips as the subtree has levels,
and one more for each WINDOW nodes.  A `TextFormat` turns each node into text.

Between two windows other tasks run.  A node that vanishes meanwhile is left out.  Beyond the text, a walk
holds the names of the nodes that it has not asked about, and the windows in flight.
"""

from __future__ import annotations

import base64
import json
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle, repeat
from time import perf_counter
from typing import ClassVar, Final, NamedTuple

import trio

from xsfs.view.names import VALUE_NAME, join, shown_names
from xsfs.view.view import ABSENT, NodeState, View, requests_for
from xsfs.xenstore import protocol
from xsfs.xenstore.background import BackgroundCall, open_background
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import perms_text

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

    Its methods get a node's absolute path, and the replies to READ and GET_PERMS.
    """

    asks_perms: ClassVar[bool] = True
    """Whether GET_PERMS is sent.  If not, `perms` is empty."""

    separator: ClassVar[bytes] = b""
    """The text between two siblings, and between the value of a node and its first child."""

    def __init__(self, view: View, top: bytes) -> None:
        self.view = view
        self.top = top

    @abstractmethod
    def begin(self, path: bytes, value: bytes, perms: bytes, has_children: bool) -> bytes:
        """The text of a node, which its children follow."""

    def end(self, path: bytes) -> bytes:
        """The text of a node with children after theirs."""
        return b""

    def unreadable(self, path: bytes) -> bytes | None:
        """The text of a node that may not be read, after which the walk ends.  None: it is left out."""
        return None

    def shown(self, parent: bytes, listing: bytes) -> Sequence[bytes]:
        """Those of the children's names that are shown."""
        return shown_names(parent, listing)


# ------------------------------------------------------------------------------------------- ls

_SPECIAL = re.compile(rb"[^ -\[\]-~]")
_ESCAPES: Final = {b"\t": b"\\t", b"\n": b"\\n", b"\r": b"\\r", b"\\": b"\\\\"}


def _escape(byte: re.Match[bytes]) -> bytes:
    code = byte[0][0]
    return _ESCAPES.get(byte[0]) or (b"\\%03o" if code < 8 else b"\\x%02x") % code


def _as_int(number: re.Match[bytes]) -> bytes:
    # strtol(3), and then an int.
    low = max(-(1 << 63), min(int(number[0]), (1 << 63) - 1)) & 0xFFFFFFFF
    return b"%d" % (low - (low >> 31 << 32))


@lru_cache(1024)
def _ls_perms(perms: bytes) -> bytes:
    """Permissions as xenstore-ls prints them: libxenstore keeps each domid in 32 bits."""
    return re.sub(rb"[-+]?[0-9]+", _as_int, perms_text(perms))


class LsFormat(TextFormat):
    """The output of `xenstore-ls -f -p PATH`, which ends with a line for the first unreadable node."""

    def begin(self, path: bytes, value: bytes, perms: bytes, has_children: bool) -> bytes:
        if path == self.top:
            return b""
        return b'%s = "%s"   (%s)\n' % (path, _SPECIAL.sub(_escape, value), _ls_perms(perms))

    def unreadable(self, path: bytes) -> bytes | None:
        return b"%s:\n\n" % path

    def shown(self, parent: bytes, listing: bytes) -> Sequence[bytes]:
        if parent != b"/":
            return super().shown(parent, listing)
        # oxenstored lists the special nodes in the root, and xenstore-ls prints them.
        return [name for name in protocol.decode_names(listing) if protocol.is_name(name)]


# ------------------------------------------------------------------------------- json and dump

_encode: Final = json.JSONEncoder(ensure_ascii=False).encode


def _json_of(value: bytes) -> tuple[bytes, bytes]:
    """The value in JSON, after its key: `value`, or `base64` if it is not UTF-8."""
    try:
        return b"value", _encode(value.decode()).encode()
    except UnicodeDecodeError:
        return b"base64", b'"%s"' % base64.b64encode(value)


def _json_value(value: bytes) -> bytes:
    key, text = _json_of(value)
    return text if key == b"value" else b'{"base64": %s}' % text


class JsonFormat(TextFormat):
    """One object: a leaf is its value, a directory an object, with its own value under `.value`."""

    asks_perms = False
    separator = b", "

    def begin(self, path: bytes, value: bytes, perms: bytes, has_children: bool) -> bytes:
        is_top = path == self.top
        key = b"" if is_top else b'"%s": ' % path[path.rindex(b"/") + 1 :]
        if is_top or self.view.is_directory(path, NodeState(value, has_children, True, True)):
            own = b'"%s": %s' % (VALUE_NAME, _json_value(value)) if value else b""
            return b"%s{%s%s" % (key, own, b"" if has_children else self.end(path))
        return key + _json_value(value)

    def end(self, path: bytes) -> bytes:
        return b"}\n" if path == self.top else b"}"


@lru_cache(1024)
def _dump_perms(perms: bytes) -> bytes:
    return _encode(perms_text(perms).decode("latin-1")).encode()


class DumpFormat(TextFormat):
    """A JSON object a line for each node, parents first (see `parse_line`)."""

    def begin(self, path: bytes, value: bytes, perms: bytes, has_children: bool) -> bytes:
        path = b"." if path == self.top else path.removeprefix(join(self.top, b""))
        key, text = _json_of(value)
        return b'{"path": "%s", "%s": %s, "perms": %s}\n' % (path, key, text, _dump_perms(perms))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def parse_line(line: bytes) -> tuple[bytes, bytes | None, str | None]:
    """A line of a dump: the path relative to the directory of the dump, which is `.` itself; the value; and
    the permissions as `n0,r7`.  None is for what the line does not set.  ValueError for a wrong line."""
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(fields, dict) or not all(isinstance(each, str) for each in fields.values()):
        raise ValueError("not an object of strings")
    if "value" in fields and "base64" in fields:
        raise ValueError("two values")
    if not {"path"} <= fields.keys() <= {"path", "value", "base64", "perms"}:
        raise ValueError("a key is missing or unknown")
    path = fields["path"].encode()
    if path != b"." and not all(map(protocol.is_name, path.split(b"/"))):
        raise ValueError("not a path below the directory")
    value = None
    if "value" in fields:
        value = fields["value"].encode()
    elif "base64" in fields:
        value = base64.b64decode(fields["base64"], validate=True)
    return path, value, fields.get("perms")


def is_complete(text: bytes) -> bool:
    """Whether the text is a whole line, right or wrong, rather than the start of one."""
    with suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


# ----------------------------------------------------------------------------------------- walk


@dataclass(slots=True)
class _Run:
    """Siblings.

    prefix      the parent's path and a slash; empty for the first node of the walk
    separator   comes before the text of the next node
    end         comes after the text of the last node
    asked       how many of the names the walk has asked about
    written     how many nodes are in the text of the walk, or left out
    answers     those that come next: the text of each, and its children or the error that ends all
    """

    prefix: bytes
    names: Sequence[bytes]
    separator: bytes
    end: bytes
    asked: int = 0
    written: int = 0
    answers: deque[tuple[bytes, _Run | XenstoreError | None]] = field(default_factory=deque)


Window = list[tuple[_Run, bytes]]
"""Nodes that one pipeline asks about: of each its run and its path."""


class SubtreeText(NamedTuple):
    """The text of a subtree.

    error   what ended it early, after the text that comes before
    """

    text: bytearray
    error: XenstoreError | None


class Walk:
    """See the module's docstring.  Only the task that calls `run` touches it.

    before_window   called before each pipeline with the size of the text so far in bytes; it may raise
    """

    def __init__(self, text_format: TextFormat, before_window: Callable[[int], None]) -> None:
        self._format = text_format
        self._view = text_format.view
        self._before_window = before_window
        top = _Run(b"", (text_format.top,), b"", b"")
        self._runs = [top]
        """Those with names to ask about, in the order of the text from the last one on."""
        self._unwritten = [top]
        """Those that the end of the text is in, the outermost first."""
        self._text = bytearray()
        self._size = 0

    async def run(self) -> SubtreeText | None:
        """The text; None if the first node does not exist.

        Raises XenstoreError if the first node may not be read, or a reply is an unexpected error.
        """
        self._view.store.walks += 1
        try:
            return await self._walk()
        except XenstoreError as error:
            if error.name not in ABSENT:
                raise
            return None
        finally:
            self._view.store.walks -= 1

    async def _walk(self) -> SubtreeText:
        error = None
        perms = self._format.asks_perms
        pipelines = self._view.commands.pipelines()
        turns = cycle(pipelines)
        async with open_background() as nursery:
            asked: deque[tuple[Window, BackgroundCall[list[Reply]]]] = deque()
            while self._unwritten:
                # The store replies to the next windows while this task works on one.
                while self._runs and len(asked) < self._windows_max(len(pipelines)):
                    self._before_window(self._size)
                    window = self._next_window()
                    requests = [it for _, path in window for it in requests_for(path, perms=perms)]
                    call = BackgroundCall(nursery, partial(next(turns), requests))
                    asked.append((window, call))
                window, call = asked.popleft()
                await self._add_window(window, await call.result())
                error = self._write()
        return SubtreeText(self._text, error)

    def _windows_max(self, connections: int) -> int:
        store = self._view.store
        return max(WINDOWS_MIN, connections, FAR_WINDOWS // store.walks if store.is_far else 0)

    def _next_window(self) -> Window:
        window: Window = []
        while self._runs and len(window) < WINDOW:
            run = self._runs[-1]
            end = run.asked + WINDOW - len(window)
            window += [(run, run.prefix + name) for name in run.names[run.asked : end]]
            run.asked = end
            if end >= len(run.names):
                self._runs.pop()
        return window

    async def _add_window(self, window: Window, replies: Iterable[Reply]) -> None:
        end = len(self._runs)
        each = iter(replies)
        perms_of_each = each if self._format.asks_perms else repeat(b"")
        turn_end = perf_counter() + TURN_SECONDS
        answers = zip(window, each, each, perms_of_each, strict=False)
        for (run, path), value, listing, perms in answers:
            if perf_counter() > turn_end:
                await trio.lowlevel.checkpoint()
                turn_end = perf_counter() + TURN_SECONDS
            if isinstance(listing, XenstoreError) and listing.name == "E2BIG":
                listing = await self._long_listing(path)
            if type(value) is bytes and type(listing) is bytes and type(perms) is bytes:
                text = self._format.begin(path, value, perms, bool(listing))
                children = None
                if listing:
                    names = self._format.shown(path, listing)
                    separator = self._format.separator if value else b""
                    children = _Run(join(path, b""), names, separator, self._format.end(path))
                    self._runs.insert(end, children)
                self._put(run, text, children)
            else:
                errors = (it for it in (value, perms, listing) if not isinstance(it, bytes))
                self._fail(run, path, next(errors))

    async def _long_listing(self, path: bytes) -> Reply:
        try:
            return protocol.encode_names(await self._view.commands.list(path))
        except XenstoreError as error:
            return error

    def _fail(self, run: _Run, path: bytes, error: XenstoreError) -> None:
        """A node cannot be shown."""
        if path == self._format.top or error.name not in (*ABSENT, "EACCES"):
            raise error
        text = self._format.unreadable(path)
        if error.name == "EACCES" and text is not None:
            self._put(run, text, error)
        else:
            run.answers.append((b"", None))

    def _put(self, run: _Run, text: bytes, then: _Run | XenstoreError | None) -> None:
        text = run.separator + text
        run.separator = self._format.separator
        run.answers.append((text, then))
        self._size += len(text)

    def _write(self) -> XenstoreError | None:
        """Move the answers that come next to the text.  Returns the error that ends it, if any."""
        while self._unwritten:
            run = self._unwritten[-1]
            if run.answers:
                text, then = run.answers.popleft()
                run.written += 1
                self._text += text
                if isinstance(then, XenstoreError):
                    self._unwritten.clear()
                    return then
                if then is not None:
                    self._unwritten.append(then)
            elif run.written == len(run.names):
                self._text += run.end
                self._unwritten.pop()
            else:
                break
        return None
