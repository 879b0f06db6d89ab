"""The commands, scripts and programs in the documents, and their output.

A `console` block is a session in bash.  Lines that start with `$ ` are typed, and `> ` continues such a
line.  The other lines are the output, standard error included.  `...` stands for anything in a line, and
a line `...` for any lines.  One bash runs all sessions of a document.

A `sh` block that starts with `#!` is a script.  The first word of its second line, after `#`, is its
name.  Other kinds of blocks are read by their tests.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.support.host import REPOSITORY, Host
from tests.support.mounting import LIMIT
from tests.support.programs import Lines

_BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Command:
    """One typed command, and the lines that it prints."""

    typed: str
    output: list[str]


def blocks(document: str, kind: str) -> Iterator[str]:
    text = (REPOSITORY / document).read_text()
    for match in _BLOCK.finditer(text):
        if match["kind"] == kind:
            yield match["text"]


def session(document: str) -> list[Command]:
    """All commands of a document."""
    commands: list[Command] = []
    for block in blocks(document, "console"):
        continues = False
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append(Command(line[2:], []))
                continues = True
            elif continues and line.startswith("> "):
                commands[-1].typed += "\n" + line[2:]
            else:
                continues = False
                commands[-1].output.append(line)
    return commands


def scripts(document: str) -> dict[str, str]:
    """The scripts of a document, by their names."""
    found = {}
    for block in blocks(document, "sh"):
        if block.startswith("#!"):
            words = block.splitlines()[1].split()
            found[words[1].rstrip(":")] = block
    return found


def install_scripts(document: str, host: Host) -> list[str]:
    """Install the scripts of a document on the host; returns their names."""
    directory = host.root / "usr" / "local" / "bin"
    for name, text in scripts(document).items():
        path = directory / name
        path.write_text(text)
        path.chmod(0o755)
    return list(scripts(document))


def play(host: Host, commands: Sequence[Command], before: str = "") -> list[list[str]]:
    """Run the commands; returns the lines that each has printed."""
    mark = "\x01"
    script = before + "".join(f"\n{command.typed}\nprintf '{mark}'" for command in commands)
    done = host.finish(host.start(script), LIMIT * len(commands))
    # A shell without a terminal adds the number of the line.
    printed = re.sub(rf"(^|{mark})bash: line \d+: ", r"\1bash: ", done.stdout, flags=re.MULTILINE)
    outputs = printed.split(mark)
    assert len(outputs) == len(commands) + 1, printed
    return [output.splitlines() for output in outputs[:-1]]


def matches(expected: Sequence[str], printed: Sequence[str]) -> bool:
    pattern = "".join(
        r"(?:[^\n]*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", "[^\n]*") + r"\n"
        for line in expected
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in printed)) is not None


CLOCK_REALTIME_COARSE = 5
"""clock_gettime(2): the clock of file times.  It advances with the kernel's tick."""


def wait_for_tick() -> None:
    """Return in the next tick, so that the next command's changes are newer than the last one's."""
    now = time.clock_gettime(CLOCK_REALTIME_COARSE)
    while time.clock_gettime(CLOCK_REALTIME_COARSE) == now:
        os.sched_yield()


def check_dialogue(document: str, host: Host, before: str = "") -> None:
    """As check_session, for documents in which programs in the background print.  Each command is typed
    when all lines of the command before it have arrived."""
    commands = session(document)
    assert commands
    with host.shell(before) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        lines = Lines(shell.stdout.fileno())
        try:
            for command in commands:
                wait_for_tick()
                shell.stdin.write(f"{command.typed}\n")
                shell.stdin.flush()
                for expected in command.output:
                    try:
                        printed = lines.next()
                    except AssertionError as error:
                        raise AssertionError(f"$ {command.typed}\n{error}") from None
                    line = re.sub(r"^bash: line \d+: ", "bash: ", printed)
                    assert matches([expected], [line]), f"$ {command.typed}\n{line}"
            shell.stdin.write("jobs -p | xargs -r kill; echo end\n")
            shell.stdin.flush()
            assert lines.next() == "end"
        finally:
            shell.kill()


def check_session(document: str, host: Host, before: str = "", *, omit: Sequence[str] = ()) -> None:
    """The commands, except those to omit, must print what the document shows."""
    commands = [command for command in session(document) if command.typed not in omit]
    assert commands
    wrong = []
    for command, printed in zip(commands, play(host, commands, before), strict=True):
        if not matches(command.output, printed):
            difference = difflib.ndiff(command.output, printed)
            wrong.append(f"$ {command.typed}\n" + "\n".join(difference))
    assert not wrong, f"{document} shows something else:\n" + "\n".join(wrong)
