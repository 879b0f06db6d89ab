"""What xsfs says to the kernel's device, as strace sees it."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.mounting import Mount
from tests.system.xen.checks.machine import DEVICE, LIMIT
from xsfs.xenstore.protocol import Op

HEADER = struct.Struct("=IIII")

CALL = re.compile(
    r"(?P<thread>\d+) +(?:(?P<name>write|readv?|close)\((?P<descriptor>\d+)"
    r'(?:, (?:\[\{iov_base=)?"(?P<text>[^"]*)")?(?P<rest>.*)'
    r"|<\.\.\. (?P<resumed>\w+) resumed>(?P<more>.*))"
)


@dataclass
class Seen:
    requests: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    not_one_message: list[str] = field(default_factory=list)
    not_alone: list[str] = field(default_factory=list)


class Descriptor:
    """One open device: what is unanswered on it."""

    def __init__(self) -> None:
        self.unanswered: set[int] = set()
        self.received = b""

    def receive(self, data: bytes) -> None:
        self.received += data
        while len(self.received) >= 16:
            op, req_id, _, length = HEADER.unpack(self.received[:16])
            if len(self.received) < 16 + length:
                return
            self.received = self.received[16 + length :]
            if op != Op.WATCH_EVENT:
                self.unanswered.discard(req_id)


class TracedMount(Mount):
    def __init__(self, path: Path, trace: Path) -> None:
        self.trace = trace
        self.path = path
        self.stderr_path = path.with_name(path.name + ".stderr")
        path.mkdir()
        strace = (
            *("strace", "-f", "--seccomp-bpf", "-o", str(trace), "-xx", "-s", "9999"),
            *("-e", "trace=read,readv,write,close", "-P", DEVICE),
        )
        with open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen(
                [*strace, sys.executable, "-m", "xsfs", "-f", DEVICE, str(path)],
                stderr=stderr,
            )

    def seen(self) -> Seen:
        seen = Seen()
        open_now: dict[int, Descriptor] = {}
        reading: dict[str, Descriptor] = {}
        for line in self.trace.read_text().splitlines():
            call = CALL.match(line)
            if call is None:
                continue
            if call["resumed"]:
                if call["resumed"] in ("read", "readv") and call["thread"] in reading:
                    data = re.search(r'"([^"]*)"', call["more"])
                    reading.pop(call["thread"]).receive(unquote(data[1]) if data else b"")
                continue
            number = int(call["descriptor"])
            if call["name"] == "close":
                open_now.pop(number, None)
                continue
            descriptor = open_now.setdefault(number, Descriptor())
            if call["name"] == "write":
                self._sent(seen, descriptor, unquote(call["text"]), line)
            elif call["text"] is None:
                reading[call["thread"]] = descriptor
            elif not call["rest"].endswith(")"):  # an error has no text that counts
                descriptor.receive(unquote(call["text"]))
        return seen

    @staticmethod
    def _sent(seen: Seen, descriptor: Descriptor, message: bytes, line: str) -> None:
        op, req_id, _, length = HEADER.unpack(message[:16])
        seen.requests[Op(op).name] += 1
        seen.longest = max(seen.longest, len(message))
        if len(message) != 16 + length:
            seen.not_one_message.append(line[:200])
        if descriptor.unanswered:
            seen.not_alone.append(line[:200])
        descriptor.unanswered.add(req_id)


def unquote(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


@contextmanager
def traced(path: Path, trace: Path) -> Iterator[TracedMount]:
    """A mount by the device whose trace can be read afterwards."""
    mount = TracedMount(path, trace)
    try:
        mount.wait_mounted()
        yield mount
        subprocess.run(["umount", path], check=True, timeout=LIMIT)
        mount.process.wait(LIMIT)
    finally:
        mount.clear()
