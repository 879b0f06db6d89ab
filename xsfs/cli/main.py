"""The command `xsfs`, which mount(8) calls as `mount.xsfs`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from xsfs import __version__
from xsfs.cli.exit_statuses import EXIT_BUG, EXIT_MOUNTED, EXIT_USAGE, STATUSES, MountError
from xsfs.cli.options import DEFAULT_SOURCE, Options, UsageError, help_lines, parse, source_of
from xsfs.cli.service import JournalFormatter, in_journal, notify, status

USAGE: Final = "xsfs [-f] [-d] [-o OPT[,OPT...]]... [SOURCE] MOUNTPOINT"

DESCRIPTION: Final = "Mount Xenstore, the configuration store of the Xen hypervisor."

EPILOG: Final = """\
SOURCE is a socket or device of Xenstore, 'embedded' for a store inside xsfs
that needs no Xen, or [USER@]HOST:[SOCKET] for another host, by ssh.  If SOURCE
is missing, or 'xenstore', 'none' or 'auto', xsfs finds Xenstore itself:
$XENSTORED_PATH, then the socket in $XENSTORED_RUNDIR (or /var/run/xenstored),
then /dev/xen/xenbus.

options of -o:
{options}

exit status:
{statuses}

examples:
  xsfs -o root=/,ro /mnt/xenstore    mount the whole store, read-only
  xsfs embedded /mnt/xenstore        try xsfs without Xen

Unmount with 'umount MOUNTPOINT'.  The manual is xsfs(8).
"""


class _MountParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def argument_parser() -> argparse.ArgumentParser:
    """The flags.  The manual and the completions are made of it, too."""
    parser = _MountParser(
        prog="xsfs",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG.format(
            options="\n".join(help_lines()),
            statuses="\n".join(f"  {status}  {text}" for status, text in STATUSES.items()),
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.set_defaults(options=[])
    add = parser.add_argument
    add("places", nargs="*", help=argparse.SUPPRESS)
    text = "mount options, see below; may be repeated"
    add("-o", action="append", metavar="OPT[,OPT...]", dest="options", help=text)
    add("-f", "--foreground", action="store_true", help="stay in the foreground")
    text = "log every operation, and stay in the foreground"
    add("-d", "--debug", action="store_true", help=text)
    version = f"xsfs {__version__}"
    add("-V", "--version", action="version", version=version, help="print the version and exit")
    add("-h", "--help", action="help", help="print this help and exit")
    # mount(8) passes these to its helpers.  It passes `-f` too, which then means: do not mount.
    for flag, option in ("-r", "ro"), ("-w", "rw"):
        add(flag, action="append_const", const=option, dest="options", help=argparse.SUPPRESS)
    for flag in "-s", "-n", "-v":
        add(flag, action="store_true", help=argparse.SUPPRESS)
    return parser


def parse_arguments(arguments: Sequence[str], *, helper: bool = False) -> Options:
    """Raises UsageError.

    helper      called by mount(8), where -f means `pretend`
    """
    found = argument_parser().parse_intermixed_args(arguments)
    if not found.places:
        raise UsageError("the mountpoint is missing: xsfs [SOURCE] MOUNTPOINT")
    if len(found.places) > 2:
        raise UsageError("too many arguments: xsfs [SOURCE] MOUNTPOINT")
    *source, mountpoint = found.places
    options = Options(
        mountpoint,
        source_of(source[0]) if source else DEFAULT_SOURCE,
        foreground=(found.foreground and not helper) or found.debug,
        pretend=found.foreground and helper,
        debug=found.debug,
        verbose=found.v,
        **parse(found.options, sloppy=found.s),
    )
    if not options.embedded and (options.listen is not None or options.domid):
        raise UsageError("the options 'listen' and 'domid' require the source 'embedded'")
    return options


def _open_standard_files() -> None:
    """Open the standard files that the caller has closed, so that no other file takes their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or io.TextIOWrapper(io.BytesIO())
    sys.stderr = sys.stderr or io.TextIOWrapper(io.BytesIO())


def main() -> int:
    _open_standard_files()
    helper = os.path.basename(sys.argv[0]).startswith("mount.")
    try:
        options = parse_arguments(sys.argv[1:], helper=helper)
    except UsageError as error:
        print(f"xsfs: {error} (try 'xsfs --help')", file=sys.stderr)
        return EXIT_USAGE
    if options.pretend:
        return EXIT_MOUNTED
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if options.debug else logging.INFO,
        format="xsfs: %(message)s",
    )
    if in_journal():
        logging.getLogger().handlers[0].setFormatter(JournalFormatter())
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    # Loading it takes a tenth of a second, for which `--help` and mistakes need not wait.
    from xsfs.cli.mount import mount

    try:
        mount(options)
    except MountError as error:
        logging.error("%s", error)
        notify(status(str(error)))
        return error.status
    except Exception:
        logging.exception("internal error, please report it")
        return EXIT_BUG
    if options.verbose and not options.foreground:
        print(f"xsfs: {options.label} mounted on {options.mountpoint}")
    return EXIT_MOUNTED
