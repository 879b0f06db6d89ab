"""Watch files: a read of `.watch` blocks until something changes at or below its directory.

A `WatchHandle` owns a subscription for each path that it watches, and the events that its reader has not
read yet.  The tasks of FUSE requests add and remove subscriptions, one at a time (`_changing`).  The task of
the watches' connection puts events, and never waits for a reader.

Invariants:

- Equal unread events are merged.  Past EVENTS_MAX, one event for each watched path replaces the backlog.
  It means "look at all of it again", so a slow reader misses nothing that is still true.
- Events are kept as the paths that came from the store, one object for all readers, until they are read.
- A read waits until there is an event, or until its reader has been signalled (waiting_readers.py): the
  kernel cannot even kill a process before its read is answered.
- A poll handle is kept until the next event, even if unread events exist: edge-triggered polling must report
  each event.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import select
from collections import OrderedDict
from typing import Final

import pyfuse3
import trio
from pyfuse3 import EntryAttributes

from xsfs.fs.nodes import Caller, Handle, refuse
from xsfs.fs.quotas import Share
from xsfs.fs.waiting_readers import Outcome, Reader
from xsfs.fs.xattrs import FileOfDirectory
from xsfs.view.names import NAME_MAX, file_name, join
from xsfs.xenstore import protocol
from xsfs.xenstore.errors import RequestTimeout, StoreError
from xsfs.xenstore.home import moved
from xsfs.xenstore.watches import EVENTS_MAX, Subscription

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 0.25, 0.4
"""How often xsfs looks whether a waiting reader has been signalled: a signal acts within half a second.  Many
readers that began together must not be looked at together."""

READERS_MAX: Final = 1024
"""How many watch files may be open.  A waiting read takes one of pyfuse3's tasks, and mount.py has pyfuse3
start more than these."""

WATCHES_MAX: Final = 1024
"""How many paths one file may watch.  Less than EVENTS_MAX, or a backlog could not be cut short."""

SPECIAL: Final = re.compile(rb"@(?:introduceDomain|releaseDomain)(?:/[0-9]{1,5})?")
"""Events that are no paths: of any domain, or of the one with this number.  Which of them it has, the
daemon decides."""


def line_of(path: bytes, base: bytes) -> bytes:
    """How the reader of a directory's watch file sees a path: relative to the directory if below it.

    Guests choose names.  A name that begins with `-`, as options do, or with `@`, as special events do,
    gets `./` in front.
    """
    if path == base:
        return b"."
    try:
        protocol.check_path(path)
    except ValueError:
        # A lying store could send line breaks or escape sequences: report a change of everything.
        return b"."
    line = path.removeprefix(join(base, b""))
    if line != path and line.startswith((b"-", b"@")):
        line = b"./" + line
    if len(line) > NAME_MAX:
        line = b"/".join(map(file_name, line.split(b"/")))
    return line


def path_of(line: bytes, base: bytes) -> bytes:
    """The path that a line asks to watch, the inverse of `line_of`.  EINVAL if Xenstore cannot have it."""
    if SPECIAL.fullmatch(line):
        return line
    if line == b".":
        return base
    if line.startswith(b"@"):
        refuse(errno.EINVAL)  # no event that there is; a child of such a name is `./@NAME`
    path = line if line.startswith(b"/") else join(base, line.removeprefix(b"./"))
    if len(path) > protocol.PATH_MAX:
        refuse(errno.ENAMETOOLONG)
    try:
        return protocol.check_path(path)
    except ValueError:
        refuse(errno.EINVAL)


class WatchFile(FileOfDirectory):
    """`.watch` of a directory.  It ignores transactions, as watches do."""

    async def getattr(self) -> EntryAttributes:
        await self.parent.require_present()
        return self.entry(0)

    async def open(self, flags: int, caller: Caller) -> WatchHandle:
        if flags & os.O_ACCMODE == os.O_WRONLY:
            refuse(errno.EINVAL)
        handle = WatchHandle(self, flags, caller)
        if not handle.writable:
            try:
                await handle.add(handle.base)
            except BaseException:
                await handle.release()
                raise
        self.view.at_end[handle] = handle.wake
        return handle


class WatchHandle(Handle):
    """See the module's docstring.

    base            the path of the directory when the file was opened
    writable        whether it was opened for writing, too
    """

    stream = True

    def __init__(self, node: WatchFile, flags: int, caller: Caller) -> None:
        """Fails with EMFILE if too many watch files are open."""
        super().__init__(node)
        self.base = node.path
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self._is_nonblocking = bool(flags & os.O_NONBLOCK)
        self._share = Share(node.table.readers, caller)
        self._share.resize(1)
        self._subscriptions: dict[bytes, Subscription] = {}
        # A dict would be slow to take the oldest from: it goes over all that were taken before.
        self._events: OrderedDict[bytes, None] = OrderedDict()
        self._rest = b""
        self._changing = trio.Lock()
        self._reader = Reader(caller.pid, node.inode, writable=self.writable)
        self._waiting: trio.CancelScope | None = None
        """The wait of a read; it is cancelled when there is something to read."""
        self._poll_handle: pyfuse3.PollHandle | None = None

    # --------------------------------------------------------------------------------- events

    def put(self, path: bytes) -> None:
        """Add an event.  The connection's reader calls it, so it must not wait."""
        if len(self._events) >= EVENTS_MAX and path not in self._events:
            self._events = OrderedDict.fromkeys(self._subscriptions)
        else:
            self._events[path] = None
        self.wake()

    def wake(self) -> None:
        """Wake the read that waits, and notify poll(2)."""
        if self._waiting is not None:
            self._waiting.cancel()
        if self._poll_handle is not None:
            poll_handle, self._poll_handle = self._poll_handle, None
            try:
                poll_handle.notify()
            except OSError as error:
                # The mount is about to end.
                log.info("a poll could not be answered: %s", error)

    async def read(self, offset: int, size: int) -> bytes:
        """Whole lines; if the first one does not fit, the next read has the rest."""
        if not self._events and not self._rest:
            await self._wait()
        lines = bytearray(self._rest)
        while self._events:
            path = next(iter(self._events))
            line = line_of(path, self.base) + b"\n"
            if lines and len(lines) + len(line) > size:
                break
            del self._events[path]
            lines += line
        self._rest = bytes(lines[size:])
        return bytes(lines[:size])

    async def _wait(self) -> None:
        """Return when there is something to read.  EINTR if the reader has been signalled."""
        if self._is_nonblocking:
            refuse(errno.EAGAIN)
        if self._waiting is not None:
            # The kernel lets in one read(2) of an open file at a time, but not so with io_uring.
            refuse(errno.EBUSY)
        try:
            # It may wait for hours, and needs no reply of the store.
            with self._reader.reading(), self.node.table.kernel.not_under_way():
                while not self._events:
                    outcome = Outcome.WAITS
                    with trio.CancelScope() as self._waiting:
                        await trio.sleep(random.uniform(*LOOK_SECONDS))
                        outcome = await self._reader.look()
                    if self.node.view.ended:
                        refuse(errno.ESTALE)
                    if outcome is Outcome.PAUSED and self._subscriptions:
                        # read(2) must end, and many programs take EINTR for the end of the file.  An
                        # event that means "look again" is harmless.
                        self.put(next(iter(self._subscriptions)))
                    elif outcome is not Outcome.WAITS:
                        # If it is UNKNOWN, too: perhaps the reader has been signalled.
                        refuse(errno.EINTR)
        finally:
            self._waiting = None

    async def poll(self, poll_handle: pyfuse3.PollHandle | None) -> int:
        if poll_handle is not None:
            self._poll_handle = poll_handle
        ready = select.POLLOUT | select.POLLWRNORM if self.writable else 0
        if self._events or self._rest:
            ready |= select.POLLIN | select.POLLRDNORM
        return ready

    # -------------------------------------------------------------------------- what is watched

    async def write(self, offset: int, data: bytes) -> int:
        """Carry out the lines.  The write is short if a line fails.  A program then writes the rest, which
        begins with that line, and that write fails."""
        done = 0
        async with self._changing:
            for line in data.removesuffix(b"\n").split(b"\n"):
                try:
                    await self._obey(line)
                except (pyfuse3.FUSEError, StoreError):
                    if not done:
                        raise
                    return done
                done += len(line) + 1
        return len(data)

    async def _obey(self, line: bytes) -> None:
        if not line.startswith(b"-"):
            await self.add(path_of(line, self.base))
            return
        subscription = self._subscriptions.pop(path_of(line[1:], self.base), None)
        if subscription is None:
            refuse(errno.ENOENT)
        self.node.view.store.watches.drop(subscription)

    async def add(self, path: bytes) -> None:
        """Watch one path more.  Returns when the store has the watch; its first event follows."""
        if path in self._subscriptions:
            refuse(errno.EEXIST)
        if len(self._subscriptions) >= WATCHES_MAX:
            refuse(errno.ENOSPC)
        subscription = _HandleSubscription(path, self)
        store = self.node.view.store
        try:
            # Other subscribers may be waiting for the connection, one after the other.
            with trio.fail_after(store.timeout):
                await store.watches.subscribe(subscription)
        except trio.TooSlowError:
            raise RequestTimeout("the watch could not be set in time") from None
        self._subscriptions[path] = subscription

    def move(self, source: bytes, target: bytes) -> None:
        self.base = moved(self.base, source, target)
        subscriptions = self._subscriptions.values()
        self._subscriptions = {}
        for each in subscriptions:
            if self._subscriptions.setdefault(each.path, each) is not each:
                self.node.view.store.watches.drop(each)
        self._events = OrderedDict.fromkeys(moved(path, source, target) for path in self._events)

    async def release(self) -> None:
        self._share.resize(0)
        self._poll_handle = None
        self.node.view.at_end.pop(self, None)
        for subscription in self._subscriptions.values():
            self.node.view.store.watches.drop(subscription)
        self._subscriptions.clear()


class _HandleSubscription(Subscription):
    """A subscription that passes its events to its handle at once."""

    def __init__(self, path: bytes, handle: WatchHandle) -> None:
        super().__init__(path)
        self._handle = handle

    def put(self, path: bytes) -> None:
        self._handle.put(path)
