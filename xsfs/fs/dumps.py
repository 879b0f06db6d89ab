"""A whole subtree in one file: `.ls`, `.json` and `.dump` of each directory.

The text is made at the open(2), by one walk (view/subtree.py), and stays with the handle until its close.  A
`.dump` that is written to restores the nodes that its lines name.

A `SubtreeHandle` owns its text, whose memory counts in `table.text_bytes` from the walk to the close.

A `DumpHandle` owns the start of a line whose end has not been written yet.  One transaction restores
RESTORE_WINDOW lines, so no other client sees a node between its creation and its permissions.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

import trio
from pyfuse3 import EntryAttributes, FUSEError

from xsfs.fs.nodes import Caller, Handle, refuse
from xsfs.fs.quotas import Share
from xsfs.fs.waiting_readers import CENSUS, Outcome, look
from xsfs.fs.xattrs import FileOfDirectory, permissions_of
from xsfs.view.names import join
from xsfs.view.subtree import (
    DumpFormat,
    JsonFormat,
    LsFormat,
    SubtreeText,
    TextFormat,
    Walk,
    is_complete,
    parse_line,
)
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import set_perms
from xsfs.xenstore.protocol import Request

log = logging.getLogger(__name__)

TEXT_MAX: Final = 256 << 20
"""The longest text in bytes.  Past it the open(2) fails with EFBIG."""

TEXTS_MAX: Final = 2 * TEXT_MAX
"""The memory of all open texts in bytes."""

RESTORE_WINDOW: Final = 64
"""How many lines of a dump one transaction restores."""

LINE_MAX: Final = 64 << 10
"""The longest line of a dump in bytes.  JSON may need six bytes for one of the value."""

LOOK_SECONDS: Final = 0.25
"""How often xsfs looks whether the thread that opens has been signalled."""


class SubtreeFile(FileOfDirectory):
    """A file whose content is made of a directory's node and all below it."""

    text_format: ClassVar[type[TextFormat]]
    writable: ClassVar[bool] = False

    def require(self) -> None:
        super().require()
        self.parent.require()

    async def getattr(self) -> EntryAttributes:
        await self.parent.require_present()
        # The size is not known before the text is made, and nobody may pay for that at a stat(2).
        return self.entry(0, write=self.writable)

    async def open(self, flags: int, caller: Caller) -> Handle:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            refuse(errno.EACCES)
        handle = SubtreeHandle(self, caller)
        await handle.make()
        return handle

    async def make_text(self, before_window: Callable[[int], None]) -> SubtreeText | None:
        """The text as it is now; None if the directory's node does not exist."""
        return await Walk(self.text_format(self.view, self.path), before_window).run()


class LsFile(SubtreeFile):
    """`.ls`: what xenstore-ls -f -p prints."""

    text_format = LsFormat


class JsonFile(SubtreeFile):
    """`.json`: one object."""

    text_format = JsonFormat


class DumpFile(SubtreeFile):
    """`.dump`: a line a node.  Writing restores."""

    text_format = DumpFormat
    writable = True

    async def truncate(self, size: int) -> None:
        """A shell truncates before it writes."""

    async def open(self, flags: int, caller: Caller) -> Handle:
        handle = DumpHandle(self, caller)
        if flags & os.O_ACCMODE == os.O_WRONLY:
            await self.parent.require_present()
        else:
            await handle.make()
        return handle


class SubtreeHandle(Handle):
    """The text as it was at the open(2)."""

    node: SubtreeFile

    def __init__(self, node: SubtreeFile, caller: Caller) -> None:
        super().__init__(node)
        self._caller = caller
        self._text = bytearray()
        self._error: XenstoreError | None = None
        self._share = Share(node.table.text_bytes, caller)
        self._next_look = trio.current_time() + LOOK_SECONDS

    async def make(self) -> None:
        """Make the text.

        Fails with EFBIG if it gets too long, ENFILE if all open texts are, EINTR if a signal ends the wait.
        """
        node = self.node
        node.require()
        await node.parent.open_files.wait_closed_below(node.path)
        try:
            # The next request of a reader beside a walk is served soon: a read takes 0.3 ms in the median,
            # and 1.8 ms if each of its requests has to wait for a turn of the walk.
            with node.table.kernel.not_under_way():
                path = node.path
                while (made := await node.make_text(self._check)) is None:
                    if not await node.parent.was_renamed(path):
                        break
                    path = node.path
            if made is not None:
                self._text, self._error = made
            elif not node.parent.always_there:
                refuse(errno.ESTALE)
            self._check(len(self._text))
        except BaseException:
            await self.release()
            raise

    def _check(self, size: int) -> None:
        if size > TEXT_MAX:
            refuse(errno.EFBIG)
        self._share.resize(size)
        now = trio.current_time()
        if now >= self._next_look:
            # The kernel waits for the answer even if the process was killed.
            if CENSUS.possible and look(self._caller.pid) is Outcome.INTERRUPTED:
                refuse(errno.EINTR)
            self._next_look = now + LOOK_SECONDS

    async def read(self, offset: int, size: int) -> bytes:
        if self._error is not None and offset >= len(self._text):
            raise self._error  # as xenstore-ls, which prints the text before it, and fails
        return bytes(memoryview(self._text)[offset : offset + size])

    async def release(self) -> None:
        self._text = bytearray()
        self._share.resize(0)


class DumpHandle(SubtreeHandle):
    """A `.dump`.  Lines have no positions: what is written is one stream, wherever each write(2) seeks."""

    def __init__(self, node: SubtreeFile, caller: Caller) -> None:
        super().__init__(node, caller)
        self._partial = b""
        self._lock = trio.Lock()

    async def truncate(self, size: int) -> None:
        """A shell truncates before it writes."""

    async def write(self, offset: int, data: bytes) -> int:
        async with self._lock:
            *lines, last = (self._partial + data).split(b"\n")
            self._partial = b""
            if last.endswith(b"}") and is_complete(last):
                # The last line of a file may lack its newline, and a later close could not report errors.
                lines.append(last)
                last = b""
            await self._restore([line for line in lines if line.strip()])
            if len(last) > LINE_MAX:
                refuse(errno.EINVAL)
            self._partial = last
        return len(data)

    async def _restore(self, lines: Sequence[bytes]) -> None:
        node = self.node

        def path() -> bytes:
            node.require()
            return node.path

        try:
            async with node.parent.open_files.changing_below(path):
                for start in range(0, len(lines), RESTORE_WINDOW):
                    await self._restore_window(lines[start : start + RESTORE_WINDOW])
        finally:
            node.table.handover.clear()

    async def _restore_window(self, lines: Sequence[bytes]) -> None:
        """Restore these lines; or those before the first wrong or refused one, and raise its error."""
        changes: list[Sequence[Request]] = []
        try:
            for line in lines:
                changes.append(await self._requests_of(line))
        except FUSEError:
            await self._carry_out(changes)
            raise
        await self._carry_out(changes)

    async def _carry_out(self, changes: Sequence[Sequence[Request]]) -> None:
        """Carry out some lines; or those before the first refused one, and raise its error."""
        if not changes:
            return

        async def work(commands: Commands) -> None:
            await commands.call_all([request for each in changes for request in each])

        try:
            await self.node.view.atomically(work)
        except XenstoreError as error:
            # Nothing has happened yet.
            for number, requests in enumerate(changes):
                if any(each is error.request for each in requests):
                    await self._carry_out(changes[:number])
            raise

    async def _requests_of(self, line: bytes) -> Sequence[Request]:
        try:
            name, value, perms = parse_line(line)
        except ValueError:
            refuse(errno.EINVAL)
        commands = self.node.view.commands
        path = self.node.path if name == b"." else join(self.node.path, name)
        if len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        requests = []
        if value and len(value) > protocol.value_max(path, commands.payload_max):
            refuse(errno.EFBIG)
        if path != b"/" or value:
            requests.append(protocol.mkdir(path) if value is None else protocol.write(path, value))
        if perms is not None:
            request = set_perms(path, await permissions_of(self.node.view, perms))
            if len(request.payload) > commands.payload_max:
                refuse(errno.E2BIG)
            requests.append(request)
        return requests

    async def release(self) -> None:
        if self._partial:
            log.warning("left out of a dump for %r: a line that does not end", self.node.path)
        await super().release()
