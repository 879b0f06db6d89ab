"""Checks of the mountpoint and of FUSE before anything starts.

libfuse itself reports such failures late, and without a hint.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Final

from xsfs.cli.exit_statuses import EXIT_FUSE, MountError

FUSE_DEVICE: Final = "/dev/fuse"

SYSTEM_DIRECTORIES: Final = frozenset(("/", "/dev", "/proc", "/sys"))
KERNEL_TREES: Final = ("/proc/", "/sys/")
"""A mount here hides what ps, systemd and xsfs itself read, and they wait for xsfs."""


def mountpoint_fault(path: str) -> tuple[str, str] | None:
    """Why xsfs cannot be mounted at `path`, and a hint."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return f"the mountpoint {path} does not exist", f"mkdir -p {path}"
    except OSError as error:
        # It may be an xsfs that has died, or that belongs to another user.
        hint = f"umount {path} first" if _is_mounted(path) else "choose another directory"
        return f"the mountpoint {path} is unusable: {error.strerror}", hint
    if not stat.S_ISDIR(found.st_mode):
        return f"the mountpoint {path} is not a directory", "choose a directory"
    place = os.path.realpath(path)
    if place in SYSTEM_DIRECTORIES or place.startswith(KERNEL_TREES):
        hint = "choose another directory, such as /mnt/xenstore"
        return f"the mountpoint {path} belongs to the system", hint
    if _is_mounted(path):
        return f"{path} is already an xsfs mount", "umount it first"
    if os.geteuid() == 0:
        return None
    # fusermount3 demands this if the user is not root.
    if not os.access(path, os.W_OK):
        hint = "choose a directory that you may write to, or run as root"
        return f"no write access to the mountpoint {path}", hint
    if found.st_mode & stat.S_ISVTX and found.st_uid != os.geteuid():
        hint = "choose a directory that you own, or run as root"
        return f"the mountpoint {path} is sticky and belongs to another user", hint
    return None


def _is_mounted(path: str) -> bool:
    """Whether an xsfs is mounted there, by proc(5), mountinfo."""
    path = os.path.realpath(path)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            # The kernel writes blanks, tabs, newlines and backslashes as octal numbers.
            place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            if place == path and fields[fields.index("-") + 1] == "fuse.xsfs":
                return True
    return False


def check_fuse() -> None:
    """Raises MountError if this process cannot use FUSE at all."""
    if not os.path.exists(FUSE_DEVICE):
        raise MountError(EXIT_FUSE, f"{FUSE_DEVICE} is missing", "modprobe fuse")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise MountError(EXIT_FUSE, f"permission denied: {FUSE_DEVICE}", "run as root")


def fuse_failure(path: str, said: str) -> MountError:
    """The error for a mount that libfuse refused, and what libfuse printed about it."""
    hint = "run as root, or choose another mountpoint"
    if "user_allow_other" in said:
        hint = "add user_allow_other to /etc/fuse.conf, or run as root"
    elif "fusermount3" in said and "exec" in said:
        hint = "install the fuse3 package, or run as root"
    elif os.geteuid() == 0:
        hint = "mounting requires CAP_SYS_ADMIN and access to /dev/fuse, which containers lack"
    return MountError(EXIT_FUSE, f"cannot mount at {path}: {said}", hint)
