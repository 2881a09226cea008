"""Filler: drives core/fillplan and carries out what it says. The library's only door to filling.

    demand, fill ─► FillPlan ─► requests ─► Delivery (filler/delivery.py) ─► arrived ─► present, readers wake
                        ▲                                     │                 └► Committer ─► sealed
                        └─── Pacing (filler/pacing.py) ◄── failed

Owns the state of every FillTarget that is not complete, on the trio thread: it alone changes ``present``, ``durable``,
``state``, ``error``. It never closes ``target.blob`` (readers may be inside a call): that is the library's, once the
target is sealed, poisoned or failed and ``wait_quiet`` has returned.

What ends a target for good: the pinned object changed, is gone, or is refused by its source, twice in a row; a digest
mismatch; a server that misbehaves in one way again and again (core/faults.py); a full or broken store; cancellation.
All but change, mismatch, misbehaviour (until ``reset_failures``) and cancellation are tried again by a demand that
comes REVIVE_SECONDS later. Everything else is retried with backoff, a CDN's refusal too, and readers wait up to their
own deadline.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Awaitable, Callable, Sequence

import trio

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.faults import Fault
from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.manifest import ETAG_HINT, FileEntry, ManifestFile, rests_on_etag
from instantstart_fs.core.retry import Effort, quantum
from instantstart_fs.core.serving import endpoint_trusted, may_serve_unsealed
from instantstart_fs.errors import (
    AccessRefused,
    DigestMismatch,
    FillCancelled,
    InstantStartError,
    LocationExpired,
    OriginBroken,
    OriginChanged,
    OriginIncompatible,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OutOfResources,
    StoreError,
    StoreFull,
)
from instantstart_fs.filler.breakers import Breakers, host_of
from instantstart_fs.filler.committer import CommitEvents, Committer
from instantstart_fs.filler.delivery import Delivery, DeliveryEvents
from instantstart_fs.filler.direct import Direct
from instantstart_fs.filler.pacing import Pacing
from instantstart_fs.filler.quarantine import Quarantine
from instantstart_fs.filler.rates import Rates
from instantstart_fs.filler.sources import Locator, Source, Tier, chain_for
from instantstart_fs.filler.state import BreakerState, FillEvents, Filling, FillSettings, FillStatistics, Sent
from instantstart_fs.filler.tally import WORKER_LOST, Tally
from instantstart_fs.filler.target import COMPLETE, FileKey, FileState, FillTarget
from instantstart_fs.index.environment import Index
from instantstart_fs.origins.base import OriginKey
from instantstart_fs.store.blobstore import BlobStore

__all__ = ["FillEvents", "FillSettings", "FillStatistics", "Filler"]

log = logging.getLogger(__name__)

REVIVE_SECONDS = 5.0
ROOM_SECONDS = 60.0
"""How long the evictor may take to make room before the fill gives up."""
ROOM_PACE = 1.0


class Filler(CommitEvents, DeliveryEvents):
    """Everything but ``run`` and ``wait_quiet`` answers at once. ``tiers``: links asked before the origin.

    ``free_space``: asked when the store is full; frees space if it can and says whether it did (upkeep/eviction.py).
    """

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        settings: FillSettings,
        events: FillEvents,
        *,
        tiers: Sequence[Tier] = (),
        free_space: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self._settings = settings
        self._events = events
        self._tiers = tuple(tiers)
        self.free_space = free_space
        self._plan: FillPlan[FileKey] = FillPlan(settings.connections, settings.demand_headroom)
        self._committer = Committer(store, index, settings.commit_bytes, settings.commit_seconds, self)
        self._locator = Locator(settings.locate_timeout)
        self._rates = Rates()
        self._fillings: dict[FileKey, Filling] = {}
        self._background: dict[str, set[FileKey]] = {}
        self._moved: dict[str, float] = {}
        """When something last came for a pipeline that is being filled."""
        self._breakers = Breakers()
        self._delivery = Delivery(store, settings, self._locator, self)
        self._pacing = Pacing(self._plan, self._fillings, self._breakers, settings)
        self._tally = Tally()
        self._direct = Direct(
            self._locator,
            settings,
            broken=functools.partial(self._breakers.broken, half_open=False),
            answered=self._pacing.origin_answers,
            failed=self._pacing.origin_fails,
            tally=self._tally,
        )
        self._quarantine = Quarantine()
        self._freeing_space: set[str] = set()
        self._room_at: dict[str, float] = {}
        self._wakeup = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._workers_wanted: trio.Event | None = None
        """Where the workers are to be started later: when."""
        self._fetched = 0
        self._poisonings = 0

    # -- the library's side --------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fill until cancelled; then end the workers and commit what is present. ``started`` when a worker is ready; at
        once after ``hold_workers``."""
        async with trio.open_nursery() as committing:
            # Outside the workers' nursery: its last commit comes after they have ended.
            committing.start_soon(self._committer.run)
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = self._delivery.nursery = nursery
                    if self._workers_wanted is None:
                        await nursery.start(self._delivery.pool.run)
                    else:
                        nursery.start_soon(self._run_workers_later, self._workers_wanted)
                    nursery.start_soon(self._pump)
                    task_status.started()
            finally:
                self._nursery = self._delivery.nursery = None
                committing.cancel_scope.cancel()

    async def _run_workers_later(self, wanted: trio.Event) -> None:
        await wanted.wait()
        await self._delivery.pool.run()

    def hold_workers(self) -> None:
        """Before ``run``: start no worker until ``start_workers``. What is asked for meanwhile waits for one."""
        self._workers_wanted = trio.Event()

    def start_workers(self) -> None:
        """Where they were held. Idempotent."""
        if self._workers_wanted is not None:
            self._workers_wanted.set()

    def demand(self, target: FillTarget, wanted: ByteRange) -> None:
        """A reader waits for these bytes: they go ahead of all background work. Idempotent and cheap."""
        if target.state in COMPLETE:
            return
        if target.failed and not self._revive(target):
            return
        filling = self._enter(target)
        if filling is None:
            return
        chunks = target.present.chunks_of(wanted)
        self._delivery.urge(filling, chunks)
        self._plan.demand(target.key, chunks)
        if not target.serve_unsealed:
            self._plan.demand_whole(target.key)  # the reader waits for the seal, and that for every chunk
        self._pacing.show_breaker(filling)
        self._check_complete(filling)
        self._wakeup.set()

    def fill(self, pipeline: str, targets: Sequence[FillTarget]) -> None:
        """Fill these in the background, in this order; it replaces the pipeline's last order. Complete ones are
        skipped."""
        self._background[pipeline] = set()
        self._plan.set_background(pipeline, [])
        self.fill_more(pipeline, targets)

    def fill_more(self, pipeline: str, targets: Sequence[FillTarget]) -> None:
        """Fill these in the background too, after what the pipeline's order holds: a million files come in slices."""
        entered: list[Filling] = []
        for target in targets:
            if target.state in COMPLETE or (target.failed and not self._revive(target)):
                continue
            filling = self._enter(target)
            if filling is not None:
                entered.append(filling)
        keys = [filling.target.key for filling in entered]
        self._background.setdefault(pipeline, set()).update(keys)
        if not self._background[pipeline]:
            del self._background[pipeline]
        self._plan.append_background(pipeline, keys)
        for filling in entered:
            self._check_complete(filling)
        self._wakeup.set()

    def fill_also(self, target: FillTarget) -> None:
        """Fill this one in the background too, before what the pipeline's order still holds, which stays."""
        if target.state in COMPLETE or (target.failed and not self._revive(target)):
            return
        filling = self._enter(target)
        if filling is None:
            return
        self._background.setdefault(target.key.pipeline, set()).add(target.key)
        self._plan.add_background(target.key)
        self._check_complete(filling)
        self._wakeup.set()

    def cancel_target(self, target: FillTarget, error: InstantStartError) -> None:
        """Fail it with ``error``, wake its readers, write nothing more (``wait_quiet`` says when that is so)."""
        filling = self._fillings.get(target.key)
        self._committer.forget(target)
        if filling is not None and filling.target is target:
            self._end(filling, error)
        elif target.state not in COMPLETE and not target.failed:
            target.error, target.failed, target.failed_at = error, True, trio.current_time()
            target.wake()

    def cancel_pipeline(self, pipeline: str, error: InstantStartError) -> None:
        """``cancel_target`` for all of the pipeline's targets."""
        for filling in [filling for key, filling in self._fillings.items() if key.pipeline == pipeline]:
            self.cancel_target(filling.target, error)
        self._committer.forget_pipeline(pipeline)
        self._background.pop(pipeline, None)
        self._moved.pop(pipeline, None)
        for origin in self._breakers.forget(pipeline):
            self._plan.set_limit(origin, None, pipeline)
        self._locator.forget(pipeline)
        self._direct.forget(pipeline)
        self._quarantine.forget_refusals(pipeline)  # whatever has this name later is another pipeline

    async def wait_quiet(self, pipeline: str) -> None:
        """Return when no cancelled file of the pipeline is written any more, by workers or by a commit."""
        await self._delivery.wait_quiet(pipeline)
        await self._committer.wait_quiet(pipeline)

    def is_filling(self, pipeline: str) -> bool:
        """Whether background work of it is under way, waiting for its seal included."""
        return bool(self._background.get(pipeline))

    def in_background(self, target: FillTarget) -> bool:
        """Whether all of it is being filled already."""
        return target.key in self._background.get(target.key.pipeline, ())

    def rate(self, pipeline: str) -> float:
        """Bytes per second that came for it over the last few seconds."""
        return self._rates.rate(pipeline, trio.current_time())

    def received(self, pipeline: str) -> int:
        """Bytes that came for it and are no whole chunks yet: progress, not presence."""
        return self._delivery.received(pipeline)

    def breaker_open(self, key: OriginKey, file: FileKey | None = None) -> OriginBroken | None:
        """What to refuse opens (of this file) with while it is known that its origin fails; None while it is not, and
        where nobody but who opens it would find out that it answers again."""
        if file is None:
            return self._breakers.broken_for_anyone(key)
        return self._breakers.broken(key, file, half_open=not self._plan.idle(key, file.pipeline))

    def in_memory(self, key: FileKey, offset: int, length: int) -> bool:
        """Whether ``read_through`` has these bytes already."""
        return self._direct.in_memory(key, offset, length)

    async def read_through(
        self, key: FileKey, entry: FileEntry, origin: Source, offset: int, view: memoryview, since: float | None = None
    ) -> None:
        """Fill ``view`` straight from the origin; nothing is kept (filler/direct.py). ``since``: trio.current_time()
        from which on somebody waits; None = now. Raises InstantStartError."""
        refusal = self._quarantine.refusal(key, entry.path, trio.current_time(), _hint(entry.file))
        if refusal is not None:
            raise refusal
        try:
            await self._direct.read(key, entry, origin, offset, view, since)
        except OriginIncompatible as error:
            if error.fault != Fault.WHOLE:  # who keeps the file can have it all the same
                self._quarantine.refuse(key, error)
            raise

    def reset_failures(self, pipeline: str) -> None:
        """Somebody asked for it again on purpose (`warm`): quarantined and failed files of it may be tried at once."""
        self._quarantine.reset_failures(pipeline)

    def statistics(self) -> FillStatistics:
        return FillStatistics(
            workers=len(self._delivery.pool.workers),
            worker_deaths=self._delivery.pool.deaths,
            files=len(self._fillings),
            in_flight=self._delivery.in_flight,
            queued=self._plan.queued(),
            retries=self._tally.retried.total(),
            fetched_bytes=self._fetched,
            commits=self._committer.commits,
            poisoned=self._poisonings,
            index_stuck=self._committer.stuck is not None,
            fetched_from=tuple(sorted(self._tally.fetched.items())),
            retried=tuple(sorted(self._tally.retried.items())),
            answers=tuple(sorted(self._tally.answers.items())),
            origins=tuple(
                BreakerState(host, state, self._delivery.in_flight_at(host, origin))
                for host, origin, state in self._breakers.states()
            ),
        )

    def worker_pids(self) -> tuple[int, ...]:
        return tuple(worker.pid for worker in self._delivery.pool.workers)

    # -- entering and leaving ------------------------------------------------------------------------------------

    def refusal(self, target: FillTarget) -> InstantStartError | None:
        """What a demand made now would meet at once: the failure that ended this target; None if it would be tried."""
        if not target.failed:
            return None
        if isinstance(target.error, OriginChanged | DigestMismatch | FillCancelled):
            return target.error
        if isinstance(target.error, OriginIncompatible):
            return self._quarantine.refusal(
                target.key, target.entry.path, trio.current_time(), _hint(target.entry.file)
            )
        return target.error if trio.current_time() < target.failed_at + REVIVE_SECONDS else None

    def _revive(self, target: FillTarget) -> bool:
        if self.refusal(target) is not None:
            return False
        target.failed, target.error = False, None
        return True

    def _enter(self, target: FillTarget) -> Filling | None:
        key = target.key
        filling = self._fillings.get(key)
        if filling is not None and filling.target is target:
            return filling
        now = trio.current_time()
        error = self._quarantine.refusal(key, target.entry.path, now, _hint(target.entry.file))
        if error is not None:
            target.failed, target.failed_at, target.error = True, now, error
            target.wake()
            self._events.target_failed(target, error)
            return None
        if filling is not None:
            self._committer.forget(filling.target)
            self._end(filling, FillCancelled(f"{target.entry.path}: a new incarnation takes its place"))
        mismatches = self._quarantine.mismatches(key)
        # Whose bytes were wrong is not known: from then on the origin alone is asked.
        filling = Filling(target, chain_for(target, () if mismatches else self._tiers))
        self._fillings[key] = filling
        self._plan.add(key, key.pipeline, filling.source.key, target.present)
        target.on_unwaited = functools.partial(self._unwaited, target)
        target.queue_moved = functools.partial(self._queue_moved, filling)
        origin = target.origin.key
        trusted = endpoint_trusted(origin.scheme, origin.endpoint)
        target.serve_unsealed = may_serve_unsealed(self._settings.serve_unsealed, trusted)
        if mismatches:
            self._plan.hold(key, now + self._pacing.backoff(mismatches + 1))
        return filling

    def _unwaited(self, target: FillTarget, chunks: list[int]) -> None:
        """Its readers have gone without these chunks: nothing is fetched for nobody."""
        filling = self._fillings.get(target.key)
        if filling is None or filling.target is not target:
            return
        self._plan.undemand(target.key, chunks)
        if not target.waiting:
            self._plan.undemand_whole(target.key)

    def _queue_moved(self, filling: Filling) -> float:
        """When something last came for what a chunk of it that was not asked for yet stands in line with: its pipeline;
        its own file where that is held back."""
        target = filling.target
        if filling.failures:
            return target.last_progress
        return max(target.last_progress, self._moved.get(target.key.pipeline, -math.inf))

    def _demand_again(self, target: FillTarget) -> None:
        """Bytes that were here are not any more: whoever waits for them waits on."""
        self._plan.demand(target.key, [chunk for chunk in target.waiting if chunk not in target.present])

    def _leave(self, filling: Filling) -> None:
        """Forget a filling: its requests come to nothing, its worker closes the file."""
        if filling.done:
            return
        filling.done = True
        filling.target.left()
        key = filling.target.key
        del self._fillings[key]
        self._plan.remove(key)
        pending = self._background.get(key.pipeline)
        if pending is not None:
            pending.discard(key)
            if not pending:
                del self._background[key.pipeline]
        for sent in list(filling.sent):
            self._delivery.unsend(sent)
        filling.waiting.clear()
        self._delivery.close_at_worker(filling)
        self._wakeup.set()

    def _end(self, filling: Filling, error: InstantStartError) -> None:
        """The target has failed for good."""
        target = filling.target
        self._leave(filling)
        target.error, target.failed, target.failed_at = error, True, trio.current_time()
        target.wake()
        self._events.target_failed(target, error)

    # -- sending -------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        """Carry out the plan, whenever something changed or time has come."""
        while True:
            self._wakeup = trio.Event()
            now = trio.current_time()
            times = [math.inf]
            for origin, pipeline, limit, probe_at in self._breakers.limits():
                self._plan.set_limit(origin, limit, pipeline)
                if probe_at > now:
                    times.append(probe_at)
            self._send(now)
            if stopped := self._plan.preempt(now):
                for request in stopped:
                    filling = self._fillings[request.key]
                    filling.slow = True
                    self._delivery.stop(filling, request.chunk)
                    self._stream_ended(filling)
                self._send(now)
            times.append(self._plan.next_time(now) or math.inf)
            with trio.move_on_at(min(times)):
                await self._wakeup.wait()

    def _send(self, now: float) -> None:
        for request in self._plan.next_requests(now, background=self._committer.stuck is None):
            filling = self._fillings[request.key]
            filling.target.efforts.setdefault(
                request.chunk, Effort(self._queue_moved(filling), quantum(self._settings.read_deadline))
            )
            self._delivery.dispatch(request, filling)

    # -- what comes back from the workers ------------------------------------------------------------------------

    def on_opened(self, filling: Filling) -> None:
        if filling.target.entry.file.digest is None:
            self._check_complete(filling)  # an empty file waited for nothing but its blob

    def on_emptied(self, filling: Filling) -> None:
        self._plan.refill(filling.target.key)
        self._demand_again(filling.target)
        self._wakeup.set()

    def on_located(self, filling: Filling) -> None:
        if not filling.target.serve_unsealed and filling.target.waiting:
            self._plan.demand_whole(filling.target.key)  # readers wait for the seal, and that for every chunk
            self._wakeup.set()

    def on_progress(self, sent: Sent, count: int) -> None:
        target, now = sent.filling.target, trio.current_time()
        sent.counted += count
        self._plan.progressed(target.key, sent.chunk, count, now)
        effort = target.efforts.get(sent.chunk)
        if effort is not None and effort.received(sent.counted, now):
            target.last_progress = self._moved[target.key.pipeline] = now
        self._rates.add(target.key.pipeline, count, now)

    def on_paused(self, seconds: float) -> None:
        self._plan.pause(trio.current_time() + seconds)

    def on_hashed(self, filling: Filling) -> None:
        self._check_complete(filling)

    def on_unhashable(self, filling: Filling, error: InstantStartError) -> None:
        self._end(filling, error)

    def on_worker_lost(self, filling: Filling, lost: list[Sent]) -> None:
        for sent in lost:
            self._tally.failed(filling.source.key, WORKER_LOST)
            self._plan.failed(filling.target.key, sent.chunk)
        self._stream_ended(filling)
        self._check_complete(filling)
        self._wakeup.set()

    def on_arrived(self, sent: Sent) -> None:
        filling, chunk = sent.filling, sent.chunk
        target = filling.target
        self._delivery.unsend(sent)
        self._stream_ended(filling)
        self._plan.arrived(target.key, chunk)
        if sent.answered is not None:
            self._tally.answered(filling.source.key, sent.answered)
        if chunk not in target.present:  # else it came with the whole file
            self._came(sent, chunk)
        self._check_complete(filling)
        self._wakeup.set()

    def on_streamed(self, sent: Sent, chunk: int) -> None:
        target = sent.filling.target
        if chunk in target.present:
            return
        if chunk != sent.chunk:  # that one is in flight as long as the stream is
            self._plan.arrived(target.key, chunk)
        self._came(sent, chunk)
        if chunk != sent.chunk:
            moved = Effort(trio.current_time(), quantum(self._settings.read_deadline))
            target.efforts[sent.chunk] = moved  # its own readers wait for what the stream brings before it
        self._check_complete(sent.filling)
        self._wakeup.set()

    def on_waits(self, sent: Sent) -> None:
        filling = sent.filling
        self._delivery.unsend(sent)
        self._plan.failed(filling.target.key, sent.chunk)
        filling.target.efforts.pop(sent.chunk, None)  # what the stream brings is what its readers wait for
        if any(other.worker is not None for other in filling.sent):
            filling.streaming = True
            self._plan.hold(filling.target.key, math.inf)
        self._stream_ended(filling)
        self._wakeup.set()

    def _stream_ended(self, filling: Filling) -> None:
        """Ask for chunks again when the last of the requests is over of which one took the whole file."""
        if filling.streaming and not any(sent.worker is not None for sent in filling.sent):
            filling.streaming = False
            self._plan.release(filling.target.key)
            self._plan.hold(filling.target.key, filling.held_until)

    def _came(self, sent: Sent, chunk: int) -> None:
        """A chunk is whole and written: readers may have it."""
        filling = sent.filling
        target = filling.target
        key, now = target.key, trio.current_time()
        length = target.present.byte_range(chunk).length
        self._fetched += length
        self._tally.came(filling.source.key, length)
        self._rates.add(key.pipeline, max(length - sent.counted, 0), now)
        sent.counted = max(sent.counted - length, 0)
        if filling.location is not None and filling.location.foreseen:
            self._locator.foresaw(filling.source.key, key.pipeline, rightly=True)
        target.present.add(chunk)
        if target.state is FileState.ABSENT:
            target.state = FileState.FILLING
        target.last_progress = self._moved[key.pipeline] = now
        target.efforts.pop(chunk, None)
        filling.failures = filling.refused = filling.stale = filling.missing = 0
        filling.slow = False
        filling.streak.answered()
        if filling.held_until and not filling.streaming:
            filling.held_until = 0.0
            self._plan.release(key)
        self._pacing.origin_answers(filling.source.key, host_of(filling.source.key, sent.url), key)
        if target.error is not None and self._committer.stuck is None:
            target.error = None
            self._events.failure(target, None)
        self._committer.dirty(target, chunk)
        target.wake()
        self._events.chunk_present(target, chunk)

    # -- completion ----------------------------------------------------------------------------------------------

    def _check_complete(self, filling: Filling) -> None:
        """Seal it if all is there and proven; have it hashed if only that is missing."""
        target = filling.target
        if filling.done or filling.sealing or not target.present.complete:
            return
        digest = target.entry.file.digest
        if digest is None:
            if target.blob is None:
                self._delivery.prepare_soon(filling)
                return
            filling.sealing = True
            self._delivery.close_at_worker(filling)
            self._committer.seal(target, "unverified")
        elif filling.hashed is None:
            if filling.worker is None:
                self._delivery.prepare_soon(filling)
        elif filling.hashed == digest.value:
            filling.sealing = True
            self._delivery.close_at_worker(filling)
            self._committer.seal(target, "sealed")
        else:
            self._poison(filling, filling.hashed)

    def _poison(self, filling: Filling, found: str) -> None:
        target = filling.target
        key = target.key
        digest = target.entry.file.digest
        assert digest is not None
        error = DigestMismatch(
            f"{target.entry.path}: the bytes that came have {digest.algorithm} {found}, the manifest says "
            f"{digest.value}{_hint(target.entry.file)}"
        )
        log.error("%s", error.message, extra={"pipeline": key.pipeline})
        self._poisonings += 1
        self._quarantine.mismatch(key, trio.current_time())
        self._leave(filling)
        target.state = FileState.POISONED
        target.error, target.failed, target.failed_at = error, True, trio.current_time()
        target.wake()
        self._committer.poison(target)

    def on_hash_failed(self, filling: Filling, error: InstantStartError) -> None:
        """The store's bytes cannot be read back: fetch again what is not durable, once; then give up."""
        filling.hash_failures += 1
        if filling.hash_failures > 1:
            self._end(filling, error)
        else:
            self.on_lost(filling.target, error)

    # -- what the committer says ---------------------------------------------------------------------------------

    def on_sealed(self, target: FillTarget) -> None:
        filling = self._fillings.get(target.key)
        if filling is not None and filling.target is target:
            self._leave(filling)
        for chunk in target.present.missing():
            target.present.add(chunk)
        target.error = None
        self._quarantine.proven(target.key)
        target.wake()
        self._events.target_sealed(target)

    def on_poisoned(self, target: FillTarget) -> None:
        assert target.error is not None
        self._events.target_poisoned(target, target.error)

    def on_lost(self, target: FillTarget, error: InstantStartError) -> None:
        log.error(
            "%s: what was written may be lost, and is fetched again: %s",
            target.entry.path,
            error.message,
            extra={"pipeline": target.key.pipeline},
        )
        for chunk in range(target.present.chunks):
            if chunk in target.present and chunk not in target.durable:
                target.present.discard(chunk)
        filling = self._fillings.get(target.key)
        if filling is None or filling.target is not target:
            return
        self._committer.discard_dirty(target)
        filling.sealing = False
        for sent in list(filling.sent):
            self._delivery.unsend(sent)
            self._plan.failed(target.key, sent.chunk)
        filling.waiting.clear()
        self._stream_ended(filling)
        self._delivery.close_at_worker(filling)  # what it hashed is not what will lie there
        self._plan.refill(target.key)
        self._demand_again(target)
        target.error = error
        self._events.failure(target, error)
        self._pacing.hold(filling)
        if isinstance(error, StoreFull):
            self._store_full(filling, error)
        self._check_complete(filling)
        self._wakeup.set()

    def on_stuck(self, targets: list[FillTarget], error: InstantStartError | None) -> None:
        for target in targets:
            target.error = error
            self._events.failure(target, error)
        self._wakeup.set()

    # -- failures ------------------------------------------------------------------------------------------------

    def on_failed(self, sent: Sent, error: InstantStartError, silent: float, *, counts: bool = True) -> None:
        """``counts``: False for the others of a batch that failed for one and the same reason."""
        filling = sent.filling
        self._delivery.unsend(sent)
        if filling.done:
            return None
        self._stream_ended(filling)
        target = filling.target
        key, now = target.key, trio.current_time()
        current = sent.generation == filling.generation
        self._tally.failed(filling.source.key, error.code)
        if not current and not isinstance(error, StoreError):
            # Of a link or an address that was given up meanwhile: it says nothing of the present one.
            return self._requeue(sent)
        if self._foreseen_wrongly(filling, error):
            return self._requeue(sent)
        if current:
            target.error = error
            if not isinstance(error, OriginIncompatible):  # that is final, and told as such
                self._events.failure(target, error)
        final: InstantStartError | None = None
        suspect = False
        match error:
            case LocationExpired():
                # Somebody on the way refuses. Access is the source's to refuse, when it is asked for a fresh address.
                filling.renew()
                filling.stale += 1
                if filling.stale > 1:
                    if self._pacing.next_link(filling):
                        return self._requeue(sent)
                    self._pacing.hold(filling)
            case AccessRefused() if filling.location is not None and filling.refused == 0:
                # The service's own word, of one address: credentials are replaced under a running daemon.
                filling.renew()
                filling.refused += 1
            case OriginNotFound():
                filling.renew()
                filling.missing += 1
                if filling.missing > 1:
                    final = error
            case OriginThrottled():
                self._pacing.throttled(filling, error, now)
            case OriginMisbehaved():
                if self._pacing.next_link(filling):
                    return self._requeue(sent)
                final = filling.streak.failed(error)
                filling.renew()  # others of the same burst say nothing more
                self._pacing.hold(filling)
                suspect = True
            case OriginUnavailable():
                if self._pacing.next_link(filling):
                    return self._requeue(sent)
                if counts:
                    self._pacing.origin_fails(
                        filling.source.key, host_of(filling.source.key, sent.url), key, silent, error
                    )
                self._pacing.hold(filling)
                suspect = True
            case OutOfResources():
                self._pacing.hold(filling)  # it passes; the file is as it was
            case StoreFull():
                self._plan.failed(key, sent.chunk)
                self._store_full(filling, error)
                return None
            case _:
                final = error
        if final is not None and not isinstance(final, StoreError) and self._pacing.next_link(filling):
            final = None
        if final is not None:
            if isinstance(final, OriginIncompatible):
                self._quarantine.refuse(key, final)
            self._end(filling, final)
        else:
            self._requeue(sent, suspect=suspect)
        return None

    def _foreseen_wrongly(self, filling: Filling, error: InstantStartError) -> bool:
        """Whether that is the answer of an address that nobody gave: what it means, the origin's own word tells."""
        if filling.location is None or not filling.location.foreseen or isinstance(error, OriginThrottled | StoreError):
            return False
        if isinstance(error, OriginUnavailable) and not isinstance(error, OriginMisbehaved | LocationExpired):
            return False
        self._locator.foresaw(filling.source.key, filling.target.key.pipeline, rightly=False)
        filling.may_foresee = False
        filling.renew()
        return True

    def _requeue(self, sent: Sent, *, suspect: bool = False) -> None:
        filling = sent.filling
        self._plan.failed(filling.target.key, sent.chunk, held_until=filling.held_until, suspect=suspect)
        if not filling.done:
            self._pacing.show_breaker(filling)
        self._wakeup.set()

    # -- a full store --------------------------------------------------------------------------------------------

    def _store_full(self, filling: Filling, error: InstantStartError) -> None:
        pipeline = filling.target.key.pipeline
        self._plan.hold(filling.target.key, trio.current_time() + 2 * ROOM_SECONDS)
        if pipeline not in self._freeing_space and self._nursery is not None:
            self._freeing_space.add(pipeline)
            self._nursery.start_soon(self._free_space, pipeline, error)

    async def _free_space(self, pipeline: str, error: InstantStartError) -> None:
        freed = False
        try:
            # Where room is made and taken by others at once, it is asked for at a pace.
            await trio.sleep_until(self._room_at.get(pipeline, -math.inf))
            self._room_at[pipeline] = trio.current_time() + ROOM_PACE
            if self.free_space is not None:
                with trio.move_on_after(ROOM_SECONDS):
                    freed = await self.free_space(pipeline)
        finally:
            self._freeing_space.discard(pipeline)
        mine = [filling for key, filling in self._fillings.items() if key.pipeline == pipeline]
        for filling in mine:
            if freed:
                self._plan.release(filling.target.key)
            elif not filling.sealing:
                self._end(filling, StoreFull(error.message))
        self._wakeup.set()


def _hint(file: ManifestFile) -> str:
    return ETAG_HINT if rests_on_etag(file) else ""
