"""Why there are no figures."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Something could not be run at all, in words for whoever started it."""
