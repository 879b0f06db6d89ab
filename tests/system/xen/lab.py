"""The lab: real Xen in qemu, with Debian as dom0 and as domU, and this project inside.

A `Configuration` says how a run is to be; `run` boots it and gives each line that dom0 prints to its
caller.  Everything is emulated (TCG), so neither KVM nor Xen is needed here.
"""

from __future__ import annotations

import compileall
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
PROJECT: Final = HERE.parents[2]

CHECKS: Final = "tests/system/xen/checks"

LIMIT: Final = 1500.0
"""Seconds that a run may take."""

BUILD_LIMIT: Final = 1800.0


@dataclass(frozen=True)
class Configuration:
    """How a run is to be."""

    name: str
    daemon: str = "C"
    """Or "ocaml"."""
    guest: str = "pv"
    """Or "pvh"."""
    init: str = "lab"
    """Or "systemd": what the first process of both domains is."""

    @property
    def checks(self) -> Sequence[str]:
        """The files of checks that are run in it."""
        if self.init == "systemd":
            return (f"{CHECKS}/check_systemd.py",)
        names = (
            "before_xenstored",
            "tree",
            "device",
            "domains",
            "pair",
            "migration",
            "guest",  # after it, as no domain can be saved in which xsfs was killed in a transaction
            "shutdown",
        )
        return tuple(f"{CHECKS}/check_{name}.py" for name in names)


CONFIGURATIONS: Final = {
    configuration.name: configuration
    for configuration in (
        Configuration("C"),
        Configuration("ocaml", daemon="ocaml"),
        Configuration("pvh", guest="pvh"),
        Configuration("systemd", init="systemd"),
    )
}


class LabError(Exception):
    """The lab itself could not be built or booted."""


def cache() -> Path:
    return Path(os.environ.get("XSFS_XEN_CACHE", "/var/cache/xsfs-xen"))


def build() -> None:
    """Make what is booted; nothing where it is there already.  Raises LabError."""
    done = subprocess.run(
        [HERE / "build"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_LIMIT,
        check=False,
    )
    if done.returncode:
        raise LabError(f"the image cannot be built:\n{done.stdout}")


@dataclass
class Outcome:
    status: int | None
    """That of pytest in dom0; None where the machine did not come to its end."""
    seconds: float
    logs: Path
    """Where the consoles and logs are."""

    @property
    def good(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        how = "no end" if self.status is None else f"status {self.status}"
        return f"{how} after {self.seconds:.0f} s; logs in {self.logs}"


def printer(name: str) -> Callable[[str], None]:
    """Prints each line with the name of its run and the seconds since its begin."""
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{name} {time.monotonic() - start:4.0f}] {line}", flush=True)

    return say


def run(
    configuration: Configuration, say: Callable[[str], None], arguments: Sequence[str] = ()
) -> Outcome:
    """Boot, check, power off.  `arguments` are for pytest in dom0, and take the place of all checks
    if they name some.  `build` must have been called."""
    (cache() / "runs").mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{configuration.name}-", dir=cache() / "runs"))
    _pack(configuration, arguments, directory)
    with open(directory / "logs.img", "wb") as image:
        image.truncate(1 << 30)  # sparse; a domain is saved there, too
    start = time.monotonic()
    machine = subprocess.Popen(
        _machine(directory), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    timer = threading.Timer(LIMIT, machine.kill)
    timer.start()
    status = None
    try:
        assert machine.stdout is not None
        for line in machine.stdout:
            line = line.rstrip("\r\n")
            if line.startswith("lab: ends at "):
                status = int(line.rsplit(" ", 1)[1])
            say(line)
        machine.wait(60)
    finally:
        timer.cancel()
        machine.kill()
        machine.wait()
    _unpack_logs(directory)
    return Outcome(status, time.monotonic() - start, directory)


def _pack(configuration: Configuration, arguments: Sequence[str], directory: Path) -> None:
    """The second disk: the project, compiled here, since that takes long in there."""
    share = directory / "share"
    for name in ("xsfs", "tests", "systemd", "docs"):
        shutil.copytree(
            PROJECT / name, share / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    compileall.compile_dir(share, quiet=1)
    chosen = list(arguments)
    if not any(CHECKS in argument for argument in arguments):
        chosen = [*configuration.checks, *arguments]
    (share / "run.conf").write_text(
        f"DAEMON={configuration.daemon}\n"
        f"GUEST={configuration.guest}\n"
        f"INIT={configuration.init}\n"
        f"CHECKS={shlex.quote(shlex.join(chosen))}\n"
    )
    # A file system and no archive: to unpack one takes 10 s in each domain.
    subprocess.run(
        [
            *("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0"),
            *("-d", share, directory / "share.img", "64M"),
        ],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    shutil.rmtree(share)


def _machine(directory: Path) -> Sequence[str]:
    """The command line of qemu."""
    images = cache()
    # Where Xen switches the FPU lazily, registers seem to get lost under qemu as soon as there are two
    # domains: now and then a program dies of it, or goes on with rubbish.
    xen = (
        "console=com1 com1=115200 loglvl=all guest_loglvl=all dom0_mem=1280M,max:1280M"
        " dom0_max_vcpus=1 smap=0 xpti=0 spec-ctrl=no,eager-fpu xsave=0"
    )
    linux = "console=hvc0 lab=dom0 mitigations=off panic=5 quiet cryptomgr.notests nokaslr"
    return [
        *("qemu-system-x86_64", "-accel", "tcg"),
        # qemu before 9.1 faults on a ring-3 iretq under SMAP, which a PV kernel does early; and it
        # reports rdtscp as rdtsc to Xen, of which a PVH domain dies.  With erms the kernel copies and
        # clears pages byte by byte, which is what qemu emulates most slowly.
        *("-cpu", "max,-smap,-rdtscp,-erms", "-m", "2304", "-smp", "1"),
        *(
            "-display",
            "none",
            "-monitor",
            "none",
            "-no-reboot",
            "-nic",
            "none",
            "-parallel",
            "none",
        ),
        *("-serial", f"file:{directory}/xen-console.txt"),
        *("-kernel", f"{images}/xen", "-append", xen),
        *("-initrd", f"{images}/vmlinux {linux},{images}/initrd.img"),
        *("-drive", f"file={images}/rootfs.img,if=virtio,format=raw,readonly=on"),
        *("-drive", f"file={directory}/share.img,if=virtio,format=raw,readonly=on"),
        *("-drive", f"file={directory}/logs.img,if=virtio,format=raw"),
        *("-device", "virtio-serial-pci", "-chardev", "file,id=lab,path=/dev/stdout"),
        *("-device", "virtserialport,chardev=lab,name=lab"),
    ]


def _unpack_logs(directory: Path) -> None:
    try:
        with tarfile.open(directory / "logs.img") as tar:
            tar.extractall(directory / "logs")
    except tarfile.ReadError:
        return  # the machine did not come to its end
    (directory / "logs.img").unlink()
    (directory / "share.img").unlink()
