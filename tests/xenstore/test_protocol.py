"""The innermost ring: the wire protocol as pure functions.  Bytes in, messages out; nothing runs
beside the test, no socket is opened.

What the protocol says is written out here once more, as numbers and bytes, so that a slip in
xsfs/xenstore/protocol.py cannot hide behind itself.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.messages import Message, messages_of
from xsfs.xenstore import protocol
from xsfs.xenstore.permissions import Permission, decode_perms, perms_text, set_perms
from xsfs.xenstore.protocol import Op, Parser, Request, WireError

# ------------------------------------------------------------------------------ numbers and names

MESSAGE_TYPES = {
    "CONTROL": 0,
    "DIRECTORY": 1,
    "READ": 2,
    "GET_PERMS": 3,
    "WATCH": 4,
    "UNWATCH": 5,
    "TRANSACTION_START": 6,
    "TRANSACTION_END": 7,
    "INTRODUCE": 8,
    "RELEASE": 9,
    "GET_DOMAIN_PATH": 10,
    "WRITE": 11,
    "MKDIR": 12,
    "RM": 13,
    "SET_PERMS": 14,
    "WATCH_EVENT": 15,
    "ERROR": 16,
    "IS_DOMAIN_INTRODUCED": 17,
    "RESUME": 18,
    "SET_TARGET": 19,
    "RESET_WATCHES": 21,
    "DIRECTORY_PART": 22,
    "GET_FEATURE": 23,
    "SET_FEATURE": 24,
    "GET_QUOTA": 25,
    "SET_QUOTA": 26,
}
"""enum xsd_sockmsg_type of Xen 4.22's xs_wire.h, without its XS_."""

ERROR_NAMES = """
    EINVAL EACCES EEXIST EISDIR ENOENT ENOMEM ENOSPC EIO ENOTEMPTY ENOSYS EROFS EBUSY EAGAIN
    EISCONN E2BIG EPERM
"""
"""xsd_errors of the same file."""


def test_every_message_type_has_its_number() -> None:
    assert {op.name: op.value for op in Op} == MESSAGE_TYPES


def test_the_errors_are_those_of_the_header_and_of_oxenstored() -> None:
    assert set(ERROR_NAMES.split()) | {"EQUOTA"} == protocol.ERRORS


def test_limits() -> None:
    assert protocol.HEADER.size == 16
    assert protocol.PAYLOAD_MAX == 4096
    assert protocol.DEVICE_PAYLOAD_MAX == 4080
    assert protocol.PATH_MAX == 4095
    assert protocol.REPLY_MAX > 1 << 20


def test_the_header_is_four_native_words() -> None:
    found = protocol.encode(Op.WRITE, 0x01020304, 0xFFFFFFFF, b"a\0b")
    native = struct.pack("I", 11) + struct.pack("I", 0x01020304) + struct.pack("I", 0xFFFFFFFF)
    assert found == native + struct.pack("I", 3) + b"a\0b"


# --------------------------------------------------------------------------------------- requests

REQUESTS: list[tuple[Request, int, bytes]] = [
    (protocol.read(b"/a/b"), 2, b"/a/b\0"),
    (protocol.directory(b"/"), 1, b"/\0"),
    (protocol.directory_part(b"/vm", 0), 22, b"/vm\x000\0"),
    (protocol.directory_part(b"/vm", 4093), 22, b"/vm\x004093\0"),
    (protocol.get_perms(b"data"), 3, b"data\0"),
    (set_perms(b"/a", ()), 14, b"/a\0"),
    (
        set_perms(b"/a", (Permission(0, False, False), Permission(7, True, True))),
        14,
        b"/a\0n0\0b7\0",
    ),
    (protocol.write(b"/a", b""), 11, b"/a\0"),
    (protocol.write(b"/a", b"\0x\0\xff"), 11, b"/a\0\0x\0\xff"),
    (protocol.mkdir(b"/a"), 12, b"/a\0"),
    (protocol.rm(b"/a"), 13, b"/a\0"),
    (protocol.watch(b"@releaseDomain", b"t1"), 4, b"@releaseDomain\0t1\0"),
    (protocol.watch(b"/a", b"t1", 0), 4, b"/a\0t1\x000\0"),
    (protocol.watch(b"/a", b"t1", 2), 4, b"/a\0t1\x002\0"),
    (protocol.unwatch(b"/a", b""), 5, b"/a\0\0"),
    (protocol.transaction_start(), 6, b"\0"),
    (protocol.transaction_end(True), 7, b"T\0"),
    (protocol.transaction_end(False), 7, b"F\0"),
    (protocol.get_domain_path(12), 10, b"12\0"),
    (protocol.is_domain_introduced(0), 17, b"0\0"),
    (protocol.get_feature(), 23, b"\0"),
    (protocol.domain_request(Op.INTRODUCE, 7, 4103, 1), 8, b"7\x004103\x001\0"),
    (protocol.domain_request(Op.RELEASE, 7), 9, b"7\0"),
    (protocol.domain_request(Op.RESUME, 7), 18, b"7\0"),
    (protocol.domain_request(Op.SET_TARGET, 3, 7), 19, b"3\x007\0"),
]


@pytest.mark.parametrize(("request_", "op", "payload"), REQUESTS)
def test_a_request_as_bytes(request_: Request, op: int, payload: bytes) -> None:
    assert (int(request_.op), request_.payload) == (op, payload)
    # oxenstored does not answer a request without a payload.
    assert payload


@pytest.mark.parametrize(("request_", "op", "payload"), REQUESTS)
def test_the_path_of_a_request_is_its_first_string(
    request_: Request, op: int, payload: bytes
) -> None:
    assert request_.path == payload.split(b"\0")[0]


def test_only_requests_that_change_nothing_may_be_repeated() -> None:
    names = {op.name for op in Op if Request(op, b"\0").repeatable}
    assert names == {
        *("DIRECTORY", "DIRECTORY_PART", "READ", "GET_PERMS"),
        *("GET_DOMAIN_PATH", "IS_DOMAIN_INTRODUCED"),
    }


def test_the_root_is_never_removed() -> None:
    with pytest.raises(ValueError, match="root"):
        protocol.rm(b"/")


# ------------------------------------------------------------------------------------------ paths

GOOD_PATHS = [
    *(b"/", b"/a", b"a", b"/a/b", b"a/b", b"/A-Z_09/x", b"domid", b"data/x-y_z@w", b"-", b"@"),
    *(b"@introduceDomain", b"@releaseDomain", b"/a/@b", b"/" + b"x" * 4094, b"x" * 4095),
]
BAD_PATHS = [
    *(
        b"",
        b"//",
        b"/a/",
        b"a/",
        b"//a",
        b"/a//b",
        b"/a.b",
        b"/.",
        b"..",
        b"/a b",
        b"/a\n",
        b"/a\0",
    ),
    *(b"/a:b", b"/a~", b"/\xc3\xa4", b"/\xff", b"/a/\n", b"\n", b"/a+b", b"/*", b"/a,b"),
    *(b"/" + b"x" * 4095, b"x" * 4096),
]


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_good_paths(path: bytes) -> None:
    assert protocol.check_path(path) == path


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_paths(path: bytes) -> None:
    with pytest.raises(ValueError, match="path"):
        protocol.check_path(path)


def test_every_byte_in_a_path() -> None:
    good = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_@-"
    for number in range(256):
        byte = bytes((number,))
        assert protocol.is_name(byte) == (byte in good)
        assert protocol.is_name(b"a" + byte) == (byte in good)
        if byte in good:
            assert protocol.check_path(b"/x" + byte) == b"/x" + byte
        else:
            with pytest.raises(ValueError, match="path"):
                protocol.check_path(b"/x" + byte)


@pytest.mark.parametrize("name", [b"", b"/", b"a/b", b"a.b", b"a\n"])
def test_what_is_no_name(name: bytes) -> None:
    assert not protocol.is_name(name)


@settings(deadline=None)
@given(st.binary(max_size=40))
@example(b"/a\n")
def test_a_path_is_names_between_slashes(path: bytes) -> None:
    body = path[1:] if path[:1] == b"/" else path
    good = path == b"/" or all(map(protocol.is_name, body.split(b"/")))
    try:
        protocol.check_path(path)
    except ValueError:
        assert not good
    else:
        assert good


@pytest.mark.parametrize(
    ("path", "limit", "most"), [(b"/a", 4096, 4093), (b"/a", 4080, 4077), (b"x" * 3072, 4096, 1023)]
)
def test_the_longest_value_just_fits(path: bytes, limit: int, most: int) -> None:
    assert protocol.value_max(path, limit) == most
    assert len(protocol.write(path, bytes(most)).payload) == limit


def test_the_longest_value_on_a_socket() -> None:
    assert protocol.value_max(b"/a") == 4093


# ----------------------------------------------------------------------------------------- replies

Decoder = Callable[[bytes], object]


@pytest.mark.parametrize(
    ("decode", "payload", "found"),
    [
        (protocol.strings, b"", []),
        (protocol.strings, b"\0", [b""]),
        (protocol.strings, b"a\0", [b"a"]),
        (protocol.strings, b"a\0\0b\0", [b"a", b"", b"b"]),
        (protocol.decode_names, b"", []),
        (protocol.decode_names, b"b\0a\0", [b"b", b"a"]),
        (protocol.decode_error, b"ENOENT\0", "ENOENT"),
        (protocol.decode_error, b"E2BIG\0", "E2BIG"),
        (protocol.decode_error, b"ENOENT", "ENOENT"),
        (protocol.decode_error, b"EWHATEVER\0", "EWHATEVER"),
        (protocol.decode_error, b"x" * 40 + b"\0", "x" * 40),
        (protocol.decode_part, b"17\0a\0b\0", (b"17", b"a\0b\0", False)),
        (protocol.decode_part, b"17\0a\0b\0\0", (b"17", b"a\0b\0", True)),
        # xapi's oxenstored cuts parts in the middle of names.
        (protocol.decode_part, b"17\0a", (b"17", b"a", False)),
        (protocol.decode_part, b"17\0bc\0d", (b"17", b"bc\0d", False)),
        (protocol.decode_part, b"17\0\0", (b"17", b"", True)),
        (decode_perms, b"n0\0", (Permission(0, False, False),)),
        # A guest may write entries for domains that cannot exist.
        (decode_perms, b"n7\0r-1\0", (Permission(7, False, False), Permission(-1, True, False))),
        (decode_perms, b"b4294967295\0", (Permission(4294967295, True, True),)),
        (decode_perms, b"w99999999999\0", (Permission(99999999999, False, True),)),
        (
            decode_perms,
            b"w3\0r7\0",
            (Permission(3, False, True), Permission(7, True, False)),
        ),
        (perms_text, b"n0\0r-1\0", b"n0,r-1"),
        (protocol.decode_transaction_id, b"1\0", 1),
        (protocol.decode_transaction_id, b"4294967295\0", 4294967295),
        (protocol.decode_transaction_id, b"9", 9),
        (protocol.decode_string, b"/local/domain/3\0", b"/local/domain/3"),
        (protocol.decode_string, b"\0", b""),
        (protocol.decode_event, b"/a\0t\0", (b"/a", b"t")),
        (protocol.decode_event, b"@releaseDomain\0t\x007\0", (b"@releaseDomain", b"t")),
        (protocol.decode_event, b"\0\0", (b"", b"")),
    ],
)
def test_good_replies(decode: Decoder, payload: bytes, found: object) -> None:
    assert decode(payload) == found


LONG_NUMBER = b"1" * 5000
"""Python refuses to make a number of so many digits, with a ValueError."""


@pytest.mark.parametrize(
    ("decode", "payload"),
    [
        (protocol.strings, b"a"),
        (protocol.strings, b"a\0b"),
        (protocol.decode_names, b"a\0b"),
        (protocol.decode_error, b""),
        (protocol.decode_error, b"\0"),
        (protocol.decode_error, b"no name\0"),
        (protocol.decode_error, b"EN\0ENT\0"),
        (protocol.decode_error, b"E\xc4\0"),
        (protocol.decode_error, b"x" * 41),
        (protocol.decode_part, b""),
        (protocol.decode_part, b"17"),
        (protocol.decode_part, b"17\0"),
        (protocol.decode_part, b"\0a\0"),
        (protocol.decode_part, b"x\0a\0"),
        (protocol.decode_part, b"-1\0a\0"),
        (decode_perms, b""),
        (decode_perms, b"n0"),
        (decode_perms, b"\0"),
        (perms_text, b"n0"),
        (decode_perms, b"n0\0\0"),
        (decode_perms, b"x0\0"),
        (decode_perms, b"r--1\0"),
        (decode_perms, b"r-\0"),
        (decode_perms, b"n0\0r\xb2\0"),
        (decode_perms, b"r" + LONG_NUMBER + b"\0"),
        (protocol.decode_transaction_id, b""),
        (protocol.decode_transaction_id, b"\0"),
        (protocol.decode_transaction_id, b"0\0"),
        (protocol.decode_transaction_id, b"-1\0"),
        (protocol.decode_transaction_id, b"x\0"),
        (protocol.decode_transaction_id, b"1\x002\0"),
        (protocol.decode_transaction_id, b"4294967296\0"),
        (protocol.decode_transaction_id, LONG_NUMBER + b"\0"),
        (protocol.decode_string, b""),
        (protocol.decode_string, b"a"),
        (protocol.decode_string, b"a\0b\0"),
        (protocol.decode_event, b""),
        (protocol.decode_event, b"/a\0"),
        (protocol.decode_event, b"/a\0t"),
    ],
)
def test_malformed_replies(decode: Decoder, payload: bytes) -> None:
    with pytest.raises(WireError):
        decode(payload)


DECODERS: list[Decoder] = [
    *(
        protocol.strings,
        protocol.decode_error,
        protocol.decode_names,
        protocol.decode_part,
        decode_perms,
    ),
    *(protocol.decode_transaction_id, protocol.decode_string, protocol.decode_event),
]


@given(st.lists(st.binary(max_size=20).filter(lambda name: b"\0" not in name)))
def test_names_of_several_replies_are_as_those_of_one(names: list[bytes]) -> None:
    assert protocol.decode_names(protocol.encode_names(names)) == names


@pytest.mark.parametrize("decode", DECODERS)
@settings(deadline=None)
@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from((b"n0", b"1", b"\0", b"", b"-", b"\xb2"))).map(b"".join)
)
def test_garbage_is_a_wire_error_or_nothing(decode: Decoder, payload: bytes) -> None:
    with contextlib.suppress(WireError):
        decode(payload)


# ------------------------------------------------------------------------------------------ parser

words = st.integers(0, 2**32 - 1)
messages = st.builds(Message, words, words, words, st.binary(max_size=200))
cuts = st.lists(st.integers(0, 3000))


def as_bytes(sent: Iterable[Message]) -> bytes:
    return b"".join(protocol.encode(*message) for message in sent)


def pieces_of(data: bytes, at: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[start:end] for start, end in pairwise(places)]


def parse(pieces: Iterable[bytes], parser: Parser) -> tuple[list[Message], bool]:
    """All messages, and whether garbage came after them."""
    found: list[Message] = []
    for piece in pieces:
        found.extend(Message(*fields) for fields in parser.feed(piece))
        if parser.error is not None:
            return found, True
    return found, False


EXAMPLES = [
    Message(Op.READ, 1, 0, b""),
    Message(Op.WATCH_EVENT, 0xFFFFFFFF, 0, b"/a\0t\0"),
    Message(4711, 0, 0xFFFFFFFF, bytes(300)),
]


def test_byte_by_byte() -> None:
    parser = Parser()
    found = []
    for number, byte in enumerate(as_bytes(EXAMPLES)):
        assert parser.partial == (number not in (0, 16, 37))
        came = messages_of(parser, bytes((byte,)))
        assert len(came) <= 1
        found += came
    assert found == EXAMPLES
    assert not parser.partial


def test_all_at_once() -> None:
    parser = Parser()
    assert messages_of(parser, as_bytes(EXAMPLES)) == EXAMPLES
    assert messages_of(parser, as_bytes(EXAMPLES)) == EXAMPLES
    assert not parser.partial


@settings(deadline=None)
@given(st.lists(messages, max_size=8), cuts)
def test_messages_come_out_however_they_were_cut(sent: list[Message], at: list[int]) -> None:
    parser = Parser()
    assert parse(pieces_of(as_bytes(sent), at), parser) == (sent, False)
    assert not parser.partial


@settings(deadline=None)
@given(st.lists(messages, max_size=8), st.binary(max_size=15), cuts)
def test_an_unfinished_message_is_known_as_such(
    sent: list[Message], rest: bytes, at: list[int]
) -> None:
    parser = Parser()
    assert parse(pieces_of(as_bytes(sent) + rest, at), parser) == (sent, False)
    assert parser.partial == bool(rest)


@settings(deadline=None)
@given(
    st.lists(messages, max_size=8),
    st.integers(201, 2**32 - 1),
    st.binary(max_size=40),
    cuts,
)
def test_messages_before_garbage_are_still_given(
    sent: list[Message], length: int, rest: bytes, at: list[int]
) -> None:
    garbage = struct.pack("=IIII", Op.READ, 1, 0, length) + rest
    parser = Parser(payload_max=200)
    assert parse(pieces_of(as_bytes(sent) + garbage, at), parser) == (sent, True)
    # Nothing that follows is believed.
    assert parser.feed(as_bytes(EXAMPLES)) == []
    assert parser.error is not None


@settings(deadline=None)
@given(st.lists(st.binary(max_size=400)), st.integers(0, 5000))
def test_garbage_is_messages_or_a_wire_error(pieces: list[bytes], limit: int) -> None:
    parser = Parser(payload_max=limit)
    found, _ = parse(pieces, parser)
    data = b"".join(pieces)
    assert data.startswith(as_bytes(found))
    assert all(len(message.payload) <= limit for message in found)


@pytest.mark.parametrize("length", [4097, 65536, protocol.REPLY_MAX])
def test_replies_longer_than_the_limit_of_requests(length: int) -> None:
    sent = [Message(Op.DIRECTORY, 1, 0, b"x" * length), Message(Op.READ, 2, 0, b"y")]
    data = as_bytes(sent)
    pieces = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    assert parse(pieces, Parser()) == (sent, False)


def test_the_limit_is_told_from_the_header_alone() -> None:
    parser = Parser()
    assert messages_of(parser, struct.pack("=IIII", Op.READ, 1, 0, protocol.REPLY_MAX)) == []
    parser = Parser()
    with pytest.raises(WireError, match=str(protocol.REPLY_MAX + 1)):
        messages_of(parser, struct.pack("=IIII", Op.READ, 1, 0, protocol.REPLY_MAX + 1))


@pytest.mark.parametrize("numbers", [(-42, 0, 0), (1 << 32, 0, 0), (2, -1, 0), (2, 0, 1 << 32)])
def test_what_is_no_message_is_never_made(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not a message"):
        protocol.encode(*numbers, b"")
