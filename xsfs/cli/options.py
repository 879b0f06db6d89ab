"""The options: tables from which parsing, `--help`, the manual and the completions follow."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from xsfs.view.ownership import Ownership
from xsfs.xenstore.errors import DEFAULT_TIMEOUT
from xsfs.xenstore.protocol import check_path
from xsfs.xenstore.ssh import (
    DEFAULT_SSH,
    SshDestination,
    is_remote,
    parse_command,
    parse_destination,
)

EMBEDDED: Final = "embedded"
DEFAULT_LABEL: Final = "xenstore"
AUTOMATIC_SOURCES: Final = frozenset(("xenstore", "none", "auto"))

DEFAULT_TX_TIMEOUT: Final = 60.0


def source_of(text: str) -> str:
    """The source meant.  mount(8) makes an absolute path of any word that is also the name of a file in
    its working directory: `cd /mnt; mount -t xsfs xenstore /mnt/xenstore`."""
    word = os.path.basename(text)
    if word in AUTOMATIC_SOURCES | {EMBEDDED} and os.path.isdir(text):
        return word
    if is_remote(text):
        try:
            parse_destination(text)
        except ValueError as error:
            raise UsageError(f"the source '{text}' {error}") from None
    return text


class UsageError(Exception):
    """The command line makes no sense."""


@dataclass
class Options:
    """What the user asked for."""

    mountpoint: str
    source: str | None = None
    """A socket or device, `[USER@]HOST:[SOCKET]`, `embedded`, or None: look for it."""
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
    mirror: str | None = None
    """The directory of the live mirror; empty: one by the mountpoint's name."""
    listen: str | None = None
    domid: int = 0
    ssh_command: tuple[str, ...] = (DEFAULT_SSH,)

    @property
    def embedded(self) -> bool:
        return self.source == EMBEDDED

    @property
    def destination(self) -> SshDestination | None:
        """The other host whose Xenstore is meant."""
        if self.source is None or not is_remote(self.source):
            return None
        return parse_destination(self.source)

    @property
    def label(self) -> str:
        """The source as mount(8), findmnt(8) and df(1) show it: what was given, so that `mount -a`
        knows it again."""
        source = self.source or DEFAULT_LABEL
        return source if source.isascii() and source.isprintable() else DEFAULT_LABEL

    @property
    def ownership(self) -> Ownership:
        return Ownership(self.uid, self.gid, self.umask)

    def fuse_options(self) -> set[str]:
        """What the kernel and libfuse are to know of it."""
        # libfuse takes a comma for the end of an option.
        label = self.label.replace("\\", "\\\\").replace(",", "\\,")
        options = {f"fsname={label}", "subtype=xsfs", "nosuid", "nodev", "noexec"}
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
    details: str = ""
    """What the manual says after `help`, in whole sentences."""
    without_value: str | None = None
    """What is meant by the name alone; None where a value is needed."""


class Flag(NamedTuple):
    """One flag of the command line."""

    letter: str
    name: str
    """After two dashes; empty for what mount(8) alone passes on."""
    help: str
    details: str = ""


FLAGS: Final = (
    Flag("f", "foreground", "stay in the foreground"),
    Flag(
        "d",
        "debug",
        "log every operation, and stay in the foreground",
        "A line says what was asked for, of which Xenstore path, how it ended, and how many "
        "microseconds it took.",
    ),
    Flag("V", "version", "show the version and exit"),
    Flag("h", "help", "show this help and exit"),
)

MOUNT_FLAGS: Final = (
    Flag("r", "", "the same as -o ro"),
    Flag("w", "", "the same as -o rw"),
    Flag("s", "", "ignore options of -o that are unknown"),
    Flag("n", "", "nothing: there is no /etc/mtab to be left alone"),
    Flag("v", "", "say what has been mounted where"),
)
"""mount(8) passes these on to a helper; `-f` too, and there it means: do not mount."""


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
    "root": Option(
        _root,
        "PATH",
        "show the store from PATH on, not from this domain's home",
        "PATH begins with /; its node need not be there.",
    ),
    "raw": Option(
        None,
        "",
        "values as they are: no newline is added or taken off",
    ),
    "ro": Option(
        None,
        "",
        "mount read-only",
        "What would change anything is EROFS. The last of ro and rw counts.",
    ),
    "allow_other": Option(
        None,
        "",
        "let other users in, as the modes say",
        "Without it only the user who mounted gets in, whatever the modes say; root does not get "
        "in either. Give umask, uid or gid with it: all who may read a file read with the rights "
        "that xsfs has. For other users than root it needs user_allow_other in /etc/fuse.conf.",
    ),
    "uid": Option(_id, "N", "the owner of all files (default: who mounts)"),
    "gid": Option(_id, "N", "their group (default: the group of who mounts)"),
    "umask": Option(
        _octal,
        "OCTAL",
        "what is cut from their modes (default: 077)",
        "The store holds secrets, such as VNC passwords.",
    ),
    "timeout": Option(
        _seconds,
        "SECONDS",
        f"how long one request to Xenstore may take (default: {DEFAULT_TIMEOUT:g})",
        "After that it is ETIMEDOUT. It is also how long a change is tried again that conflicts "
        "with changes of others: after that it is EAGAIN.",
    ),
    "tx_timeout": Option(
        _seconds,
        "SECONDS",
        f"after how long without use a transaction is rolled back (default: {DEFAULT_TX_TIMEOUT:g})",
    ),
    "mirror": Option(
        os.path.abspath,
        "DIR",
        "keep a live copy as plain files in DIR (default: a directory in /run/xsfs)",
        "It follows the store within milliseconds; .mirror in the mount leads there, and is not "
        "there while the copy cannot be true. Reading it asks neither xsfs nor Xenstore. DIR must "
        "not exist, or be empty, and its parent be on the same file system: a tmpfs, best.",
        without_value="",
    ),
    "listen": Option(
        os.path.abspath,
        "SOCKET",
        "embedded store: serve it to other programs there, too",
        "XENSTORED_PATH=SOCKET in the environment leads xenstore-ls and other programs there.",
    ),
    "ssh_command": Option(
        parse_command,
        "COMMAND",
        f"another host: how to run ssh (default: {DEFAULT_SSH})",
        "COMMAND is ssh and options for it, quoted as for a shell.",
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
IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "setuid=", "user=")

REMOUNT: Final = "remount"


def split(texts: Iterable[str]) -> Iterable[str]:
    """The single options of repeated `-o a,b=c`.  A comma within a value is written `\\,`."""
    for text in texts:
        for part in re.split(r"(?<!\\),", text):
            if part:
                yield part.replace("\\,", ",")


def parse(texts: Sequence[str], *, sloppy: bool = False) -> dict[str, Any]:
    """The values of the options given; UsageError for one that makes no sense, or that is unknown
    unless that is to be overlooked."""
    found: dict[str, Any] = {}
    for text in split(texts):
        name, equals, value = text.partition("=")
        option = OPTIONS.get(name)
        if text == "rw":
            found["ro"] = False  # the last of the two counts
            continue
        if text == REMOUNT:
            raise UsageError(
                "remount is for ro and rw alone, as in 'mount -i -o remount,ro MOUNTPOINT': "
                "for all else umount, and mount again"
            )
        if option is None:
            if sloppy or text in IGNORED or text.startswith(IGNORED_PREFIXES):
                continue
            raise UsageError(f"unknown option '{name}'")
        if option.parse is None:
            if equals:
                raise UsageError(f"the option '{name}' takes no value")
            found[name] = True
            continue
        if not equals and option.without_value is not None:
            found[name] = option.without_value
            continue
        if not value:
            raise UsageError(f"the option '{name}' needs a value: {usage(name)}")
        try:
            found[name] = option.parse(value)
        except ValueError as error:
            raise UsageError(f"the option '{name}={value}': {error}") from None
    return found


def usage(name: str) -> str:
    """The option as one writes it."""
    option = OPTIONS[name]
    if option.parse is None:
        return name
    value = f"={option.placeholder}"
    return f"{name}[{value}]" if option.without_value is not None else name + value


def help_lines() -> Iterable[str]:
    for name, option in OPTIONS.items():
        yield f"  {usage(name):<18} {option.help}"
