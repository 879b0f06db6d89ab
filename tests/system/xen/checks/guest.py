"""A domU, made by xl, that does what it is told.

Its console is the way to it, since that has nothing to do with Xenstore: what is written to the
console's terminal is read by agent.py there, and what that answers is in the log that xenconsoled
keeps.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import tty
from pathlib import Path
from typing import Self

from tests.system.xen.checks.machine import LIMIT, SETTINGS, shell, until

MARK = b"agent:"

CONFIGURATION = """\
name = "{name}"
type = "{type}"
kernel = "/lab/vmlinux"
ramdisk = "/lab/initrd.img"
extra = "console=hvc0 lab=domu mitigations=off quiet cryptomgr.notests nokaslr"
memory = {memory}
vcpus = 1
disk = [ "format=raw,vdev=xvda,access=ro,backendtype=phy,script={script},target=/dev/vda",
         "format=raw,vdev=xvdb,access=ro,backendtype=phy,script={script},target=/dev/vdb" ]
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
"""


NOTICED = 60.0
"""Seconds after which xl should have seen that a domain has halted."""

SAVED = "/dev/vdc"
"""Where a domain is saved: the disk for the logs, which are written at the end."""


class Guest:
    """`with Guest(NAME)` boots it, and destroys it where it is still there at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.domid = 0
        self.log = Path(f"/var/log/xen/console/guest-{name}.log")
        self._read = 0

    def __enter__(self) -> Self:
        configuration = Path(f"/run/{self.name}.cfg")
        configuration.write_text(
            CONFIGURATION.format(
                name=self.name,
                type=SETTINGS["GUEST"],
                memory=320,
                script="/lab/share/tests/system/xen/machine/block-hotplug",
            )
        )
        self.log.touch()
        try:
            shell(f"xl create {configuration}")
            self.domid = int(shell(f"xl domid {self.name}"))
            until(self._answers, f"{self.name} is up")
            self._answer(LIMIT)
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    @property
    def home(self) -> str:
        return f"/local/domain/{self.domid}"

    @property
    def alive(self) -> bool:
        return subprocess.run(["xl", "domid", self.name], capture_output=True).returncode == 0

    def destroy(self) -> None:
        if self.alive:
            shell(f"xl destroy {self.name}")

    def wait_end(self) -> None:
        """Wait until it has halted.  With oxenstored now and then xl does not see that a PV domain has,
        which is no matter of xsfs: then it is told here, and the domain destroyed."""
        try:
            until(lambda: not self.alive, "xl has seen the end", NOTICED)
        except AssertionError:
            state = shell(f"xl list {self.name} | tail -n 1").split()[4]
            assert "s" in state, f"{self.name} has not halted: its state is {state}"
            print(f"lab: xl has not seen that {self.name} halted; destroyed")
            self.destroy()

    def save_and_restore(self) -> None:
        """Afterwards it has another domid, as after a migration."""
        try:
            shell(f"xl save {self.name} {SAVED}", LIMIT * 3)
        except AssertionError as error:
            # Its kernel tells which process it could not freeze.
            raise AssertionError(f"{error}\n{self.run('dmesg | tail -n 60')[1]}") from None
        shell(f"xl restore {SAVED}", LIMIT * 3)
        self.domid = int(shell(f"xl domid {self.name}"))

    def bash(self, script: str, limit: float = LIMIT) -> str:
        """What it prints there; it must succeed."""
        status, output = self.run(script, limit)
        assert status == 0, f"in {self.name}, {script!r}: status {status}\n{output}"
        return output

    def run(self, script: str, limit: float = LIMIT) -> tuple[int, str]:
        """Its status, and what it prints there."""
        request = base64.b64encode(json.dumps([limit, script]).encode()) + b"\n"
        terminal = os.open(
            shell(f"xenstore-read {self.home}/console/tty").strip(), os.O_RDWR | os.O_NOCTTY
        )
        try:
            tty.setraw(terminal)
            while request:
                request = request[os.write(terminal, request[:256]) :]
            return self._answer(limit + 30)
        finally:
            os.close(terminal)

    def _answers(self) -> bool:
        return MARK in self._news() and self._news().endswith(b"\n")

    def _news(self) -> bytes:
        with open(self.log, "rb") as log:
            log.seek(self._read)
            return log.read()

    def _answer(self, limit: float) -> tuple[int, str]:
        deadline = time.monotonic() + limit
        while True:
            found = self._news()
            _, mark, rest = found.partition(MARK)
            answer, end, _ = rest.partition(b"\n")
            if mark and end:
                break
            assert time.monotonic() < deadline, f"{self.name} does not answer: {found[-2000:]!r}"
            time.sleep(0.05)
        self._read += len(found) - len(rest) + len(answer) + 1
        status, output = json.loads(base64.b64decode(answer))
        return int(status), str(output)
