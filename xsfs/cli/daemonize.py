"""Daemonize once the tree is usable, and not before.

The process forks before it opens anything or runs an event loop.  The child does all the work, and prints why
it fails.  The parent waits until the child is ready or has ended.

Until then both processes share one process group.  systemd can lay an autofs mount on the mountpoint.  While
it is pending, the kernel blocks every process there except the process group of mount(8).
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import sys

from xsfs.cli.exit_statuses import EXIT_INTERRUPTED, MountError

SYSLOG = "/dev/log"


def fork() -> int | None:
    """Fork.  The child gets a descriptor for `ready`.  The parent gets None when the child is ready, and
    exits with the child's status if it ends before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        return writing
    # Ctrl-C interrupts the child, too, which reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(writing)
    if not os.read(reading, 1):
        _, status = os.waitpid(child, 0)
        sys.exit(max(1, os.waitstatus_to_exitcode(status)))
    return None


def ready(parent: int) -> None:
    """In the child: leave the terminal, and release the parent.  Raises MountError if the parent has ended.

    parent      what `fork` returned
    """
    handler: logging.Handler = logging.NullHandler()
    if os.path.exists(SYSLOG):
        handler = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
    logging.basicConfig(handlers=[handler], format=f"xsfs[{os.getpid()}]: %(message)s", force=True)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)  # it is above 2, because main.py has opened the three
    os.chdir("/")
    try:
        os.write(parent, b"1")
    except BrokenPipeError:
        reason = "the process that waited for the mount has ended"
        raise MountError(EXIT_INTERRUPTED, reason, "try again") from None
    os.close(parent)
