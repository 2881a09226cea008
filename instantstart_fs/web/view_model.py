"""Words what the page and its JSON show of a store summary, as plain values. Pure.

A store summary has what its caller may see (visitors.py): ids, states, sizes and times of the pipelines that the mount
shows that user. Sums over all pipelines need ``everything``. Sources, revisions and error messages (which name them)
need ``details``. Credentials and paths are in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from instantstart_fs.core.coldstart import ColdStart, late, length, phases, scale
from instantstart_fs.core.humanize import human_bytes, human_seconds, number_of
from instantstart_fs.core.status import PipelineState, PipelineStatus
from instantstart_fs.filler.events import RackStatistics
from instantstart_fs.views.store_summary import RegionSummary, StoreSummary
from instantstart_fs.web.problems import Problem, problems

PAGE_SIZE = 50
MAX_PAGE_SIZE = 200
ORDER: dict[PipelineState, int] = {"error": 0, "filling": 1, "warm": 2, "unverified": 3, "partial": 4, "cold": 5}


class Query(msgspec.Struct, frozen=True):
    """Selects pipelines: those whose id contains ``text``, in ``state``; ``limit`` of them from ``offset`` on."""

    text: str = ""
    state: str = ""
    offset: int = 0
    limit: int = PAGE_SIZE


class Row(msgspec.Struct, frozen=True):
    pipeline: str
    state: PipelineState
    chip: str
    percent: int
    cached_bytes: int
    total_bytes: int
    size: str
    requested: str
    requested_at: str | None
    hot_until: str
    hot_until_at: str | None
    eta: str
    rate: str
    pinned: bool
    leases: int
    error: str | None
    uncached: str | None
    sources: tuple[str, ...]


class Bar(msgspec.Struct, frozen=True):
    """A stretch of a cold start. ``left`` and ``width`` are percent of the scale that all shown starts share; ``cut``
    says that it is longer than drawn."""

    name: str
    left: float
    width: float
    seconds: str
    cut: bool = False


class ColdStartRow(msgspec.Struct, frozen=True):
    pipeline: str
    state: PipelineState
    when: str
    started_at: str
    total: str
    running: bool
    bars: tuple[Bar, ...]
    summary: str


class SpreadRow(msgspec.Struct, frozen=True):
    """How long the starts of a pipeline take."""

    pipeline: str
    count: int
    p50: str
    p95: str
    p99: str
    advice: str


class StoreView(msgspec.Struct, frozen=True):
    used: str
    capacity: str
    percent: float
    low: float
    high: float
    evictable: str
    full: bool


class RegionView(msgspec.Struct, frozen=True):
    """The region's figures. ``taken`` are bytes from tiers, ``missed`` bytes from origins of files under the region.
    ``hit`` is in percent, None before any. ``fallbacks`` counts by reason what the tier did not give; ``rack`` says
    what came from neighbours and went to them; ``problems``: what else is wrong."""

    endpoint: str
    state: str
    why: str
    since: str | None
    hosts: int
    taken: str
    missed: str
    written: str
    hit: int | None
    pending: int
    claims_won: int
    claims_lost: int
    fallbacks: str
    rack: str | None = None
    problems: tuple[str, ...] = ()


class View(msgspec.Struct, frozen=True):
    """A page as it is drawn. Equal views are drawn alike."""

    rows: tuple[Row, ...]
    total: int
    matching: int
    query: Query
    states: dict[str, int]
    store: StoreView | None
    cold_starts: tuple[ColdStartRow, ...]
    spreads: tuple[SpreadRow, ...] = ()
    problems: tuple[Problem, ...] = ()
    problem_count: int = 0
    region: RegionView | None = None


def ordered(store_summary: StoreSummary) -> StoreSummary:
    """Sort pipelines: errors first, then fills, then by last request."""
    # Two stable sorts: latest request first within a state.
    found = sorted(store_summary.pipelines, key=lambda status: status.last_request or "", reverse=True)
    found.sort(key=lambda status: ORDER[status.state])
    return msgspec.structs.replace(store_summary, pipelines=tuple(found))


def view(store_summary: StoreSummary, query: Query, *, details: bool, everything: bool) -> View:
    """Return the page's view, in the order of the store summary. ``everything``: the caller sees all pipelines."""
    wanted: Sequence[PipelineStatus] = store_summary.pipelines
    if query.text or query.state:
        wanted = [status for status in wanted if _matches(status, query)]
    offset = max(0, min(query.offset, max(len(wanted) - 1, 0) // query.limit * query.limit))
    shown = wanted[offset : offset + query.limit]
    now = store_summary.at_ns / 1e9
    shown_problems, problem_count = problems(store_summary.pipelines, details=details)
    return View(
        problems=shown_problems,
        problem_count=problem_count,
        rows=tuple(row(status, now, details=details, everything=everything) for status in shown),
        total=len(store_summary.pipelines),
        matching=len(wanted),
        query=msgspec.structs.replace(query, offset=offset),
        states={state: store_summary.states.get(state, 0) for state in ORDER},
        store=_store(store_summary) if everything else None,
        cold_starts=cold_starts(store_summary.cold_starts[:10], now),
        spreads=tuple(
            SpreadRow(
                pipeline=found.pipeline,
                count=found.total.count,
                p50=precise_seconds(found.total.p50),
                p95=precise_seconds(found.total.p95),
                p99=precise_seconds(found.total.p99),
                advice=found.advice,
            )
            for found in store_summary.spreads[:10]
            if found.total.count > 1
        ),
        region=_region(store_summary.region) if everything and store_summary.region is not None else None,
    )


def _matches(status: PipelineStatus, query: Query) -> bool:
    return query.text.lower() in status.pipeline.lower() and query.state in ("", status.state)


def row(status: PipelineStatus, now: float, *, details: bool, everything: bool) -> Row:
    """Build one pipeline's row. ``now`` is the wall clock in seconds."""
    fill, share = status.fill, percent(status)
    error = status.error
    return Row(
        pipeline=status.pipeline,
        state=status.state,
        chip=chip(status),
        percent=share,
        cached_bytes=status.cached_bytes,
        total_bytes=status.total_bytes,
        size=human_bytes(status.total_bytes),
        requested=_ago(status.last_request, now),
        requested_at=status.last_request,
        hot_until=_ahead(status.hot_until, now),
        hot_until_at=status.hot_until,
        eta="" if fill is None else "stalled" if fill.eta_seconds is None else human_seconds(fill.eta_seconds),
        rate="" if fill is None else f"{human_bytes(fill.bytes_per_second)}/s",
        pinned=status.pinned,
        leases=status.leases,
        error=None if error is None else f"{error.code}: {error.message}" if details else error.code,
        # The whole reason names other pipelines and sizes.
        uncached=status.uncached
        if (details and everything) or status.uncached is None
        else status.uncached.partition(":")[0],
        sources=status.source if details else (),
    )


def chip(status: PipelineStatus) -> str:
    """Return the badge's text: ``warm``, ``filling 62 %``."""
    return f"{status.state} {percent(status)} %" if status.state in ("filling", "partial") else status.state


def percent(status: PipelineStatus) -> int:
    """Return the percentage of the bytes, including those on their way. It is 100 only when all are there."""
    if status.total_bytes <= 0:
        return 100 if status.state in ("warm", "unverified") else 0
    if status.cached_bytes >= status.total_bytes:
        return 100
    received = status.fill.received_bytes if status.fill is not None else 0
    return min(99, (status.cached_bytes + received) * 100 // status.total_bytes)


def _store(store_summary: StoreSummary) -> StoreView:
    budget = store_summary.budget
    share = 100 * store_summary.used_bytes / budget.capacity if budget.capacity else 0.0
    return StoreView(
        used=human_bytes(store_summary.used_bytes),
        capacity=human_bytes(budget.capacity),
        percent=round(min(share, 100.0), 1),
        low=round(100 * budget.low, 1),
        high=round(100 * budget.high, 1),
        evictable=human_bytes(store_summary.evictable_bytes),
        full=store_summary.used_bytes > budget.high * budget.capacity and not store_summary.evictable_bytes,
    )


def _region(found: RegionSummary) -> RegionView:
    figures = found.statistics
    came = figures.taken_bytes + figures.missed_bytes
    return RegionView(
        endpoint=found.endpoint,
        state=found.tier.state,
        why=found.tier.why,
        since=found.tier.since,
        hosts=found.hosts,
        taken=human_bytes(figures.taken_bytes),
        missed=human_bytes(figures.missed_bytes),
        written=human_bytes(figures.put_bytes),
        hit=figures.taken_bytes * 100 // came if came else None,
        pending=figures.pending,
        claims_won=figures.claims_won,
        claims_lost=figures.claims_lost,
        fallbacks=", ".join(f"{count} {reason}" for reason, count in figures.fallbacks),
        rack=_rack(figures.rack) if figures.rack is not None else None,
        problems=(
            *(f"upstream tier {one.endpoint}: {one.why}" for one in found.tier.upstream if one.state == "down"),
            *([found.tier.warning] if found.tier.warning else []),
        ),
    )


def _rack(figures: RackStatistics) -> str:
    others = number_of(figures.neighbours, "neighbour")
    taken, given = human_bytes(figures.taken_bytes), human_bytes(figures.given_bytes)
    failed = ", ".join(f"{count} {reason}" for reason, count in figures.fallbacks)
    return f"rack {figures.rack}: {others}, {taken} from them, {given} to them" + (
        f" (not: {failed})" if failed else ""
    )


def cold_starts(records: Sequence[ColdStart], now: float) -> tuple[ColdStartRow, ...]:
    """Return the rows, all on one scale, so that a long bar is a slow start."""
    width = scale(records)
    rows = []
    for record in records:
        moved = [f"fetched {human_bytes(record.fetched_bytes)}"] if record.fetched_bytes else []
        if record.uncached_bytes:
            moved.append(f"uncached: {human_bytes(record.uncached_bytes)} came from the origin and were not kept")
        if record.staged_bytes:
            moved.append(f"staged {human_bytes(record.staged_bytes)}")
        if record.waits:
            moved.append(f"slowest read waited {precise_seconds(record.slowest_wait)}")
        moved += [
            f"{moment} came {human_seconds(after)} later, or was told late" for moment, after in late(record).items()
        ]
        at = datetime.fromtimestamp(record.started_ns / 1e9).astimezone()
        rows.append(
            ColdStartRow(
                pipeline=record.pipeline,
                state=record.state,
                when=_since(now - record.started_ns / 1e9),
                started_at=at.isoformat(timespec="seconds"),
                total=precise_seconds(length(record)),
                running=record.live,
                bars=_bars(record, width),
                summary=", ".join(moved) or "nothing fetched",
            )
        )
    return tuple(rows)


def _bars(record: ColdStart, width: float) -> tuple[Bar, ...]:
    """Return the bars. ``width`` is how many seconds are drawn."""
    bars = []
    found = phases(record)
    for phase in found:
        left = min(100 * (phase.start - found[0].start) / width, 99.7)
        wide = max(100 * phase.seconds / width, 0.3)
        cut = left + wide > 100.5
        bars.append(
            Bar(phase.name, round(left, 2), round(min(wide, 100 - left), 2), precise_seconds(phase.seconds), cut)
        )
    return tuple(bars)


def as_json(shown: View) -> Any:
    return msgspec.to_builtins(shown)


# -- words -------------------------------------------------------------------------------------------------------------


def precise_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 60 else human_seconds(seconds)


def _distance(seconds: float) -> str:
    """Return the time until then, coarse enough for a page to change once a minute and not every second."""
    seconds = max(seconds, 0)
    if seconds < 60:
        return ""
    if seconds < 3600:
        return f"{seconds // 60:.0f} min"
    return f"{seconds // 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds // 86400:.0f} days"


def coarse(seconds: float) -> str:
    """Return how long something has been: 5 min, 3 h, 12 days."""
    return _distance(seconds) or "less than a minute"


def _since(seconds: float) -> str:
    distance = _distance(seconds)
    return f"{distance} ago" if distance else "just now"


def _ago(at: str | None, now: float) -> str:
    return "never" if at is None else _since(now - datetime.fromisoformat(at).timestamp())


def _ahead(at: str | None, now: float) -> str:
    if at is None:
        return "—"
    left = datetime.fromisoformat(at).timestamp() - now
    return "no longer" if left <= 0 else f"for {_distance(left) or 'a minute'}"
