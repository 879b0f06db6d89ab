"""The command `xsfs`, and what mount(8) calls as `mount.xsfs`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from xsfs import __version__
from xsfs.mount import MountError, mount
from xsfs.options import Options, UsageError, help_lines, parse

EXIT_BUG: Final = 1
EXIT_USAGE: Final = 2

DESCRIPTION: Final = "Mount Xenstore, the configuration store of the Xen hypervisor."

EPILOG: Final = """\
SOURCE is a socket or device of Xenstore, or 'embedded' for a store of its own,
which needs no Xen.  Without it, or as 'xenstore', 'none' or 'auto', it is
looked for: $XENSTORED_PATH, then the socket in $XENSTORED_RUNDIR (or
/var/run/xenstored), then /dev/xen/xenbus.

options of -o:
{options}

exit status: 0 mounted, 1 a bug, 2 usage, 3 no Xenstore that answers,
4 no right to use it, 5 unusable mountpoint, 6 FUSE failed
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(arguments: Sequence[str]) -> Options:
    """Raises UsageError."""
    parser = _Parser(
        prog="xsfs",
        description=DESCRIPTION,
        epilog=EPILOG.format(options="\n".join(help_lines())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("places", nargs="+", metavar="[SOURCE] MOUNTPOINT")
    parser.add_argument("-o", action="append", default=[], metavar="OPT[,OPT...]", dest="options")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument(
        "-d", "--debug", action="store_true", help="log every operation, and stay in the foreground"
    )
    parser.add_argument("-V", "--version", action="version", version=f"xsfs {__version__}")
    # mount(8) passes these on: -s sloppy, -n no mtab, -v verbose, -r and -w.
    for flag in "snv":
        parser.add_argument(f"-{flag}", action="store_true", help=argparse.SUPPRESS)
    for flag, option in ("r", "ro"), ("w", "rw"):
        parser.add_argument(
            f"-{flag}", action="append_const", const=option, dest="options", help=argparse.SUPPRESS
        )
    found = parser.parse_intermixed_args(arguments)
    if len(found.places) > 2:
        raise UsageError("too many arguments: [SOURCE] MOUNTPOINT")
    *source, mountpoint = found.places
    options = Options(
        mountpoint,
        source[0] if source else None,
        foreground=found.foreground or found.debug,
        debug=found.debug,
        **parse(found.options),
    )
    if not options.embedded and (options.listen is not None or options.domid):
        raise UsageError("the options 'listen' and 'domid' are for the embedded store")
    return options


def _open_standard_files() -> None:
    """A caller may have closed some: what is opened later must not take their places."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or io.TextIOWrapper(io.BytesIO())
    sys.stderr = sys.stderr or io.TextIOWrapper(io.BytesIO())


def main(arguments: Sequence[str] | None = None) -> int:
    _open_standard_files()
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        print(f"xsfs: {error} (try 'xsfs --help')", file=sys.stderr)
        return EXIT_USAGE
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if options.debug else logging.INFO,
        format="xsfs: %(message)s",
    )
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    try:
        mount(options)
    except MountError as error:
        print(f"xsfs: {error}", file=sys.stderr)
        return error.status
    except Exception:
        logging.exception("a bug in xsfs")
        return EXIT_BUG
    return 0
