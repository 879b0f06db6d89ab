"""Messages of the protocol whose fields have names."""

from __future__ import annotations

from typing import NamedTuple

from xsfs.xenstore.protocol import Parser


class Message(NamedTuple):
    op: int
    req_id: int
    tx_id: int
    payload: bytes


def messages_of(parser: Parser, data: bytes) -> list[Message]:
    """The messages that are whole with these bytes.  WireError if garbage has come."""
    found = [Message(*fields) for fields in parser.feed(data)]
    if parser.error is not None:
        raise parser.error
    return found
