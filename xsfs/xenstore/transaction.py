"""One Xenstore transaction.  `commit` or `rollback` end it; so does the end of its connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Session
from xsfs.xenstore.connection import Connection
from xsfs.xenstore.errors import ConnectionLost, TransactionEnded, XenstoreError
from xsfs.xenstore.outage import Outage
from xsfs.xenstore.protocol import Request
from xsfs.xenstore.unanswered import Reply


class Transaction(Session):
    """See the module's text."""

    def __init__(self, connection: Connection, tx_id: int, outage: Outage, timeout: float) -> None:
        self.connection = connection
        self._outage = outage
        self._timeout = timeout
        self._tx_id: int | None = tx_id
        self.requests = 0
        """How many requests were sent in it."""
        self.requests_max: int | None = None
        """How many may be; past it XenstoreError `EQUOTA`, and nothing is sent."""

    @property
    def payload_max(self) -> int:
        return self.connection.payload_max

    @property
    def open(self) -> bool:
        return self._tx_id is not None and self.connection.alive

    async def burst(
        self, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None
    ) -> list[Reply]:
        if meanwhile is not None:
            meanwhile()
        if self.open:
            await self._outage.check()
        if self._tx_id is None:
            raise TransactionEnded("the transaction has ended")
        if self.requests_max is not None and self.requests + len(requests) > self.requests_max:
            raise XenstoreError("EQUOTA", requests[0])
        self.requests += len(requests)
        try:
            with self._outage.noticed(trio.current_time() + self._timeout):
                return await self.connection.burst(requests, self._tx_id)
        except ConnectionLost as error:
            self._tx_id = None
            raise TransactionEnded(f"the transaction was lost: {error}") from error

    async def finish(self, requests: Sequence[Request], *, commit: bool = True) -> list[Reply]:
        """Ask `requests` and end the transaction, in one round trip.

        Raises XenstoreError for the end's own verdict: `EAGAIN` is a conflict.  Where one of the
        requests failed the transaction is committed all the same: look at their replies.
        """
        if self._tx_id is None:
            raise TransactionEnded("the transaction has ended")
        if not self.connection.alive:
            # Nothing was sent: its outcome is known.
            self._tx_id = None
            raise TransactionEnded("the transaction was lost with its connection")
        tx_id, self._tx_id = self._tx_id, None
        *replies, end = await self.connection.burst(
            (*requests, protocol.transaction_end(commit)), tx_id
        )
        if isinstance(end, XenstoreError):
            # C xenstored says ENOMEM for a transaction in which a request was refused: why, its own
            # verdict tells.
            refused = [reply for reply in replies if isinstance(reply, XenstoreError)]
            raise refused[0] if refused and end.name != "EAGAIN" else end
        return replies

    async def commit(self) -> None:
        """Make it all true at once.  Raises XenstoreError `EAGAIN` on a conflict: begin again.

        ConnectionLost means that the outcome is unknown.
        """
        await self.finish(())

    async def rollback(self) -> None:
        await self.finish((), commit=False)

    async def disconnected(self) -> None:
        """Return when its connection has ended: abandoned, or lost."""
        await self.connection.ended()
