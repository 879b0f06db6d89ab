"""The client's errors: classes and numbers.  Pure."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from xsfs.xenstore.errors import (
    Conflict,
    ConnectionLost,
    NotFound,
    NotSupported,
    PermissionDenied,
    QuotaExceeded,
    RequestTimeout,
    StoreError,
    StoreUnavailable,
    TransactionEnded,
    XenstoreError,
)
from xsfs.xenstore.protocol import ERRORS, Request, directory, read, watch, write

LONG = b"/" + b"x" * 2048


@pytest.mark.parametrize(
    ("name", "request_", "kind", "number"),
    [
        ("ENOENT", read(b"/x"), NotFound, errno.ENOENT),
        ("EACCES", read(b"/x"), PermissionDenied, errno.EACCES),
        ("EPERM", read(b"/x"), PermissionDenied, errno.EPERM),
        ("EAGAIN", read(b"/x"), Conflict, errno.EAGAIN),
        ("ENOSPC", write(b"/x", b""), QuotaExceeded, errno.ENOSPC),
        ("EQUOTA", write(b"/x", b""), QuotaExceeded, errno.EDQUOT),
        ("ENOSYS", read(b"/x"), NotSupported, errno.ENOSYS),
        ("EEXIST", read(b"/x"), XenstoreError, errno.EEXIST),
        ("EBUSY", read(b"/x"), XenstoreError, errno.EBUSY),
        ("E2BIG", write(b"/x", b""), XenstoreError, errno.EFBIG),
        ("E2BIG", directory(b"/x"), XenstoreError, errno.E2BIG),
        ("E2BIG", watch(b"/x", b"t"), QuotaExceeded, errno.ENOSPC),
        ("EINVAL", read(b"/x"), XenstoreError, errno.EINVAL),
        ("EINVAL", read(LONG), XenstoreError, errno.ENAMETOOLONG),
        ("EINVAL", watch(b"/x", b"t"), QuotaExceeded, errno.EDQUOT),
        ("EINVAL", watch(LONG, b"t"), XenstoreError, errno.ENAMETOOLONG),
        ("EWHATEVER", read(b"/x"), XenstoreError, errno.EIO),
    ],
)
def test_a_reply_has_a_class_and_a_number(
    name: str, request_: Request, kind: type[XenstoreError], number: int
) -> None:
    error = XenstoreError(name, request_)
    assert type(error) is kind
    assert (error.name, error.request) == (name, request_)
    assert errno.errorcode[error.errno] == errno.errorcode[number]
    assert error.strerror
    assert str(error).startswith(f"{name}: {request_.op.name} /x")


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_name_of_the_daemons_has_a_number(name: str) -> None:
    assert XenstoreError(name, read(b"/x")).errno != errno.EIO or name == "EIO"


def test_replies_are_the_errors_that_python_has_for_files() -> None:
    with pytest.raises(FileNotFoundError, match="ENOENT: READ /x"):
        raise XenstoreError("ENOENT", read(b"/x"))
    with pytest.raises(PermissionError):
        raise XenstoreError("EACCES", read(b"/x"))


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ConnectionLost("why"), errno.EIO),
        (RequestTimeout("why"), errno.ETIMEDOUT),
        (TransactionEnded("why"), errno.ESTALE),
        (StoreUnavailable("why", "hint"), errno.EIO),
    ],
)
def test_failures_without_a_reply(error: StoreError, number: int) -> None:
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror, str(error)) == (number, "why", "why")


def test_a_time_limit_is_the_error_that_python_has_for_it() -> None:
    assert isinstance(RequestTimeout("late"), TimeoutError)


def test_an_error_can_be_copied_and_sent_to_another_process() -> None:
    error = XenstoreError("EQUOTA", write(b"/x", b"1"))
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is QuotaExceeded
        assert (other.name, other.request, other.errno) == (error.name, error.request, error.errno)
