"""How fast a change is told: `python3 -m tests.benchmarks.watches`, from the root of the project.

    latency     from another client's write until a blocked reader has the line: of `cat DIR/.watch`,
                against `xenstore-watch DIR`, both through a pipe, in the same rounds
    throughput  lines a second that 1, 10 and 100 readers get, all of them together, while another
                client writes as fast as it can; equal lines still unread are one, so each write is
                to a node of its own

Exits with 0 whatever the figures are; 1 means that something could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.support.xenstored.harness import DAEMONS, MissingProgramError, XsClient

from .errors import BenchmarkError
from .stores import DOMAINS_MIN, HOME, Store, store

TOP: Final = f"{HOME}/watched"
READERS: Final = (1, 10, 100)
NODES: Final = 1000
"""How many nodes are written to in turn."""

LINE_SECONDS: Final = 10.0
"""When a line is taken for lost."""


@dataclass
class Reader:
    """A program that prints a line for each event."""

    process: subprocess.Popen[bytes]
    prefix: bytes
    """What its lines have before the path below TOP."""
    received: bytes = b""
    lines: int = 0

    @property
    def descriptor(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def receive(self) -> Sequence[bytes]:
        """The lines that are there now, or come as the first."""
        data = os.read(self.descriptor, 1 << 16)
        if not data:
            raise BenchmarkError(f"{self.process.args!r} has ended")
        *lines, self.received = (self.received + data).split(b"\n")
        self.lines += len(lines)
        return lines

    def await_line(self, line: bytes) -> None:
        expected = self.prefix + line
        while True:
            if not select.select([self.descriptor], [], [], LINE_SECONDS)[0]:
                raise BenchmarkError(f"{self.process.args!r} has not printed {expected!r}")
            if expected in self.receive():
                return


@contextlib.contextmanager
def reader(
    command: Sequence[str], prefix: bytes, first: bytes, environment: Mapping[str, str]
) -> Iterator[Reader]:
    """A program whose watch is armed."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            started = Reader(process, prefix)
            if not select.select([started.descriptor], [], [], LINE_SECONDS)[0]:
                raise BenchmarkError(f"{command!r} has printed nothing")
            if first not in started.receive():
                raise BenchmarkError(f"{command!r} has not begun with {first!r}")
            yield started
        finally:
            process.kill()


def ours(subject: Store) -> contextlib.AbstractContextManager[Reader]:
    return reader(["cat", subject.file(f"{TOP}/.watch")], b"", b".", subject.environment)


def theirs(subject: Store) -> contextlib.AbstractContextManager[Reader]:
    # It prints by stdio, which holds lines for a pipe back.
    command = ["stdbuf", "-oL", "xenstore-watch", TOP]
    return reader(command, f"{TOP}/".encode(), TOP.encode(), subject.environment)


def latency(subject: Store, rounds: int) -> Iterator[str]:
    """Never both at once, as each would wait for the other's share of the daemon."""
    times: dict[str, list[float]] = {}
    with XsClient(subject.socket) as writer:
        for number in range(rounds):
            contenders = [("cat .watch", ours), ("xenstore-watch", theirs)]
            for name, start in contenders if number % 2 else contenders[::-1]:
                with start(subject) as program:
                    times.setdefault(name, []).append(median_latency(writer, program))
    for name, medians in times.items():
        yield f"  {name:<16} {statistics.median(medians) * 1e6:7.0f} us"
    pairs = zip(times["cat .watch"], times["xenstore-watch"], strict=True)
    yield f"  {'ratio':<16} {statistics.median(a / b for a, b in pairs):7.2f}"


def median_latency(writer: XsClient, program: Reader, count: int = 200) -> float:
    taken = []
    for i in range(count):
        start = time.perf_counter()
        writer.write(f"{TOP}/n{i}", b"")
        program.await_line(b"n%d" % i)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def throughput(subject: Store, readers: int, writes: int) -> str:
    """One line of the table: how long it takes until all readers have been told of all writes."""
    with contextlib.ExitStack() as stack:
        programs = {}
        poll = select.poll()
        for _ in range(readers):
            program = stack.enter_context(ours(subject))
            programs[program.descriptor] = program
            program.lines = 0
            poll.register(program.descriptor, select.POLLIN)
        writer = stack.enter_context(XsClient(subject.socket))
        waiting = set(programs)
        start = time.perf_counter()
        for i in range(writes):
            writer.write(f"{TOP}/n{i % NODES}", b"")
            if i % 100 == 0:
                for descriptor, _ in poll.poll(0):
                    programs[descriptor].receive()
        written = time.perf_counter() - start
        writer.write(f"{TOP}/end", b"")
        while waiting:
            ready = poll.poll(LINE_SECONDS * 1000)
            if not ready:
                raise BenchmarkError(f"{len(waiting)} readers have not been told of the last write")
            for descriptor, _ in ready:
                if b"end" in programs[descriptor].receive():
                    waiting.discard(descriptor)
        seconds = time.perf_counter() - start
        lines = sum(program.lines for program in programs.values())
        return (
            f"  {readers:>7}  {writes / written:9.0f}  {writes / seconds:9.0f}"
            f"  {lines / seconds:9.0f}  {lines / readers / writes:8.0%}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.benchmarks.watches",
        description="Measure how fast .watch tells of changes, against xenstore-watch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kind", choices=sorted(DAEMONS), default="C", help="the daemon to mount")
    parser.add_argument("--rounds", type=int, default=7, help="how often the latency is measured")
    parser.add_argument("--writes", type=int, default=10_000, help="for each number of readers")
    arguments = parser.parse_args()
    try:
        with store(arguments.kind, DOMAINS_MIN) as subject:
            with XsClient(subject.socket) as client:
                client.write(TOP, b"")
            print(f"{arguments.kind} daemon, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
            print("\nfrom a write to the line, median")
            for line in latency(subject, arguments.rounds):
                print(line)
            print("\n  readers   writes/s   events/s    lines/s    merged to")
            for readers in READERS:
                print(throughput(subject, readers, arguments.writes))
    except (BenchmarkError, MissingProgramError, OSError, subprocess.SubprocessError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
