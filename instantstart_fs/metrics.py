"""Defines every metric (name, unit, help text, labels) and renders Prometheus's text. docs/METRICS.md lists the same.

It counts nothing itself. Events are counted where they happen (telemetry.telemetry.Totals, filler.tally,
filler.events.FillStatistics); states are read from views.store_summary.

Labels are bounded. ``pipeline`` is given to at most ``http.metrics_pipelines`` pipelines, those requested last;
``origin`` to ORIGINS addresses, the rest count as "other"; all others have a handful of values fixed by the code.

    python -m instantstart_fs.metrics      prints the table of docs/METRICS.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal, get_args

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from instantstart_fs.core import startupcache
from instantstart_fs.core.access import Outcome
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.histogram import Histogram
from instantstart_fs.core.status import PipelineState, PipelineStatus
from instantstart_fs.filler.events import FillStatistics, RackStatistics, RegionStatistics
from instantstart_fs.telemetry.telemetry import FoundBy, Served, Totals
from instantstart_fs.views.store_summary import StoreSummary

ORIGINS = 32
STATES: tuple[PipelineState, ...] = ("cold", "filling", "partial", "warm", "unverified", "error")
FOUND_BY: tuple[FoundBy, ...] = get_args(FoundBy)
SERVED: tuple[Served, ...] = get_args(Served)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
STARTUP: tuple[startupcache.Outcome, ...] = get_args(startupcache.Outcome)
BREAKER = {"closed": 0, "half-open": 1, "open": 2}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Source(msgspec.Struct, frozen=True):
    """The facts that a scrape reads.

    ``everything``: the caller may see all pipelines. If not, ``store_summary`` has only those that it may see, and only
    metrics that are ``open`` are shown. ``healthy``: what /healthz says; None if it was not asked. ``requests``: the
    kernel's requests by kind, since the mount.
    """

    version: str
    uptime: float
    totals: Totals
    fills: FillStatistics
    store_summary: StoreSummary
    healthy: bool | None
    per_pipeline: int
    requests: Mapping[str, int] = {}
    everything: bool = True


Value = float | Histogram
Samples = Iterable[tuple[tuple[str, ...], Value]]


class Definition(msgspec.Struct, frozen=True):
    """One metric. ``samples`` gives (label values, value) pairs. A counter's name ends in _total."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    samples: Callable[[Source], Samples]
    labels: tuple[str, ...] = ()
    open: bool = False
    """Whether every caller sees it: it tells nothing about pipelines, or only about those in the caller's summary."""


def _one(value: Callable[[Source], float]) -> Callable[[Source], Samples]:
    return lambda source: [((), value(source))]


def _counted(counts: Callable[[Source], Mapping[str, int]]) -> Callable[[Source], Samples]:
    return lambda source: [((name,), count) for name, count in sorted(counts(source).items())]


def _bounded(found: Sequence[tuple[str, int]]) -> dict[str, int]:
    kept = dict(found[:ORIGINS])
    for _, count in found[ORIGINS:]:
        kept["other"] = kept.get("other", 0) + count
    return kept


def _retries(source: Source) -> Samples:
    shown = {origin: None for (origin, _), _ in source.fills.retried}
    kept = set(list(shown)[:ORIGINS])
    counts: dict[tuple[str, str], int] = {}
    for (origin, code), count in source.fills.retried:
        key = (origin if origin in kept else "other", code)
        counts[key] = counts.get(key, 0) + count
    return sorted(counts.items())


def _answers(source: Source) -> Samples:
    found = source.fills.answers
    samples: list[tuple[tuple[str, ...], Value]] = [((origin,), histogram) for origin, histogram in found[:ORIGINS]]
    if len(found) > ORIGINS:
        other = Histogram(found[0][1].bounds)
        for _, histogram in found[ORIGINS:]:
            other.add(histogram)
        samples.append((("other",), other))
    return samples


def _breakers(source: Source) -> Samples:
    worst: dict[str, int] = {}
    for state in source.fills.origins:
        # The fingerprint of the credentials is nobody's business; of several, the worst is shown.
        origin = state.origin.partition(" as ")[0]
        origin = "file" if origin.startswith("file:") else origin
        worst[origin] = max(worst.get(origin, 0), BREAKER.get(state.state, 0))
    return [((origin,), float(value)) for origin, value in sorted(worst.items())[:ORIGINS]]


def _shown(source: Source) -> list[PipelineStatus]:
    latest = sorted(source.store_summary.pipelines, key=lambda status: status.last_request or "", reverse=True)
    return latest[: source.per_pipeline]


def _each(value: Callable[[PipelineStatus], float | None]) -> Callable[[Source], Samples]:
    def samples(source: Source) -> Iterator[tuple[tuple[str, ...], float]]:
        for status in _shown(source):
            found = value(status)
            if found is not None:
                yield (status.pipeline,), float(found)

    return samples


def _last_request(status: PipelineStatus) -> float | None:
    return datetime.fromisoformat(status.last_request).timestamp() if status.last_request else None


def _last_cold_starts(source: Source) -> Samples:
    shown = {status.pipeline for status in _shown(source)}
    latest: dict[str, ColdStart] = {}
    for record in source.store_summary.cold_starts:
        if record.pipeline in shown and not record.live:
            latest.setdefault(record.pipeline, record)
    return [((pipeline,), record.loaded_after) for pipeline, record in sorted(latest.items())]


def _start_seconds(source: Source) -> Samples:
    found = source.totals.pipeline_seconds
    return [((status.pipeline,), found[status.pipeline]) for status in _shown(source) if status.pipeline in found]


def _rack(value: Callable[[RackStatistics], float]) -> Callable[[Source], Samples]:
    def samples(source: Source) -> Samples:
        rack = source.fills.region.rack if source.fills.region is not None else None
        return [((), value(rack))] if rack is not None else []

    return samples


def _rack_counted(value: Callable[[RackStatistics], tuple[tuple[str, int], ...]]) -> Callable[[Source], Samples]:
    def samples(source: Source) -> Samples:
        rack = source.fills.region.rack if source.fills.region is not None else None
        return [((reason,), count) for reason, count in value(rack)] if rack is not None else []

    return samples


def _regional(value: Callable[[RegionStatistics], float]) -> Callable[[Source], Samples]:
    def samples(source: Source) -> Samples:
        region = source.fills.region
        return [((), value(region))] if region is not None else []

    return samples


DEFINITIONS: tuple[Definition, ...] = (
    Definition("instantstart_info", "gauge", "", "1, with the daemon's version.", lambda s: [((s.version,), 1.0)], ("version",), open=True),
    Definition("instantstart_uptime_seconds", "gauge", "seconds", "Since the daemon started.", _one(lambda s: s.uptime), open=True),
    Definition(
        "instantstart_healthy", "gauge", "", "1 while /healthz says 200: the mount answers, the index takes writes, fetch workers live, the store is there.",
        lambda s: [] if s.healthy is None else [((), float(s.healthy))], open=True,
    ),
    Definition("instantstart_fuse_requests_total", "counter", "", "Requests of the kernel since the mount, by kind. What is read in passthrough sends none.", _counted(lambda s: s.requests), ("kind",)),
    Definition("instantstart_opens_total", "counter", "", "Opens of files, by who answers the reads: passthrough (the kernel itself), bind (the same, bound over the mount) or daemon.", _counted(lambda s: s.totals.opens), ("mode",)),
    Definition("instantstart_weight_opens_total", "counter", "", "Opens of weight files: hit (all of it was here) or miss.", _counted(lambda s: {name: s.totals.weight_opens[name] for name in ("hit", "miss")}), ("result",)),
    Definition("instantstart_served_bytes_total", "counter", "bytes", "Bytes of READs that the daemon answered, by where they were: store (here), fetched (waited for, and kept), passed (straight from the origin, not kept).", _counted(lambda s: {name: s.totals.served[name] for name in SERVED}), ("source",)),
    Definition("instantstart_open_files", "gauge", "", "Files that somebody has open; a bound file counts once, however often it is open.", _one(lambda s: s.totals.open_files)),
    Definition("instantstart_nodes", "gauge", "", "Entries of the table of nodeids: directories, generations (one each), and files that were fetched anew.", _one(lambda s: s.store_summary.nodes)),
    Definition("instantstart_reads_total", "counter", "", "READ requests that the daemon answered. Reads in passthrough, and of pages that the kernel has, are none.", _one(lambda s: s.totals.reads)),
    Definition("instantstart_read_bytes_total", "counter", "bytes", "Bytes served through the daemon.", _one(lambda s: s.totals.read_bytes)),
    Definition("instantstart_read_wait_seconds", "histogram", "seconds", "How long reads of bytes that were not here waited for them.", lambda s: [((), s.totals.waits)]),
    Definition("instantstart_errors_total", "counter", "", "Opens and reads that failed, by the error's code.", lambda s: [(key, count) for key, count in sorted(s.totals.errors.items())], ("operation", "code")),
    Definition("instantstart_fetched_bytes_total", "counter", "bytes", "Bytes that came from origins, in whole chunks.", _counted(lambda s: _bounded(s.fills.fetched_from)), ("origin",)),
    Definition("instantstart_regional_taken_bytes_total", "counter", "bytes", "Bytes that came from the regional tiers, each chunk verified.", _regional(lambda r: r.taken_bytes)),
    Definition("instantstart_regional_missed_bytes_total", "counter", "bytes", "Bytes of files under the region that came from their origins. taken / (taken + missed) is the hit ratio.", _regional(lambda r: r.missed_bytes)),
    Definition("instantstart_regional_hosts", "gauge", "", "Hosts of the region that live, as far as their heartbeats tell.", lambda s: [((), s.store_summary.region.hosts)] if s.store_summary.region is not None else []),
    Definition("instantstart_regional_written_bytes_total", "counter", "bytes", "Bytes that this host wrote to its regional tier.", _regional(lambda r: r.put_bytes)),
    Definition("instantstart_regional_pending_chunks", "gauge", "", "Chunks that wait to be written to the regional tier.", _regional(lambda r: r.pending)),
    Definition("instantstart_regional_claims_total", "counter", "", "Claims of chunk groups, won or lost to another host.", lambda s: [(("won",), s.fills.region.claims_won), (("lost",), s.fills.region.claims_lost)] if s.fills.region is not None else [], ("outcome",)),
    Definition("instantstart_regional_fallbacks_total", "counter", "", "What the regional tier did not give, or not rightly, by reason: missing, failed, wrong (the digest), forged (a record), not-written.", lambda s: _counted(lambda s: dict(s.fills.region.fallbacks if s.fills.region is not None else ()))(s), ("reason",)),
    Definition("instantstart_rack_neighbours", "gauge", "", "Hosts of this host's rack that give it chunks.", _rack(lambda r: r.neighbours)),
    Definition("instantstart_rack_taken_bytes_total", "counter", "bytes", "Bytes that came from neighbours in the rack, each chunk verified. They are counted as the region's, too.", _rack(lambda r: r.taken_bytes)),
    Definition("instantstart_rack_given_bytes_total", "counter", "bytes", "Bytes that neighbours in the rack took from this host.", _rack(lambda r: r.given_bytes)),
    Definition("instantstart_rack_fallbacks_total", "counter", "", "Chunks that a neighbour did not give, by reason: nothing (it has none of that pipeline), busy, failed, wrong (the digest).", _rack_counted(lambda r: r.fallbacks), ("reason",)),
    Definition("instantstart_rack_refused_total", "counter", "", "Requests of neighbours that got no chunk, by reason: nothing, later (not here in time), busy, ticket, malformed.", _rack_counted(lambda r: r.refused), ("reason",)),
    Definition("instantstart_regional_left_alone", "gauge", "", "1 while a tier (the region's own, or an upstream one) fails and is not asked.", lambda s: [((tier,), float(alone)) for tier, alone in s.fills.region.left_alone] if s.fills.region is not None else [], ("tier",)),
    Definition("instantstart_fetch_retries_total", "counter", "", "Requests to origins that failed, and were made again unless that was in vain; by the error's code (429 and 503 are origin-throttled), or worker-lost where the fetch process ended.", _retries, ("origin", "code")),
    Definition("instantstart_origin_answer_seconds", "histogram", "seconds", "From a request for bytes to the first byte of its good answer: connecting, TLS and redirects included, fetching them not.", _answers, ("origin",)),
    Definition("instantstart_fetches_in_flight", "gauge", "", "Chunks that are being fetched.", _one(lambda s: s.fills.in_flight)),
    Definition("instantstart_fetches_queued", "gauge", "", "Chunks that are wanted and not being fetched yet.", _one(lambda s: s.fills.queued)),
    Definition("instantstart_files_filling", "gauge", "", "Files that are being filled.", _one(lambda s: s.fills.files)),
    Definition("instantstart_fill_workers", "gauge", "", "Fetch processes that are ready.", _one(lambda s: s.fills.workers)),
    Definition("instantstart_fill_worker_deaths_total", "counter", "", "Fetch processes that ended and were replaced.", _one(lambda s: s.fills.worker_deaths)),
    Definition("instantstart_files_completed_total", "counter", "", "Files that became complete: sealed (proven by their digest) or unverified.", _counted(lambda s: s.totals.files_completed), ("state",)),
    Definition("instantstart_fills_total", "counter", "", "Load sets that became complete.", _one(lambda s: s.totals.warmed)),
    Definition("instantstart_fill_failures_total", "counter", "", "Files whose filling ended for good, by the error's code.", _counted(lambda s: s.totals.fill_failures), ("code",)),
    Definition("instantstart_digest_mismatches_total", "counter", "", "Files whose bytes were not those of the manifest. They were dropped and fetched again.", _one(lambda s: s.fills.poisoned)),
    Definition("instantstart_poisoned_served_bytes_total", "counter", "bytes", "Bytes that the daemon had served from files whose bytes then proved wrong.", _one(lambda s: s.totals.poisoned_served_bytes)),
    Definition("instantstart_origin_breaker_state", "gauge", "", "0 closed (all is well), 1 half-open (probing), 2 open (it counts as down for some pipeline, or for a file there). Only hosts that have failed: an origin, or its CDN.", _breakers, ("origin",)),
    Definition("instantstart_damaged_files_total", "counter", "", "Complete files whose bytes in the store were lost or not those that were sealed, by who found out: open, read, verify, scrub, or update (another generation had the same file). They were dropped and fetched again.", _counted(lambda s: {name: s.totals.damaged[name] for name in FOUND_BY}), ("found_by",)),
    Definition("instantstart_scrubbed_bytes_total", "counter", "bytes", "Bytes of complete files that the scrub has read and compared.", _one(lambda s: s.totals.scrubbed_bytes)),
    Definition("instantstart_scrub_resting", "gauge", "", "1 while demand keeps the scrub waiting. Only with store.scrub.", lambda s: [((), float(s.store_summary.scrub.resting))] if s.store_summary.scrub else []),
    Definition("instantstart_scrub_overdue_seconds", "gauge", "seconds", "By how much the pipeline that was not scrubbed for the longest time is late. Only with store.scrub.", lambda s: [((), s.store_summary.scrub.overdue)] if s.store_summary.scrub else []),
    Definition("instantstart_access_checks_total", "counter", "", "Questions to origins whether a pipeline's credentials may still fetch its source, by outcome: allowed, refused, or unknown (no answer). Those of add, update and verify --access are among them.", _counted(lambda s: {name: s.totals.access_checks[name] for name in OUTCOMES}), ("outcome",)),
    Definition("instantstart_pipelines_access", "gauge", "", "Pipelines by verdict of the access check: allowed, refused (said twice; out of view unless on_refusal says otherwise), unknown (the last question was not answered). Only with origins.recheck_access.", lambda s: [((name,), float(count)) for name, count in s.store_summary.access.items()] if s.store_summary.access is not None else [], ("verdict",)),
    Definition("instantstart_commits_total", "counter", "", "Group commits: fdatasync, then one index transaction.", _one(lambda s: s.fills.commits)),
    Definition("instantstart_index_stuck", "gauge", "", "1 while the index takes no commit; background filling waits.", _one(lambda s: float(s.fills.index_stuck))),
    Definition("instantstart_staged_bytes_total", "counter", "bytes", "Bytes of weight files brought into the page cache ahead of their readers.", _one(lambda s: s.totals.staged_bytes)),
    Definition("instantstart_store_used_bytes", "gauge", "bytes", "Cached bytes of all pipelines.", _one(lambda s: s.store_summary.used_bytes)),
    Definition("instantstart_store_capacity_bytes", "gauge", "bytes", "What the store may use.", _one(lambda s: s.store_summary.budget.capacity)),
    Definition("instantstart_store_low_watermark_bytes", "gauge", "bytes", "Eviction goes down to this.", _one(lambda s: s.store_summary.budget.low * s.store_summary.budget.capacity)),
    Definition("instantstart_store_high_watermark_bytes", "gauge", "bytes", "Eviction begins above this.", _one(lambda s: s.store_summary.budget.high * s.store_summary.budget.capacity)),
    Definition("instantstart_store_evictable_bytes", "gauge", "bytes", "Cached bytes of pipelines that are not hot, pinned, open, leased or being filled.", _one(lambda s: s.store_summary.evictable_bytes)),
    Definition("instantstart_evictions_total", "counter", "", "Pipelines whose bytes were dropped, by the evictor or by hand.", _one(lambda s: s.totals.evictions)),
    Definition("instantstart_evicted_bytes_total", "counter", "bytes", "Bytes dropped that way.", _one(lambda s: s.totals.evicted_bytes)),
    Definition("instantstart_pipelines", "gauge", "", "Pipelines by state.", lambda s: [((state,), float(s.store_summary.states.get(state, 0))) for state in STATES], ("state",), open=True),
    Definition("instantstart_pipelines_filling_without_bytes", "gauge", "", "Pipelines that are being filled and got no byte for the last 5 s.", _one(lambda s: s.store_summary.silent)),
    Definition("instantstart_cold_starts_total", "counter", "", "Cold starts, by the pipeline's state at the first open.", _counted(lambda s: s.totals.cold_starts), ("state",)),
    Definition("instantstart_cold_start_seconds", "histogram", "seconds", "Cold starts that have ended: from the first open to the last sign of loading.", lambda s: [((), s.totals.cold_start_seconds)]),
    Definition("instantstart_cold_start_phase_seconds", "histogram", "seconds", "Phases of cold starts that have ended (docs/COLDSTART.md).", lambda s: [((name,), found) for name, found in sorted(s.totals.phase_seconds.items())], ("phase",)),
    Definition("instantstart_pipeline_start_seconds", "histogram", "seconds", "Its cold starts that have ended: from the first to the last moment that is known.", _start_seconds, ("pipeline",), open=True),
    Definition("instantstart_startup_caches_total", "counter", "", "Starts by `instantstart run`, by what became of their startup cache: restored, first (nothing was saved yet), mismatch (of another key), damaged, not-owner, off, failed.", lambda s: [((name,), float(s.totals.startup[name])) for name in STARTUP], ("outcome",)),
    Definition("instantstart_pipeline_startup_cache_bytes", "gauge", "bytes", "What its startup caches take.", _each(lambda status: status.startup_bytes or 0), ("pipeline",), open=True),
    Definition("instantstart_pipeline_state", "gauge", "", "1 for the state that the pipeline is in.", lambda s: [((status.pipeline, status.state), 1.0) for status in _shown(s)], ("pipeline", "state"), open=True),
    Definition("instantstart_pipeline_cached_bytes", "gauge", "bytes", "Of the pipeline's load set.", _each(lambda status: status.cached_bytes), ("pipeline",), open=True),
    Definition("instantstart_pipeline_total_bytes", "gauge", "bytes", "Of the pipeline's load set.", _each(lambda status: status.total_bytes), ("pipeline",), open=True),
    Definition("instantstart_pipeline_fill_bytes_per_second", "gauge", "bytes per second", "While it is being filled: what came over the last 5 s.", _each(lambda status: status.fill.bytes_per_second if status.fill else None), ("pipeline",), open=True),
    Definition("instantstart_pipeline_last_request_timestamp_seconds", "gauge", "seconds since 1970", "When it was last requested.", _each(_last_request), ("pipeline",), open=True),
    Definition("instantstart_pipeline_last_cold_start_seconds", "gauge", "seconds", "Its last cold start: from the first open to the last sign of loading. Only while it is among the newest of all.", _last_cold_starts, ("pipeline",), open=True),
)  # fmt: skip


def _family(definition: Definition, source: Source) -> Metric:
    name, text, labels = definition.name, definition.help, definition.labels
    samples = list(definition.samples(source))
    if definition.kind == "histogram":
        histogram = HistogramMetricFamily(name, text, labels=labels)
        for values, value in samples:
            assert isinstance(value, Histogram)
            histogram.add_metric(values, value.cumulative(), value.total)
        return histogram
    kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    family = kind(name.removesuffix("_total"), text, labels=labels)
    for values, value in samples:
        assert not isinstance(value, Histogram)
        family.add_metric(values, value)
    return family


class _Once(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for definition in DEFINITIONS:
            if definition.open or self._source.everything:
                yield _family(definition, self._source)


def render(source: Source) -> bytes:
    """Return all metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(source))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


def table() -> str:
    """Return the table of docs/METRICS.md."""
    lines = ["| metric | kind | unit | labels | |", "|---|---|---|---|---|"]
    for definition in DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in definition.labels)
        text = definition.help + (" *Open.*" if definition.open else "")
        lines.append(f"| `{definition.name}` | {definition.kind} | {definition.unit} | {labels} | {text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
