"""Half an hour of everything at once: `python3 -m tests.support.soak [--minutes 30] [--kind KIND] [--ssh]`.

Readers, writers, watchers, transactions, appends and locks go on at one mount, while the daemon is
killed and begun anew, or stopped and let go on.  What each of them sees is checked as it goes:

    counters    transactions that add one to a number: none that was committed is lost, none is done
                twice; one whose outcome the mount did not know may be either
    appenders   the same of `>>`
    writers     what was written is what is read
    lockers     two never hold the same lock
    watchers    a change is told, by a line for it or by `.`

In the end nothing is left: no open file, watch, transaction, inode or descriptor, and the mount is no
larger than it was after the first third.  Exits with 0 if all that is so.

With `--ssh` the mount is that of another host, with a mirror.  Then sshd ends and starts, ssh is killed,
and the network falls silent, too; the mirror must show a change after each of these, and in the end all
of the store.

An `epoch` is the life of one daemon.  It ends before the daemon is killed and the next begins before
the new one answers, so what happened within one epoch happened to one store.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.support.mirroring import Mirrored, scratch
from tests.support.mounting import LIMIT, Mount
from tests.support.sshd import descendants, running_sshd
from tests.support.xenstored.harness import DAEMONS, RealXenstored

TIMEOUT: Final = 2.0
TX_TIMEOUT: Final = 4.0
EPOCH_SECONDS: Final = 12.0
SAMPLE_SECONDS: Final = 1.0
GROWTH_MAX: Final = 3.0
"""MiB that the mount may grow by after the first third."""

HOME: Final = "/local/domain/0"

# What a tool may meet while the daemon goes, comes, or stands still.
EXPECTED: Final = frozenset(
    (
        *(errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOENT, errno.EAGAIN),
        *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINTR, errno.ENOTEMPTY),
    )
)


def commit(tx: Path) -> None:
    """Not by Python's files, which write again at the close what was refused."""
    descriptor = os.open(tx / ".control", os.O_WRONLY)
    try:
        os.write(descriptor, b"commit\n")
    finally:
        os.close(descriptor)


class Failure(Exception):
    """Something that must not be."""


@dataclass
class Tally:
    """How often a thing was done in one epoch, as far as it is known."""

    done: int = 0
    unknown: int = 0


@dataclass
class Sample:
    resident: float
    """MiB."""
    descriptors: int
    threads: int


@dataclass
class Soak:
    """One run.  `failures` is what came out that must not."""

    kind: str
    seconds: float
    directory: Path
    ssh: bool = False
    done: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    epoch: int = 0
    restarts: int = 0
    stops: int = 0

    def __post_init__(self) -> None:
        self.over = threading.Event()
        self.calm = threading.Event()
        """Set while the tallies may change."""
        self.calm.set()
        self.busy = 0
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock)
        self.tallies: dict[tuple[str, int], Tally] = {}
        self.appended: Counter[str] = Counter()
        self.holders = 0
        self.disturbed = time.monotonic()

    # --------------------------------------------------------------------------------- running

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            daemon = self.daemon = stack.enter_context(RealXenstored(self.kind))
            self.furnish()
            before = self.descriptors_of(daemon.pid)
            options, source = f"timeout={TIMEOUT},tx_timeout={TX_TIMEOUT}", daemon.socket
            if self.ssh:
                self.server = stack.enter_context(running_sshd(self.directory / "sshd"))
                self.mirror = stack.enter_context(scratch()) / "mirror"
                options += f",mirror={self.mirror},ssh_command={self.server.command()}"
                source = f"{self.server.account}:{source}"
            self.mount = Mount(["-o", options, source], self.directory / "m")
            try:
                self.mount.wait_mounted()
                self.work()
                self.check_what_is_left()
                if self.mount.end() != 0 or "Traceback" in self.mount.stderr:
                    self.failures.append(f"the mount ended badly: {self.mount.stderr[-4000:]}")
                self.until(
                    "the daemon has connections left",
                    lambda: self.descriptors_of(daemon.pid) <= before,
                )
            finally:
                self.mount.clear()

    def furnish(self) -> None:
        self.daemon.populate()
        with self.daemon.client() as client:
            for name in ("counters", "appenders", "writers", "locks", "watched"):
                # With something in it, or it would be an empty file.
                client.write(f"{HOME}/data/{name}/keep", b"")
            client.write(f"{HOME}/data/counters/n", b"0")

    def work(self) -> None:
        workers: list[Callable[[], None]] = [
            *(self.counter,) * 3,
            *(self.appender,) * 2,
            *(self.writer,) * 3,
            *(self.locker,) * 2,
            *(self.reader,) * 3,
            *(self.watcher,) * 4,
            self.killed_programs,
            self.sampler,
        ]
        threads = [
            threading.Thread(target=self.repeat, args=(number, work), name=work.__name__)
            for number, work in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + self.seconds
        try:
            while time.monotonic() < end and not self.failures:
                self.over.wait(min(EPOCH_SECONDS, max(0.0, end - time.monotonic())))
                self.check_tallies()
                self.check_mirror()
                self.disturb()
            self.check_tallies()
            self.check_mirror()
        finally:
            self.over.set()
            self.calm.set()
            for thread in threads:
                thread.join(3 * LIMIT)
                if thread.is_alive():
                    self.failures.append(f"a {thread.name} never ended")

    def repeat(self, number: int, work: Callable[[], None]) -> None:
        threading.current_thread().name = f"{work.__name__}-{number}"
        while not self.over.is_set():
            try:
                work()
                self.done[work.__name__] += 1
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, str(error))
                self.errors[f"{work.__name__} {name}"] += 1
                if error.errno not in EXPECTED:
                    self.failures.append(f"{work.__name__}: {error!r}")
                    return
                # While nothing answers nobody need be asked all the time.
                self.over.wait(0.01)
            except Exception as error:
                self.failures.append(f"{work.__name__}: {error!r}")
                return

    def until(self, what: str, condition: Callable[[], bool], limit: float = LIMIT) -> None:
        deadline = time.monotonic() + limit
        error: OSError | None = None
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
                error = None
            except OSError as met:  # the store may not be back yet
                error = met
            time.sleep(0.05)
        self.failures.append(what if error is None else f"{what}: {error}")

    # ---------------------------------------------------------------------------- disturbances

    def disturb(self) -> None:
        """End the daemon, or stop it for longer than the mount waits, with requests under way."""
        if self.over.is_set():
            return
        time.sleep(random.uniform(0.0, 0.05))
        self.disturbed = float("inf")
        if self.ssh and random.random() < 0.6:
            self.disturb_ssh()
        elif random.random() < 0.7:
            with self.lock:
                self.epoch += 1
            self.daemon.kill(random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)), 1.0)
            time.sleep(random.choice((0.0, 0.1, 0.5)))
            with self.lock:
                self.epoch += 1
            self.daemon.start()
            self.furnish()
            self.restarts += 1
        else:
            self.daemon.pause()
            time.sleep(random.choice((0.1, 1.5 * TIMEOUT)))
            self.daemon.resume()
            self.stops += 1
        self.disturbed = time.monotonic()

    def disturb_ssh(self) -> None:
        kind = random.choice(("sshd", "ssh", "network"))
        if kind == "sshd":
            self.server.stop()
            time.sleep(random.choice((0.0, 0.5, 1.5 * TIMEOUT)))
            self.server.start()
        elif kind == "ssh":
            for process in self.processes_of_ssh():
                os.kill(process, signal.SIGKILL)
        else:
            self.server.signal_sessions(signal.SIGSTOP)
            time.sleep(random.choice((0.5, 3 * TIMEOUT)))
            self.server.signal_sessions(signal.SIGCONT)
        self.done[f"disturbances of {kind}"] += 1

    def processes_of_ssh(self) -> list[int]:
        return descendants(self.mount.process.pid)

    def check_mirror(self) -> None:
        """A change that nobody disturbs any more is in the mirror soon."""
        if not self.ssh:
            return
        value = str(random.random())
        with self.daemon.client() as client:
            client.write(f"{HOME}/data/mirrored", value)

        def shows() -> bool:
            with contextlib.suppress(OSError):
                return (self.mount.path / ".mirror/data/mirrored").read_text() == value + "\n"
            return False

        self.until("the mirror does not show a change", shows, 3 * LIMIT)
        self.done["checks of the mirror"] += 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[int]:
        """The epoch, while nobody looks at the tallies."""
        while not self.calm.wait(0.1):
            if self.over.is_set():
                break
        with self.lock:
            self.busy += 1
            epoch = self.epoch
        try:
            yield epoch
        finally:
            with self.lock:
                self.busy -= 1
                self.idle.notify_all()

    def tally(self, what: str, epoch: int) -> Tally:
        with self.lock:
            return self.tallies.setdefault((what, epoch), Tally())

    def check_tallies(self) -> None:
        """Nobody counts meanwhile, so what is in the store is what was told."""
        self.calm.clear()
        try:
            with self.lock:
                if not self.idle.wait_for(lambda: not self.busy, 3 * LIMIT):
                    self.failures.append("those who count never pause")
                    return
            with self.daemon.client() as client:
                found = int(client.read(f"{HOME}/data/counters/n"))
                self.compare("counters", found)
                for name in set(client.ls(f"{HOME}/data/appenders")) - {"keep"}:
                    value = client.read(f"{HOME}/data/appenders/{name}")
                    self.compare(f"appenders/{name}", value.count(b"x"))
        finally:
            self.calm.set()

    def compare(self, what: str, found: int) -> None:
        tally = self.tally(what, self.epoch)
        if not tally.done <= found <= tally.done + tally.unknown:
            self.failures.append(
                f"{what}: {found} found, {tally.done} done and {tally.unknown} perhaps"
            )
        self.done["checks of what was counted"] += 1

    # --------------------------------------------------------------------------------- workers

    @property
    def data(self) -> Path:
        return self.mount.path / "data"

    def counter(self) -> None:
        with self.counting() as epoch:
            tx = self.mount.path / ".transaction" / threading.current_thread().name
            tx.mkdir()
            try:
                if epoch != self.epoch:
                    return  # of which daemon it is nobody knows
                number = tx / "data" / "counters" / "n"
                number.write_text(f"{int(number.read_text()) + 1}\n")
                tally = self.tally("counters", epoch)
                try:
                    commit(tx)
                except OSError as error:
                    if error.errno in (errno.EIO, errno.ETIMEDOUT):
                        tally.unknown += 1
                    raise
                with self.lock:
                    tally.done += 1
            finally:
                with contextlib.suppress(OSError):
                    tx.rmdir()

    def appender(self) -> None:
        with self.counting() as epoch:
            thread = threading.current_thread().name
            # A value is no longer than a message, so a new node is begun in time.
            name = f"{thread}-{self.appended[thread] // 800}"
            tally = self.tally(f"appenders/{name}", epoch)
            descriptor = os.open(
                self.data / "appenders" / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT
            )
            try:
                if epoch != self.epoch:
                    return
                # Its outcome is unknown until it is known.
                tally.unknown += 1
                os.write(descriptor, b"x\n")
                if epoch == self.epoch:
                    tally.unknown -= 1
                    tally.done += 1
            finally:
                os.close(descriptor)
                self.appended[thread] += 1
                if epoch != self.epoch:
                    # It may have gone to the new store.
                    self.tally(f"appenders/{name}", self.epoch).unknown += 1

    def writer(self) -> None:
        path = self.data / "writers" / threading.current_thread().name
        text = f"{random.random()}\n" * random.choice((1, 20))
        epoch, disturbed = self.epoch, self.disturbed
        path.write_text(text)
        found = path.read_text()
        if found != text and (epoch, disturbed) == (self.epoch, self.disturbed):
            raise Failure(f"{text!r} was written, and {found!r} read")
        if random.random() < 0.2:
            path.rename(path.with_name(path.name + "-moved"))
            path.with_name(path.name + "-moved").unlink()

    def locker(self) -> None:
        lock = self.data / "locks" / "one"
        epoch, disturbed = self.epoch, self.disturbed
        lock.mkdir()
        with self.lock:
            self.holders += 1
            holders = self.holders
        try:
            if holders > 1 and (epoch, disturbed) == (self.epoch, self.disturbed):
                raise Failure("two hold the same lock")
        finally:
            with self.lock:
                self.holders -= 1
            # One whose removal timed out is removed by whoever comes next.
            with contextlib.suppress(OSError):
                lock.rmdir()

    def reader(self) -> None:
        for directory, _, files in os.walk(self.mount.path):
            for name in files:
                with contextlib.suppress(OSError):
                    (Path(directory) / name).read_bytes()
            if self.over.is_set():
                return
        (self.mount.path / ".stats").read_text()

    def watcher(self) -> None:
        watched = self.data / "watched"
        descriptor = os.open(watched / ".watch", os.O_RDONLY | os.O_NONBLOCK)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            for _ in range(random.randrange(1, 30)):
                name = threading.current_thread().name
                disturbed = self.disturbed
                (watched / name).write_text(f"{random.random()}\n")
                if not self.told(descriptor, poll, name) and disturbed == self.disturbed:
                    raise Failure("a change was not told")
        finally:
            os.close(descriptor)

    def told(self, descriptor: int, poll: select.poll, name: str) -> bool:
        """Whether a line comes for the name, or for all."""
        deadline = time.monotonic() + 2 * TIMEOUT + 1
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                with contextlib.suppress(BlockingIOError):
                    lines = os.read(descriptor, 65536).decode().splitlines()
                    if name in lines or "." in lines:
                        return True
        return False

    def killed_programs(self) -> None:
        """Programs that end in the middle: a watcher, and one with a transaction."""
        tx = self.mount.path / ".transaction" / f"left-{random.randrange(1000)}"
        for command in (
            ["cat", str(self.data / ".watch")],
            ["sh", "-c", f"mkdir {tx} && cat {tx}/name; exec sleep 100"],
        ):
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self.over.wait(random.uniform(0.1, 1.0))
            process.kill()
            process.wait(LIMIT)

    def sampler(self) -> None:
        self.samples.append(self.sample())
        self.over.wait(SAMPLE_SECONDS)

    # -------------------------------------------------------------------------------- measures

    def sample(self) -> Sample:
        pid = self.mount.process.pid
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return Sample(
            int(status["VmRSS"].split()[0]) / 1024,
            self.descriptors_of(pid),
            int(status["Threads"]),
        )

    @staticmethod
    def descriptors_of(pid: int | None) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    def is_left(self, counter: str, rest: int) -> bool:
        return self.mount.counter(counter) <= rest

    def check_what_is_left(self) -> None:
        # Idle transactions of killed programs go by themselves.
        for counter in ("transactions", "readers", "watches", "handles"):
            # The file in which it is read is open itself.  The mirror has two watches.
            rest = {"handles": 1, "watches": 2 if self.ssh else 0}.get(counter, 0)
            self.until(
                f"{counter} are left",
                partial(self.is_left, counter, rest),
                TX_TIMEOUT + LIMIT,
            )
        if self.ssh:
            with self.daemon.client() as client:
                alive = Mirrored(self.mount, self.mirror, HOME, client)
                self.until("the mirror is not the store", lambda: not alive.differences())
            if len(self.processes_of_ssh()) != 1:
                self.failures.append(f"{len(self.processes_of_ssh())} processes of ssh")
        Path("/proc/sys/vm/drop_caches").write_text("2\n")
        self.until("inodes are left", lambda: self.mount.counter("inodes") < 20)
        left = self.sample()
        self.samples.append(left)
        # Two connections, of which one has a thread and an eventfd; pyfuse3's and trio's own.
        if left.descriptors > 40:
            self.failures.append(f"{left.descriptors} descriptors are left")
        third = self.samples[len(self.samples) // 3]
        if left.resident > third.resident + GROWTH_MAX:
            self.failures.append(f"it grew from {third.resident:.1f} to {left.resident:.1f} MiB")

    # ---------------------------------------------------------------------------------- report

    def report(self) -> str:
        first, last = self.samples[0], self.samples[-1]
        third = self.samples[len(self.samples) // 3]
        tenths = self.samples[:: max(1, len(self.samples) // 10)]
        lines = [
            f"{self.kind} daemon, {self.seconds / 60:g} minutes: "
            f"{self.restarts} restarts, {self.stops} stops",
            *(f"  {count:8} {name}" for name, count in sorted(self.done.items())),
            "  errors met, as they should be: "
            + ", ".join(f"{count} {name}" for name, count in sorted(self.errors.items())),
            f"  memory (MiB): {first.resident:.1f} at first, {third.resident:.1f} after a third, "
            f"{last.resident:.1f} in the end; each tenth of the time: "
            + " ".join(f"{sample.resident:.1f}" for sample in tenths),
            f"  descriptors: {first.descriptors} at first, "
            f"{max(sample.descriptors for sample in self.samples)} at most, "
            f"{last.descriptors} in the end",
            *(f"  FAILED: {failure}" for failure in self.failures[:20]),
        ]
        return "\n".join(lines)


def soak(kind: str, minutes: float, *, ssh: bool = False) -> Soak:
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        run = Soak(kind, minutes * 60, Path(directory), ssh)
        run.run()
        return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.support.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kind", choices=tuple(DAEMONS), default="C")
    parser.add_argument("--ssh", action="store_true")
    arguments = parser.parse_args()
    run = soak(arguments.kind, arguments.minutes, ssh=arguments.ssh)
    print(run.report())
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
