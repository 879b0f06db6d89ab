"""xsfs: Xenstore, the configuration store of the Xen hypervisor, as a file system and for Python.

The command `xsfs` mounts it (xsfs.cli).  Programs that use trio open it:

    async with xsfs.open_store() as store:
        print(await store.read("name"))
"""

from xsfs.xenstore.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreError,
    StoreUnavailable,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.permissions import (
    Permission,
    Permissions,
    format_permissions,
    parse_permissions,
)
from xsfs.xenstore.store import Store, Transaction, open_store
from xsfs.xenstore.watches import Subscription

__version__ = "0.1.0"

__all__ = [
    "ConnectionLost",
    "Permission",
    "Permissions",
    "RequestTimeout",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Subscription",
    "Transaction",
    "TransactionEnded",
    "XenstoreError",
    "__version__",
    "format_permissions",
    "open_store",
    "parse_permissions",
]
