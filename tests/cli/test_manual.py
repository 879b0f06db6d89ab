"""The manual and the completions agree with the program, and their readers accept them."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from docs.generate import DOCUMENTS, FILES_WITH_PARTS, generated, sentences
from tests.support.mounting import LIMIT, mounted
from xsfs import __version__
from xsfs.cli.main import argument_parser
from xsfs.cli.options import OPTIONS

MANUAL = DOCUMENTS / "xsfs.8"
LINK = DOCUMENTS / "mount.xsfs.8"
COMPLETION = DOCUMENTS / "completion"


# ------------------------------------------------------------------------------------- the manual


@pytest.mark.parametrize("path", FILES_WITH_PARTS, ids=lambda path: path.name)
def test_generated_parts_are_of_today(path: Path) -> None:
    text = path.read_text()
    assert generated(text) == text, "python3 -m docs.generate"


def test_a_part_is_replaced_and_nothing_else() -> None:
    old = 'x\n.\\" generated: exit statuses\nold\n.\\" end of generated\ny\n'
    lines = generated(old).splitlines()
    assert lines[:2] == ["x", '.\\" generated: exit statuses']
    assert lines[2:4] == [".It 0", "Mounted."]
    assert lines[-2:] == ['.\\" end of generated', "y"]


def test_no_text_is_taken_for_a_macro() -> None:
    lines = list(sentences("the first", ".watch is one. " + "word " * 14 + "and .mirror"))
    assert [line.partition(" ")[0] for line in lines] == ["The", r"\&.watch", "word", r"\&.mirror"]


def test_man_finds_nothing_wrong() -> None:
    """With man(1)'s own warnings, which are groff's."""
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(MANUAL)],
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert done.stderr == ""


def test_mandoc_finds_nothing_wrong() -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "style", str(MANUAL)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # that this system has no database of pages
        text=True,
        timeout=LIMIT,
        check=False,
    )
    # This system need not have the manuals that are referred to.
    said = [line for line in done.stdout.splitlines() if "referenced manual not found" not in line]
    assert said == []


def page(*arguments: str) -> str:
    done = subprocess.run(
        ["man", "-l", *arguments],
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "100", "MAN_KEEP_FORMATTING": ""},
        cwd=DOCUMENTS,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    return re.sub(".\b", "", done.stdout)


def test_the_page_has_every_option() -> None:
    text = page(str(MANUAL))
    for name in OPTIONS:
        assert re.search(rf"^ +{name}(=|\s|$)", text, re.MULTILINE), name
    flags = [names for action in argument_parser()._actions if (names := action.option_strings)]
    assert len(flags) == 10
    for names in flags:
        assert ", ".join(names) in text


def test_mount_xsfs_is_the_same_page(tmp_path: Path) -> None:
    section = tmp_path / "man8"
    section.mkdir()
    for path in (MANUAL, LINK):
        (section / path.name).write_text(path.read_text())
    done = subprocess.run(
        ["man", "-M", str(tmp_path), "8", "mount.xsfs"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert "XENSTORED_PATH" in done.stdout


def test_the_manual_has_every_counter(tmp_path: Path) -> None:
    with mounted(["embedded"], tmp_path / "m") as mount:
        lines = (mount.path / ".stats").read_text().splitlines()
    text = MANUAL.read_text()
    counters = text[text.index(".Pa .stats\nhas one") : text.index(".Ss Errors")]
    described = re.findall(r"^\.It Cm ([a-z_]+)", counters, re.MULTILINE)
    assert described == [line.split()[0] for line in lines]


def test_the_manual_has_the_version_and_the_usual_sections() -> None:
    text = page(str(MANUAL))
    assert text.splitlines()[-1].startswith(f"xsfs {__version__} ")
    for section in ("COMPATIBILITY", "AUTHORS", "CAVEATS", "BUGS"):
        assert f"\n{section}\n" in text


def test_the_synopsis_can_be_typed() -> None:
    synopsis = page(str(MANUAL)).partition("SYNOPSIS")[2].partition("DESCRIPTION")[0]
    assert "|" not in synopsis
    assert "mount -t xsfs " in synopsis


# -------------------------------------------------------------------------------- the completions

SHELLS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        f". /usr/share/bash-completion/bash_completion; . {COMPLETION}/xsfs",
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        f"fpath=({COMPLETION} $fpath); autoload -U compinit; compinit -u -D",
    ),
}


class Terminal:
    """An interactive shell on a pseudo terminal."""

    def __init__(self, arguments: list[str], directory: Path) -> None:
        # TERM=dumb switches zsh's line editor off.
        environment = {"PATH": os.environ["PATH"], "TERM": "vt100", "HOME": str(directory)}
        environment |= {"LC_ALL": "C.UTF-8", "INPUTRC": "/dev/null"}
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(directory)
            os.execvpe(arguments[0], arguments, environment)
        self._number = 0

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.process, 0)

    def read_until(self, pattern: str) -> re.Match[str]:
        text = ""
        deadline = time.monotonic() + LIMIT
        while not (found := re.search(pattern, text, re.DOTALL)):
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self.terminal], [], [], max(left, 0))
            assert readable, f"not in time: {pattern!r} in {text!r}"
            text += os.read(self.terminal, 65536).decode(errors="replace")
        return found

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def run(self, command: str) -> None:
        self._number += 1
        # The pattern must not match the echo of the command line.
        self.type(f"{command}; echo do''ne-{self._number}-\r")
        self.read_until(f"done-{self._number}-\r?\n")

    def completed(self, line: str) -> list[str]:
        """The words of the line after a tab."""
        self._number += 1
        # Go to the beginning of the line, and type a printf there.
        number = f"e''nd-{self._number}-"
        self.type(f"{line}\t\x01printf '<%s>' \x05 {number}; echo\r")
        found = self.read_until(rf"\r?\n?(<(?:(?!<end)[^\r\n])*)<end-{self._number}->")
        # zsh removes a slash that it has added itself.
        return [word.removesuffix("/") for word in re.findall("<([^>]*)>", found[1])]

    def listed(self, line: str, *words: str) -> None:
        """These are offered after two tabs."""
        self.type(f"{line}\t\t")
        self.read_until("^" + "".join(rf"(?=.*\b{word}\b)" for word in words))
        self.type("\x03")
        self.run("true")


@contextmanager
def open_terminal(shell: str, directory: Path) -> Iterator[Terminal]:
    arguments, setup = SHELLS[shell]
    terminal = Terminal(arguments, directory)
    try:
        terminal.run(setup)
        yield terminal
    finally:
        terminal.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, tmp_path: Path) -> None:
    (tmp_path / "sockets").mkdir()
    (tmp_path / "mountpoint").mkdir()
    with open_terminal(shell, tmp_path) as terminal:
        for line, *words in (
            ("xsfs --deb", "xsfs", "--debug"),
            ("xsfs -o um", "xsfs", "-o", "umask="),
            ("xsfs -o raw,root=/,um", "xsfs", "-o", "raw,root=/,umask="),
            ("xsfs -o vis", "xsfs", "-o", "visible"),
            ("xsfs -o root=/,ra", "xsfs", "-o", "root=/,raw"),
            ("xsfs -o ro,listen=soc", "xsfs", "-o", "ro,listen=sockets"),
            ("xsfs emb", "xsfs", "embedded"),
            ("xsfs embedded mou", "xsfs", "embedded", "mountpoint"),
        ):
            assert terminal.completed(line) == words
        terminal.listed("xsfs -o ", *OPTIONS)
        terminal.listed("xsfs -o raw,", *OPTIONS.keys() - {"raw"})
