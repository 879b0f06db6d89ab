"""Run a real Xenstore daemon without Xen: python3 -m tests.support.xenstored --help

Prints "key=value" lines (pid, dir, socket, guest.7, ...), then "ready", and runs until SIGTERM or
SIGINT.  SIGHUP kills (SIGKILL) and restarts the daemon.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
import sys

from .daemon import RealXenstored
from .shim import DAEMONS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.support.xenstored",
        description="Run a real Xenstore daemon without Xen.",
        epilog="SIGTERM or SIGINT ends it; SIGHUP kills and restarts the daemon (the store is "
        "empty then, or populated again).",
    )
    add = parser.add_argument
    add("--kind", choices=sorted(DAEMONS), default="C")
    add(
        "--guest",
        type=int,
        action="append",
        default=[],
        metavar="DOMID",
        help="open a guest socket (may be repeated; 0 is the ring of the dom0 kernel)",
    )
    add("--populate", action="store_true", help="write the nodes of dom0 and of all domains")
    add("--domains", type=int, default=0, metavar="N", help="with --populate: also domains 1 to N")
    add("--introduce", action="store_true", help="with --domains: introduce them as well")
    add("--small", action="store_true", help="with --populate: 164 nodes a domain, not 286")
    add("--trace", action="store_true", help="let the daemon log all requests")
    add("--dir", metavar="DIRECTORY", help="where all files go: to be made, or empty")
    add("--keep", action="store_true", help="keep the directory at the end")
    add("--option", action="append", default=[], help="one more argument for the daemon")
    add("--config", action="append", default=[], metavar="KEY=VALUE", help="for oxenstored.conf")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    pending: list[int] = []
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD:
        signal.signal(number, lambda got, _: pending.append(got))
    # The daemon's end comes as SIGCHLD, so that signals are all there is to wait for.
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)

    server = RealXenstored(
        args.kind,
        args.guest,
        options=args.option,
        config=dict(item.split("=", 1) for item in args.config),
        trace=args.trace,
        keep=args.keep,
        directory=args.dir,
    )

    def fill() -> None:
        if args.populate:
            domids = {d for d in args.guest if d} | {*range(1, args.domains + 1)}
            server.populate(sorted(domids), args.introduce, args.small)

    with server:
        fill()
        print(f"kind={server.kind}", f"pid={server.pid}", f"dir={server.dir}", sep="\n")
        print(f"socket={server.socket}")
        if server.trace_file:
            print(f"trace={server.trace_file}")
        for domid in args.guest:
            print(f"guest.{domid}={server.guest_socket(domid)}")
        print("ready", flush=True)
        while True:
            select.select([woken], [], [])
            woken.recv(4096)
            while pending:
                got = pending.pop(0)
                if got == signal.SIGHUP:
                    server.restart()
                    fill()
                    print(f"pid={server.pid}", "ready", sep="\n", flush=True)
                elif got != signal.SIGCHLD:
                    return 0
            if not server.alive and server.process:
                print(f"the daemon has ended: {server.process.returncode}", file=sys.stderr)
                return 1


if __name__ == "__main__":
    sys.exit(main())
