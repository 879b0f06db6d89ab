"""Values as files: reads of a value, and the WRITE that `echo 42 > FILE` becomes.

An open(2) for reading fetches the value, and each later read at offset 0 fetches it again.  A fetched value
serves for FRESH_SECONDS; after that only reads that follow each other use it, so that they see one value,
never pieces of two.  A handle that may also write fetches at each read: another program may have written
under a lock.  A write sends the value immediately.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable

from pyfuse3 import EntryAttributes, FUSEError

from xsfs.fs.memory_content import MemoryContent
from xsfs.fs.nodes import Caller, Handle, refuse
from xsfs.fs.open_files import FRESH_SECONDS, OpenFile, is_missing
from xsfs.fs.xattrs import FileOfDirectory, XenstoreNode
from xsfs.view.names import join, parent_path
from xsfs.view.view import EMPTY_NODE, NodeState
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import StoreError, XenstoreError
from xsfs.xenstore.protocol import Request

log = logging.getLogger(__name__)

Change = Callable[[bytes], bytes]
"""Turns the present content of a file into the one that is to be written."""


class ValueFile(XenstoreNode):
    """A Xenstore node as a file."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        if self.detached is not None:
            return self.detached.path
        assert self.parent is not None
        return join(self.parent.path, self.name)

    def require(self) -> None:
        """Fail with ESTALE if it is not in the store."""
        is_lost = self.gone and (self.detached is None or self.detached.memory is not None)
        if is_lost or self.view.ended:
            refuse(errno.ESTALE)

    def attributes(self, state: NodeState) -> EntryAttributes:
        if state.value is None:
            entry = self.entry(0, state.readable, state.writable)
            entry.attr_timeout = 0  # the kernel asks before a program sees the size
            return entry
        size = len(self.view.value_format.render(state.value))
        return self.entry(size, state.readable, state.writable, self.seen(hash(state.value)))

    def is_of_kind(self, state: NodeState) -> bool:
        return not self.open_files.is_directory(self.path, state)

    async def state(self) -> NodeState:
        """The state that the mount shows now.  Fails with ESTALE if the node is no file any more."""
        self.require()
        return self._checked(await self.open_files.fetch_one(self.path))

    def _checked(self, state: NodeState | None) -> NodeState:
        """The fetched state of a file.  Fails with ESTALE for any other."""
        if state is None or not self.is_of_kind(state):
            refuse(errno.ESTALE)
        self.require()
        return state

    async def getattr(self) -> EntryAttributes:
        state = await self._state_in_store()
        return self.attributes_in_memory() if state is None else self.attributes(state)

    async def _state_in_store(self) -> NodeState | None:
        """As `state`; None if the content is in memory, perhaps since a moment ago."""
        if self.in_memory is None:
            try:
                return await self.state()
            except FUSEError:
                pass
        # A removal or renames through the mount may have been under way, so the first result may be wrong.
        async with self.open_files.changing(self.path):
            if self.in_memory is not None:
                return None
            self.require()
            path = self.path
            return self._checked(self.open_files.as_seen(path, await self.view.fetch_one(path)))

    def attributes_in_memory(self) -> EntryAttributes:
        if (found := self.in_memory) is None:
            refuse(errno.ESTALE)
        file, memory = found
        entry = self.entry(len(memory.data), mtime_ns=memory.mtime_ns)
        if memory.mode is not None:
            entry.st_mode = stat.S_IFREG | memory.mode
        entry.st_atime_ns = memory.atime_ns
        entry.st_ctime_ns = memory.ctime_ns
        entry.st_nlink = int(self.open_files.get(file.path) is file)
        return entry

    def set_mode(self, wanted: int, present: int) -> None:
        if (found := self.in_memory) is None or wanted & (stat.S_ISUID | stat.S_ISGID):
            self.require_mode(wanted, present)
        else:
            found[1].set_mode(wanted & 0o777 & ~self.table.ownership.umask)

    def set_times(self, atime_ns: int | None, mtime_ns: int | None) -> None:
        if (found := self.in_memory) is not None:
            found[1].set_times(atime_ns, mtime_ns)

    async def truncate(self, size: int) -> None:
        handle = ValueHandle(self, self._open_file(), os.O_WRONLY)
        try:
            await handle.truncate(size)
        finally:
            await handle.release()

    def _open_file(self) -> OpenFile:
        """The open file, with one more handle."""
        file = self.detached
        if file is None or file.memory is None:
            self.require()
            return self.open_files.open(self.path, self)
        file.add(self)
        return file

    async def open(self, flags: int, caller: Caller) -> Handle:
        reads = flags & os.O_ACCMODE != os.O_WRONLY
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        truncates = bool(flags & os.O_TRUNC)
        value, fetched_at = None, 0.0
        is_readable = True
        # First of all, so that a removal meanwhile finds it, even by another name.
        file = self._open_file()
        try:
            if (found := self.table.handover.take(caller.pid, self.inode)) is not None:
                value, fetched_at = found[0].value, found[1]
            elif (state := await self._state_in_store()) is not None:
                value, fetched_at = state.value, time.monotonic()
                is_readable = state.readable
            if reads and not is_readable:
                refuse(errno.EACCES)
        except BaseException:
            self.open_files.close(file)
            raise
        if not (writes or truncates):
            if value is None or file.memory is not None:
                return ReadHandle(self, file)
            return ReadHandle(self, file, self.view.value_format.render(value), fetched_at)
        writer = ValueHandle(self, file, flags)
        if truncates:
            writer.empty(value, is_readable=is_readable)
        return writer


class DotValue(FileOfDirectory, ValueFile):
    """`.value` of a directory: the value of the directory's own node."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        return self.parent.path if self.detached is None else self.detached.path

    def is_of_kind(self, state: NodeState) -> bool:
        return True

    def require(self) -> None:
        super().require()
        if self.detached is None:
            self.parent.require()

    def _checked(self, state: NodeState | None) -> NodeState:
        if state is None and self.detached is None and self.parent.always_there:
            state = EMPTY_NODE
        return super()._checked(state)

    async def looked_up(self, pid: int) -> EntryAttributes:
        changes = self.table.handover.changes
        state = await self.state()
        if not self.parent.has_dot_value(state):
            refuse(errno.ENOENT)
        if state.readable and state.value is not None:
            self.table.handover.put(pid, self.inode, state, changes)
        return self.attributes(state)

    def was_written(self) -> None:
        super().was_written()
        if self.detached is None:
            self.parent.value_was_written()


class ScratchFile(ValueFile):
    """A file at a position whose name Xenstore cannot hold.  Its content is in memory, or in the node to
    which it was renamed."""

    __slots__ = ()

    @property
    def in_memory(self) -> tuple[OpenFile, MemoryContent] | None:
        file = self.detached or self.open_files.get(self.path)
        return None if file is None or file.memory is None else (file, file.memory)

    def require(self) -> None:
        super().require()
        if self.detached is None and self.in_memory is None:
            refuse(errno.ESTALE)


class ReadHandle(Handle):
    """A value file as an open(2) that only reads has it.

    file        the record of all handles of the path
    """

    __slots__ = ("_content", "_fetched_at", "_position", "file")

    node: ValueFile

    def __init__(
        self, node: ValueFile, file: OpenFile, content: bytes | None = None, fetched_at: float = 0
    ) -> None:
        self.node = node
        self.file = file
        self._content = content
        self._fetched_at = fetched_at
        self._position = -1
        """The end of the last read of the content; -1 before the first one."""

    async def read(self, offset: int, size: int) -> bytes:
        memory = self.file.memory
        content = self._content
        if memory is None and (content is None or self._is_outdated(offset, content)):
            content = await self._fetch()
            memory = self.file.memory
        if memory is not None:
            content = memory.data
        assert content is not None
        data = content[offset : offset + size]
        self._position = offset + len(data)
        return data

    def _is_outdated(self, offset: int, content: bytes) -> bool:
        if offset == 0 and self._position >= 0:
            return True  # a second read from the start is a new reading, as with sysfs
        follows = 0 < offset == self._position < len(content)
        return not follows and time.monotonic() - self._fetched_at > FRESH_SECONDS

    async def _fetch(self) -> bytes:
        node, file = self.node, self.file
        while True:
            node.require()
            path = file.path
            (reply,) = await node.view.commands.pipeline((protocol.read(path),))
            debt = file.debt
            if is_missing(reply) and (debt is None or debt.found is not None):
                # A removal or renames through the mount may have been under way.
                async with file.changing():
                    path = file.path
                    (reply,) = await node.view.commands.pipeline((protocol.read(path),))
            if file.memory is not None:
                return b""
            if file.path == path:
                break
        if isinstance(reply, XenstoreError):
            if not is_missing(reply):
                raise reply
            if debt is None or debt.found is not None:
                refuse(errno.ESTALE)
            reply = b""
        elif debt is not None and debt.replaces(reply):
            reply = b""
        content = node.view.value_format.render(reply)
        self._content = content
        self._fetched_at = time.monotonic()
        return content

    async def fsync(self) -> None:
        """Carry out a truncation or creation that no write has carried out."""
        await self.node.open_files.settle_file(self.file)

    async def release(self) -> None:
        self.node.open_files.close(self.file)


class ValueHandle(ReadHandle):
    """A value file as an open(2) that writes, or truncates, has it."""

    __slots__ = ("_appends", "_written")

    def __init__(self, node: ValueFile, file: OpenFile, flags: int) -> None:
        super().__init__(node, file)
        self._appends = bool(flags & os.O_APPEND)
        self._written: bytes | None = None
        """The content of this handle's last write, which the store has as parse(written)."""

    def empty(self, found: bytes | None, *, is_readable: bool = True) -> None:
        """O_TRUNC: the file, whose value is `found`, is to be empty."""
        if self.file.memory is not None:
            self.file.memory.write(b"")
        else:
            self.file.owe(self, found, is_blind=not is_readable)

    def _is_outdated(self, offset: int, content: bytes) -> bool:
        return True  # other handles may have written under a lock

    # -------------------------------------------------------------------------------- writing

    @property
    def _limit(self) -> int:
        if (memory := self.file.memory) is not None:
            return memory.size_max
        return protocol.value_max(self.file.path, self.node.view.commands.payload_max)

    async def write(self, offset: int, data: bytes) -> int:
        if not data:
            return 0
        if offset and not self._appends and offset > self._limit:
            if self.file.debt is not None:
                self.file.debt.is_refused = True
            refuse(errno.EFBIG)

        def overwrite(present: bytes) -> bytes:
            at = len(present) if self._appends else offset
            return present[:at].ljust(at, b"\0") + data + present[at + len(data) :]

        await self._change(overwrite, needs_present=self._appends)
        return len(data)

    async def truncate(self, size: int) -> None:
        if size > self._limit + 1:
            refuse(errno.EFBIG)
        await self._change(lambda present: present[:size].ljust(size, b"\0"), as_file=True)

    async def _change(
        self, change: Change, *, needs_present: bool = False, as_file: bool = False
    ) -> None:
        """Write the content that `change` makes of the present one, which a debt makes empty.

        needs_present   whether `change` needs the content that another client may have written meanwhile
        as_file         fail if the node has become a directory: the answer will be a file's attributes
        """
        node, file = self.node, self.file
        async with file.changing():
            if (memory := file.memory) is not None:
                result = change(memory.data)
                await node.open_files.set_data(file, memory, result)
                self._written = result
                return
            node.require()
            debt = file.debt
            try:
                if debt is not None and not needs_present:
                    # One request, as for `echo 42 > FILE`.
                    if not debt.is_recent:
                        await self._read(node.view.commands, as_file=as_file)
                    result = change(b"")
                    request = protocol.write(file.path, self._value_of(result))
                    await node.view.commands.call(request)
                else:
                    result = await self._splice(change, as_file=as_file)
            except (FUSEError, XenstoreError):
                if debt is not None:
                    debt.is_refused = True
                raise
            if file.debt is debt:
                file.debt = None
        self._content = None
        self._written = result
        node.was_written()

    def _value_of(self, content: bytes) -> bytes:
        """The value of a content that is to be written.  Fails with EFBIG if it does not fit."""
        value = self.node.view.value_format.parse(content)
        if len(value) > self._limit:
            refuse(errno.EFBIG)
        return value

    async def _splice(self, change: Change, *, as_file: bool) -> bytes:
        """Change the present content in a transaction.  Returns the new content."""
        result = b""

        async def work(commands: Commands) -> Request:
            nonlocal result
            result = change(self._present(await self._read(commands, as_file=as_file)))
            return protocol.write(self.file.path, self._value_of(result))

        await self.node.view.atomically(work)
        return result

    async def _read(self, commands: Commands, *, as_file: bool) -> Reply:
        """The reply to READ.  Fails with ESTALE if a write may not create the missing node, or if the node
        has become a directory and must not be one (`as_file`)."""
        node, path, debt = self.node, self.file.path, self.file.debt
        if as_file:
            (state,) = await node.view.fetch((path,), commands)
            if state is not None and not node.is_of_kind(state):
                refuse(errno.ESTALE)
        (reply,) = await commands.pipeline((protocol.read(path),))
        if is_missing(reply) and not node.always_there:
            parent = parent_path(path)
            if debt is None or debt.found is not None:
                refuse(errno.ESTALE)
            if not (node.view.is_always_there(parent) or await commands.exists(parent)):
                refuse(errno.ESTALE)
        return reply

    def _present(self, reply: Reply) -> bytes:
        """The present content of the file, by the reply to READ."""
        debt = self.file.debt
        if isinstance(reply, XenstoreError):
            if not is_missing(reply):
                raise reply
            return b""
        if debt is not None and debt.replaces(reply):
            return b""
        # In text mode a program may write a content without the newline that reading would show, or an
        # empty line, whose value is that of an empty file.  For this handle its own content counts.
        value_format = self.node.view.value_format
        if self._written is not None and value_format.parse(self._written) == reply:
            return self._written
        return value_format.render(reply)

    async def release(self) -> None:
        file, debt = self.file, self.file.debt
        try:
            if debt is not None and debt.holders == {self} and not self.node.view.ended:
                debt.is_closing = True
                await self.node.open_files.settle_file(file)
        except StoreError as error:
            # close(2) has long returned.
            log.warning("an emptied file could not be written at its close: %s", error)
        finally:
            if debt is not None:
                debt.holders.discard(self)
                if not debt.holders and file.debt is debt:
                    file.debt = None
            self.node.open_files.close(file)
