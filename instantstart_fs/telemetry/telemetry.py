"""Records events for the metrics (totals) and for `explain` (cold-start records). Lives on the trio thread.

Calls are cheap (about 1 µs), never fail and never affect what is served. Totals count from the daemon's start. Records
are written to the index in batches; if the index takes none, history is lost and never a read.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec
import trio

from instantstart_fs.catalog.loadset_learner import LoadSetLearner
from instantstart_fs.catalog.model import CachedFile, Pipeline, counts_as_request
from instantstart_fs.core import coldstart
from instantstart_fs.core.access import Outcome
from instantstart_fs.core.coldstart import ColdStart, Facts, Moment, PhaseName, PipelineSpread
from instantstart_fs.core.coldstart_tracker import Starts, Tracker
from instantstart_fs.core.histogram import Histogram
from instantstart_fs.errors import InstantStartError, NoColdStart
from instantstart_fs.index.environment import Index
from instantstart_fs.index.transactions import WriteTxn

log = logging.getLogger(__name__)

WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0)
LOAD_BUCKETS = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
"""Upper bounds in seconds, of reads that waited and of cold starts."""
WRITE_SECONDS = 1.0


Served = Literal["store", "fetched", "passed"]
"""Source of a READ's bytes: the store; the store, after a wait for their fill; the origin itself, without keeping
them."""

FoundBy = Literal["open", "read", "verify", "scrub", "update"]
"""The operation that found a complete file damaged. ``update``: it was found in another generation that shares the
file."""


class Totals:
    """Counters since the daemon's start; bytes unless a name says otherwise."""

    def __init__(self) -> None:
        self.opens: Counter[str] = Counter()
        """Opens by mode: passthrough (the kernel reads the store's file itself), bind (the same, through a bind mount),
        or daemon."""
        self.weight_opens: Counter[str] = Counter()
        """Opens of weight files: hit (the whole file was cached) or miss."""
        self.served: Counter[Served] = Counter()
        """Bytes of READs, by their source."""
        self.open_files = 0
        """Opens that were not closed yet."""
        self.reads = 0
        self.read_bytes = 0
        self.waits = Histogram(WAIT_BUCKETS)
        self.errors: Counter[tuple[str, str]] = Counter()
        """Errors by (open | read, error code)."""
        self.files_completed: Counter[str] = Counter()
        """Completed files by state: sealed or unverified."""
        self.warmed = 0
        self.fill_failures: Counter[str] = Counter()
        self.evictions = 0
        self.evicted_bytes = 0
        self.poisoned_served_bytes = 0
        self.damaged: Counter[FoundBy] = Counter()
        """Complete files whose bytes were lost or not those that were sealed, by who found out."""
        self.scrubbed_bytes = 0
        self.access_checks: Counter[Outcome] = Counter()
        self.staged_bytes = 0
        self.cold_starts: Counter[str] = Counter()
        """Cold starts by the pipeline's state at the first open."""
        self.cold_start_seconds = Histogram(LOAD_BUCKETS)
        self.phase_seconds: dict[PhaseName, Histogram] = {}
        """Durations of the phases of cold starts that have ended."""
        self.pipeline_seconds: dict[str, Histogram] = {}
        """The whole of each, by pipeline."""
        self.startup: Counter[str] = Counter()
        """Starts by `run`, by what became of their startup cache."""

    def cold_start_ended(self, record: ColdStart) -> None:
        self.cold_start_seconds.observe(record.loaded_after)
        if record.restored:
            self.startup[record.restored] += 1
        for phase in coldstart.phases(record):
            self.phase_seconds.setdefault(phase.name, Histogram(LOAD_BUCKETS)).observe(phase.seconds)
        if took := coldstart.length(record):
            self.pipeline_seconds.setdefault(record.pipeline, Histogram(LOAD_BUCKETS)).observe(took)


class Telemetry:
    """Owned by the Library. ``facts``: a pipeline's load set as it is now. ``learner``: is told of opens and reads.

    It has more than 25 public methods, because each kind of event has one, so that a caller reports it in one call.
    """

    def __init__(
        self,
        index: Index,
        now_ns: Callable[[], int],
        facts: Callable[[Pipeline], Facts],
        clock: Callable[[], float] = trio.current_time,
        learner: LoadSetLearner | None = None,
    ) -> None:
        self._index = index
        self._now_ns = now_ns
        self._facts = facts
        self._clock = clock
        self._learner = learner
        self._tracker = Tracker()
        self._history: dict[str, dict[int, ColdStart]] = {}
        self._count = 0
        self._wake = trio.Event()
        self.totals = Totals()
        self._spreads: dict[str, PipelineSpread | None] = {}
        """Computed when somebody asks, until another start ends."""

    # -- what happens ------------------------------------------------------------------------------------------------

    def opened(self, file: CachedFile, *, passthrough: bool, mode: str = "") -> Starts:
        """Record an open. Returns the cold starts that it belongs to, for the reads and the close of this open.

        ``passthrough``: whether the kernel reads the file itself. ``mode``: what to count the open as instead."""
        self.totals.opens[mode or ("passthrough" if passthrough else "daemon")] += 1
        self.totals.open_files += 1
        if self._learner is not None:
            self._learner.opened(file, passthrough=passthrough)
        if not counts_as_request(file):
            return ()
        self.totals.weight_opens["hit" if file.complete else "miss"] += 1
        pipeline, tracker, now = file.generation.pipeline.id, self._tracker, self._clock()
        facts = None
        if tracker.begins(pipeline, now):
            facts = self._facts(file.generation.pipeline)
            self.totals.cold_starts[facts.state] += 1
        starts = tracker.opened(
            pipeline,
            file.entry.path,
            size=file.size,
            passthrough=passthrough,
            now=now,
            wall_ns=self._now_ns(),
            facts=facts,
        )
        if tracker.changed:
            self._wake.set()
        return starts

    def closed(self, file: CachedFile, starts: Starts) -> None:
        self.totals.open_files -= 1
        if self._learner is not None:
            self._learner.closed(file)
        self._tracker.closed(starts, self._clock())

    def served(self, source: Served, count: int) -> None:
        """Count the bytes of a READ by where they came from."""
        self.totals.served[source] += count

    def read(self, file: CachedFile, starts: Starts, count: int) -> None:
        """Record a READ that the daemon answered."""
        self.totals.reads += 1
        self.totals.read_bytes += count
        file.served_bytes += count
        if file.served_bytes >= file.size and self._learner is not None:
            self._learner.read_whole(file)
        self._tracker.read(starts, count, self._clock())

    @contextlib.contextmanager
    def waiting(self, file: CachedFile, starts: Starts) -> Iterator[None]:
        """Record a read's wait for absent bytes, inside the block."""
        since, failed = self._clock(), True
        self._tracker.waiting(starts, since)
        try:
            yield
            failed = False
        finally:
            now = self._clock()
            self.totals.waits.observe(now - since)
            self._tracker.waited(starts, file.entry.path, now - since, now, failed=failed)

    def uncached(self, starts: Starts, count: int) -> None:
        """Record ``count`` bytes that went straight from the origin to a reader."""
        self._tracker.uncached(starts, count, self._clock())

    def failed(self, operation: str, error: InstantStartError) -> None:
        """Count a failed operation: open or read."""
        self.totals.errors[operation, error.code] += 1

    def fetched(self, file: CachedFile, count: int) -> None:
        self._tracker.fetched(file.generation.pipeline.id, count, self._clock())

    def completed(self, file: CachedFile, *, warm: bool) -> None:
        """Record a complete file. ``warm``: it was the last one of its load set."""
        self.totals.files_completed[file.state.value] += 1
        self.totals.warmed += warm
        if counts_as_request(file):
            self._tracker.sealed(file.generation.pipeline.id, self._clock())
            if self._tracker.changed:
                self._wake.set()

    def fill_failed(self, error: InstantStartError) -> None:
        self.totals.fill_failures[error.code] += 1

    def poisoned(self, file: CachedFile) -> None:
        """Count a file whose bytes proved wrong."""
        self.totals.poisoned_served_bytes += file.served_bytes

    def damaged(self, found_by: FoundBy) -> None:
        """Count a complete file that was replaced because its bytes were lost, unreadable or wrong."""
        self.totals.damaged[found_by] += 1

    def scrubbed(self, count: int) -> None:
        """Count bytes that the scrub has read."""
        self.totals.scrubbed_bytes += count

    def access_checked(self, outcome: Outcome) -> None:
        """Count an access check by its outcome."""
        self.totals.access_checks[outcome] += 1

    def evicted(self, count: int) -> None:
        self.totals.evictions += 1
        self.totals.evicted_bytes += count

    def staged(self, pipeline: str, count: int, *, file_done: bool) -> None:
        """Record ``count`` bytes of a weight file that were read ahead; ``file_done``: the file is staged whole."""
        self.totals.staged_bytes += count
        self._tracker.staged(pipeline, count, self._clock(), file_done=file_done)

    def forget(self, pipeline: str) -> None:
        """Forget a removed pipeline."""
        self._tracker.forget(pipeline)
        self.totals.pipeline_seconds.pop(pipeline, None)
        self._spreads.pop(pipeline, None)
        self._count -= len(self._history.pop(pipeline, ()))

    # -- cold starts -------------------------------------------------------------------------------------------------

    def begin_start(self, pipeline: Pipeline, start: str, requested_ns: int | None) -> None:
        """Begin the record of a start by `run`, with this id."""
        facts = self._facts(pipeline)
        self.totals.cold_starts[facts.state] += 1
        self._tracker.begin_start(
            pipeline.id, start, requested_ns, now=self._clock(), wall_ns=self._now_ns(), facts=facts
        )
        self._wake.set()

    def report_start(self, pipeline: str, start: str, **changes: object) -> None:
        """Add what `run` reports to the start's record. Raises NoColdStart if there is none (any more)."""
        if not self._tracker.report(pipeline, start, self._clock(), **changes):
            raise NoColdStart(f"{pipeline}: no start {start!r} is known; the daemon was restarted meanwhile")
        self._wake.set()

    def end_start(self, pipeline: str, start: str) -> None:
        """End a start whose `run` has disconnected, if it did not report the end itself."""
        running = self._tracker.running(pipeline, self._clock())
        if any(record.start == start and record.ready_ns is None for record in running):
            self._tracker.report(pipeline, start, self._clock(), ended=True)
            self._wake.set()

    def mark(self, pipeline: str, moment: Moment, at_ns: int | None, start: str = "") -> None:
        """Record a mark. ``at_ns``: wall clock, None for now. Raises NoColdStart if no start fits, UsageError for a
        time that cannot be meant."""
        wall_ns = self._now_ns()
        if at_ns is not None:
            coldstart.check_mark(moment, at_ns, wall_ns)
        known = list(self._history.get(pipeline, {}).values())
        marked = self._tracker.mark(pipeline, moment, at_ns, known, now=self._clock(), wall_ns=wall_ns, start=start)
        if marked is None:
            if moment != "requested":
                raise NoColdStart(
                    f"{pipeline}: no cold start began in the hour before that moment; "
                    f"`instantstart explain {pipeline}` lists those that are known"
                )
            return
        if marked.started_ns in self._history.get(pipeline, {}):
            self._history[pipeline][marked.started_ns] = marked
        self._wake.set()

    def cold_starts(self, pipeline: str) -> list[ColdStart]:
        """Return a pipeline's records, newest first, live ones included."""
        known = dict(self._history.get(pipeline, {}))
        known.update((record.started_ns, record) for record in self._tracker.untaken(pipeline))
        for live in self._tracker.running(pipeline, self._clock()):
            known[live.started_ns] = live
        return [known[at] for at in sorted(known, reverse=True)]

    def spread(self, pipeline: str) -> PipelineSpread | None:
        """Return the spread of a pipeline's recorded starts; None if none has ended."""
        if pipeline not in self._spreads:
            records = list(self._history.get(pipeline, {}).values())
            total = coldstart.spreads(records).get("total")
            advice = coldstart.attack(records)
            self._spreads[pipeline] = None if total is None else PipelineSpread(pipeline, total, advice)
        return self._spreads[pipeline]

    def latest(self, count: int) -> list[ColdStart]:
        """Return the latest records of all pipelines, newest first. Live ones are as last written, seconds ago at
        most."""
        records = (record for records in self._history.values() for record in records.values())
        found = heapq.nlargest(count, records, key=lambda record: record.started_ns)
        return [self._current(record) for record in found]

    def _current(self, record: ColdStart) -> ColdStart:
        for live in self._tracker.running(record.pipeline, self._clock()):
            if live.started_ns == record.started_ns:
                return live
        return record

    # -- keeping them ------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the records of the index. Blocks; call it before any event."""
        for record in self._index.read(lambda txn: list(txn.cold_starts())):
            known = record if not record.live else msgspec.structs.replace(record, interrupted=True)
            self._history.setdefault(record.pipeline, {})[record.started_ns] = known
            self._count += 1

    async def run(self) -> None:
        """Write changed records and end quiet ones, until cancelled; then write a last time."""
        try:
            while True:
                deadline = self._tracker.tick(self._clock())
                if self._tracker.changed:
                    await self._write()
                with trio.move_on_at(deadline) if deadline < math.inf else trio.CancelScope():
                    await self._wake.wait()
                self._wake = trio.Event()
                # Sixteen shards opened in a row are one write.
                await trio.sleep(WRITE_SECONDS)
        finally:
            self._tracker.note_live(self._clock())
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await self._write()

    async def _write(self) -> None:
        changed = self._tracker.take_changed()
        if not changed:
            return
        for record in changed:
            kept = self._history.setdefault(record.pipeline, {})
            self._count += record.started_ns not in kept
            if not record.live:
                self._spreads.pop(record.pipeline, None)
                before = kept.get(record.started_ns)
                if before is None or before.live:
                    self.totals.cold_start_ended(record)
            kept[record.started_ns] = record
        surplus = self._surplus(changed)

        def write(txn: WriteTxn) -> None:
            for record in changed:
                if txn.get_pipeline(record.pipeline) is not None:
                    txn.put_cold_start(record)
            for record in surplus:
                txn.delete_cold_start(record.pipeline, record.started_ns)

        try:
            await self._index.write(write)
        except InstantStartError as error:
            log.warning("%d cold-start records are kept in memory only: %s", len(changed), error.message)

    def _surplus(self, changed: Sequence[ColdStart]) -> list[ColdStart]:
        crowded = [
            record
            for pipeline in {record.pipeline for record in changed}
            if len(self._history[pipeline]) > coldstart.PER_PIPELINE
            for record in self._history[pipeline].values()
        ]
        surplus = coldstart.surplus(crowded)
        if self._count - len(surplus) > coldstart.OVERALL:
            surplus = coldstart.surplus(record for records in self._history.values() for record in records.values())
        for record in surplus:
            kept = self._history[record.pipeline]
            del kept[record.started_ns]
            self._count -= 1
            if not kept:
                del self._history[record.pipeline]
        return surplus
