"""The plain tree, asking as xsfs asks: `python3 -m tests.benchmarks.client_tree SOCKET TOP MOUNTPOINT`.

By xsfs's client, which many tasks can use at once: each reply finds its request by its number, events
are read whoever waits, every wait has its limit, and a daemon that restarts is found again.  That is
the floor under every truthful Xenstore file system in Python that serves more than one program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pyfuse3
import trio

from xsfs.client import Store, open_store
from xsfs.looks import questions, questions_of_kind
from xsfs.session import Rest
from xsfs.unanswered import Reply

from .bare import OPTIONS
from .plain_tree import Answers, PlainTree


def answers(replies: Iterable[Reply]) -> Answers:
    return [reply if isinstance(reply, bytes) else None for reply in replies]


class ClientTree(PlainTree):
    def __init__(self, store: Store, top: str) -> None:
        super().__init__(top)
        self.store = store
        self.rest: Rest

    async def ask(self, path: bytes, behind: list[bytes]) -> Answers:
        self.behind = behind
        replies, self.rest = await self.store.burst_and(
            questions(path or b"/", perms=False),
            lambda: questions_of_kind(path or b"/", behind, perms=False),
        )
        return answers(replies)

    def prepare(self) -> None:
        if self.behind and self.behind == self.names:
            self.children = answers(self.rest())

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
