"""Runs blocking calls that may never return: each in a thread of its own, abandoned at a deadline."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import trio

_T = TypeVar("_T")


async def run_abandonable(
    work: Callable[..., _T], *args: Any, deadline: float = math.inf, limiter: trio.CapacityLimiter | None = None
) -> _T:
    """Run ``work`` in a thread and stop waiting for it at the deadline, or when cancelled. The thread itself goes on.

    Args:
        deadline: seconds.
        limiter: bounds the threads of one kind. By default the call has a limiter of its own: a thread that never
            returns would otherwise take another call's place for good.

    Raises:
        trio.TooSlowError: at the deadline.
        Exception: whatever ``work`` raises.
    """
    with trio.fail_after(deadline):
        return await trio.to_thread.run_sync(
            work, *args, abandon_on_cancel=True, limiter=limiter or trio.CapacityLimiter(1)
        )


async def open_abandonable(work: Callable[..., int], *args: Any, deadline: float = math.inf) -> int:
    """Return the descriptor that ``work`` opens, as ``run_abandonable``. One that comes too late is closed."""
    came: list[int] = []
    given_up = threading.Event()

    def close() -> None:
        with contextlib.suppress(IndexError):
            os.close(came.pop())

    def opens() -> None:
        came.append(work(*args))
        if given_up.is_set():
            close()

    try:
        await run_abandonable(opens, deadline=deadline)
        return came.pop()
    finally:
        given_up.set()
        close()


class LentDescriptor:
    """A descriptor for a thread that may be given up: it may end after its caller, or never begin. It is a duplicate:
    the caller's own may be closed meanwhile, and its number be another file's.

    Raises OSError where there are no more descriptors.
    """

    def __init__(self, fd: int) -> None:
        self._fd = [os.dup(fd)]

    @contextlib.contextmanager
    def taken(self) -> Iterator[int]:
        """Hold it, in the thread, and close it at the end."""
        fd = self._fd.pop()
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close it, unless a thread has taken it: none begins with it any more."""
        with contextlib.suppress(IndexError):
            os.close(self._fd.pop())
