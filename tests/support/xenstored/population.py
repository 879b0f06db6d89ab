"""The nodes of a machine with Xen: what its toolstack, its drivers and its guests write."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from .client import XsClient, XsError, strings

Node = tuple[str, str, list[str] | None]
"""(path, value, permissions or None)"""

_Entry = tuple[str, object] | tuple[str, object, list[str]]
"""(key, value) or (key, value, permissions)"""


def domain_uuid(domid: int) -> str:
    """The fixed UUID which populate() gives to a domain."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"xenstored-harness {domid}"))


def dom0_nodes() -> list[Node]:
    """(path, value, perms or None) of what is there without any guest."""
    base = "/local/domain/0"
    return [
        ("/local", "", None),
        ("/local/domain", "", None),
        (base, "", None),
        (f"{base}/domid", "0", None),
        (f"{base}/name", "Domain-0", None),
        (f"{base}/control", "", None),
        (f"{base}/control/feature-poweroff", "1", None),
        (f"{base}/control/feature-reboot", "1", None),
        (f"{base}/device-model", "", None),
        (f"{base}/backend", "", None),
        (f"{base}/libxl/disable_udev", "1", None),
        (f"{base}/memory/target", "4194304", None),
        (f"{base}/memory/static-max", "8388608", None),
        (f"{base}/memory/freemem-slack", "262144", None),
        ("/local/pool/0/name", "Pool-0", None),
        ("/local/pool/0/uuid", domain_uuid(-1), None),
        ("/vm", "", None),
        ("/libxl", "", None),
        ("/libxl/0/dm-version", "qemu_xen", None),
    ]


# What back and front ends add to what libxl writes.
MINOR: Final = ("feature-", "multi-queue", "queue-", "sector", "physical", "hotplug")


def guest_nodes(domid: int, name: str | None = None, small: bool = False) -> list[Node]:
    """(path, value, perms or None) of one running HVM Linux guest.

    After libxl of Xen 4.17 (libxl_create.c, libxl_dom.c, libxl_device.c,
    libxl_disk.c, libxl_nic.c, libxl_console.c), plus what the front ends, the
    back ends, and guest utilities add.  perms is None where the node just
    inherits those of its parent, as most do.  A small guest lacks the second
    disk, the multi-queue and feature nodes, and libxl's private copies.
    """
    name = name or f"guest-{domid}"
    vcpus, disks = 2, [(51712, "xvda"), (51728, "xvdb")]
    if small:
        vcpus, disks = 1, disks[:1]
    dom, front, back = f"/local/domain/{domid}", "device", "backend"
    vm, libxl = f"/vm/{domain_uuid(domid)}", f"/libxl/{domid}"
    mac = f"00:16:3e:{domid >> 16 & 255:02x}:{domid >> 8 & 255:02x}:{domid & 255:02x}"
    no = ["n0"]
    ro = ["n0", f"r{domid}"]  # the toolstack's
    rw = [f"n{domid}"]  # the guest's
    fe = [f"n{domid}", "r0"]  # front end: the guest's, dom0 reads
    be = ["n0", f"r{domid}"]  # back end: dom0's, the guest reads
    nodes: list[Node] = []

    def add(base: str, entries: Sequence[_Entry], perms: list[str] | None = None) -> None:
        """Entries are (key, value), or (key, value, perms)."""
        if perms:
            nodes.append((base, "", perms))
        for key, value, *own_perms in entries:
            if not small or not key.startswith(MINOR):
                nodes.append((f"{base}/{key}", str(value), own_perms[0] if own_perms else None))

    def own(keys: Sequence[tuple[str, str]]) -> None:
        nodes.extend((f"{dom}/{key}", value, rw) for key, value in keys)

    add(dom, [], ro)
    add(
        vm,
        [
            ("uuid", domain_uuid(domid)),
            ("name", name),
            ("image/ostype", "hvm"),
            ("image/kernel", "hvmloader"),
            ("start_time", "1732260000.42"),
            ("rtc/timeoffset", ""),
        ],
        ro,
    )
    add(libxl, [], no)
    add(f"{libxl}/device", [], no)
    add(dom, [("vm", vm), ("name", name)])
    for key in "cpu", "memory", front, "control", "hvmloader":
        add(f"{dom}/{key}", [], ro)
    own(
        [
            (f"{front}/suspend/event-channel", ""),
            ("control/shutdown", ""),
            ("control/feature-poweroff", "1"),
            ("control/feature-reboot", "1"),
            ("control/feature-suspend", "1"),
            ("control/feature-s3", ""),
            ("control/feature-s4", ""),
            ("control/sysrq", ""),
            ("data", ""),
            ("drivers", ""),
            ("feature", ""),
            ("attr", ""),
            ("error", ""),
        ]
    )
    add(
        dom,
        [
            ("platform/acpi", 1),
            ("platform/acpi_s3", 1),
            ("platform/acpi_s4", 1),
            ("platform/mmio_hole_size", 268435456),
            ("control/platform-feature-multiprocessor-suspend", 1),
            ("control/platform-feature-xs_reset_watches", 1),
            ("hvmloader/bios", "seabios"),
            ("hvmloader/allow-memory-relocate", 1),
            ("memory/static-max", 2097152),
            ("memory/target", 2088961),
            ("memory/videoram", 8192),
            ("domid", domid),
            ("store/port", 1),
            ("store/ring-ref", 1044476),
            *((f"cpu/{n}/availability", "online") for n in range(vcpus)),
        ],
    )
    add(libxl, [("type", "hvm"), ("dm-version", "qemu_xen")])

    def device(
        kind: str,
        devid: int,
        frontend: str,
        backend_entries: Sequence[_Entry],
        frontend_entries: Sequence[_Entry],
        frontend_perms: list[str] = fe,
    ) -> None:
        frontend = f"{dom}/{frontend}"
        backend = f"/local/domain/0/{back}/{kind}/{domid}/{devid}"
        private = f"{libxl}/device/{kind}/{devid}"
        add(private, [("frontend", frontend), ("backend", backend)])
        add(private, [e for e in backend_entries if not small and not e[0].startswith(MINOR)])
        add(frontend, [("backend", backend), ("backend-id", 0), *frontend_entries], frontend_perms)
        add(
            backend,
            [
                ("frontend", frontend),
                ("frontend-id", domid),
                ("online", 1),
                ("state", 4),
                *backend_entries,
            ],
            be,
        )

    device(
        "console",
        0,
        "console",
        [("protocol", "vt100")],
        [
            ("limit", 1048576),
            ("type", "xenconsoled"),
            ("output", "pty"),
            ("tty", f"/dev/pts/{domid}"),
            ("port", 2),
            ("ring-ref", 1044479),
            ("vnc-listen", "127.0.0.1"),
            ("vnc-port", 5900 + domid),
        ],
        ro,
    )
    for number, (devid, dev) in enumerate(disks):
        device(
            "vbd",
            devid,
            f"{front}/vbd/{devid}",
            [
                ("params", f"/dev/vg0/{name}-{dev}"),
                ("script", "/etc/xen/scripts/block"),
                ("removable", 0),
                ("bootable", 1),
                ("dev", dev),
                ("type", "phy"),
                ("mode", "w"),
                ("device-type", "disk"),
                ("discard-enable", 1),
                ("specification", "xen"),
                ("multi-queue-max-queues", 4),
                ("physical-device", f"fd:{number}"),
                ("physical-device-path", f"/dev/vg0/{name}-{dev}"),
                ("hotplug-status", "connected"),
                ("feature-flush-cache", 1),
                ("feature-barrier", 1),
                ("feature-persistent", 1),
                ("feature-max-indirect-segments", 256),
                ("sectors", 41943040),
                ("info", 0),
                ("sector-size", 512),
                ("physical-sector-size", 512),
                ("max-ring-page-order", 4),
            ],
            [
                ("state", 4),
                ("virtual-device", devid),
                ("device-type", "disk"),
                ("trusted", 1),
                ("multi-queue-num-queues", vcpus),
                ("protocol", "x86_64-abi"),
                ("feature-persistent", 1),
                *(
                    (f"queue-{q}/{key}", value)
                    for q in range(vcpus)
                    for key, value in (("ring-ref", 8 + q), ("event-channel", 20 + q))
                ),
            ],
        )
    device(
        "vif",
        0,
        f"{front}/vif/0",
        [
            ("script", "/etc/xen/scripts/vif-bridge"),
            ("mac", mac),
            ("bridge", "xenbr0"),
            ("handle", 0),
            ("type", "vif"),
            ("mtu", 1500),
            ("hotplug-status", "connected"),
            ("feature-sg", 1),
            ("feature-gso-tcpv4", 1),
            ("feature-gso-tcpv6", 1),
            ("feature-rx-copy", 1),
            ("feature-rx-flip", 0),
            ("feature-multicast-control", 1),
            ("feature-split-event-channels", 1),
            ("multi-queue-max-queues", 4),
        ],
        [
            ("handle", 0),
            ("mac", mac),
            ("state", 4),
            ("trusted", 1),
            ("mtu", 1500, ro),
            ("request-rx-copy", 1),
            ("feature-rx-notify", 1),
            ("feature-sg", 1),
            ("feature-gso-tcpv4", 1),
            ("multi-queue-num-queues", vcpus),
            *(
                (f"queue-{q}/{key}", value)
                for q in range(vcpus)
                for key, value in (
                    ("tx-ring-ref", 768 + q),
                    ("rx-ring-ref", 784 + q),
                    ("event-channel-tx", 30 + q),
                    ("event-channel-rx", 40 + q),
                )
            ),
        ],
    )
    add(
        f"/local/domain/0/device-model/{domid}",
        [
            ("state", "running"),
            ("disable_pf", 0),
            ("backends/qdisk", ""),
            ("backends/vkbd", ""),
            ("backends/9pfs", ""),
        ],
        no,
    )
    add(f"{dom}/image", [("device-model-pid", 1000 + domid)])
    # What tools in the guest write; these inherit the guest's permissions.
    add(
        dom,
        [
            ("data/updated", "Sat Nov 22 07:00:00 2025"),
            ("data/os_name", "Debian"),
            ("data/os_distro", "debian"),
            ("data/os_uname", "6.1.0-41-amd64"),
            ("data/meminfo_total", 2014424),
            ("data/meminfo_free", 1812044),
            ("attr/vif/0/name", "eth0"),
            ("attr/vif/0/mac/0", mac),
            ("attr/vif/0/ipv4/0", f"10.{domid >> 8 & 255}.{domid & 255}.2"),
            ("attr/PVAddons/Installed", 1),
            ("feature/hotplug/vif", 1),
            ("feature/hotplug/vbd", 1),
            ("drivers/0", "linux"),
        ],
    )
    return nodes


def populate(client: XsClient, domids: Iterable[int] = (), small: bool = False) -> int:
    """Write dom0_nodes() and guest_nodes() with pipelined requests.

    The domains must exist (RealXenstored.create_domain), or the C daemon
    refuses to give nodes to them.  Returns the number of requests.
    """

    def requests() -> Iterator[tuple[str, bytes]]:
        for nodes in (dom0_nodes(), *(guest_nodes(d, small=small) for d in domids)):
            for path, value, perms in nodes:
                if value or not perms:
                    yield "WRITE", strings(path) + value.encode()
                else:  # libxl__xs_mknod()
                    yield "MKDIR", strings(path)
                if perms:
                    yield "SET_PERMS", strings(path, *perms)

    sent = list(requests())
    for request, reply in zip(sent, client.pipeline(sent), strict=True):
        if isinstance(reply, XsError):
            raise XsError(reply.name, f"{request[0]} {request[1]!r}")
    return len(sent)
