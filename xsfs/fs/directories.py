"""Directories: Xenstore nodes with children, and the names that xsfs adds to them.

`own` of each class is the table of xsfs's own names in such a directory.  A new kind of file is a new class,
a line there, and its name in `OWN_NAMES` of view/names.py.  A name is looked up in this order: own names,
children, `NAME.d`, scratch files, aliases of long names.

Xenstore's own commands are laxer than POSIX: MKDIR succeeds on a node that exists, WRITE creates missing
parents, and RM removes everything below.  So each change reads first, in the same transaction, and fails with
the errno of POSIX.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pyfuse3 import EntryAttributes

from xsfs.fs.domain_links import DomainsDirectory
from xsfs.fs.dumps import DumpFile, JsonFile, LsFile
from xsfs.fs.files import DotValue, ScratchFile, ValueFile, ValueHandle
from xsfs.fs.generated import DomidFile, StatsFile, look_up
from xsfs.fs.listing import DirectoryHandle
from xsfs.fs.memory_content import MemoryContent
from xsfs.fs.nodes import DIRECTORY_ENTRY_TIMEOUT, Caller, Handle, Node, refuse
from xsfs.fs.open_files import OpenFile, is_missing
from xsfs.fs.watch_files import WatchFile
from xsfs.fs.xattrs import XenstoreNode
from xsfs.view.names import NAME_MAX, VALUE_NAME, forced_name, is_alias, is_scratch_name, join
from xsfs.view.view import EMPTY_NODE, LEAF, NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import perms_text
from xsfs.xenstore.protocol import Request

if TYPE_CHECKING:
    from xsfs.fs.inodes import InodeTable


class Directory(XenstoreNode):
    """A Xenstore node as a directory."""

    __slots__ = ("was_missing",)

    kind = stat.S_IFDIR
    entry_timeout = DIRECTORY_ENTRY_TIMEOUT
    always_directory: ClassVar[bool] = False
    """Whether it is a directory whatever its node looks like."""
    own: ClassVar[Mapping[bytes, type[Node]]] = {
        VALUE_NAME: DotValue,
        b".watch": WatchFile,
        b".ls": LsFile,
        b".json": JsonFile,
        b".dump": DumpFile,
    }

    def __init__(self, table: InodeTable, view: View, parent: Node | None, name: bytes) -> None:
        super().__init__(table, view, parent, name)
        self.was_missing = False
        """Whether the node did not exist when a name in it was last looked up in vain."""

    @property
    def path(self) -> bytes:
        """The absolute Xenstore path.  After a rename of any directory it is another object."""
        return self.table.paths.get(self) or self.table.path_of(self)

    def is_of_kind(self, state: NodeState) -> bool:
        return self.always_directory or self.view.is_directory(self.path, state)

    def require_directory(self, state: NodeState | None) -> NodeState:
        """The state of the node if it still is a directory.  Fails with ESTALE if not."""
        if state is None and self.always_there:
            return EMPTY_NODE
        if state is None or not (state.has_children or self.is_of_kind(state)):
            refuse(errno.ESTALE)
        return state

    async def was_renamed(self, path: bytes) -> bool:
        """Whether the node, which was missing at `path`, was renamed, perhaps by a rename under way.

        path    the object that `self.path` was, so that a rename there and back counts, too
        """
        if self.path is not path:
            return True  # another rename may be about to bring it back
        async with self.open_files.changing(path):
            return self.path is not path

    async def is_elsewhere(self, path: bytes, state: NodeState | None) -> bool:
        """Whether the node was not found, or is unreadable, because it was renamed, or the domain's home has
        moved, since `path` was its path."""
        if state is not None and state.readable:
            return False
        return await self.was_renamed(path) or await self.view.has_moved(path)

    async def getattr(self) -> EntryAttributes:
        self.require()
        path = self.path
        state = await self.view.fetch_directory(path)
        if await self.is_elsewhere(path, state):
            return await self.getattr()
        return self.attributes(self.require_directory(state))

    async def getattr_by(self, pid: int) -> EntryAttributes:
        found = self.table.handover.take(pid, self.inode)
        return await self.getattr() if found is None else self.attributes(found[0])

    async def require_present(self, missing: int = errno.ESTALE) -> None:
        """Fail with this errno if the node does not exist.

        After ESTALE the kernel looks the directory up again at a CREATE, but not at a MKNOD or SYMLINK.
        """
        if not await self._is_present():
            refuse(missing)

    async def _is_present(self) -> bool:
        if self.gone or self.view.ended:
            return False
        if self.always_there:
            return True
        path = self.path
        (reply,) = await self.view.commands.pipeline((protocol.read(path),))
        if not is_missing(reply):
            return True
        await self.open_files.drop_lost(path)
        return await self.was_renamed(path) and await self._is_present()

    def value_was_written(self) -> None:
        self.view.sticky.add(self.path, with_value=True)

    def has_dot_value(self, state: NodeState) -> bool:
        """Whether `.value` exists."""
        return self.view.has_dot_value(self.path, state)

    def listed_own(self, state: NodeState) -> list[bytes]:
        """The names of `own` that a listing shows."""
        return [VALUE_NAME] if self.view.has_dot_value(self.path, state) else []

    async def opendir(self, caller: Caller) -> Handle:
        handle = DirectoryHandle(self, caller)
        changes = self.table.handover.changes
        self.table.handover.put(caller.pid, self.inode, await handle.fetch(), changes)
        return handle

    # --------------------------------------------------------------------------------- lookup

    def lookup(self, name: bytes, pid: int) -> Coroutine[Any, Any, EntryAttributes]:
        if len(name) > NAME_MAX:
            refuse(errno.ENAMETOOLONG)
        if (kind := self.own.get(name)) is not None:
            return self._lookup_own(kind, name, pid)
        if protocol.is_name(name):
            return self._lookup_child(name, pid)
        if (forced := forced_name(name)) is not None:
            return self._lookup_forced(forced)
        if self.is_scratch(name):
            return self._lookup_scratch(name)
        return self._lookup_alias(name, pid)

    async def _lookup_own(self, kind: type[Node], name: bytes, pid: int) -> EntryAttributes:
        self.require()
        return await look_up(kind, self, name, pid)

    async def _lookup_child(self, name: bytes, pid: int) -> EntryAttributes:
        directory = self.path
        path = join(directory, name)
        if len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        changes = self.table.handover.changes
        state = await self.open_files.fetch_one(path)
        if state is None and self.view.is_always_there(path):
            state = EMPTY_NODE
        if state is None:
            await self.open_files.drop_lost(path)
            # A cached entry may have led here, and a write would create the directory again.
            self.require()
            self.was_missing = self.path is directory and not await self._is_present()
            if self.path is not directory:
                return await self._lookup_child(name, pid)
            refuse(errno.ENOENT)
        child = self.child(name, state, path)
        entry = child.attributes(state)
        if isinstance(child, ValueFile) and state.readable and state.value is not None:
            self.table.handover.put(pid, child.inode, state, changes)
        self.table.remember(child)
        return entry

    async def _lookup_alias(self, name: bytes, pid: int) -> EntryAttributes:
        return await self._lookup_child(await self.child_name(name), pid)

    async def _lookup_forced(self, name: bytes) -> EntryAttributes:
        child = await self.child_name(name)
        above = self.path
        path = join(above, child)
        state = await self.view.fetch_one(path)
        if state is None:
            await self.open_files.settle(path)  # its creation may be owed
            state = await self.view.fetch_one(path)
        if state is None:
            if await self.was_renamed(above):
                return await self._lookup_forced(name)
            if not self.view.is_always_there(path):
                refuse(errno.ENOENT)
            state = EMPTY_NODE
        directory = self.table.node(ForcedDirectory, self, child)
        return self._found(directory, directory.attributes(state))

    def child(
        self, name: bytes, state: NodeState, path: bytes | None = None
    ) -> Directory | ValueFile:
        """The node for a child of this state."""
        # The path is only made if the kind depends on it.
        if state.has_children or (
            state is not LEAF and self.open_files.is_directory(path or join(self.path, name), state)
        ):
            return self.table.node(Directory, self, name)
        return self.table.node(ValueFile, self, name)

    def _found(self, node: Node, entry: EntryAttributes) -> EntryAttributes:
        self.table.remember(node)
        return entry

    async def child_name(self, name: bytes, *, new: bool = False) -> bytes:
        """The Xenstore name behind a file name.

        Fails with EPERM for a name of xsfs's own.  For one that no node can have, it fails with ENOENT, or
        EINVAL if there is to be a `new` node.
        """
        if name in self.own or forced_name(name) is not None:
            refuse(errno.EPERM)
        if protocol.is_name(name):
            return name
        if is_alias(name):
            if (kept := self.table.name_behind(name)) is not None:
                return kept
            path = self.path
            try:
                children = await self.view.commands.list(path)
            except XenstoreError as error:
                if error.name != "ENOENT" or not await self.was_renamed(path):
                    raise
                return await self.child_name(name, new=new)
            for child in children:
                if len(child) > NAME_MAX and self.table.alias(child) == name:
                    return child
        refuse(errno.EINVAL if new else errno.ENOENT)

    def path_below(self, name: bytes) -> bytes:
        """The present path of a child."""
        self.require()
        path = join(self.path, name)
        if len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        return path

    # ------------------------------------------------------------------------------- creation

    async def create(
        self, name: bytes, flags: int, caller: Caller
    ) -> tuple[Handle, EntryAttributes]:
        file: ValueFile
        is_owed = protocol.is_name(name) and not flags & os.O_EXCL
        if is_owed:
            path = self.path_below(name)
            if self.was_missing:
                await self.require_present()
            await self.open_files.retire_missing(path)
            file = self.table.node(ValueFile, self, name)
            entry = self._found(file, file.attributes(EMPTY_NODE))
        else:
            present = errno.EEXIST if flags & os.O_EXCL else errno.ESTALE
            file, entry = await self._make_file(
                name, caller, missing_parent=errno.ESTALE, present=present
            )
        handle = ValueHandle(file, self.open_files.open(file.path, file), flags)
        if name != VALUE_NAME:
            handle.file.is_pinned = True
        if is_owed:
            handle.file.owe(handle, None)
        return handle, entry

    async def make_file(self, name: bytes, caller: Caller) -> EntryAttributes:
        _, entry = await self._make_file(name, caller, missing_parent=errno.ENOENT)
        return entry

    async def _make_file(
        self, name: bytes, caller: Caller, *, missing_parent: int, present: int = errno.EEXIST
    ) -> tuple[ValueFile, EntryAttributes]:
        """Create a file that must not exist.

        Fails with `missing_parent` if this directory does not exist, with `present` if another task has just
        created the file in memory.
        """
        file: ValueFile
        if name == VALUE_NAME:
            # Its node exists, so no request is needed.
            state = self.require_directory(await self.view.fetch_one(self.path))
            if state.value:
                refuse(errno.EEXIST)
            self.value_was_written()
            file = self.table.node(DotValue, self, name)
            entry = file.attributes(state)
        elif self.is_scratch(name):
            await self.require_present(missing_parent)
            scratch = await self.open_files.new_scratch(caller)
            if self.scratch_file(name) is not None:
                self.open_files.release(scratch)
                refuse(present)
            self.open_files.link(scratch, join(self.path, name))
            file = self.table.node(ScratchFile, self, name)
            entry = file.attributes_in_memory()
        else:
            await self._make(name, directory=False, missing_parent=missing_parent)
            file = self.table.node(ValueFile, self, name)
            entry = file.attributes(EMPTY_NODE)
        return file, self._found(file, entry)

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        await self._make(name, directory=True, missing_parent=errno.ENOENT)
        self.view.sticky.add(self.path_below(name))
        directory = self.table.node(Directory, self, name)
        return self._found(directory, directory.attributes(EMPTY_NODE))

    async def make_symlink(self, name: bytes) -> EntryAttributes:
        await self.require_present(errno.ENOENT)
        refuse(errno.EPERM)

    async def _make(self, name: bytes, *, directory: bool, missing_parent: int) -> None:
        """Create a node that must not exist."""

        async def work(commands: Commands) -> Request:
            own, present = await commands.pipeline((protocol.read(self.path), protocol.read(path)))
            if is_missing(own) and not self.always_there:
                refuse(missing_parent)
            if is_missing(present):
                return protocol.mkdir(path) if directory else protocol.write(path, b"")
            # A node that may not be read exists as well.
            if isinstance(present, XenstoreError) and present.name != "EACCES":
                raise present
            refuse(errno.EEXIST)

        if await self.child_name(name, new=True) != name:
            refuse(errno.EINVAL)  # an alias
        async with self.open_files.changing_below(partial(self.path_below, name)) as (path,):
            before = self.open_files.get(path)
            await self.view.atomically(work)
            self.open_files.retire(before)
            self.was_written()

    # -------------------------------------------------------------------------------- removal

    async def unlink(self, name: bytes) -> None:
        self.require()
        if name == VALUE_NAME:
            await self._unlink_dot_value()
        elif self.is_scratch(name):
            node, file = self.present_scratch(name)
            self.open_files.unlink(file, node)
        else:
            await self._remove(ValueFile, name)

    async def _unlink_dot_value(self) -> None:
        """Empty the value and keep the node, so that `rm -r` and rmdir can follow."""
        async with self.open_files.changing_below(lambda: self.path, settles=False) as (path,):
            value = await self.view.commands.read(path)
            await self.view.commands.write(path, b"")
            self.view.sticky.discard_value(path)
            self.was_written()
            node = self.table.find(DotValue, self, VALUE_NAME)
            memory = self._orphan_content(path, value, None)
            self.open_files.orphan(path, node, memory)

    async def rmdir(self, name: bytes) -> None:
        self.require()
        await self._remove(Directory, name)

    async def _remove(self, kind: type[XenstoreNode], name: bytes) -> None:
        """Remove a node.  Fails with EISDIR or ENOTDIR if it is of another kind."""
        is_directory = kind is Directory
        child = partial(self.path_below, await self.child_name(name))
        async with self.open_files.changing_below(child, settles=is_directory) as (path,):
            file = self.open_files.get(path)
            memory = self._orphan_content(path, b"", None)

            async def work(commands: Commands) -> Request | None:
                nonlocal memory
                (state,) = await self.view.fetch((path,), commands)
                if state is None and file is not None and file.owes_creation:
                    return None  # its creation is still owed
                memory = await self.to_remove(commands, path, state, directory=is_directory)
                return protocol.rm(path)

            await self.view.atomically(work)
            self.was_removed(kind, path, memory)

    async def to_remove(
        self, commands: Commands, path: bytes, state: NodeState | None, *, directory: bool
    ) -> MemoryContent:
        """The content of a file or empty directory that is to be removed, for its open handles.

        Fails with ENOENT, EISDIR or ENOTDIR, EACCES, ENOTEMPTY.
        """
        if state is None:
            refuse(errno.ENOENT)
        if self.open_files.is_directory(path, state) != directory:
            refuse(errno.ENOTDIR if directory else errno.EISDIR)
        if directory and not state.readable:
            refuse(errno.EACCES)
        if directory and (state.has_children or state.value or self.open_files.scratch_names(path)):
            refuse(errno.ENOTEMPTY)
        (reply,) = await commands.pipeline((protocol.get_perms(path),))
        if isinstance(reply, XenstoreError) and reply.name != "EACCES":
            raise reply
        perms = None if isinstance(reply, XenstoreError) else reply
        perms_text(perms or b"")  # raises WireError before anything is changed
        return self._orphan_content(path, state.value or b"", perms)

    def _orphan_content(self, path: bytes, value: bytes, perms: bytes | None) -> MemoryContent:
        """A content that may become as large as the longest value of the node, and a newline."""
        size_max = protocol.value_max(path, self.view.commands.payload_max) + 1
        return MemoryContent(self.view.value_format.render(value), perms, size_max)

    def was_removed(self, kind: type[XenstoreNode], path: bytes, memory: MemoryContent) -> None:
        """The node at this path was removed or replaced."""
        self.view.sticky.discard(path)
        self.was_written()
        node = self.table.find(kind, self, path.rpartition(b"/")[2])
        for file in self.open_files.at_and_below(path):
            if file.path != path:
                self.open_files.retire(file)  # its creation came too late
        self.open_files.orphan(path, node, memory)

    # --------------------------------------------------------------------------- scratch files

    def is_scratch(self, name: bytes) -> bool:
        """Whether a file of this name is a scratch file: never one in a transaction."""
        return self.view is self.table.root_view and is_scratch_name(name)

    def scratch_file(self, name: bytes) -> tuple[ScratchFile, OpenFile] | None:
        """The scratch file of this name, if there is one."""
        file = self.open_files.get(join(self.path, name))
        return None if file is None else (self.table.node(ScratchFile, self, name), file)

    def present_scratch(self, name: bytes) -> tuple[ScratchFile, OpenFile]:
        if (found := self.scratch_file(name)) is None:
            refuse(errno.ENOENT)
        return found

    async def _lookup_scratch(self, name: bytes) -> EntryAttributes:
        self.present_scratch(name)
        await self.require_present(errno.ENOENT)
        node, _ = self.present_scratch(name)
        return self._found(node, node.attributes_in_memory())


class ForcedDirectory(Directory):
    """`NAME.d`: a node as a directory, even if it looks like a file."""

    __slots__ = ()

    always_directory = True

    def value_was_written(self) -> None:
        """NAME stays what it is."""

    def has_dot_value(self, state: NodeState) -> bool:
        return True


class WholeStoreDirectory(Directory):
    """`.root`: the whole store from `/`, whatever the mount's root is."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        return b"/"


class RootDirectory(Directory):
    """The root of a tree: of the mount, or of a transaction."""

    __slots__ = ()

    always_directory = True
    own: ClassVar[Mapping[bytes, type[Node]]] = {
        **Directory.own,
        b".root": WholeStoreDirectory,
        b".domid": DomidFile,
        b".stats": StatsFile,
        b".domain": DomainsDirectory,
    }

    @property
    def path(self) -> bytes:
        return self.view.root

    def listed_own(self, state: NodeState) -> list[bytes]:
        listed = super().listed_own(state)
        if self.table.visible:
            hidden = {VALUE_NAME, b".watch"}
            if self.table.mirror is None:
                hidden.add(b".mirror")
            listed += [name for name in self.own if name not in hidden]
        return listed
