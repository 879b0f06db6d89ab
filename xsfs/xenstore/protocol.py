"""The Xenstore wire protocol: bytes in, messages out; no sockets, no clock, no tasks.

A message is a header of four native 32-bit words (type, req_id, tx_id, length) and a payload.
Requests are made by the functions named after the protocol's own words (`read`, `write`, ...),
replies are taken apart by the functions that begin with `decode_`.  Whatever the peer sends that
the protocol does not allow raises `WireError`; whatever the caller may not send raises `ValueError`
before a byte of it has left, because an over-long or ill-formed request kills the connection or
puts it out of step.

Facts are from Xen 4.17: xen/include/public/io/xs_wire.h, docs/misc/xenstore.txt, and from what both
daemons do (docs/wire.md).
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("=IIII")
HEADER_SIZE: Final = HEADER.size

PAYLOAD_MAX: Final = 4096
"""XENSTORE_PAYLOAD_MAX: the longest payload of a request on a socket."""

DEVICE_PAYLOAD_MAX: Final = PAYLOAD_MAX - HEADER.size
"""On /dev/xen/xenbus the limit of 4096 holds for header and payload together."""

REPLY_MAX: Final = 16 << 20
"""The longest reply taken.  oxenstored ignores PAYLOAD_MAX and answers DIRECTORY with the whole
listing: 16 MiB are 400,000 children named by UUID.  More is garbage, not a listing."""

PATH_MAX: Final = 3072
"""XENSTORE_ABS_PATH_MAX, in bytes."""

RELATIVE_PATH_MAX: Final = 2048
"""XENSTORE_REL_PATH_MAX: the daemons refuse a longer path below /local/domain/<domid>/."""


class Op(enum.IntEnum):
    """enum xsd_sockmsg_type.  20 was RESTRICT, and is gone."""

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


ERRORS: Final = frozenset(
    (
        # xsd_errors of xs_wire.h
        *("EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO"),
        *("ENOTEMPTY", "ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM"),
        # oxenstored's own, for a full quota
        "EQUOTA",
    )
)
"""The names an ERROR reply may carry.  Others have been seen in other stores' code only."""


class WireError(Exception):
    """The peer sent what the protocol does not allow: the connection is of no further use."""


class Message(NamedTuple):
    """One message of either direction.  `op` is a plain int: a peer may send any number."""

    op: int
    req_id: int
    tx_id: int
    payload: bytes


Fields = tuple[int, int, int, bytes]
"""Those of a Message."""


class Request(NamedTuple):
    """What is asked, without the numbers that a connection and a transaction add."""

    op: Op
    payload: bytes

    @property
    def path(self) -> bytes:
        """The payload's first string: for most requests the path, for others the domid."""
        return self.payload.partition(b"\0")[0]

    @property
    def repeatable(self) -> bool:
        """Whether asking it twice does no more than asking it once."""
        return self.op in _REPEATABLE


_REPEATABLE: Final = frozenset(
    (
        *(Op.DIRECTORY, Op.DIRECTORY_PART, Op.READ, Op.GET_PERMS),
        *(Op.GET_DOMAIN_PATH, Op.IS_DOMAIN_INTRODUCED),
    )
)


class Parser:
    """Turns the bytes of one direction of a connection into messages.

    `feed` takes bytes as they come, one at a time if need be; `messages` gives all whole messages,
    `next` the next one, or None.  What came whole before the garbage is still given; the garbage then
    raises WireError, now and on each later call.
    """

    def __init__(self, payload_max: int = REPLY_MAX) -> None:
        self._payload_max = payload_max
        self._buffer: bytes | bytearray = b""
        self._start = 0
        self._wanted = HEADER_SIZE

    def feed(self, data: bytes) -> None:
        if self._start == len(self._buffer):
            # The usual case, which copies nothing.
            self._buffer = data
        elif isinstance(self._buffer, bytearray):
            del self._buffer[: self._start]
            self._buffer += data
        else:
            self._buffer = bytearray(self._buffer[self._start :])
            self._buffer += data
        self._start = 0

    def whole(self, data: bytes) -> Fields | None:
        """The fields of the one message that these bytes are, if they are that and nothing is held.

        It is what `feed` and `messages` would give, for less.  None: the bytes were not taken.
        """
        if self._start != len(self._buffer) or len(data) < HEADER_SIZE:
            return None
        op, req_id, tx_id, length = HEADER.unpack_from(data)
        if HEADER_SIZE + length != len(data) or length > self._payload_max:
            return None
        if self._start:
            self._buffer, self._start = b"", 0  # or what was long would be kept
        return op, req_id, tx_id, data[HEADER_SIZE:]

    def next(self) -> Message | None:
        fields = next(self.messages(), None)
        return None if fields is None else Message(*fields)

    def messages(self) -> Iterator[Fields]:
        """Their fields alone, which cost less.  Not to be gone on with after a `feed`."""
        buffer, start = self._buffer, self._start
        size = len(buffer)
        # This spares a long message that comes in small pieces a look at its header each time.
        if size - start < self._wanted:
            return
        self._wanted = HEADER_SIZE
        unpack = HEADER.unpack_from
        while size - start >= HEADER_SIZE:
            op, req_id, tx_id, length = unpack(buffer, start)
            if length > self._payload_max:
                raise WireError(
                    f"a message of {length} bytes, over the limit of {self._payload_max}"
                )
            body = start + HEADER_SIZE
            end = body + length
            if size < end:
                self._wanted = end - start
                return
            self._start = start = end
            payload = buffer[body:end]
            yield op, req_id, tx_id, payload if isinstance(payload, bytes) else bytes(payload)

    @property
    def partial(self) -> bool:
        """Whether part of a message is held: the peer stopped in the middle of one."""
        return len(self._buffer) > self._start


def encode(op: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """The bytes of one message."""
    return HEADER.pack(op, req_id, tx_id, len(payload)) + payload


def encode_all(requests: Sequence[Request], first: int, tx_id: int) -> list[bytes]:
    """The messages of requests, numbered from `first` on."""
    pack = HEADER.pack
    messages = []
    req_id = first
    for op, payload in requests:
        messages.append(pack(op, req_id, tx_id, len(payload)) + payload)
        req_id += 1
    return messages


# ---------------------------------------------------------------------------------------- paths

NAME: Final = rb"[A-Za-z0-9_@-]+"
"""The pattern of one component of a path."""

_NAME = re.compile(NAME)
_PATH = re.compile(rb"/|/?%s(?:/%s)*" % (NAME, NAME))


def is_name(name: bytes) -> bool:
    """Whether both daemons take `name` as one component of a path."""
    return _NAME.fullmatch(name) is not None


def check_path(path: bytes) -> bytes:
    """The path, if a daemon may be asked for it; ValueError if every daemon would refuse it.

    Absolute, relative to the domain's home, or special (`@releaseDomain`).
    """
    if len(path) > PATH_MAX:
        raise ValueError(f"the path is longer than {PATH_MAX} bytes")
    if not _PATH.fullmatch(path):
        raise ValueError(f"not a Xenstore path: {path[:80]!r}")
    return path


def value_max(path: bytes, payload_max: int = PAYLOAD_MAX) -> int:
    """How many bytes of value a WRITE to `path` can carry."""
    return payload_max - len(path) - 1


# ------------------------------------------------------------------------------------- requests


def read(path: bytes) -> Request:
    return Request(Op.READ, path + b"\0")


def directory(path: bytes) -> Request:
    return Request(Op.DIRECTORY, path + b"\0")


def directory_part(path: bytes, offset: int) -> Request:
    """The part of a listing from byte `offset` on, for listings too long for one reply."""
    return Request(Op.DIRECTORY_PART, b"%s\0%d\0" % (path, offset))


def get_perms(path: bytes) -> Request:
    return Request(Op.GET_PERMS, path + b"\0")


def write(path: bytes, value: bytes) -> Request:
    """The value ends with the payload: it may hold any bytes, NUL included."""
    return Request(Op.WRITE, path + b"\0" + value)


def mkdir(path: bytes) -> Request:
    return Request(Op.MKDIR, path + b"\0")


def rm(path: bytes) -> Request:
    # oxenstored takes RM of / for "remove everything"; no client ever means that.
    if path == b"/":
        raise ValueError("the root cannot be removed")
    return Request(Op.RM, path + b"\0")


def watch(path: bytes, token: bytes) -> Request:
    return Request(Op.WATCH, path + b"\0" + token + b"\0")


def unwatch(path: bytes, token: bytes) -> Request:
    return Request(Op.UNWATCH, path + b"\0" + token + b"\0")


def transaction_start() -> Request:
    # oxenstored does not answer a request without any payload until more bytes come.
    return Request(Op.TRANSACTION_START, b"\0")


def transaction_end(commit: bool) -> Request:
    return Request(Op.TRANSACTION_END, b"T\0" if commit else b"F\0")


def get_domain_path(domid: int) -> Request:
    return Request(Op.GET_DOMAIN_PATH, b"%d\0" % domid)


def is_domain_introduced(domid: int) -> Request:
    return Request(Op.IS_DOMAIN_INTRODUCED, b"%d\0" % domid)


def domain_request(op: Op, *numbers: int) -> Request:
    """INTRODUCE (domid, gfn, port), RELEASE, RESUME (domid), SET_TARGET (domid, target)."""
    return Request(op, b"".join(b"%d\0" % number for number in numbers))


# -------------------------------------------------------------------------------------- replies


def strings(payload: bytes) -> list[bytes]:
    """The NUL-terminated strings of a payload; WireError where the last one is not."""
    if not payload:
        return []
    if payload[-1]:
        raise WireError("a string without its NUL")
    return payload[:-1].split(b"\0")


def decode_error(payload: bytes) -> str:
    """The name in an ERROR reply, such as `ENOENT`; it may be one that nobody knows."""
    name = payload.rstrip(b"\0")
    if not name.isalnum() or len(name) > 40:
        raise WireError(f"an ERROR reply that is no name: {payload[:80]!r}")
    return name.decode("ascii", "replace")


def decode_names(payload: bytes) -> list[bytes]:
    """The children's names of a DIRECTORY reply.  They can be anything: see `is_name`."""
    return strings(payload)


def decode_part(payload: bytes) -> tuple[bytes, bytes, bool]:
    """A DIRECTORY_PART reply: (generation, names with their NULs, whether it is the last part).

    An empty string after the names marks the end.
    """
    generation, nul, part = payload.partition(b"\0")
    if not nul or not generation.isdigit() or not part.endswith(b"\0"):
        raise WireError(f"not a DIRECTORY_PART reply: {payload[:80]!r}")
    last = part == b"\0" or part.endswith(b"\0\0")
    return generation, part[:-1] if last else part, last


def decode_transaction_id(payload: bytes) -> int:
    digits = payload.rstrip(b"\0")
    if not digits.isdigit() or len(digits) > 10 or not 0 < int(digits) < 1 << 32:
        raise WireError(f"not a transaction id: {payload[:80]!r}")
    return int(digits)


def decode_string(payload: bytes) -> bytes:
    """GET_DOMAIN_PATH and IS_DOMAIN_INTRODUCED: one string."""
    found = strings(payload)
    if len(found) != 1:
        raise WireError(f"not one string: {payload[:80]!r}")
    return found[0]


def decode_event(payload: bytes) -> tuple[bytes, bytes]:
    """A WATCH_EVENT: (path, token).  Of special events newer daemons add a third string."""
    found = strings(payload)
    if len(found) < 2:
        raise WireError(f"not a watch event: {payload[:80]!r}")
    return found[0], found[1]
