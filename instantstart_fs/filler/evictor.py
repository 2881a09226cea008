"""Evictor: carries out core/eviction's plan. Plain LRU, whole pipelines, between the watermarks.

Looks when new bytes have come (``nudge``) and when the store is full (``make_room``). What there is to evict, how full
the store is and how a pipeline is emptied are the library's to say; this only asks, decides by the plan, and does it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from instantstart_fs.core import eviction
from instantstart_fs.errors import InstantStartError

log = logging.getLogger(__name__)

INTERVAL = 2.0
"""Least seconds between two looks: a look costs a walk over all pipelines."""


class Shelves(Protocol):
    """The library's side."""

    def budget(self) -> eviction.Budget: ...

    def candidates(self) -> Sequence[eviction.Candidate]:
        """All pipelines with cached bytes; their bytes together are the usage."""
        ...

    async def evict(self, pipeline: str) -> None:
        """Raises PipelineBusy if it came into use meanwhile."""
        ...


class Evictor:
    """``now``: the wall clock in seconds."""

    def __init__(self, shelves: Shelves, now: Callable[[], float]) -> None:
        self._shelves = shelves
        self._now = now
        self._nudged = trio.Event()
        self._lock = trio.Lock()

    def nudge(self) -> None:
        """New bytes have come: look soon."""
        self._nudged.set()

    async def run(self) -> None:
        """Keep the store below its high watermark, as far as the plan can, until cancelled."""
        while True:
            await self._nudged.wait()
            self._nudged = trio.Event()
            await self._evict(lambda candidates: sum(candidate.bytes for candidate in candidates))
            await trio.sleep(INTERVAL)

    async def make_room(self, pipeline: str) -> bool:
        """The filesystem is full while ``pipeline`` is filled: evict others down to the low watermark, counting the
        store as full whatever its own bytes say (somebody else may fill the disk). Whether anything was freed."""

        def full(candidates: Sequence[eviction.Candidate]) -> int:
            used = sum(candidate.bytes for candidate in candidates)
            return max(used, self._shelves.budget().capacity)

        return await self._evict(full, but=pipeline)

    async def _evict(self, usage: Callable[[Sequence[eviction.Candidate]], int], but: str | None = None) -> bool:
        freed = False
        async with self._lock:
            candidates = self._shelves.candidates()
            others = [candidate for candidate in candidates if candidate.pipeline != but]
            for pipeline in eviction.plan(usage(candidates), self._shelves.budget(), others, self._now()):
                try:
                    await self._shelves.evict(pipeline)
                    freed = True
                except InstantStartError as error:
                    log.info("not evicted: %s", error.message, extra={"pipeline": pipeline})
        return freed
