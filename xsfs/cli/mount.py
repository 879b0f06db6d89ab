"""Mounting: connect, mount, daemonize, serve, unmount.

`mount` and `_serve` read from top to bottom.  Each resource is released by the block that took it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from xsfs.cli.daemonize import fork, ready
from xsfs.cli.exit_statuses import (
    EXIT_DENIED,
    EXIT_INTERRUPTED,
    EXIT_MIRROR,
    EXIT_MOUNTPOINT,
    EXIT_NO_STORE,
    MountError,
)
from xsfs.cli.mountpoint import check_fuse, fuse_failure, mountpoint_fault
from xsfs.cli.options import AUTOMATIC_SOURCES, Options
from xsfs.cli.service import describe_tasks, notify, status
from xsfs.embedded.server import EmbeddedStore
from xsfs.fs.inodes import InodeTable
from xsfs.fs.migration import follow_home
from xsfs.fs.operations import Operations
from xsfs.fs.transaction_dirs import MountRoot
from xsfs.fs.transactions import Transactions
from xsfs.fs.watch_files import READERS_MAX
from xsfs.mirror.mirror import Mirror
from xsfs.mirror.staging import MirrorDirectory, MirrorPlaceError, default_directory
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import RAW, TEXT
from xsfs.view.view import View, home_of
from xsfs.xenstore.background import open_background
from xsfs.xenstore.errors import StoreError, StoreUnavailable, XenstoreError
from xsfs.xenstore.event_reader import SWITCH_SECONDS
from xsfs.xenstore.protocol import decode_names, directory, read
from xsfs.xenstore.reconnect import Connect
from xsfs.xenstore.ssh import open_forward
from xsfs.xenstore.store import Store, open_store
from xsfs.xenstore.transport import NO_STORE_HINT, SocketTransport, find_store, open_transport

log = logging.getLogger(__name__)

ENDING: Final = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    # Nobody sends these.  But a signal that ends a process by default must not leave a mirror behind.
    *(signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGPOLL),
    *(signal.SIGPWR, signal.SIGXCPU, signal.SIGXFSZ),
)

TASKS_MAX: Final = READERS_MAX + 128
"""How many requests pyfuse3 serves at once.  Each reader of a watch file may keep one of them waiting.
The rest are for everything else; pyfuse3's own default is 99 for all."""

TASKS_IDLE: Final = 64
"""How many of pyfuse3's tasks stay when there is nothing to do.  Each allocates a MiB when it starts
and frees it when it ends.  With pyfuse3's default they come and go whenever two requests coincide."""

PROGRESS_SECONDS: Final = 1.0
"""How often xsfs shows how far the first copy of a mirror is."""

ERASE_LINE: Final = "\r\x1b[K"

END_SECONDS: Final = 2.0
"""How long the unmount may wait for changes that open files have not yet written."""


def mount(options: Options) -> None:
    """Mount, and serve until the unmount.  If xsfs daemonizes, this returns in the foreground process
    as soon as the tree is usable.  Raises MountError."""
    if fault := mountpoint_fault(options.mountpoint):
        raise MountError(EXIT_MOUNTPOINT, *fault)
    check_fuse()
    parent = None
    if not options.foreground:
        parent = fork()
        if parent is None:
            return
    try:
        trio.run(_serve, options, parent)
    except StoreUnavailable as error:
        exit_status = EXIT_DENIED if error.denied else EXIT_NO_STORE
        raise MountError(exit_status, str(error), error.hint) from error
    except StoreError as error:
        raise MountError(EXIT_NO_STORE, str(error), NO_STORE_HINT) from error


async def _serve(options: Options, parent: int | None) -> None:
    source = options.source
    if source in AUTOMATIC_SOURCES:
        source = find_store(os.environ)
    with trio.open_signal_receiver(*ENDING, signal.SIGUSR1) as signals, trio.CancelScope() as scope:
        # A signal cancels the last of these.  Once mounted this is the serving alone, because open
        # files need the connections for what they have not yet written.
        ended = [scope]
        async with open_background() as background_tasks, _connect(options, source) as connect:
            background_tasks.start_soon(_obey_signals, signals, ended)
            async with (
                open_store(timeout=options.timeout, connect=connect) as store,
                open_background() as users_of_store,
            ):
                view = await _view(options, store)
                async with _mirror(options, connect, view) as mirror:
                    about = {"store": source, "daemon": await _daemon(options, store)}
                    transactions = Transactions(users_of_store, view, options.tx_timeout)
                    operations = _operations(options, view, mirror, transactions, about)
                    _fuse_mount(operations, options)

                    def description() -> str:
                        return status(f"{view.root.decode()} of {source} at {options.mountpoint}")

                    if view.domid:

                        def on_move() -> None:
                            if mirror is not None:
                                mirror.move_home(view.domid)
                            notify(description())

                        users_of_store.start_soon(
                            follow_home, view, operations, transactions, on_move
                        )
                    try:
                        if parent is not None:
                            ready(parent)
                        notify("READY=1", description())
                        sys.setswitchinterval(SWITCH_SECONDS)
                        with trio.CancelScope() as serving:
                            ended.append(serving)
                            await _answer_the_kernel()
                    finally:
                        await _unmount(operations, transactions, view)
    if ended == [scope]:
        raise MountError(EXIT_INTERRUPTED, "interrupted before the mount", "try again")


async def _unmount(operations: Operations, transactions: Transactions, view: View) -> None:
    notify("STOPPING=1")
    with trio.CancelScope(deadline=trio.current_time() + END_SECONDS, shield=True):
        await operations.end(view)
        await transactions.roll_back_all()
    pyfuse3.close(unmount=True)


async def _answer_the_kernel() -> None:
    """Returns when the file system has been unmounted."""
    try:
        await pyfuse3.main(min_tasks=TASKS_IDLE, max_tasks=TASKS_MAX)
    except* ConnectionAbortedError:
        # The kernel reports it if requests were still in its queue at the unmount: the RELEASEs of files
        # just closed.  `Operations.end` releases their handles.
        log.info("unmounted with requests still in the kernel's queue")


async def _obey_signals(signals: AsyncIterator[int], ended: Sequence[trio.CancelScope]) -> None:
    async for number in signals:
        if number in ENDING:
            log.info("ending: %s", signal.Signals(number).name)
            ended[-1].cancel()
        else:
            for line in ("all tasks:", *describe_tasks()):
                log.info("%s", line)  # one message each: the journal accepts no line breaks


# ------------------------------------------------------------------------------------ the store


@asynccontextmanager
async def _connect(options: Options, source: str) -> AsyncIterator[Connect]:
    """The function that connects to the source; the embedded store or ssh runs as long as the block."""
    if options.destination is not None:
        async with open_forward(
            options.destination, timeout=options.timeout, command=options.ssh_command
        ) as forward:
            yield forward.connect
        return
    if not options.embedded:
        # xsfs connects later, too, and has changed its working directory by then.
        yield partial(open_transport, os.path.abspath(source))
        return
    async with open_background() as nursery:
        embedded = EmbeddedStore(nursery)
        if options.listen is not None:
            try:
                await nursery.start(embedded.listen, options.listen)
            except OSError as error:
                raise MountError(
                    EXIT_NO_STORE,
                    f"cannot listen at {options.listen}: {error.strerror or error}",
                    "choose another path for the socket",
                ) from None
        yield lambda: SocketTransport(embedded.connect(options.domid), same_loop=True)


async def _daemon(options: Options, store: Store) -> str:
    """Which daemon has answered at the mount, as far as its replies tell."""
    if options.embedded:
        return "embedded"
    children, missing = await store.pipeline((directory(b"/"), read(b"/xsfs-no-such-node")))
    if isinstance(children, bytes):
        # Only oxenstored lists the special watches.
        return "oxenstored" if b"@releaseDomain" in decode_names(children) else "C xenstored"
    # A guest may not read "/".  C xenstored does not tell it whether a child exists.
    error = missing.name if isinstance(missing, XenstoreError) else ""
    return {"EACCES": "C xenstored", "ENOENT": "oxenstored"}.get(error, "unknown")


async def _view(options: Options, store: Store) -> View:
    """The tree as the mount shows it."""
    try:
        domid = await store.domid()
    except (XenstoreError, ValueError) as error:
        reason = error if isinstance(error, XenstoreError) else "its domid is not a number"
        raise MountError(
            EXIT_DENIED,
            f"cannot tell which domain this is: {reason}",
            "the node 'domid' in the domain's home must be readable and contain a number",
        ) from None
    root = options.root if options.root is not None else home_of(domid)
    if domid:  # domain 0 keeps its domid
        store.home.move(home_of(domid))
    return View(store, domid, root, RAW if options.raw else TEXT, StickyDirectories())


@asynccontextmanager
async def _mirror(options: Options, connect: Connect, view: View) -> AsyncIterator[Mirror | None]:
    """The live mirror, complete; None without the option.  Raises MountError."""
    if options.mirror is None:
        yield None
        return
    try:
        directory = options.mirror or default_directory(options.mountpoint)
        files = MirrorDirectory(directory, options.ownership)
        if Path(files.directory).is_relative_to(os.path.realpath(options.mountpoint)):
            raise MirrorPlaceError("the mirror is inside the mount", "choose another: mirror=DIR")
        files.open()
    except MirrorPlaceError as error:
        raise MountError(EXIT_MIRROR, str(error), error.hint) from error
    try:
        async with (
            open_store(timeout=options.timeout, connect=connect) as store,
            open_background() as background_tasks,
        ):
            if view.domid:
                store.home.move(view.home)
            own = View(store, view.domid, view.root, view.value_format, view.sticky)
            mirror = Mirror(store, own, files)
            try:
                async with open_background() as progress:
                    progress.start_soon(_show_progress, mirror)
                    await background_tasks.start(mirror.run)
            except OSError as error:
                raise MountError(
                    EXIT_MIRROR,
                    f"cannot make the mirror: {error}",
                    "mount without it, or a part of the store by root=PATH",
                ) from error
            yield mirror
    finally:
        files.close()


async def _show_progress(mirror: Mirror) -> None:
    """Show how far the first copy is, to systemd and at a terminal."""
    at_terminal = sys.stderr.isatty()
    with suppress(OSError):  # the terminal may go
        try:
            while True:
                await trio.sleep(PROGRESS_SECONDS)
                text = f"making the mirror: {mirror.fetched} nodes"
                notify(status(text))
                if at_terminal:
                    print(f"\r{text}", end="", file=sys.stderr, flush=True)
        finally:
            if at_terminal:
                print(ERASE_LINE, end="", file=sys.stderr, flush=True)


def _operations(
    options: Options,
    view: View,
    mirror: Mirror | None,
    transactions: Transactions,
    about: Mapping[str, str],
) -> Operations:
    """The tree over the store, with nothing mounted yet.

    about       what `.stats` shows of the store in front of the counters
    """
    store = view.store
    stores = [store] if mirror is None else [store, mirror.store]

    def counters() -> dict[str, int | str]:
        return {
            **about,
            "requests": sum(each.requests for each in stores),
            "operations": operations.answered,
            "errors": operations.errors,
            "watches": sum(len(each.watches) for each in stores),
            "readers": table.readers.used,
            "transactions": store.transactions,
            "mirror": mirror.nodes if mirror is not None else 0,
            "mirror_looks": mirror.fetched if mirror is not None else 0,
            "reconnects": sum(each.reconnects + each.watches.reconnects for each in stores),
            "inodes": len(table),
            "handles": len(operations),
        }

    table = InodeTable(
        options.ownership, counters, allow_other=options.allow_other, visible=options.visible
    )
    table.mirror = mirror
    table.add_root(MountRoot(table, view, transactions))
    operations = Operations(table, store.drop_connection)
    return operations


def _fuse_mount(operations: Operations, options: Options) -> None:
    """Call pyfuse3.init.  Raises MountError with the text that libfuse prints to stderr."""
    with tempfile.TemporaryFile() as captured:
        sys.stderr.flush()
        saved = os.dup(2)
        try:
            os.dup2(captured.fileno(), 2)
            pyfuse3.init(operations, options.mountpoint, options.fuse_options())
        except RuntimeError as error:
            captured.seek(0)
            said = " ".join(captured.read().decode(errors="replace").split())
            raise fuse_failure(options.mountpoint, said or str(error)) from None
        finally:
            os.dup2(saved, 2)
            os.close(saved)
