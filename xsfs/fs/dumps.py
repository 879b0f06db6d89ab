"""A whole subtree in one file: `.ls`, `.json` and `.dump` of each directory.

The text is made at the open(2), by one walk (view/subtree.py), and stays with the handle until its close.  A
`.dump` that is written to restores.

What a `SubtreeHandle` owns: its text, whose memory counts in `table.text_bytes` from the walk to the close.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar, Final

import trio
from pyfuse3 import EntryAttributes

from xsfs.fs.errnos import errno_of
from xsfs.fs.nodes import Caller, Handle, Node, refuse
from xsfs.fs.readers import CENSUS, Outcome, look
from xsfs.fs.xattrs import XenstoreNode
from xsfs.view.names import join
from xsfs.view.subtree import JsonFormat, LsFormat, SubtreeText, TextFormat, Walk
from xsfs.xenstore.errors import XenstoreError

TEXT_MAX: Final = 256 << 20
"""The longest text in bytes.  Past it the open(2) fails with EFBIG."""

TEXTS_MAX: Final = 2 * TEXT_MAX
"""The memory of all open texts in bytes.  Users who are neither root nor the one who mounted share half."""

LOOK_SECONDS: Final = 0.25
"""How often xsfs looks whether the thread that opens has been signalled."""


class SubtreeFile(Node):
    """A file whose content is made of a directory's node and all below it."""

    __slots__ = ()

    text_format: ClassVar[type[TextFormat]]
    writable: ClassVar[bool] = False

    @property
    def directory(self) -> XenstoreNode:
        assert isinstance(self.parent, XenstoreNode)
        return self.parent

    @property
    def path(self) -> bytes:
        return self.directory.path

    @property
    def label(self) -> bytes:
        return join(super().label, self.name)

    def require(self) -> None:
        super().require()
        self.directory.require()

    async def getattr(self) -> EntryAttributes:
        self.require()
        if not self.directory.always_there and await self.view.fetch_one(self.path) is None:
            refuse(errno.ESTALE)
        # The size is not known before the text is made, and nobody may pay for that at a stat(2).
        return self.entry(0, write=self.writable)

    async def open(self, flags: int, caller: Caller) -> Handle:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            refuse(errno.EACCES)
        handle = SubtreeHandle(self, caller)
        await handle.make()
        return handle


class LsFile(SubtreeFile):
    """`.ls`: what xenstore-ls -f -p prints."""

    __slots__ = ()

    text_format = LsFormat


class JsonFile(SubtreeFile):
    """`.json`: one object."""

    __slots__ = ()

    text_format = JsonFormat


class SubtreeHandle(Handle):
    """The text as it was at the open(2)."""

    __slots__ = ("_bytes", "_caller", "_error", "_next_look", "_text")

    node: SubtreeFile

    def __init__(self, node: SubtreeFile, caller: Caller) -> None:
        super().__init__(node)
        self._caller = caller
        self._text: bytearray | None = None
        self._error: XenstoreError | None = None
        self._bytes = 0
        """How much of `table.text_bytes` is this handle's."""
        self._next_look = 0.0

    async def make(self) -> None:
        """Make the text.

        Fails with EFBIG if it gets too long, ENFILE if all open texts are, EINTR if a signal ends the wait.
        """
        node = self.node
        node.require()
        self._next_look = trio.current_time() + LOOK_SECONDS
        await node.directory.open_files.wait_closed_below(node.path)
        try:
            made = await Walk(node.text_format(node.view, node.path), self._check).run()
            if made is None:
                if not node.directory.always_there:
                    refuse(errno.ESTALE)
                made = SubtreeText(bytearray(), None)
            self._check(len(made.text))
        except BaseException:
            self._account(0)
            raise
        self._text, self._error = made

    def _check(self, size: int) -> None:
        if size > TEXT_MAX:
            refuse(errno.EFBIG)
        self._account(size)
        now = trio.current_time()
        if now >= self._next_look:
            # The kernel waits for the answer even if the process was killed.
            if CENSUS.possible and look(self._caller.pid) is Outcome.INTERRUPTED:
                refuse(errno.EINTR)
            self._next_look = now + LOOK_SECONDS

    def _account(self, size: int) -> None:
        """Fails with ENFILE if the open texts would take too much memory."""
        table, more = self.node.table, size - self._bytes
        is_full = table.text_bytes + more > TEXTS_MAX
        if self._caller.unprivileged:
            half = TEXTS_MAX // 2
            is_full = is_full or table.unprivileged_text_bytes + more > half
        if is_full and more > 0:
            refuse(errno.ENFILE)
        table.text_bytes += more
        if self._caller.unprivileged:
            table.unprivileged_text_bytes += more
        self._bytes = size

    async def read(self, offset: int, size: int) -> bytes:
        assert self._text is not None
        if self._error is not None and offset >= len(self._text):
            # As xenstore-ls, which prints the text before it, and fails.
            refuse(errno_of(self._error))
        return bytes(memoryview(self._text)[offset : offset + size])

    async def release(self) -> None:
        self._text = None
        self._account(0)
