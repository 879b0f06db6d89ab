"""xsfs: Xenstore, the configuration store of the Xen hypervisor, as a file system and for Python.

The command `xsfs` mounts it (xsfs.cli).  Programs that use trio open it:

    async with xsfs.open_store() as store:
        print(await store.read("name"))

Programs without trio import xsfs.sync.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xsfs.xenstore.errors import (
        Conflict,
        ConnectionLost,
        NotFound,
        NotSupported,
        PermissionDenied,
        QuotaExceeded,
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
    "Conflict",
    "ConnectionLost",
    "NotFound",
    "NotSupported",
    "Permission",
    "PermissionDenied",
    "Permissions",
    "QuotaExceeded",
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


def __getattr__(name: str) -> Any:
    """Import a name when it is used.  `xsfs --help` and xsfs-watch need none of them, and trio takes a
    tenth of a second to load."""
    if name in __all__:
        for module in ("errors", "permissions", "store", "watches"):
            contents = vars(import_module(f"xsfs.xenstore.{module}"))
            if name in contents:
                return contents[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
