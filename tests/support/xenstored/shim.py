"""The programs which the harness needs: the daemons, and the shim that stands in for Xen.

The daemons are those of the newest Xen that is installed in Debian's places.  Others are named in the
environment, with the version of their Xen:

    XSFS_TEST_C=4.22:/opt/xen/sbin/xenstored XSFS_TEST_OCAML=4.22:/opt/xen/sbin/oxenstored
"""

from __future__ import annotations

import atexit
import functools
import glob
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Final

SOURCE: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "xenshim.c")

Version = tuple[int, int]

PACKAGE: Final = "xen-utils-4.17 (Debian 12) or xen-utils-4.20 (Debian 13)"


class MissingProgramError(Exception):
    """A program is not installed."""

    def __init__(self, program: str, package: str) -> None:
        super().__init__(f"there is no {program}: install Debian's package {package}")


@dataclass(frozen=True)
class Daemon:
    """`version` is that of its Xen: (4, 17).  None is installed if `program` has a "*" in it."""

    program: str
    version: Version


def find_daemon(name: str, chosen: str | None, places: str = "/usr/lib/xen-*/bin") -> Daemon:
    """The daemon that is `chosen` ("VERSION:PROGRAM"), or else the newest one in `places`."""
    if chosen:
        match = re.fullmatch(r"(\d+)\.(\d+):(.+)", chosen)
        if match is None:
            raise ValueError(f"{chosen!r} is not VERSION:PROGRAM")
        return Daemon(match[3], (int(match[1]), int(match[2])))
    pattern = os.path.join(places, name)
    found = [
        Daemon(program, (int(match[1]), int(match[2])))
        for program in glob.glob(pattern)
        if (match := re.search(r"/xen-(\d+)\.(\d+)/", program))
    ]
    return max(found, key=lambda daemon: daemon.version, default=Daemon(pattern, (0, 0)))


DAEMONS: Final = {
    "C": find_daemon("xenstored", os.environ.get("XSFS_TEST_C")),
    "ocaml": find_daemon("oxenstored", os.environ.get("XSFS_TEST_OCAML")),
}

XENSTORE_CONTROL: Final = max(glob.glob("/usr/lib/xen-*/bin/xenstore-control"), default="")
"""Debian's command of that name refuses to run without Xen."""


def installed_daemon(kind: str) -> Daemon:
    daemon = DAEMONS[kind]
    if not os.access(daemon.program, os.X_OK):
        raise MissingProgramError(daemon.program, PACKAGE)
    return daemon


@functools.cache
def build_shim() -> str:
    """Build xenshim.so in a private directory, once per process."""
    gcc = shutil.which("gcc")
    if not gcc:
        raise MissingProgramError("gcc", "gcc")
    directory = tempfile.mkdtemp(prefix="xenshim-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    target = os.path.join(directory, "xenshim.so")
    flags = ("-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread")
    subprocess.run([gcc, *flags, "-o", target, SOURCE], check=True, timeout=120)
    return target
