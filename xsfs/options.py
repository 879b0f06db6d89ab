"""The options: one table, from which parsing and help follow."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from xsfs.client import DEFAULT_TIMEOUT
from xsfs.wire import check_path

EMBEDDED: Final = "embedded"
AUTOMATIC_SOURCES: Final = frozenset(("xenstore", "none", "auto"))

DEFAULT_TX_TIMEOUT: Final = 60.0


class UsageError(Exception):
    """The command line makes no sense."""


@dataclass
class Options:
    """What the user asked for."""

    mountpoint: str
    source: str | None = None
    """A socket or device, `embedded`, or None: look for it."""
    foreground: bool = False
    debug: bool = False
    root: bytes | None = None
    """None: the home of the domain."""
    raw: bool = False
    ro: bool = False
    allow_other: bool = False
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int = 0o077
    timeout: float = DEFAULT_TIMEOUT
    tx_timeout: float = DEFAULT_TX_TIMEOUT
    listen: str | None = None
    domid: int = 0

    @property
    def embedded(self) -> bool:
        return self.source == EMBEDDED

    def fuse_options(self) -> set[str]:
        """What the kernel and libfuse are to know of it."""
        options = {"fsname=xenstore", "subtype=xsfs", "nosuid", "nodev", "noexec"}
        if self.ro:
            options.add("ro")
        if self.allow_other:
            # Then, and only then, the kernel must enforce the modes.
            options |= {"allow_other", "default_permissions"}
        return options


class Option(NamedTuple):
    """One name of `-o`: how its value is understood, None for a flag."""

    parse: Callable[[str], Any] | None
    placeholder: str
    help: str


def _root(text: str) -> bytes:
    path = text.encode()
    if not path.startswith(b"/"):
        raise ValueError("must begin with /")
    return check_path(path)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise ValueError("must be seconds, more than 0 and less than a day")
    return seconds


def _octal(text: str) -> int:
    if not re.fullmatch("0?[0-7]{1,3}", text):
        raise ValueError("must be octal, 777 at most")
    return int(text, 8)


def _number(text: str, limit: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= limit:
        raise ValueError(f"must be a number below {limit}")
    return int(text)


def _id(text: str) -> int:
    return _number(text, 0xFFFFFFFF)


def _domid(text: str) -> int:
    return _number(text, 0x7FF0)


OPTIONS: Final[dict[str, Option]] = {
    "root": Option(_root, "PATH", "show the store from PATH on, not from this domain's home"),
    "raw": Option(None, "", "values as they are: no newline is added or taken off"),
    "ro": Option(None, "", "mount read-only"),
    "allow_other": Option(None, "", "let other users in, as the modes say"),
    "uid": Option(_id, "N", "the owner of all files (default: who mounts)"),
    "gid": Option(_id, "N", "their group"),
    "umask": Option(_octal, "OCTAL", "what is cut from their modes (default: 077)"),
    "timeout": Option(
        _seconds,
        "SECONDS",
        f"how long one request to Xenstore may take (default: {DEFAULT_TIMEOUT:g})",
    ),
    "tx_timeout": Option(
        _seconds,
        "SECONDS",
        f"after how long without use a transaction is rolled back (default: {DEFAULT_TX_TIMEOUT:g})",
    ),
    "listen": Option(
        os.path.abspath, "SOCKET", "embedded store: serve it to other programs there, too"
    ),
    "domid": Option(_domid, "N", "embedded store: mount it as domain N sees it (default: 0)"),
}

IGNORED: Final = frozenset(
    (
        # mount(8), fstab and systemd add these; they are for them, or are always so anyway.
        *("defaults", "auto", "noauto", "user", "nouser", "users", "nofail", "_netdev"),
        *("dev", "nodev", "suid", "nosuid", "exec", "noexec", "sync", "async", "dirsync"),
        *("atime", "noatime", "relatime", "norelatime", "strictatime", "diratime", "nodiratime"),
        *("lazytime", "nolazytime", "group", "owner", "default_permissions"),
    )
)
IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "setuid=")


def split(texts: Iterable[str]) -> Iterable[str]:
    """The single options of repeated `-o a,b=c`.  A comma within a value is written `\\,`."""
    for text in texts:
        for part in re.split(r"(?<!\\),", text):
            if part:
                yield part.replace("\\,", ",")


def parse(texts: Sequence[str]) -> dict[str, Any]:
    """The values of the options given; UsageError for one that is unknown or makes no sense."""
    found: dict[str, Any] = {}
    for text in split(texts):
        name, equals, value = text.partition("=")
        option = OPTIONS.get(name)
        if text == "rw":
            found["ro"] = False  # the last of the two counts
            continue
        if option is None:
            if text in IGNORED or text.startswith(IGNORED_PREFIXES):
                continue
            raise UsageError(f"unknown option '{name}'")
        if option.parse is None:
            if equals:
                raise UsageError(f"the option '{name}' takes no value")
            found[name] = True
            continue
        if not value:
            raise UsageError(f"the option '{name}' needs a value: {name}={option.placeholder}")
        try:
            found[name] = option.parse(value)
        except ValueError as error:
            raise UsageError(f"the option '{name}={value}': {error}") from None
    return found


def help_lines() -> Iterable[str]:
    for name, option in OPTIONS.items():
        usage = f"{name}={option.placeholder}" if option.parse else name
        yield f"  {usage:<18} {option.help}"
