"""Directories: Xenstore nodes with children, and the names that xsfs adds to them.

`own` of each class is the table of xsfs's own names in such a directory: a new kind of file is a new
class and a line there.  A name is looked up in this order: own names, `NAME.d`, aliases of long names,
children.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import ClassVar

import pyfuse3
from pyfuse3 import EntryAttributes

from xsfs.fs import posix
from xsfs.fs.files import DotValue, ExpectedFile, ValueFile, ValueHandle
from xsfs.fs.inodes import DIRECTORY_ENTRY_TIMEOUT, Caller, Handle, Node, refuse
from xsfs.fs.listing import ListedNode
from xsfs.fs.special import DomidFile, StatsFile
from xsfs.fs.watch_files import WatchFile
from xsfs.view.looks import LEAF, NOTHING, Look
from xsfs.view.names import NAME_MAX, VALUE_NAME, forced_name, is_alias, join
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Session
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.eventual import Eventual, result_of
from xsfs.xenstore.protocol import Request

log = logging.getLogger(__name__)


class Directory(ListedNode):
    """A Xenstore node as a directory."""

    __slots__ = ()

    kind = stat.S_IFDIR
    entry_timeout = DIRECTORY_ENTRY_TIMEOUT
    own: ClassVar[Mapping[bytes, type[Node]]] = {VALUE_NAME: DotValue, b".watch": WatchFile}

    @property
    def path(self) -> bytes:
        return self.tree.paths.get(self) or self.tree.path_of(self)

    def is_of_kind(self, look: Look) -> bool:
        return look.has_children or self.view.is_directory(self.path, look)

    async def look(self) -> Look:
        """What the node is now; ESTALE if it is no directory any more."""
        self.require()
        return self.still(await self.view.look_at_kind(self.path))

    def still(self, look: Look | None) -> Look:
        """What was seen of the node, if it is still a directory; else ESTALE."""
        if look is None and self.lasting:
            return NOTHING
        if look is None or not self.is_of_kind(look):
            refuse(errno.ESTALE)
        return look

    async def getattr(self) -> EntryAttributes:
        return self.attributes(await self.look())

    @property
    def lasting(self) -> bool:
        return isinstance(self.parent, ListedNode) and self.name in self.parent.lasting_children()

    def value_was_written(self) -> None:
        self.view.known.add(self.path, with_value=True)

    def has_dot_value(self, look: Look) -> bool:
        """Whether `.value` is there.

        Not while it is empty: the tools that restore a copy make each file that must not exist.
        """
        return self.view.has_dot_value(self.path, look)

    # --------------------------------------------------------------------------------- lookup

    def lookup(self, name: bytes, pid: int) -> Eventual[EntryAttributes]:
        if len(name) > NAME_MAX:
            refuse(errno.ENAMETOOLONG)
        if (kind := self.own.get(name)) is not None:
            return self._lookup_own(kind, name, pid)
        if name.isalnum() or protocol.is_name(name):  # the former costs less
            return self._lookup_child(name, pid)
        if (forced := forced_name(name)) is not None:
            return self._lookup_forced(forced)
        return self._lookup_alias(name, pid)

    async def _lookup_own(self, kind: type[Node], name: bytes, pid: int) -> EntryAttributes:
        self.require()
        node = self.tree.node(kind, self, name)
        entry = await node.looked_up(pid)
        if not self.tree.stands(node, self, name):
            node = self.tree.node(kind, self, name)
            entry.st_ino = node.inode
        return self._found(node, entry)

    async def _lookup_alias(self, name: bytes, pid: int) -> EntryAttributes:
        return await result_of(self._lookup_child(await self._child_name(name), pid))

    def _lookup_child(self, child: bytes, pid: int) -> Eventual[EntryAttributes]:
        path = join(self.path, child)
        expected = ExpectedFile(self, child, path)
        if len(path) > protocol.PATH_MAX:
            return self._understand(expected, None, pid)
        look = self.view.look_at_once(path, expected.make)
        if type(look) is Look and not self.view.is_directory(path, look):
            return expected.found(look, pid)
        return self._understand(expected, look, pid)

    async def _understand(
        self, expected: ExpectedFile, seen: Eventual[Look | None], pid: int
    ) -> EntryAttributes:
        look, child = await result_of(seen), expected.name
        if look is None and child in self.lasting_children():
            look = NOTHING
        if look is None:
            if (file := self._in_creation(child)) is not None:
                return self._found(file, file.entry(0))
            # A cached entry may have led here: is the directory itself still there?
            await self.require_present()
            refuse(errno.ENOENT)
        if self.view.is_directory(expected.path, look):
            directory = self.tree.node(Directory, self, child)
            return self._found(directory, directory.attributes(look))
        return expected.found(look, pid)

    async def _lookup_forced(self, name: bytes) -> EntryAttributes:
        child = await self._child_name(name)
        look = await self.view.look(join(self.path, child))
        if look is None:
            refuse(errno.ENOENT)
        directory = self.tree.node(ForcedDirectory, self, child)
        return self._found(directory, directory.attributes(look))

    def child(self, name: bytes, look: Look) -> Directory | ValueFile:
        if name == VALUE_NAME:
            return self.tree.node(DotValue, self, name)
        # Its path is made only where that depends on it.
        if look.has_children or (
            look is not LEAF and self.view.is_directory(join(self.path, name), look)
        ):
            return self.tree.node(Directory, self, name)
        return self.tree.node(ValueFile, self, name)

    def leaves(self) -> Callable[[bytes], ValueFile]:
        return partial(self.tree.node, ValueFile, self)

    def _in_creation(self, name: bytes) -> ValueFile | None:
        """The file of this name that is open, and made when it is first written or closed."""
        file = self.tree.find(ValueFile, self, name)
        return file if file is not None and file.creating else None

    def _found(self, node: Node, entry: EntryAttributes) -> EntryAttributes:
        self.tree.remember(node)
        return entry

    async def require_present(self) -> None:
        """ESTALE unless the node is there: the kernel then looks its path up again."""
        self.require()
        if self.lasting:
            return
        (reply,) = await self.view.session.burst((protocol.read(self.path),))
        if isinstance(reply, XenstoreError) and reply.name == "ENOENT":
            refuse(errno.ESTALE)

    async def _child_name(self, name: bytes) -> bytes:
        """The Xenstore name behind a file name; ENOENT for one that Xenstore cannot have."""
        if protocol.is_name(name):
            return name
        if is_alias(name):
            if (kept := self.tree.aliases.get(name)) is not None:
                (reply,) = await self.view.session.burst((protocol.read(join(self.path, kept)),))
                if not isinstance(reply, XenstoreError) or reply.name != "ENOENT":
                    return kept
            for child in await self.view.session.list(self.path):
                if self.tree.aliases.file_name(child) == name:
                    return child
        refuse(errno.ENOENT)

    def _new_path(self, name: bytes) -> bytes:
        """The path of a child to be made; the error that says why there can be none."""
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

    async def create(self, name: bytes, flags: int) -> tuple[Handle, EntryAttributes]:
        if name == VALUE_NAME:
            entry = await self._make_dot_value()
            handle = ValueHandle(self.tree.node(DotValue, self, name), flags)
            if flags & os.O_TRUNC:
                handle.empty()
            return handle, entry
        path = self._new_path(name)
        if flags & os.O_EXCL:
            await self._make(path, directory=False)
        file = self.tree.node(ValueFile, self, name)
        handle = ValueHandle(file, flags)
        if flags & os.O_EXCL:
            handle.claim()
        else:
            if flags & os.O_TRUNC:
                handle.empty()
            handle.create()
        return handle, self._found(file, file.entry(0))

    async def _make_dot_value(self) -> EntryAttributes:
        """The node is there: all there is to make is the name."""
        look = self.still(await self.view.look(self.path))
        if look.value:
            refuse(errno.EEXIST)
        self.value_was_written()
        node = self.tree.node(DotValue, self, VALUE_NAME)
        return self._found(node, node.attributes(look))

    async def make_file(self, name: bytes) -> EntryAttributes:
        if name == VALUE_NAME:
            return await self._make_dot_value()
        await self._make(self._new_path(name), directory=False)
        file = self.tree.node(ValueFile, self, name)
        return self._found(file, file.entry(0))

    async def make_directory(self, name: bytes, caller: Caller) -> EntryAttributes:
        path = self._new_path(name)
        await self._make(path, directory=True)
        self.view.known.add(path)
        directory = self.tree.node(Directory, self, name)
        return self._found(directory, directory.entry(0))

    async def _make(self, path: bytes, *, directory: bool) -> None:
        async def work(session: Session) -> Request:
            return await posix.make(session, path, directory=directory, in_present=not self.lasting)

        await self.view.atomically(work)
        self.was_written()

    # -------------------------------------------------------------------------------- removal

    async def unlink(self, name: bytes) -> None:
        self.require()
        if name == VALUE_NAME:
            # So that rm -r and rmdir can follow: the value goes, the node stays.
            await self.view.session.write(self.path, b"")
            self.view.known.discard_value(self.path)
            self.was_written()
            return
        path = await self._path_of_present(name)
        if (file := self._in_creation(name)) is not None:
            await file.make()

        async def work(session: Session) -> Request:
            return await posix.remove_file(self.view, session, path)

        await self.view.atomically(work)
        self._removed(ValueFile, path)

    async def rmdir(self, name: bytes) -> None:
        self.require()
        path = await self._path_of_present(name)

        async def work(session: Session) -> Request:
            return await posix.remove_directory(self.view, session, path)

        await self.view.atomically(work)
        self._removed(Directory, path)

    async def _path_of_present(self, name: bytes) -> bytes:
        if name in self.own or forced_name(name) is not None:
            refuse(errno.EPERM)
        return join(self.path, await self._child_name(name))

    def _removed(self, kind: type[Node], path: bytes) -> None:
        self.view.known.discard(path)
        self.was_written()
        if (node := self.tree.find(kind, self, path.rpartition(b"/")[2])) is not None:
            node.gone = True

    # --------------------------------------------------------------------------------- rename

    async def rename(self, name: bytes, target: Node, target_name: bytes, flags: int) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            refuse(errno.EINVAL)
        if not isinstance(target, Directory) or target.view is not self.view:
            refuse(errno.EXDEV)
        if VALUE_NAME in (name, target_name):
            refuse(errno.EXDEV)
        self.require()
        source_path = await self._path_of_present(name)
        target_path = (
            await target._path_of_present(target_name)
            if is_alias(target_name)
            else target._new_path(target_name)
        )
        if source_path == target_path:
            return
        if target_path.startswith(source_path + b"/"):
            refuse(errno.EINVAL)
        if source_path.startswith(target_path + b"/"):
            refuse(errno.ENOTEMPTY)

        if (file := self._in_creation(name)) is not None:
            await file.make()

        is_directory = False

        async def work(session: Session) -> None:
            nonlocal is_directory
            is_directory = await posix.rename(
                *(self.view, session, source_path, target_path),
                replace=not flags & pyfuse3.RENAME_NOREPLACE,
                in_present=not target.lasting,
            )

        await self.view.atomically_apart(work)
        self._renamed(source_path, target, target_path)
        if is_directory:
            # By custom, perhaps, which the new name is not under.
            self.view.known.add(target_path)

    def _renamed(self, source_path: bytes, target: Directory, target_path: bytes) -> None:
        self.was_written()
        old_name, new_name = source_path.rpartition(b"/")[2], target_path.rpartition(b"/")[2]
        for kind in (Directory, ValueFile):
            if (replaced := self.tree.find(kind, target, new_name)) is not None:
                replaced.gone = True
            if (node := self.tree.find(kind, self, old_name)) is not None:
                self.tree.move(node, target, new_name)
        self.view.known.move(source_path, target_path)


class ForcedDirectory(Directory):
    """`NAME.d`: a node as a directory, whatever it looks like."""

    __slots__ = ()

    def value_was_written(self) -> None:
        """NAME stays what it is."""

    def has_dot_value(self, look: Look) -> bool:
        return True

    def is_of_kind(self, look: Look) -> bool:
        return True


class StoreRoot(Directory):
    """`.root`: the whole store from `/`, whatever the mount's root is."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        return b"/"

    def is_of_kind(self, look: Look) -> bool:
        return True


class RootDirectory(Directory):
    """The root of the mount."""

    __slots__ = ()

    own: ClassVar[Mapping[bytes, type[Node]]] = {
        **Directory.own,
        b".root": StoreRoot,
        b".domid": DomidFile,
        b".stats": StatsFile,
    }

    @property
    def lasting(self) -> bool:
        return True

    @property
    def path(self) -> bytes:
        return self.view.root

    def is_of_kind(self, look: Look) -> bool:
        return True

    def lasting_children(self) -> Collection[bytes]:
        return self.view.lasting_children(self.path)
