"""The home of the client's own domain, and the paths below it as they are sent.

A guest gets another domid, and so another home, when it is migrated, or saved and restored.  The kernel sets
its watches again afterwards, and other requests just go to the new store.  So requests below the home are
sent with relative paths, which stay right.  Xenstore has no relative path for the home itself.

A `Home` owns the path of the home.  One task changes it when the domain has got another domid.
"""

from __future__ import annotations

from collections.abc import Sequence

from xsfs.xenstore.protocol import Request


def moved(path: bytes, source: bytes, target: bytes) -> bytes:
    """The path after the subtree at `source` has moved to `target`."""
    is_inside = path == source or path.startswith(source + b"/")
    return target + path[len(source) :] if is_inside else path


class Home:
    """See the module's docstring.  As long as it has no path, all paths are sent as they are."""

    def __init__(self) -> None:
        self._above = b""

    def move(self, path: bytes) -> None:
        """The home is at this absolute path."""
        self._above = path + b"/"

    def as_sent(self, requests: Sequence[Request]) -> Sequence[Request]:
        """The requests, with relative paths below the home."""
        above = self._above
        if not above:
            return requests
        length = len(above)
        return [
            Request(request.op, request.payload[length:])
            if request.payload.startswith(above)
            else request
            for request in requests
        ]

    def as_asked(self, path: bytes) -> bytes:
        """The absolute path of an event.  Special events are left as they are."""
        return path if path.startswith((b"/", b"@")) else self._above + path
