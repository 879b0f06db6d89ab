"""What the documents say that one types, and what they say comes of it.

Two kinds of blocks are read.  A `console` block is a session in bash: lines that begin with `$ ` are
typed (`> ` goes on with one), the others are what is printed, standard error included; `...` stands for
anything within a line, and a line of it alone for any lines.  All sessions of a document are one bash.
A `sh` block that begins with `#!` is a script; the first word of its second line, after `#`, is its
name.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.support.host import REPOSITORY, Host
from tests.support.programs import Lines

_BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Command:
    """What is typed, and the lines that it prints."""

    typed: str
    output: list[str]


def blocks(document: str, kind: str) -> Iterator[str]:
    text = (REPOSITORY / document).read_text()
    for match in _BLOCK.finditer(text):
        if match["kind"] == kind:
            yield match["text"]


def session(document: str) -> list[Command]:
    """All that is typed in a document."""
    commands: list[Command] = []
    for block in blocks(document, "console"):
        goes_on = False
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append(Command(line[2:], []))
                goes_on = True
            elif goes_on and line.startswith("> "):
                commands[-1].typed += "\n" + line[2:]
            else:
                goes_on = False
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
    """Put them where programs are; their names."""
    directory = host.root / "usr" / "local" / "bin"
    for name, text in scripts(document).items():
        path = directory / name
        path.write_text(text)
        path.chmod(0o755)
    return list(scripts(document))


def play(host: Host, commands: Sequence[Command], before: str = "") -> list[list[str]]:
    """Type it all; what each command printed."""
    mark = "\x01"
    script = before + "".join(f"\n{command.typed}\nprintf '{mark}'" for command in commands)
    done = host.run(script)
    # A shell that nobody sits at tells the line, too.
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
"""clock_gettime(2): what file times are taken from.  It goes on with the kernel's tick."""


def wait_for_tick() -> None:
    """Nobody types two commands within one: what the second changes is newer than the first."""
    now = time.clock_gettime(CLOCK_REALTIME_COARSE)
    while time.clock_gettime(CLOCK_REALTIME_COARSE) == now:
        os.sched_yield()


def check_dialogue(document: str, host: Host, before: str = "") -> None:
    """The same where programs in the background print, too: each command is typed when all has come
    that is said to come of the one before."""
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
                    line = re.sub(r"^bash: line \d+: ", "bash: ", lines.next())
                    assert matches([expected], [line]), f"$ {command.typed}\n{line}"
            shell.stdin.write("jobs -p | xargs -r kill; echo end\n")
            shell.stdin.flush()
            assert lines.next() == "end"
        finally:
            shell.kill()


def check_session(document: str, host: Host, before: str = "") -> None:
    """The document must say what happens."""
    commands = session(document)
    assert commands
    wrong = []
    for command, printed in zip(commands, play(host, commands, before), strict=True):
        if not matches(command.output, printed):
            difference = difflib.ndiff(command.output, printed)
            wrong.append(f"$ {command.typed}\n" + "\n".join(difference))
    assert not wrong, f"{document} says otherwise:\n" + "\n".join(wrong)
