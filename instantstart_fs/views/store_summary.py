"""The summary of the whole store that the page and the metrics show, made in one walk that pauses for other tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from instantstart_fs.core.access import Outcome
from instantstart_fs.core.coldstart import ColdStart, PipelineSpread
from instantstart_fs.core.eviction import Budget, Candidate
from instantstart_fs.core.status import PipelineStatus, TierStatus
from instantstart_fs.filler.events import RegionStatistics


class ScrubSummary(msgspec.Struct, frozen=True):
    """The state of the scrub. ``overdue``: seconds by which the pipeline that was not scrubbed for the longest time is
    late. ``resting``: demand keeps the scrub waiting."""

    overdue: float
    resting: bool


class RegionSummary(msgspec.Struct, frozen=True):
    """The regional tier as this host sees it. ``hosts``: those of the region that live."""

    endpoint: str
    tier: TierStatus
    hosts: int
    statistics: RegionStatistics


class StoreSummary(msgspec.Struct, frozen=True):
    """The figures of the whole store. ``used_bytes``, ``evictable_bytes``: all pipelines together. ``states``: number
    of pipelines by state. ``silent``: pipelines that are being filled and got no byte for some seconds. ``nodes``:
    entries of the table of nodeids (a generation's block is one). ``pipelines``: by id. ``scrub``: None without one.
    ``spreads``: how long starts take, of the pipelines that started last. ``access``: number of pipelines by verdict of
    the access check, None if nobody asks. ``region``: None without a regional tier."""

    at_ns: int
    budget: Budget
    used_bytes: int
    evictable_bytes: int
    states: dict[str, int]
    silent: int
    nodes: int
    pipelines: tuple[PipelineStatus, ...]
    cold_starts: tuple[ColdStart, ...]
    scrub: ScrubSummary | None = None
    access: dict[Outcome, int] | None = None
    spreads: tuple[PipelineSpread, ...] = ()
    region: RegionSummary | None = None

    def narrowed(self, shown: Sequence[PipelineStatus]) -> StoreSummary:
        """Return a summary of these pipelines alone, in that order. Sums over all pipelines stay; callers that see only
        some are not shown them."""
        names = {status.pipeline for status in shown}
        return msgspec.structs.replace(
            self,
            pipelines=tuple(shown),
            states=dict(Counter(status.state for status in shown)),
            cold_starts=tuple(record for record in self.cold_starts if record.pipeline in names),
            spreads=tuple(found for found in self.spreads if found.pipeline in names),
        )


class StoreSummaryBuilder:
    """Builds a summary from pipelines one by one. It is no snapshot of one instant: the first are some milliseconds
    older."""

    COLD_STARTS: ClassVar = 20
    BATCH: ClassVar = 64
    """Pipelines between two pauses: about a millisecond."""

    def __init__(self, budget: Budget, at_ns: int, nodes: int = 0) -> None:
        self._budget = budget
        self._nodes = nodes
        self._at_ns = at_ns
        self._found: list[PipelineStatus] = []
        self._states: Counter[str] = Counter()
        self._used = 0
        self._evictable = 0
        self._silent = 0

    def add(self, status: PipelineStatus, candidate: Candidate) -> None:
        self._found.append(status)
        self._states[status.state] += 1
        self._used += candidate.bytes
        if candidate.evictable:
            self._evictable += candidate.bytes
        if status.fill is not None and status.fill.bytes_per_second == 0:
            self._silent += 1

    @property
    def wants_a_pause(self) -> bool:
        return len(self._found) % self.BATCH == 0

    def build(
        self,
        cold_starts: Sequence[ColdStart],
        scrub: ScrubSummary | None = None,
        access: dict[Outcome, int] | None = None,
        spreads: Sequence[PipelineSpread] = (),
        region: RegionSummary | None = None,
    ) -> StoreSummary:
        return StoreSummary(
            at_ns=self._at_ns,
            budget=self._budget,
            used_bytes=self._used,
            evictable_bytes=self._evictable,
            states=dict(self._states),
            silent=self._silent,
            nodes=self._nodes,
            pipelines=tuple(sorted(self._found, key=lambda status: status.pipeline)),
            cold_starts=tuple(cold_starts),
            scrub=scrub,
            access=access,
            spreads=tuple(spreads),
            region=region,
        )
