"""What value files and directories have in common: they are Xenstore nodes, with extended attributes.

Only `user.xs.perms` is listed: it is the one that belongs in a copy.  A tool that copies all listed
attributes would fail on the path, which cannot be set, and write the value twice.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes

from xsfs.fs.inodes import Node, refuse
from xsfs.view.looks import Look
from xsfs.xenstore import protocol
from xsfs.xenstore.permissions import format_permissions, parse_permissions, set_perms

ATTRIBUTE_MAX: Final = 4096
"""No permissions and no value are longer in a request."""


class XenstoreNode(Node):
    """A Xenstore node, as whatever kind of file."""

    __slots__ = ()

    @property
    def lasting(self) -> bool:
        """Whether it is there even while its node is not."""
        return False

    def attributes(self, look: Look) -> EntryAttributes:
        """What was seen of the node, as the kernel takes it."""
        return self.entry(0, look.readable, look.writable)

    def was_written(self) -> None:
        """A change of the node was carried out through the mount."""
        self.tree.prefetched.drop()

    def value_was_written(self) -> None:
        """The value was written by way of this directory's `.value`."""

    def has_dot_value(self, look: Look) -> bool:
        """Whether there is a `.value` in this directory."""
        return False

    async def getxattr(self, name: bytes) -> bytes:
        if name not in _ATTRIBUTES:
            # Never ENOSYS, which would turn extended attributes off for the whole mount.
            refuse(errno.EOPNOTSUPP if name.startswith(b"system.") else pyfuse3.ENOATTR)
        self.require()
        return await _ATTRIBUTES[name][0](self)

    async def setxattr(self, name: bytes, value: bytes) -> None:
        if name not in _ATTRIBUTES:
            refuse(errno.EOPNOTSUPP)
        self.require()
        if len(value) > ATTRIBUTE_MAX:
            refuse(errno.E2BIG)
        await _ATTRIBUTES[name][1](self, value)
        self.was_written()

    async def listxattr(self) -> list[bytes]:
        return [b"user.xs.perms"]

    async def removexattr(self, name: bytes) -> None:
        refuse(errno.EPERM if name in _ATTRIBUTES else pyfuse3.ENOATTR)


async def _get_perms(node: XenstoreNode) -> bytes:
    return format_permissions(await node.view.session.get_perms(node.path)).encode()


async def _set_perms(node: XenstoreNode, value: bytes) -> None:
    try:
        # setfattr and scripts may leave a newline or a NUL at the end.
        perms = parse_permissions(value.rstrip(b"\n\0").decode("ascii"))
    except ValueError:
        refuse(errno.EINVAL)
    if len(set_perms(node.path, perms).payload) > node.view.session.payload_max:
        refuse(errno.E2BIG)
    await node.view.session.set_perms(node.path, perms)


async def _get_path(node: XenstoreNode) -> bytes:
    return node.path


async def _set_path(node: XenstoreNode, value: bytes) -> None:
    refuse(errno.EPERM)


async def _get_value(node: XenstoreNode) -> bytes:
    return await node.view.session.read(node.path)


async def _set_value(node: XenstoreNode, value: bytes) -> None:
    if len(value) > protocol.value_max(node.path, node.view.session.payload_max):
        refuse(errno.EFBIG)
    await node.view.session.write(node.path, value)


_Get = Callable[[XenstoreNode], Awaitable[bytes]]
_Set = Callable[[XenstoreNode, bytes], Awaitable[None]]

_ATTRIBUTES: Final[dict[bytes, tuple[_Get, _Set]]] = {
    b"user.xs.perms": (_get_perms, _set_perms),
    b"user.xs.path": (_get_path, _set_path),
    b"user.xs.value": (_get_value, _set_value),
}
