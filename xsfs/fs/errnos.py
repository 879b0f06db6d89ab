"""How an operation is answered: the border between two worlds.

Whatever an operation raises becomes an errno here: an exception that escaped would end the mount.  What
is answered is counted, and logged in one line each where somebody traces the mount.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial, wraps
from types import CoroutineType
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast, overload

import pyfuse3
from pyfuse3 import FUSEError

from xsfs.fs.fuse_loop import install
from xsfs.fs.verdicts import errno_of
from xsfs.xenstore.errors import (
    ConnectionLost,
    RequestTimeout,
    StoreError,
    StoreUnavailable,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.eventual import Eventual, result_of
from xsfs.xenstore.protocol import WireError

log = logging.getLogger(__name__)
trace = logging.getLogger("xsfs.trace")

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Answering")

_FAILURES: Final[Sequence[tuple[type[StoreError], int]]] = (
    (TransactionEnded, errno.ESTALE),
    (RequestTimeout, errno.ETIMEDOUT),
    (ConnectionLost, errno.EIO),
    (StoreUnavailable, errno.EIO),
)

Handler = Callable[Concatenate[S, P], Eventual[R]]
"""What mostly is answered at once is a plain function."""

Operation = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


@overload
def answered(handler: Operation[S, P, R]) -> Operation[S, P, R]: ...


@overload
def answered(handler: Handler[S, P, R]) -> Operation[S, P, R]: ...


def answered(handler: Handler[S, P, R]) -> Operation[S, P, R]:
    """An operation that raises FUSEError and nothing else."""
    operation = handler.__name__
    # pyfuse3 names no argument, and what is not allowed for need not be looked for at each call.
    call = cast(Callable[..., Eventual[R]], handler)

    @wraps(handler)
    async def answer(self: S, *args: Any) -> Any:
        self.answered += 1
        try:
            if self.traces:
                result: Any = self.traced(operation, partial(call, self, *args), args)
            else:
                result = call(self, *args)
            if type(result) is not CoroutineType:
                return result
            self.waiter.under_way += 1
            try:
                return await result
            finally:
                self.waiter.under_way -= 1
        except FUSEError:
            raise
        except Exception as error:
            raise self.failure(operation, error) from None

    return cast("Operation[S, P, R]", answer)


class Answering(pyfuse3.Operations):
    """Operations that are answered so.

    distrust    called when a reply turns out to be nonsense
    """

    def __init__(self, distrust: Callable[[str], None]) -> None:
        super().__init__()
        self.errors = 0
        self.answered = 0
        self.waiter = install()
        self.traces = trace.isEnabledFor(logging.DEBUG)
        self._distrust = distrust

    def describe(self, operation: str, args: Sequence[object]) -> str:
        """What is asked, for the log."""
        return operation

    def failure(self, operation: str, error: Exception) -> FUSEError:
        """The one place where an exception becomes an errno."""
        if isinstance(error, FUSEError):
            return error
        self.errors += 1
        if isinstance(error, XenstoreError):
            return FUSEError(errno_of(error))
        for kind, number in _FAILURES:
            if isinstance(error, kind):
                # Of an outage it is enough to hear once.
                asked = not isinstance(error, StoreError) or error.asked
                log.log(logging.WARNING if asked else logging.DEBUG, "%s: %s", operation, error)
                return FUSEError(number)
        if isinstance(error, WireError):
            log.error("%s: Xenstore broke the protocol: %s", operation, error)
            self._distrust(str(error))
        else:
            log.error("%s failed", operation, exc_info=error)
        return FUSEError(errno.EIO)

    async def traced(
        self, operation: str, answer: Callable[[], Eventual[R]], args: Sequence[object]
    ) -> R:
        """Carry out an operation, and log it in one line."""
        start = time.perf_counter()
        described, outcome = operation, "ok"
        try:
            described = self.describe(operation, args)
            return await result_of(answer())
        except Exception as error:
            failure = self.failure(operation, error)
            outcome = errno.errorcode.get(failure.errno, str(failure.errno))
            raise failure from None
        finally:
            microseconds = (time.perf_counter() - start) * 1e6
            trace.debug("%s: %s, %.0f us", described, outcome, microseconds)
