"""The Xenstore wire protocol: bytes in, messages out; no sockets, no clock, no tasks.

A message is a header of four native 32-bit words (type, req_id, tx_id, length) and a payload.
The functions named after the protocol's own words (`read`, `write`, ...) make requests.  The functions
that begin with `decode_` take replies apart.  Bytes from the peer that the protocol does not allow raise
`WireError`.  A request that the caller may not send raises `ValueError` before a byte of it leaves,
because an over-long or ill-formed request kills the connection or puts it out of step.

Facts are from xen/include/public/io/xs_wire.h and docs/misc/xenstore.txt of Xen 4.17 to 4.22, and from
the behaviour of the daemons (docs/dev/protocol.md).
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("=IIII")
HEADER_SIZE: Final = HEADER.size

PAYLOAD_MAX: Final = 4096
"""XENSTORE_PAYLOAD_MAX: the longest payload of a request on a socket."""

DEVICE_PAYLOAD_MAX: Final = PAYLOAD_MAX - HEADER.size
"""On /dev/xen/xenbus the limit of 4096 holds for header and payload together."""

REPLY_MAX: Final = 16 << 20
"""The longest reply that is accepted.  oxenstored ignores PAYLOAD_MAX and answers DIRECTORY with the
whole listing: 16 MiB are 400,000 children named by UUID.  More is garbage, not a listing."""

PATH_MAX: Final = PAYLOAD_MAX - 1
"""The longest path in bytes.  Each daemon has lower limits of its own, which its replies tell: Xen 4.17
has 2048, and from Xen 4.18 on dom0 has none but the payload's."""


class Op(enum.IntEnum):
    """enum xsd_sockmsg_type.  20 was RESTRICT.  Daemons older than Xen 4.21 answer 23 and up with ENOSYS."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26


ERRORS: Final = frozenset(
    (
        # xsd_errors of xs_wire.h
        *("EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO"),
        *("ENOTEMPTY", "ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM"),
        # oxenstored's name for a full quota
        "EQUOTA",
    )
)
"""The names that an ERROR reply of the known daemons carries."""


class WireError(Exception):
    """The peer broke the protocol: nothing more that this connection delivers can be trusted.  The text goes
    to the log, so it shows no payload, which may be a value."""


Message = tuple[int, int, int, bytes]
"""One message of either direction: type, req_id, tx_id, payload.  A peer may send any type."""


class Request(NamedTuple):
    """A request, without the numbers that a connection and a transaction add."""

    op: Op
    payload: bytes

    @property
    def path(self) -> bytes:
        """The payload's first string: the path of most requests, the domid of the others."""
        return self.payload.partition(b"\0")[0]

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice has no more effect than sending it once."""
        return self.op in _REPEATABLE


_REPEATABLE: Final = frozenset(
    (
        *(Op.DIRECTORY, Op.DIRECTORY_PART, Op.READ, Op.GET_PERMS),
        *(Op.GET_DOMAIN_PATH, Op.IS_DOMAIN_INTRODUCED),
    )
)


class Parser:
    """Turns the bytes of one direction of a connection, in pieces of any size, into messages."""

    def __init__(self, payload_max: int = REPLY_MAX) -> None:
        self._payload_max = payload_max
        self._begun = bytearray()
        """The beginning of a message of which more is to come."""
        self._needed = 0
        """How many bytes that message has, or its header."""
        self.error: WireError | None = None
        """Set once garbage has come, which ends the messages."""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are whole now.  After garbage, none."""
        if self.error is not None:
            return []
        if self._begun:
            self._begun += data
            if len(self._begun) < self._needed:
                return []
            data = bytes(self._begun)
            self._begun.clear()
        found: list[Message] = []
        start, size, needed = 0, len(data), HEADER_SIZE
        while size - start >= HEADER_SIZE:
            op, req_id, tx_id, length = HEADER.unpack_from(data, start)
            if length > self._payload_max:
                limit = self._payload_max
                self.error = WireError(f"a message of {length} bytes, over the limit of {limit}")
                return found
            body = start + HEADER_SIZE
            end = body + length
            if size < end:
                needed = end - start
                break
            found.append((op, req_id, tx_id, data[body:end]))
            start = end
        if start < size:
            self._begun += data[start:]
            self._needed = needed
        return found

    @property
    def partial(self) -> bool:
        """Whether the last message has come only in part."""
        return bool(self._begun)


def encode(op: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """The bytes of one message.  ValueError if `op` is no 32-bit number."""
    try:
        return HEADER.pack(op, req_id, tx_id, len(payload)) + payload
    except struct.error:
        raise ValueError(
            f"not a message: type {op}, request {req_id}, transaction {tx_id}"
        ) from None


# ---------------------------------------------------------------------------------------- paths

NAME: Final = rb"[A-Za-z0-9_@-]+"
"""The pattern of one component of a path."""

_NAME = re.compile(NAME)
_PATH = re.compile(rb"/|/?%s(?:/%s)*" % (NAME, NAME))


def is_name(name: bytes) -> bool:
    """Whether the daemons accept `name` as one component of a path."""
    return _NAME.fullmatch(name) is not None


def check_path(path: bytes) -> bytes:
    """Return the path.  ValueError if every daemon would reject it.

    A path is absolute, relative to the domain's home, or special (`@releaseDomain`).
    """
    if len(path) > PATH_MAX:
        raise ValueError(f"the path is longer than {PATH_MAX} bytes")
    if not _PATH.fullmatch(path):
        raise ValueError(f"not a Xenstore path: {path[:80]!r}")
    return path


def value_max(path: bytes, payload_max: int = PAYLOAD_MAX) -> int:
    """The length in bytes of the longest value that a WRITE to `path` can carry."""
    return payload_max - len(path) - 1


# ------------------------------------------------------------------------------------- requests


# Most requests are these two, and to find a member of an enum takes 0.2 microseconds.
_READ: Final = Op.READ
_DIRECTORY: Final = Op.DIRECTORY


def read(path: bytes) -> Request:
    return Request(_READ, path + b"\0")


def directory(path: bytes) -> Request:
    return Request(_DIRECTORY, path + b"\0")


def directory_part(path: bytes, offset: int) -> Request:
    """The part of a listing from byte `offset` on, for a listing that is too long for one reply."""
    return Request(Op.DIRECTORY_PART, b"%s\0%d\0" % (path, offset))


def get_perms(path: bytes) -> Request:
    return Request(Op.GET_PERMS, path + b"\0")


def write(path: bytes, value: bytes) -> Request:
    """The value ends with the payload, so it may hold any bytes, NUL included."""
    return Request(Op.WRITE, path + b"\0" + value)


def mkdir(path: bytes) -> Request:
    return Request(Op.MKDIR, path + b"\0")


def rm(path: bytes) -> Request:
    # oxenstored removes everything at RM of /, which no client intends.
    if path == b"/":
        raise ValueError("the root cannot be removed")
    return Request(Op.RM, path + b"\0")


def watch(path: bytes, token: bytes, depth: int | None = None) -> Request:
    """`depth` limits how far below the path changes count.  Daemons older than Xen 4.22 reject it."""
    limit = b"" if depth is None else b"%d\0" % depth
    return Request(Op.WATCH, path + b"\0" + token + b"\0" + limit)


def unwatch(path: bytes, token: bytes) -> Request:
    return Request(Op.UNWATCH, path + b"\0" + token + b"\0")


def transaction_start() -> Request:
    # oxenstored does not answer a request without a payload until more bytes come.
    return Request(Op.TRANSACTION_START, b"\0")


def transaction_end(commit: bool) -> Request:
    return Request(Op.TRANSACTION_END, b"T\0" if commit else b"F\0")


def get_domain_path(domid: int) -> Request:
    return Request(Op.GET_DOMAIN_PATH, b"%d\0" % domid)


def is_domain_introduced(domid: int) -> Request:
    return Request(Op.IS_DOMAIN_INTRODUCED, b"%d\0" % domid)


def get_feature() -> Request:
    """The features of the daemon, as a decimal number.  Daemons older than Xen 4.21 answer ENOSYS."""
    return Request(Op.GET_FEATURE, b"\0")


def domain_request(op: Op, *numbers: int) -> Request:
    """INTRODUCE (domid, gfn, port), RELEASE, RESUME (domid), SET_TARGET (domid, target)."""
    return Request(op, b"".join(b"%d\0" % number for number in numbers))


# -------------------------------------------------------------------------------------- replies


def strings(payload: bytes) -> list[bytes]:
    """The NUL-terminated strings of a payload.  WireError if the last one has no NUL."""
    if not payload:
        return []
    if payload[-1]:
        raise WireError("a string without its NUL")
    return payload[:-1].split(b"\0")


def decode_error(payload: bytes) -> str:
    """The name in an ERROR reply, such as `ENOENT`.  It need not be among ERRORS."""
    name = payload.rstrip(b"\0")
    if not name.isalnum() or len(name) > 40:
        raise WireError(f"an ERROR reply of {len(payload)} bytes that is no name")
    return name.decode("ascii", "replace")


def decode_names(payload: bytes) -> list[bytes]:
    """The children's names of a DIRECTORY reply.  They can be anything: see `is_name`."""
    return strings(payload)


def encode_names(names: Iterable[bytes]) -> bytes:
    """The names as in a DIRECTORY reply, for names that came in several replies."""
    return b"".join([name + b"\0" for name in names])


def decode_part(payload: bytes) -> tuple[bytes, bytes, bool]:
    """A DIRECTORY_PART reply: (generation, part of the listing, whether it is the last part).

    An empty string after the names marks the end.  xapi's oxenstored cuts parts in the middle of names,
    so only the last part has to end with a NUL.
    """
    generation, nul, part = payload.partition(b"\0")
    if not nul or not generation.isdigit() or not part:
        raise WireError(f"{len(payload)} bytes that are no DIRECTORY_PART reply")
    last = part == b"\0" or part.endswith(b"\0\0")
    return generation, part[:-1] if last else part, last


def decode_transaction_id(payload: bytes) -> int:
    digits = payload.rstrip(b"\0")
    if not digits.isdigit() or len(digits) > 10 or not 0 < int(digits) < 1 << 32:
        raise WireError(f"{len(payload)} bytes that are no transaction id")
    return int(digits)


def decode_string(payload: bytes) -> bytes:
    """GET_DOMAIN_PATH and IS_DOMAIN_INTRODUCED: one string."""
    found = strings(payload)
    if len(found) != 1:
        raise WireError(f"{len(payload)} bytes that are not one string")
    return found[0]


def decode_event(payload: bytes) -> tuple[bytes, bytes]:
    """A WATCH_EVENT: (path, token).  Newer daemons add a third string to special events."""
    found = strings(payload)
    if len(found) < 2:
        raise WireError(f"{len(payload)} bytes that are no watch event")
    return found[0], found[1]
