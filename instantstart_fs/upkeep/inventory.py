"""Collects the values that core/eviction.py decides on: candidates, their bytes, and how full the store is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instantstart_fs.catalog.bind_gate import BindGate
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Pipeline
from instantstart_fs.config import Config
from instantstart_fs.core import eviction
from instantstart_fs.index.access_times import AccessTimes


class Inventory:
    """Lists what can be evicted. ``is_filling``: whether a pipeline's background fill is under way. Use it on the trio
    thread."""

    def __init__(
        self,
        catalog: Catalog,
        access: AccessTimes,
        bind_gate: BindGate,
        is_filling: Callable[[str], bool],
        config: Config,
    ) -> None:
        self._catalog = catalog
        self._access = access
        self._bind_gate = bind_gate
        self._is_filling = is_filling
        self._store = config.store
        self._keep_hot = config.eviction.keep_hot

    def budget(self) -> eviction.Budget:
        """The store's capacity and watermarks."""
        space = self._catalog.store.space()
        total = space.f_blocks * space.f_frsize
        return eviction.Budget(
            capacity=self._store.capacity.of(total),
            low=self._store.low_watermark,
            high=self._store.high_watermark,
            floor=self._store.min_free.of(total),
            free=space.f_bavail * space.f_frsize,
        )

    def candidates(self) -> Sequence[eviction.Candidate]:
        """Return all pipelines with cached or reserved bytes. The sum of their bytes is the usage."""
        found = (self.candidate(pipeline) for pipeline in self._catalog.pipelines.values())
        candidates = [candidate for candidate in found if candidate.frees]
        # What is being deleted takes space until it is done, and cannot be evicted once more.
        pending = self._catalog.pending_deletions
        candidates += [eviction.Candidate(name, count, 0.0, open=True) for name, count in pending if count]
        return candidates

    def candidate(self, pipeline: Pipeline, *, locked: bool | None = None) -> eviction.Candidate:
        """Return a pipeline as a candidate. ``locked``: whether a change of it is under way; None: find out."""
        requested = (self._access.last_request(pipeline.id) or 0) / 1e9
        generation = pipeline.head
        complete = generation is not None and generation.load_set_complete
        return eviction.Candidate(
            pipeline=pipeline.id,
            bytes=pipeline.allocated,
            # What was never requested counts from when it was filled: warming one must not make it the next to go.
            last_request=max(requested, pipeline.grown_at_ns / 1e9),
            hot=eviction.is_hot(requested, self._keep_hot, self._catalog.now_ns() / 1e9),
            pinned=pipeline.pinned,
            # One that is being updated (its origin may take minutes) must not hold up the others' eviction. A fill that
            # no reader waits for may be cancelled; being the latest to grow, it goes last.
            open=pipeline.in_use
            or self._bind_gate.recently_busy(pipeline.id)
            or (pipeline.lock.locked() if locked is None else locked),
            leased=pipeline.leases > 0,
            partial=not (complete or self._is_filling(pipeline.id)),
            promised=generation.reserved_bytes if generation is not None else 0,
        )
