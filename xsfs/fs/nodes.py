"""The bases of all kinds of files: a node, which is one inode, and a handle, which is one open file.

A kind of file is a subclass of `Node`.  It answers the operations that make sense on it; the defaults here
refuse.  If it can be open in a way of its own, it has a subclass of `Handle`.  The tables `own` in
directories.py and transaction_dirs.py give each kind its name, which OWN_NAMES of view/names.py has, too.
"""

from __future__ import annotations

import errno
import select
import stat
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, NoReturn

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError

from xsfs.view.names import join
from xsfs.view.view import View

if TYPE_CHECKING:
    from xsfs.fs.inodes import InodeTable

DIRECTORY_ENTRY_TIMEOUT: Final = 1.0
"""Seconds for which the kernel may keep a directory's name.  A path always means the same Xenstore path, so
the entry can only be gone, or a file by now.  Each operation finds that out, and fails with ESTALE, upon
which the kernel looks the path up again."""

FILE_ENTRY_TIMEOUT: Final = 0.0
"""If the kernel kept a file that got children meanwhile, it would fail with ENOTDIR without a request."""

ATTRIBUTES_TIMEOUT: Final = 0.001
"""Seconds, which the kernel rounds up to its tick.  So an fstat(2) right after an open(2) or a listing sends
no request."""

FORGOTTEN: Final = -1
"""The lookup count of a node that has left the table.  It never comes back: its number may belong to another
position, from which it was renamed."""

BLOCK_SIZE: Final = 512
"""The unit of st_blocks."""


def refuse(number: int) -> NoReturn:
    """Fail with this errno."""
    raise FUSEError(number)


class Caller(NamedTuple):
    """The thread and the user that made a system call."""

    pid: int
    """The number of the thread; 0 if it is in another PID namespace."""
    uid: int
    unprivileged: bool
    """Whether the user is neither root nor the user who mounted."""


class Handle:
    """An open file or directory."""

    __slots__ = ("node",)

    stream: ClassVar[bool] = False
    """Whether it has no positions, so that lseek(2) and pread(2) fail with ESPIPE."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def read(self, offset: int, size: int) -> bytes:
        refuse(errno.EINVAL)

    async def write(self, offset: int, data: bytes) -> int:
        refuse(errno.EINVAL)

    async def truncate(self, size: int) -> None:
        refuse(errno.EINVAL)

    async def fsync(self) -> None:
        """Carry out the debt of the file, and report a failure."""

    async def release(self) -> None:
        """The last descriptor was closed."""

    async def readdir(self, start: int, token: pyfuse3.ReaddirToken) -> None:
        refuse(errno.ENOTDIR)

    def move(self, source: bytes, target: bytes) -> None:
        """The domain's home has moved, and with it all below."""

    async def poll(self, poll_handle: pyfuse3.PollHandle | None) -> int:
        """The events of poll(2) that are ready.  ENOSYS would turn poll off for the whole mount."""
        return select.POLLIN | select.POLLOUT


class Node(ABC):
    """One inode: a position in the mount, seen as one kind of file."""

    __slots__ = ("gone", "inode", "lookups", "name", "parent", "renumbered", "table", "view")

    kind: ClassVar[int] = stat.S_IFREG
    entry_timeout: ClassVar[float] = FILE_ENTRY_TIMEOUT

    def __init__(self, table: InodeTable, view: View, parent: Node | None, name: bytes) -> None:
        self.table = table
        self.view = view
        self.parent = parent
        self.name = name
        self.inode = 0
        self.lookups = 0
        self.renumbered = False
        """Whether its number is not the hash of its position, because another node has that number."""
        self.gone = False
        """Whether it was removed or replaced through the mount."""

    @property
    def path(self) -> bytes:
        """The absolute Xenstore path.  It is derived, because a rename of a parent changes it."""
        assert self.parent is not None
        return join(self.parent.path, self.name)

    @property
    def label(self) -> bytes:
        """For the log: the path, after the name of the transaction in which it is seen."""
        return self.view.log_prefix + self.path

    def require(self) -> None:
        """Fail with ESTALE if it is gone, or its transaction is over."""
        if self.gone or self.view.ended:
            refuse(errno.ESTALE)

    def position_of(self, name: bytes) -> tuple[object, ...]:
        """A key that tells a child of this name from all other nodes of the mount."""
        return self.inode, name

    # ---------------------------------------------------------------------------- attributes

    def entry(
        self, size: int, read: bool = True, write: bool = True, mtime_ns: int | None = None
    ) -> EntryAttributes:
        """The attributes of this node as the kernel takes them.

        mtime_ns    nanoseconds since the epoch; now if None
        """
        ownership = self.table.ownership
        entry = EntryAttributes()
        entry.st_ino = self.inode
        entry.st_mode = ownership.mode(self.kind, read, write)
        entry.st_uid = ownership.uid
        entry.st_gid = ownership.gid
        entry.st_size = size
        entry.st_blocks = -(-size // BLOCK_SIZE)
        if mtime_ns is None:
            mtime_ns = self.table.mounted_ns
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = mtime_ns
        entry.entry_timeout = self.entry_timeout
        entry.attr_timeout = ATTRIBUTES_TIMEOUT
        return entry

    @abstractmethod
    async def getattr(self) -> EntryAttributes:
        """The attributes as they are now.  Fails with ESTALE if it does not exist, or is of another kind."""

    def getattr_by(self, pid: int) -> Coroutine[Any, Any, EntryAttributes]:
        """The attributes for a GETATTR of thread `pid`."""
        return self.getattr()

    async def looked_up(self, pid: int) -> EntryAttributes:
        """The attributes for the LOOKUP of one of xsfs's own names by thread `pid`."""
        return await self.getattr()

    def require_mode(self, wanted: int, present: int) -> None:
        """Fail with EPERM if the wanted mode, cut as at creation (by umask, and `x` of files), grants what
        `present` does not."""
        if wanted & (stat.S_ISUID | stat.S_ISGID):
            refuse(errno.EPERM)
        wanted &= ~self.table.ownership.umask & 0o777
        if self.kind != stat.S_IFDIR:
            wanted &= ~0o111
        # If there are other users, their bits must be exact, because a program may rely on them.
        differing = (wanted ^ present) & 0o077 if self.table.allow_other else 0
        if wanted & 0o700 & ~present or differing:
            refuse(errno.EPERM)

    def set_mode(self, wanted: int, present: int) -> None:
        """chmod(2).  Most files have the mode that Xenstore's permissions give them, and keep it."""
        self.require_mode(wanted, present)

    def set_times(self, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set the times that are given, in nanoseconds since the epoch.  Most files forget them."""
        return

    async def truncate(self, size: int) -> None:
        refuse(errno.EISDIR if self.kind == stat.S_IFDIR else errno.EACCES)

    # ------------------------------------------------------------------------------- entries

    async def lookup(self, name: bytes, pid: int) -> EntryAttributes:
        refuse(errno.ENOTDIR)

    # The kernel sends the following to directories alone.

    async def create(
        self, name: bytes, flags: int, caller: Caller
    ) -> tuple[Handle, EntryAttributes]:
        refuse(errno.EPERM)

    async def make_file(self, name: bytes, caller: Caller) -> EntryAttributes:
        refuse(errno.EPERM)

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        refuse(errno.EPERM)

    async def make_symlink(self, name: bytes) -> EntryAttributes:
        refuse(errno.EPERM)

    async def unlink(self, name: bytes) -> None:
        refuse(errno.EPERM)

    async def rmdir(self, name: bytes) -> None:
        refuse(errno.EPERM)

    async def readlink(self) -> bytes:
        refuse(errno.EINVAL)

    # ------------------------------------------------------------------------------- handles

    async def open(self, flags: int, caller: Caller) -> Handle:
        refuse(errno.EISDIR)

    async def opendir(self, caller: Caller) -> Handle:
        refuse(errno.ENOTDIR)

    # ------------------------------------------------------------------- extended attributes

    async def getxattr(self, name: bytes) -> bytes:
        refuse(pyfuse3.ENOATTR)

    async def setxattr(self, name: bytes, value: bytes) -> None:
        refuse(errno.EOPNOTSUPP)

    async def listxattr(self) -> list[bytes]:
        return []

    async def removexattr(self, name: bytes) -> None:
        refuse(pyfuse3.ENOATTR)
