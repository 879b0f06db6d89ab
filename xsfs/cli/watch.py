"""The command `xsfs-watch`: prints a line for each change in a mount.

It uses the watch files of the mount, and nothing but the standard library: no pyfuse3, no trio.

Each path has a `Watch`: an open `.watch`.  The main thread polls them all.  A pyfuse3 without poll(2)
makes the kernel report each of them as readable at all times.  Then one thread for each path reads it,
and passes the lines through a pipe that the main thread polls instead.
"""

from __future__ import annotations

import argparse
import base64
import errno
import json
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

EXIT_COUNT: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_TIME: Final = 3

STATUSES: Final = {
    EXIT_COUNT: "printed COUNT lines",
    EXIT_FAILED: "cannot watch a path, or the mount has ended",
    EXIT_USAGE: "usage error",
    EXIT_TIME: "SECONDS have passed",
}

READ_SIZE: Final = 65536

USAGE: Final = "xsfs-watch [-v] [-j] [-s] [-n COUNT] [-t SECONDS] PATH..."

EPILOG: Final = """\
PATH is a directory of an xsfs mount (its changes, and all changes below it), or
a file or missing name in one (its own changes).  A line is the path of what has
changed.  As with xenstore-watch, the first line of each PATH comes at once, and
from then on nothing is missed.

exit status:
{statuses}

examples:
  xsfs-watch -v /mnt/xenstore/data           print each change and its value
  xsfs-watch -s -n 1 -t 30 /mnt/xenstore/data/state && echo changed
"""


def node_of(path: bytes, otherwise: str) -> bytes:
    """The Xenstore path of a file.  OSError with the text `otherwise` if it is no node of Xenstore."""
    try:
        return os.getxattr(path, "user.xs.path", follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            raise OSError(error.errno, otherwise) from None
        raise


class Watch:
    """One path that is watched.  Raises OSError.

    path            as the user wrote it
    descriptor      what to poll, and then to `read`
    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        self._rest = b""
        parent, name = (path, b"") if os.path.isdir(path) else os.path.split(path)
        node_of(os.path.join(parent, b"."), "not in an xsfs mount")
        node = b"." if name == b".value" else name
        if node.startswith((b"-", b"@")):
            node = b"./" + node  # otherwise it would be a command or a special event
        self._own_lines = {node} if name else set[bytes]()
        """The lines that mean the path; empty for a directory, whose lines all count."""
        if node not in (b"", b".") and os.path.lexists(path):
            # The name may be an alias, if the node's own name is too long for a file.
            node = node_of(path, "no node of Xenstore")
        file = os.path.join(parent, b".watch")
        try:
            source = os.open(file, os.O_RDWR if node else os.O_RDONLY)
        except OSError as error:
            if not node or error.errno not in (errno.EROFS, errno.EACCES):
                raise
            # Not permitted to tell the file what to watch: it watches the directory, and its `.` may
            # stand for all below it.
            node = b""
            self._own_lines.add(b".")
            source = os.open(file, os.O_RDONLY)
        pollable = _pollable(source, writable=bool(node))
        if node:
            os.write(source, node + b"\n")
        self.descriptor = source if pollable else _read_in_thread(source)

    def read(self) -> Iterator[bytes]:
        """The paths that have changed, as they are in the mount."""
        data = os.read(self.descriptor, READ_SIZE)
        if not data:
            raise OSError(errno.ENOTCONN, "the mount has ended")
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._own_lines:
                relative = line.removeprefix(b"./")
                yield self.path if line == b"." else os.path.join(self.path, relative)
            elif line in self._own_lines:
                yield self.path


def _read_in_thread(source: int) -> int:
    """Have all that comes from a descriptor copied into a pipe, whose reading end is returned."""
    reader, writer = os.pipe()

    def copy() -> None:
        with suppress(OSError):
            while data := os.read(source, READ_SIZE):
                os.write(writer, data)
        os.close(writer)

    threading.Thread(target=copy, daemon=True).start()
    return reader


def _pollable(descriptor: int, *, writable: bool) -> bool:
    """Whether poll(2) works.  If not, the kernel says that everything is possible at all times."""
    poll = select.poll()
    poll.register(descriptor)
    ready = dict(poll.poll(0)).get(descriptor, 0)
    # A file for reading only cannot be written; one that watches nothing yet has no lines.
    return not ready & (select.POLLIN if writable else select.POLLOUT)


# ------------------------------------------------------------------------------------- the output


def value_of(path: bytes) -> bytes | None:
    """The exact value of a node; None if it does not exist or may not be read."""
    directory, name = os.path.split(path)
    if name == b".value":
        path = directory or b"."  # there is no such file while the value is empty
    try:
        return os.getxattr(path, "user.xs.value", follow_symlinks=False)
    except OSError:
        return None


def line_of(path: bytes, *, with_value: bool, as_json: bool) -> bytes:
    value = value_of(path) if with_value else None
    if as_json:
        line: dict[str, str | None] = {"path": os.fsdecode(path)}
        if with_value:
            try:
                line["value"] = None if value is None else value.decode()
            except UnicodeDecodeError:
                line["base64"] = base64.b64encode(value or b"").decode()
        return json.dumps(line).encode()
    if value is None:
        return path
    return path + b" = " + value.decode("latin-1").encode("unicode_escape")


# ------------------------------------------------------------------------------------ the command


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def seconds(text: str) -> float:
    if not 0 <= (number := float(text)) < 1e9:
        raise ValueError
    return number


class _WatchParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"xsfs-watch: {message} (try 'xsfs-watch --help')\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = _WatchParser(
        prog="xsfs-watch",
        usage=USAGE,
        description="Print a line for each change in a mount of xsfs.",
        epilog=EPILOG.format(
            statuses="\n".join(f"  {status}  {text}" for status, text in STATUSES.items())
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(timeout=math.inf)
    add = parser.add_argument
    add("-v", "--values", action="store_true", help="print 'PATH = VALUE'")
    add("-j", "--json", action="store_true", help="print a JSON object a line")
    add("-s", "--skip-first", action="store_true", help="omit the first line of each PATH")
    add("-n", "--count", type=count, metavar="COUNT", help="end after COUNT lines")
    add("-t", "--timeout", type=seconds, metavar="SECONDS", help="end after SECONDS")
    add("paths", nargs="+", metavar="PATH", type=os.fsencode, help=argparse.SUPPRESS)
    return parser


def changes(watches: Sequence[Watch], timeout: float) -> Iterator[tuple[Watch, bytes]]:
    """Each change as it comes, with its watch, until the time is over.

    If nobody reads standard output any more, SIGPIPE ends the process.
    """
    deadline = time.monotonic() + timeout
    by_descriptor = {watch.descriptor: watch for watch in watches}
    # Not poll(2): when the kernel freezes all processes to suspend or migrate a guest, poll(2) asks the
    # mount once more, which is frozen already, and so the kernel gives up.
    poll = select.epoll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.EPOLLIN)
    output = sys.stdout.fileno()
    with suppress(PermissionError):  # a regular file
        poll.register(output, 0)  # only for errors
    while True:
        left = deadline - time.monotonic()
        ready = poll.poll(max(0.0, min(left, 86400.0)))  # some weeks are too long for epoll(7)
        for descriptor, _ in ready:
            if descriptor == output:
                os.kill(os.getpid(), signal.SIGPIPE)
                return
            watch = by_descriptor[descriptor]
            with _ends_on_failure(watch.path):
                paths = list(watch.read())
            for path in paths:
                yield watch, path
        if left <= 0:
            return


@contextmanager
def _ends_on_failure(path: bytes) -> Iterator[None]:
    """Exit if the path cannot be watched, or no longer."""
    try:
        yield
    except OSError as error:
        text = b"xsfs-watch: cannot watch %s: %s\n" % (path, os.fsencode(str(error.strerror)))
        sys.stderr.buffer.write(text)
        sys.exit(EXIT_FAILED)


def main() -> int:
    # They end it without a traceback; a shell that starts it in the background ignores SIGINT.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = argument_parser().parse_args()
    watches = []
    for path in command.paths:
        with _ends_on_failure(path):
            watches.append(Watch(path))
    skipped: set[Watch] = set()
    printed = 0
    for source, path in changes(watches, command.timeout):
        if command.skip_first and source not in skipped:
            skipped.add(source)
            continue
        line = line_of(path, with_value=command.values, as_json=command.json)
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
        printed += 1
        if printed == command.count:
            return EXIT_COUNT
    return EXIT_TIME


if __name__ == "__main__":
    sys.exit(main())
