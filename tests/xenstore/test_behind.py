"""The client's ring: what is asked behind a burst, and not waited for with it.

Whether it is there in time is a question of microseconds, so here the daemons are behind a store that
lies: what is to be late is held back, or never comes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked
from xsfs.view.children import LookInside
from xsfs.view.looks import LEAF, PARENT
from xsfs.xenstore.eventual import result_of

from tests.support.lying_store import HangUp, LyingStore, Talk, silence
from tests.support.xenstored.harness import DAEMONS, RealXenstored
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT
from xsfs.view.view import View
from xsfs.xenstore import connection as module
from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import RequestTimeout
from xsfs.xenstore.protocol import Message, Request, encode
from xsfs.xenstore.store import Store, open_store

LIMIT = 15.0
"""Seconds a test may take, over which something hangs."""
TIMEOUT = 4.0

OWN = (protocol.read(b"/test"), protocol.directory(b"/test"))
CHILDREN = (protocol.directory(b"/test/parent"), protocol.directory(b"/test/leaf"))
CHILD = CHILDREN[0].path
ANSWERS = [b"", b"leaf\0parent\0"], [b"child\0", b""]


@pytest.fixture(scope="module", params=sorted(DAEMONS))
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon:
        with daemon.client() as dom0:
            dom0.write("/test/leaf", "1")
            dom0.write("/test/parent/child", "2")
        yield daemon


@pytest.fixture
def liar(daemon: RealXenstored, tmp_path: Path) -> Iterator[LyingStore]:
    with LyingStore(tmp_path / "sock", daemon.socket) as liar:
        yield liar


@contextlib.asynccontextmanager
async def opened(liar: LyingStore, timeout: float = TIMEOUT) -> AsyncIterator[Store]:
    """A store whose replies were prompt so far."""
    with trio.fail_after(LIMIT):
        async with open_store(liar.path, timeout=timeout) as store:
            assert store._link.connection is not None
            store._link.connection._skip_prompt = store._link.connection._skips = 0
            yield store


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon is too slow to be waited for on the spot."""
    monkeypatch.setattr(module, "PROMPT_SECONDS", LIMIT)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is."""
    monkeypatch.setattr(module, "PROMPT_SECONDS", 0.0)


class Held:
    """Keeps the requests for one node back, and answers all others, until it lets them go."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._held: list[tuple[Talk, Message]] = []
        self._arrived = threading.Event()

    def __call__(self, talk: Talk, request: Message) -> bool:
        if not request.payload.startswith(self._path + b"\0"):
            return False
        self._held.append((talk, request))
        self._arrived.set()
        return True

    def arrived(self) -> None:
        """Wait until there is something."""
        assert self._arrived.wait(LIMIT)

    def let_go(self) -> None:
        self.arrived()
        for talk, request in self._held:
            talk.upstream.sendall(encode(*request))


async def ask(store: Store, answers: list[object]) -> None:
    """Put there what comes to both questions."""
    own, rest = await result_of(store.ask_and(OWN, children))
    answers.extend((in_order(own), list(rest())))


async def until_only_held_is_missing(store: Store) -> None:
    await wait_all_tasks_blocked()
    assert store._link.connection is not None
    while store._link.connection._unanswered.outstanding > 1:
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()


def children() -> tuple[Request, ...]:
    return CHILDREN


def in_order(own: Sequence[Reply]) -> list[Reply]:
    """A daemon may list names in any order."""
    value, listing = own
    assert isinstance(listing, bytes)
    return [value, b"".join(name + b"\0" for name in sorted(protocol.strings(listing)))]


@pytest.mark.usefixtures("prompt")
@trio_test
async def test_what_comes_late_is_not_waited_for(liar: LyingStore) -> None:
    held = liar.lie = Held(CHILD)
    async with opened(liar) as store:
        own, rest = await result_of(store.ask_and(OWN, children))
        assert in_order(own) == ANSWERS[0]
        assert list(rest()) == []
        held.let_go()
        liar.behave()
        # The replies that come now are known, and dropped.
        assert await store.read("/test/leaf") == b"1"
        assert store.reconnects == 0


@pytest.mark.usefixtures("slow")
@trio_test
async def test_what_is_slow_is_waited_for_at_once(liar: LyingStore) -> None:
    """To be told that it has not come would be to ask it twice, of a store that is slow already."""
    held = liar.lie = Held(CHILD)
    async with opened(liar) as store, trio.open_nursery() as nursery:
        answers: list[object] = []
        nursery.start_soon(ask, store, answers)
        await until_only_held_is_missing(store)
        assert answers == []
        held.let_go()
        liar.behave()
    assert answers == list(ANSWERS)


@pytest.mark.usefixtures("slow")
@trio_test
async def test_what_is_known_is_not_lost_with_the_rest(liar: LyingStore) -> None:
    """A connection that ends between the answers."""
    held = liar.lie = Held(CHILD)
    async with opened(liar) as store, trio.open_nursery() as nursery:
        answers: list[object] = []
        nursery.start_soon(ask, store, answers)
        await until_only_held_is_missing(store)
        held.arrived()
        liar.hang_up()
    assert answers == [ANSWERS[0], []]
    assert store.reconnects == 0


@pytest.mark.usefixtures("prompt")
@trio_test
async def test_very_much_is_waited_for_at_once(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = CHILDREN * (module.PROMPT_MAX // 2 + 1)
    async with opened(liar) as store:
        own, rest = await result_of(store.ask_and(OWN, lambda: many))
        assert in_order(own) == ANSWERS[0]
        monkeypatch.setattr(module, "PROMPT_SECONDS", 0.0)
        assert list(rest()) == ANSWERS[1] * (module.PROMPT_MAX // 2 + 1)


@trio_test
async def test_a_slow_daemon_is_waited_for_more_and_more_rarely(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(liar) as store:
        connection = store._link.connection
        assert connection is not None

        async def skipped() -> int:
            """How many are slept for until one is waited for on the spot."""
            count = 0
            while not connection.prompt:
                assert await store.read("/test/leaf") == b"1"
                count += 1
            assert await store.read("/test/leaf") == b"1"
            return count

        most = module.PROMPT_SKIPS_MAX
        monkeypatch.setattr(module, "PROMPT_SECONDS", 0.0)
        counts = [await skipped() for _ in range(10)]
        assert counts == [0, 1, 2, 4, 8, 16, 32, 64, most, most]
        monkeypatch.setattr(module, "PROMPT_SECONDS", LIMIT)
        counts = [await skipped() for _ in range(3)]
        assert counts == [most, 0, 0]
        monkeypatch.setattr(module, "PROMPT_SECONDS", 0.0)
        counts = [await skipped() for _ in range(3)]
        assert counts == [0, 1, 2], "it was quick meanwhile"


@trio_test
async def test_so_is_one_that_is_slow_with_the_rest_alone(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it was quick with what was asked first is nothing to go by."""
    async with opened(liar) as store:
        connection = store._link.connection
        assert connection is not None
        skips = []
        for _ in range(4):
            held = liar.lie = Held(CHILD)
            connection._skip_prompt = 0
            monkeypatch.setattr(module, "PROMPT_SECONDS", LIMIT)
            own, rest = await result_of(store.ask_and(OWN, children))
            assert in_order(own) == ANSWERS[0]
            monkeypatch.setattr(module, "PROMPT_SECONDS", 0.0)
            assert list(rest()) == []
            skips.append(connection._skip_prompt)
            held.let_go()
        assert skips == [1, 2, 4, 8]


@trio_test
async def test_whoever_takes_replies_may_take_his_time(
    liar: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the store that is waited for no longer than a moment."""
    monkeypatch.setattr(module, "PROMPT_SECONDS", 0.5)
    async with opened(liar) as store:
        connection = store._link.connection
        assert connection is not None
        held = liar.lie = Held(CHILDREN[1].path)
        _, rest = await result_of(store.ask_and(OWN, children))
        taken = rest()
        replies = [next(taken)]
        held.let_go()
        time.sleep(0.6)
        assert replies + list(taken) == ANSWERS[1]
        assert connection.prompt


@pytest.mark.usefixtures("prompt")
@trio_test
async def test_a_lost_connection(liar: LyingStore) -> None:
    """What must be known is asked again; what was asked behind it never comes."""
    calls = 0

    def more() -> tuple[Request, ...]:
        nonlocal calls
        calls += 1
        return CHILDREN

    def once(talk: Talk, _: Message) -> bool:
        liar.behave()
        raise HangUp

    async with opened(liar) as store:
        liar.lie = once
        own, rest = await result_of(store.ask_and(OWN, more))
        assert in_order(own) == ANSWERS[0]
        assert list(rest()) == []
        assert calls == 1
        assert store.reconnects == 1


@pytest.mark.usefixtures("prompt")
@trio_test
async def test_a_silent_store(liar: LyingStore) -> None:
    async with opened(liar, timeout=0.3) as store:
        liar.lie = silence
        with pytest.raises(RequestTimeout):
            await result_of(store.ask_and(OWN, children))


@pytest.mark.usefixtures("prompt")
@trio_test
async def test_a_directory_is_opened_before_its_children_are_known(liar: LyingStore) -> None:
    """Who reads it asks for what has not come."""
    async with opened(liar) as store:
        view = View(store, 0, b"/", TEXT, StickyDirectories())
        view.guesses.saw(b"/test", await store.call(protocol.directory(b"/test")))
        held = liar.lie = Held(CHILD)
        inside = LookInside(view, b"/test")
        look = await result_of(inside.ask())
        assert look == PARENT._replace(whole=True)
        found = inside.digest()
        assert sorted(found.names) == [b"leaf", b"parent"]
        assert b"parent" not in dict(found.kinds)
        assert not found.doubtful
        held.let_go()
        liar.behave()
        looks = await view.look_at_children(b"/test", found.names)
        assert looks == {b"leaf": LEAF, b"parent": PARENT}


@pytest.mark.usefixtures("prompt")
@trio_test
async def test_what_has_come_is_not_asked_again(liar: LyingStore) -> None:
    async with opened(liar) as store:
        view = View(store, 0, b"/", TEXT, StickyDirectories())
        view.guesses.saw(b"/test", await store.call(protocol.directory(b"/test")))
        before = store.requests
        inside = LookInside(view, b"/test")
        await result_of(inside.ask())
        assert store.requests - before == len(OWN) + len(CHILDREN)
        # By then all has come: the store answers in order.
        assert await store.read("/test/leaf") == b"1"
        for _ in range(2):
            assert dict(inside.digest().kinds) == {b"leaf": LEAF, b"parent": PARENT}
