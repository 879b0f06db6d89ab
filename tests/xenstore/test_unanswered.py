"""The table of what is unanswered: each reply comes to its request, in any order, and no other."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xsfs.xenstore.unanswered import BATCH_MAX, OUTSTANDING_MAX, PLACE_BITS, Batch, Unanswered

from xsfs.view.hints import SIZE_MAX
from xsfs.xenstore import protocol, unanswered
from xsfs.xenstore.errors import RequestTimeout, XenstoreError
from xsfs.xenstore.protocol import Op, Parser, Request, WireError, encode_all


def req_ids(batch: Batch) -> list[int]:
    """As they are in its messages."""
    parser = Parser()
    parser.feed(b"".join(encode_all(batch.requests, batch.first, 0)))
    return [req_id for _, req_id, _, _ in parser.messages()]


def take(table: Unanswered, op: int, req_id: int, payload: bytes) -> None:
    """One reply."""
    events: list[bytes] = []
    table.take([(op, req_id, 0, payload)], events.append)
    assert events == []


def unexpected(payload: bytes) -> None:
    pytest.fail(f"an event: {payload!r}")


def requests(count: int) -> list[Request]:
    return [protocol.read(b"/%d" % number) for number in range(count)]


@given(st.lists(st.integers(1, BATCH_MAX), min_size=1, max_size=5), st.randoms(), st.data())
def test_replies_in_any_order_come_to_their_requests(
    counts: list[int], random: Random, data: st.DataObject
) -> None:
    table = Unanswered()
    batches = [table.enter(requests(count)) for count in counts]
    due = [
        (req_id, b"%d of %d" % (place, number))
        for number, batch in enumerate(batches)
        for place, req_id in enumerate(req_ids(batch))
    ]
    assert len({req_id for req_id, _ in due}) == sum(counts) == table.outstanding
    if data.draw(st.booleans(), "shuffled"):
        random.shuffle(due)
    done = 0
    while done < len(due):
        together = due[done : done + data.draw(st.integers(1, len(due)), "received together")]
        table.take([(Op.READ, req_id, 0, payload) for req_id, payload in together], unexpected)
        done += len(together)
        assert table.outstanding == sum(counts) - done
    for number, batch in enumerate(batches):
        assert batch.replies == [b"%d of %d" % (place, number) for place in range(counts[number])]
        assert not batch.missing
    assert not list(table)


def test_an_error_is_of_its_request() -> None:
    table = Unanswered()
    batch = table.enter(requests(2))
    first, second = req_ids(batch)
    take(table, Op.ERROR, second, b"ENOENT\0")
    take(table, Op.READ, first, b"")
    value, error = batch.replies
    assert value == b""
    assert isinstance(error, XenstoreError)
    assert error.name == "ENOENT"
    assert "/1" in str(error)


def test_events_are_told_among_replies_whatever_their_number() -> None:
    table = Unanswered()
    batch = table.enter(requests(1))
    (number,) = req_ids(batch)
    events: list[bytes] = []
    event = (int(Op.WATCH_EVENT), number, 0, b"/a\0t\0")
    table.take([event, (Op.READ, number, 0, b"x"), event], events.append)
    assert events == [b"/a\0t\0"] * 2
    assert batch.replies == [b"x"]


def test_who_is_told_of_an_event_may_end_everything() -> None:
    table = Unanswered()
    batch = table.enter(requests(2))
    first, second = req_ids(batch)
    ended: list[Batch] = []
    messages = [
        (int(Op.READ), first, 0, b"x"),
        (int(Op.WATCH_EVENT), 0, 0, b"/a\0t\0"),
        (int(Op.READ), second, 0, b"y"),
    ]
    with pytest.raises(WireError):
        table.take(messages, lambda _: ended.extend(table.take_all()))
    assert ended == [batch]
    assert batch.missing == 1
    assert table.outstanding == 0


@pytest.mark.parametrize(
    ("op", "which"),
    [
        pytest.param(Op.READ, lambda first: first, id="twice"),
        pytest.param(Op.READ, lambda first: first + 3, id="past the batch"),
        pytest.param(Op.READ, lambda first: first + BATCH_MAX, id="of no batch"),
        pytest.param(Op.READ, lambda _: 0xFFFFFFFF, id="of the last number"),
        pytest.param(Op.WRITE, lambda first: first + 1, id="of another kind"),
        pytest.param(4711, lambda first: first + 1, id="of no kind"),
    ],
)
def test_what_nobody_asked(op: int, which: Callable[[int], int]) -> None:
    table = Unanswered()
    batch = table.enter(requests(3))
    first, *_ = req_ids(batch)
    take(table, Op.READ, first, b"x")
    with pytest.raises(WireError):
        take(table, op, which(first), b"y")
    assert batch.missing == table.outstanding == 2
    assert batch.replies[0] == b"x"


def test_a_reply_of_nonsense_leaves_its_request_open() -> None:
    table = Unanswered()
    batch = table.enter(requests(1))
    (number,) = req_ids(batch)
    with pytest.raises(WireError):
        take(table, Op.ERROR, number, b"?\0")
    assert batch.missing == table.outstanding == 1


def test_it_is_bounded() -> None:
    table = Unanswered()
    for _ in range(OUTSTANDING_MAX // BATCH_MAX):
        batch = table.enter(requests(BATCH_MAX))
    with pytest.raises(RequestTimeout):
        table.enter(requests(1))
    table.leave(batch)
    assert table.outstanding == OUTSTANDING_MAX - BATCH_MAX
    table.leave(batch)
    assert table.outstanding == OUTSTANDING_MAX - BATCH_MAX
    table.enter(requests(1))
    taken = table.take_all()
    assert sum(batch.missing for batch in taken) == OUTSTANDING_MAX - BATCH_MAX + 1
    assert table.outstanding == 0
    assert not list(table)


def test_numbers_begin_anew_around_what_is_still_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unanswered, "_NUMBERS", 4)
    table = Unanswered()
    old = table.enter(requests(2))
    seen = []
    for _ in range(9):
        batch = table.enter(requests(2))
        assert batch.first != old.first
        seen.append(batch.first >> PLACE_BITS)
        for req_id in req_ids(batch):
            take(table, Op.READ, req_id, b"new")
    assert set(seen) == {1, 2, 3}
    assert old.missing == 2
    for req_id in req_ids(old):
        take(table, Op.READ, req_id, b"old")
    assert old.replies == [b"old", b"old"]


def test_the_last_number_fits_a_message() -> None:
    table = Unanswered()
    table._next = unanswered._NUMBERS - 1
    batch = table.enter(requests(BATCH_MAX))
    assert req_ids(batch)[-1] == 0xFFFFFFFF
    assert table.enter(requests(1)).first == 0


@pytest.mark.parametrize("count", [0, BATCH_MAX + 1])
def test_a_batch_has_its_bounds(count: int) -> None:
    table = Unanswered()
    with pytest.raises(ValueError, match=str(count)):
        table.enter(requests(count))
    assert not list(table)


def test_a_guess_fits_a_batch() -> None:
    """The shortest names, of each of which a guest asks two things."""
    assert 2 * (SIZE_MAX // len(b"x\0")) <= BATCH_MAX
