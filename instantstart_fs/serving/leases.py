"""Leases: while one is held, the pipeline counts as requested and in use, so it is not evicted.

``opening`` also hands the weight files' descriptors to the lease's holder (`instantstart prefetch`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Lessee
from instantstart_fs.errors import ReadDeadline
from instantstart_fs.index.access_times import AccessTimes
from instantstart_fs.serving.export import Handover
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.reads import Reads
from instantstart_fs.serving.warm_requests import WarmRequests

PREFETCH_SECONDS = 600.0
"""Seconds for which a prefetch counts as reading. It keeps its lease while it holds the weights, and does not report
when it has read them."""


class Leases:
    """The leases that processes hold on pipelines. ``read_deadline``: seconds. Use it on the trio thread."""

    def __init__(
        self,
        catalog: Catalog,
        access: AccessTimes,
        open_files: OpenFiles,
        reads: Reads,
        warming: WarmRequests,
        read_deadline: float,
    ) -> None:
        self._catalog = catalog
        self._access = access
        self._open_files = open_files
        self._reads = reads
        self._warming = warming
        self._read_deadline = read_deadline
        self._prefetches: Counter[float] = Counter()
        """Prefetches under way, by their start (trio.current_time())."""

    @contextmanager
    def lease(self, pipeline: str, lessee: Lessee | None = None) -> Iterator[None]:
        """Hold a lease inside the block. ``lessee``: who holds it, named in errors about a busy pipeline. Raises
        PipelineNotFound."""
        found = self._catalog.pipeline(pipeline)
        found.leases += 1
        if lessee is not None:
            found.lessees.append(lessee)
        self._access.record_request(found.id, self._catalog.now_ns())
        found.changed()
        try:
            yield
        finally:
            found.leases -= 1
            if lessee is not None:
                found.lessees.remove(lessee)
            if not found.removed:
                self._access.record_request(found.id, self._catalog.now_ns())
            found.changed()

    @asynccontextmanager
    async def opening(
        self, pipeline: str, deadlines: Mapping[str, float], lessee: Lessee | None = None
    ) -> AsyncIterator[Handover]:
        """Hand over weight files under a lease, in the order of core.weights.schedule. A pipeline that is not warm is
        filled; staging pauses for it. Raises PipelineNotFound, and InstantStartError if it may not be filled."""
        with self.lease(pipeline, lessee), self._staging_paused(pipeline):
            found = self._warming.visible(pipeline)
            generation = await self._catalog.ensure_loaded(found)
            if generation is None or not generation.load_set_complete:
                # Space may have to be freed by evicting others, whose bytes take a while to go.
                with trio.move_on_after(self._read_deadline) as asking:
                    await self._warming.warm(pipeline)
                if asking.cancelled_caught:
                    raise ReadDeadline(f"{pipeline}: its fill did not begin within {self._read_deadline:g} s")
                generation = await self._catalog.ensure_loaded(found)
            assert generation is not None
            with self._open_files.using(generation), self._prefetching():
                yield Handover(self._reads, self._catalog.store, generation, self._read_deadline, deadlines)

    def any_prefetch(self) -> bool:
        """Whether a prefetch has begun within the last PREFETCH_SECONDS and goes on."""
        recent = trio.current_time() - PREFETCH_SECONDS
        self._prefetches = +Counter({began: count for began, count in self._prefetches.items() if began > recent})
        return bool(self._prefetches)

    @contextmanager
    def _prefetching(self) -> Iterator[None]:
        began = trio.current_time()
        self._prefetches[began] += 1
        try:
            yield
        finally:
            self._prefetches[began] -= 1

    @contextmanager
    def _staging_paused(self, pipeline: str) -> Iterator[None]:
        """Pause staging inside the block: a prefetch reads past the page cache and needs disk and memory. Nests."""
        listener = self._open_files.listener
        listener.rest(pipeline, True)
        try:
            yield
        finally:
            listener.rest(pipeline, False)
