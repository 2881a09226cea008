"""Decides whether bytes of a pipeline may come into the store, before the first of them is written.

A fill is admitted with all bytes that it still needs, a single read (of a header, a tokenizer) with its chunks.
Admitted bytes are reserved until they come, so later admissions cannot count on that space. Refused bytes are served
from the origin and not kept (filler/uncached.py), and the pipeline's ``uncached`` says why. Reads ask again every
RETRY_SECONDS, and so does the evictor (``reevaluate``), so a refusal ends by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import trio

from instantstart_fs.catalog.accounting import Uncached
from instantstart_fs.catalog.model import CachedFile, Generation, Pipeline
from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.eviction import Admission, Refusal
from instantstart_fs.errors import InstantStartError

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
DISK_RETRY_SECONDS = 10.0
"""Seconds after the filesystem itself said that it is full, although by our accounts it was not."""
FREE_BYTES_SECONDS = 0.5
"""Seconds for which single reads share one look at the space: a look walks over all pipelines."""


class Space(Protocol):
    """Decides about the store's space, and frees some where it can (upkeep/eviction.py)."""

    def free_bytes(self) -> int:
        """Return how many bytes may come in now without evicting anything."""
        ...

    def decide(self, pipeline: str, needed: int, *, own: int, quota: int | None) -> Admission:
        """Return what ``admit`` would do now."""
        ...

    async def admit(
        self, pipeline: str, needed: int, promise: Callable[[], None], *, own: int, quota: int | None
    ) -> Refusal | None:
        """Free ``needed`` bytes for ``pipeline`` and call ``promise``; or return the refusal."""
        ...


class Admissions:
    """Decides whether bytes may come in. Use it on the trio thread."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._free_bytes = 0
        self._free_bytes_until = 0.0

    async def admit_fill(self, generation: Generation, *, everything: bool) -> Uncached | None:
        """Admit the fill of the load set (``everything``: of all files). None if it may begin, and it then counts as
        being filled; else the refusal."""
        pipeline = generation.pipeline
        if pipeline.uncached is not None and trio.current_time() < pipeline.uncached.retry_at:
            return pipeline.uncached

        def promise() -> None:
            generation.filling_load_set = True
            generation.filling_everything = everything
            self._free_bytes_until = 0.0

        needed = generation.needed_bytes(everything=everything)
        needed += generation.reserved_outside_fill(filling=True, everything=everything)
        refusal = await self._space.admit(
            pipeline.id, needed, promise, own=pipeline.allocated, quota=pipeline.spec.quota
        )
        if refusal is None:
            self._clear(pipeline)
            return None
        return self._refuse(pipeline, str(refusal), RETRY_SECONDS)

    async def admit_chunks(self, file: CachedFile, present: ChunkMap, chunks: Sequence[int]) -> bool:
        """Admit the absent ones of these chunks, for a reader that waits for them."""
        generation = file.generation
        pipeline = generation.pipeline
        needed = sum(generation.unreserved(file, present, chunks).values())
        if not needed:
            return True
        now = trio.current_time()
        if pipeline.uncached is not None and now < pipeline.uncached.retry_at:
            return False
        if pipeline.spec.quota is None:
            if now >= self._free_bytes_until:
                self._free_bytes, self._free_bytes_until = self._space.free_bytes(), now + FREE_BYTES_SECONDS
            if needed <= self._free_bytes:
                self._free_bytes -= needed
                generation.reserve(file, present, chunks)
                return True
        self._free_bytes_until = 0.0

        def promise() -> None:
            generation.reserve(file, present, chunks)
            self._free_bytes_until = 0.0

        # What is promised to this pipeline already is not there yet, and will be.
        needed += generation.reserved_bytes
        refusal = await self._space.admit(
            pipeline.id, needed, promise, own=pipeline.allocated, quota=pipeline.spec.quota
        )
        if refusal is not None:
            # What people want to know is what the whole of it would take.
            missing = max(needed, generation.needed_bytes(everything=False))
            whole = self._space.decide(pipeline.id, missing, own=pipeline.allocated, quota=pipeline.spec.quota)
            self._refuse(pipeline, str(whole.refusal or refusal), RETRY_SECONDS)
        return refusal is None

    def disk_full(self, pipeline: Pipeline, error: InstantStartError) -> None:
        """Note that the filesystem had no space for admitted bytes: others fill the disk."""
        self._refuse(pipeline, f"store full: {error.message}", DISK_RETRY_SECONDS)

    def reevaluate(self, pipelines: Iterable[Pipeline]) -> None:
        """Drop refusals that would not be given now; the next read begins the fill."""
        now = trio.current_time()
        for pipeline in pipelines:
            if pipeline.uncached is None:
                continue
            generation = pipeline.current
            if generation is None or now < pipeline.uncached.retry_at:
                continue
            needed = generation.needed_bytes(everything=False)
            decision = self._space.decide(pipeline.id, needed, own=pipeline.allocated, quota=pipeline.spec.quota)
            if decision.refusal is None:
                self._clear(pipeline)
            else:
                self._refuse(pipeline, str(decision.refusal), 0.0)

    def _refuse(self, pipeline: Pipeline, text: str, pause: float) -> Uncached:
        if pipeline.uncached is None:
            log.warning("served straight from its origin: %s", text, extra={"pipeline": pipeline.id})
        changed = pipeline.uncached is None or pipeline.uncached.text != text
        pipeline.uncached = Uncached(text, trio.current_time() + pause)
        if changed:
            pipeline.changed()
        return pipeline.uncached

    def _clear(self, pipeline: Pipeline) -> None:
        if pipeline.uncached is not None:
            log.info("there is space again", extra={"pipeline": pipeline.id})
            pipeline.uncached = None
            pipeline.changed()
