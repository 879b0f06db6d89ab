"""What systemd does for x-systemd.automount, once: `automount.py MOUNTPOINT COMMAND...`.

An autofs lies on MOUNTPOINT; the first who goes there waits in the kernel until COMMAND has mounted
the real thing.  Whoever goes there meanwhile waits too, but for the process group that the autofs was
mounted with: that of this, in which COMMAND runs.  Prints what MOUNTPOINT/name says.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
import sys

READY, FAIL = 0x9360, 0x9361
"""AUTOFS_IOC_READY and AUTOFS_IOC_FAIL."""

REQUEST = struct.Struct("=iiI")
"""The head of autofs_v5_packet: the protocol, the kind, a token for the answer."""

SIZE = 304
MISSING = 5
"""autofs_ptype_missing_direct."""

LIMIT = 60.0


def mount_autofs(mountpoint: str) -> int:
    """The reading end of its pipe."""
    reading, writing = os.pipe()
    options = f"fd={writing},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"automount", mountpoint.encode(), b"autofs", 0, options.encode()):
        error = ctypes.get_errno()
        sys.exit(
            f"cannot mount an autofs: {os.strerror(error)} (the kernel needs CONFIG_AUTOFS_FS)"
        )
    os.close(writing)
    return reading


def main() -> int:
    mountpoint, *command = sys.argv[1:]
    os.setpgid(0, 0)
    requests = mount_autofs(mountpoint)
    try:
        autofs = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        with subprocess.Popen(["cat", f"{mountpoint}/name"], process_group=0) as user:
            _, kind, token = REQUEST.unpack_from(os.read(requests, SIZE))
            assert kind == MISSING, kind
            answer = FAIL
            try:
                if subprocess.run(command, timeout=LIMIT, check=False).returncode == 0:
                    answer = READY
            finally:
                # Whatever happens: the kernel lets nobody who waits for this be killed.
                fcntl.ioctl(autofs, answer, token)
            status = user.wait(LIMIT)
            os.close(autofs)
            return status
    finally:
        # One lies on the other.
        while os.path.ismount(mountpoint):
            subprocess.run(["umount", "-l", mountpoint], timeout=LIMIT, check=True)


sys.exit(main())
