"""The live mirror: two watches, a work queue and one task, which keep a copy of a tree as plain files.

`Mirror` owns subscriptions to two watches, the tree's and @releaseDomain's, and the work queue.  Each node
stands in the queue once.  Only the task `run` takes nodes from it and changes files.  Other tasks wake that
task, and queue a node when the mount learns that it is a directory.

Why the copy is exact whenever the store is at rest:

An event says that something changed at a path or below it.  So the task fetches that node, makes its file
or directory agree with the reply, and queues all children.  If a node's parent is not in the mirror, the
task queues the highest missing ancestor instead, from which the way down leads to the node.  Each fetch
begins after the task has taken the event, and the task applies replies in the order of the fetches.  Take
any node N and its last change:

- A client wrote N, made it, removed it or set its permissions.  The event came after the change, and the
  fetch after the event.
- The store made N implicitly, as an ancestor of D.  D's event follows.  If N is missing in the mirror, or
  shown without a node, the task fetches N on the way down to D.  If an older N is still shown, the event of
  its removal, at N or above, precedes D's.  That event caused a fetch, after which the task removed N, or
  showed the new N.
- N vanished with an ancestor A.  A's event follows.  If the task finds no A, it removes all files below.
  If it finds a new A, it removes the files of children that A does not list, and fetches the others.
- A domain died, and N vanished or lost permissions.  Some daemons send no event for N, but all send
  @releaseDomain.  xapi's oxenstored names the domain, and then the task queues the nodes whose
  permissions in the mirror name it.  Otherwise the task queues the root, and everything below follows.
- Events were lost.  If the backlog was full, the client reports an event of the root instead.  If the
  connection was lost, the task removes the copy and makes another one.

While the task makes a whole copy, events wait.  Whether a node is a file or a directory also depends on
the sticky directories, which report each change to `_sticky_changed`.  The mirror cannot follow changes
that the store does not report: a guest does not learn that nodes of others vanish from its tree.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from typing import Final

import trio

from xsfs.mirror.reconcile import GONE, FetchedNode, Reconciler, WorkQueue
from xsfs.mirror.staging import MirrorDirectory, Steps
from xsfs.view.names import join, shown_names
from xsfs.view.view import View, home_of, interpret, requests_for
from xsfs.xenstore.background import BackgroundCall, open_background
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError, XenstoreError
from xsfs.xenstore.protocol import WireError, check_path, encode_names
from xsfs.xenstore.store import Store
from xsfs.xenstore.watches import Subscription

log = logging.getLogger(__name__)

BATCH: Final = 64
"""How many nodes one pipeline fetches."""

FETCHES_MAX: Final = 16
"""How many batches are under way while the task makes a whole copy: to make their files takes longer than a
round trip to another host."""

QUEUE_MAX: Final = 16384
"""How long the work queue may be before events wait in their subscription, whose backlog is bounded."""

SLICE_SECONDS: Final = 0.001
"""How long the task changes files before other tasks have their turn."""

UNRESTED_SECONDS: Final = 0.005
"""How long the task changes files before it sleeps for as long.  A sleep takes a millisecond longer than
asked for."""

RETRY_FIRST: Final = 1.0
RETRY_MAX: Final = 60.0
"""Seconds until xsfs tries again to make a copy (the disk is full, the store answers nonsense)."""

LEFT_OUT_MAX: Final = 100
"""Of how many nodes the log says that the copy lacks them."""

RELEASE: Final = b"@releaseDomain"

_COSTS_THE_NODE: Final = frozenset((errno.ENAMETOOLONG, errno.EMLINK, errno.EILSEQ, errno.EINVAL))
"""Errors of a file system that cannot hold a node which another one could hold."""


class Mirror:
    """See the module's text.  `run` must be running.

    store       a store of its own, so that its pipelines delay nobody else's requests
    view        the tree that is copied, over that store
    files       where the copy is
    """

    def __init__(self, store: Store, view: View, files: MirrorDirectory) -> None:
        self.store = store
        self._view = view
        self._files = files
        self._queue: WorkQueue = OrderedDict()
        self._reconciler = Reconciler(view, files, self._queue)
        self._changes = Subscription(view.root, self._wake)
        self._domain_ends = Subscription(RELEASE, self._wake, depth=1)
        self._heard: set[Subscription] = set()
        """Those of the two whose first event has come since they were set."""
        self._idle = trio.lowlevel.ParkingLot()
        self._unrested = 0.0
        """For how many seconds the task has changed files and not slept."""
        self._left_out: set[bytes] = set()
        """Nodes that make no sense, of which the log has told."""
        self._domid = view.domid
        """The domid of the next copy."""
        self._copy_of: int | None = None
        """The count of interruptions when the published copy was made."""
        self.fetched = 0
        """How many nodes were fetched since the start."""
        view.asks_perms = view.asks_perms or files.has_perms

    @property
    def is_current(self) -> bool:
        """Whether the copy is complete, and follows the store."""
        return self._copy_of == self._interruptions

    @property
    def directory(self) -> bytes:
        return os.fsencode(self._files.directory)

    @property
    def nodes(self) -> int:
        """How many nodes are in the copy while it is current."""
        return self._reconciler.nodes if self.is_current else 0

    def move_home(self, domid: int) -> None:
        """The domain has got another domid.  The copy of its old home goes, and another one is made."""
        self._domid = domid
        self.store.watches.move(self._view.home, home_of(domid))

    def _wake(self) -> None:
        self._idle.unpark_all()

    # ----------------------------------------------------------------------------------- life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the mirror for as long as it runs; started when the first copy is complete.

        Raises StoreError, OSError if the first copy cannot be made, never later.
        """
        self._view.sticky.on_change = self._sticky_changed
        try:
            await self.store.watches.subscribe(self._changes)
            await self.store.watches.subscribe(self._domain_ends)
            with trio.move_on_after(self.store.timeout):
                await self._wait_until_armed()
            if len(self._heard) < 2:
                raise RequestTimeout("the store has set a watch, but sends no events")
            await self._make()
            task_status.started()
            await self._live()
        finally:
            self._copy_of = None
            self._view.sticky.on_change = None
            self.store.watches.drop(self._changes)
            self.store.watches.drop(self._domain_ends)

    @property
    def _interruptions(self) -> int:
        return self._changes.interruptions + self._domain_ends.interruptions

    async def _live(self) -> None:
        delay = 0.0
        while True:
            try:
                if self._copy_of is None:
                    await self._make()
                    log.info("the mirror is back: %d nodes", self.nodes)
                delay = 0.0
                await self._follow()
                log.warning("the mirror is gone until Xenstore is back")
            except RequestTimeout as error:
                # Each try has its time limit anyway, or sends nothing during an outage.
                delay = RETRY_FIRST
                if not error.during_outage:
                    log.error("the mirror is gone: %s", error)
            except Exception as error:
                delay = min(2 * delay or RETRY_FIRST, RETRY_MAX)
                is_bug = not isinstance(error, OSError)
                text = "the mirror is gone, xsfs retries in %g s: %s"
                log.error(text, delay, error, exc_info=is_bug)
            self._copy_of = None
            with suppress(OSError):  # `_make` clears, too
                await self._carry_out(self._files.clear())
            await trio.sleep(delay)

    async def _make(self) -> None:
        """Make a whole copy, and show it when it is complete."""
        await self._wait_until_armed()
        interruptions = self._interruptions
        self._left_out.clear()
        if self._domid != self._view.domid:
            self._view.move_home(self._domid)
            self.store.home.move(self._view.home)
        await self._carry_out(self._files.clear())
        self._reconciler.begin()
        await self._copy_all()
        if self._interruptions != interruptions:
            raise ConnectionLost("the connection was lost while the copy was made")
        await self._carry_out(self._files.publish())
        self._copy_of = interruptions

    async def _copy_all(self) -> None:
        """Work until the queue is empty.  The store is another process: it replies to the next pipeline
        while the files of the last one are made."""
        async with open_background() as background:
            fetches: deque[tuple[WorkQueue, BackgroundCall[list[FetchedNode]]]] = deque()
            while True:
                while len(fetches) < FETCHES_MAX and (batch := self._next_batch()):
                    call = BackgroundCall(background, partial(self._fetch, batch))
                    fetches.append((batch, call))
                if not fetches:
                    return
                batch, call = fetches.popleft()
                await self._carry_out(self._apply(batch, await call.result()))

    async def _wait_until_armed(self) -> None:
        """Return when both watches are set at the store, and their first events have come."""
        while True:
            for subscription in (self._changes, self._domain_ends):
                if not self.store.watches.is_armed(subscription):
                    self._heard.discard(subscription)
                elif subscription.take():
                    self._heard.add(subscription)
            if len(self._heard) == 2:
                return
            await self._idle.park()

    # --------------------------------------------------------------------------------- follow

    async def _follow(self) -> None:
        """Return when events may have been missed, so that the copy may be wrong."""
        while self.is_current:
            await self._take_events()
            if self._queue:
                await self._work()
                await self._rest()
            else:
                self._files.close_directories()
                parked = time.monotonic()
                await self._idle.park()
                self._unrested = max(0.0, self._unrested - (time.monotonic() - parked))

    async def _rest(self) -> None:
        """Sleep as long as the task has changed files: events merge meanwhile."""
        if self._unrested > UNRESTED_SECONDS:
            await trio.sleep(self._unrested)
            self._unrested = 0.0

    async def _take_events(self) -> None:
        if len(self._queue) < QUEUE_MAX:
            # Parents first: what is below them they queue themselves.
            events = sorted(self._changes.take(), key=len)
            self._queue.update(dict.fromkeys(events, True))
        if released := self._domain_ends.take():
            domids = {path[len(RELEASE) + 1 :] for path in released}
            if b"" not in domids and self._files.has_perms:
                with suppress(OSError):  # the files' owner may change them
                    await self._carry_out(self._reconciler.queue_nodes_of(domids))
                    return
            self._queue.setdefault(self._view.root, False)

    def _sticky_changed(self, path: bytes) -> None:
        """The mount has learned, or forgotten, that a node is a directory."""
        if self._is_inside(path):
            try:
                is_doubtful = self._reconciler.contradicts(path)
            except (
                OSError
            ):  # the task meets it, too, and the operation that changed this must not fail
                is_doubtful = True
            if is_doubtful:
                self._queue.setdefault(path, False)
            self._wake()  # so that the task closes the directories that were opened for that

    def _is_inside(self, path: bytes) -> bool:
        """Whether the path of an event is in the tree: a broken store may send any."""
        root = self._view.root
        if not (path + b"/").startswith(join(root, b"")):
            return False
        if root == b"/" and path.startswith(b"/@"):
            return False  # as in a listing (names.is_shown)
        try:
            check_path(path)
        except ValueError:
            return False
        return True

    # ----------------------------------------------------------------------------------- work

    async def _work(self) -> None:
        """Fetch the next nodes, and make the files agree with them."""
        # The time of this thread alone: other processes may take some meanwhile.
        began = time.thread_time()
        batch = self._next_batch()
        self._unrested += time.thread_time() - began
        nodes = await self._fetch(batch)  # a checkpoint, even if there is nothing to fetch
        began = time.thread_time()
        await self._carry_out(self._apply(batch, nodes))
        self._unrested += time.thread_time() - began

    def _next_batch(self) -> WorkQueue:
        """The nodes that one pipeline fetches."""
        batch: WorkQueue = OrderedDict()
        until = time.perf_counter() + SLICE_SECONDS
        while self._queue and len(batch) < BATCH:
            path, renew = self._queue.popitem(last=False)
            if not renew or (self._is_inside(path) and self._reconciler.is_within_reach(path)):
                batch[path] = renew
            if time.perf_counter() > until:
                break
        return batch

    def _apply(self, batch: WorkQueue, nodes: Sequence[FetchedNode]) -> Steps:
        for (path, renew), node in zip(batch.items(), nodes, strict=True):
            if node.state is not None and node.state.has_children:
                # This may call `_sticky_changed`, which queues the node.  `apply` takes it out again.
                self._view.sticky.add(path)
            try:
                yield from self._reconciler.apply(path, node, renew=renew)
            except OSError as error:
                if error.errno not in _COSTS_THE_NODE:
                    raise
                self._leave_out(path, error)
            yield b""

    async def _carry_out(self, steps: Steps) -> None:
        """Change files, with a turn for other tasks after each slice."""
        since = time.perf_counter()
        with closing(steps):
            for _ in steps:
                if time.perf_counter() - since > SLICE_SECONDS:
                    await trio.lowlevel.checkpoint()
                    since = time.perf_counter()

    async def _fetch(self, paths: Collection[bytes]) -> list[FetchedNode]:
        """All about some nodes, by one pipeline; listings too long for a reply take more.

        A node that makes no sense counts as missing, unless it is the root: that raises StoreError.
        """
        perms = self._view.asks_perms
        requests = [request for path in paths for request in requests_for(path, perms=perms)]
        replies = iter(await self.store.pipeline(requests))
        nodes = []
        for path in paths:
            try:
                node = await self._interpret(path, *islice(replies, 3 if perms else 2))
            except (XenstoreError, WireError) as error:
                if path == self._view.root:
                    raise StoreError(f"the root makes no sense: {error}") from error
                self._leave_out(path, error)
                node = GONE
            nodes.append(node)
        self.fetched += len(paths)
        return nodes

    async def _interpret(
        self, path: bytes, value: Reply, listing: Reply, perms: Reply = b""
    ) -> FetchedNode:
        """The node, according to the replies."""
        # Domain 0 may do everything, whatever a guest has made of the permissions.
        domid = self._view.domid
        state = interpret(value, listing, perms if domid else None, domid)
        if state is None:
            return GONE
        names: Sequence[bytes] = ()
        if state.has_children:
            if not isinstance(listing, bytes):
                # Too many for one reply.
                try:
                    listing = encode_names(await self.store.list(path))
                except XenstoreError as error:
                    if error.name in ("ENOENT", "EACCES"):
                        return GONE  # since its value was read
                    raise
            names = shown_names(path, listing)
        return FetchedNode(state, names, perms if isinstance(perms, bytes) else b"")

    def _leave_out(self, path: bytes, error: Exception) -> None:
        if path not in self._left_out and len(self._left_out) < LEFT_OUT_MAX:
            self._left_out.add(path)
            log.error("left out of the mirror: %r: %s", path[:200], error)
