"""Put the parts that are made from the program's tables and docstrings into the manual, the completions and
the reference of the Python interface.

    python3 -m docs.generate

A generated part stands between a line with "generated: NAME" at its end and one with "end of
generated".  Everything else in these files is written by hand.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import xsfs
import xsfs.sync
from xsfs import __version__
from xsfs.cli import watch
from xsfs.cli.exit_statuses import STATUSES
from xsfs.cli.main import argument_parser
from xsfs.cli.options import OPTIONS, Option
from xsfs.xenstore.commands import Commands

WIDTH: Final = 80
"""The longest line for which mandoc(1) does not warn."""

DOCUMENTS: Final = Path(__file__).resolve().parent

FILES: Final = {"SOCKET": "_files", "DIR": "_directories"}
"""Placeholders that mean a file or directory of this machine, and zsh's function that completes it."""

NO_VALUE, A_VALUE, PERHAPS = "no value", "a value", "perhaps a value"


_PART = re.compile(
    r"^(?P<begin>[^\n]* generated: (?P<name>[^\n]*?)(?: -->)?\n)"
    r"(?P<text>.*?)(?P<end>[^\n]* end of generated(?: -->)?$)",
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


FLAGS: Final = {
    (action.option_strings[0], action.option_strings[1]): action.help or ""
    for action in argument_parser()._actions
    if len(action.option_strings) == 2
}
"""The help of each flag, by its two names."""

FLAG_DETAILS: Final = {
    "-d": "Each line has the operation, the Xenstore path, the result, and the time in microseconds. "
    "Values are not logged, only their lengths."
}

MOUNT_FLAGS: Final = {
    "-r": "the same as -o ro",
    "-w": "the same as -o rw",
    "-s": "ignore unknown options of -o",
    "-n": "ignored, for compatibility with mount(8)",
    "-v": "print the source and the mountpoint after mounting",
}


def manual_flags() -> Iterator[str]:
    for (letter, name), help in FLAGS.items():
        yield f".It Fl {letter[1:]} , Fl {name[1:]}"
        yield from sentences(help, FLAG_DETAILS.get(letter, ""))


def manual_mount_flags() -> Iterator[str]:
    for letter, help in MOUNT_FLAGS.items():
        yield f".It Fl {letter[1:]}"
        yield from sentences(help, "")


def watch_words() -> Iterator[str]:
    actions = watch.argument_parser()._actions
    # --help comes first there, and last here.
    words = [word for action in (*actions[1:], actions[0]) for word in action.option_strings]
    yield f"    local flags='{' '.join(words)}'"


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
    yield f"    local flags='-o {' '.join(f'{letter} {name}' for letter, name in FLAGS)}'"
    yield f"    local options='{' '.join(OPTIONS)} rw'"
    yield f"    local valued='{' '.join(valued)}'"
    yield f"    local of_files='{' '.join(of_files)}'"


def zsh_flags() -> Iterator[str]:
    for (letter, name), help in FLAGS.items():
        yield f"    '({letter} {name})'{{{letter},{name}}}'[{zsh_text(help)}]'"


def zsh_options() -> Iterator[str]:
    for name, option in OPTIONS.items():
        value = f":{option.placeholder}:{FILES.get(option.placeholder, ' ')}"
        written = {NO_VALUE: "", A_VALUE: value, PERHAPS: f":{value}"}
        yield f"    '{name}[{zsh_text(option.help)}]{written[value_of(option)]}'"
    yield "    'rw[mount for reading and writing]'"


def zsh_text(text: str) -> str:
    return re.sub(r"[\[\]:]", r"\\\g<0>", text).replace("'", r"'\''")


# ---------------------------------------------------------------------------------- the reference

WIDE: Final = 115
"""The longest line of a document."""

INTERNAL: Final = frozenset(
    (
        *("abandon", "begin", "connect", "drop_connection", "finish"),
        *("roll_back", "pipelines", "walk_in_windows", "alert", "put"),
    )
)
"""Methods of the public classes that only the file system uses."""

ERRORS: Final = tuple(
    getattr(xsfs, name)
    for name in sorted(xsfs.__all__)
    if inspect.isclass(getattr(xsfs, name)) and issubclass(getattr(xsfs, name), xsfs.StoreError)
)


def markdown(docstring: str) -> Iterator[str]:
    """A docstring's paragraphs.  Lines "NAME   TEXT" become a list."""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        items = re.sub(r"^(\w+) {2,}", r"- `\1`: ", paragraph, flags=re.MULTILINE)
        is_list = items != paragraph
        for item in re.split(r"\n(?=- )", items) if is_list else [paragraph]:
            text = " ".join(item.split())
            yield from textwrap.wrap(
                text, WIDE, subsequent_indent="  " if is_list else "", break_on_hyphens=False
            )
        yield ""


def call_of(name: str, function: Callable[..., Any]) -> str:
    """How to call it."""
    whole = inspect.unwrap(function)
    signature = inspect.signature(whole)
    result = str(signature.return_annotation)
    parameters = [each for each in signature.parameters.values() if each.name != "self"]
    shown = str(inspect.Signature(parameters)).replace("'", "")
    given = re.sub(r"^\w+\[(.*)\]$", r"\1", result)
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        keyword = "async for" if inspect.isasyncgenfunction(function) else "for"
        return f"{keyword} {given} in {name}{shown}"
    if given != result and ("ContextManager[" in result or whole is not function):
        keyword = "async with" if "Async" in result else "with"
        return f"{keyword} {name}{shown} as {given}"
    return f"{'await ' if inspect.iscoroutinefunction(function) else ''}{name}{shown} -> {result}"


def entry(name: str, function: Callable[..., Any]) -> Iterator[str]:
    call = call_of(name.rpartition(".")[2], function)
    yield from (f"### {name}", "", f"    {call}", "")
    yield from markdown(function.__doc__ or "")


def class_entries(kind: type, name: str) -> Iterator[str]:
    """The methods that a class defines itself, without the operations that it inherits."""
    yield from (f"## {name}", "")
    yield from markdown(kind.__doc__ or "")
    for method, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else value
        if not inspect.isfunction(function) or method.startswith("_") or method in INTERNAL:
            continue
        if kind is not Commands and method in vars(Commands) and issubclass(kind, Commands):
            continue
        if isinstance(value, property):
            yield from (f"### {name}.{method}", "", f"    {method}", "")
            yield from markdown(function.__doc__ or "")
        else:
            yield from entry(f"{name}.{method}", function)


def reference() -> Iterator[str]:
    yield ""
    yield from entry("open_store", xsfs.open_store)
    yield from class_entries(Commands, "Operations")
    for kind in xsfs.Store, xsfs.Transaction, xsfs.Subscription, xsfs.Permission:
        yield from class_entries(kind, kind.__name__)
    for function in xsfs.parse_permissions, xsfs.format_permissions:
        yield from entry(function.__name__, function)
    yield from ("## Errors", "")
    for error in ERRORS:
        bases = ", ".join(base.__name__ for base in error.__bases__)
        yield from (f"### {error.__name__}", "", f"    class {error.__name__}({bases})", "")
        yield from markdown(error.__doc__ or "")


def sync_reference() -> Iterator[str]:
    yield ""
    yield from entry("xsfs.sync.open_store", xsfs.sync.open_store)
    for kind in xsfs.sync.SyncStore, xsfs.sync.SyncTransaction, xsfs.sync.SyncWatch:
        yield from class_entries(kind, kind.__name__)


PARTS: Final[Mapping[str, Callable[[], Iterable[str]]]] = {
    "version": manual_version,
    "flags": manual_flags,
    "mount flags": manual_mount_flags,
    "options": manual_options,
    "exit statuses": lambda: manual_statuses(STATUSES),
    "exit statuses of xsfs-watch": lambda: manual_statuses(watch.STATUSES),
    "words": bash_words,
    "words of xsfs-watch": watch_words,
    "flags of zsh": zsh_flags,
    "options of zsh": zsh_options,
    "reference": reference,
    "reference of xsfs.sync": sync_reference,
}

FILES_WITH_PARTS: Final = tuple(
    DOCUMENTS / name
    for name in (
        "xsfs.8",
        "xsfs-watch.1",
        "completion/xsfs",
        "completion/_xsfs",
        "completion/xsfs-watch",
        "python-reference.md",
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
