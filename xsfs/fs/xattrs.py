"""Xenstore nodes as files of any kind: their times, and their extended attributes.

Only `user.xs.perms` is listed, because it is the one that belongs in a copy.  A tool that copies all listed
attributes would fail on the path, which cannot be set, and write the value twice.
"""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import pyfuse3
from pyfuse3 import EntryAttributes

from xsfs.fs.memory_content import MemoryContent
from xsfs.fs.nodes import Node, refuse
from xsfs.fs.open_files import OpenFile
from xsfs.view.names import join, parent_path
from xsfs.view.view import NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import (
    Permissions,
    encode_perms,
    parse_permissions,
    perms_text,
    set_perms,
    signed_domid,
)
from xsfs.xenstore.protocol import Request

if TYPE_CHECKING:
    from xsfs.fs.directories import Directory
    from xsfs.fs.inodes import InodeTable

DOMID_LIMIT: Final = 0xFFFFFFFF
"""The daemons keep a domid in 32 bits."""

PERMS_NAME: Final = b"user.xs.perms"
PATH_NAME: Final = b"user.xs.path"
VALUE_ATTRIBUTE_NAME: Final = b"user.xs.value"
ATTRIBUTES: Final = (PERMS_NAME, PATH_NAME, VALUE_ATTRIBUTE_NAME)


class XenstoreNode(Node):
    """A Xenstore node, as a file of some kind."""

    __slots__ = ("_fingerprint", "detached", "mtime_ns", "open_files")

    def __init__(self, table: InodeTable, view: View, parent: Node | None, name: bytes) -> None:
        super().__init__(table, view, parent, name)
        self.open_files = table.open_files_of(view)
        self._fingerprint: int | None = None
        self.mtime_ns = 0
        self.detached: OpenFile | None = None
        """The open file to which it still belongs, if its position leads there no more: the file was removed,
        replaced, or renamed by another name."""

    @property
    def always_there(self) -> bool:
        """Whether it is shown even if its node does not exist."""
        return self.view.is_always_there(self.path)

    def seen(self, fingerprint: int) -> int:
        """The time in nanoseconds at which xsfs first saw the value, or list of children, of this hash.

        Xenstore keeps no times.  With a constant one rsync, make and editors would miss changed values.
        """
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self.mtime_ns = time.time_ns()
        return self.mtime_ns

    def attributes(self, state: NodeState) -> EntryAttributes:
        """The state of the node as the kernel takes it."""
        return self.entry(0, state.readable, state.writable, self.seen(state.children_hash))

    def was_written(self) -> None:
        """A change of the node was carried out through the mount."""
        self.table.handover.clear()

    @property
    def in_memory(self) -> tuple[OpenFile, MemoryContent] | None:
        """The open file and its content, if the content is in memory."""
        file = self.detached
        return None if file is None or file.memory is None else (file, file.memory)

    async def getxattr(self, name: bytes) -> bytes:
        if name not in ATTRIBUTES:
            # Never ENOSYS, which would turn extended attributes off for the whole mount.
            refuse(errno.EOPNOTSUPP if name.startswith(b"system.") else pyfuse3.ENOATTR)
        while True:
            if (found := self.in_memory) is not None:
                _, memory = found
                if name == VALUE_ATTRIBUTE_NAME:
                    return self.view.value_format.parse(memory.data)
                if name == PERMS_NAME and memory.perms is not None:
                    return perms_text(memory.perms)
                refuse(pyfuse3.ENOATTR)
            async with self._settled() as path:
                if name == PATH_NAME:
                    return path
                call = self.view.commands.call
                if name == PERMS_NAME:
                    return perms_text(await call(protocol.get_perms(path)))
                return await call(protocol.read(path))

    async def setxattr(self, name: bytes, value: bytes) -> None:
        if name not in ATTRIBUTES:
            refuse(errno.EOPNOTSUPP)
        if name == PATH_NAME:
            refuse(errno.EPERM)
        if len(value) > self.view.commands.payload_max:
            refuse(errno.E2BIG)
        perms: Permissions | None = None
        if name == PERMS_NAME:
            # setfattr and scripts may leave a newline or a NUL at the end.
            text = value.rstrip(b"\n\0").decode("ascii", "replace")
            perms = await permissions_of(self.view, text)
        while not await self._set_in_memory(value, perms):
            async with self._settled() as path:
                if perms is None:
                    await self._set_value(path, value)
                else:
                    request = set_perms(path, perms)
                    if len(request.payload) > self.view.commands.payload_max:
                        refuse(errno.E2BIG)
                    await self.view.commands.call(request)
                self.was_written()
                return

    async def _set_in_memory(self, value: bytes, perms: Permissions | None) -> bool:
        """Set the permissions, or else the value, if the content is in memory.  Returns whether it is."""
        if (found := self.in_memory) is None:
            return False
        file, memory = found
        async with file.changing():
            if file.memory is not memory:
                return False
            if perms is not None:
                memory.set_perms(encode_perms(perms))
            else:
                data = self.view.value_format.render(value)
                await self.open_files.set_data(file, memory, data)
        return True

    async def _set_value(self, path: bytes, value: bytes) -> None:
        if len(value) > protocol.value_max(path, self.view.commands.payload_max):
            refuse(errno.EFBIG)

        async def work(commands: Commands) -> Request:
            if not self.always_there:  # WRITE would create the node
                await commands.call(protocol.read(path))
            return protocol.write(path, value)

        await self.view.atomically(work)

    async def listxattr(self) -> list[bytes]:
        found = self.in_memory
        return [PERMS_NAME] if found is None or found[1].perms is not None else []

    async def removexattr(self, name: bytes) -> None:
        """Without `user.xs.perms` a node has the permissions of its parent.  rsync -X removes the attribute
        if the source does not have it."""
        if name != PERMS_NAME:
            refuse(errno.EPERM if name in ATTRIBUTES else pyfuse3.ENOATTR)
        while True:
            if (found := self.in_memory) is not None:
                _, memory = found
                if memory.perms is None:
                    refuse(pyfuse3.ENOATTR)
                memory.set_perms(None)
                return
            async with self._settled() as path:
                await self.view.atomically(partial(self._inherit_perms, path))
                self.was_written()
                return

    async def _inherit_perms(self, path: bytes, commands: Commands) -> Request | None:
        """Set the permissions of the parent.  The owner stays: a guest cannot change it, and in domain 0 the
        guest must not lose it."""
        if path == b"/":
            refuse(errno.EPERM)
        present = perms_text(await commands.call(protocol.get_perms(path)))
        parent = perms_text(await commands.call(protocol.get_perms(parent_path(path))))
        owner = present.partition(b",")[0][1:]
        first, comma, others = parent.partition(b",")
        wanted = first[:1] + owner + comma + others
        if wanted == present:
            return None
        return set_perms(path, await permissions_of(self.view, wanted.decode()))

    @asynccontextmanager
    async def _settled(self) -> AsyncIterator[bytes]:
        """The path of the node, which has no debt when the block begins.

        If the node is missing, this fails with ESTALE: the kernel then looks a path up again.  But if the
        mount has just renamed it or taken its content into memory, the block only ends, and the caller tries
        again: for an open file the kernel looks nothing up.
        """
        self.require()
        path = self.path
        try:
            await self.open_files.settle(path)
            yield path
        except XenstoreError as error:
            if error.name != "ENOENT" or self.always_there:
                raise
            async with self.open_files.changing(path):
                if self.path == path and self.in_memory is None:
                    refuse(errno.ESTALE)


class FileOfDirectory(Node):
    """A file in each directory that shows the directory's own node, or all below it."""

    __slots__ = ()

    parent: Directory

    @property
    def path(self) -> bytes:
        return self.parent.path

    @property
    def label(self) -> bytes:
        return join(super().label, self.name)


async def permissions_of(view: View, text: str) -> Permissions:
    """The permissions `n0,r7`.  Fails with EINVAL if they must not be sent to the daemon."""
    try:
        perms = parse_permissions(text)
    except ValueError:
        refuse(errno.EINVAL)
    if any(abs(signed_domid(entry.domid)) > DOMID_LIMIT for entry in perms):
        refuse(errno.EINVAL)
    if any(entry.is_reserved for entry in perms) and await view.has_features():
        refuse(errno.EINVAL)
    return perms
