"""Daemonize once the tree is usable, and not before.

The process forks before it opens anything or runs an event loop.  The child does all the work and
reports through a pipe how it went.  The parent waits for that report and exits with it.

Until then both processes share one process group.  systemd can lay an autofs mount on the mountpoint.  While
it is pending, the kernel blocks every process there except the process group of mount(8).
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import sys
from contextlib import suppress

from xsfs.cli.exit_statuses import EXIT_INTERRUPTED, MountError

READY = b"\0"
SYSLOG = "/dev/log"


class Background:
    """Fork.  `in_foreground` is true in the parent, false in the child."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.in_foreground = os.fork() != 0
        if self.in_foreground:
            # Ctrl-C interrupts the child, too, which reports it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.close(writing)
            self._pipe = reading
        else:
            os.close(reading)
            self._pipe = writing

    def wait(self) -> None:
        """In the parent: return when the child is ready; exit with the child's status if it fails.
        The child prints the reason."""
        status = os.read(self._pipe, 1)
        if status != READY:
            # The child died without a report if there is no byte at all.
            sys.exit(status[0] if status else 1)

    def ready(self) -> None:
        """In the child: leave the terminal, and release the parent.  Raises MountError if the parent has
        ended."""
        log_to_syslog()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)  # it is above 2, because main.py has opened the three
        os.chdir("/")
        try:
            os.write(self._pipe, READY)
        except BrokenPipeError:
            raise MountError(
                EXIT_INTERRUPTED, "the process that waited for the mount has ended", "try again"
            ) from None
        os.close(self._pipe)

    def failed(self, status: int, message: str) -> None:
        """In the child: print the reason, report the status to the parent, and exit."""
        with suppress(BrokenPipeError):
            print(f"xsfs: {message}", file=sys.stderr, flush=True)
            os.write(self._pipe, bytes((status,)))
        os._exit(status)


def log_to_syslog() -> None:
    handler: logging.Handler = logging.NullHandler()
    if os.path.exists(SYSLOG):
        handler = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
    logging.basicConfig(handlers=[handler], format=f"xsfs[{os.getpid()}]: %(message)s", force=True)
