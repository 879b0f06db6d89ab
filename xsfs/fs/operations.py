"""The pyfuse3 operations: a thin dispatch to nodes and handles.

Each operation finds its node or handle and asks it; what that raises xsfs/fs/errnos.py turns into an
errno.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import Final

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ModeT,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from xsfs.fs.errnos import Answering, answered
from xsfs.fs.handles import Handles
from xsfs.fs.inodes import Caller, Handle, Tree, refuse
from xsfs.view.names import NAME_MAX
from xsfs.xenstore.eventual import Eventual, result_of

_CHANGES: Final = os.O_ACCMODE | os.O_TRUNC
"""The flags of an open(2) that does not only read."""


class Operations(Answering):
    """See the module's text.

    distrust    called when a reply turns out to be nonsense
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, tree: Tree, distrust: Callable[[str], None]) -> None:
        super().__init__(distrust)
        self.tree = tree
        self._handles = Handles()
        # direct_io: what is read is what the handle has, whatever size was told before.
        self._info_of_file = FileInfo(direct_io=True, keep_cache=False)
        self._info_of_stream = FileInfo(direct_io=True, keep_cache=False, nonseekable=True)

    def __len__(self) -> int:
        """How many files and directories are open."""
        return len(self._handles)

    async def end(self) -> None:
        """The mount ends: carry out what open files still owe the store."""
        for handle in self._handles.pop_all():
            try:
                await result_of(handle.release())
            except Exception as error:
                self.failure("release", error)

    def describe(self, operation: str, args: Sequence[object]) -> str:
        words = [operation]
        for position, value in enumerate(args):
            if isinstance(value, bytes):
                words.append(repr(value[:80])[1:])
            elif isinstance(value, int) and position in _INODES.get(operation, (0,)):
                on_handle = operation in _ON_HANDLES
                node = self._handles.get(value).node if on_handle else self.tree.peek(value)
                words.append(node.label.decode() if node is not None else str(value))
            elif isinstance(value, int):
                words.append(str(value))
        return " ".join(words)

    def _handle(self, number: int) -> Handle:
        """The open file or directory; ESTALE if all that it belongs to has ended."""
        handle = self._handles.get(number)
        if handle.node.view.ended:
            refuse(errno.ESTALE)
        return handle

    def _caller(self, ctx: RequestContext) -> Caller:
        return Caller(ctx.pid, ctx.uid, self._handles.is_foreign(ctx.uid))

    def _file_info(self, handle: Handle, foreign: bool) -> FileInfo:
        # pyfuse3 copies it before anything else can happen.
        info = self._info_of_stream if handle.stream else self._info_of_file
        info.fh = self._handles.add(handle, foreign)
        return info

    # -------------------------------------------------------------------------------- entries

    @answered
    def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> Eventual[EntryAttributes]:
        return self.tree.get(parent_inode).lookup(name, ctx.pid)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            self.tree.forget(inode, lookups)

    @answered
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        if not stat.S_ISREG(mode):
            refuse(errno.EPERM)
        return await self.tree.get(parent_inode).make_file(name)

    @answered
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return await self.tree.get(parent_inode).make_directory(name, self._caller(ctx))

    @answered
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        refuse(errno.EPERM)

    @answered
    async def link(
        self,
        inode: InodeT,
        new_parent_inode: InodeT,
        new_name: FileNameT,
        ctx: RequestContext,
    ) -> EntryAttributes:
        refuse(errno.EPERM)

    @answered
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self.tree.get(parent_inode).unlink(name)

    @answered
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self.tree.get(parent_inode).rmdir(name)

    @answered
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        source, target = self.tree.get(parent_inode_old), self.tree.get(parent_inode_new)
        await source.rename(name_old, target, name_new, flags)

    @answered
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return await self.tree.get(inode).readlink()

    # ----------------------------------------------------------------------------- attributes

    @answered
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return await self.tree.get(inode).getattr()

    @answered
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Truncates; times are forgotten, modes and owners cannot change."""
        node = self.tree.get(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            present = await node.getattr()
            if (
                (fields.update_mode and (attr.st_mode ^ present.st_mode) & 0o7777)
                or (fields.update_uid and attr.st_uid != present.st_uid)
                or (fields.update_gid and attr.st_gid != present.st_gid)
            ):
                refuse(errno.EPERM)
        if fields.update_size:
            if fh is not None:
                await self._handle(fh).truncate(attr.st_size)
            else:
                await node.truncate(attr.st_size)
        return await node.getattr()

    @answered
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return await self.tree.get(inode).getxattr(name)

    @answered
    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        await self.tree.get(inode).setxattr(name, value)

    @answered
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return await self.tree.get(inode).listxattr()

    @answered
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await self.tree.get(inode).removexattr(name)

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = NAME_MAX
        return data

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        # Said once, the kernel never asks again.
        refuse(errno.ENOSYS)

    # ------------------------------------------------------------------------------- handles

    @answered
    def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> Eventual[FileInfo]:
        # What the LOOKUP of this open(2) has made ready, before anything else is done: the one who
        # waits for it is still awake (see ExpectedFile).
        if not flags & _CHANGES:
            handle = self.tree.prefetched.take(ctx.pid, inode)
            if handle is not None and not handle.node.view.ended:
                return self._file_info(handle, self._handles.admit(ctx.uid))
        return self._open(inode, flags, ctx)

    async def _open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        foreign = self._handles.admit(ctx.uid)
        handle = await self.tree.get(inode).open(flags, Caller(ctx.pid, ctx.uid, foreign))
        return self._file_info(handle, foreign)

    @answered
    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        foreign = self._handles.admit(ctx.uid)
        handle, entry = await self.tree.get(parent_inode).create(name, flags)
        return self._file_info(handle, foreign), entry

    @answered
    def read(self, fh: FileHandleT, off: int, size: int) -> Eventual[bytes]:
        return self._handle(fh).read(off, size)

    @answered
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._handle(fh).write(off, buf)

    async def flush(self, fh: FileHandleT) -> None:
        # A shell closes a duplicate before it writes: a flush says nothing.  Never asked again.
        refuse(errno.ENOSYS)

    @answered
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._handle(fh).fsync()

    @answered
    def release(self, fh: FileHandleT) -> Eventual[None]:
        return self._handles.pop(fh).release()

    @answered
    async def poll(
        self,
        inode: InodeT,
        fh: FileHandleT,
        poll_handle: pyfuse3.PollHandle | None,
        ctx: RequestContext,
    ) -> int:
        return await self._handle(fh).poll(poll_handle)

    @answered
    def opendir(self, inode: InodeT, ctx: RequestContext) -> Eventual[FileHandleT]:
        foreign = self._handles.admit(ctx.uid)
        opening = self.tree.get(inode).opendir()
        if isinstance(opening, Handle):
            return self._opened(opening, foreign)
        return self._opendir(opening, foreign)

    async def _opendir(self, opening: Eventual[Handle], foreign: bool) -> FileHandleT:
        return self._opened(await result_of(opening), foreign)

    def _opened(self, handle: Handle, foreign: bool) -> FileHandleT:
        self.waiter.put_off(handle.prepare)
        return self._handles.add(handle, foreign)

    @answered
    def readdir(
        self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> Eventual[None]:
        return self._handle(fh).readdir(start_id, token)

    @answered
    def releasedir(self, fh: FileHandleT) -> Eventual[None]:
        return self._handles.pop(fh).release()

    @answered
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing of a directory is ever due."""


_INODES: Final = {"rename": (0, 2)}
"""Which arguments are inodes, where it is not the first alone."""

_ON_HANDLES: Final = frozenset(
    ("read", "write", "fsync", "release", "readdir", "releasedir", "fsyncdir")
)
