"""The home of the client's own domain, below which connections send relative paths.

A guest gets another domid, and so another home, when it is migrated, or saved and restored.  Relative paths
stay right then.  The kernel sets its watches again.  The home itself has no relative path.
"""

from __future__ import annotations


def moved(path: bytes, source: bytes, target: bytes) -> bytes:
    """The path after the subtree at `source` has moved to `target`."""
    is_inside = path == source or path.startswith(source + b"/")
    return target + path[len(source) :] if is_inside else path


class Home:
    """Shared by all connections of a store.  One task moves it when the domain has got another domid."""

    above = b""
    """The path and a slash.  While it is empty, all paths are sent as they are."""

    def move(self, path: bytes) -> None:
        """The home is at this absolute path."""
        self.above = path + b"/"
