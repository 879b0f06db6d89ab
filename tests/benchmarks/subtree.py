"""`.ls` and `.json` of 10,000 nodes beside `xenstore-ls -f -p`, on both daemons.

    python -m tests.benchmarks.subtree [NODES]

Prints for each daemon the best of ROUNDS in seconds, and the ratio to xenstore-ls.  The rounds take turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.mounting import LIMIT, mounted, open_place

ROUNDS = 7
NODES = 10_000


def main(nodes: int) -> None:
    for daemon in ("C", "ocaml"):
        with (
            tempfile.TemporaryDirectory() as directory,
            open_place(daemon, Path(directory)) as place,
        ):
            top = f"{place.home}/data/bench"
            with place.witness() as client:
                for number in range(nodes // 10):
                    client.pipeline(
                        (
                            "WRITE",
                            f"{top}/{number // 100}/{number}/key{key}".encode()
                            + b"\0value %d" % key,
                        )
                        for key in range(9)
                    )
            with mounted([place.socket], Path(directory) / "m") as mount:
                shown = mount.path / "data" / "bench"
                commands = {
                    "xenstore-ls": ["xenstore-ls", "-f", "-p", top],
                    ".ls": ["cat", str(shown / ".ls")],
                    ".json": ["cat", str(shown / ".json")],
                }
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
                            timeout=LIMIT * 3,
                        )
                        best[name] = min(best[name], time.perf_counter() - start)
                for name, seconds in best.items():
                    print(
                        f"{daemon:6} {name:12} {seconds:7.3f} s {seconds / best['xenstore-ls']:5.2f}"
                    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else NODES)
