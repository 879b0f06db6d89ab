"""Scratch files: the temporary files of editors and of atomic writers, in the memory of this mount.

vim, rsync, patch, `sed -i.bak` and many others make a file of another name first and then rename it.
Xenstore cannot hold these names (see view.names.is_scratch_name), so the files live here.  A rename to a name
that Xenstore can hold writes the content to that node (see directories.py).

A `ScratchFiles` owns all scratch files of a mount, by directory and name.  Only the tasks that handle FUSE
requests touch it.

Invariants:

- Nothing of a scratch file reaches the store, a transaction or the mirror before it is renamed.
- Number and bytes are bounded for the mount, and for each user who is neither root nor the one who mounted.
  A file that was removed counts until its last close.
- The directory is kept as its Xenstore path, so `data` and `.root/local/domain/0/data` have the same scratch
  files.  If another client removes the directory, its scratch files go when the mount notices that, and at
  the latest when it needs the room.
- While a scratch file is renamed to a node (`lock`), nobody changes its content.  Its open handles then go on
  as handles of that node.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio
from pyfuse3 import EntryAttributes

from xsfs.fs.files import ValueFile, ValueHandle
from xsfs.fs.nodes import Caller, Handle, Node, refuse
from xsfs.fs.open_files import is_missing
from xsfs.fs.xattrs import (
    ATTRIBUTE_MAX,
    PATH_NAME,
    PERMS_NAME,
    VALUE_ATTRIBUTE_NAME,
    permissions_to_set,
)
from xsfs.view.names import is_scratch_name, join
from xsfs.view.view import View
from xsfs.xenstore import protocol
from xsfs.xenstore.permissions import encode_perms, perms_text

if TYPE_CHECKING:
    from xsfs.fs.inodes import InodeTable

FILE_MAX: Final = 1 << 20
"""The size of one file, in bytes.  vim's swap file of a value has some 12 KiB."""

FILES_MAX: Final = 1024
BYTES_MAX: Final = 64 << 20
"""The scratch files of one mount together."""

EACH_UNPRIVILEGED_FILES_MAX: Final = FILES_MAX // 8
EACH_UNPRIVILEGED_BYTES_MAX: Final = BYTES_MAX // 8
"""The scratch files of one user who is neither root nor the one who mounted."""


@dataclass(slots=True, eq=False)
class ScratchContent:
    """One scratch file, whatever inodes lead to it.

    owner       the user whose share it takes; None for root and the one who mounted
    place       its directory and its name; None if it has none
    perms       what `user.xs.perms` was set to, in the form of a reply to GET_PERMS; None if it was not
    became      the node's file to which it was renamed
    mode        the permission bits that chmod(2) has set; None before
    """

    owner: int | None
    place: tuple[bytes, bytes] | None = None
    data: bytearray = field(default_factory=bytearray)
    perms: bytes | None = None
    mode: int | None = None
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    ctime_ns: int = field(default_factory=time.time_ns)
    handles: set[ScratchHandle] = field(default_factory=set)
    became: ValueFile | None = None
    lock: trio.Lock = field(default_factory=trio.Lock)

    def was_written(self) -> None:
        self.mtime_ns = self.ctime_ns = time.time_ns()

    def become(self, file: ValueFile) -> None:
        """It was renamed to a node, and its content written there."""
        self.became = file
        self.data.clear()
        for handle in self.handles:
            open_file = file.open_files.open(file.path, file)
            open_file.is_pinned = True
            handle.successor = ValueHandle(file, open_file, handle.flags)


class ScratchFiles:
    """See the module's docstring.

    is_enabled  whether there can be any: not in a transaction
    """

    def __init__(self, *, is_enabled: bool = True) -> None:
        self._is_enabled = is_enabled
        self._by_place: dict[tuple[bytes, bytes], ScratchContent] = {}
        self._held: set[ScratchContent] = set()
        """All that take memory: with a name, open, or about to get a name."""

    def __len__(self) -> int:
        """How many have a name."""
        return len(self._by_place)

    def takes(self, name: bytes) -> bool:
        """Whether a file of this name is a scratch file."""
        return self._is_enabled and is_scratch_name(name)

    def get(self, directory: bytes, name: bytes) -> ScratchContent | None:
        return self._by_place.get((directory, name))

    def names(self, directory: bytes) -> list[bytes]:
        """The names of the scratch files in a directory."""
        return [name for above, name in self._by_place if above == directory]

    # --------------------------------------------------------------------------------- limits

    async def new(self, view: View, caller: Caller) -> ScratchContent:
        """A new file, which has no name yet.  Fails with ENOSPC or EDQUOT if there is no room."""
        content = ScratchContent(caller.uid if caller.unprivileged else None)
        await self._make_room(view, content, files=1)
        self._held.add(content)
        return content

    async def resize(self, view: View, content: ScratchContent, size: int) -> None:
        """Give it this size.  Fails with EFBIG, ENOSPC or EDQUOT, and then changes nothing."""
        if size > FILE_MAX:
            refuse(errno.EFBIG)
        if (more := size - len(content.data)) > 0:
            await self._make_room(view, content, more=more)
        del content.data[size:]
        content.data.extend(bytes(size - len(content.data)))

    async def replace(self, view: View, content: ScratchContent, data: bytes) -> None:
        """Give it this content.  Fails as `resize`."""
        await self.resize(view, content, len(data))
        content.data[:] = data

    async def _make_room(
        self, view: View, content: ScratchContent, *, files: int = 0, more: int = 0
    ) -> None:
        """Fail with ENOSPC or EDQUOT if there is no room for so many more files and bytes."""
        if self._shortage(content.owner, files, more):
            await self._drop_lost(view)
            if number := self._shortage(content.owner, files, more):
                refuse(number)

    def _shortage(self, owner: int | None, files: int, more: int) -> int:
        """The errno if there is no room; 0 if there is."""
        held: Collection[ScratchContent] = self._held
        if len(held) + files > FILES_MAX or _size(held) + more > BYTES_MAX:
            return errno.ENOSPC
        if owner is not None:
            held = [content for content in held if content.owner == owner]
            if (
                len(held) + files > EACH_UNPRIVILEGED_FILES_MAX
                or _size(held) + more > EACH_UNPRIVILEGED_BYTES_MAX
            ):
                return errno.EDQUOT
        return 0

    async def _drop_lost(self, view: View) -> None:
        """Drop the files in directories that another client has removed."""
        paths = sorted({directory for directory, _ in self._by_place})
        replies = await view.commands.pipeline([protocol.read(path) for path in paths])
        for path, reply in zip(paths, replies, strict=True):
            if is_missing(reply) and not view.is_always_there(path):
                self.drop_below(path)

    # ---------------------------------------------------------------------------------- names

    def link(self, content: ScratchContent, directory: bytes, name: bytes) -> None:
        """Move it to this place, instead of the file that has it."""
        present = self.get(directory, name)
        if present is content:
            return
        if present is not None:
            self.unlink(present)
        if content.place is not None:
            del self._by_place[content.place]
        content.place = directory, name
        self._by_place[content.place] = content

    def unlink(self, content: ScratchContent) -> None:
        """Remove its name, if it has one."""
        if content.place is not None:
            del self._by_place[content.place]
            content.place = None
            self.release(content)

    def release(self, content: ScratchContent) -> None:
        """Forget the file if it has no name and nobody has it open."""
        if content.place is None and not content.handles:
            self._held.discard(content)

    def drop_below(self, top: bytes) -> None:
        """A node was removed, and all below it."""
        for content, _, _ in self._below(top):
            self.unlink(content)

    def move_below(self, source: bytes, target: bytes) -> None:
        """A node was renamed, and all below it."""
        for content, directory, name in self._below(source):
            self.link(content, target + directory[len(source) :], name)

    def _below(self, top: bytes) -> list[tuple[ScratchContent, bytes, bytes]]:
        """The files in this directory and below it, each with its directory and its name."""
        below = join(top, b"")
        return [
            (content, directory, name)
            for (directory, name), content in self._by_place.items()
            if directory == top or directory.startswith(below)
        ]


def _size(contents: Collection[ScratchContent]) -> int:
    return sum(len(content.data) for content in contents)


class ScratchFile(Node):
    """A scratch file at one position in the mount.  There must be one when it is created."""

    __slots__ = ("content",)

    def __init__(self, table: InodeTable, view: View, parent: Node | None, name: bytes) -> None:
        super().__init__(table, view, parent, name)
        assert parent is not None
        content = table.scratch.get(parent.path, name)
        if content is None:
            refuse(errno.ENOENT)
        self.content = content

    def attributes(self) -> EntryAttributes:
        content = self.content
        entry = self.entry(len(content.data), mtime_ns=content.mtime_ns)
        if content.mode is not None:
            entry.st_mode = stat.S_IFREG | content.mode
        entry.st_atime_ns = content.atime_ns
        entry.st_ctime_ns = content.ctime_ns
        entry.st_nlink = int(content.place is not None)
        return entry

    async def getattr(self) -> EntryAttributes:
        if (file := self.content.became) is not None:
            entry = await file.getattr()
            entry.st_ino = self.inode
            return entry
        return self.attributes()

    def set_mode(self, wanted: int, present: int) -> None:
        content = self.content
        if content.became is not None or wanted & (stat.S_ISUID | stat.S_ISGID):
            self.require_mode(wanted, present)
        else:
            content.mode = wanted & 0o777 & ~self.table.ownership.umask
            content.ctime_ns = time.time_ns()

    def require_mode_of_node(self) -> None:
        """Fail with EPERM if chmod has set a mode that a node cannot have: a rename would drop it."""
        if self.content.mode is not None:
            mode_of_node = self.table.ownership.mode(stat.S_IFREG, read=True, write=True)
            self.require_mode(self.content.mode, mode_of_node)

    def set_times(self, atime_ns: int | None, mtime_ns: int | None) -> None:
        content = self.content
        if atime_ns is not None:
            content.atime_ns = atime_ns
        if mtime_ns is not None:
            content.mtime_ns = mtime_ns
        content.ctime_ns = time.time_ns()

    async def truncate(self, size: int) -> None:
        async with self.content.lock:
            if self.content.became is None:
                await self.table.scratch.resize(self.view, self.content, size)
                self.content.was_written()
                return
        await self.content.became.truncate(size)

    async def open(self, flags: int, caller: Caller) -> Handle:
        content = self.content
        if flags & os.O_TRUNC and content.became is None:
            await self.truncate(0)
        if content.became is not None:
            return await content.became.open(flags, caller)
        if content.place is None and not content.handles:
            refuse(errno.ESTALE)
        return ScratchHandle(self, flags)

    # ------------------------------------------------------------------- extended attributes

    async def getxattr(self, name: bytes) -> bytes:
        content = self.content
        if content.became is not None:
            return await content.became.getxattr(name)
        if name == PERMS_NAME and content.perms is not None:
            return perms_text(content.perms)
        if name == VALUE_ATTRIBUTE_NAME:
            return self.view.content.parse(bytes(content.data))
        # Never ENOSYS, which would turn extended attributes off for the whole mount.
        refuse(errno.EOPNOTSUPP if name.startswith(b"system.") else pyfuse3.ENOATTR)

    async def setxattr(self, name: bytes, value: bytes) -> None:
        if len(value) > ATTRIBUTE_MAX:
            refuse(errno.E2BIG)
        content = self.content
        perms = await permissions_to_set(self.view, value) if name == PERMS_NAME else None
        async with content.lock:
            if content.became is None:
                if perms is not None:
                    content.perms = encode_perms(perms)
                    content.ctime_ns = time.time_ns()
                elif name == VALUE_ATTRIBUTE_NAME:
                    data = self.view.content.render(value)
                    await self.table.scratch.replace(self.view, content, data)
                    content.was_written()
                else:
                    refuse(errno.EPERM if name == PATH_NAME else errno.EOPNOTSUPP)
                return
        await content.became.setxattr(name, value)

    async def listxattr(self) -> list[bytes]:
        content = self.content
        return [] if content.perms is None and content.became is None else [PERMS_NAME]

    async def removexattr(self, name: bytes) -> None:
        content = self.content
        if content.became is not None:
            await content.became.removexattr(name)
        elif name == PERMS_NAME and content.perms is not None:
            content.perms = None
            content.ctime_ns = time.time_ns()
        else:
            refuse(errno.EPERM if name == VALUE_ATTRIBUTE_NAME else pyfuse3.ENOATTR)


class ScratchHandle(Handle):
    """An open scratch file.

    successor   the handle of the node to which the file was renamed since
    """

    __slots__ = ("content", "flags", "successor")

    node: ScratchFile

    def __init__(self, node: ScratchFile, flags: int) -> None:
        super().__init__(node)
        self.content = node.content
        self.flags = flags
        self.successor: ValueHandle | None = None
        self.content.handles.add(self)

    async def read(self, offset: int, size: int) -> bytes:
        if self.successor is not None:
            return await self.successor.read(offset, size)
        return bytes(self.content.data[offset : offset + size])

    async def write(self, offset: int, data: bytes) -> int:
        content = self.content
        async with content.lock:
            if self.successor is None:
                at = len(content.data) if self.flags & os.O_APPEND else offset
                end = at + len(data)
                size = max(end, len(content.data))
                await self.node.table.scratch.resize(self.node.view, content, size)
                content.data[at:end] = data
                content.was_written()
                return len(data)
        return await self.successor.write(offset, data)

    async def truncate(self, size: int) -> None:
        if self.successor is not None:
            await self.successor.truncate(size)
        else:
            await self.node.truncate(size)

    async def fsync(self) -> None:
        if self.successor is not None:
            await self.successor.fsync()

    async def release(self) -> None:
        self.content.handles.discard(self)
        self.node.table.scratch.release(self.content)
        if self.successor is not None:
            await self.successor.release()
