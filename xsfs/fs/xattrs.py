"""Xenstore nodes as files of any kind: their times, and their extended attributes.

Only `user.xs.perms` is listed, because it is the one that belongs in a copy.  A tool that copies all listed
attributes would fail on the path, which cannot be set, and write the value twice.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import pyfuse3
from pyfuse3 import EntryAttributes

from xsfs.fs.nodes import Node, refuse
from xsfs.fs.open_files import OpenFile, Orphan, open_files_of
from xsfs.view.names import join, parent_path
from xsfs.view.view import NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import (
    Permissions,
    parse_permissions,
    perms_text,
    set_perms,
    signed_domid,
)
from xsfs.xenstore.protocol import Request

if TYPE_CHECKING:
    from xsfs.fs.inodes import InodeTable

DOMID_LIMIT: Final = 0xFFFFFFFF
"""The daemons keep a domid in 32 bits."""

ATTRIBUTE_MAX: Final = 4096
"""No permissions and no value are longer in a request."""


class XenstoreNode(Node):
    """A Xenstore node, as a file of some kind."""

    __slots__ = ("_fingerprint", "_mtime_ns", "moved_file", "open_files", "orphan_file")

    def __init__(self, table: InodeTable, view: View, parent: Node | None, name: bytes) -> None:
        super().__init__(table, view, parent, name)
        self.open_files = open_files_of(table, view)
        self._fingerprint: int | None = None
        self._mtime_ns = 0
        self.orphan_file: OpenFile | None = None
        """Its last open file, if it was removed or replaced through the mount."""
        self.moved_file: OpenFile | None = None
        """Its open file, if that was renamed by another name than the one that led here."""

    @property
    def always_there(self) -> bool:
        """Whether it is shown even if its node does not exist."""
        return False

    def seen(self, fingerprint: int) -> int:
        """The time in nanoseconds at which xsfs first saw the present value, or list of children.

        fingerprint     differs if that differs

        Xenstore keeps no times.  A constant one would make rsync, make and editors take an unchanged
        time for an unchanged value.
        """
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._mtime_ns = time.time_ns()
        return self._mtime_ns

    def attributes(self, state: NodeState) -> EntryAttributes:
        """The state of the node as the kernel takes it."""
        return self.entry(0, state.readable, state.writable, self.seen(state.children_hash))

    def was_written(self) -> None:
        """A change of the node was carried out through the mount."""
        self.table.handover.clear()

    def value_was_written(self) -> None:
        """The value was written by way of this directory's `.value`."""

    def has_dot_value(self, state: NodeState) -> bool:
        """Whether there is a `.value` in this directory."""
        return False

    async def getxattr(self, name: bytes) -> bytes:
        attribute = _ATTRIBUTES.get(name)
        if attribute is None:
            # Never ENOSYS, which would turn extended attributes off for the whole mount.
            refuse(errno.EOPNOTSUPP if name.startswith(b"system.") else pyfuse3.ENOATTR)
        if self.orphan_file is not None and self.orphan_file.orphan is not None:
            return attribute.of_orphan(self, self.orphan_file.orphan)
        self.require()
        try:
            await self.open_files.settle(self.path)
            return await attribute.get(self)
        except XenstoreError as error:
            raise self._stale_if_missing(error) from None

    async def setxattr(self, name: bytes, value: bytes) -> None:
        attribute = _ATTRIBUTES.get(name)
        if attribute is None:
            refuse(errno.EOPNOTSUPP)
        if len(value) > ATTRIBUTE_MAX:
            refuse(errno.E2BIG)
        if self.orphan_file is not None and self.orphan_file.orphan is not None:
            attribute.set_of_orphan(self, self.orphan_file.orphan, value)
            return
        self.require()
        try:
            await self.open_files.settle(self.path)
            await attribute.set(self, value)
        except XenstoreError as error:
            raise self._stale_if_missing(error) from None
        self.was_written()

    def _stale_if_missing(self, error: XenstoreError) -> Exception:
        """After ESTALE the kernel looks a path up again; an open file has gone."""
        is_stale = error.name == "ENOENT" and not self.always_there
        return pyfuse3.FUSEError(errno.ESTALE) if is_stale else error

    async def is_elsewhere(self, path: bytes, state: NodeState | None) -> bool:
        """Whether the node was not found, or is unreadable, because the domain's home has moved since
        `path` was its path."""
        if state is not None and state.readable:
            return False
        return self.path != path or await self.view.has_moved(path)

    async def listxattr(self) -> list[bytes]:
        return [PERMS_NAME]

    async def removexattr(self, name: bytes) -> None:
        """Without `user.xs.perms` a node has the permissions of its parent.  rsync -X removes the attribute
        if the source does not have it."""
        if name != PERMS_NAME:
            refuse(errno.EPERM if name in _ATTRIBUTES else pyfuse3.ENOATTR)
        if self.orphan_file is not None:
            return
        self.require()
        try:
            await self.open_files.settle(self.path)
            await _inherit_perms(self)
        except XenstoreError as error:
            raise self._stale_if_missing(error) from None
        self.was_written()


class FileOfDirectory(Node):
    """A file in each directory that shows the directory's own node, or all below it."""

    __slots__ = ()

    @property
    def directory(self) -> XenstoreNode:
        assert isinstance(self.parent, XenstoreNode)
        return self.parent

    @property
    def path(self) -> bytes:
        return self.directory.path

    @property
    def label(self) -> bytes:
        return join(super().label, self.name)

    async def require_node(self) -> None:
        """Fail with ESTALE if the directory's node does not exist."""
        self.directory.require()
        if not self.directory.always_there and await self.view.fetch_one(self.path) is None:
            refuse(errno.ESTALE)


class _Attribute:
    """One extended attribute: how it is read and set, on a node and on an orphan."""

    def __init__(
        self,
        get: Callable[[XenstoreNode], Awaitable[bytes]],
        set: Callable[[XenstoreNode, bytes], Awaitable[None]],
        of_orphan: Callable[[XenstoreNode, Orphan], bytes],
        set_of_orphan: Callable[[XenstoreNode, Orphan, bytes], None],
    ) -> None:
        self.get = get
        self.set = set
        self.of_orphan = of_orphan
        self.set_of_orphan = set_of_orphan


async def _get_perms(node: XenstoreNode) -> bytes:
    return perms_text(await node.view.commands.call(protocol.get_perms(node.path)))


async def permissions_of(view: View, text: str) -> Permissions:
    """The permissions `n0,r7` as they may be sent to the daemon.  Fails with EINVAL if they may not."""
    try:
        perms = parse_permissions(text)
    except ValueError:
        refuse(errno.EINVAL)
    if any(abs(signed_domid(entry.domid)) > DOMID_LIMIT for entry in perms):
        refuse(errno.EINVAL)
    if any(entry.is_reserved for entry in perms) and not await view.takes_reserved_domids():
        refuse(errno.EINVAL)
    return perms


async def permissions_to_set(view: View, value: bytes) -> Permissions:
    """The permissions that `user.xs.perms` is set to.  Fails with EINVAL if no node may have them."""
    try:
        # setfattr and scripts may leave a newline or a NUL at the end.
        text = value.rstrip(b"\n\0").decode("ascii")
    except UnicodeDecodeError:
        refuse(errno.EINVAL)
    return await permissions_of(view, text)


async def _set_perms(node: XenstoreNode, value: bytes) -> None:
    request = set_perms(node.path, await permissions_to_set(node.view, value))
    if len(request.payload) > node.view.commands.payload_max:
        refuse(errno.E2BIG)
    await node.view.commands.call(request)


async def _inherit_perms(node: XenstoreNode) -> None:
    """Give a node the permissions of its parent.  The owner stays, because a guest cannot change it, and in
    domain 0 the guest must not lose it."""
    path = node.path
    if path == b"/":
        refuse(errno.EPERM)

    async def work(commands: Commands) -> Request | None:
        present = perms_text(await commands.call(protocol.get_perms(path)))
        parent = perms_text(await commands.call(protocol.get_perms(parent_path(path))))
        owner = present.partition(b",")[0][1:]
        first, comma, others = parent.partition(b",")
        wanted = first[:1] + owner + comma + others
        if wanted == present:
            return None
        return set_perms(path, await permissions_of(node.view, wanted.decode("ascii")))

    await node.view.atomically(work)


def _set_orphan_perms(node: XenstoreNode, orphan: Orphan, value: bytes) -> None:
    orphan.perms = value.rstrip(b"\n\0")


async def _get_path(node: XenstoreNode) -> bytes:
    return node.path


async def _set_path(node: XenstoreNode, value: bytes) -> None:
    refuse(errno.EPERM)


def _set_orphan_path(node: XenstoreNode, orphan: Orphan, value: bytes) -> None:
    refuse(errno.EPERM)


async def _get_value(node: XenstoreNode) -> bytes:
    return await node.view.commands.call(protocol.read(node.path))


async def _set_value(node: XenstoreNode, value: bytes) -> None:
    if len(value) > protocol.value_max(node.path, node.view.commands.payload_max):
        refuse(errno.EFBIG)
    path = node.path

    async def work(commands: Commands) -> Request:
        if not node.always_there:  # WRITE would create the node
            await commands.call(protocol.read(path))
        return protocol.write(path, value)

    await node.view.atomically(work)


def _get_orphan_value(node: XenstoreNode, orphan: Orphan) -> bytes:
    return node.view.content.parse(orphan.content)


def _set_orphan_value(node: XenstoreNode, orphan: Orphan, value: bytes) -> None:
    orphan.content = node.view.content.render(value)


PERMS_NAME: Final = b"user.xs.perms"
PATH_NAME: Final = b"user.xs.path"
VALUE_ATTRIBUTE_NAME: Final = b"user.xs.value"

_ATTRIBUTES: Final[dict[bytes, _Attribute]] = {
    PERMS_NAME: _Attribute(
        _get_perms, _set_perms, lambda node, orphan: orphan.perms, _set_orphan_perms
    ),
    PATH_NAME: _Attribute(_get_path, _set_path, lambda node, orphan: node.path, _set_orphan_path),
    VALUE_ATTRIBUTE_NAME: _Attribute(_get_value, _set_value, _get_orphan_value, _set_orphan_value),
}
