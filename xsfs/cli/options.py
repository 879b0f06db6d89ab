"""The options: tables from which parsing, `--help`, the manual and the completions are made."""

from __future__ import annotations

import grp
import os
import pwd
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from xsfs.view.ownership import Ownership
from xsfs.xenstore.errors import DEFAULT_TIMEOUT
from xsfs.xenstore.permissions import DOMID_FIRST_RESERVED
from xsfs.xenstore.protocol import check_path
from xsfs.xenstore.ssh_destination import (
    DEFAULT_SSH,
    SshDestination,
    is_remote,
    parse_command,
    parse_destination,
)

EMBEDDED: Final = "embedded"
DEFAULT_SOURCE: Final = "xenstore"
AUTOMATIC_SOURCES: Final = frozenset((DEFAULT_SOURCE, "none", "auto"))

DEFAULT_TX_TIMEOUT: Final = 60.0

ID_LIMIT: Final = 0xFFFFFFFF


def source_of(text: str) -> str:
    """The source that the user meant.  If the working directory has a file of that name, mount(8) turns
    the word into an absolute path: `cd /mnt; mount -t xsfs xenstore /mnt/xenstore`."""
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
    """The command line is wrong; the text says how."""


@dataclass
class Options:
    """The options and arguments of one command line."""

    mountpoint: str
    source: str = DEFAULT_SOURCE
    """A socket or device, `[USER@]HOST:[SOCKET]`, `embedded`, or one of AUTOMATIC_SOURCES: find it."""
    foreground: bool = False
    pretend: bool = False
    """mount -f: do everything except the mount itself."""
    debug: bool = False
    verbose: bool = False
    root: bytes | None = None
    """None: the home of the domain."""
    raw: bool = False
    ro: bool = False
    visible: bool = False
    """Whether the root of the mount lists the names that belong to xsfs."""
    allow_other: bool = False
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int = 0o077
    timeout: float = DEFAULT_TIMEOUT
    tx_timeout: float = DEFAULT_TX_TIMEOUT
    mirror: str | None = None
    """The directory of the live mirror.  Empty: the default directory."""
    listen: str | None = None
    domid: int = 0
    ssh_command: tuple[str, ...] = (DEFAULT_SSH,)

    @property
    def embedded(self) -> bool:
        return self.source == EMBEDDED

    @property
    def destination(self) -> SshDestination | None:
        """The other host whose Xenstore is meant."""
        return parse_destination(self.source) if is_remote(self.source) else None

    @property
    def label(self) -> str:
        """The source as mount(8), findmnt(8) and df(1) show it.  It is the word that the user gave, so
        that `mount -a` recognizes the mount."""
        is_plain = self.source.isascii() and self.source.isprintable()
        return self.source if is_plain else DEFAULT_SOURCE

    @property
    def ownership(self) -> Ownership:
        return Ownership(self.uid, self.gid, self.umask)

    def fuse_options(self) -> set[str]:
        """The options for the kernel and libfuse."""
        # libfuse takes a comma for the end of an option.
        label = self.label.replace("\\", "\\\\").replace(",", "\\,")
        options = {f"fsname={label}", "subtype=xsfs", "nosuid", "nodev", "noexec"}
        if self.ro:
            options.add("ro")
        if self.allow_other:
            # Only if other users can enter must the kernel enforce the modes.
            options |= {"allow_other", "default_permissions"}
        return options


class Option(NamedTuple):
    """One name of `-o`."""

    help: str
    parse: Callable[[str], Any] | None = None
    """Makes the value of its text; ValueError says what it must be.  None: a flag without value."""
    placeholder: str = ""
    details: str = ""
    """Whole sentences that the manual has after `help`."""
    without_value: str | None = None
    """The value if the option is given by its name alone.  None: it requires a value."""


def _root(text: str) -> bytes:
    if not text.startswith("/"):
        raise ValueError("must begin with /")
    try:
        return check_path(os.fsencode(text))
    except ValueError:
        raise ValueError("is not a path that Xenstore accepts") from None


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", text) or not 0 < float(text) < 86400:
        raise ValueError("must be a number of seconds, more than 0 and less than 86400")
    return float(text)


def _octal(text: str) -> int:
    if not re.fullmatch("0?[0-7]{1,3}", text):
        raise ValueError("must be an octal number, 777 at most")
    return int(text, 8)


def _number(text: str, limit: int, otherwise: str = "") -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= limit:
        raise ValueError(f"must be {otherwise}a number below {limit}")
    return int(text)


def _user(text: str) -> int:
    with suppress(KeyError):
        return pwd.getpwnam(text).pw_uid
    return _number(text, ID_LIMIT, "the name of a user, or ")


def _group(text: str) -> int:
    with suppress(KeyError):
        return grp.getgrnam(text).gr_gid
    return _number(text, ID_LIMIT, "the name of a group, or ")


def _domid(text: str) -> int:
    return _number(text, DOMID_FIRST_RESERVED)


OPTIONS: Final[dict[str, Option]] = {
    "root": Option(
        "mount the tree below PATH (default: the domain's home)",
        _root,
        "PATH",
        "PATH must begin with /. Its node need not exist.",
    ),
    "raw": Option("exact values: do not add or strip a newline"),
    "ro": Option(
        "mount read-only",
        details="Every change fails with EROFS. If both ro and rw are given, the last one counts.",
    ),
    "visible": Option(
        "list .root, .stats and the like in the root of the mount",
        details="Then ls -a and completion by the Tab key find them. .watch is never listed.",
    ),
    "allow_other": Option(
        "allow other users access, subject to file modes",
        details="Without it only the user who mounted has access, and not even root. Use it together "
        "with umask, uid or gid: anyone who may read a file reads it with the rights of xsfs. If you are "
        "not root, it requires user_allow_other in /etc/fuse.conf.",
    ),
    "uid": Option("owner of all files (default: the user who mounts)", _user, "USER"),
    "gid": Option("group of all files (default: that user's group)", _group, "GROUP"),
    "umask": Option(
        "permission bits to remove from all files (default: 077)",
        _octal,
        "OCTAL",
        "The store contains secrets, such as VNC passwords.",
    ),
    "timeout": Option(
        f"time limit of one request to Xenstore (default: {DEFAULT_TIMEOUT:g})",
        _seconds,
        "SECONDS",
        "After that the operation fails with ETIMEDOUT. A change that conflicts with other changes is "
        "retried for the same time, and then fails with EAGAIN.",
    ),
    "tx_timeout": Option(
        f"roll back a transaction idle for SECONDS (default: {DEFAULT_TX_TIMEOUT:g})",
        _seconds,
        "SECONDS",
    ),
    "mirror": Option(
        "keep a live copy in DIR (default: in /run/xsfs)",
        os.path.abspath,
        "DIR",
        "The copy consists of plain files. Changes arrive within milliseconds. The symbolic link "
        ".mirror in the mount leads to the copy; it is missing while the copy is not current. Reading "
        "the copy makes no requests. DIR must be empty or missing, and its parent directory must be on "
        "the same file system, best a tmpfs.",
        without_value="",
    ),
    "listen": Option(
        "embedded store only: also accept Xenstore clients on SOCKET",
        os.path.abspath,
        "SOCKET",
        "Set XENSTORED_PATH=SOCKET to connect xenstore-ls and other programs to it.",
    ),
    "ssh_command": Option(
        f"other hosts only: how to run ssh (default: {DEFAULT_SSH})",
        parse_command,
        "CMD",
        "CMD is ssh and options for it, quoted as for a shell.",
    ),
    "domid": Option("embedded store only: mount as domain N (default: 0)", _domid, "N"),
}

IGNORED: Final = frozenset(
    (
        # mount(8), fstab and systemd add these.  They concern those programs, or hold always.
        *("defaults", "auto", "noauto", "user", "nouser", "users", "nofail", "_netdev"),
        *("dev", "nodev", "suid", "nosuid", "exec", "noexec", "sync", "async", "dirsync"),
        *("atime", "noatime", "relatime", "norelatime", "strictatime", "diratime", "nodiratime"),
        *("lazytime", "nolazytime", "group", "owner", "default_permissions"),
        *("mand", "nomand", "symfollow", "nosymfollow", "silent", "loud", "seclabel"),
    )
)
IGNORED_PREFIXES: Final = (
    *("x-", "X-", "comment=", "setuid=", "user="),
    # The kernel shows these in /proc/mounts, from where mount(8) of util-linux 2.41 takes the options
    # of a mount that it is to remount.
    *("user_id=", "group_id=", "max_read=", "blksize=", "dax=", "context=", "rootcontext="),
)


def parse(texts: Sequence[str], *, sloppy: bool = False) -> dict[str, Any]:
    """The values of the options, by name.

    texts       `a,b=c`; a comma within a value is written `\\,`
    sloppy      ignore unknown options

    Raises UsageError.
    """
    found: dict[str, Any] = {}
    for escaped in filter(None, re.split(r"(?<!\\),", ",".join(texts))):
        text = escaped.replace("\\,", ",")
        name, equals, value = text.partition("=")
        option = OPTIONS.get(name)
        if text == "rw":
            found["ro"] = False  # the last of the two counts
        elif text == "remount":
            raise UsageError(
                "only ro and rw can be changed by a remount: 'mount -i -o remount,bind,ro MOUNTPOINT'; "
                "umount and mount again for other options"
            )
        elif option is None:
            if not (sloppy or text in IGNORED or text.startswith(IGNORED_PREFIXES)):
                raise UsageError(f"unknown option '{name}'")
        elif option.parse is None:
            if equals:
                raise UsageError(f"the option '{name}' takes no value")
            found[name] = True
        elif not equals and option.without_value is not None:
            found[name] = option.without_value
        elif not value:
            raise UsageError(f"the option '{name}' requires a value: {usage(name)}")
        else:
            try:
                found[name] = option.parse(value)
            except ValueError as error:
                raise UsageError(f"the value of '{text}' {error}") from None
    return found


def usage(name: str) -> str:
    """How the option is written."""
    option = OPTIONS[name]
    if option.parse is None:
        return name
    value = f"={option.placeholder}"
    return f"{name}[{value}]" if option.without_value is not None else name + value


def help_lines() -> Iterable[str]:
    """The options as `--help` shows them, for a terminal of 80 columns."""
    for name, option in OPTIONS.items():
        head = f"  {usage(name):<18} "
        yield from textwrap.wrap(
            option.help, 80, initial_indent=head, subsequent_indent=" " * len(head)
        )
