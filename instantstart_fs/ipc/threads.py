"""Runs blocking calls in threads: those that may never return are abandoned at a deadline, some give way to others."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import trio

_T = TypeVar("_T")
BACKGROUND_NICE = 10
"""A tenth of the processor beside a thread of nice 0."""


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


class BackgroundThreads:
    """At most ``most`` threads of their own for work that gives way to every other thread of the machine."""

    def __init__(self, most: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(most, name, _give_way)

    async def run(self, work: Callable[..., _T], *args: Any) -> _T:
        """Run ``work``, and wait until it has ended, cancelled or not. Raises whatever it raises."""
        ended, token = trio.Event(), trio.lowlevel.current_trio_token()
        future = self._pool.submit(work, *args)
        future.add_done_callback(lambda _: token.run_sync_soon(ended.set))
        with trio.CancelScope(shield=True):
            await ended.wait()
        return future.result()

    def close(self) -> None:
        """Take no more work. Does not wait."""
        self._pool.shutdown(wait=False)


def _give_way() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)


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
