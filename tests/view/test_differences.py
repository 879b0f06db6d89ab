"""The comparison of a transaction with the store, in process, over C xenstored.  (tests/fs/test_diff.py has
its lines.)"""

from __future__ import annotations

from pathlib import Path

from trio.testing import trio_test

from tests.support.clock import LeapingClock
from tests.support.lying_store import LyingStore, Talk
from tests.support.messages import Message
from tests.support.xenstored.harness import RealXenstored
from xsfs.view.differences import TouchedPaths, differences
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT
from xsfs.view.view import View
from xsfs.xenstore import protocol
from xsfs.xenstore.store import open_store

HOME = b"/local/domain/0"

LONG = 1000.0
"""A time limit that only the clock of a test reaches."""

SLOW = 0.003 * LONG
"""What C xenstored takes for a request in a transaction of many nodes: 30 ms of the usual 10 s."""

CHANGES = 500


@trio_test
async def test_a_slow_daemon_has_the_time_limit_for_each_window(
    tmp_path: Path, clock: LeapingClock
) -> None:
    def slow(talk: Talk, request: Message) -> bool:
        clock.leap(SLOW)
        return False

    with RealXenstored("C") as daemon, LyingStore(tmp_path / "sock", daemon.socket) as liar:
        async with open_store(liar.path, timeout=LONG) as store:
            inside, outside = (View(store, 0, HOME, TEXT, StickyDirectories()) for _ in range(2))
            await store.mkdir(b"%s/data" % HOME)
            async with store.transaction() as transaction:
                inside.commands = transaction
                touched = TouchedPaths()
                transaction.on_requests = touched.add
                paths = [b"%s/data/%d" % (HOME, number) for number in range(CHANGES)]
                await transaction.pipeline([protocol.write(path, b"v") for path in paths])
                liar.lie = slow
                text = await differences(inside, outside, touched, lambda size: None)
                liar.behave()
                assert sorted(text.splitlines()) == sorted(b"+ data/%d" % n for n in range(CHANGES))
                await transaction.rollback()
