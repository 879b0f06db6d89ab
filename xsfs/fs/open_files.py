"""Open files and scratch files: the record that all handles of one path share.

`echo 42 > FILE` must be exactly one WRITE.  But the shell opens the file with O_TRUNC, closes a duplicate of
its descriptor, and only then writes.  So a truncation or creation is *owed* until a write, or the last
close, carries it out.

An `OpenFiles` owns the `OpenFile` of each path of one view that is open, or is a scratch file.  Only the
tasks that handle FUSE requests touch it.  An `OpenFile` is in one of three states:

    state           content     path
    in the store    at `path`   leads to it
    scratch file    `memory`    leads to it: a name that Xenstore cannot hold
    orphan          `memory`    leads to another file, or to none

    in the store -> orphan          `orphan`: its node was removed or replaced through the mount
    in the store -> scratch file    `move_to_scratch`: a rename to a temporary name
    scratch file -> in the store    `move_to_store`: a rename, which has written the content
    scratch file -> orphan          `unlink`: it was removed or replaced, or its directory was removed
    (no change of state)            `move`: a rename, of it or of a directory above

The handles stay usable in each state.  An orphan goes with its handles and inodes.

Invariants:

- The handles of one path share one `OpenFile`, whatever names they were opened by (`data/x`,
  `.root/local/domain/0/data/x`, `data/x.d/.value`).  Only a handle that is opened by the new name while a
  rename is under way has an `OpenFile` of its own beside that of the renamed file.
- The mount shows a truncation or creation from the moment of the open: `as_seen` turns the store's state of
  a node into the state that the mount shows.
- A value that another client writes between the open and the close stays.  A debt is settled in a
  transaction, and only if the value is still the one that the open found.
- A write that the store accepts settles the debt.  After a write that the store refuses, the old value
  stays, and the next write replaces all of it.
- After the last close xsfs settles the debt at once, and any later look-up of the path waits for that.
- Nothing of a content in memory reaches the store before a rename.  It has no debt.
- While a task changes, removes or renames an open file (`changing`), no other task does.  Removals and
  renames (`changing_below`) of one path, or of paths of which one lies below the other, come one after the
  other.  A file that is opened below the path meanwhile cannot be changed until they are done.
- If another client removes a directory, xsfs drops its scratch files when it notices that, at the latest when
  it needs their room.
"""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Final

import trio

from xsfs.fs.memory_content import MemoryContent, shortage
from xsfs.fs.nodes import FORGOTTEN, Caller, Handle, refuse
from xsfs.view.names import join, parent_path
from xsfs.view.view import EMPTY_NODE, NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.protocol import Request

if TYPE_CHECKING:
    from xsfs.fs.xattrs import XenstoreNode

FRESH_SECONDS: Final = 0.005
"""For so long xsfs relies on the state of a node that it has fetched."""


class Debt:
    """A truncation or creation that is not carried out yet.

    found       the value that the open found; None if the node did not exist
    holders     the handles whose close settles it
    is_blind    whether the value may not be read, so that it cannot be compared
    is_refused  whether the store refused a write: then the old value stays until the next write
    is_closing  whether the last holder has closed, and the debt is being settled
    """

    __slots__ = ("_since", "found", "holders", "is_blind", "is_closing", "is_refused")

    def __init__(self, found: bytes | None, *, is_blind: bool = False) -> None:
        self._since = time.monotonic()
        self.found = found
        self.holders: set[Handle] = set()
        self.is_blind = is_blind
        self.is_refused = False
        self.is_closing = False

    @property
    def is_recent(self) -> bool:
        """Whether the open was so recent that the value it found still counts."""
        return self.is_blind or time.monotonic() - self._since <= FRESH_SECONDS

    def replaces(self, value: bytes | None) -> bool:
        """Whether the node, which has this value now (None: there is none), counts as empty."""
        return (self.is_blind or value == self.found) and not self.is_refused

    def as_seen(self, state: NodeState | None) -> NodeState | None:
        """The state that the mount shows, for this state in the store."""
        if state is None:
            return EMPTY_NODE if self.found is None and not self.is_refused else None
        return state._replace(value=b"") if self.replaces(state.value) else state


class _Changing(AbstractAsyncContextManager[None]):
    """A lock that gives the event loop no turn if it is free.

    With trio.Lock, which gives one, an `echo` takes a fifth longer.  Tasks that wait get it in turn, before
    any task that comes later.
    """

    __slots__ = ("_is_taken", "_waiting")

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: trio.lowlevel.ParkingLot | None = None
        """Made by the first task that waits."""

    async def __aenter__(self) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        if self._waiting is None:
            self._waiting = trio.lowlevel.ParkingLot()
        await self._waiting.park()

    async def __aexit__(self, *_: object) -> None:
        if self._waiting:
            self._waiting.unpark()  # this task has it from now on, even if it is cancelled before it runs
        else:
            self._is_taken = False


class OpenFile:
    """See the module's docstring.

    handles     how many there are
    nodes       the inodes by which it was opened, and that the kernel still knows
    debt        what it owes the store
    memory      its content, if that is not in the store
    is_pinned   whether it was created as a file, and stays one while it is open and has no children
    """

    __slots__ = ("debt", "handles", "is_pinned", "lock", "memory", "nodes", "path")

    def __init__(self, path: bytes, node: XenstoreNode | None = None) -> None:
        """`node` opens it; None if it has no handle yet."""
        self.path = path
        self.handles = 0 if node is None else 1
        self.nodes = set() if node is None else {node}
        self.debt: Debt | None = None
        self.memory: MemoryContent | None = None
        self.is_pinned = False
        self.lock: _Changing | None = None
        """Held while a task changes it; made when it is needed."""

    def add(self, node: XenstoreNode) -> None:
        """One more handle, by this inode."""
        self.handles += 1
        if node not in self.nodes:
            for other in tuple(self.nodes):
                if other.lookups == FORGOTTEN:
                    self.nodes.remove(other)
            self.nodes.add(node)

    def owe(self, handle: Handle, found: bytes | None, *, is_blind: bool = False) -> None:
        """The handle truncates the file, or creates it if `found` is None."""
        # If there is a value in spite of a debt, another client has written it since, or the store has
        # refused a write.
        if self.debt is None or found or self.debt.is_refused:
            self.debt = Debt(found, is_blind=is_blind)
        self.debt.holders.add(handle)

    @property
    def owes_creation(self) -> bool:
        return self.debt is not None and self.debt.found is None

    def changing(self) -> _Changing:
        """No other task changes the file within the block."""
        if self.lock is None:
            self.lock = _Changing()
        return self.lock


class OpenFiles:
    """See the module's docstring."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._by_path: dict[bytes, OpenFile] = {}
        self._scratch: set[OpenFile] = set()
        """The files whose memory is bounded: those with a name, those that had one and are open, and those
        that are about to get one."""
        self._removals: list[tuple[Sequence[bytes], _Changing]] = []
        """The removals and renames under way: the paths of each, and a lock that is held until its end.  A
        file that is opened there meanwhile gets this lock as its own."""

    def get(self, path: bytes) -> OpenFile | None:
        return self._by_path.get(path)

    def as_seen(self, path: bytes, state: NodeState | None) -> NodeState | None:
        """The state that the mount shows, for this state in the store."""
        file = self._by_path.get(path)
        return state if file is None or file.debt is None else file.debt.as_seen(state)

    def open(self, path: bytes, node: XenstoreNode) -> OpenFile:
        """One more handle."""
        file = self._by_path.get(path)
        if file is None:
            file = self._by_path[path] = OpenFile(path, node)
            if self._removals:
                file.lock = self._removal_at(path)
        else:
            file.add(node)
        return file

    def close(self, file: OpenFile) -> None:
        """One handle less."""
        file.handles -= 1
        self.release(file)

    def release(self, file: OpenFile) -> None:
        """Forget a file that has no handle, if it is no scratch file with a name."""
        if file.handles:
            return
        if self._by_path.get(file.path) is file:
            if file.memory is None:
                del self._by_path[file.path]
        elif file in self._scratch:
            self._scratch.discard(file)
            for node in file.nodes:
                node.detached = None

    # --------------------------------------------------------------------------------- debts

    def created_in(self, directory: bytes) -> list[bytes]:
        """The names of files in this directory whose creation is owed."""
        return [
            path.rpartition(b"/")[2]
            for path, file in self._by_path.items()
            if file.owes_creation and parent_path(path) == directory
        ]

    async def fetch_one(self, path: bytes) -> NodeState | None:
        """The state that the mount shows now.  If the last handle was just closed, this waits until the debt
        is settled."""
        while True:
            file = self._by_path.get(path)
            debt = None if file is None else file.debt
            if file is not None and debt is not None and debt.is_closing:
                async with file.changing():
                    pass
            state = await self.view.fetch_one(path)
            # If the debt was settled meanwhile, the reply may contain the value from before.
            if debt is None or (file is not None and file.debt is debt):
                return self.as_seen(path, state) if path in self._by_path else state

    async def wait_closed_below(self, top: bytes) -> None:
        """Wait until the debts of files at and below a path are settled whose last handle was closed."""
        for file in self.at_and_below(top):
            if file.debt is not None and file.debt.is_closing:
                async with file.changing():
                    pass

    def at_and_below(self, *tops: bytes) -> list[OpenFile]:
        below = tuple(join(top, b"") for top in tops)
        return [
            file for path, file in self._by_path.items() if path in tops or path.startswith(below)
        ]

    def is_directory(self, path: bytes, state: NodeState) -> bool:
        """Whether the mount shows a node of this state as a directory."""
        file = self._by_path.get(path)
        if file is not None and file.is_pinned and not state.has_children:
            return False
        return self.view.is_directory(path, state)

    async def settle(self, path: bytes) -> None:
        """Carry out what the file at this path owes, if it is open and owes anything."""
        if (file := self._by_path.get(path)) is not None:
            await self.settle_file(file)

    def _removal_at(self, *paths: bytes) -> _Changing | None:
        """The lock of a removal or rename under way at, above or below one of these paths."""
        for tops, lock in self._removals:
            if any(is_at_or_below(a, b) or is_at_or_below(b, a) for a in tops for b in paths):
                return lock
        return None

    def changing(self, path: bytes) -> AbstractAsyncContextManager[None]:
        """No other task changes the file at this path within the block, if it is open."""
        file = self._by_path.get(path)
        if file is not None:
            return file.changing()
        return self._removal_at(path) or nullcontext()

    @asynccontextmanager
    async def changing_below(
        self, *paths: Callable[[], bytes], settles: bool = True
    ) -> AsyncIterator[Sequence[bytes]]:
        """No other task changes a file at or below some paths within the block.

        paths       return them: renames may change them before the block begins, and none within it
        settles     whether to carry out the debts of the files first
        """
        while under_way := self._removal_at(*(tops := [path() for path in paths])):
            async with under_way:
                pass
        files = self.at_and_below(*tops)
        lock = _Changing()
        async with lock, AsyncExitStack() as stack:
            self._removals.append((tops, lock))
            stack.callback(self._removals.remove, (tops, lock))
            # In an order that no rename changes, or two tasks could wait for each other.
            for other in sorted({file.changing() for file in files}, key=id):
                await stack.enter_async_context(other)
            if settles:
                for file in files:
                    await self._settle(file)
            yield tops

    async def settle_all(self) -> None:
        for file in list(self._by_path.values()):
            await self.settle_file(file)

    async def settle_file(self, file: OpenFile) -> None:
        if file.debt is not None:
            async with file.changing():
                await self._settle(file)

    async def _settle(self, file: OpenFile) -> None:
        debt = file.debt
        if debt is None or debt.is_refused:
            return

        async def work(commands: Commands) -> Request | None:
            return await self._settlement(commands, file.path, debt)

        await self.view.atomically(work)
        if file.debt is debt:
            file.debt = None

    async def _settlement(self, commands: Commands, path: bytes, debt: Debt) -> Request | None:
        """The request that settles a debt, if there is still anything to do."""
        if debt.is_blind:
            return protocol.write(path, b"")
        parent, reply = await commands.pipeline(
            (protocol.read(parent_path(path)), protocol.read(path))
        )
        if not isinstance(reply, XenstoreError):
            is_changed = reply == debt.found and reply != b""
            return protocol.write(path, b"") if is_changed else None
        if reply.name != "ENOENT":
            raise reply
        if debt.found is not None:
            return None  # another client has removed it
        if is_missing(parent) and not self.view.is_always_there(parent_path(path)):
            return None  # with its directory
        return protocol.write(path, b"")

    # -------------------------------------------------------------------- removal and renaming

    # `node` is the inode at the path that an operation takes away, if the kernel knows one.

    def orphan(self, path: bytes, node: XenstoreNode | None, memory: MemoryContent) -> OpenFile:
        """The file at this path was removed or replaced."""
        file = self._by_path.get(path) or OpenFile(path)
        if file.debt is not None:
            if file.debt.replaces(self.view.value_format.parse(memory.data)):
                memory.data = b""
            file.debt = None
        file.memory = memory
        self._detach(file, node)
        if seen := max((each.mtime_ns for each in file.nodes), default=0):
            memory.mtime_ns = seen
        return file

    def _detach(self, file: OpenFile, node: XenstoreNode | None) -> None:
        """Its path does not lead to the file any more.  Its inodes do."""
        if self._by_path.get(file.path) is file:
            del self._by_path[file.path]
        if node is not None:
            file.nodes.add(node)
        for each in file.nodes:
            each.gone = True
            each.detached = file

    def _attach(self, file: OpenFile, path: bytes) -> None:
        file.path = path
        self._by_path[path] = file

    def retire(self, file: OpenFile | None) -> None:
        """The mount has made, or makes, a node at the path of a file that was there before.

        So another client had removed the file, and its handles do not reach the new one.
        """
        if file is None or self._by_path.get(file.path) is not file:
            return
        if file.memory is not None:
            self.unlink(file)
            return
        del self._by_path[file.path]
        file.debt = None
        for node in file.nodes:
            node.gone = True
            node.detached = None

    async def retire_missing(self, path: bytes) -> None:
        """Retire the file at this path if another client has removed it."""
        if (file := self._by_path.get(path)) is None:
            return
        async with file.changing():
            state = await self.view.fetch_one(path)
        if state is None and file.path == path and not file.owes_creation:
            self.retire(file)

    def move(self, source: bytes, target: bytes) -> None:
        """A subtree was renamed, and the node by whose name that was done knows it."""
        opened_meanwhile = self.at_and_below(target)
        moved = self.at_and_below(source)
        for file in moved:
            del self._by_path[file.path]
            self._attach(file, target + file.path[len(source) :])
        for file in (*moved, *opened_meanwhile):
            for node in file.nodes:
                if node.gone or node.path != file.path:
                    node.gone = True
                    node.detached = file

    # --------------------------------------------------------------------------- scratch files

    def scratch_files(self, top: bytes) -> list[OpenFile]:
        """The scratch files in a directory, and below it."""
        below = join(top, b"")
        return [
            file
            for file in self._scratch
            if file.path.startswith(below) and self._by_path.get(file.path) is file
        ]

    def scratch_names(self, directory: bytes) -> list[bytes]:
        """The names of the scratch files in a directory."""
        return [
            file.path.rpartition(b"/")[2]
            for file in self._scratch
            if self._by_path.get(file.path) is file and parent_path(file.path) == directory
        ]

    async def new_scratch(self, caller: Caller) -> OpenFile:
        """A scratch file without a name.  Fails with ENOSPC or EDQUOT if there is no room."""
        file = OpenFile(b"")
        file.memory = MemoryContent(owner=caller.uid if caller.unprivileged else None)
        await self._make_room(file, file.memory, 0)
        self._scratch.add(file)
        return file

    async def set_data(self, file: OpenFile, memory: MemoryContent, data: bytes) -> None:
        """Replace its content in memory.  Fails with EFBIG, ENOSPC or EDQUOT, and then changes nothing."""
        if len(data) > memory.size_max:
            refuse(errno.EFBIG)
        if file in self._scratch and len(data) > len(memory.data):
            await self._make_room(file, memory, len(data))
        memory.write(data)

    async def _make_room(self, file: OpenFile, memory: MemoryContent, size: int) -> None:
        """Fail with ENOSPC or EDQUOT if the file cannot have this size."""

        def error() -> int:
            others = [each.memory for each in self._scratch if each is not file and each.memory]
            return shortage(others, memory.owner, size)

        if error():
            await self.drop_lost(b"/")
            if number := error():
                refuse(number)

    async def drop_lost(self, top: bytes) -> None:
        """Drop the files below a path whose directories another client has removed.

        If xsfs renames a directory meanwhile, its files only seem lost.
        """
        found = [(file, file.path) for file in self.scratch_files(top)]
        if not found:
            return
        above = sorted({parent_path(path) for _, path in found})
        replies = await self.view.commands.pipeline([protocol.read(path) for path in above])
        gone = {
            path
            for path, reply in zip(above, replies, strict=True)
            if is_missing(reply) and not self.view.is_always_there(path)
        }
        for file, path in found:
            is_there = self._by_path.get(path) is file and not self._removal_at(path)
            if is_there and parent_path(path) in gone:
                self.unlink(file)

    def link(self, file: OpenFile, path: bytes) -> None:
        """Give a scratch file without a name this one, instead of the file that has it."""
        if (present := self._by_path.get(path)) is not None:
            self.unlink(present)
        self._attach(file, path)

    def unlink(self, file: OpenFile, node: XenstoreNode | None = None) -> None:
        """Remove the name of a scratch file."""
        self._detach(file, node)
        self.release(file)

    def move_to_scratch(
        self, source: bytes, node: XenstoreNode | None, target: bytes, scratch: OpenFile
    ) -> None:
        """The node at `source` was renamed to a temporary name.  `scratch` is a new scratch file with its
        value and permissions."""
        assert scratch.memory is not None
        file = self.orphan(source, node, scratch.memory)
        self._scratch.discard(scratch)
        self._scratch.add(file)
        self.link(file, target)

    def move_to_store(self, file: OpenFile, node: XenstoreNode | None, target: bytes) -> None:
        """A scratch file was renamed to a node, which has its content."""
        self._detach(file, node)
        self._scratch.discard(file)
        file.memory = None
        file.is_pinned = True
        self._attach(file, target)
        self.release(file)


def is_at_or_below(path: bytes, top: bytes) -> bool:
    return path == top or path.startswith(join(top, b""))


def is_missing(reply: bytes | XenstoreError) -> bool:
    return isinstance(reply, XenstoreError) and reply.name == "ENOENT"
