"""What has to be finished once it has begun, whoever asked for it: half an eviction, or a file that is dropped on the
disk and not in the index, would lie."""

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
        """Until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # before it takes none any more: what is under way may outlive this

    async def wait_idle(self, kind: str) -> None:
        """Return once all of that kind that have begun by now have ended."""
        for event in [event for event, other in self._under_way.items() if other == kind]:
            await event.wait()

    async def run_to_completion(self, work: Callable[[], Awaitable[T]], kind: str = "") -> T:
        """Do it in a task of its own; what it returns or raises. Whoever waits for it here may be cancelled: it goes
        on. Raises FillCancelled when the daemon ends."""
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
