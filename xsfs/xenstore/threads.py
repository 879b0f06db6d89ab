"""Work in a thread that is left to itself when its task is cancelled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import trio

# Debian 12's trio, 0.22, has another name for it; from 0.35 on there is this one alone.
_PARAMETERS: Final = inspect.signature(trio.to_thread.run_sync).parameters
_ABANDON: Final[dict[str, Any]] = {
    "abandon_on_cancel" if "abandon_on_cancel" in _PARAMETERS else "cancellable": True
}


async def run_abandonable(function: Callable[..., object], *args: object) -> None:
    """Return when the function has; or, if cancelled, at once, and let it go on."""
    await trio.to_thread.run_sync(function, *args, **_ABANDON)
