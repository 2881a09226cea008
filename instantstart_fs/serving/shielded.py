"""Runs operations that must complete even if their requester is cancelled or disconnects.

Half an eviction, or a file that is deleted on the disk and still in the index, would be wrong on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from instantstart_fs.errors import FillCancelled

log = logging.getLogger(__name__)

T = TypeVar("T")


class ShieldedOperations:
    """Owned by the Library; on the trio thread. ``run`` must be running."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._under_way: dict[trio.Event, str] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the operations that are given, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # it accepts nothing from here on; operations under way may outlive this

    async def wait_idle(self, kind: str) -> None:
        """Return once all of that kind that have begun by now have ended."""
        for event in [event for event, other in self._under_way.items() if other == kind]:
            await event.wait()

    async def run_to_completion(self, work: Callable[[], Awaitable[T]], kind: str = "") -> T:
        """Run ``work`` in a task of its own and return its result. It goes on if the caller is cancelled.

        Args:
            work: the operation.
            kind: a group of operations that ``wait_idle`` can wait for.

        Raises:
            FillCancelled: the daemon ends. Anything that ``work`` raises.
        """
        if self._nursery is None:
            raise FillCancelled("the daemon ends")
        done = trio.Event()
        results: list[T] = []
        failures: list[Exception] = []
        waits = True

        async def operation() -> None:
            try:
                results.append(await work())
            except Exception as error:
                failures.append(error)
                if not waits:
                    log.error("nobody waits any more for what failed: %s", error)
            finally:
                del self._under_way[done]
                done.set()

        self._under_way[done] = kind
        self._nursery.start_soon(operation)
        try:
            await done.wait()
        finally:
            waits = False
        if failures:
            raise failures[0]
        if not results:  # cancelled, with all others
            await trio.lowlevel.checkpoint_if_cancelled()
            raise FillCancelled("the daemon ends")
        return results[0]
