"""The wire parser against any bytes: `python3 -m tests.support.fuzz [--inputs 1000000] [--seconds S]`.

Whatever a peer sends, the parser gives messages or raises WireError, and so does each decoder with each
payload; how the bytes are cut into pieces makes no difference; and none of it takes long.  Stops after
so many inputs, or so many seconds, whichever comes first; exits with 0 if nothing was found.

hypothesis picks the numbers from which inputs are made, a few dozen of each: made by hypothesis alone
they would take ten times as long.  What it says was falsifying is the number to look at.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.support.messages import Message
from xsfs.xenstore import protocol
from xsfs.xenstore.permissions import decode_perms
from xsfs.xenstore.protocol import HEADER, Op, Parser, WireError

BATCH: Final = 5000
"""Inputs between two looks at the clock."""
EACH: Final = 50
"""Inputs from one number."""

SLOW_SECONDS: Final = 0.1
"""Of the processor.  No input of these sizes may take so long."""

LIMIT: Final = 256
"""The longest payload taken here, so that ends and limits are often met."""

DECODERS: Final[Sequence[Callable[[bytes], object]]] = (
    protocol.decode_error,
    protocol.decode_names,
    protocol.decode_part,
    decode_perms,
    protocol.decode_transaction_id,
    protocol.decode_string,
    protocol.decode_event,
    protocol.strings,
)

WORDS: Final = (0, 1, 2, 15, 16, 22, 23, 99, LIMIT, LIMIT + 1, 1 << 30, 0xFFFFFFFF)
OPS: Final = tuple(int(op) for op in Op)
PAYLOADS: Final = (
    *(b"", b"\0", b"OK\0", b"ENOENT\0", b"a\0b\0", b"7\0a\0b\0\0", b"n0\0r7\0", b"/x\0token\0"),
    bytes(LIMIT),
)
PIECES: Final = (b"a", b"\0", b"0", b"9", b"r7", b"n0\0", b"..", b"/", b"@", b"\xff", b"\n", b"-")


def payload(random: Random) -> bytes:
    kind = random.randrange(4)
    if kind == 0:
        return random.randbytes(random.randrange(40))
    if kind == 1:
        return random.choice(PAYLOADS)
    return b"".join(random.choices(PIECES, k=random.randrange(12)))


def stream(random: Random) -> bytes:
    """Messages, whole and broken, and what is none."""
    parts = []
    for _ in range(random.randrange(1, 6)):
        kind = random.randrange(8)
        if kind == 0:
            parts.append(HEADER.pack(*random.choices(WORDS, k=4)))
        elif kind == 1:
            parts.append(random.randbytes(random.randrange(20)))
        else:
            data = payload(random)
            numbers = random.choices(WORDS, k=2)
            parts.append(HEADER.pack(random.choice(OPS), *numbers, len(data)) + data)
    whole = bytearray().join(parts)
    if whole and not random.randrange(4):
        whole[random.randrange(len(whole))] = random.randrange(256)
    return bytes(whole)


def parse(pieces: Sequence[bytes]) -> tuple[list[Message], str | None]:
    """The messages in it, and what was wrong with the rest."""
    parser = Parser(LIMIT)
    found: list[Message] = []
    for piece in pieces:
        found.extend(Message(*fields) for fields in parser.feed(piece))
        if parser.error is not None:
            return found, str(parser.error)
    return found, None


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


def check(data: bytes, sizes: Sequence[int]) -> None:
    """One input."""
    # What the garbage collector takes, of a process with much in it, is not the input's: that is slow
    # each time.
    assert any(_seconds(data, sizes) < SLOW_SECONDS for _ in range(3))


def _seconds(data: bytes, sizes: Sequence[int]) -> float:
    """Check it, and see how long that takes."""
    start = time.thread_time()
    messages, failure = parse([data])
    assert (messages, failure) == parse(cut(data, sizes))
    taken = sum(HEADER.size + len(message.payload) for message in messages)
    assert taken <= len(data)
    for message in messages:
        assert len(message.payload) <= LIMIT
        for decode in DECODERS:
            with contextlib.suppress(WireError):
                decode(message.payload)
    return time.thread_time() - start


def fuzz(inputs: int, seconds: float) -> int:
    """How many inputs were tried."""
    end = time.monotonic() + seconds
    done = 0
    while done < inputs and time.monotonic() < end:
        first_seed = done

        @seed(first_seed)
        @settings(
            max_examples=BATCH // EACH,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.integers(0, (1 << 64) - 1))
        def batch(number: int) -> None:
            nonlocal done
            random = Random(number)
            for _ in range(EACH):
                done += 1
                check(stream(random), random.choices(range(1, 25), k=random.randrange(12)))

        batch()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.support.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=86400.0)
    arguments = parser.parse_args()
    start = time.monotonic()
    done = fuzz(arguments.inputs, arguments.seconds)
    print(f"{done} inputs in {time.monotonic() - start:.0f} s, and nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
