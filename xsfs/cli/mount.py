"""Mounting: connect, mount, go into the background, serve, unmount.

`mount` reads from top to bottom; each resource is let go of where it was taken.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import signal
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import pyfuse3
import trio

from xsfs.cli.daemonize import Background
from xsfs.cli.exit_statuses import (
    EXIT_DENIED,
    EXIT_FUSE,
    EXIT_INTERRUPTED,
    EXIT_MIRROR,
    EXIT_MOUNTPOINT,
    EXIT_NO_STORE,
)
from xsfs.cli.options import AUTOMATIC_SOURCES, Options
from xsfs.cli.service import READY, STOPPING, notify, status
from xsfs.cli.tasks import describe_tasks
from xsfs.fs.inodes import Tree
from xsfs.fs.operations import Operations
from xsfs.fs.transaction_dirs import MountRoot
from xsfs.fs.transactions import Transactions
from xsfs.fs.watch_files import READERS_MAX
from xsfs.mirror.mirror import Mirror
from xsfs.mirror.staging import MirrorFiles
from xsfs.mirror.workshop import MirrorPlaceError, default_directory
from xsfs.view.known import KnownDirectories
from xsfs.view.names import RAW, TEXT
from xsfs.view.view import View, home_of
from xsfs.xenstore.background import open_servants
from xsfs.xenstore.errors import StoreError, StoreUnavailable, XenstoreError
from xsfs.xenstore.event_reader import SWITCH_SECONDS
from xsfs.xenstore.reconnect import Connect
from xsfs.xenstore.ssh import open_forward
from xsfs.xenstore.store import Store, open_store
from xsfs.xenstore.transport import NO_STORE_HINT, SocketTransport, find_store

log = logging.getLogger(__name__)

ENDING: Final = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    # Nobody sends these; but what ends a process by default must not leave a mirror behind.
    *(signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGPOLL),
    *(signal.SIGPWR, signal.SIGXCPU, signal.SIGXFSZ),
)

FUSE_DEVICE: Final = "/dev/fuse"

TASKS_MAX: Final = READERS_MAX + 128
"""How many requests pyfuse3 serves at once.  Each reader of a watch file may keep one waiting; what is
left is for everything else, a bit more than the 99 that pyfuse3 has for all."""

TASKS_IDLE: Final = 64
"""How many of pyfuse3's tasks stay when there is nothing to do.  Each allocates a MiB in the beginning
and frees it in the end.  By default they come and go with each two requests that meet."""

GC_THRESHOLD: Final = 20_000
"""How many more objects there must be before cycles are looked for.  A burst makes thousands that die
with it by themselves."""

END_SECONDS: Final = 2.0
"""How long the end of the mount may wait for what open files have not yet written."""


class MountError(Exception):
    """Why nothing can be mounted, in one line, with what to do about it."""

    def __init__(self, status: int, reason: str, hint: str) -> None:
        super().__init__(f"{reason} ({hint})")
        self.status = status


def mount(options: Options) -> None:
    """Mount and serve until the end.  In the background this returns in the foreground process, as
    soon as the tree answers.  Raises MountError."""
    check_mountpoint(options.mountpoint)
    check_fuse()
    background = None if options.foreground else Background()
    if background is not None and background.in_foreground:
        background.wait()
        return
    try:
        if not trio.run(_serve, options, _ready_of(background)):
            raise MountError(EXIT_INTERRUPTED, "ended by a signal before the mount", "try again")
    except MountError as error:
        if background is None:
            raise
        background.failed(error.status, str(error))


def _ready_of(background: Background | None) -> Callable[[], None]:
    """What to call when the tree answers."""

    def ready() -> None:
        try:
            if background is not None:
                background.ready()
        except BrokenPipeError:
            raise MountError(
                EXIT_INTERRUPTED, "whoever waited for the mount has gone", "try again"
            ) from None

    return ready


async def _serve(options: Options, ready: Callable[[], None]) -> bool:
    """Whether it was ever ready."""
    # What there is by now stays: the collector need not look at it again.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    was_ready = False
    with (
        trio.open_signal_receiver(*ENDING, signal.SIGUSR1) as signals,
        trio.CancelScope() as scope,
    ):
        # What a signal ends.  Once mounted it is the serving alone: what files still owe the store
        # needs its connections.
        ended = [scope]
        async with open_servants() as servants, _connect(options) as connect:
            servants.start_soon(_obey_signals, signals, ended)
            async with _store(options, connect) as store:
                view = await _view(options, store)
                async with _mirror(options, connect, view) as mirror:
                    operations = _operations(options, view, mirror, servants)
                    _fuse_mount(operations, options)
                    try:
                        ready()
                        notify(READY, status(_description(options, view)))
                        was_ready = True
                        sys.setswitchinterval(SWITCH_SECONDS)
                        with trio.CancelScope() as serving:
                            ended.append(serving)
                            await _answer_the_kernel()
                    finally:
                        await _unmount(operations)
    return was_ready


def _description(options: Options, view: View) -> str:
    """What is mounted, for people."""
    source = options.source
    if source in (None, *AUTOMATIC_SOURCES):
        source = find_store(os.environ)
    return f"{view.root.decode()} of {source} at {options.mountpoint}"


async def _unmount(operations: Operations) -> None:
    notify(STOPPING)
    with trio.CancelScope(deadline=trio.current_time() + END_SECONDS, shield=True):
        await operations.end()
    pyfuse3.close(unmount=True)


async def _answer_the_kernel() -> None:
    """Return when the file system has been unmounted."""
    try:
        await pyfuse3.main(min_tasks=TASKS_IDLE, max_tasks=TASKS_MAX)
    except* OSError as failures:
        # What the kernel says when it was unmounted with requests still in its queue: the RELEASEs
        # of files just closed, whose handles `Operations.end` sees to.
        if failures.split(_is_abort)[1] is not None:
            raise
        log.info("unmounted with requests still in the kernel's queue")


def _is_abort(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ECONNABORTED


async def _obey_signals(signals: AsyncIterator[int], ended: Sequence[trio.CancelScope]) -> None:
    async for number in signals:
        if number in ENDING:
            log.info("ending: %s", signal.Signals(number).name)
            ended[-1].cancel()
        else:
            for line in ("all tasks:", *describe_tasks()):
                log.info("%s", line)  # one message each: a journal takes no lines within


# ------------------------------------------------------------------------------------ the store


@asynccontextmanager
async def _store(options: Options, connect: Connect | None) -> AsyncIterator[Store]:
    """The store that is to be mounted.  Raises MountError if it does not answer."""
    path = options.source
    if options.embedded or path in AUTOMATIC_SOURCES:
        path = None
    try:
        async with open_store(path, timeout=options.timeout, connect=connect) as store:
            yield store
    except StoreUnavailable as error:
        raise _unavailable(error) from error
    except StoreError as error:
        raise MountError(EXIT_NO_STORE, str(error), NO_STORE_HINT) from error


def _unavailable(error: StoreUnavailable) -> MountError:
    status = EXIT_DENIED if error.denied else EXIT_NO_STORE
    return MountError(status, str(error), error.hint)


@asynccontextmanager
async def _connect(options: Options) -> AsyncIterator[Connect | None]:
    """How to connect to the embedded store or to another host, which runs meanwhile; None for a real
    store of this host."""
    if options.destination is not None:
        try:
            async with open_forward(
                options.destination, timeout=options.timeout, command=options.ssh_command
            ) as forward:
                yield forward.connect
        except StoreUnavailable as error:
            raise _unavailable(error) from error
        return
    if not options.embedded:
        yield None
        return
    # Not needed where Xen is, and a thirtieth of all that is loaded before a mount answers.
    from xsfs.embedded.server import EmbeddedStore

    embedded = EmbeddedStore()
    async with open_servants() as nursery:
        await nursery.start(embedded.serve)
        if options.listen is not None:
            try:
                await nursery.start(embedded.listen, options.listen)
            except OSError as error:
                raise MountError(
                    EXIT_NO_STORE,
                    f"cannot listen at {options.listen}: {error.strerror}",
                    "name a path where a socket can be made",
                ) from None
        yield lambda: SocketTransport(embedded.connect(options.domid), same_loop=True)


async def _view(options: Options, store: Store) -> View:
    """The tree as the mount shows it."""
    try:
        domid = await store.domid()
    except (XenstoreError, ValueError) as error:
        raise MountError(
            EXIT_DENIED,
            f"cannot tell which domain this is: {error}",
            "the node domid of its home must be readable, and a number",
        ) from None
    root = options.root if options.root is not None else home_of(domid)
    return View(store, domid, root, RAW if options.raw else TEXT, KnownDirectories())


@asynccontextmanager
async def _mirror(
    options: Options, connect: Connect | None, view: View
) -> AsyncIterator[Mirror | None]:
    """The live mirror, if one was asked for, complete.  Raises MountError."""
    if options.mirror is None:
        yield None
        return
    try:
        directory = options.mirror or default_directory(options.mountpoint)
        files = MirrorFiles(directory, options.ownership)
        if files.is_inside(options.mountpoint):
            raise MirrorPlaceError("the mirror is inside the mount", "name another: mirror=DIR")
        files.open()
    except MirrorPlaceError as error:
        raise MountError(EXIT_MIRROR, str(error), error.hint) from error
    try:
        async with _store(options, connect) as store, open_servants() as servants:
            own = View(store, view.domid, view.root, view.content, view.known)
            mirror = Mirror(store, own, files)
            try:
                await servants.start(mirror.run)
            except (StoreError, OSError) as error:
                raise MountError(
                    EXIT_MIRROR, f"cannot make the mirror: {error}", "mount without it, or a part"
                ) from error
            yield mirror
    finally:
        files.close()


def _operations(
    options: Options, view: View, mirror: Mirror | None, servants: trio.Nursery
) -> Operations:
    """The tree over the store, with nothing mounted yet."""
    store = view.store
    stores = [store] if mirror is None else [store, mirror.store]

    def counters() -> dict[str, int]:
        return {
            "requests": sum(each.requests for each in stores),
            "operations": operations.answered,
            "errors": operations.errors,
            "watches": sum(len(each.watches) for each in stores),
            "readers": tree.readers,
            "transactions": store.transactions,
            "mirror": mirror.nodes if mirror is not None else 0,
            "mirror_looks": mirror.looks if mirror is not None else 0,
            "reconnects": sum(each.reconnects + each.watches.reconnects for each in stores),
            "inodes": len(tree),
            "handles": len(operations),
        }

    tree = Tree(options.ownership, counters)
    tree.mirror = mirror
    transactions = Transactions(servants, view, options.tx_timeout)
    tree.add_root(MountRoot(tree, view, transactions))
    operations = Operations(tree, store.distrust)
    return operations


# ---------------------------------------------------------------------------------- mountpoints


def check_mountpoint(path: str) -> None:
    """Raises MountError where nothing can be mounted."""
    if path.startswith("/dev/fd/"):
        return  # mount.fuse3 has opened and mounted it already (drop_privileges)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise MountError(
            EXIT_MOUNTPOINT, f"the mountpoint {path} does not exist", f"mkdir -p {path}"
        ) from None
    except OSError as error:
        # ENOTCONN: a file system whose process has died.
        raise MountError(
            EXIT_MOUNTPOINT,
            f"the mountpoint {path} is unusable: {error.strerror}",
            f"is a dead mount there?  umount {path}",
        ) from None
    if not stat.S_ISDIR(mode):
        raise MountError(
            EXIT_MOUNTPOINT, f"the mountpoint {path} is not a directory", "name a directory"
        )
    if os.path.realpath(path) in _mounted("fuse.xsfs"):
        raise MountError(
            EXIT_MOUNTPOINT, f"the mountpoint {path} is busy: xsfs is there", f"umount {path}"
        )


def _mounted(kind: str) -> set[str]:
    """Where file systems of this type are mounted: proc(5), mountinfo."""
    found = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            if rest.split(" ", 1)[0] == kind:
                path = fields.split(" ")[4]
                # Blanks, tabs, newlines and backslashes stand there as octal numbers.
                found.add(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path))
    return found


def check_fuse() -> None:
    if not os.path.exists(FUSE_DEVICE):
        raise MountError(EXIT_FUSE, f"{FUSE_DEVICE} is missing", "modprobe fuse")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise MountError(EXIT_FUSE, f"no right to use {FUSE_DEVICE}", "run as root")


def _fuse_mount(operations: Operations, options: Options) -> None:
    """pyfuse3.init, with what libfuse prints to stderr made the reason of the error."""
    with tempfile.TemporaryFile() as captured:
        sys.stderr.flush()
        saved = os.dup(2)
        try:
            os.dup2(captured.fileno(), 2)
            pyfuse3.init(operations, options.mountpoint, options.fuse_options())
        except RuntimeError as error:
            captured.seek(0)
            said = " ".join(captured.read().decode(errors="replace").split())
            hint = "mounting needs root, or the fuse3 package"
            if options.allow_other and os.getuid() != 0:
                hint = "allow_other needs user_allow_other in /etc/fuse.conf"
            raise MountError(
                EXIT_FUSE, f"cannot mount at {options.mountpoint}: {said or error}", hint
            ) from None
        finally:
            os.dup2(saved, 2)
            os.close(saved)
