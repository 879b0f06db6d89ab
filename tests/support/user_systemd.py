"""A real systemd, that of a user, where the machine itself may run none.

It has a mount namespace of its own with an empty /run, where it finds what a booted machine has; its
units are files in a directory that is given.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.mirroring import await_true
from tests.support.mounting import LIMIT

_RUNTIME: Final = "/run/user-of-the-test"

_SETUP: Final = f"""\
# A copy of a mount keeps its xsfs running when the mount itself has gone.
umount -l -a -t fuse.xsfs
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/systemd/system
mkdir -m 700 {_RUNTIME}
exec /usr/lib/systemd/systemd --user --log-target=console --unit=basic.target
"""


class UserSystemd:
    def __init__(self, process: subprocess.Popen[bytes], home: Path) -> None:
        self._process = process
        self.environment = _environment(home)

    def systemctl(self, *arguments: str) -> str:
        """What it prints, whatever its exit status."""
        done = subprocess.run(
            [
                *("nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt"),
                *("systemctl", "--user", *arguments),
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        return done.stdout.strip()


def _environment(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": _RUNTIME}


@contextmanager
def user_systemd(home: Path, units: dict[str, str]) -> Iterator[UserSystemd]:
    """`units`: the text of each, by name."""
    directory = home / ".config/systemd/user"
    directory.mkdir(parents=True)
    for name, text in units.items():
        (directory / name).write_text(text)
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=slave", "sh", "-c", _SETUP],
            env=_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    with process:
        try:
            systemd = UserSystemd(process, home)
            up = ("running", "degraded")  # the latter by units of the machine
            await_true(lambda: systemd.systemctl("is-system-running") in up)
            yield systemd
        except BaseException:
            print(log.read_text())
            raise
        finally:
            process.kill()
