"""One real daemon with its domains."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from typing import Final, Self

from .bridge import GUEST_PORT, GuestBridge
from .client import XsClient, XsError, strings
from .population import populate
from .process import DaemonProcess
from .shim import installed_daemon

# As in xenshim.c, and xen.h.
VIRQ_DOMID: Final = 0x7FF0
VIRQ_DOM_EXC: Final = 3

VIRQ_TIMEOUT: Final = 60.0


class RealXenstored:
    """A daemon with its domains, all in a directory of its own.

    kind       "C" or "ocaml"
    guests     domids which get a ring, and a Unix socket: guest_socket(domid).  0 stands for the
               ring of the dom0 kernel.
    options    more arguments for the daemon, e.g. ("-E", "50") for C
    config     more settings for oxenstored.conf, e.g. {"quota-maxwatch": 5}
    trace      whether the daemon logs all requests, to .trace_file
    keep       whether the directory is kept after close()
    directory  where all its files go, instead of a new temporary directory: to be made, or empty
    """

    def __init__(
        self,
        kind: str = "C",
        guests: Iterable[int] = (),
        *,
        options: Iterable[str] = (),
        config: Mapping[str, object] | None = None,
        trace: bool = False,
        keep: bool = False,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self.kind = kind
        daemon = installed_daemon(kind)
        self.binary = daemon.program
        self.version = daemon.version
        """Of its Xen: (4, 17)."""
        self.dir = ""
        """Empty until the first start; then it stays the same, and so do all sockets' paths."""
        self.trace_file: str | None = None
        self._guests = tuple(guests)
        self._options = tuple(options)
        self._config = dict(config or {})
        self._trace = trace
        self._keep = keep
        self._directory = directory
        self._introduced: list[int] = []
        self._bridged: list[int] = []
        """Domains with a bridge, also while the daemon is down."""
        self._bridges: dict[int, GuestBridge] = {}
        self._daemon: DaemonProcess | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- paths

    def _path(self, *names: str) -> str:
        return os.path.join(self.dir, *names)

    @property
    def socket(self) -> str:
        return self._path("run", "socket")

    @property
    def log_file(self) -> str:
        """The output of the daemon on stdout and stderr."""
        return self._path("daemon.log")

    def guest_socket(self, domid: int) -> str:
        if domid not in self._bridges:
            raise KeyError(f"domain {domid} has no bridge")
        return self._bridges[domid].path

    def client(self, domid: int | None = None, timeout: float = 60.0) -> XsClient:
        """A new XsClient, by the plain socket or as that guest."""
        return XsClient(self.socket if domid is None else self.guest_socket(domid), timeout)

    # -- the daemon

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        return self._daemon.popen if self._daemon else None

    @property
    def pid(self) -> int | None:
        return self._daemon.popen.pid if self._daemon else None

    @property
    def alive(self) -> bool:
        return self._daemon is not None and self._daemon.alive

    def _prepare(self) -> None:
        if self._directory is None:
            self.dir = tempfile.mkdtemp(prefix="xenstored-")
        else:
            directory = os.path.abspath(self._directory)
            os.makedirs(directory, exist_ok=True)
            if os.listdir(directory):
                raise FileExistsError(f"{directory} is not empty")
            self.dir = directory
        for name in ("run", "run-xen", "log"):
            os.mkdir(self._path(name))
        with open(self._path("xsd_port"), "w") as file:
            file.write(str(GUEST_PORT))
        self.create_domain(0)
        if self._trace:
            self.trace_file = self._path("log", "trace.log")

    def _command(self) -> list[str]:
        if self.kind == "C":
            trace = ["-T", self.trace_file] if self.trace_file else []
            return [self.binary, "--no-fork", *trace, *self._options]
        config: dict[str, object] = {
            "pid-file": self._path("run-xen", "xenstored.pid"),
            "xenstored-kva": "/proc/xen/xsd_kva",
            "xenstored-port": "/proc/xen/xsd_port",
            "persistent": "false",
            "xenstored-log-file": self._path("log", "xenstored.log"),
        }
        if self.trace_file:
            config |= {
                "access-log-file": self.trace_file,
                "access-log-nb-lines": "100000000",
                "access-log-nb-chars": "200",
                "access-log-read-ops": "true",
                "access-log-transactions-ops": "true",
                "access-log-special-ops": "true",
            }
        path = self._path("oxenstored.conf")
        with open(path, "w") as file:
            file.writelines(f"{key} = {value}\n" for key, value in (config | self._config).items())
        trace = [] if self.trace_file else ["--no-access-log"]
        return [self.binary, "--no-fork", *trace, "--config-file", path, *self._options]

    def start(self) -> None:
        """Start the daemon (again), and give each guest a fresh ring."""
        if self.alive:
            raise RuntimeError("already running")
        first = not self.dir
        if first:
            self._prepare()
        self._stop_bridges()
        if self._daemon:
            self._daemon.kill(signal.SIGKILL, 0)  # just to release what it still holds
        for ring in glob.glob(self._path("ring.*")):
            with open(ring, "r+b") as file:
                file.write(bytes(4096))
        self._daemon = DaemonProcess(self._command(), self.dir)
        self._daemon.await_ready()
        if first:
            self._add_guests(self._guests)
        else:
            introduced, self._introduced = self._introduced, []
            self.introduce(*introduced)
            for domid in self._bridged:
                self._bridges[domid] = GuestBridge(self.dir, domid)

    def kill(self, sig: int = signal.SIGKILL, timeout: float = 60.0) -> None:
        """End the daemon alone, paused or not.  Guests and their clients stay, and hang."""
        if self._daemon:
            self._daemon.kill(sig, timeout)

    def pause(self) -> None:
        """Stop the daemon until resume(): connections stay, and nothing is answered.

        A paused daemon outlives a test process that is killed.
        """
        self._running().pause()

    def resume(self) -> None:
        """Let a paused daemon go on."""
        self._running().resume()

    def _running(self) -> DaemonProcess:
        if not self._daemon or not self._daemon.alive:
            raise RuntimeError("not running")
        return self._daemon

    def restart(self, sig: int = signal.SIGKILL) -> None:
        """A new daemon with an empty store; all guests are introduced again."""
        self.kill(sig)
        self.start()

    def close(self) -> None:
        """End everything."""
        self._stop_bridges()
        # Only a log that is kept needs a proper end: oxenstored puts it off for who knows how long.
        self.kill(signal.SIGTERM if self._keep else signal.SIGKILL, 2.0)
        if self.dir and not self._keep:
            shutil.rmtree(self.dir, ignore_errors=True)

    stop = close

    # -- domains

    def create_domain(self, domid: int) -> None:
        """Let a domain exist, so that nodes can belong to it."""
        with open(self._path(f"ring.{domid}"), "xb") as file:
            file.truncate(4096)
        # Up to 4.20 the hypervisor has the interrupt for a domain's end alone.
        if self.version >= (4, 21):
            self._virq()

    def exists(self, domid: int) -> bool:
        return os.path.exists(self._path(f"ring.{domid}"))

    def introduce(self, *domids: int) -> None:
        """INTRODUCE existing domains, as the toolstack does."""
        if not domids:
            return
        with self.client() as dom0:
            replies = dom0.pipeline(
                ("INTRODUCE", strings(str(domid), str(0x1000 + domid), str(GUEST_PORT)))
                for domid in domids
            )
        for domid, reply in zip(domids, replies, strict=True):
            if isinstance(reply, XsError):
                raise XsError(reply.name, f"INTRODUCE {domid}")
            self._introduced.append(domid)

    def add_guest(self, domid: int) -> None:
        """Create and introduce a domain, and open its guest socket."""
        self._add_guests([domid])

    def _add_guests(self, domids: Iterable[int]) -> None:
        domids = list(domids)
        for domid in domids:
            if domid in self._bridges:
                raise ValueError(f"domain {domid} has a bridge already")
            if not self.exists(domid):
                self.create_domain(domid)
        self.introduce(*(d for d in domids if d and d not in self._introduced))
        for domid in domids:
            self._bridges[domid] = GuestBridge(self.dir, domid)
            self._bridged.append(domid)

    def _stop_bridges(self) -> None:
        while self._bridges:
            self._bridges.popitem()[1].stop()

    def _virq(self) -> None:
        """Tell the daemon that something has happened to a domain."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(VIRQ_TIMEOUT)
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):  # no daemon
                sock.sendto(struct.pack("=II", VIRQ_DOMID, VIRQ_DOM_EXC), self._path("evtchn"))

    def shutdown_domain(self, domid: int) -> None:
        """The domain shuts down, but is not destroyed (@releaseDomain)."""
        with open(self._path(f"shutdown.{domid}"), "w"):
            pass
        self._virq()

    def destroy_domain(self, domid: int) -> None:
        """The domain ceases to exist (@releaseDomain)."""
        bridge = self._bridges.pop(domid, None)
        if bridge:
            bridge.stop()
        if domid in self._bridged:
            self._bridged.remove(domid)
        if domid in self._introduced:
            self._introduced.remove(domid)
        for what in ("ring", "shutdown"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(f"{what}.{domid}"))
        self._virq()

    def migrate(self, domid: int, target: int) -> None:
        """The guest goes on as another domain, which exists and is introduced, with the same socket."""
        bridge = self._bridges.pop(domid)
        self._bridged[self._bridged.index(domid)] = target
        self._bridges[target] = bridge
        bridge.resume_as(target)
        self.destroy_domain(domid)

    def populate(
        self, domids: Iterable[int] | None = None, introduce: bool = False, small: bool = False
    ) -> int:
        """Write the nodes of dom0 and of these domains (default: all guests).

        Domains which do not exist yet are created, and introduced if asked for.  With small, a
        domain has 164 nodes instead of 286.  Returns the number of requests it took.
        """
        if domids is None:
            domids = [domid for domid in self._bridges if domid]
        domids = list(domids)
        for domid in domids:
            if not self.exists(domid):
                self.create_domain(domid)
        with self.client(timeout=120.0) as dom0:
            count = populate(dom0, domids, small)
        if introduce:
            self.introduce(*(d for d in domids if d not in self._introduced))
        return count
