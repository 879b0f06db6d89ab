"""The stores for the tests of the client: each real daemon, a guest of each, and the embedded store, with
their fixtures.
"""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import threading
from collections.abc import Iterator

import pytest
import trio

from tests.support.clients import GUEST, LIMIT, TIMEOUT, Place, furnish
from tests.support.xenstored.harness import RealXenstored
from xsfs.embedded.server import EmbeddedStore
from xsfs.xenstore import protocol
from xsfs.xenstore.errors import XenstoreError
from xsfs.xenstore.store import open_store

MANY = 5000
MANY_PATH = "/many"
"""A node of dom0 with MANY children, which everybody may list."""
SECRET = "/secret"

WATCHES = 100
"""The quota of each store for a guest; it stops short of twice as many."""


class Embedded:
    """The embedded store, in a thread of its own, listening for dom0 and the guest."""

    def __init__(self, directory: str) -> None:
        self.socket = os.path.join(directory, "dom0")
        self.guest_socket = os.path.join(directory, "guest")
        self._ready: queue.Queue[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = queue.Queue()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))
        self._thread.start()
        self._token, self._scope = self._ready.get(timeout=LIMIT)

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            store = EmbeddedStore(nursery)
            await nursery.start(store.listen, self.socket, 0)
            await nursery.start(store.listen, self.guest_socket, GUEST)
            self._ready.put((trio.lowlevel.current_trio_token(), nursery.cancel_scope))

    def close(self) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()


async def make_many(path: str) -> None:
    async with open_store(path, timeout=TIMEOUT) as dom0:
        await dom0.mkdir(SECRET)
        await dom0.set_perms(SECRET, "n0")
        await dom0.mkdir(MANY_PATH)
        await dom0.set_perms(MANY_PATH, "r0")
        replies = await dom0.pipeline(
            [protocol.mkdir(f"{MANY_PATH}/{name}".encode()) for name in many_names()]
        )
        assert not any(isinstance(reply, XenstoreError) for reply in replies)


def many_names() -> list[str]:
    return [f"child-{number}" for number in range(MANY)]


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, Place]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for kind in "C", "ocaml":
            daemon = stack.enter_context(RealXenstored(kind, guests=(GUEST,)))
            found[kind] = Place(kind, 0, daemon.socket)
            found[f"{kind} guest"] = Place(kind, GUEST, daemon.guest_socket(GUEST))
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        embedded = Embedded(directory)
        stack.callback(embedded.close)
        found["embedded"] = Place("embedded", 0, embedded.socket)
        found["embedded guest"] = Place("embedded", GUEST, embedded.guest_socket)
        for place in found.values():
            if not place.domid:
                trio.run(furnish, place.path)
                trio.run(make_many, place.path)
        yield found


DOM0S = ("C", "ocaml", "embedded")
GUESTS = tuple(f"{kind} guest" for kind in DOM0S)
only_dom0s = pytest.mark.parametrize("place", DOM0S, indirect=True)
only_guests = pytest.mark.parametrize("place", GUESTS, indirect=True)


@pytest.fixture(params=[*DOM0S, *GUESTS])
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    return places[request.param]


@contextlib.contextmanager
def fails_with(name: str) -> Iterator[None]:
    with pytest.raises(XenstoreError) as caught:
        yield
    assert caught.value.name == name
