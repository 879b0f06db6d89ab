"""Transactions as directories: `.transaction/NAME/` is the whole tree as one transaction sees it.

Below it are the kinds of files that every tree has, over the transaction's own view (see transactions.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from pyfuse3 import EntryAttributes

from xsfs.fs.directories import RootDirectory
from xsfs.fs.dumps import SubtreeFile
from xsfs.fs.generated import GeneratedDirectory, MirrorLink, TextFile, TextHandle
from xsfs.fs.inodes import InodeTable
from xsfs.fs.nodes import Caller, Node, refuse
from xsfs.fs.transactions import Transactions, TransactionView
from xsfs.view.differences import differences
from xsfs.view.names import NAME_MAX
from xsfs.view.subtree import SubtreeText
from xsfs.view.view import View
from xsfs.xenstore import protocol


class ControlFile(TextFile):
    """`.control` of a transaction: reading tells its state, and it accepts `commit` and `rollback`."""

    writable = True

    parent: TransactionRoot
    view: TransactionView

    def content(self) -> bytes:
        return self.view.report()

    async def truncate(self, size: int) -> None:
        """A shell truncates before it writes."""

    async def open(self, flags: int, caller: Caller) -> ControlHandle:
        return ControlHandle(self)


class ControlHandle(TextHandle):
    node: ControlFile

    async def truncate(self, size: int) -> None:
        """A shell truncates before it writes."""

    async def write(self, offset: int, data: bytes) -> int:
        root = self.node.parent
        transactions = root.parent.transactions
        word = data.strip()
        if word == b"commit":
            await root.open_files.settle_all()
            await transactions.commit(root.view)
            root.table.handover.clear()
        elif word == b"rollback":
            await transactions.roll_back(root.view)
        else:
            refuse(errno.EINVAL)
        return len(data)


class DiffFile(SubtreeFile):
    """`.diff` of a transaction: what a commit would change."""

    parent: TransactionRoot
    view: TransactionView

    async def make_text(self, before_window: Callable[[int], None]) -> SubtreeText:
        """Fails with EFBIG if the transaction has changed too much to remember it."""
        view = self.view
        await self.parent.open_files.settle_all()
        if view.touched.overflows:
            refuse(errno.EFBIG)
        found = await differences(view, view.outer, view.touched, before_window)
        return SubtreeText(found, None)


class TransactionRoot(RootDirectory):
    """`.transaction/NAME`: the root of the mount, in the transaction."""

    entry_timeout = 0.0
    """The name may mean another transaction at the next lookup."""

    own: ClassVar[Mapping[bytes, type[Node]]] = {
        **RootDirectory.own,
        b".control": ControlFile,
        b".diff": DiffFile,
    }

    parent: TransactionsDirectory
    view: TransactionView

    def __init__(self, table: InodeTable, view: View, parent: Node | None, name: bytes) -> None:
        assert isinstance(parent, TransactionsDirectory)
        inside = parent.transactions.get(name)
        if inside is None:
            refuse(errno.ENOENT)
        super().__init__(table, inside, parent, name)

    async def getattr(self) -> EntryAttributes:
        # Without a request: a listing of `.transaction` must not count as use of the transactions.
        return self.entry(0)

    def getattr_by(self, pid: int) -> Coroutine[Any, Any, EntryAttributes]:
        return self.getattr()


class TransactionsDirectory(GeneratedDirectory):
    """`.transaction`: a directory for each open transaction."""

    writable = True

    parent: MountRoot

    @property
    def transactions(self) -> Transactions:
        return self.parent.transactions

    async def lookup(self, name: bytes, pid: int) -> EntryAttributes:
        root = self.child(name)
        if root is None:
            refuse(errno.ENOENT)
        self.table.remember(root)
        return root.entry(0)

    def position_of(self, name: bytes) -> tuple[object, ...]:
        # It differs for each transaction, because the kernel may know nodes of one that has ended.
        view = self.transactions.get(name)
        return self.inode, name, view.number if view is not None else 0

    async def children(self) -> list[tuple[bytes, int]]:
        return [(name, 0) for name in self.transactions.names()]

    def child(self, name: bytes) -> TransactionRoot | None:
        if self.transactions.get(name) is None:
            return None
        return self.table.node(TransactionRoot, self, name)

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        if not protocol.is_name(name):
            refuse(errno.EINVAL)
        if len(name) > NAME_MAX:
            refuse(errno.ENAMETOOLONG)
        await self.transactions.begin(name, caller)
        return await self.lookup(name, 0)

    async def rmdir(self, name: bytes) -> None:
        view = self.transactions.get(name)
        if view is None:
            refuse(errno.ENOENT)
        await self.transactions.roll_back(view)

    async def unlink(self, name: bytes) -> None:
        refuse(errno.EISDIR if self.transactions.get(name) is not None else errno.ENOENT)


class MountRoot(RootDirectory):
    """The root of the mount, with the names that a mount has once."""

    own: ClassVar[Mapping[bytes, type[Node]]] = {
        **RootDirectory.own,
        b".transaction": TransactionsDirectory,
        b".mirror": MirrorLink,
    }

    def __init__(self, table: InodeTable, view: View, transactions: Transactions) -> None:
        super().__init__(table, view, None, b"")
        self.transactions = transactions
