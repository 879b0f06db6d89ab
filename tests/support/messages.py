"""Messages of the protocol whose fields have names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from xsfs.xenstore.protocol import Parser


class Message(NamedTuple):
    op: int
    req_id: int
    tx_id: int
    payload: bytes


def messages_of(parser: Parser) -> Iterator[Message]:
    """The whole messages that have come."""
    for fields in parser.messages():
        yield Message(*fields)
