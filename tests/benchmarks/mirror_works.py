"""What is measured of the live mirror, against what, and how fast it should be."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support.mirroring import has_user_attributes
from tests.support.xenstored.harness import XsClient
from xsfs.mirror.mirror import BATCH
from xsfs.mirror.staging import PERMS_ATTRIBUTE

from .errors import BenchmarkError
from .kinds import (
    LONG_BATCH,
    batch,
    execute,
    find,
    grep,
    listing,
    names_below,
    open_read_close,
)
from .mounting import compiled, xsfs
from .stores import HOME, NAME, SCRATCH, Store
from .timing import Comparison, Contender
from .works import LINE, LOOP, Stage, pyxs_read, shell_reads, tool_reads

CHANGES: Final = 200
"""Changes in one run."""

CHANGED: Final = f"{HOME}/changed"

SECONDS: Final = 10.0
"""When a change is taken for lost."""

AHEAD: Final = "4"
"""By how many connections the least that copies asks."""

IN_MOVED_TO: Final = 0x80
"""inotify(7)"""


def comparisons(stage: Stage, copy: str) -> list[Comparison]:
    """`copy`: the directory of a mirror of the whole store."""
    whole = stage.whole
    path = f"{copy}{NAME}"
    value = batch("mirror", lambda: open_read_close(path), LINE, LONG_BATCH)
    tmpfs = batch("tmpfs", lambda: open_read_close(stage.tmpfs), LINE, LONG_BATCH)
    ls = listing(whole)
    top = copy if whole.top == "/" else f"{copy}{whole.top}"
    read = shell_reads(whole, "read < FILE", f"{copy}{SCRATCH}")
    start, copier = starting(whole), copying(whole, top)
    change, event, least = changing(whole, copy), told(whole), followed(whole)
    return [
        Comparison("mirror: open, read, close", value, pyxs_read(stage), 0.02, each=True),
        Comparison("mirror: open, read, close", value, tmpfs, 1.1, each=True),
        Comparison("the same of tmpfs", tmpfs, pyxs_read(stage), each=True),
        Comparison(f"mirror: {LOOP} times read < FILE", read, tool_reads(whole), 0.05),
        Comparison("mirror: find", find(whole, "find", top), ls, 0.05),
        Comparison("mirror: grep -r", grep(whole, "grep -r", top), ls, 0.1),
        Comparison("mirror: from start to complete", start, ls, 1.0),
        Comparison("mirror: from start to complete", start, copier),
        Comparison("the same of the least that copies", copier, ls),
        Comparison("the same of a mount alone", mounting(whole), ls),
        Comparison("the same of loading pyfuse3", loading(), ls),
        Comparison("mirror: a change until it is read", change, event, 4.0, each=True),
        Comparison("mirror: a change until it is read", change, least, each=True),
        Comparison("the same of the least that follows", least, event, each=True),
    ]


@contextlib.contextmanager
def place() -> Iterator[str]:
    """A directory to be made in a tmpfs, where nobody else can write."""
    with tempfile.TemporaryDirectory(prefix="xsfs-mirror-", dir="/dev/shm") as parent:
        yield f"{parent}/mirror"


def starting(store: Store) -> Contender:
    """From the start of the command until what is read is mirrored."""

    def run() -> float:
        with place() as directory:
            start = time.perf_counter()
            # The mount comes when the mirror is complete.
            with xsfs(
                *(store.socket, f"root={store.top}", f"mirror={directory}"), project=store.project
            ) as mount:
                taken = time.perf_counter() - start
                if os.readlink(f"{mount.path}/.mirror") != directory:
                    raise BenchmarkError("there is no mirror")
            if os.path.lexists(directory):
                raise BenchmarkError("the mirror was left behind")
            return taken

    return Contender("mirror: start", run, store.read)


def mounting(store: Store) -> Contender:
    """The same without a mirror: what a mount takes before and after there is one."""

    def run() -> float:
        start = time.perf_counter()
        with xsfs(store.socket, f"root={store.top}"):
            return time.perf_counter() - start

    return Contender("xsfs without a mirror", run, 1)


def loading() -> Contender:
    """What is in both: to start Python, and load trio and pyfuse3.  Without Python's end."""
    command = [sys.executable, "-c", "import os, pyfuse3; os._exit(0)"]
    return Contender("import pyfuse3", lambda: execute(command, compiled()), 1)


def copying(store: Store, copy: str) -> Contender:
    """The same where the least that can be done is.  `copy`: what there must be in the end."""

    def run() -> float:
        with place() as directory:
            perms = PERMS_ATTRIBUTE if has_user_attributes(Path(directory).parent) else ""
            arguments = [store.socket, store.top, directory, str(BATCH), AHEAD, perms]
            start = time.perf_counter()
            execute([sys.executable, "-m", f"{__package__}.copier", *arguments], compiled())
            taken = time.perf_counter() - start
            if names_below(directory) != names_below(copy):
                raise BenchmarkError("the least that copies has copied something else")
            return taken

    return Contender("the least that copies", run, store.read)


def changing(store: Store, copy: str) -> Contender:
    """Another client's change, until a reader that waits by inotify has read it."""
    path = f"{copy}{CHANGED}"
    return Contender("a change in the mirror", lambda: _until_read(store, path), CHANGES)


def changing_alone(store: Store) -> Contender:
    """The same in a mirror of a few nodes, which lasts as long as the run: no other has work meanwhile."""

    def run() -> float:
        with (
            place() as copy,
            xsfs(store.socket, f"root={HOME}", f"mirror={copy}", project=store.project),
        ):
            return _until_read(store, f"{copy}{CHANGED.removeprefix(HOME)}")

    return Contender("mirror: a change", run, CHANGES)


def followed(store: Store) -> Contender:
    """The same where the least that can be done is."""

    def run() -> float:
        with tempfile.TemporaryDirectory(prefix="xsfs-follower-", dir="/dev/shm") as directory:
            with XsClient(store.socket) as client:
                client.write(CHANGED, b"before")
            command = [sys.executable, "-m", f"{__package__}.follower"]
            with subprocess.Popen([*command, store.socket, CHANGED, directory]) as follower:
                try:
                    return _until_read(store, f"{directory}/{os.path.basename(CHANGED)}")
                finally:
                    follower.kill()

    return Contender("the least that follows", run, CHANGES)


def _until_read(store: Store, path: str) -> float:
    library = ctypes.CDLL(None, use_errno=True)

    def seen(watch: int, expected: bytes) -> None:
        while not os.path.exists(path) or open_read_close(path) != expected:
            if not select.select([watch], [], [], SECONDS)[0]:
                raise BenchmarkError("a change has not come to the mirror")
            os.read(watch, 4096)

    watch = library.inotify_init1(os.O_CLOEXEC)
    try:
        if library.inotify_add_watch(watch, os.path.dirname(path).encode(), IN_MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")
        with XsClient(store.socket) as writer:
            writer.write(CHANGED, b"before")
            seen(watch, b"before\n")
            start = time.perf_counter()
            for number in range(CHANGES):
                writer.write(CHANGED, b"%d" % number)
                seen(watch, b"%d\n" % number)
            return time.perf_counter() - start
    finally:
        os.close(watch)


def told(store: Store) -> Contender:
    """The same until a client that does nothing else has its watch event."""

    def run() -> float:
        with XsClient(store.socket) as writer, XsClient(store.socket) as watcher:
            watcher.watch(CHANGED, "t")
            watcher.event()
            start = time.perf_counter()
            for number in range(CHANGES):
                writer.write(CHANGED, b"%d" % number)
                watcher.event()
            return time.perf_counter() - start

    return Contender("watch event", run, CHANGES)
