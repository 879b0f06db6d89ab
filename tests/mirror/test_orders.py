"""Ring: the live mirror in process, driven by hand, when everything happens in every order.

Between any two steps of the mirror (each request of a pipeline, each reply, each file, each rest) comes
whatever may come there: changes of the store, events that are late, what the mount learns and when.
The mirror, its files, the view and the store's data are the real ones; only who runs next is chance's.
XSFS_TEST_SEEDS says how many histories there are, in hundreds.
"""

from __future__ import annotations

import os
import random
import types
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

import pytest
import trio

from tests.support.mirroring import Entry, Tree, differences, scratch, tree_of_files
from xsfs.embedded.database import Database as Data
from xsfs.embedded.domains import Change
from xsfs.embedded.record import Refused, format_perms
from xsfs.mirror import mirror
from xsfs.mirror.mirror import RELEASE, Mirror
from xsfs.mirror.staging import MirrorDirectory
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT, join
from xsfs.view.ownership import Ownership
from xsfs.view.view import NodeState, View
from xsfs.xenstore import protocol
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.protocol import Op, Request
from xsfs.xenstore.store import Store

HISTORIES: Final = 100 * int(os.environ.get("XSFS_TEST_SEEDS", "2"))

GUEST: Final = 5
"""A domain that owns nodes, which vanish with it."""

CHANGES: Final = (
    *("write", "write", "write", "rm", "rm", "perms", "give", "destroy", "mkdir", "rmdir", "look"),
    *(".value", "rm .value", "overflow"),
)
"""What may happen; the likelier the oftener it is named."""

PACES: Final = (
    (0.3, 0.3, 0.3),
    (0.1, 0.05, 0.3),
    (0.5, 0.1, 0.2),
    (0.05, 0.3, 0.1),
    (0.2, 0.02, 0.5),
)
"""How likely it is that a change comes next, an event, and something that the mount learns."""

STEPS_MAX: Final = 20_000
"""When the mirror is taken not to come to rest."""


@types.coroutine
def pause(what: str) -> Generator[str, None, None]:
    """Somebody else may run here."""
    yield what


class Parked:
    """Where the mirror waits for something to do, as trio's parking lot."""

    def __init__(self) -> None:
        self._parked = False

    def __bool__(self) -> bool:
        return self._parked

    def unpark_all(self) -> None:
        self._parked = False

    async def park(self) -> None:
        self._parked = True
        while self._parked:
            await pause("parked")


async def rest() -> None:
    """No clock tells how long a rest is."""
    await pause("rest")


class History:
    """A store, its mirror, and a mount that learns; `store` and `watches` to the mirror.

    root        of the mirror: the home has a directory that is shown even while it is not there
    chance      what comes next
    """

    timeout = 1.0

    def __init__(self, directory: Path, root: bytes, chance: random.Random) -> None:
        self.chance = chance
        self.root = root
        self.events: list[bytes] = []
        """Those that have not come yet."""
        self.data = Data(self._changed)
        self.lessons: list[Callable[[], object]] = []
        """What the mount is about to learn."""
        self.watches = self
        self.files = MirrorDirectory(str(directory), Ownership(os.getuid(), os.getgid(), 0o077))
        self.view = View(cast(Store, self), 0, root, TEXT, StickyDirectories())
        below = (b"", b"/a", b"/b", b"/a/a", b"/a/b", b"/b/a", b"/a/a/a", b"/a/a/b", b"/a/a/b/a")
        self.paths = [root + path for path in below]
        self.paths += [join(root, name) for name in self.view.always_there_below(root)]

    def start(self) -> None:
        self.files.open()
        self.mirror = Mirror(cast(Store, self), self.view, self.files)
        self.mirror._idle = cast(trio.lowlevel.ParkingLot, Parked())
        self.mirror._rest = rest  # type: ignore[method-assign]
        self.view.sticky.on_change = self.mirror._sticky_changed
        self._run = cast(Coroutine[str, None, None], self._make_and_follow())

    def end(self) -> None:
        self._run.close()
        self.files.close()

    async def _make_and_follow(self) -> None:
        self.mirror._reconciler.begin()
        while self.mirror._queue:
            await self.mirror._work()
        await self.mirror._carry_out(self.files.publish())
        self.mirror._copy_of = self.mirror._interruptions
        await self.mirror._follow()

    def step(self) -> str:
        """The mirror does the next thing; what it waits for then."""
        return self._run.send(None)

    # ------------------------------------------------------------------ the store, to the mirror

    def _changed(self, change: Change) -> None:
        if change.path == RELEASE or (change.path + b"/").startswith(self.root + b"/"):
            self.events.append(change.path)

    def _answer(self, request: Request) -> Reply:
        try:
            node = self.data.readable(0, request.path)
        except Refused as refused:
            return XenstoreError(refused.name, request)
        if request.op == Op.READ:
            return node.value
        return node.children if request.op == Op.DIRECTORY else format_perms(node.perms)

    async def pipeline(self, requests: Sequence[Request]) -> list[Reply]:
        replies = []
        for request in requests:
            await pause("the store's turn")
            replies.append(self._answer(request))
        await pause("replied")
        return replies

    # -------------------------------------------------------------------------- what may happen

    def change(self) -> None:
        path = self.chance.choice(self.paths)
        data, sticky = self.data, self.view.sticky
        what = self.chance.choice(CHANGES)
        with suppress(Refused):  # no node is there
            if what == "write":
                data.write(0, path, self.chance.choice((b"", b"1", b"2")))
            elif what == "rm":
                data.rm(0, path)
            elif what == "perms":
                data.set_perms(0, path, self.chance.choice(([b"n0"], [b"n0", b"r7"])))
            elif what == "give":
                data.domains.create(GUEST)
                data.introduce(GUEST)
                data.set_perms(0, path, [b"n%d" % GUEST])
            elif what == "destroy":
                data.destroy(GUEST)
            elif what == "mkdir":  # through the mount, which learns it a little later
                data.mkdir(0, path)
                self.lessons.append(lambda: sticky.add(path))
            elif what == "rmdir":
                data.rm(0, path)
                self.lessons.append(lambda: sticky.discard(path))
            elif what == "look":
                listing = self._answer(protocol.directory(path))
                if isinstance(listing, bytes) and listing:
                    self.lessons.append(lambda: sticky.add(path))
            elif what == ".value":
                sticky.add(path, with_value=True)
            elif what == "rm .value":
                data.write(0, path, b"")
                self.lessons.append(lambda: sticky.discard_value(path))
            elif what == "overflow":  # the oldest of too many are forgotten
                sticky.discard(path)

    def event(self) -> None:
        path = self.events.pop(0)
        events = self.mirror._domain_ends if path == RELEASE else self.mirror._changes
        events.put(path)

    def lesson(self) -> None:
        self.lessons.pop(self.chance.randrange(len(self.lessons)))()

    def come_to_rest(self) -> None:
        """All that is on its way arrives, and nothing else happens."""
        for _ in range(STEPS_MAX):
            if self.events and self.chance.random() < 0.3:
                self.event()
            elif self.lessons and self.chance.random() < 0.3:
                self.lesson()
            elif self.step() == "parked" and not (self.events or self.lessons):
                return
        pytest.fail("the mirror does not come to rest")

    # ------------------------------------------------------------------------------ what must be

    def expected(self) -> Tree:
        tree: Tree = {}
        self._expect(self.root, "", tree)
        return tree

    def _expect(self, path: bytes, place: str, tree: Tree) -> None:
        value, listing, perms = (
            self._answer(ask(path))
            for ask in (protocol.read, protocol.directory, protocol.get_perms)
        )
        there = not isinstance(value, XenstoreError)
        lasts = path == self.root or path in [
            join(self.root, name) for name in self.view.always_there_below(self.root)
        ]
        if not (there or lasts):
            return
        value, listing, perms = (
            b"" if isinstance(reply, XenstoreError) else reply for reply in (value, listing, perms)
        )
        text = perms.rstrip(b"\0").replace(b"\0", b",").decode() if self.files.has_perms else ""
        state = NodeState(value, bool(listing), True, True)
        if not (path == self.root or not there or self.view.is_directory(path, state)):
            tree[place] = Entry(False, TEXT.render(value), text)
            return
        tree[place] = Entry(True, b"", text)
        if there and self.view.has_dot_value(path, state):
            tree[f"{place}/.value".lstrip("/")] = Entry(False, TEXT.render(value), text)
        names = dict.fromkeys((*listing.split(b"\0")[:-1], *self.view.always_there_below(path)))
        for name in names:
            self._expect(join(path, name), f"{place}/{name.decode()}".lstrip("/"), tree)


@pytest.fixture
def each_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def checkpoint() -> None:
        await pause("slice")

    monkeypatch.setattr(trio.lowlevel, "checkpoint", checkpoint)
    monkeypatch.setattr(mirror, "SLICE_SECONDS", -1.0)


@pytest.fixture
def shm() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.mark.usefixtures("each_step_waits")
@pytest.mark.parametrize("batch", [2, mirror.BATCH])
@pytest.mark.parametrize("root", [b"/r", b"/local/domain/0"])
def test_it_is_exact_at_rest(
    root: bytes, batch: int, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "BATCH", batch)
    changed = 0
    for seed in range(HISTORIES):
        chance = random.Random(seed)
        history = History(shm / "m", root, chance)
        for _ in range(chance.randrange(8)):
            history.change()
        history.events.clear()
        history.start()
        try:
            change, event, lesson = chance.choice(PACES)
            left = chance.choice((5, 12, 30))
            while left:
                x = chance.random()
                if x < change:
                    history.change()
                    left -= 1
                elif history.events and x < change + event:
                    history.event()
                elif history.lessons and chance.random() < lesson:
                    history.lesson()
                else:
                    history.step()
            history.come_to_rest()
            found = tree_of_files(shm / "m", perms=history.files.has_perms)
            must = history.expected()
            assert not differences(must, found), f"history {seed}"
            changed += len(must) > 1
            own = sum(1 for place in found if place and not place.endswith(".value"))
            assert history.mirror.nodes == own, f"history {seed}"
        finally:
            history.end()
    assert changed > HISTORIES / 2
