"""What mostly is there at once and has to be waited for only now and then.

An operation is made of layers, and a coroutine in each of them is a third of what a short one costs.  A
layer that asks the next for an `Eventual` needs none of its own where nothing has to be waited for.
"""

from __future__ import annotations

from collections.abc import Coroutine
from types import CoroutineType
from typing import Any, TypeAlias, TypeVar, cast, overload

R = TypeVar("R")

Eventual: TypeAlias = R | Coroutine[Any, Any, R]
"""The result itself, or the coroutine that gives it, which must be awaited.

No result is itself a coroutine: `type(...) is CoroutineType` tells.
"""


@overload
async def result_of(eventual: Coroutine[Any, Any, R]) -> R: ...


@overload
async def result_of(eventual: Eventual[R]) -> R: ...


async def result_of(eventual: Eventual[R]) -> R:
    """The result, waited for if need be."""
    if type(eventual) is CoroutineType:
        return cast(R, await eventual)
    return cast(R, eventual)
