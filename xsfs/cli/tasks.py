"""What every task is waiting for, for the log: SIGUSR1 asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import trio
from trio.lowlevel import Task


def describe_tasks() -> Iterator[str]:
    """A line for each task of the running loop, and one for each place it is in."""
    root = trio.lowlevel.current_root_task()
    if root is not None:
        yield from _describe(root, 0)


def _describe(task: Task, depth: int) -> Iterator[str]:
    indent = "  " * depth
    yield f"{indent}{task.name}"
    for frame, line in task.iter_await_frames():
        code = frame.f_code
        yield f"{indent}    {code.co_filename}:{line} {code.co_qualname}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _describe(child, depth + 1)
