"""Open transactions: the view, the session and the end of each (see transaction_files.py).

What `Transactions` owns: the table of those open, by name, and for each a task that waits for its end
by idleness or by the loss of its connection.  Only tasks that handle FUSE requests and these touch it.

What always holds:

- A name is in the table from before its transaction is asked for until after its end, so nobody can
  begin another under it meanwhile.  `None` stands for one that is being begun.
- Each has a connection, a view and a session of its own; all nodes below share the view.  Once the
  view has `ended` every one of them, and every file open on them, is ESTALE, and the next transaction
  of that name has other nodes, with other inode numbers.
- The kernel is told nothing of an end.  It asks whenever somebody names the directory, and is told
  then.  FUSE's only way to say so earlier waits for whoever is making, removing or looking up something
  beside it: were xsfs killed then, each would wait for the other for ever.
- The end happens once, whoever wants it: who has said `end` carries it out, and the connection is
  closed whatever comes of it, which ends even what the daemon refuses to end.
- Within a transaction one burst, or one change made of several, is under way at a time, in the order
  in which the requests came.  So appending, O_EXCL and rename are atomic among its users, too, and a
  commit comes after what was written before.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Final

import trio

from xsfs.fs.inodes import Caller, refuse
from xsfs.view.known import KnownDirectories
from xsfs.view.view import View, Work
from xsfs.xenstore.commands import Session
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError, TransactionEnded
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.transaction import Transaction
from xsfs.xenstore.unanswered import Reply

log = logging.getLogger(__name__)

OPEN_MAX: Final = 256
"""How many transactions of one mount may be open: each is a socket here and in the daemon, which for
all its clients may have no more than 1024."""


FOREIGN_MAX: Final = OPEN_MAX // 2
EACH_FOREIGN_MAX: Final = OPEN_MAX // 8
"""How many of them users who are neither root nor the one who mounted may have together, and each."""


class KnownInTransaction(KnownDirectories):
    """Which nodes have been directories, as a transaction knows it: what the mount knows, and what
    the transaction changed of it, which becomes the mount's knowledge when it is committed."""

    def __init__(self, base: KnownDirectories) -> None:
        super().__init__()
        self._base = base
        self._forgotten: set[bytes] = set()

    def get(self, path: bytes) -> bool | None:
        if path in self._forgotten:
            return None
        own = super().get(path)
        return own if own is not None else self._base.get(path)

    def _remember(self, path: bytes, with_value: bool) -> None:
        known = self.get(path)
        if known is None or known < with_value:
            self._forgotten.discard(path)
            super()._remember(path, with_value)

    def discard(self, path: bytes) -> None:
        super().discard(path)
        if self._base.get(path) is not None:
            self._forgotten.add(path)

    def discard_value(self, path: bytes) -> None:
        if self.get(path):
            self._paths[path] = False

    def move(self, source: bytes, target: bytes) -> None:
        for path in self._base.below(source):
            if path not in self._paths and path not in self._forgotten:
                self._paths[path] = self._base.has_value(path)
        moved = self.below(source)
        super().move(source, target)
        for path in moved:
            self.discard(path)

    def committed(self) -> None:
        """It has become true: the mount knows it from now on."""
        for path in self._forgotten:
            self._base.discard(path)
        for path, with_value in self._paths.items():
            self._base.discard_value(path)
            self._base.add(path, with_value=with_value)


class SharedTransaction(Session):
    """One transaction, as all who work in its directory share it."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.lock = trio.Lock()
        self._used_at = trio.current_time()

    @property
    def used_at(self) -> float:
        """When it was last used: now, while something is under way."""
        return trio.current_time() if self.lock.locked() else self._used_at

    @property
    def payload_max(self) -> int:
        return self.transaction.payload_max

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[Transaction]:
        """The transaction, with nobody else's request in between."""
        async with self.lock:
            try:
                yield self.transaction
            finally:
                self._used_at = trio.current_time()

    async def burst(
        self, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None
    ) -> list[Reply]:
        async with self.alone() as transaction:
            return await transaction.burst(requests, meanwhile)


class TransactionView(View):
    """The tree as one transaction sees it."""

    known: KnownInTransaction
    session: SharedTransaction

    def __init__(self, outer: View, transaction: Transaction, number: int) -> None:
        """`number`: which of all that the mount has begun."""
        known = KnownInTransaction(outer.known)
        super().__init__(outer.store, outer.domid, outer.root, outer.content, known)
        self.number = number
        self.session = SharedTransaction(transaction)
        self.started = datetime.now(UTC)

    async def atomically(self, work: Work) -> None:
        """Run `work` in this very transaction: there are none within transactions, and what it has
        done stays done where it raises in the middle."""
        async with self.session.alone() as transaction:
            last = await work(transaction)
            if last is not None:
                await transaction.call(last)

    async def atomically_apart(self, work: Work) -> None:
        await self.atomically(work)

    def report(self) -> bytes:
        """What `.control` says."""
        idle = trio.current_time() - self.session.used_at
        state = "open" if self.session.transaction.open else "lost"
        return (
            f"started {self.started.isoformat(timespec='seconds')}\n"
            f"idle {math.floor(idle)}\n"
            f"operations {self.session.transaction.requests}\n"
            f"state {state}\n"
        ).encode()


class Transactions:
    """See the module's text.

    nursery     where the tasks run that wait for the ends
    """

    def __init__(self, nursery: trio.Nursery, outer: View, idle_seconds: float) -> None:
        self._nursery = nursery
        self._outer = outer
        self._idle_seconds = idle_seconds
        self._views: dict[bytes, TransactionView | None] = {}
        self._callers: dict[bytes, Caller] = {}
        self._begun = 0

    def names(self) -> list[bytes]:
        return [name for name in self._views if self.get(name) is not None]

    def get(self, name: bytes) -> TransactionView | None:
        """The open transaction of this name."""
        view = self._views.get(name)
        return None if view is None or view.ended else view

    async def begin(self, name: bytes, caller: Caller) -> None:
        """Start one."""
        if name in self._views:
            refuse(errno.EEXIST)
        if self._full_for(caller):
            refuse(errno.ENOSPC)
        self._views[name] = None
        self._callers[name] = caller
        try:
            transaction = await self._outer.begin()
        except BaseException:
            self._remove(name)
            raise
        self._begun += 1
        view = self._views[name] = TransactionView(self._outer, transaction, self._begun)
        self._nursery.start_soon(self._await_end, name, view)

    def _full_for(self, caller: Caller) -> bool:
        if len(self._views) >= OPEN_MAX:
            return True
        if not caller.foreign:
            return False
        uids = [each.uid for each in self._callers.values() if each.foreign]
        return len(uids) >= FOREIGN_MAX or uids.count(caller.uid) >= EACH_FOREIGN_MAX

    def _remove(self, name: bytes) -> None:
        del self._views[name]
        del self._callers[name]

    async def commit(self, name: bytes, view: TransactionView) -> None:
        """Make it all true at once.  XenstoreError `EAGAIN` is a conflict.

        It is over whatever comes of it.  FUSEError EIO where nobody knows what did.
        """
        async with self._ending(name, view):
            try:
                await view.session.transaction.commit()
            except (ConnectionLost, RequestTimeout) as error:
                log.error("whether transaction %s was committed is unknown: %s", _text(name), error)
                refuse(errno.EIO)
            view.known.committed()

    async def roll_back(self, name: bytes, view: TransactionView) -> None:
        """Undo it all."""
        async with self._ending(name, view):
            try:
                await view.session.transaction.rollback()
            except StoreError as error:
                # The end of the connection undoes it, too.
                log.info("transaction %s is rolled back by hanging up: %s", _text(name), error)

    @asynccontextmanager
    async def _ending(self, name: bytes, view: TransactionView) -> AsyncIterator[None]:
        """Whoever ends a transaction does so within this, after all that came before."""
        async with view.session.lock:
            if view.ended:
                raise TransactionEnded("the transaction has ended")
            view.end()
        # From here on everybody else is turned away.
        try:
            yield
        finally:
            self._outer.store.abandon(view.session.transaction)
            self._remove(name)

    async def _await_end(self, name: bytes, view: TransactionView) -> None:
        """Wait until it has ended, or must: it lies idle, or its connection is gone."""
        while (until := view.session.used_at + self._idle_seconds) > trio.current_time():
            with trio.move_on_at(until):
                await view.session.transaction.disconnected()
                break
        if view.ended:
            return
        open_still = view.session.transaction.open
        why = f"was not used for {self._idle_seconds:g} s" if open_still else "lost its connection"
        log.warning("transaction %s %s, and is rolled back", _text(name), why)
        with suppress(TransactionEnded):  # somebody else came first
            await self.roll_back(name, view)


def _text(name: bytes) -> str:
    return name.decode("ascii")
