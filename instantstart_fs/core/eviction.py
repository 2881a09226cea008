"""Decides which pipelines to evict, and whether new bytes may come in: whole pipelines, least recently requested
first. Pure: upkeep/eviction.py carries it out.

Never a hot, pinned, open or leased one (design rule 6): where those fill the store, a plan is short and says so by
freeing less than was asked, and an admission is refused. Remains of cold pipelines, which are worth nothing to an
engine, go before complete ones. A refused admission evicts nobody.

The store has two limits, and both must hold: its own capacity (eviction begins above ``high`` of it and goes down to
``low``), and the free space that other users of the filesystem are left (``floor``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from instantstart_fs.core.humanize import human_bytes


class Candidate(msgspec.Struct, frozen=True):
    """A pipeline with cached bytes. ``bytes`` allocated on disk; ``last_request`` in seconds of the wall clock.

    ``promised``: bytes that a fill was admitted for and that have not come yet. ``partial``: not complete, and nothing
    is filling it.
    """

    pipeline: str
    bytes: int
    last_request: float
    hot: bool = False
    pinned: bool = False
    open: bool = False
    leased: bool = False
    partial: bool = False
    promised: int = 0

    @property
    def frees(self) -> int:
        """The bytes that an eviction frees, promised ones included: the pipeline's fill ends, too."""
        return self.bytes + self.promised

    @property
    def evictable(self) -> bool:
        return self.frees > 0 and not (self.hot or self.pinned or self.open or self.leased)


class Budget(msgspec.Struct, frozen=True):
    """``capacity`` in bytes; eviction begins above ``high`` and ends at ``low`` (fractions of it).

    ``free``: bytes that the filesystem has left now, of which ``floor`` are to stay free.
    """

    capacity: int
    low: float = 0.85
    high: float = 0.95
    floor: int = 0
    free: float = math.inf


class Refusal(msgspec.Struct, frozen=True):
    """The reason why bytes may not come in. ``needed``: how many bytes; ``limit``: the limit that they exceed, in
    bytes; ``evictable``: how many could be evicted; ``kept``: which pipelines may not be evicted and why, "hot: a, b;
    pinned: c". If the filesystem is full and not the store, ``floor``: how much of it is to stay free, and ``free``:
    how much still is."""

    reason: Literal["store full", "quota"]
    needed: int
    limit: int
    evictable: int = 0
    kept: str = ""
    floor: int = 0
    free: int = 0

    def __str__(self) -> str:
        needed, limit, evictable = (
            human_bytes(count, short=True) for count in (self.needed, self.limit, self.evictable)
        )
        if self.reason == "quota":
            return f"quota: needs {needed}, and its quota is {limit}"
        text = f"store full: needs {needed}; evictable {evictable}"
        if self.floor:
            free, floor = human_bytes(self.free, short=True), human_bytes(self.floor, short=True)
            text += f"; its disk has {free} free, and min_free keeps {floor}"
        elif not self.kept:
            text += f" of a budget of {limit}"
        return f"{text}; {self.kept}" if self.kept else text


def without_others(text: str) -> str:
    """The part of a refusal's text that names no other pipelines, for callers that may see only their own."""
    return text.partition(";")[0]


class Admission(msgspec.Struct, frozen=True):
    """``evict`` first, in this order; or ``refusal``, and then nobody is evicted."""

    evict: tuple[str, ...] = ()
    refusal: Refusal | None = None


def is_hot(last_request: float, keep_hot: float, now: float) -> bool:
    """Requested within ``keep_hot`` seconds. A stored time later than now counts as now (design rule 9)."""
    return now - min(last_request, now) < keep_hot


def free_bytes(usage: int, budget: Budget) -> int:
    """Return the bytes that still fit, by the tighter of the two limits; negative beyond one."""
    return math.floor(min(budget.high * budget.capacity - usage, budget.free - budget.floor))


def shortage(usage: int, budget: Budget, needed: int = 0) -> int:
    """Return by how many bytes ``needed`` more are too many; 0 if they fit."""
    return max(0, needed - free_bytes(usage, budget))


def plan(usage: int, budget: Budget, candidates: Iterable[Candidate], now: float, needed: int = 0) -> tuple[str, ...]:
    """The pipelines to evict, in order, when a limit is passed: down to the low watermark, and to the floor.

    ``usage``: bytes in use; ``needed``: bytes about to be written, which count as used. 10,000 candidates take
    milliseconds (bench/scale.py).
    """
    if shortage(usage, budget, needed) <= 0:
        return ()
    over = max(usage + needed - budget.low * budget.capacity, budget.floor + needed - budget.free)
    remains: list[tuple[float, str, int]] = []
    whole: list[tuple[float, str, int]] = []
    for candidate in candidates:
        frees = candidate.bytes + candidate.promised
        # Spelled out, not ``evictable``: a property call each is a third of the time.
        if frees > 0 and not (candidate.hot or candidate.pinned or candidate.open or candidate.leased):
            group = remains if candidate.partial else whole
            group.append((min(candidate.last_request, now), candidate.pipeline, frees))
    chosen: list[str] = []
    for group in (remains, whole):
        if over <= 0:
            break
        group.sort()
        for _, pipeline, frees in group:
            if over <= 0:
                break
            chosen.append(pipeline)
            over -= frees
    return tuple(chosen)


def idle(candidates: Iterable[Candidate], max_idle: float, now: float) -> tuple[str, ...]:
    """Pipelines that were not requested for ``max_idle`` seconds: they are evicted even with space left."""
    return tuple(
        candidate.pipeline
        for candidate in candidates
        if candidate.evictable and now - candidate.last_request > max_idle
    )


def admit(
    usage: int,
    budget: Budget,
    candidates: Sequence[Candidate],
    now: float,
    needed: int,
    *,
    own: int = 0,
    quota: int | None = None,
) -> Admission:
    """Whether ``needed`` bytes more of one pipeline may come in. ``candidates``: the others alone.

    What was promised to the others counts as if it were there. ``own``: what the pipeline takes already, which with
    ``needed`` may not pass its ``quota``: a pipeline over its quota evicts no other.
    """
    if needed <= 0:
        return Admission()
    if quota is not None and own + needed > quota:
        return Admission(refusal=Refusal("quota", own + needed, quota))
    promised = sum(candidate.promised for candidate in candidates)
    least = shortage(usage, budget, needed + promised)
    if least <= 0:
        return Admission()
    evictable = sum(
        candidate.bytes + candidate.promised
        for candidate in candidates
        if not (candidate.hot or candidate.pinned or candidate.open or candidate.leased)
    )
    if evictable < least:
        refusal = Refusal("store full", needed, int(budget.high * budget.capacity), evictable, kept(candidates))
        below_floor = usage + budget.free - budget.floor
        if below_floor < refusal.limit:
            refusal = msgspec.structs.replace(
                refusal, limit=int(max(below_floor, 0)), floor=budget.floor, free=int(budget.free)
            )
        return Admission(refusal=refusal)
    return Admission(evict=plan(usage, budget, candidates, now, needed + promised))


SHOWN = 5
"""Names per reason in a refusal: it is one line of `status`."""


def kept(candidates: Iterable[Candidate]) -> str:
    """The pipelines that may not be evicted, by the first reason that holds, as text."""
    reasons: list[tuple[str, Callable[[Candidate], bool]]] = [
        ("pinned", lambda candidate: candidate.pinned),
        ("leased", lambda candidate: candidate.leased),
        ("in use", lambda candidate: candidate.open),
        ("hot", lambda candidate: candidate.hot),
    ]
    found: dict[str, list[str]] = {}
    for candidate in candidates:
        for name, holds in reasons:
            if candidate.bytes and holds(candidate):
                found.setdefault(name, []).append(candidate.pipeline)
                break
    parts = []
    for name in sorted(found):
        names = sorted(found[name])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        parts.append(f"{name}: {', '.join(names[:SHOWN])}{more}")
    return "; ".join(parts)
