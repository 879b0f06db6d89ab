"""Transactions as directories: `.transaction/NAME/` is the whole tree as one transaction sees it.

Below it are the kinds of files that every tree has, over the transaction's own view (see transactions.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import trio
from pyfuse3 import EntryAttributes

from xsfs.fs.directories import RootDirectory
from xsfs.fs.dumps import SubtreeFile
from xsfs.fs.generated import GeneratedDirectory, MirrorLink, TextFile
from xsfs.fs.inodes import InodeTable
from xsfs.fs.nodes import Caller, Node, refuse
from xsfs.fs.transactions import Transactions, TransactionView
from xsfs.view.differences import differences
from xsfs.view.subtree import SubtreeText
from xsfs.view.view import NodeState, View
from xsfs.xenstore import protocol


class ControlFile(TextFile):
    """`.control` of a transaction: reading tells its state, and it accepts `commit` and `rollback`."""

    writable = True

    parent: TransactionRoot
    view: TransactionView

    def content(self) -> bytes:
        view = self.view
        transaction = view.commands.transaction
        return (
            f"started {view.started.isoformat(timespec='seconds')}\n"
            f"idle {int(trio.current_time() - view.commands.used_at)}\n"
            f"operations {transaction.requests}\n"
            f"state {'open' if transaction.is_open else 'lost'}\n"
        ).encode()

    async def accept(self, data: bytes) -> None:
        root = self.parent
        transactions = root.parent.parent.transactions
        word = data.strip()
        if word == b"commit":
            await root.open_files.settle_all()
            await transactions.commit(root.view)
            root.table.handover.clear()
        elif word == b"rollback":
            await transactions.roll_back(root.view)
        else:
            refuse(errno.EINVAL)


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
        inside = parent.parent.transactions.open.get(name)
        if inside is None:
            refuse(errno.ENOENT)
        super().__init__(table, inside, parent, name)

    async def getattr(self) -> EntryAttributes:
        # Without a request: a listing of `.transaction` must not count as use of the transactions.
        return self.entry(0)

    def attributes(self, state: NodeState) -> EntryAttributes:
        return self.entry(0)


class TransactionsDirectory(GeneratedDirectory):
    """`.transaction`: a directory for each open transaction."""

    writable = True

    parent: MountRoot
    child_kind = TransactionRoot

    def position_of(self, name: bytes) -> tuple[object, ...]:
        # It differs for each transaction, because the kernel may know nodes of one that has ended.
        view = self.parent.transactions.open.get(name)
        return self.inode, name, view.number if view is not None else None

    async def names(self) -> Sequence[bytes]:
        return list(self.parent.transactions.open)

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        if not protocol.is_name(name):
            refuse(errno.EINVAL)
        await self.parent.transactions.begin(name, caller)
        return await self.lookup(name, 0)

    async def rmdir(self, name: bytes) -> None:
        view = self.parent.transactions.open.get(name)
        if view is None:
            refuse(errno.ENOENT)
        await self.parent.transactions.roll_back(view)


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
