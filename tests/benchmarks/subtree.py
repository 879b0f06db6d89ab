"""`.ls` and `.json` beside `xenstore-ls -f -p` and beside a pipelined walk in C, on both daemons.

    python -m tests.benchmarks.subtree [NODES]

Prints for each daemon the best of ROUNDS in seconds, and the ratios to xenstore-ls and to the walk in C; then
the memory that one walk takes beyond the mount's own, beside its text, and how long a reader of a value waits
beside walks.  The rounds take turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.support.mounting import LIMIT, Mount, Place, mounted, open_place

ROUNDS: Final = 5
NODES: Final = 10_000
SOURCE: Final = Path(__file__).with_name("walk.c")


def fill(place: Place, top: str, nodes: int) -> None:
    """A directory for every nine leaves, and one for every ten of those."""
    with place.witness() as client:
        for number in range(nodes // 10):
            client.pipeline(
                ("WRITE", f"{top}/{number // 100}/{number}/key{key}".encode() + b"\0value %d" % key)
                for key in range(9)
            )


def best_times(commands: dict[str, list[str]], place: Place) -> dict[str, float]:
    environment = {**os.environ, "XENSTORED_PATH": place.socket}
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(ROUNDS):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                check=True,
                timeout=LIMIT * 10,
            )
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def status_of(mount: Mount, field: str) -> int:
    """A size in /proc/PID/status, in KiB."""
    for line in Path(f"/proc/{mount.process.pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def memory(mount: Mount, path: Path) -> tuple[int, int]:
    """How much more memory the mount takes with the text than before, and the size of the text, in KiB."""
    before = status_of(mount, "VmRSS")
    Path(f"/proc/{mount.process.pid}/clear_refs").write_text("5")  # VmHWM starts again
    with open(path, "rb", buffering=0) as file:
        peak = status_of(mount, "VmHWM")
        size = 0
        while part := file.read(1 << 20):
            size += len(part)
    return peak - before, size >> 10


def waits(path: Path, walk: list[str] | None) -> list[float]:
    """How long each open, read and close took, sorted: for two seconds, or until `walk` ends."""
    times = []
    end = time.perf_counter() + 2
    process = subprocess.Popen(walk, stdout=subprocess.DEVNULL) if walk else None
    while process.poll() is None if process else time.perf_counter() < end:
        start = time.perf_counter()
        path.read_bytes()
        times.append(time.perf_counter() - start)
    return sorted(times)


def main(nodes: int) -> None:
    for daemon in ("C", "ocaml"):
        with (
            tempfile.TemporaryDirectory() as directory,
            open_place(daemon, Path(directory)) as place,
        ):
            program = f"{directory}/walk"
            subprocess.run(["gcc", "-O2", "-o", program, SOURCE], check=True)
            top = f"{place.home}/data/bench"
            fill(place, top, nodes)
            with place.witness() as client:
                client.write(f"{place.home}/data/one", b"1")
            with mounted([place.socket], Path(directory) / "m") as mount:
                data = mount.path / "data"
                taken, size = memory(mount, data / "bench" / ".ls")
                best = best_times(
                    {
                        "xenstore-ls": ["xenstore-ls", "-f", "-p", top],
                        "C": [program, place.socket, top],
                        ".ls": ["cat", str(data / "bench" / ".ls")],
                        ".json": ["cat", str(data / "bench" / ".json")],
                    },
                    place,
                )
                for name, seconds in best.items():
                    ratios = [seconds / best[other] for other in ("xenstore-ls", "C")]
                    print(f"{daemon:6} {name:12} {seconds:7.3f} s", *(f"{r:5.2f}" for r in ratios))
                print(f"{daemon:6} memory {taken} KiB, {taken / size:.2f} times the text")
                for name, walk in (
                    ("alone", None),
                    ("beside", ["cat", str(data / "bench" / ".ls")]),
                ):
                    times = waits(data / "one", walk)
                    p99 = times[-1 - len(times) // 100] * 1000
                    print(f"{daemon:6} {len(times)} reads {name}: p99 {p99:.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else NODES)
