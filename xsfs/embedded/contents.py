"""The first nodes of a store, as the toolstack of a Xen host writes them.

Each line of a text has a path and a value.
"""

from __future__ import annotations

import uuid
from typing import Final

from xsfs.embedded.database import Database
from xsfs.embedded.domains import DOM0

_HOST: Final = """\
/local/domain/0/domid 0
/local/domain/0/name Domain-0
/local/domain/0/vm /vm/{uuid}
/local/domain/0/control
/local/domain/0/control/feature-poweroff 1
/local/domain/0/control/feature-reboot 1
/local/domain/0/data
/local/domain/0/device-model
/local/domain/0/backend
/local/domain/0/libxl/disable_udev 1
/local/domain/0/memory/target 4194304
/local/domain/0/memory/static-max 8388608
/local/domain/0/memory/freemem-slack 262144
/local/pool/0/name Pool-0
/local/pool/0/uuid {pool_uuid}
/vm/{uuid}/name Domain-0
/vm/{uuid}/uuid {uuid}
/libxl/0/dm-version qemu_xen
"""

_GUEST: Final = """\
/vm/{uuid}
/vm/{uuid}/name domain-{domid}
/vm/{uuid}/uuid {uuid}
/local/domain/{domid}
/local/domain/{domid}/vm /vm/{uuid}
/local/domain/{domid}/name domain-{domid}
/local/domain/{domid}/cpu/0/availability online
/local/domain/{domid}/memory/static-max 1048576
/local/domain/{domid}/memory/target 1048576
/local/domain/{domid}/device
/local/domain/{domid}/control
/local/domain/{domid}/control/platform-feature-multiprocessor-suspend 1
/local/domain/{domid}/control/platform-feature-xs_reset_watches 1
/local/domain/{domid}/domid {domid}
/local/domain/{domid}/store/port 1
/local/domain/{domid}/store/ring-ref 1044476
"""

_OF_THE_GUEST: Final = """\
/local/domain/{domid}/control/shutdown
/local/domain/{domid}/control/feature-poweroff
/local/domain/{domid}/control/feature-reboot
/local/domain/{domid}/control/feature-suspend
/local/domain/{domid}/control/sysrq
/local/domain/{domid}/device/suspend/event-channel
/local/domain/{domid}/data
/local/domain/{domid}/drivers
/local/domain/{domid}/feature
/local/domain/{domid}/attr
/local/domain/{domid}/error
"""


def _uuid_of(domid: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"xsfs domain {domid}"))


def _create_nodes(database: Database, text: str, perms: list[bytes], domid: int) -> None:
    words = {"domid": domid, "uuid": _uuid_of(domid), "pool_uuid": _uuid_of(-1)}
    for line in text.format_map(words).encode().splitlines():
        path, _, value = line.partition(b" ")
        database.write(DOM0, path, value)
        database.set_perms(DOM0, path, perms)


def create_host_nodes(database: Database) -> None:
    """The nodes that xen-init-dom0 and libxl write at the start of a host."""
    _create_nodes(database, _HOST, [b"n0"], DOM0)


def create_guest_nodes(database: Database, domid: int) -> None:
    """The nodes that libxl writes for a new guest."""
    _create_nodes(database, _GUEST, [b"n0", b"r%d" % domid], domid)
    _create_nodes(database, _OF_THE_GUEST, [b"n%d" % domid], domid)
