"""What systemd is told: that the mount is ready, how it is, that it ends (sd_notify(3)); and how grave
each line of the log is (sd-daemon(3)).
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

log = logging.getLogger(__name__)

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"

LEVELS: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
"""Those of syslog(3)."""


def status(text: str) -> str:
    """What `systemctl status` shows."""
    return f"STATUS={' '.join(text.split())}"


def notify(*assignments: str) -> None:
    """Tell it to the service manager, where one wants to know."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # an abstract one: unix(7)
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.send("\n".join(assignments).encode())
    except OSError as error:
        log.warning("cannot notify the service manager: %s", error.strerror)


def in_journal(descriptor: int) -> bool:
    """Whether what is written there goes to systemd's journal: JOURNAL_STREAM of systemd.exec(5)."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalFormatter(logging.Formatter):
    """Each line with its level in front, as the journal takes it; it knows the name and the time."""

    def format(self, record: logging.LogRecord) -> str:
        level = LEVELS.get(record.levelno, LEVELS[logging.INFO])
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())
