"""The live mirror: a copy of a tree as plain files, kept true by one watch.

Why the copy is exact whenever the store is at rest:

An event says that something changed at a path or below it.  It does not say what, and it comes for
less than everything: parents made implicitly have none, nor have the nodes below a removed one.  So
an event for P means to look again at P and at all that is shown below it (`Copy.again`); and where
P's parent is not shown, at the highest ancestor that is not.  Take any node N, and the last thing
that changed it:

- N itself was written, made, removed, or given permissions.  Its event came after the change, and we
  look after the event: what we see is the present N.
- N was made implicitly, as an ancestor of D.  D's event follows.  Had the mirror no N then, it looks at
  the highest missing ancestor, and from there into everything; likewise where N is shown even while it
  is not there (the root).  Had it one, of an earlier life, then that life ended by a removal at or
  above N whose event came before D's, and the look that this event caused was either before the
  removal's successor was made (then N was taken away, see above), or after (then N was looked at as
  it is).
- N went away with an ancestor A.  A's event came; A is gone, or made again: then its listing is
  compared with what is shown, and each child that is in both is looked at again.
- N's permissions changed, or it vanished, when a domain died: with no event in some daemons, or none
  but @releaseDomain's.  That one means to look again at everything.
- Events were lost: the backlog was full (the client then says "everything"), or the connection was
  lost.  Then there is no mirror until all has been copied anew.

Looks are applied by one task, one burst after the other in the order in which they were asked, so
that no reply is applied after a later one; an event that comes meanwhile waits, and its look follows.
(While a whole copy is made bursts overlap, on several connections, and may be answered in any order:
the events since its beginning wait until it is complete, and are looked at then.)  While that task
waits for something to do, a single changed file is looked at and shown by whoever tells of it, from
the question to the file without a break.  What a node that was looked at becomes does not depend on
when the other nodes of the burst were: where its parent is not as it should be, the parent is looked at
first (xsfs/mirror/reconcile.py).

Whether a node is a file or a directory depends on its value, its children, and on what the mount knows
(`KnownDirectories`), which tells us of each change.  A node whose last shown child goes is looked at
again, since it may be a file now.

What a guest may not be told cannot be followed: the nodes of others that vanish without an event, if
they lie in its tree.

A look serves all who wanted it before it was asked for.  So events that came together are gone through
from the top down, and a node that has one is left out of what must only be looked at again: what is
below several changed nodes is looked at once.  Of two in one burst the one above is asked for first:
what it wants of the other, the other's answer tells.

Nothing is done while the store rests.  Under load the mirror rests as long as it works
(xsfs/mirror/pace.py).  And after each burst of what events tell of comes one, of twice the length, of
what must only be looked at again, a quarter of them those that have waited longest: so that neither
waits for the other's end, nor anything for ever.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Final

import trio

from xsfs.mirror.pace import Pace
from xsfs.mirror.reconcile import Copy
from xsfs.mirror.staging import MirrorDirectory, Steps
from xsfs.mirror.windows import WINDOW, WINDOWS_AHEAD, Windows, full_window, next_window
from xsfs.view.view import Sight, View
from xsfs.xenstore import protocol
from xsfs.xenstore.background import open_servants
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout, StoreError
from xsfs.xenstore.store import Store
from xsfs.xenstore.watches import Subscription

log = logging.getLogger(__name__)

BREAK_SECONDS: Final = 20e-6
"""How far apart events must come to be looked at one by one.  Those that come together merge."""

SLICE_SECONDS: Final = 0.001
"""How long files are changed before other tasks have their turn."""

RECEIVE_SECONDS: Final = 0.0003
"""How long until replies to what is asked ahead are taken: a socket has room for some 140 of them from
xenstored, which then sleeps until most of that is free again."""

EVENTS_MAX: Final = 16384
"""How many paths may wait to be looked at.  Past it everything is."""

RETRY_FIRST: Final = 1.0
RETRY_MAX: Final = 60.0
"""Seconds until a copy that failed (the disk is full, the store answers nonsense) is tried again."""

RELEASE: Final = b"@releaseDomain"


class _Lost(ConnectionLost):
    """Events may have been missed: the copy can't be true any more."""


class Mirror:
    """See the module's text.  `run` must be running.

    store       a store of its own, so that its bursts hold up nobody else's requests
    view        the tree that is copied, over that store
    files       where the copy is
    """

    def __init__(self, store: Store, view: View, files: MirrorDirectory) -> None:
        self.store = store
        self._watches = store.watches
        self._view = view
        self._files = files
        self._copy = Copy(view, files)
        self._events: OrderedDict[bytes, None] = OrderedDict()
        """Nodes that events told of, to be looked at and renewed."""
        self._changes = Subscription(view.root, self._wake, EVENTS_MAX)
        self._releases = Subscription(RELEASE, self._wake)
        self._heard: set[Subscription] = set()
        """Those of the two whose first event has come since they were set."""
        self._in_sight: set[bytes] = set()
        """Nodes being looked at: what they become depends on what is known of them afterwards."""
        self._work = trio.lowlevel.ParkingLot()
        self._pace = Pace()
        self._true_of: int | None = None
        """The count of interruptions that the published copy is of."""
        self.looks = 0
        """How often a node was looked at."""
        view.asks_perms = view.asks_perms or files.has_perms

    @property
    def true(self) -> bool:
        """Whether the copy is there, and follows the store."""
        return self._true_of == self._interruptions

    @property
    def directory(self) -> bytes:
        return self._files.directory

    @property
    def nodes(self) -> int:
        """How many nodes are in the copy while it is true."""
        return self._copy.nodes if self.true else 0

    def _wake(self) -> None:
        if self._work and self._show_at_once():
            return
        self._pace.told = True
        self._work.unpark_all()

    # ----------------------------------------------------------------------------------- life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the mirror for as long as it runs; started when the first copy is complete.

        Raises StoreError, OSError if there can be none from the start, never later.
        """
        self._view.known.on_change = self._known_changed
        try:
            await self._watches.subscribe(self._changes)
            await self._watches.subscribe(self._releases)
            with trio.move_on_after(self.store.timeout):
                await self._armed()
            if len(self._heard) < 2:
                raise RequestTimeout("the store has set a watch, but sends no events")
            await self._make()
            task_status.started()
            await self._live()
        finally:
            self._true_of = None
            self._view.known.on_change = None
            self._watches.drop(self._changes)
            self._watches.drop(self._releases)

    @property
    def _interruptions(self) -> int:
        return self._changes.interruptions + self._releases.interruptions

    async def _live(self) -> None:
        delay = 0.0
        while True:
            try:
                if self._true_of is None:
                    await self._make()
                    log.info("the mirror is back: %d nodes", self.nodes)
                    delay = 0.0
                await self._follow()
            except _Lost:
                delay = 0.0
                log.warning("the mirror is gone until Xenstore is back")
            except RequestTimeout as error:
                # Each try has its time limit anyway, or is none during an outage.
                delay = RETRY_FIRST
                if error.asked:
                    log.error("the mirror is gone: %s", error)
            except (StoreError, OSError) as error:
                delay = min(2 * delay or RETRY_FIRST, RETRY_MAX)
                log.error("the mirror is gone, and tried again in %g s: %s", delay, error)
            except Exception:
                delay = RETRY_MAX
                log.exception("the mirror is gone, and tried again in %g s", delay)
            await self._withdraw()
            await trio.sleep(delay)

    async def _withdraw(self) -> None:
        self._true_of = None
        try:
            await self._carry_out(self._files.clear())
        except OSError:
            log.exception("the mirror's files could not be removed")

    async def _make(self) -> None:
        """Make a whole copy, and show it when it is complete."""
        await self._armed()
        interruptions = self._interruptions
        self._events.clear()
        self._in_sight.clear()
        self._files.begin()
        self._copy.begin()
        await self._look_at_all()
        if self._interruptions != interruptions:
            raise _Lost("the connection was lost while the copy was made")
        await self._carry_out(self._copy.publish())
        self._true_of = interruptions

    async def _look_at_all(self) -> None:
        """Look at the next nodes while the files of the last are made: the store is another process."""

        def survey(paths: Sequence[bytes], store: Store) -> Awaitable[list[Sight]]:
            return self._survey(paths, store=store)

        async with self.store.beside(WINDOWS_AHEAD - 1) as others, open_servants() as servants:
            windows = Windows(self._copy.again, (self.store, *others), survey, servants)
            while (seen := await windows.next()) is not None:
                await self._apply(*seen, renew=False, meanwhile=windows.receive)

    async def _armed(self) -> None:
        """Return when both watches are set at the store, and have said so."""
        while True:
            for subscription in (self._changes, self._releases):
                if not self._watches.armed(subscription):
                    self._heard.discard(subscription)
                elif subscription.take():
                    self._heard.add(subscription)
            if len(self._heard) == 2:
                return
            await self._work.park()

    # --------------------------------------------------------------------------------- follow

    async def _follow(self) -> None:
        again, pace = self._copy.again, self._pace
        while True:
            if not self.true:
                raise _Lost("the connection was lost")
            self._take_events()
            if not (self._events or again):
                self._files.rest()
                pace.begin_wait()
                await self._work.park()
                pace.has_waited()
                continue
            pace.begin_work()
            if self._events:
                await self._look_at_changed()
            # Even while there are always events, and most often more than those have left here.
            if paths := next_window(again, self._events, size=2 * WINDOW, fair=True):
                await self._apply(paths, await self._survey(paths), renew=False)
            pace.end_work()
            if pace.is_tired:
                await pace.rest()

    def _show_at_once(self) -> bool:
        """While the task is parked: look at what has changed, and show it, if it is one file that was
        there, and the store answers within a moment.  Whether that is all that there is to do."""
        path = self._changes.only()
        if path is None or not self.true:
            return False
        waited = self._pace.has_waited()
        if waited < BREAK_SECONDS or self._pace.is_tired:
            return False
        if not self._is_inside(path):
            return False
        self._pace.begin_work()
        self._in_sight.add(path)  # or what is learned now would wake the task
        try:
            if not self._copy.shows_file(path):
                return False
            sight = self._view.glance(path, partial(self._copy.make_ready, path))
            if sight is None or not self._copy.is_one_file(path, sight):
                return False
            for _ in self._copy.apply(path, sight, renew=True):
                pass
            self._files.rest()
        except Exception:
            return False  # the task meets it, too, and tells
        finally:
            self._in_sight.discard(path)
            self._pace.end_work()
            self._pace.begin_wait()
        self.looks += 1
        self._changes.take()
        return not self._copy.again

    async def _look_at_changed(self) -> None:
        if len(self._events) > 1:
            paths = full_window(self._events, self._copy.within_reach)
            sights = await self._survey(paths, self._files.expect)
            await self._apply(paths, sights, renew=True)
            return
        # One is asked for at once: whether it can be shown is found out meanwhile.
        paths = [path] = next_window(self._events)
        sights = await self._survey(paths, partial(self._copy.make_ready, path))
        if self._copy.is_ready(path):
            await self._apply(paths, sights, renew=True)
        self._in_sight.discard(path)

    def _take_events(self) -> None:
        self._pace.told = False
        if not self._events:
            inside = filter(self._is_inside, self._changes.take())
            # The top is the last.
            self._events = OrderedDict.fromkeys(sorted(inside, key=len, reverse=True))
        if self._releases.take():
            self._copy.all_again = True
        if self._copy.all_again and not self._copy.again:
            # Not earlier: domains may die faster than everything is looked at.
            self._copy.all_again = False
            self._copy.again[self._view.root] = None

    def _is_inside(self, path: bytes) -> bool:
        """Whether an event's path is one of the tree: a broken store may send any."""
        root = self._view.root
        if path != root and not path.startswith(root if root == b"/" else root + b"/"):
            return False
        if root == b"/" and path.startswith(b"/@"):
            return False  # as in a listing (names.is_shown)
        try:
            protocol.check_path(path)
        except ValueError:
            return False
        return True

    def _known_changed(self, path: bytes) -> None:
        """The mount has learned, or forgotten, that a node is a directory."""
        if path not in self._in_sight and self._is_inside(path) and self._copy.contradicts(path):
            self._copy.again[path] = None
            self._wake()

    async def _survey(
        self,
        paths: Sequence[bytes],
        meanwhile: Callable[[], None] | None = None,
        *,
        store: Store | None = None,
    ) -> list[Sight]:
        """Look at nodes.  `meanwhile`: as in Session.burst.  `store`: another one to ask."""
        self._in_sight.update(paths)
        try:
            sights = await self._view.survey(paths, meanwhile, store)
        except protocol.WireError as error:
            (store or self.store).distrust(str(error))
            raise ConnectionLost(f"the store answers nonsense: {error}") from error
        self.looks += len(paths)
        return sights

    async def _apply(
        self,
        paths: Sequence[bytes],
        sights: Sequence[Sight],
        *,
        renew: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Show what was seen of nodes.  `meanwhile`: called now and then."""
        self._in_sight.difference_update(paths)
        steps = (
            step
            for path, sight in zip(paths, sights, strict=True)
            for step in self._copy.apply(path, sight, renew=renew)
        )
        await self._carry_out(steps, meanwhile)

    async def _carry_out(self, steps: Steps, meanwhile: Callable[[], None] | None = None) -> None:
        """Change files, with a turn for other tasks after each slice."""
        with closing(steps):
            since = received = time.perf_counter()
            for _ in steps:
                now = time.perf_counter()
                if now - since > SLICE_SECONDS:
                    await trio.lowlevel.checkpoint()
                    since = received = time.perf_counter()
                elif meanwhile is not None and now - received > RECEIVE_SECONDS:
                    meanwhile()
                    received = time.perf_counter()
