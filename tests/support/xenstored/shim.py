"""The programs which the harness needs: the daemons, and the shim that stands in for Xen."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from typing import Final

SOURCE: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "xenshim.c")

# Only these: the library interfaces which the shim stands in for change with each version of Xen.
DAEMONS: Final = {
    "C": "/usr/lib/xen-4.17/bin/xenstored",
    "ocaml": "/usr/lib/xen-4.17/bin/oxenstored",
}


class MissingProgramError(Exception):
    """A program is not installed."""

    def __init__(self, program: str, package: str) -> None:
        super().__init__(f"there is no {program}: install Debian's package {package}")


def daemon_program(kind: str) -> str:
    program = DAEMONS[kind]
    if not os.access(program, os.X_OK):
        raise MissingProgramError(program, "xen-utils-4.17")
    return program


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
