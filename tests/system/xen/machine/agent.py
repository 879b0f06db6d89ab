"""In the domU: do what dom0's checks ask for on the console (guest.py beside them).

A line in is a script, in Base64; a line out is its status and what it printed, in Base64 behind a mark,
since the kernel may print on the console, too.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tty

MARK = "agent:"


def answer(status: int, output: str) -> None:
    text = base64.b64encode(json.dumps([status, output]).encode()).decode()
    print(f"\n{MARK}{text}", flush=True)


def main() -> None:
    tty.setraw(0)
    answer(0, "ready")
    for line in sys.stdin:
        try:
            limit, script = json.loads(base64.b64decode(line))
        except ValueError:
            continue  # what was typed before the terminal was raw
        try:
            done = subprocess.run(
                ["bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            answer(124, (error.stdout or b"").decode(errors="replace"))
        else:
            answer(done.returncode, done.stdout.decode(errors="replace"))


main()
