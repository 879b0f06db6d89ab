"""Which names a directory may have: what its listing asks ahead, together with the names themselves.

What it owns: listings as they once were, as bytes of the protocol, a bounded number of them.  They are
never an answer: a wrong one is only a question too many.
"""

from __future__ import annotations

from typing import Final

GUESSES_MAX: Final = 1024
LISTED_MAX: Final = 64
"""How many directories are remembered that were listed lately: a script may list one in a loop."""
SIZE_MAX: Final = 512
"""Bytes of a listing that is kept: some 50 names."""


class Guesses:
    """See the module's text."""

    def __init__(self) -> None:
        self._seen: dict[bytes, bytes] = {}
        self._listed: dict[bytes, bytes] = {}

    def take(self, path: bytes) -> bytes:
        """The guess for the directory that is listed now; empty if there is none."""
        return self._seen.pop(path, b"") or self._listed.get(path, b"")

    def saw(self, path: bytes, listing: bytes) -> None:
        """Its parent was listed: who does that often lists those in it next."""
        _keep(self._seen, path, listing, GUESSES_MAX)

    def was_listed(self, path: bytes, listing: bytes) -> None:
        _keep(self._listed, path, listing, LISTED_MAX)


def _keep(guesses: dict[bytes, bytes], path: bytes, listing: bytes, most: int) -> None:
    """Keep `most` of them at most, the newest; and no nonsense."""
    guesses.pop(path, None)
    if len(listing) > SIZE_MAX or not listing.endswith(b"\0"):
        return
    guesses[path] = listing
    if len(guesses) > most:
        del guesses[next(iter(guesses))]
