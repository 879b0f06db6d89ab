"""Programs of the tests that go on printing lines, each of which is waited for."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyfuse3
import pytest

from tests.support.mounting import LIMIT

HAS_POLL = hasattr(pyfuse3, "PollHandle")
"""Whether poll(2) works for watch files: since pyfuse3 3.5."""

needs_poll = pytest.mark.skipif(not HAS_POLL, reason="pyfuse3 older than 3.5 has no poll")


class Lines:
    """The lines that come from a descriptor, each waited for LIMIT seconds at most."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._received = b""

    def read(self, size: int) -> bytes:
        """The bytes of one read(2) of that size, or the end."""
        deadline = time.monotonic() + LIMIT
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        while True:
            assert poll.poll(LIMIT * 1000), "no line came"
            try:
                return os.read(self.descriptor, size)
            except BlockingIOError:
                # With pyfuse3 older than 3.5 a watch file is always ready.
                assert not HAS_POLL
                assert time.monotonic() < deadline, "no line came"
                time.sleep(0.005)

    def next(self) -> str:
        while b"\n" not in self._received:
            data = self.read(65536)
            assert data, f"the end, after {self._received!r}"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    def until(self, last: str) -> list[str]:
        """All lines before this one."""
        lines = []
        while (line := self.next()) != last:
            lines.append(line)
        return lines


class Program:
    """A program that prints lines."""

    def __init__(self, *command: str | Path, stdin: int | None = None, **environment: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            # Python ignores SIGPIPE, shells run in the background SIGINT: not what users have.
            restore_signals=True,
        )
        assert self.process.stdout is not None
        self.lines = Lines(self.process.stdout.fileno())

    def wait_blocked(self) -> None:
        """Until it waits for the answer to a FUSE request."""
        deadline = time.monotonic() + LIMIT
        wchan = Path(f"/proc/{self.process.pid}/wchan")
        while "request_wait_answer" not in wchan.read_text():
            assert time.monotonic() < deadline, wchan.read_text()
            assert self.process.poll() is None

    def signal(self, number: int) -> float:
        """Send a signal, and wait for the end: how long it took."""
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(LIMIT)
        return time.monotonic() - start

    def end(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def program(
    *command: str | Path, stdin: int | None = None, **environment: str
) -> Iterator[Program]:
    running = Program(*command, stdin=stdin, **environment)
    try:
        yield running
    finally:
        running.end()


@contextmanager
def on_terminal(*command: str | Path) -> Iterator[int]:
    """Run a program on a terminal of its own, which is given as a descriptor."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "vt100"
        os.execvp(command[0], [str(word) for word in command])
    try:
        yield terminal
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def await_screen(terminal: int, text: bytes | None) -> None:
    """Read what the program prints until it has printed `text`, or ended if that is None."""
    shown = b""
    deadline = time.monotonic() + LIMIT
    while text is None or text not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, shown
        try:
            part = os.read(terminal, 4096)
        except OSError:
            part = b""
        if not part:
            assert text is None, shown
            return
        shown += part
