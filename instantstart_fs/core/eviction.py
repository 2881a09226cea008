"""Which pipelines to empty when the store passes its high watermark: plain LRU by last request. Pure.

Never a hot, pinned, open or leased one (design rule 6): if those fill the store, the plan is short and says so by
freeing less than was asked.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    """A pipeline with cached bytes. ``bytes`` allocated on disk; ``last_request`` in seconds of the wall clock."""

    pipeline: str
    bytes: int
    last_request: float
    hot: bool = False
    pinned: bool = False
    open: bool = False
    leased: bool = False

    @property
    def evictable(self) -> bool:
        return self.bytes > 0 and not (self.hot or self.pinned or self.open or self.leased)


class Budget(msgspec.Struct, frozen=True):
    """``capacity`` in bytes; eviction begins above ``high`` and ends at ``low`` (fractions of it)."""

    capacity: int
    low: float = 0.85
    high: float = 0.95


def is_hot(last_request: float, keep_hot: float, now: float) -> bool:
    """Requested within ``keep_hot`` seconds. A stored time later than now counts as now (design rule 9)."""
    return now - min(last_request, now) < keep_hot


def plan(usage: int, budget: Budget, candidates: Iterable[Candidate], now: float, needed: int = 0) -> tuple[str, ...]:
    """The pipelines to evict, in order: from above the high watermark down to the low one.

    ``usage``: bytes in use; ``needed``: bytes about to be written, which count as used, and which are freed for even
    below the high watermark when the capacity would be passed (0 = only the watermarks speak).
    """
    wanted = usage + needed
    if wanted <= budget.high * budget.capacity:
        return ()
    target = budget.low * budget.capacity
    chosen: list[str] = []
    ordered = sorted(
        (candidate for candidate in candidates if candidate.evictable),
        key=lambda candidate: (min(candidate.last_request, now), candidate.pipeline),
    )
    for candidate in ordered:
        if wanted <= target:
            break
        chosen.append(candidate.pipeline)
        wanted -= candidate.bytes
    return tuple(chosen)
