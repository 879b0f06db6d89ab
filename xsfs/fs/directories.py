"""Directories: Xenstore nodes with children, and the names that xsfs adds to them.

`own` of each class is the table of xsfs's own names in such a directory.  A new kind of file is a new class,
a line there, and its name in `OWN_NAMES` of view/names.py.  A name is looked up in this order: own names,
children, `NAME.d`, scratch files, aliases of long names.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pyfuse3
from pyfuse3 import EntryAttributes

from xsfs.fs import posix
from xsfs.fs.domain_links import DomainsDirectory
from xsfs.fs.dumps import DumpFile, JsonFile, LsFile
from xsfs.fs.files import DotValue, ValueFile, ValueHandle
from xsfs.fs.listing import DirectoryHandle
from xsfs.fs.nodes import DIRECTORY_ENTRY_TIMEOUT, Caller, Handle, Node, refuse
from xsfs.fs.open_files import OpenFile, is_missing
from xsfs.fs.posix import Removed
from xsfs.fs.scratch import ScratchFile, ScratchFiles, ScratchHandle
from xsfs.fs.special import DomidFile, StatsFile
from xsfs.fs.watch_files import WatchFile
from xsfs.fs.xattrs import XenstoreNode
from xsfs.view.names import NAME_MAX, VALUE_NAME, forced_name, is_alias, join
from xsfs.view.view import EMPTY_NODE, LEAF, NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import ConnectionLost, RequestTimeout
from xsfs.xenstore.permissions import perms_text
from xsfs.xenstore.protocol import Request

if TYPE_CHECKING:
    from xsfs.fs.inodes import InodeTable


class Directory(XenstoreNode):
    """A Xenstore node as a directory."""

    __slots__ = ("was_missing",)

    kind = stat.S_IFDIR
    entry_timeout = DIRECTORY_ENTRY_TIMEOUT
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
        return self.table.paths.get(self) or self.table.path_of(self)

    @property
    def always_there(self) -> bool:
        return self.view.is_always_there(self.path)

    def is_of_kind(self, state: NodeState) -> bool:
        return state.has_children or self.view.is_directory(self.path, state)

    def require_directory(self, state: NodeState | None) -> NodeState:
        """The state of the node if it still is a directory.  Fails with ESTALE if not."""
        if state is None and self.always_there:
            return EMPTY_NODE
        if state is None:
            self.scratch.drop_below(self.path)
        if state is None or not self.is_of_kind(state):
            refuse(errno.ESTALE)
        return state

    async def getattr(self) -> EntryAttributes:
        self.require()
        path = self.path
        state = await self.view.fetch_directory(path)
        if await self.is_elsewhere(path, state):
            return await self.getattr()
        return self.attributes(self.require_directory(state))

    async def require_present(self) -> None:
        """Fail with ESTALE if the node does not exist: the kernel then looks its path up again."""
        if not await self._is_present():
            refuse(errno.ESTALE)

    async def _is_present(self) -> bool:
        self.require()
        if self.always_there:
            return True
        (reply,) = await self.view.commands.pipeline((protocol.read(self.path),))
        if is_missing(reply):
            self.scratch.drop_below(self.path)
            return False
        return True

    def value_was_written(self) -> None:
        self.view.sticky.add(self.path, with_value=True)

    def has_dot_value(self, state: NodeState) -> bool:
        """Whether `.value` exists.

        An empty one does not, unless it was created: tools that restore a copy create each file, which must
        not exist before.
        """
        return self.view.has_dot_value(self.path, state)

    def listed_own(self) -> dict[bytes, type[Node]]:
        """The part of `own` that a listing shows, apart from `.value`."""
        return {}

    async def opendir(self, caller: Caller) -> Handle:
        handle = DirectoryHandle(self, caller)
        await handle.fetch()
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
        if self.scratch.takes(name):
            return self._lookup_scratch(name)
        return self._lookup_alias(name, pid)

    async def _lookup_own(self, kind: type[Node], name: bytes, pid: int) -> EntryAttributes:
        self.require()
        node = self.table.node(kind, self, name)
        entry = await node.looked_up(pid)
        if not self.table.is_current(node, self, name):
            node = self.table.node(kind, self, name)
            entry.st_ino = node.inode
        return self._found(node, entry)

    async def _lookup_child(self, name: bytes, pid: int) -> EntryAttributes:
        path = join(self.path, name)
        if len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        if self.open_files.get(path) is None:
            state = self.open_files.as_seen(path, await self.view.fetch_one(path))
        else:
            state = await self.open_files.fetch_one(path)
        if state is None and self.view.is_always_there(path):
            state = EMPTY_NODE
        if state is None:
            self.scratch.drop_below(path)
            # A cached entry may have led here, and a write would create the directory again.
            self.was_missing = not await self._is_present()
            refuse(errno.ENOENT)
        child = self.child(name, state, path)
        entry = child.attributes(state)
        if isinstance(child, ValueFile) and state.readable and state.value is not None:
            self.table.handover.put(pid, child.inode, state.value)
        return self._found(child, entry)

    async def _lookup_alias(self, name: bytes, pid: int) -> EntryAttributes:
        return await self._lookup_child(await self._child_name(name), pid)

    async def _lookup_forced(self, name: bytes) -> EntryAttributes:
        child = await self._child_name(name)
        path = join(self.path, child)
        state = await self.view.fetch_one(path)
        if state is None and self.open_files.get(path) is not None:
            await self.open_files.settle(path)  # its creation may be owed
            state = await self.view.fetch_one(path)
        if state is None:
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
            state is not LEAF and self._is_directory(path or join(self.path, name), state)
        ):
            return self.table.node(Directory, self, name)
        return self.table.node(ValueFile, self, name)

    def _is_directory(self, path: bytes, state: NodeState) -> bool:
        file = self.open_files.get(path)
        if file is not None and file.debt is not None and file.is_pinned:
            return False
        return self.view.is_directory(path, state)

    def _found(self, node: Node, entry: EntryAttributes) -> EntryAttributes:
        self.table.remember(node)
        return entry

    async def _child_name(self, name: bytes) -> bytes:
        """The Xenstore name behind a file name.  Fails with ENOENT for one that Xenstore cannot have."""
        if protocol.is_name(name):
            return name
        if is_alias(name):
            if (kept := self.table.name_behind(name)) is not None:
                (reply,) = await self.view.commands.pipeline(
                    (protocol.read(join(self.path, kept)),)
                )
                if not is_missing(reply):
                    return kept
            for child in await self.view.commands.list(self.path):
                if self.table.file_name(child) == name:
                    return child
        refuse(errno.ENOENT)

    def _new_path(self, name: bytes) -> bytes:
        """The path of a child that is to be created.  Fails with the errno of a name that cannot be."""
        self.require()
        if name in self.own or forced_name(name) is not None:
            refuse(errno.EPERM)
        if not protocol.is_name(name):
            refuse(errno.EINVAL)
        path = join(self.path, name)
        if len(name) > NAME_MAX or len(path) > protocol.PATH_MAX:
            refuse(errno.ENAMETOOLONG)
        return path

    # ------------------------------------------------------------------------------- creation

    async def create(
        self, name: bytes, flags: int, caller: Caller
    ) -> tuple[Handle, EntryAttributes]:
        if name == VALUE_NAME:
            entry = await self._make_dot_value()
            dot_value = self.table.node(DotValue, self, name)
            return self._opened(dot_value, flags), entry
        if self.scratch.takes(name):
            await self.require_present()
            scratch = await self._make_scratch(
                name, caller, present=errno.EEXIST if flags & os.O_EXCL else errno.ESTALE
            )
            return ScratchHandle(scratch, flags), self._found(scratch, scratch.attributes())
        path = self._new_path(name)
        is_exclusive = bool(flags & os.O_EXCL)
        if is_exclusive:
            await self._make(path, directory=False, missing_parent=errno.ESTALE)
        elif self.was_missing:
            await self.require_present()
        file = self.table.node(ValueFile, self, name)
        handle = self._opened(file, flags)
        if is_exclusive:
            handle.file.is_pinned = True
        else:
            handle.create()
        return handle, self._found(file, file.attributes(EMPTY_NODE))

    def _opened(self, file: ValueFile, flags: int) -> ValueHandle:
        return ValueHandle(file, self.open_files.open(file.path, file), flags)

    async def _make_dot_value(self) -> EntryAttributes:
        """Create `.value`.  Its node exists, so no request is needed."""
        state = self.require_directory(await self.view.fetch_one(self.path))
        if state.value:
            refuse(errno.EEXIST)
        self.value_was_written()
        node = self.table.node(DotValue, self, VALUE_NAME)
        return self._found(node, node.attributes(state))

    async def make_file(self, name: bytes, caller: Caller) -> EntryAttributes:
        if name == VALUE_NAME:
            return await self._make_dot_value()
        if self.scratch.takes(name):
            await self._require_existing()
            scratch = await self._make_scratch(name, caller, present=errno.EEXIST)
            return self._found(scratch, scratch.attributes())
        path = self._new_path(name)
        await self._make(path, directory=False, missing_parent=errno.ENOENT)
        file = self.table.node(ValueFile, self, name)
        return self._found(file, file.attributes(EMPTY_NODE))

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        path = self._new_path(name)
        await self._make(path, directory=True, missing_parent=errno.ENOENT)
        self.view.sticky.add(path)
        directory = self.table.node(Directory, self, name)
        return self._found(directory, directory.attributes(EMPTY_NODE))

    async def make_symlink(self, name: bytes) -> EntryAttributes:
        await self._require_existing()
        refuse(errno.EPERM)

    async def _require_existing(self) -> None:
        """Fail with ENOENT if the node does not exist.

        After ESTALE the kernel looks the directory up again at a CREATE, but not at a MKNOD or SYMLINK.
        """
        try:
            await self.require_present()
        except pyfuse3.FUSEError:
            refuse(errno.ENOENT)

    async def _make(self, path: bytes, *, directory: bool, missing_parent: int) -> None:
        """Create a node.

        missing_parent  the errno if this directory does not exist: ESTALE if the kernel then looks its path
                        up again
        """
        await self.open_files.settle(path)

        async def work(commands: Commands) -> Request:
            return await posix.make(
                commands,
                path,
                directory=directory,
                missing_parent=None if self.always_there else missing_parent,
            )

        before = self.open_files.get(path)
        await self.view.atomically(work)
        self.open_files.retire(before)
        self.was_written()

    # -------------------------------------------------------------------------------- removal

    async def unlink(self, name: bytes) -> None:
        self.require()
        if name == VALUE_NAME:
            await self._unlink_dot_value()
            return
        if self.scratch.takes(name):
            content = self.scratch.get(self.path, name)
            if content is None:
                refuse(errno.ENOENT)
            self.scratch.unlink(content)
            return
        path = await self._path_of_present(name)
        file = self.open_files.get(path)
        removed = Removed(b"", b"")

        async def work(commands: Commands) -> Request | None:
            nonlocal removed
            if file is not None and file.debt is not None and file.debt.found is None:
                (state,) = await self.view.fetch((path,), commands)
                if state is None:
                    return None  # its creation is still owed
            removed = await posix.removed_file(self.view, commands, path)
            return protocol.rm(path)

        async with self.open_files.changing(path):
            await self.view.atomically(work)
            self._was_removed(ValueFile, path, removed)

    async def _unlink_dot_value(self) -> None:
        """Empty the value and keep the node, so that `rm -r` and rmdir can follow."""
        path = self.path
        async with self.open_files.changing(path):
            value = await self.view.commands.read(path)
            await self.view.commands.write(path, b"")
            self.view.sticky.discard_value(path)
            self.was_written()
            node = self.table.find(DotValue, self, VALUE_NAME)
            self.open_files.orphan(path, node, self.view.content.render(value), b"")

    async def rmdir(self, name: bytes) -> None:
        self.require()
        path = await self._path_of_present(name)
        removed = Removed(b"", b"")

        async def work(commands: Commands) -> Request:
            nonlocal removed
            removed = await posix.removed_directory(self.view, commands, path)
            if self.scratch.names(path):
                refuse(errno.ENOTEMPTY)
            return protocol.rm(path)

        async with self.open_files.changing_below(path):
            await self.view.atomically(work)
            self._was_removed(Directory, path, removed)

    async def _path_of_present(self, name: bytes) -> bytes:
        if name in self.own or forced_name(name) is not None:
            refuse(errno.EPERM)
        return join(self.path, await self._child_name(name))

    def _was_removed(
        self, kind: type[Directory] | type[ValueFile], path: bytes, removed: Removed
    ) -> None:
        self.view.sticky.discard(path)
        self.scratch.drop_below(path)
        self.was_written()
        node = self.table.find(kind, self, path.rpartition(b"/")[2])
        content, perms = self.view.content.render(removed.value), perms_text(removed.perms)
        self.open_files.orphan(path, node, content, perms)

    # --------------------------------------------------------------------------------- rename

    async def rename(
        self, name: bytes, target: Node, target_name: bytes, flags: int, caller: Caller
    ) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            refuse(errno.EINVAL)
        if not isinstance(target, Directory) or target.view is not self.view:
            refuse(errno.EXDEV)
        if VALUE_NAME in (name, target_name):
            refuse(errno.EXDEV)
        self.require()
        replace = not flags & pyfuse3.RENAME_NOREPLACE
        if self.scratch.takes(name) and target.scratch.takes(target_name):
            await self._rename_scratch(name, target, target_name, replace=replace)
            return
        if self.scratch.takes(name):
            await self._write_scratch(name, target, target_name, replace=replace)
            return
        if target.scratch.takes(target_name):
            await self._take_into_scratch(name, target, target_name, caller, replace=replace)
            return
        source_path = await self._path_of_present(name)
        target_path = await target._target_path(target_name)
        if source_path == target_path:
            return
        if target_path.startswith(source_path + b"/"):
            refuse(errno.EINVAL)
        if source_path.startswith(target_path + b"/"):
            refuse(errno.ENOTEMPTY)
        done: posix.Renamed | None = None

        async def work(commands: Commands) -> None:
            nonlocal done
            done = await posix.rename(
                *(self.view, commands, source_path, target_path),
                replace=replace,
                needs_parent=not target.always_there,
            )
            is_replaced = done.is_directory and done.replaced is not None
            if is_replaced and self.scratch.names(target_path):
                refuse(errno.ENOTEMPTY)

        async with self.open_files.changing_below(source_path, target_path):
            before = self.open_files.get(target_path)
            await self.view.atomically_apart(work)
            assert done is not None
            self._was_renamed(source_path, target, target_path, done, before)

    def _was_renamed(
        self,
        source_path: bytes,
        target: Directory,
        target_path: bytes,
        done: posix.Renamed,
        before: OpenFile | None,
    ) -> None:
        old_name, new_name = source_path.rpartition(b"/")[2], target_path.rpartition(b"/")[2]
        if done.replaced is not None:
            kind = Directory if done.is_directory else ValueFile
            target._was_removed(kind, target_path, done.replaced)
        else:
            self.open_files.retire(before)
        for moved_kind in (Directory, ValueFile):
            if (node := self.table.find(moved_kind, self, old_name)) is not None:
                self.table.move(node, target, new_name)
        self.was_written()
        self.open_files.move(source_path, target_path)
        self.scratch.move_below(source_path, target_path)
        self.view.sticky.move(source_path, target_path)
        if done.is_directory:
            # The old name may have made it a directory by convention, and the new one does not.
            self.view.sticky.add(target_path)

    async def _target_path(self, name: bytes) -> bytes:
        """The path of a node to which something is renamed."""
        return await self._path_of_present(name) if is_alias(name) else self._new_path(name)

    # --------------------------------------------------------------------------- scratch files

    @property
    def scratch(self) -> ScratchFiles:
        """The scratch files of the mount; an empty table in a transaction."""
        return self.table.scratch_of(self.view)

    def scratch_names(self) -> list[bytes]:
        """The names of the scratch files in it."""
        return self.scratch.names(self.path)

    def scratch_file(self, name: bytes) -> ScratchFile | None:
        """The node for the scratch file of this name, if there is one."""
        content = self.scratch.get(self.path, name)
        if content is None:
            return None
        node = self.table.find(ScratchFile, self, name)
        if node is not None and node.content is not content:
            node.gone = True  # another file has its name by now
        return self.table.node(ScratchFile, self, name)

    async def _lookup_scratch(self, name: bytes) -> EntryAttributes:
        if self.scratch.get(self.path, name) is not None:
            await self._require_existing()
        if (node := self.scratch_file(name)) is None:
            refuse(errno.ENOENT)
        return self._found(node, node.attributes())

    async def _make_scratch(self, name: bytes, caller: Caller, *, present: int) -> ScratchFile:
        """Create a scratch file.  Fails with the errno `present` if there is one of this name."""
        content = await self.scratch.new(self.view, caller)
        path = self.path
        if self.scratch.get(path, name) is not None:
            self.scratch.release(content)
            refuse(present)
        self.scratch.link(content, path, name)
        node = self.scratch_file(name)
        assert node is not None
        return node

    async def _rename_scratch(
        self, name: bytes, target: Directory, target_name: bytes, *, replace: bool
    ) -> None:
        await target.require_present()
        node, replaced = self.scratch_file(name), target.scratch_file(target_name)
        if node is None:
            refuse(errno.ENOENT)
        if replaced is not None:
            if not replace:
                refuse(errno.EEXIST)
            if replaced.content is node.content:
                return
            replaced.gone = True
        self.scratch.link(node.content, target.path, target_name)
        if node.lookups:
            self.table.move(node, target, target_name)

    async def _write_scratch(
        self, name: bytes, target: Directory, target_name: bytes, *, replace: bool
    ) -> None:
        """Rename a scratch file to a node: one WRITE of its content."""
        path = await target._target_path(target_name)
        scratch = self.scratch_file(name)
        if scratch is None:
            refuse(errno.ENOENT)
        content = scratch.content
        async with content.lock:
            if content.place is None:
                refuse(errno.ENOENT)
            scratch.require_mode_of_node()
            value = self.view.content.parse(bytes(content.data))
            if len(value) > protocol.value_max(path, self.view.commands.payload_max):
                refuse(errno.EFBIG)
            replaced: Removed | None = None

            async def work(commands: Commands) -> Request | None:
                nonlocal replaced
                (state,) = await self.view.fetch((path,), commands)
                replaced = await posix.replaced(
                    *(self.view, commands, path, state),
                    by_directory=False,
                    replace=replace,
                    needs_parent=not target.always_there,
                )
                return await posix.write_with_perms(commands, path, value, content.perms)

            async with self.open_files.changing_below(path):
                await self.view.atomically(work)
                self.scratch.unlink(content)
                if replaced is not None:
                    target._was_removed(ValueFile, path, replaced)
            self.view.sticky.discard(path)
            self.was_written()
            content.become(self.table.node(ValueFile, target, path.rpartition(b"/")[2]))

    async def _take_into_scratch(
        self,
        name: bytes,
        target: Directory,
        target_name: bytes,
        caller: Caller,
        *,
        replace: bool,
    ) -> None:
        """Rename a file's node to a scratch name: its value and permissions are taken along."""
        path = await self._path_of_present(name)
        if join(target.path, b"").startswith(join(path, b"")):
            refuse(errno.EINVAL)
        await target.require_present()
        if not replace and target.scratch_file(target_name) is not None:
            refuse(errno.EEXIST)
        content = await self.scratch.new(self.view, caller)
        taken: Removed | None = None

        async def work(commands: Commands) -> Request:
            nonlocal taken
            taken = await posix.removed_file(self.view, commands, path, if_directory=errno.EINVAL)
            content.perms = taken.perms
            await self.scratch.replace(self.view, content, self.view.content.render(taken.value))
            return protocol.rm(path)

        try:
            async with self.open_files.changing_below(path):
                await self.view.atomically(work)
                assert taken is not None
                file = self.open_files.get(path)
                self._was_removed(ValueFile, path, taken)
                if file is not None and file.orphan is not None:
                    file.orphan.became_scratch = True
            self.scratch.link(content, target.path, target_name)
        except (ConnectionLost, RequestTimeout):
            if taken is not None:
                # If the transaction was committed after all, the value is nowhere else.
                self.scratch.link(content, target.path, target_name)
            raise
        finally:
            self.scratch.release(content)


class ForcedDirectory(Directory):
    """`NAME.d`: a node as a directory, even if it looks like a file."""

    __slots__ = ()

    def value_was_written(self) -> None:
        """NAME stays what it is."""

    def has_dot_value(self, state: NodeState) -> bool:
        return True

    def is_of_kind(self, state: NodeState) -> bool:
        return True


class WholeStoreDirectory(Directory):
    """`.root`: the whole store from `/`, whatever the mount's root is."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        return b"/"

    def is_of_kind(self, state: NodeState) -> bool:
        return True


class RootDirectory(Directory):
    """The root of a tree: of the mount, or of a transaction."""

    __slots__ = ()

    own: ClassVar[Mapping[bytes, type[Node]]] = {
        **Directory.own,
        b".root": WholeStoreDirectory,
        b".domid": DomidFile,
        b".stats": StatsFile,
        b".domain": DomainsDirectory,
    }

    @property
    def always_there(self) -> bool:
        return True

    @property
    def path(self) -> bytes:
        return self.view.root

    def is_of_kind(self, state: NodeState) -> bool:
        return True

    def listed_own(self) -> dict[bytes, type[Node]]:
        if not self.table.visible:
            return {}
        hidden = (VALUE_NAME, b".watch")
        return {name: kind for name, kind in self.own.items() if name not in hidden}
