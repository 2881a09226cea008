"""Runs blocking calls that may never return: each in a thread of its own, abandoned at a deadline."""

from __future__ import annotations

import math
from collections.abc import Callable
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
