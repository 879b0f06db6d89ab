#!/usr/bin/env python3
"""Two guests for the embedded store: plays the toolstack and the drivers of guest-7 and guest-9.

It creates the nodes of both guests, and prints a line when they exist.  If you tell a guest to power off, it
removes that guest's nodes.  It ends with the last guest.  Run it on the embedded store, because a real daemon
rejects domains that do not exist.
"""

import sys

import xsfs.sync
from xsfs import StoreError
from xsfs.sync import SyncStore

HOME = "/local/domain/{domid}"
BACKEND = "/local/domain/0/backend/{device}/{domid}/{number}"

GUESTS = (7, 9)

NODES = {
    "": ("", "n0,r{domid}"),
    "/name": ("guest-{domid}", "n0,r{domid}"),
    "/domid": ("{domid}", "n0,r{domid}"),
    "/memory/target": ("2088961", "n0,r{domid}"),
    "/control/shutdown": ("", "n{domid}"),
    "/data": ("", "n{domid}"),
    "/data/os_name": ("Debian", "n{domid}"),
    "/data/os_distro": ("debian", "n{domid}"),
}
"""Value and permissions below the home of a guest."""

DEVICES = {
    ("vbd", 51712): {"dev": "xvda", "params": "/dev/vg0/guest-{domid}-xvda"},
    ("vbd", 51728): {"dev": "xvdb", "params": "/dev/vg0/guest-{domid}-xvdb"},
    ("vif", 0): {"mac": "00:16:3e:00:00:{domid:02x}"},
}
"""The values that the toolstack writes for each device."""


def create(store: SyncStore, domid: int) -> None:
    store.introduce(domid, gfn=1, port=1)

    def node(path: str, value: str, perms: str) -> None:
        store.write(path, value.format(domid=domid))
        store.set_perms(path, perms.format(domid=domid))

    home = HOME.format(domid=domid)
    for path, (value, perms) in NODES.items():
        node(home + path, value, perms)
    for (device, number), values in DEVICES.items():
        frontend = f"{home}/device/{device}/{number}"
        backend = BACKEND.format(domid=domid, device=device, number=number)
        node(frontend, "", "n{domid},r0")
        node(backend, "", "n0,r{domid}")
        for name, value in {"backend": backend, "backend-id": "0", "state": "4"}.items():
            node(f"{frontend}/{name}", value, "n{domid},r0")
        for name, value in {**values, "frontend-id": "{domid}", "state": "4"}.items():
            node(f"{backend}/{name}", value, "n0,r{domid}")
        if "mac" in values:
            node(f"{frontend}/mac", values["mac"], "n{domid},r0")


def destroy(store: SyncStore, domid: int) -> None:
    store.release(domid)
    store.delete(HOME.format(domid=domid))
    for device in {device for device, _ in DEVICES}:
        store.delete(f"/local/domain/0/backend/{device}/{domid}")


def main() -> None:
    with xsfs.sync.open_store() as store:
        for domid in GUESTS:
            create(store, domid)
        running = {f"{HOME}/control/shutdown".format(domid=domid): domid for domid in GUESTS}
        with store.watch(*running) as events:
            print("guest-7 and guest-9 are running", flush=True)
            for path in map(bytes.decode, events):
                if path in running and store.read(path) == b"poweroff":
                    destroy(store, running.pop(path))
                    if not running:
                        break


if __name__ == "__main__":
    try:
        main()
    except StoreError as error:
        sys.exit(f"guests: {error}")
