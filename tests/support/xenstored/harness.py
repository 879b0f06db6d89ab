"""Run the real Xenstore daemons (C xenstored, OCaml oxenstored) without Xen.

The daemons are those of Debian's xen-utils-4.17 or xen-utils-4.20, or others (shim.py says how).  They
are started with the LD_PRELOAD shim xenshim.c (built with gcc when needed), which stands in for the
hypervisor.  Everything lives in a directory of its own, so any number of instances can run side by
side.

    with RealXenstored(kind="C", guests=(7,)) as xs:
        xs.populate()                   # what libxl would write for dom0 + 7
        xs.socket                       # dom0: the daemon's own Unix socket
        xs.guest_socket(7)              # domain 7: Unix socket <-> real ring
        with xs.client() as dom0, xs.client(7) as domu:
            dom0.write("/local/domain/7/x", b"1")
            domu.read("name")
        xs.restart()                    # SIGKILL, and a new, empty daemon

The guest socket speaks the plain Xenstore wire protocol: the bytes of its clients go through the
shared ring page of the domain, so the daemon takes them for those of an unprivileged domain
(relative paths, permissions, quotas).  It serves many clients at once, as a guest's kernel does:
see xenbus.py.  As in reality, a guest is not told when the daemon dies: its requests just hang.
start() and restart() then give it a fresh ring, and drop its clients (EOF).

A domain "exists" for the daemon if it has a ring file: see create_domain().  As a program, the same
is `python3 -m tests.support.xenstored`.
"""

from .bridge import GuestBridge
from .client import OPS, XsClient, XsEOF, XsError, XsTimeout, encode, strings
from .daemon import RealXenstored
from .population import dom0_nodes, domain_uuid, guest_nodes, populate
from .shim import DAEMONS, XENSTORE_CONTROL, MissingProgramError

__all__ = [
    "DAEMONS",
    "OPS",
    "XENSTORE_CONTROL",
    "GuestBridge",
    "MissingProgramError",
    "RealXenstored",
    "XsClient",
    "XsEOF",
    "XsError",
    "XsTimeout",
    "dom0_nodes",
    "domain_uuid",
    "encode",
    "guest_nodes",
    "populate",
    "strings",
]
