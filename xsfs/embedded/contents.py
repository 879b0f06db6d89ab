"""The first nodes of a store, as the toolstack of a Xen host writes them."""

from __future__ import annotations

import uuid
from typing import Final

from xsfs.embedded.database import Database
from xsfs.embedded.domains import DOM0
from xsfs.embedded.record import home_of

NewNode = tuple[bytes, bytes, list[bytes] | None]
"""Path, value, and permissions (None: inherited from the parent)."""


def _below(base: bytes, entries: dict[str, str], perms: list[bytes] | None = None) -> list[NewNode]:
    return [(base + b"/" + key.encode(), value.encode(), perms) for key, value in entries.items()]


def _uuid_of(domid: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"xsfs domain {domid}"))


def dom0_nodes() -> list[NewNode]:
    """The nodes that xen-init-dom0 and libxl write at the start of a host."""
    home = home_of(DOM0)
    vm = f"/vm/{_uuid_of(DOM0)}"
    return [
        *_below(
            home,
            {
                "domid": "0",
                "name": "Domain-0",
                "vm": vm,
                "control": "",
                "control/feature-poweroff": "1",
                "control/feature-reboot": "1",
                "data": "",
                "device-model": "",
                "backend": "",
                "libxl/disable_udev": "1",
                "memory/target": "4194304",
                "memory/static-max": "8388608",
                "memory/freemem-slack": "262144",
            },
        ),
        *_below(b"/local/pool/0", {"name": "Pool-0", "uuid": _uuid_of(-1)}),
        *_below(vm.encode(), {"name": "Domain-0", "uuid": _uuid_of(DOM0)}),
        *_below(b"/libxl", {"0/dm-version": "qemu_xen"}),
    ]


_OF_THE_GUEST: Final = """
control/shutdown control/feature-poweroff control/feature-reboot control/feature-suspend control/sysrq
device/suspend/event-channel data drivers feature attr error
"""


def guest_nodes(domid: int) -> list[NewNode]:
    """The nodes that libxl writes for a new guest."""
    home = home_of(domid)
    vm = f"/vm/{_uuid_of(domid)}"
    toolstacks = [b"n0", b"r%d" % domid]
    guests = [b"n%d" % domid]
    return [
        (home, b"", toolstacks),
        (vm.encode(), b"", toolstacks),
        *_below(vm.encode(), {"name": f"domain-{domid}", "uuid": _uuid_of(domid)}),
        *_below(
            home,
            {
                "vm": vm,
                "name": f"domain-{domid}",
                "cpu/0/availability": "online",
                "memory/static-max": "1048576",
                "memory/target": "1048576",
                "device": "",
                "control": "",
                "control/platform-feature-multiprocessor-suspend": "1",
                "control/platform-feature-xs_reset_watches": "1",
            },
        ),
        *_below(home, dict.fromkeys(_OF_THE_GUEST.split(), ""), guests),
        *_below(home, {"domid": str(domid), "store/port": "1", "store/ring-ref": "1044476"}),
    ]


def create_nodes(database: Database, nodes: list[NewNode]) -> None:
    for path, value, perms in nodes:
        database.write(DOM0, path, value)
        if perms:
            database.set_perms(DOM0, path, perms)
