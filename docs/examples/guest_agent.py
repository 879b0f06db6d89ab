#!/usr/bin/env python3
"""A guest agent: publishes facts about this guest in `data/agent`, and carries out requests of dom0.

    guest_agent.py [INTERVAL]       publish every INTERVAL seconds; default: 60

The agent also publishes when the toolstack adds or removes a device.  dom0 makes a request by a word in
`data/agent/request`: `publish` or `sync`.  The agent writes the outcome to `data/agent/result`, and empties
the request.  Then dom0 may make the next one.
"""

import os
import socket
import sys
from pathlib import Path

import xsfs.sync
from xsfs import NotFound, StoreError
from xsfs.sync import SyncStore, SyncTransaction

REQUEST = "data/agent/request"
RESULT = "data/agent/result"


def publish(store: SyncStore) -> None:
    facts = {
        "hostname": socket.gethostname(),
        "kernel": os.uname().release,
        "uptime": Path("/proc/uptime").read_text().split()[0],
        "interfaces": " ".join(name for _, name in socket.if_nameindex()),
    }

    def write(tx: SyncTransaction) -> None:
        for name, value in facts.items():
            tx.write(f"data/agent/{name}", value)

    store.atomically(write)  # dom0 never sees half of them


def sync(store: SyncStore) -> None:
    os.sync()


ACTIONS = {"publish": publish, "sync": sync}


def answer(store: SyncStore) -> None:
    """Carry out the request, if there is one."""
    try:
        request = store.read(REQUEST).decode(errors="replace")
    except NotFound:
        return
    if not request:
        return  # the event of the emptied request
    action = ACTIONS.get(request)
    if action is not None:
        action(store)

    def reply(tx: SyncTransaction) -> None:
        tx.write(RESULT, f"done: {request}" if action else f"unknown: {request}")
        tx.write(REQUEST, "")

    store.atomically(reply)


def main() -> None:
    interval = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    with xsfs.sync.open_store() as store, store.watch(REQUEST, "device") as events:
        while True:
            # The first two events come immediately, and after a restart of Xenstore two more.
            path = events.wait(interval)
            try:
                if path == REQUEST.encode():
                    answer(store)
                else:
                    publish(store)
            except StoreError as error:
                print(f"guest_agent: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except StoreError as error:
        sys.exit(f"guest_agent: {error}")
