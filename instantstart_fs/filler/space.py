"""Fills on a full store: pauses them, asks for space, and resumes or fails them. It frees nothing itself (the evictor
does).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.errors import InstantStartError, StoreFull
from instantstart_fs.filler.fill import Fill
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.target import FileKey

SPACE_SECONDS = 60.0
"""Seconds that freeing space may take before the fill fails."""
SPACE_INTERVAL = 1.0
"""Least time between two requests of a pipeline, where freed space is taken by others at once."""

FreeSpace = Callable[[str], Awaitable[bool]]
"""A function that is called when the store is full under a pipeline. It frees space if it can, and returns whether it
did."""


class SpaceRequests:
    """Asks for space when the store is full. ``free_space``: None if nothing can be freed."""

    def __init__(self, plan: FillPlan[FileKey], table: FillTable, free_space: FreeSpace | None) -> None:
        self._plan = plan
        self._table = table
        self._free_space = free_space
        self._asking: set[str] = set()
        self._next_at: dict[str, float] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry out requests until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def store_full(self, fill: Fill, error: InstantStartError) -> None:
        """Hold the file back, and ask for space for its pipeline unless that is under way."""
        pipeline = fill.target.key.pipeline
        self._plan.hold(fill.target.key, trio.current_time() + 2 * SPACE_SECONDS)
        if pipeline not in self._asking and self._nursery is not None:
            self._asking.add(pipeline)
            self._nursery.start_soon(self._ask, pipeline, error)

    async def _ask(self, pipeline: str, error: InstantStartError) -> None:
        freed = False
        try:
            await trio.sleep_until(self._next_at.get(pipeline, -math.inf))
            self._next_at[pipeline] = trio.current_time() + SPACE_INTERVAL
            if self._free_space is not None:
                with trio.move_on_after(SPACE_SECONDS):
                    freed = await self._free_space(pipeline)
        finally:
            self._asking.discard(pipeline)
        for fill in self._table.of_pipeline(pipeline):
            if freed:
                self._plan.release(fill.target.key)
            elif not fill.sealing:
                self._table.fail(fill, StoreFull(error.message))
        self._table.wakeup.set()
