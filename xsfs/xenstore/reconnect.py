"""A connection that comes back: made when first needed, and again after it has ended.

What it owns: at most one live `Connection`, and how to make one.  Any task may call `connected`; one
of them connects, the others wait for it.  Between requests nothing happens: a daemon that has gone is
noticed by the reader, and looked for again when somebody next asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from xsfs.xenstore.connection import Connection
from xsfs.xenstore.errors import ConnectionLost, StoreUnavailable
from xsfs.xenstore.transport import Transport

log = logging.getLogger(__name__)

BACKOFF_FIRST: Final = 0.005
BACKOFF_MAX: Final = 1.0

Connect = Callable[[], Transport]
OnEvent = Callable[[bytes, bytes], None]


async def open_connection(connect: Connect, deadline: float, *, patient: bool = True) -> Transport:
    """A new transport, tried for with back-off until `deadline`.

    An impatient caller waits for a busy daemon only, not for one that has gone.
    Raises StoreUnavailable where trying again is of no use, else ConnectionLost.
    """
    delay = BACKOFF_FIRST
    while True:
        try:
            return connect()
        except OSError as error:
            # EAGAIN while the daemon's backlog of 1 is full; refused, or gone, while it restarts.
            failure = error
        busy = isinstance(failure, BlockingIOError)
        if not (patient or busy) or trio.current_time() + delay >= deadline:
            where = failure.filename or "its socket"
            reason = f"cannot connect to Xenstore at {where}: {failure.strerror}"
            raise ConnectionLost(reason) from failure
        await trio.sleep(delay)
        delay = min(2 * delay, BACKOFF_MAX)


class Link:
    """See the module's text.

    nursery     where each connection's tasks run; its end is the end of the link
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        connect: Connect,
        timeout: float,
        on_event: OnEvent | None = None,
    ) -> None:
        self._nursery = nursery
        self._connect = connect
        self._timeout = timeout
        self._on_event = on_event
        self._lock = trio.Lock()
        self.connection: Connection | None = None
        self._delay = 0.0
        self._made_at = -BACKOFF_MAX
        self.made = 0

    async def connected(self, deadline: float) -> Connection:
        """The live connection.  Raises ConnectionLost, StoreUnavailable."""
        connection = self.connection
        if connection is not None and connection.alive:
            return connection
        with trio.move_on_at(deadline):
            async with self._lock:
                if self.connection is not None and self.connection.alive:
                    return self.connection
                return await self._make(deadline)
        raise ConnectionLost("Xenstore cannot be reached")

    async def _make(self, deadline: float) -> Connection:
        # A store that takes each connection and hangs up must not be stormed.
        longest = min(BACKOFF_MAX, self._timeout / 4)
        short_lived = trio.current_time() < self._made_at + BACKOFF_MAX
        self._delay = min(2 * self._delay or BACKOFF_FIRST, longest) if short_lived else 0.0
        await trio.sleep(self._delay)
        try:
            return self.adopt(await open_connection(self._connect, deadline))
        except StoreUnavailable as error:
            log.warning("Xenstore is gone: %s", error)
            raise

    def adopt(self, transport: Transport) -> Connection:
        """Take a transport just opened for the link's connection."""
        connection = Connection(transport, self._timeout, self._on_event)
        self._nursery.start_soon(connection.run)
        self.made += 1
        if self.made > 1:
            log.warning("connected to Xenstore again")
        self.connection = connection
        self._made_at = trio.current_time()
        return connection

    def close(self, reason: str) -> None:
        if self.connection is not None:
            self.connection.close(reason)
