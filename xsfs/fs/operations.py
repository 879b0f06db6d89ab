"""The operations of pyfuse3: each finds its node or handle and calls it.

An `Operations` owns the open handles.  A handle is in the table from its OPEN to its RELEASE, or to the end
of the mount.  With `allow_other` every user of the system can open files.  Users who are neither root nor
the mounting user share half of the table, so that root can still open files when they have filled it.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import wraps
from itertools import count
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from xsfs.fs.errnos import translate
from xsfs.fs.fuse_loop import install
from xsfs.fs.inodes import InodeTable
from xsfs.fs.nodes import Caller, Handle, refuse
from xsfs.fs.renames import rename
from xsfs.view.names import NAME_MAX
from xsfs.view.view import View

log = logging.getLogger(__name__)
trace = logging.getLogger("xsfs.trace")

HANDLES_MAX: Final = 65536
"""Each may hold a value of 4 KiB: 256 MiB at most."""

P = ParamSpec("P")
R = TypeVar("R")

_Handler = Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]


def handler(operation: _Handler[P, R]) -> _Handler[P, R]:
    """An operation that raises FUSEError and nothing else, and is counted and traced.

    An operation that only passes on a call is no coroutine function: it returns the coroutine of the node's
    method, because each layer of coroutines costs half a microsecond in each request.
    """
    name = operation.__name__
    parameters = tuple(inspect.signature(operation).parameters)[1:]
    call = cast(Callable[..., Awaitable[R]], operation)

    @wraps(operation)
    async def handle(self: Operations, *args: Any) -> Any:
        self.answered += 1
        self.kernel.under_way += 1
        try:
            if self.traces:
                return await self.trace(name, call, dict(zip(parameters, args, strict=True)))
            return await call(self, *args)
        except FUSEError:
            raise
        except Exception as error:
            raise self.failure(name, error) from None
        finally:
            self.kernel.under_way -= 1

    return cast("_Handler[P, R]", handle)


class Operations(pyfuse3.Operations):
    """See the module's docstring.

    drop_connection     called if a reply of the store turns out to be nonsense
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, table: InodeTable, drop_connection: Callable[[str], None]) -> None:
        super().__init__()
        self.table = table
        self.errors = 0
        self.answered = 0
        self.kernel = table.kernel
        install(self.kernel)
        self.traces = trace.isEnabledFor(logging.DEBUG)
        self._drop_connection = drop_connection
        self._handles: dict[int, Handle] = {}
        self._unprivileged: set[int] = set()
        """The handles of users who are neither root nor the mounting user."""
        self._numbers = count(1)
        self._privileged_users = frozenset((0, os.getuid()))
        # direct_io: the kernel does not cut a read to the size that it knows.
        self._info_of_file = FileInfo(direct_io=True, keep_cache=False)
        self._info_of_stream = FileInfo(direct_io=True, keep_cache=False, nonseekable=True)

    def __len__(self) -> int:
        """How many files and directories are open."""
        return len(self._handles)

    def move_handles(self, source: bytes, target: bytes) -> None:
        """The domain's home has moved."""
        for handle in self._handles.values():
            handle.move(source, target)

    async def end(self, view: View) -> None:
        """The mount ends: carry out what open files still owe the store."""
        open_files = self.table.open_files_of(view)
        try:
            await open_files.settle_all()
        except Exception as error:
            self.failure("unmount", error)
        handles = list(self._handles.values())
        self._handles.clear()
        for handle in handles:
            try:
                await handle.release()
            except Exception as error:
                self.failure("release", error)
        if left := len(open_files.scratch_files(b"/")):
            log.warning("scratch files lost at the unmount: %d", left)

    # -------------------------------------------------------------------------------- errors

    def failure(self, operation: str, error: Exception) -> FUSEError:
        if not isinstance(error, FUSEError):
            self.errors += 1
        return translate(operation, error, self._drop_connection)

    async def trace(
        self, operation: str, call: Callable[..., Awaitable[R]], args: Mapping[str, object]
    ) -> R:
        """Carry out an operation, and log it in one line."""
        start = time.perf_counter()
        described, outcome = operation, "ok"
        try:
            described = " ".join((operation, *self._describe(args)))
            return await call(self, **args)
        except Exception as error:
            failure = self.failure(operation, error)
            outcome = errno.errorcode.get(failure.errno, str(failure.errno))
            raise failure from None
        finally:
            microseconds = (time.perf_counter() - start) * 1e6
            trace.debug("%s: %s, %.0f us", described, outcome, microseconds)

    def _describe(self, args: Mapping[str, object]) -> Iterator[str]:
        """The arguments of an operation.  A value is a secret, so the log shows only its length."""
        for name, argument in args.items():
            if isinstance(argument, bytes):
                is_value = name in ("buf", "value")
                yield f"{len(argument)} bytes" if is_value else repr(argument[:80])[1:]
            elif isinstance(argument, int):
                node = None
                if name == "fh":
                    node = self._handles[argument].node
                elif "inode" in name:
                    node = self.table.peek(argument)
                yield repr(node.label)[2:-1] if node is not None else str(argument)

    # -------------------------------------------------------------------------------- handles

    def _caller(self, ctx: RequestContext) -> Caller:
        return Caller(ctx.pid, ctx.uid, ctx.uid not in self._privileged_users)

    def _admit(self, ctx: RequestContext) -> Caller:
        """The caller.  Fails with ENFILE if there is no room for one more handle."""
        unprivileged = ctx.uid not in self._privileged_users
        is_full = len(self._handles) >= HANDLES_MAX
        if is_full or (unprivileged and len(self._unprivileged) >= HANDLES_MAX // 2):
            refuse(errno.ENFILE)
        return Caller(ctx.pid, ctx.uid, unprivileged)

    def _add(self, handle: Handle, caller: Caller) -> FileHandleT:
        number = FileHandleT(next(self._numbers))
        self._handles[number] = handle
        if caller.unprivileged:
            self._unprivileged.add(number)
        return number

    def _pop(self, number: int) -> Handle:
        self._unprivileged.discard(number)
        return self._handles.pop(number)

    def _handle(self, number: int) -> Handle:
        """The open file or directory.  Fails with ESTALE if its transaction is over."""
        handle = self._handles[number]
        if handle.node.view.ended:
            refuse(errno.ESTALE)
        return handle

    def _file_info(self, handle: Handle, caller: Caller) -> FileInfo:
        # pyfuse3 copies it before anything else can happen.
        info = self._info_of_stream if handle.stream else self._info_of_file
        info.fh = self._add(handle, caller)
        return info

    # -------------------------------------------------------------------------------- entries

    @handler
    def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> Coroutine[Any, Any, EntryAttributes]:
        return self.table.get(parent_inode).lookup(name, ctx.pid)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            self.table.forget(inode, lookups)

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        if not stat.S_ISREG(mode):
            refuse(errno.EPERM)
        return await self.table.get(parent_inode).make_file(name, self._caller(ctx))

    @handler
    def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> Coroutine[Any, Any, EntryAttributes]:
        return self.table.get(parent_inode).make_directory(name, self._caller(ctx))

    @handler
    def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> Coroutine[Any, Any, EntryAttributes]:
        return self.table.get(parent_inode).make_symlink(name)

    @handler
    async def link(
        self,
        inode: InodeT,
        new_parent_inode: InodeT,
        new_name: FileNameT,
        ctx: RequestContext,
    ) -> EntryAttributes:
        refuse(errno.EPERM)

    @handler
    def unlink(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> Coroutine[Any, Any, None]:
        return self.table.get(parent_inode).unlink(name)

    @handler
    def rmdir(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> Coroutine[Any, Any, None]:
        return self.table.get(parent_inode).rmdir(name)

    @handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        source, target = self.table.get(parent_inode_old), self.table.get(parent_inode_new)
        await rename(source, name_old, target, name_new, flags, self._caller(ctx))

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(await self.table.get(inode).readlink())

    # ----------------------------------------------------------------------------- attributes

    @handler
    def getattr(self, inode: InodeT, ctx: RequestContext) -> Coroutine[Any, Any, EntryAttributes]:
        return self.table.get(inode).getattr_by(ctx.pid)

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Truncates.  Only files in memory keep modes and times that are set; owners cannot change."""
        node = self.table.get(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            present = await node.getattr()
            if (fields.update_uid and attr.st_uid != present.st_uid) or (
                fields.update_gid and attr.st_gid != present.st_gid
            ):
                refuse(errno.EPERM)
            if fields.update_mode:
                node.set_mode(attr.st_mode, present.st_mode)
        if fields.update_size:
            if fh is not None:
                await self._handle(fh).truncate(attr.st_size)
            else:
                await node.truncate(attr.st_size)
        if fields.update_atime or fields.update_mtime:
            node.set_times(
                attr.st_atime_ns if fields.update_atime else None,
                attr.st_mtime_ns if fields.update_mtime else None,
            )
        return await node.getattr()

    @handler
    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """Check the owner's mode bits.  If other users are allowed, the kernel checks by itself."""
        node = self.table.get(inode)
        if node.kind == stat.S_IFDIR and mode == os.X_OK:
            return True  # chdir(2) asks, and each directory can be entered
        entry = await node.getattr()
        return not mode & ~(entry.st_mode >> 6) & 0o7

    @handler
    def getxattr(
        self, inode: InodeT, name: XAttrNameT, ctx: RequestContext
    ) -> Coroutine[Any, Any, bytes]:
        return self.table.get(inode).getxattr(name)

    @handler
    def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> Coroutine[Any, Any, None]:
        return self.table.get(inode).setxattr(name, value)

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [XAttrNameT(name) for name in await self.table.get(inode).listxattr()]

    @handler
    def removexattr(
        self, inode: InodeT, name: XAttrNameT, ctx: RequestContext
    ) -> Coroutine[Any, Any, None]:
        return self.table.get(inode).removexattr(name)

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = NAME_MAX
        return data

    # --------------------------------------------------------------------------- open and close

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        caller = self._admit(ctx)
        return self._file_info(await self.table.get(inode).open(flags, caller), caller)

    @handler
    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        caller = self._admit(ctx)
        handle, entry = await self.table.get(parent_inode).create(name, flags, caller)
        return self._file_info(handle, caller), entry

    @handler
    def read(self, fh: FileHandleT, off: int, size: int) -> Coroutine[Any, Any, bytes]:
        return self._handle(fh).read(off, size)

    @handler
    def write(self, fh: FileHandleT, off: int, buf: bytes) -> Coroutine[Any, Any, int]:
        return self._handle(fh).write(off, buf)

    async def flush(self, fh: FileHandleT) -> None:
        # A shell closes a duplicate before it writes, so a FLUSH does not mark the end of writing.  After
        # ENOSYS the kernel sends no more of them.
        refuse(errno.ENOSYS)

    @handler
    def fsync(self, fh: FileHandleT, datasync: bool) -> Coroutine[Any, Any, None]:
        return self._handle(fh).fsync()

    @handler
    def release(self, fh: FileHandleT) -> Coroutine[Any, Any, None]:
        return self._pop(fh).release()

    @handler
    def poll(
        self,
        inode: InodeT,
        fh: FileHandleT,
        poll_handle: pyfuse3.PollHandle | None,
        ctx: RequestContext,
    ) -> Coroutine[Any, Any, int]:
        return self._handle(fh).poll(poll_handle)

    # -------------------------------------------------------------------------- directories

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        caller = self._admit(ctx)
        return self._add(await self.table.get(inode).opendir(caller), caller)

    @handler
    def readdir(
        self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> Coroutine[Any, Any, None]:
        return self._handle(fh).readdir(start_id, token)

    @handler
    def releasedir(self, fh: FileHandleT) -> Coroutine[Any, Any, None]:
        return self._pop(fh).release()

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Does nothing, because a directory has no debts."""
