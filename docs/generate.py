"""Put the parts that are made from the program's tables into the manual and the completions.

    python3 -m docs.generate

A generated part stands between a line that ends with "generated: NAME" and one that ends with "end of
generated".  Everything else in these files is written by hand.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from xsfs import __version__
from xsfs.cli import watch
from xsfs.cli.exit_statuses import STATUSES
from xsfs.cli.options import FLAGS, MOUNT_FLAGS, OPTIONS, Flag, Option

WIDTH: Final = 80
"""The longest line for which mandoc(1) does not warn."""

DOCUMENTS: Final = Path(__file__).resolve().parent

FILES: Final = {"SOCKET": "_files", "DIR": "_directories"}
"""Placeholders that mean a file or directory of this machine, and zsh's function that completes it."""

NO_VALUE, A_VALUE, PERHAPS = "no value", "a value", "perhaps a value"


_PART = re.compile(
    r"^(?P<begin>[^\n]* generated: (?P<name>[^\n]*)\n)(?P<text>.*?)(?P<end>[^\n]* end of generated$)",
    re.DOTALL | re.MULTILINE,
)


def value_of(option: Option) -> str:
    """Whether the option has a value."""
    if option.parse is None:
        return NO_VALUE
    return A_VALUE if option.without_value is None else PERHAPS


def sentences(help: str, details: str) -> Iterator[str]:
    """Whole sentences, one a line as mdoc(7) requires.  Backslashes keep dashes as they are,
    and names that begin with a dot from being taken for macros."""
    text = f"{help[0].upper()}{help[1:]}. {details}".strip()
    for sentence in re.split(r"(?<=\.) ", text):
        dashed = re.sub(r"(?<!\S)-(?=\w)", r"\\-", sentence)
        for line in textwrap.wrap(dashed, WIDTH, break_long_words=False, break_on_hyphens=False):
            yield rf"\&{line}" if line.startswith(".") else line


# ---------------------------------------------------------------------------------- the manual


def manual_version() -> Iterator[str]:
    yield f".Os xsfs {__version__}"


def manual_flags(flags: Iterable[Flag]) -> Iterator[str]:
    for flag in flags:
        yield f".It Fl {flag.letter}" + (f" , Fl -{flag.name}" if flag.name else "")
        yield from sentences(flag.help, flag.details)


def manual_options() -> Iterator[str]:
    for name, option in OPTIONS.items():
        value = f"= Ns Ar {option.placeholder}"
        written = {NO_VALUE: "", A_VALUE: f" Ns {value}", PERHAPS: f" Ns Op {value}"}
        yield f".It Cm {name}{written[value_of(option)]}"
        yield from sentences(option.help, option.details)


def manual_statuses(statuses: Mapping[int, str]) -> Iterator[str]:
    for status, text in statuses.items():
        yield f".It {status}"
        yield from sentences(text, "")


# ------------------------------------------------------------------------------- the completions


def bash_words() -> Iterator[str]:
    valued = (name for name, option in OPTIONS.items() if value_of(option) == A_VALUE)
    of_files = (name for name, option in OPTIONS.items() if option.placeholder in FILES)
    yield f"    local flags='-o {' '.join(f'-{flag.letter} --{flag.name}' for flag in FLAGS)}'"
    yield f"    local options='{' '.join(OPTIONS)} rw'"
    yield f"    local valued='{' '.join(valued)}'"
    yield f"    local of_files='{' '.join(of_files)}'"


def zsh_flags() -> Iterator[str]:
    for flag in FLAGS:
        both = f"(-{flag.letter} --{flag.name})"
        names = f"{{-{flag.letter},--{flag.name}}}"
        yield f"    '{both}'{names}'[{zsh_text(flag.help)}]'"


def zsh_options() -> Iterator[str]:
    for name, option in OPTIONS.items():
        value = f":{option.placeholder}:{FILES.get(option.placeholder, ' ')}"
        written = {NO_VALUE: "", A_VALUE: value, PERHAPS: f":{value}"}
        yield f"    '{name}[{zsh_text(option.help)}]{written[value_of(option)]}'"
    yield "    'rw[mount for reading and writing]'"


def zsh_text(text: str) -> str:
    return re.sub(r"[\[\]:]", r"\\\g<0>", text).replace("'", r"'\''")


PARTS: Final[Mapping[str, Callable[[], Iterable[str]]]] = {
    "version": manual_version,
    "flags": lambda: manual_flags(FLAGS),
    "mount flags": lambda: manual_flags(MOUNT_FLAGS),
    "options": manual_options,
    "exit statuses": lambda: manual_statuses(STATUSES),
    "exit statuses of xsfs-watch": lambda: manual_statuses(watch.STATUSES),
    "words": bash_words,
    "words of xsfs-watch": lambda: [f"    local flags='{' '.join(watch.FLAGS)}'"],
    "flags of zsh": zsh_flags,
    "options of zsh": zsh_options,
}

FILES_WITH_PARTS: Final = tuple(
    DOCUMENTS / name
    for name in (
        "xsfs.8",
        "xsfs-watch.1",
        "completion/xsfs",
        "completion/_xsfs",
        "completion/xsfs-watch",
    )
)


def generated(text: str) -> str:
    """The text of a file with up-to-date parts."""

    def part(match: re.Match[str]) -> str:
        lines = PARTS[match["name"]]()
        return match["begin"] + "".join(f"{line}\n" for line in lines) + match["end"]

    return _PART.sub(part, text)


def main() -> int:
    for path in FILES_WITH_PARTS:
        path.write_text(generated(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
