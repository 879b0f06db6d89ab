"""How a user names the Xenstore of another host, and the ssh that reaches it."""

from __future__ import annotations

import re
import shlex
from typing import Final, NamedTuple

DEFAULT_SSH: Final = "ssh"
DEFAULT_SOCKET: Final = "/var/run/xenstored/socket"

_DESTINATION: Final = re.compile(
    r"""(?P<user>[^\s/:@'"`$\\;&<>|(){}-][^\s/:@'"`$\\;&<>|(){}]*@)?"""
    r"""(?:\[(?P<address>[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._-]+)?)\]"""
    r"""|(?P<host>[^\s/:@'"`$\\;&<>|(){}\[\]-][^\s/:@'"`$\\;&<>|(){}\[\]]*))"""
    r""":(?P<socket>/.*)?""",
    re.DOTALL,
)
"""Neither the user nor the host can be an option of ssh, or more than one word of a shell script: ssh puts
both into the ProxyCommand of ssh_config(5)."""


class SshDestination(NamedTuple):
    """An account on another host, and the path of Xenstore's socket there."""

    account: str
    socket: str

    def __str__(self) -> str:
        return self.account if self.socket == DEFAULT_SOCKET else f"{self.account}:{self.socket}"


def is_remote(source: str) -> bool:
    """Whether this names another host and not a path: as for scp(1), a colon before any slash."""
    return ":" in source.partition("/")[0]


def parse_destination(source: str) -> SshDestination:
    """`[USER@]HOST:[SOCKET]`, an IPv6 address in brackets.  Raises ValueError."""
    match = _DESTINATION.fullmatch(source)
    if match is None or "\0" in source:
        raise ValueError("must be [USER@]HOST:[SOCKET], with an absolute path of the socket")
    account = (match["user"] or "") + (match["address"] or match["host"])
    return SshDestination(account, match["socket"] or DEFAULT_SOCKET)


def parse_command(text: str) -> tuple[str, ...]:
    """The words of `ssh_command=`.  Raises ValueError."""
    words = tuple(shlex.split(text))
    if not words:
        raise ValueError("must be a command")
    return words
