"""Record a short session in a terminal as docs/session.svg.

    python3 -m docs.record

Needs root.  bash runs on a pseudo terminal, in a host of its own with C xenstored and two guests.  The
picture shows each line after the time that the session took for it, and a pause before each command.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tests.support.host import Host, open_host
from tests.support.xenstored.harness import RealXenstored

PICTURE: Final = Path(__file__).with_name("session.svg")

PROMPT: Final = "dom0# "
COLUMNS: Final = 76
ROWS: Final = 40
LIMIT: Final = 60.0
"""Seconds that a command may take."""

PAUSE: Final = 1.2
"""Seconds before a command appears, for the reader."""

GUEST: Final = 7
CHANGES: Final = {"data/load": "0.71", "data/os_uptime": "86412"}
"""Values that the guest writes while the session watches it."""

SESSION: Final = (
    "xsfs /mnt/xenstore",
    "cd /mnt/xenstore/.domain/guest-7",
    "ls",
    "cat name device/vif/0/mac",
    "cat data/.watch       # the guest changes something; Ctrl-C",
    "cat data/load",
    "jq -cM .memory < .json",
    "t=/mnt/xenstore/.transaction/t; mkdir $t",
    "echo 1048576 > $t/.domain/guest-7/memory/target; cat memory/target",
    "echo commit > $t/.control; cat memory/target",
    "cd; umount /mnt/xenstore",
)


@dataclass(frozen=True)
class Line:
    """One line of the terminal, and the second in which it appeared."""

    text: str
    second: float


class Terminal:
    """bash on a pseudo terminal.  `lines` is everything that it has shown, by line."""

    def __init__(self, host: Host) -> None:
        self.lines: list[Line] = []
        self._text = ""
        self._second = 0.0
        """The time of the recording: pauses of the typist, and what commands have taken."""
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            environment = {"PS1": PROMPT, "TERM": "dumb", "LC_ALL": "C", "HOME": "/root"}
            environment["PATH"] = os.environ["PATH"]
            shell = ["bash", "--norc", "--noprofile", "--noediting", "-i"]
            os.execvpe(host.enter[0], [*host.enter, "--wdns=/mnt", *shell], environment)
        size = struct.pack("HHHH", ROWS, COLUMNS, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        os.close(self._terminal)
        os.waitpid(self._process, 0)

    def pause(self) -> None:
        self._second += PAUSE

    def type(self, text: str) -> None:
        self.pause()
        os.write(self._terminal, text.encode())

    def read_until(self, pattern: str) -> None:
        """Read until the text since the last complete line ends with this."""
        start, begun = time.monotonic(), self._second
        while re.search(pattern, self._text) is None:
            left = start + LIMIT - time.monotonic()
            if not select.select([self._terminal], [], [], max(left, 0.0))[0]:
                raise TimeoutError(f"{pattern!r} has not come after {self._text!r}")
            self._text += os.read(self._terminal, 65536).decode().replace("\r", "")
            self._second = begun + time.monotonic() - start
            *complete, self._text = self._text.split("\n")
            self.lines += [Line(text.expandtabs(), self._second) for text in complete]
            if any(re.search(pattern, text) for text in complete):
                return


@contextmanager
def recording(host: Host) -> Iterator[Terminal]:
    terminal = Terminal(host)
    try:
        yield terminal
    finally:
        terminal.close()


def record() -> list[Line]:
    """The lines of the session."""
    with RealXenstored("C", guests=(GUEST, GUEST + 2)) as daemon:
        daemon.populate()
        with (
            daemon.client(domid=GUEST) as guest,
            open_host(daemon.socket) as host,
            recording(host) as terminal,
        ):
            terminal.read_until(f"{PROMPT}$")
            for command in SESSION:
                terminal.type(f"{command}\n")
                terminal.read_until(re.escape(command[:40]))
                if ".watch" in command:
                    terminal.read_until(r"^\.$")
                    for path, value in CHANGES.items():
                        terminal.pause()
                        guest.write(path, value)
                        terminal.read_until(f"^{Path(path).name}$")
                    terminal.type("\x03")
                terminal.read_until(f"{PROMPT}$")
            return terminal.lines


# ------------------------------------------------------------------------------------ the picture

FONT: Final = 14
WIDTH_OF_CHARACTER: Final = 8.43
HEIGHT_OF_LINE: Final = 20
MARGIN: Final = 16

STYLE: Final = """
text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #c9d1d9 }
text { white-space: pre }
.typed { fill: #ffffff; font-weight: bold }
@keyframes appear { from { visibility: hidden } }
text { animation: appear 1ms backwards }
@media (prefers-reduced-motion: reduce) { text { animation: none } }
"""
"""Without animation a viewer shows all lines."""


def draw(lines: Sequence[Line]) -> str:
    width = round(COLUMNS * WIDTH_OF_CHARACTER + 2 * MARGIN)
    height = len(lines) * HEIGHT_OF_LINE + 2 * MARGIN
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
    for name, value in (("viewBox", f"0 0 {width} {height}"), ("font-size", str(FONT))):
        svg.set(name, value)
    ElementTree.SubElement(svg, "title").text = "A session with a mount of xsfs"
    ElementTree.SubElement(svg, "style").text = STYLE
    ElementTree.SubElement(svg, "rect", width="100%", height="100%", rx="6", fill="#161b22")
    for number, line in enumerate(lines, 1):
        text = ElementTree.SubElement(svg, "text", x=str(MARGIN))
        text.set("y", str(number * HEIGHT_OF_LINE + MARGIN - 6))
        text.set("style", f"animation-delay: {line.second:.2f}s")
        if line.text.startswith(PROMPT):
            text.set("class", "typed")
        text.text = line.text
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def shown() -> list[str]:
    """The lines of the picture."""
    texts = ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")
    return [text.text or "" for text in texts]


def main() -> int:
    PICTURE.write_text(draw(record()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
