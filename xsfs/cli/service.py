"""Reports of a running mount: its state for systemd (sd_notify(3)), the severity of log lines for the
journal (sd-daemon(3)), and on request the state of every task."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from typing import Any, Final

log = logging.getLogger(__name__)

LEVELS: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
"""The levels of syslog(3)."""


def status(text: str) -> str:
    """The assignment that makes `systemctl status` show the text."""
    return f"STATUS={' '.join(text.split())}"


def notify(*assignments: str) -> None:
    """Send these to the service manager, if one has asked for them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            # An abstract address begins with NUL: unix(7).
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send("\n".join(assignments).encode())
    except OSError as error:
        log.warning("cannot notify the service manager: %s", error)


def in_journal() -> bool:
    """Whether standard error leads to systemd's journal: JOURNAL_STREAM of systemd.exec(5)."""
    found = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalFormatter(logging.Formatter):
    """Each line begins with its level, as the journal expects.  The journal adds name and time."""

    def format(self, record: logging.LogRecord) -> str:
        level = LEVELS.get(record.levelno, LEVELS[logging.INFO])
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def describe_tasks() -> Iterator[str]:
    """A line for each task of the running event loop, and one for each call in its stack."""
    import trio  # `xsfs --help` imports this module, and does not wait for trio to load

    return _describe(trio.lowlevel.current_root_task(), "")


def _describe(task: Any, indent: str) -> Iterator[str]:
    yield f"{indent}{task.name}"
    # trio 0.22, which Debian 12 has, does not tell the frames.  pyfuse3's coroutines have their own type.
    awaited = task.coro
    while awaited is not None:
        if frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None):
            code = frame.f_code
            yield f"{indent}    {code.co_filename}:{frame.f_lineno} {code.co_qualname}"
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _describe(child, indent + "  ")
