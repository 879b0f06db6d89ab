"""Listing hints: the names that a directory probably has.

With a hint, a listing asks for the kinds of the children together with their names.  A `ListingHints` owns a
bounded number of earlier listings, as bytes of the protocol.  They are never shown, so a wrong hint only
costs superfluous requests.
"""

from __future__ import annotations

from typing import Final

from xsfs.view.bounded import Bounded

SEEN_MAX: Final = 1024
"""How many listings of children are kept: a program that lists a directory often lists its children next."""
LISTED_MAX: Final = 64
"""How many recently listed directories are kept: a script may list one in a loop."""
SIZE_MAX: Final = 512
"""The length in bytes of a listing that is kept: some 50 names."""


class ListingHints:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._seen: Bounded[bytes, bytes] = Bounded(SEEN_MAX)
        self._listed: Bounded[bytes, bytes] = Bounded(LISTED_MAX)

    def take(self, path: bytes) -> bytes:
        """The hint for a directory that is listed now; empty if there is none."""
        return self._seen.pop(path, b"") or self._listed.get(path, b"")

    def saw(self, path: bytes, listing: bytes) -> None:
        """The parent of this directory was listed."""
        _keep(self._seen, path, listing)

    def was_listed(self, path: bytes, listing: bytes) -> None:
        _keep(self._listed, path, listing)


def _keep(hints: Bounded[bytes, bytes], path: bytes, listing: bytes) -> None:
    if len(listing) <= SIZE_MAX and listing.endswith(b"\0"):
        hints.put(path, listing)
    else:
        hints.pop(path, None)
