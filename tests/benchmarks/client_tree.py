"""The plain tree, asking as xsfs asks: `python3 -m tests.benchmarks.client_tree SOCKET TOP MOUNTPOINT`.

By xsfs's client: others get their turn while somebody waits, events are read whoever waits, and a
daemon that restarts is found again.  So nobody is held up by a slow or dead store but those who ask it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pyfuse3
import trio
from xsfs.view.looks import questions, questions_of_kind
from xsfs.xenstore.eventual import result_of

from xsfs.xenstore.commands import Rest
from xsfs.xenstore.connection import Reply
from xsfs.xenstore.store import Store, open_store

from .bare import OPTIONS
from .plain_tree import Answers, OpenDirectory, PlainTree


def answers(replies: Iterable[Reply]) -> Answers:
    return [reply if isinstance(reply, bytes) else None for reply in replies]


class ClientTree(PlainTree):
    def __init__(self, store: Store, top: str) -> None:
        super().__init__(top)
        self.store = store
        self.rests: dict[OpenDirectory, Rest] = {}

    async def ask(self, path: bytes) -> Answers:
        return answers(await self.store.burst(questions(path or b"/", perms=False)))

    async def ask_and(self, opened: OpenDirectory, names: list[bytes]) -> Answers:
        path = opened.node.path or b"/"
        replies, rest = await result_of(
            self.store.ask_and(
                questions(path, perms=False), lambda: questions_of_kind(path, names, perms=False)
            )
        )
        if names and isinstance(replies[1], bytes):
            self.rests[opened] = rest
        return answers(replies)

    def take(self, opened: OpenDirectory) -> None:
        opened.children = answers(self.rests.pop(opened)())

    async def ask_children(self, path: bytes, names: list[bytes]) -> Answers:
        return answers(await self.store.burst(questions_of_kind(path or b"/", names, perms=False)))


async def serve(socket: str, top: str, mountpoint: str) -> None:
    async with open_store(socket) as store:
        pyfuse3.init(ClientTree(store, top), mountpoint, OPTIONS)
        try:
            await pyfuse3.main()
        finally:
            pyfuse3.close()


if __name__ == "__main__":
    SOCKET, TOP, MOUNTPOINT = sys.argv[1:]
    trio.run(serve, SOCKET, TOP, MOUNTPOINT)
