"""Going into the background when, and only when, the file system answers.

The process forks before anything is opened or any event loop runs.  The child does all the work and
says by a pipe how it went; the parent waits for that, and ends with it.

Until then both are of one process group.  On an autofs, as systemd lays on a mountpoint, everybody
waits who comes before the mount is done, but for the process group of the mount(8) that is to do it.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from contextlib import suppress

READY = b"\0"
SYSLOG = "/dev/log"


class Background:
    """Fork.  `in_foreground` tells the two processes apart."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.in_foreground = os.fork() != 0
        if self.in_foreground:
            os.close(writing)
            self._pipe = reading
        else:
            os.close(reading)
            self._pipe = writing

    def wait(self) -> None:
        """In the foreground: return when the other process is ready; exit with its status if it
        fails, having said why itself."""
        status = os.read(self._pipe, 1)
        if status != READY:
            # Nothing at all: it has died without a word.
            sys.exit(status[0] if status else 1)

    def ready(self) -> None:
        """In the background: let go of the terminal, and of the waiting process.  BrokenPipeError:
        nobody waits any more."""
        log_to_syslog()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        if null > 2:
            os.close(null)
        os.chdir("/")
        os.write(self._pipe, READY)
        os.close(self._pipe)

    def failed(self, status: int, message: str) -> None:
        with suppress(BrokenPipeError):
            print(f"xsfs: {message}", file=sys.stderr, flush=True)
            os.write(self._pipe, bytes((status,)))
        os._exit(status)


def log_to_syslog() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    if os.path.exists(SYSLOG):
        handler = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter(f"xsfs[{os.getpid()}]: %(message)s"))
        root.addHandler(handler)
    else:
        root.addHandler(logging.NullHandler())
