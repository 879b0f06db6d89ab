"""Background work: a nursery whose tasks end with a block, a call made by a task, a call made by a thread."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, TypeVar

import trio
from outcome import Outcome, acapture

Result = TypeVar("Result")

# trio 0.22 has another name for the parameter, and from 0.35 on there is the new name alone.
_PARAMETERS: Final = inspect.signature(trio.to_thread.run_sync).parameters
_ABANDON: Final[dict[str, Any]] = {
    "abandon_on_cancel" if "abandon_on_cancel" in _PARAMETERS else "cancellable": True
}


@asynccontextmanager
async def open_background() -> AsyncIterator[trio.Nursery]:
    """An exception of the body comes out as it is, not in an exception group.  A background task that
    fails ends the body, as in any nursery."""
    raised: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as error:
            raised = error
        nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


class BackgroundCall(Generic[Result]):
    """A call of an async function by a background task."""

    def __init__(self, nursery: trio.Nursery, function: Callable[[], Awaitable[Result]]) -> None:
        self._done = trio.Event()
        self._outcome: Outcome[Result]
        nursery.start_soon(self._run, function)

    async def _run(self, function: Callable[[], Awaitable[Result]]) -> None:
        self._outcome = await acapture(function)
        self._done.set()

    async def result(self) -> Result:
        """Wait until the function returns.  Raises what it has raised.  To be called once."""
        await self._done.wait()
        return self._outcome.unwrap()


async def run_in_thread(function: Callable[[], Result]) -> Result:
    """Call a function that blocks.  A cancelled caller leaves the thread to itself."""
    return await trio.to_thread.run_sync(function, **_ABANDON)
