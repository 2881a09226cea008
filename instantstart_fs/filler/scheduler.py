"""Filler: the library's interface to filling files. It drives the fill plan and composes the parts that carry it out.

    demand, fill ─► FillPlan ─► requests ─► Delivery ─► fetch processes
                        ▲                                     │
                        │                                     ▼
              FailurePolicy ◄── failed ── Arrivals ── arrived ─► present, readers wake
                                              └─► Completion ─► Committer ─► durable, sealed

The parts own the state of every FillTarget that is not complete, on the trio thread. They never close ``target.blob``
(readers may be inside a call): that is the library's, once the target is sealed, poisoned or failed and ``wait_quiet``
has returned.

What ends a target for good: the pinned object changed, is gone, or is refused by its source, twice in a row; a digest
mismatch; a server that misbehaves in one way again and again (core/faults.py); a full or broken store; cancellation.
All but change, mismatch, misbehaviour (until ``reset_failures``) and cancellation are tried again by a demand that
comes REVIVE_SECONDS later. Everything else is retried with backoff, a CDN's refusal too, and readers wait up to their
own deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.faults import Fault
from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.retry import Effort, quantum
from instantstart_fs.core.trust import endpoint_trusted, may_serve_unsealed
from instantstart_fs.errors import (
    DigestMismatch,
    FillCancelled,
    InstantStartError,
    OriginBroken,
    OriginChanged,
    OriginIncompatible,
)
from instantstart_fs.filler.arrivals import Arrivals
from instantstart_fs.filler.breakers import Breakers
from instantstart_fs.filler.completion import Completion
from instantstart_fs.filler.delivery import Delivery
from instantstart_fs.filler.events import BreakerState, FillEvents, FillStatistics
from instantstart_fs.filler.failures import FailurePolicy
from instantstart_fs.filler.fill import Fill
from instantstart_fs.filler.origin_backoff import OriginBackoff
from instantstart_fs.filler.quarantine import Quarantine, etag_hint
from instantstart_fs.filler.rates import Rates
from instantstart_fs.filler.settings import FillSettings
from instantstart_fs.filler.sources import Locator, Tier, chain_for
from instantstart_fs.filler.space import FreeSpace, SpaceRequests
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.tally import Tally
from instantstart_fs.filler.target import COMPLETE, FileKey, FillTarget
from instantstart_fs.filler.tierkey import TierKey, file_key
from instantstart_fs.filler.uncached import UncachedReader
from instantstart_fs.index.environment import Index
from instantstart_fs.origins.base import Origin, OriginKey
from instantstart_fs.store.blobstore import BlobStore

if TYPE_CHECKING:
    from instantstart_fs.filler.region_follow import RegionSettings
    from instantstart_fs.filler.regional import Regional
    from instantstart_fs.regional.keys import RegionKey

__all__ = ["FillEvents", "FillSettings", "FillStatistics", "Filler"]

REVIVE_SECONDS = 5.0


class Filler:
    """The filler's face to the daemon. Everything but ``run``, ``read_through`` and ``wait_quiet`` answers at once. It
    has more than 8 collaborators, because it puts the filler together.

    ``tiers``: sources asked before the origin. ``free_space``: called when the store is full (upkeep/eviction.py).
    """

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        settings: FillSettings,
        events: FillEvents,
        *,
        tiers: Sequence[Tier] = (),
        free_space: FreeSpace | None = None,
        region: RegionSettings | None = None,
        slot_of: Callable[[str, RegionKey], str | None] = lambda pipeline, key: None,
    ) -> None:
        self._settings = settings
        self._quantum = quantum(settings.read_deadline)
        self._events = events
        self._tiers = tuple(tiers)
        self._plan: FillPlan[FileKey] = FillPlan(settings.connections, settings.demand_headroom)
        self._locator = Locator(settings.locate_timeout)
        self._delivery = Delivery(store, settings, self._locator, region=region is not None)
        self._table = FillTable(self._plan, self._delivery, events)
        self._breakers = Breakers()
        self._origin_backoff = OriginBackoff(self._plan, self._table.fills, self._breakers, settings)
        self._quarantine = Quarantine()
        self._rates = Rates()
        self._tally = Tally()
        self._space = SpaceRequests(self._plan, self._table, free_space)
        self._completion = Completion(
            store,
            index,
            settings,
            events,
            plan=self._plan,
            table=self._table,
            delivery=self._delivery,
            origin_backoff=self._origin_backoff,
            quarantine=self._quarantine,
            space=self._space,
        )
        self._arrivals = Arrivals(
            settings,
            events,
            plan=self._plan,
            table=self._table,
            delivery=self._delivery,
            completion=self._completion,
            failures=FailurePolicy(
                events, self._plan, self._table, self._origin_backoff, self._locator, self._quarantine, self._space
            ),
            origin_backoff=self._origin_backoff,
            locator=self._locator,
            rates=self._rates,
            tally=self._tally,
        )
        self._uncached = UncachedReader(self._locator, settings, self._breakers, self._origin_backoff, self._tally)
        self.regional: Regional | None = None
        if region is not None:
            from instantstart_fs.filler import regional as module  # late: only a region needs it

            regional = module.Regional(
                region, slot_of, self._plan, self._table, self._delivery, serve_verified=self.may_stream
            )
            self._uncached.tiers = regional.reads
            self.regional = self._table.regional = self._arrivals.regional = self._completion.regional = regional
        self._start_workers: trio.Event | None = None
        """The event that starts workers which ``hold_workers`` held back."""

    # -- running -------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fill until cancelled; then end the workers and commit what is present. ``started`` when a worker is ready; at
        once after ``hold_workers``."""
        async with trio.open_nursery() as committing:
            # Outside the workers' nursery: its last commit comes after they have ended.
            committing.start_soon(self._completion.committer.run)
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._space.run)
                    if self.regional is not None:
                        await nursery.start(self.regional.run)
                    await nursery.start(self._deliver)
                    nursery.start_soon(self._pump)
                    task_status.started()
            finally:
                committing.cancel_scope.cancel()

    async def _deliver(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self._delivery.run(self._arrivals, start_workers=self._start_workers, task_status=task_status)

    def hold_workers(self) -> None:
        """Start no worker until ``start_workers``; call it before ``run``. Requests wait for one."""
        self._start_workers = trio.Event()

    def start_workers(self) -> None:
        """Start workers that were held back. Idempotent."""
        if self._start_workers is not None:
            self._start_workers.set()

    async def _pump(self) -> None:
        """Carry out the plan whenever something changed or a time has come."""
        table = self._table
        while True:
            table.wakeup = trio.Event()
            now = trio.current_time()
            times = [math.inf]
            for origin, pipeline, limit, probe_at in self._breakers.limits():
                self._plan.set_limit(origin, limit, pipeline)
                if probe_at > now:
                    times.append(probe_at)
            self._send(now)
            if stopped := self._plan.preempt(now):
                for request in stopped:
                    if isinstance(request.key, TierKey):
                        if self.regional is not None:
                            self.regional.preempted(request.key, request.chunk)
                        self._delivery.stop(table.fills[file_key(request.key)], request.chunk)
                        continue
                    fill = table.fills[request.key]
                    fill.slow = True
                    self._delivery.stop(fill, request.chunk)
                    table.stream_ended(fill)
                self._send(now)
            times.append(self._plan.next_time(now) or math.inf)
            with trio.move_on_at(min(times)):
                await table.wakeup.wait()

    def _send(self, now: float) -> None:
        fills, queue_moved = self._table.fills, self._table.queue_moved
        for request in self._plan.next_requests(now, background=self._completion.committer.stuck is None):
            tier = isinstance(request.key, TierKey)
            fill = fills[file_key(request.key) if tier else request.key]
            fill.target.efforts.setdefault(request.chunk, Effort(queue_moved(fill.target), self._quantum))
            if tier and self.regional is not None:
                self.regional.send(request, fill)
            else:
                self._delivery.dispatch(request, fill)

    # -- what is wanted ------------------------------------------------------------------------------------------

    def demand(self, target: FillTarget, wanted: ByteRange) -> None:
        """Fetch these bytes ahead of all background work: a reader waits for them. Idempotent and cheap."""
        if target.state in COMPLETE:
            return
        if target.failed and not self._revive(target):
            return
        fill = self._enter(target)
        if fill is None:
            return
        chunks = target.present.chunks_of(wanted)
        self._delivery.urge(fill, chunks)
        self._plan.demand(target.key, chunks)
        if self.regional is not None:
            self.regional.demand(target.key, chunks, whole=not target.serve_unsealed)
        if not target.serve_unsealed:
            for key in self._table.keys(target.key):
                self._plan.demand_whole(key)  # the reader waits for the seal, and that for every chunk
        self._origin_backoff.sync_breaker(fill)
        self._completion.check(fill)
        self._table.wakeup.set()

    def judge(self, target: FillTarget) -> None:
        """Decide whether bytes of it may be served before its digest is proven, by what is known of its origin now."""
        trusted = endpoint_trusted(target.origin.key.scheme, target.origin.key.endpoint)
        target.serve_unsealed = may_serve_unsealed(self._settings.serve_unsealed, trusted)

    def fill(self, pipeline: str, targets: Sequence[FillTarget]) -> None:
        """Fill these in the background, in this order, in the place of the pipeline's last order. Complete ones are
        skipped."""
        self._table.background[pipeline] = set()
        self._plan.set_background(pipeline, [])
        self.fill_more(pipeline, targets)

    def fill_more(self, pipeline: str, targets: Sequence[FillTarget]) -> None:
        """Fill these in the background too, after the pipeline's present order: a million files come in slices."""
        entered = [fill for target in targets if (fill := self._enter_unless_complete(target)) is not None]
        keys = [fill.target.key for fill in entered]
        background = self._table.background
        background.setdefault(pipeline, set()).update(keys)
        if not background[pipeline]:
            del background[pipeline]
        entries = keys if self.regional is None else [entry for key in keys for entry in self._table.keys(key)]
        self._plan.append_background(pipeline, entries)
        for fill in entered:
            self._completion.check(fill)
        self._table.wakeup.set()

    def want(self, target: FillTarget) -> None:
        """Fetch the whole file ahead of background work for who wants all of it soon, and no byte at once. Under a
        region that waits for what other hosts pull, where a reader would not."""
        if self.regional is None:
            self.demand(target, ByteRange(0, target.present.size))
        else:
            self.fill_also(target)

    @property
    def may_stream(self) -> bool:
        """Whether bytes may be loaded, though not used, before their file is proven."""
        return self._settings.serve_unsealed != "never"

    def fill_also(self, target: FillTarget) -> None:
        """Fill this one in the background too, before the rest of the pipeline's order."""
        fill = self._enter_unless_complete(target)
        if fill is None:
            return
        self._table.background.setdefault(target.key.pipeline, set()).add(target.key)
        for key in self._table.keys(target.key):
            self._plan.add_background(key)
        self._completion.check(fill)
        self._table.wakeup.set()

    def cancel_target(self, target: FillTarget, error: InstantStartError) -> None:
        """Fail it with ``error``, wake its readers, write nothing more (``wait_quiet`` says when that is so)."""
        fill = self._table.find(target)
        self._completion.committer.forget(target)
        if fill is not None:
            self._table.fail(fill, error)
        elif target.state not in COMPLETE and not target.failed:
            target.fail(error)

    def cancel_pipeline(self, pipeline: str, error: InstantStartError) -> None:
        """``cancel_target`` for all of the pipeline's targets."""
        for fill in self._table.of_pipeline(pipeline):
            self.cancel_target(fill.target, error)
        self._completion.committer.forget_pipeline(pipeline)
        self._table.background.pop(pipeline, None)
        self._table.last_arrival.pop(pipeline, None)
        for origin in self._breakers.forget(pipeline):
            self._plan.set_limit(origin, None, pipeline)
        self._locator.forget(pipeline)
        if self.regional is not None:
            self.regional.forget(pipeline)
        self._uncached.forget(pipeline)
        self._quarantine.forget_refusals(pipeline)  # a later pipeline of this name is another one

    async def wait_quiet(self, pipeline: str) -> None:
        """Return when no cancelled file of the pipeline is written any more, by workers or by a commit."""
        await self._delivery.wait_quiet(pipeline)
        await self._completion.committer.wait_quiet(pipeline)

    def reset_failures(self, pipeline: str) -> None:
        """Let quarantined and failed files of the pipeline be tried at once (a `warm` asks for it)."""
        self._quarantine.reset_failures(pipeline)

    # -- what is asked -------------------------------------------------------------------------------------------

    def is_filling(self, pipeline: str) -> bool:
        """Whether background work of the pipeline is under way, waiting for seals included."""
        return bool(self._table.background.get(pipeline))

    def in_background(self, target: FillTarget) -> bool:
        """Whether the whole file is being filled already."""
        return target.key in self._table.background.get(target.key.pipeline, ())

    def rate(self, pipeline: str) -> float:
        """Return the bytes per second received over the last few seconds."""
        return self._rates.rate(pipeline, trio.current_time())

    def received(self, pipeline: str) -> int:
        """Return the bytes received of chunks that are not whole yet: progress, not presence."""
        return self._delivery.received(pipeline)

    def breaker_open(self, key: OriginKey, file: FileKey | None = None) -> OriginBroken | None:
        """The error to refuse opens (of this file) with while its origin is known to fail. None while it is not, and
        where only this open could find out that the origin answers again."""
        if file is None:
            return self._breakers.broken_for_anyone(key)
        return self._breakers.broken(key, file, half_open=not self._plan.idle(key, file.pipeline))

    def in_memory(self, key: FileKey, origin: Origin, offset: int, length: int) -> bool:
        """Whether ``read_through`` has these bytes already."""
        return self._uncached.in_memory(key, origin, offset, length)

    async def read_through(
        self,
        key: FileKey,
        entry: FileEntry,
        origin: Origin,
        offset: int,
        view: memoryview,
        since: float | None = None,
        *,
        chunk_size: int = 0,
    ) -> None:
        """Fill ``view`` from a regional tier or the origin and keep nothing (filler/uncached.py). ``since``:
        trio.current_time() since which the reader waits; None = now. ``chunk_size``: of the file's generation; 0 = no
        tier is asked. Raises InstantStartError."""
        refusal = self._quarantine.refusal(key, entry.path, trio.current_time(), etag_hint(entry.file))
        if refusal is not None:
            raise refusal
        try:
            await self._uncached.read(key, entry, chunk_size, origin, offset, view, since)
        except OriginIncompatible as error:
            if error.fault != Fault.WHOLE:  # a read that keeps the whole file succeeds all the same
                self._quarantine.refuse(key, error)
            raise

    def statistics(self) -> FillStatistics:
        """Counters and states of this moment, for metrics."""
        return FillStatistics(
            workers=len(self._delivery.pool.workers),
            worker_deaths=self._delivery.pool.deaths,
            files=len(self._table.fills),
            in_flight=self._delivery.in_flight,
            queued=self._plan.queued(),
            retries=self._tally.retried.total(),
            fetched_bytes=self._arrivals.fetched_bytes,
            commits=self._completion.committer.commits,
            poisoned=self._completion.poisoned,
            index_stuck=self._completion.committer.stuck is not None,
            region=self.regional.statistics if self.regional is not None else None,
            fetched_from=tuple(sorted(self._tally.fetched.items())),
            retried=tuple(sorted(self._tally.retried.items())),
            answers=tuple(sorted(self._tally.answers.items())),
            origins=tuple(
                BreakerState(host, state, self._delivery.in_flight_at(host, origin))
                for host, origin, state in self._breakers.states()
            ),
        )

    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the running workers."""
        return tuple(worker.pid for worker in self._delivery.pool.workers)

    def refusal(self, target: FillTarget) -> InstantStartError | None:
        """The failure that a demand made now would meet at once; None if the target would be tried."""
        if not target.failed:
            return None
        if isinstance(target.error, OriginChanged | DigestMismatch | FillCancelled):
            return target.error
        if isinstance(target.error, OriginIncompatible):
            return self._quarantine.refusal(
                target.key, target.entry.path, trio.current_time(), etag_hint(target.entry.file)
            )
        return target.error if trio.current_time() < target.failed_at + REVIVE_SECONDS else None

    # -- entering ------------------------------------------------------------------------------------------------

    def _revive(self, target: FillTarget) -> bool:
        if self.refusal(target) is not None:
            return False
        target.failed, target.error = False, None
        return True

    def _enter_unless_complete(self, target: FillTarget) -> Fill | None:
        if target.state in COMPLETE or (target.failed and not self._revive(target)):
            return None
        return self._enter(target)

    def _enter(self, target: FillTarget) -> Fill | None:
        """The fill of this target, begun if there is none; None if the file is quarantined."""
        key = target.key
        fill = self._table.fills.get(key)
        if fill is not None and fill.target is target:
            return fill
        now = trio.current_time()
        error = self._quarantine.refusal(key, target.entry.path, now, etag_hint(target.entry.file))
        if error is not None:
            target.fail(error)
            self._events.target_failed(target, error)
            return None
        if fill is not None:
            self._completion.committer.forget(fill.target)
            self._table.fail(fill, FillCancelled(f"{target.entry.path}: a new incarnation takes its place"))
        mismatches = self._quarantine.mismatches(key)
        # It is not known whose bytes were wrong: from then on only the origin is asked.
        fill = Fill(target, chain_for(target, () if mismatches else self._tiers))
        fill.regional = not mismatches
        self._table.enter(fill)
        self.judge(target)
        if mismatches:
            self._plan.hold(key, now + self._origin_backoff.backoff(mismatches + 1))
        return fill
