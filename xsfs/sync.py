"""The client for programs without trio: the operations of `xsfs.Store` as plain functions that block.

`open_store` starts a thread, in which trio runs an `xsfs.Store`.  A `_Portal` runs each operation there while
the calling thread waits.  Any thread may call, and several at once.  When the block of `open_store` ends, so
does the thread, and the operations of other threads raise ConnectionLost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from functools import partial, wraps
from threading import Thread
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import trio

from xsfs.xenstore import store as asynchronous
from xsfs.xenstore.commands import Commands, Path, WalkedNode, encode_path
from xsfs.xenstore.errors import DEFAULT_TIMEOUT, ConnectionLost
from xsfs.xenstore.reconnect import Connect
from xsfs.xenstore.store import Store, Transaction
from xsfs.xenstore.watches import Subscription

P = ParamSpec("P")
Result = TypeVar("Result")
Client = TypeVar("Client", bound=Commands)


class _Portal:
    """Runs functions in the thread of trio, and waits for their results."""

    token: trio.lowlevel.TrioToken | None = None
    """None before trio runs."""

    def run(self, function: Callable[[], Awaitable[Result]]) -> Result:
        scope = trio.CancelScope()

        async def call() -> Result:
            with scope:
                return await function()
            raise ConnectionLost("the caller was interrupted")

        try:
            return trio.from_thread.run(call, trio_token=self.token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise ConnectionLost("the store was closed") from None
        except KeyboardInterrupt:
            # Nobody waits for the result any more, and a watch must not lose an event to it.
            self.run_soon(scope.cancel)
            raise

    def run_soon(self, function: Callable[[], object]) -> None:
        """Run a function that does not wait, if trio runs."""
        if self.token is not None:
            with suppress(trio.RunFinishedError):
                self.token.run_sync_soon(function)

    @contextmanager
    def entered(self, manager: AbstractAsyncContextManager[Result]) -> Iterator[Result]:
        """The context manager, entered and left in the thread of trio."""
        value = self.run(manager.__aenter__)
        try:
            yield value
        except BaseException as error:
            with suppress(ConnectionLost):  # closed: nothing is left of a watch or transaction
                self.run(partial(manager.__aexit__, type(error), error, error.__traceback__))
            raise
        else:
            self.run(partial(manager.__aexit__, None, None, None))


def _blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[SyncCommands[Any], P], Result]:
    """The method as one that blocks."""

    @wraps(method)
    def call(self: SyncCommands[Any], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        own: Callable[P, Awaitable[Result]] = getattr(self._commands, method.__name__)
        return self._portal.run(partial(own, *args, **kwargs))

    return call


class SyncCommands(Generic[Client]):
    """The operations of `SyncStore` and `SyncTransaction`, with the arguments and results of `xsfs.Store`."""

    def __init__(self, portal: _Portal, commands: Client) -> None:
        self._portal = portal
        self._commands = commands

    pipeline = _blocking(Commands.pipeline)
    call = _blocking(Commands.call)
    call_all = _blocking(Commands.call_all)
    read = _blocking(Commands.read)
    read_integer = _blocking(Commands.read_integer)
    write = _blocking(Commands.write)
    mkdir = _blocking(Commands.mkdir)
    delete = _blocking(Commands.delete)
    exists = _blocking(Commands.exists)
    list = _blocking(Commands.list)
    list_all = _blocking(Commands.list_all)
    get_perms = _blocking(Commands.get_perms)
    set_perms = _blocking(Commands.set_perms)
    domid = _blocking(Commands.domid)
    get_domain_path = _blocking(Commands.get_domain_path)
    is_domain_introduced = _blocking(Commands.is_domain_introduced)
    introduce = _blocking(Commands.introduce)
    release = _blocking(Commands.release)
    resume = _blocking(Commands.resume)
    set_target = _blocking(Commands.set_target)

    def walk(self, path: Path) -> Iterator[WalkedNode]:
        """As `xsfs.Store.walk`."""
        windows = self._commands.walk_in_windows(path)
        while nodes := self._portal.run(partial(anext, windows, None)):
            yield from nodes


class SyncTransaction(SyncCommands[Transaction]):
    """A transaction.  Made by `SyncStore.transaction` and `SyncStore.atomically`."""

    commit = _blocking(Transaction.commit)
    rollback = _blocking(Transaction.rollback)


class SyncWatch:
    """The events of one or more nodes and all below them.  Iterate over it, or use `wait`."""

    def __init__(self, portal: _Portal, timeout: float | None) -> None:
        self._portal = portal
        self._subscriptions: deque[Subscription] = deque()
        self._arrived = trio.lowlevel.ParkingLot()
        self.timeout = timeout

    def wait(self, timeout: float | None = None) -> bytes | None:
        """The path of the next change.

        None if no event came within `timeout` seconds, or if the block of the watch has ended.
        """
        return self._portal.run(partial(self._next, math.inf if timeout is None else timeout))

    def __iter__(self) -> Iterator[bytes]:
        while (path := self.wait(self.timeout)) is not None:
            yield path

    async def _next(self, seconds: float) -> bytes | None:
        with trio.move_on_after(seconds):
            while not any(self._subscriptions):
                if any(subscription.ended for subscription in self._subscriptions):
                    return None
                await self._arrived.park()
        self._subscriptions.rotate(-1)  # each comes first in turn
        ready = next(filter(None, self._subscriptions), None)
        return None if ready is None else await anext(ready)


class SyncStore(SyncCommands[Store]):
    """Xenstore as it is.  Made by `xsfs.sync.open_store`."""

    @contextmanager
    def transaction(self) -> Iterator[SyncTransaction]:
        """As `xsfs.Store.transaction`."""
        with self._portal.entered(self._commands.transaction()) as transaction:
            yield SyncTransaction(self._portal, transaction)

    def atomically(self, work: Callable[[SyncTransaction], Result]) -> Result:
        """Run `work` in a transaction and commit it, again and again while it conflicts.

        As `xsfs.Store.atomically`.  `work` runs in a thread of its own.
        """

        async def work_in_thread(transaction: Transaction) -> Result:
            own = SyncTransaction(self._portal, transaction)
            return await trio.to_thread.run_sync(work, own)

        return self._portal.run(partial(self._commands.atomically, work_in_thread))

    @contextmanager
    def watch(self, *paths: Path, timeout: float | None = None) -> Iterator[SyncWatch]:
        """The events of nodes and all below them, while the block runs.

        timeout     the seconds without an event after which an iteration ends; None if it never ends

        The first event of each node comes immediately.  An event is the path of the changed node, in the form
        (absolute, relative) in which the path of the watched node is given.
        """
        events = SyncWatch(self._portal, timeout)
        alert = events._arrived.unpark_all
        with ExitStack() as stack:
            for path in paths:
                watching = self._commands.watches.watching(encode_path(path), alert)
                subscription = stack.enter_context(self._portal.entered(watching))
                events._subscriptions.append(subscription)
            yield events


@contextmanager
def open_store(
    path: str | None = None, *, timeout: float = DEFAULT_TIMEOUT, connect: Connect | None = None
) -> Iterator[SyncStore]:
    """A store, connected and answering.  `xsfs.open_store` has the arguments and the errors."""
    portal = _Portal()
    opened: Future[Store] = Future()
    scope = trio.CancelScope()

    async def serve() -> None:
        portal.token = trio.lowlevel.current_trio_token()
        if not opened.set_running_or_notify_cancel():
            return
        with scope:
            async with asynchronous.open_store(path, timeout=timeout, connect=connect) as store:
                opened.set_result(store)
                await trio.sleep_forever()

    def run() -> None:
        try:
            trio.run(serve)
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)

    # A daemon thread: a program that leaves the block without ending it can still end.
    thread = Thread(target=run, name="xsfs", daemon=True)
    try:
        thread.start()
        yield SyncStore(portal, opened.result())
    finally:
        opened.cancel()  # if Ctrl-C came before trio runs
        portal.run_soon(scope.cancel)
        if thread.is_alive():
            thread.join()
