"""A guest's new home: after a migration, or after it was saved and restored, it has another domid.

`follow_home` watches the node `domid`.  The kernel sets this watch again in the new store, so its first event
tells of the new domid.  All that the mount keeps by path moves to the new home.  Open transactions are lost:
their users meet ESTALE.  Until that event the mount works by relative paths (xenstore/home.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from xsfs.fs.operations import Operations
from xsfs.fs.transactions import Transactions
from xsfs.view.view import View
from xsfs.xenstore.errors import StoreError, XenstoreError
from xsfs.xenstore.store import Store

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 1.0


async def follow_home(
    view: View, operations: Operations, transactions: Transactions, on_move: Callable[[], None]
) -> None:
    """Move the mount to the new home whenever the domain has got another domid, and call `on_move`."""
    table, store = operations.table, view.store
    try:
        async with store.watch(b"domid") as events:
            async for _ in events:
                domid = await _present_domid(store)
                if domid in (0, view.domid):
                    continue
                log.warning("domain %d is domain %d now", view.domid, domid)
                source = view.home
                view.move_home(domid)
                store.home.move(view.home)
                store.watches.move(source, view.home)
                view.sticky.move(source, view.home)
                table.paths.clear()
                table.open_files_of(view).move(source, view.home)
                operations.move_handles(source, view.home)
                on_move()
                await transactions.roll_back_all()
    except StoreError as error:
        log.warning("xsfs will not notice a migration: %s", error)


async def _present_domid(store: Store) -> int:
    """The present domid; 0 if the toolstack has not written one yet.

    Retries while the store does not answer, because no other event may tell of the new domid.
    """
    while True:
        try:
            return await store.domid()
        except (XenstoreError, ValueError) as error:
            log.warning("cannot read the domid: %s", error)
            return 0
        except StoreError as error:
            level = logging.DEBUG if error.during_outage else logging.WARNING
            log.log(level, "cannot read the domid, xsfs retries: %s", error)
            await trio.sleep(RETRY_SECONDS)
