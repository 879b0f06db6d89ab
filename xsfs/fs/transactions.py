"""Open transactions: the view, the commands and the end of each (see transaction_dirs.py).

A `Transactions` owns the table of transactions by name, and a task for each, which ends a transaction that is
idle for too long or has lost its connection.  Only these tasks and those of FUSE requests touch the table.

Invariants:

- A name is taken until its transaction's connection is closed.  Two mkdir(2) of one name take turns, because
  the kernel sends one MKDIR of a directory at a time.
- Each has a connection, a view and commands of its own, and all nodes below share the view.  Once the view
  has `ended`, operations on these nodes, and on files open on them, fail with ESTALE.  The next transaction
  of that name has other inode numbers.
- The first task that ends a transaction closes the connection afterwards.  That ends even a transaction that
  the daemon refuses to end.
- Within a transaction one pipeline, or one change made of several, is under way at a time, in the order of
  the requests.  So appending, O_EXCL and rename are atomic among its users, too, and a commit comes after
  everything that was written before.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from typing import Final

import trio

from xsfs.fs.nodes import Caller, refuse
from xsfs.view.differences import TouchedPaths
from xsfs.view.kinds import StickyDirectories
from xsfs.view.view import View, Work
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, TransactionEnded
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.store import Transaction

log = logging.getLogger(__name__)

OPEN_MAX: Final = 256
"""How many transactions of one mount may be open.  Each is a socket here and in the daemon, which may have
at most 1024 for all its clients."""

UNPRIVILEGED_MAX: Final = OPEN_MAX // 2
EACH_UNPRIVILEGED_MAX: Final = OPEN_MAX // 8
"""How many of them users who are neither root nor the mounting user may have together, and each."""


class SharedTransaction(Commands):
    """One transaction, shared by all processes that work in its directory."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.lock = trio.Lock()
        self._used_at = trio.current_time()

    @property
    def used_at(self) -> float:
        """When it was last used: now, while a request is under way."""
        return trio.current_time() if self.lock.locked() else self._used_at

    @property
    def payload_max(self) -> int:
        return self.transaction.payload_max

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[Transaction]:
        """The transaction, with no request of others in between."""
        async with self.lock:
            try:
                yield self.transaction
            finally:
                self._used_at = trio.current_time()

    async def pipeline(self, requests: Sequence[Request]) -> list[Reply]:
        async with self.alone() as transaction:
            return await transaction.pipeline(requests)


class TransactionView(View):
    """The tree as one transaction sees it."""

    commands: SharedTransaction

    def __init__(
        self, outer: View, transaction: Transaction, name: bytes, number: int, caller: Caller
    ) -> None:
        """`number` differs for each transaction of the mount.  `caller` has started it."""
        sticky = StickyDirectories(outer.sticky)
        super().__init__(outer.store, outer.domid, outer.root, outer.value_format, sticky)
        self.name = name
        self.log_prefix = name + b":"
        self.number = number
        self.caller = caller
        self.outer = outer
        self.commands = SharedTransaction(transaction)
        self.touched = TouchedPaths()
        transaction.on_requests = self.touched.add
        self.started = datetime.now(UTC)

    async def atomically(self, work: Work) -> None:
        """Run `work` in this very transaction, since Xenstore has no nested ones.  If `work` raises in the
        middle, the changes that it has made stay."""
        async with self.commands.alone() as transaction:
            last = await work(transaction)
            if last is not None:
                await transaction.call(last)

    atomically_apart = atomically


class Transactions:
    """See the module's docstring."""

    def __init__(self, nursery: trio.Nursery, outer: View, idle_seconds: float) -> None:
        self._nursery = nursery
        self._outer = outer
        self._idle_seconds = idle_seconds
        self._views: dict[bytes, TransactionView] = {}
        """The transactions that are open, or whose end is under way."""
        self._numbers = count()

    @property
    def open(self) -> dict[bytes, TransactionView]:
        """The open transactions by name."""
        return {name: view for name, view in self._views.items() if not view.ended}

    async def begin(self, name: bytes, caller: Caller) -> None:
        """Start the transaction.  FUSEError EEXIST, ENOSPC; StoreError."""
        if name in self._views:
            refuse(errno.EEXIST)
        if self._full_for(caller):
            refuse(errno.ENOSPC)
        transaction = await self._outer.begin()
        view = TransactionView(self._outer, transaction, name, next(self._numbers), caller)
        self._views[name] = view
        self._nursery.start_soon(self._await_end, view)

    def _full_for(self, caller: Caller) -> bool:
        if len(self._views) >= OPEN_MAX:
            return True
        if not caller.unprivileged:
            return False
        uids = [each.caller.uid for each in self._views.values() if each.caller.unprivileged]
        return len(uids) >= UNPRIVILEGED_MAX or uids.count(caller.uid) >= EACH_UNPRIVILEGED_MAX

    async def commit(self, view: TransactionView) -> None:
        """Carry out all changes at once.  XenstoreError `EAGAIN` is a conflict.

        The transaction is over in any case.  FUSEError EIO if the outcome is unknown.
        """
        async with self._ending(view):
            try:
                await view.commands.transaction.commit()
            except (ConnectionLost, RequestTimeout) as error:
                text = view.name.decode()
                log.error("whether transaction %s was committed is unknown: %s", text, error)
                refuse(errno.EIO)
            self._outer.sticky.carry_out(view.sticky)

    async def roll_back(self, view: TransactionView) -> None:
        """Undo all changes."""
        async with self._ending(view):
            pass

    async def roll_back_all(self) -> None:
        """The mount ends."""
        for view in list(self._views.values()):
            with suppress(TransactionEnded):
                await self.roll_back(view)

    @asynccontextmanager
    async def _ending(self, view: TransactionView) -> AsyncIterator[None]:
        """The end of a transaction happens within this block, after everything that came before.  At
        the end of the block it is rolled back if it is still open."""
        async with view.commands.lock:
            if view.ended:
                raise TransactionEnded("the transaction has ended")
            view.end()
        # From here on every other request fails with ESTALE.
        try:
            yield
        finally:
            await self._outer.store.roll_back(view.commands.transaction)
            del self._views[view.name]

    async def _await_end(self, view: TransactionView) -> None:
        """Wait until it has ended, and end it if it is idle for too long or its connection is gone."""
        while (until := view.commands.used_at + self._idle_seconds) > trio.current_time():
            with trio.move_on_at(until):
                await view.commands.transaction.connection.ended.wait()
                break
        if view.ended:
            return
        is_open = view.commands.transaction.is_open
        why = f"idle for {self._idle_seconds:g} s" if is_open else "its connection was closed"
        log.warning("rolled back transaction %s: %s", view.name.decode(), why)
        with suppress(TransactionEnded):  # somebody else came first
            await self.roll_back(view)
