"""Files that are a node's value.

A value file's handle holds what reading gave at open, and what the kernel has asked to truncate or
create but no write has carried out yet: `echo 42 > FILE` must be exactly one WRITE, and the shell
closes a duplicate of its descriptor before it writes, so that only the first write, or the last
close, can tell.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from pyfuse3 import EntryAttributes

from xsfs.fs import posix
from xsfs.fs.inodes import Caller, Handle, Node, Tree, refuse
from xsfs.fs.xattrs import XenstoreNode
from xsfs.view.looks import NOTHING, Look
from xsfs.view.names import join
from xsfs.view.view import View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Session
from xsfs.xenstore.errors import StoreError
from xsfs.xenstore.eventual import Eventual
from xsfs.xenstore.protocol import Request

log = logging.getLogger(__name__)


class ValueFile(XenstoreNode):
    """A Xenstore node as a file."""

    __slots__ = ("claims", "creating", "truncating")

    def __init__(self, tree: Tree, view: View, parent: Node | None, name: bytes) -> None:
        super().__init__(tree, view, parent, name)
        self.creating = 0
        """How many handles are to create the node, which is not there before they do."""
        self.truncating = 0
        """How many have emptied the file, which no write or close has carried out yet."""
        self.claims = 0
        """How many handles have made the node as a file: it stays one for them, while it has no
        children, whatever an empty node of this path is by custom."""

    def attributes(self, look: Look) -> EntryAttributes:
        size = len(self.view.content.render(look.value))
        entry = self.entry(size, look.readable, look.writable)
        if not look.whole:
            entry.attr_timeout = 0
        return entry

    def is_of_kind(self, look: Look) -> bool:
        if self.claims and not look.has_children:
            return True
        return not self.view.is_directory(self.path, look)

    async def getattr(self) -> EntryAttributes:
        look = await self.view.look(self.path)
        if look is None and self.creating and not self.gone:
            return self.entry(0)
        if look is None or self.gone or not self.is_of_kind(look):
            refuse(errno.ESTALE)
        if self.truncating:
            look = look._replace(value=b"")
        return self.attributes(look)

    async def require_file(self, session: Session) -> None:
        """ESTALE if the node has become a directory."""
        (look,) = await self.view.look_through(session, (self.path,))
        if look is not None and not self.is_of_kind(look):
            refuse(errno.ESTALE)

    async def make(self) -> None:
        """Carry a creation out now, for whoever needs the node itself.

        MKDIR leaves what exists alone.
        """
        await self.view.session.mkdir(self.path)
        self.was_written()

    async def getxattr(self, name: bytes) -> bytes:
        if self.creating:
            await self.make()
        return await super().getxattr(name)

    async def setxattr(self, name: bytes, value: bytes) -> None:
        if self.creating:
            await self.make()
        await super().setxattr(name, value)

    async def truncate(self, size: int) -> None:
        await ValueHandle(self, os.O_WRONLY).truncate(size)

    async def open(self, flags: int, caller: Caller) -> Handle:
        self.require()
        if not flags & (os.O_ACCMODE | os.O_TRUNC):
            return ReadHandle(self, await self._content(caller))
        handle = ValueHandle(self, flags)
        if flags & os.O_ACCMODE != os.O_WRONLY:
            handle.fetched = await self._content(caller)
        if flags & os.O_TRUNC:
            handle.empty()
        return handle

    async def _content(self, caller: Caller) -> bytes:
        """What reading gives to the one who opens the file."""
        ready = self.tree.prefetched.take(caller.pid, self.inode)
        if isinstance(ready, ReadHandle) and ready.fetched is not None:
            return ready.fetched
        look = await self.view.look(self.path)
        if look is None or not self.is_of_kind(look):
            refuse(errno.ESTALE)
        if look.hidden:
            refuse(errno.EACCES)
        return self.view.content.render(look.value)


class DotValue(ValueFile):
    """`.value` of a directory: the value of the directory's own node."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        assert self.parent is not None
        return self.parent.path

    @property
    def label(self) -> bytes:
        return join(super().label, self.name)

    def is_of_kind(self, look: Look) -> bool:
        return True

    async def getattr(self) -> EntryAttributes:
        assert self.parent is not None
        self.parent.require()
        return self.attributes(await self.directory_look())

    async def looked_up(self, pid: int) -> EntryAttributes:
        look = await self.directory_look()
        assert isinstance(self.parent, XenstoreNode)
        if not self.parent.has_dot_value(look):
            refuse(errno.ENOENT)
        if not look.hidden:
            handle = ReadHandle(self, self.view.content.render(look.value))
            self.tree.prefetched.put(pid, self.inode, handle)
        return self.attributes(look)

    def was_written(self) -> None:
        super().was_written()
        assert isinstance(self.parent, XenstoreNode)
        self.parent.value_was_written()

    async def directory_look(self) -> Look:
        look = await self.view.look(self.path)
        if look is not None:
            return look
        assert isinstance(self.parent, XenstoreNode)
        if not self.parent.lasting:
            refuse(errno.ESTALE)
        return NOTHING


class ReadHandle(Handle):
    """A value file as one open(2) that only reads has it.

    fetched     what reading gives, None if the next read must ask
    was_read    whether a read was answered from `fetched`
    """

    __slots__ = ("fetched", "was_read")

    node: ValueFile

    def __init__(self, node: ValueFile, fetched: bytes | None) -> None:
        super().__init__(node)
        self.fetched = fetched
        self.was_read = False

    def read(self, offset: int, size: int) -> Eventual[bytes]:
        # From the start again is a new reading, as with sysfs.
        if self.fetched is None or (offset == 0 and self.was_read):
            return self._read_anew(offset, size)
        self.was_read = True
        return self.fetched[offset : offset + size]

    async def _read_anew(self, offset: int, size: int) -> bytes:
        self.fetched = fetched = await self._fetch()
        self.was_read = True
        return fetched[offset : offset + size]

    async def _fetch(self) -> bytes:
        self.node.require()
        value = await self.node.view.session.call(protocol.read(self.node.path))
        return self.node.view.content.render(value)


class ExpectedFile:
    """A child that is looked up, made as the file that it probably is while the store is asked.

    After the store's answer there is less to do then, and that counts more than once: whoever waits for
    longer than some five microseconds has let his processor go, and to get it back takes ten more.
    """

    __slots__ = ("_directory", "_entry", "_file", "_handle", "name", "path")

    def __init__(self, directory: Node, name: bytes, path: bytes) -> None:
        self._directory = directory
        self.name = name
        self.path = path
        """As it was asked for: a rename may change it meanwhile."""

    def make(self) -> None:
        self._file = self._directory.tree.node(ValueFile, self._directory, self.name)
        self._entry = self._file.entry(0)
        self._handle = ReadHandle(self._file, None)

    def found(self, look: Look, pid: int) -> EntryAttributes:
        """It is one, and looks so: the answer to the LOOKUP, of thread `pid`."""
        tree = self._directory.tree
        if not tree.stands(self._file, self._directory, self.name):
            self.make()
        file = self._file
        entry = self._entry if look.writable else file.entry(0, look.readable, look.writable)
        self._handle.fetched = content = file.view.content.render(look.value)
        entry.st_size = len(content)
        tree.prefetched.put(pid, file.inode, self._handle)
        tree.remember(file)
        return entry


class ValueHandle(ReadHandle):
    """A value file as one open(2) that writes has it.

    written     the content of this handle's last write, which the store has as parse(written)
    truncated   whether O_TRUNC is to be carried out
    creates     whether the node is to be made
    claims      whether it was made by this handle, as a file
    """

    __slots__ = ("appends", "claims", "creates", "truncated", "written")

    def __init__(self, node: ValueFile, flags: int) -> None:
        super().__init__(node, None)
        self.appends = bool(flags & os.O_APPEND)
        self.written: bytes | None = None
        self.truncated = False
        self.creates = False
        self.claims = False

    async def _fetch(self) -> bytes:
        if self.truncated or self.creates:
            return b""
        return await super()._fetch()

    def empty(self) -> None:
        """The file is to be empty: what O_TRUNC asks for."""
        if not self.truncated:
            self.truncated = True
            self.node.truncating += 1
        self.fetched = None

    def create(self) -> None:
        """The node is to be made, by the first write or the close."""
        self.creates = True
        self.node.creating += 1

    def claim(self) -> None:
        """The node was made as a file, just now."""
        self.claims = True
        self.node.claims += 1

    # -------------------------------------------------------------------------------- writing

    async def write(self, offset: int, data: bytes) -> int:
        if not data:
            return 0
        self.node.require()
        limit = protocol.value_max(self.node.path, self.node.view.session.payload_max)
        if not self.appends and offset > limit:
            self._settle()
            refuse(errno.EFBIG)

        def overwrite(present: bytes) -> bytes:
            at = len(present) if self.appends else offset
            return present[:at].ljust(at, b"\0") + data + present[at + len(data) :]

        await self._change(overwrite, limit)
        return len(data)

    async def truncate(self, size: int) -> None:
        self.node.require()
        limit = protocol.value_max(self.node.path, self.node.view.session.payload_max)
        if size > limit + 1:
            refuse(errno.EFBIG)
        if self.truncated:
            await self._change(lambda _: bytes(size), limit)
            return
        await self._change(
            lambda present: present[:size].ljust(size, b"\0"), limit, as_file=True, blind=not size
        )

    async def _change(
        self,
        change: Callable[[bytes], bytes],
        limit: int,
        *,
        as_file: bool = False,
        blind: bool = False,
    ) -> None:
        """Write what `change` makes of the present content, which is empty after a truncation.

        as_file     only while the node is no directory: the answer will be a file's attributes
        blind       the present content makes no difference: it need not be readable
        Whatever comes of it, truncation and creation are no longer due: a refused write leaves the
        old value as it is.
        """
        node = self.node
        content = node.view.content
        truncated = self.truncated
        result = b""
        try:
            if truncated:
                result = change(b"")
                value = content.parse(result)
                if len(value) > limit:
                    refuse(errno.EFBIG)
                await node.view.session.call(protocol.write(node.path, value))
            else:

                def of_value(value: bytes) -> bytes:
                    nonlocal result
                    result = change(self._content_of(value))
                    return content.parse(result)

                async def work(session: Session) -> Request:
                    if as_file:
                        await node.require_file(session)
                    if blind:
                        return protocol.write(node.path, of_value(b""))
                    return await posix.splice(session, node.path, of_value, limit)

                await node.view.atomically(work)
        finally:
            self._settle()
        self.written = result
        node.was_written()

    def _content_of(self, value: bytes) -> bytes:
        """The content that has this value: as this handle wrote it, unless somebody else wrote.

        In text mode the content may lack the newline that reading would show, or hold one that
        the value does not tell ("" is both nothing and an empty line): what was written counts.
        """
        content = self.node.view.content
        if self.written is not None and content.parse(self.written) == value:
            return self.written
        return content.render(value)

    def _settle(self) -> None:
        if self.truncated:
            self.truncated = False
            self.node.truncating -= 1
        self.fetched = None
        if self.creates:
            self.creates = False
            self.node.creating -= 1

    async def fsync(self) -> None:
        """Carry out a truncation or creation that no write has carried out."""
        if self.truncated:
            await self._change(lambda _: b"", 0)
        elif self.creates:
            # One request, sent before anything else is done: it reaches the store before the LOOKUP
            # of whoever closed the file and looks for it.
            try:
                await self.node.make()
            finally:
                self._settle()

    async def release(self) -> None:
        if (self.truncated or self.creates) and not self.node.gone:
            try:
                await self.fsync()
            except StoreError as error:
                # close(2) has long returned.
                log.warning("an emptied file could not be written at its close: %s", error)
        self._settle()
        if self.claims:
            self.claims = False
            self.node.claims -= 1
