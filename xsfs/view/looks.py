"""What to ask Xenstore in order to know what a node is, and what its answers mean.  Pure functions.

A node is seen by READ and DIRECTORY, and by GET_PERMS where the rights of the domain that asks may not
suffice.  Where only its kind is wanted READ is left out: it counts with empty nodes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from xsfs.view.names import join
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.permissions import access_of, decode_perms
from xsfs.xenstore.protocol import Op, Request
from xsfs.xenstore.unanswered import Reply


class Look(NamedTuple):
    """What one burst told of a node."""

    value: bytes
    """Empty also where it was not asked for, as the kind does not depend on it."""
    has_children: bool
    readable: bool
    writable: bool
    whole: bool = True
    """Whether the value was asked for."""

    @property
    def hidden(self) -> bool:
        """Whether this domain may not even know what the node is."""
        return not self.readable


HIDDEN: Final = Look(b"", False, False, True)
"""A node that may not be read.  Whether it may be written only a write can tell."""

LEAF: Final = Look(b"", False, True, True, whole=False)
"""A node without children, whose value was not asked for."""

PARENT: Final = Look(b"", True, True, True, whole=False)
"""One with children."""

NOTHING: Final = Look(b"", False, True, True)
"""The root of a mount whose node is not there: a fresh store has no /local/domain/0."""

Answers = Sequence[Reply | None]
"""To READ, DIRECTORY and, where they are asked for, GET_PERMS of a node.  None: not asked."""

_READ: Final = Op.READ
_DIRECTORY: Final = Op.DIRECTORY
_new: Final = tuple.__new__
"""Makes a Request or a Look without the Python function that a NamedTuple's own constructor is."""

_ABSENT: Final = frozenset(("ENOENT", "EINVAL"))
"""EINVAL: a path longer than the store takes, so that there can be no such node."""


def questions(path: bytes, *, perms: bool, value: bool = True) -> Sequence[Request]:
    """What to ask in order to know all about a node; without its value, of which kind it is."""
    payload = path + b"\0"
    if value:
        asked = _new(Request, (_READ, payload)), _new(Request, (_DIRECTORY, payload))
        return (*asked, Request(Op.GET_PERMS, payload)) if perms else asked
    of_kind = Request(Op.DIRECTORY, payload)
    return (of_kind, Request(Op.GET_PERMS, payload)) if perms else (of_kind,)


def questions_of_kind(path: bytes, names: Iterable[bytes], *, perms: bool) -> list[Request]:
    """What to ask in order to know which of a node's children are directories, but for empty ones
    that could be: of each DIRECTORY, and GET_PERMS if need be."""
    above = join(path, b"")
    payloads = [b"%s%s\0" % (above, name) for name in names]
    if not perms:
        return [_new(Request, (_DIRECTORY, payload)) for payload in payloads]
    ops = (Op.DIRECTORY, Op.GET_PERMS)
    return [Request(op, payload) for payload in payloads for op in ops]


def understand(answers: Answers, domid: int) -> Look | None:
    """What a node is for this domain; None if there is none.

    Raises XenstoreError for a verdict that says neither.
    """
    value, children = answers[0], answers[1]
    perms = answers[2] if len(answers) > 2 else None
    if type(children) is bytes and (value is None or type(value) is bytes):
        # Of most nodes everything is told.
        if len(answers) == 2:
            if value is None:
                return PARENT if children else LEAF
            return _new(Look, (value, children != b"", True, True, True))
        if type(perms) is bytes:
            return _told(value, bool(children), perms, domid)
    for reply in (value, children):
        if isinstance(reply, XenstoreError) and (reply is value or reply.name != "E2BIG"):
            if reply.name in _ABSENT:
                return None
            if reply.name == "EACCES":
                return HIDDEN
            raise reply
    assert not isinstance(value, XenstoreError)
    if isinstance(perms, XenstoreError):
        return None if perms.name == "ENOENT" else HIDDEN
    # E2BIG: there are too many children for one reply.
    return _told(value, bool(children), perms, domid)


def _told(value: bytes | None, has_children: bool, perms: bytes | None, domid: int) -> Look:
    writable = perms is None or access_of(decode_perms(perms), domid)[1]
    return Look(value or b"", has_children, True, writable, value is not None)
