"""CONTROL: the commands of `xenstore-control` that the embedded store has.

Nothing here keeps state or waits.  docs/embedded.md lists the commands that only C xenstored has.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Collection
from functools import partial
from typing import Final

from xsfs.embedded.client_connection import ClientConnection, transactions_of, watches_of
from xsfs.embedded.database import Database
from xsfs.embedded.domains import QUOTAS
from xsfs.embedded.record import Refused, signed, unsigned

log = logging.getLogger(__name__)

_HELP: Final = (
    b"check\t\nmemreport\t[<file>]\nprint\t<string>\nquota\t[set <name> <val>|<domid>]\nhelp\t\n\0"
)

Result = bytes | Callable[[], None] | None
"""The payload of the reply, None for OK; or a function that may block for any time, after which the
reply is OK."""


def run(
    database: Database, connections: Collection[ClientConnection], strings: list[bytes]
) -> Result:
    """Refused (EINVAL) for an unknown command or wrong arguments, (ENOENT) for an unknown domain."""
    match strings:
        case [b"help"]:
            return _HELP
        case [b"check"]:
            pass
        case [b"print", text]:
            log.info("control: %s", text.decode("ascii", "backslashreplace"))
        case [b"quota"]:
            return _settings(database.quotas)
        case [b"quota", b"set", name, value]:
            number = signed(unsigned(value))
            if number < 1 or name not in database.quotas:
                raise Refused("EINVAL")
            database.quotas[name] = number
        case [b"quota", domid] if domid != b"set":
            return _usage(database, connections, unsigned(domid))
        case [b"memreport"]:
            # xenstored appends it to its trace file.
            for line in _memory(database, connections):
                log.info("memreport: %s", line)
        case [b"memreport", path]:
            lines = _memory(database, connections)
            return partial(_append, path, "".join(line + "\n" for line in lines))
        case _:
            raise Refused("EINVAL")
    return None


def _settings(quotas: dict[bytes, int]) -> bytes:
    text = "Quota settings:\n"
    for name, (_, description) in QUOTAS.items():
        text += f"{name.decode():<17}: {quotas[name]:>8} {description}\n"
    return text.encode() + b"\0"


def _usage(database: Database, connections: Collection[ClientConnection], domid: int) -> bytes:
    domain = database.domains.known.get(domid)
    if domain is None:
        raise Refused("ENOENT")
    return (
        f"Domain {domid}:\n"
        f"nodes           : {domain.nodes:>8}\n"
        f"watches         : {watches_of(connections, domid):>8}\n"
        f"transactions    : {transactions_of(connections, domid):>8}\n\0"
    ).encode()


def _append(path: bytes, text: str) -> None:
    # Without O_NONBLOCK, opening a FIFO waits for a reader.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        with open(os.open(path, flags, 0o600), "w") as file:
            file.write(text)
    except OSError as error:
        log.warning("cannot write a memory report: %s", error)
        raise Refused("EINVAL") from error


def _memory(database: Database, connections: Collection[ClientConnection]) -> list[str]:
    return [
        f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} KiB",
        f"nodes: {database.node_count}",
        *(
            f"connection of domain {connection.domid}: {len(connection.watches)} watches, "
            f"{len(connection.transactions)} transactions, {len(connection.unsent)} bytes unsent"
            for connection in connections
        ),
    ]
