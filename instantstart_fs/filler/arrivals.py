"""Applies the reports of the fetch processes: chunks become present and wake their readers, lost requests are queued
again. What a failure means is decided in filler/failures.py, the end of a fill in filler/completion.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.retry import Effort, quantum
from instantstart_fs.errors import InstantStartError, StoreError
from instantstart_fs.filler.breakers import host_of
from instantstart_fs.filler.completion import Completion
from instantstart_fs.filler.delivery import Delivery, DeliveryEvents
from instantstart_fs.filler.events import FillEvents
from instantstart_fs.filler.failures import FailurePolicy
from instantstart_fs.filler.fill import FetchRequest, Fill
from instantstart_fs.filler.origin_backoff import OriginBackoff
from instantstart_fs.filler.rates import Rates
from instantstart_fs.filler.settings import FillSettings
from instantstart_fs.filler.sources import Locator
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.tally import WORKER_LOST, Tally
from instantstart_fs.filler.target import FileKey, FileState

if TYPE_CHECKING:
    from instantstart_fs.filler.regional import Regional


class Arrivals(DeliveryEvents):
    """Handles the reports, on the trio thread.

    It has more than 8 collaborators, because each chunk that arrives updates them all in one call: a call more per
    chunk and collaborator would cost more than the work itself.
    """

    def __init__(
        self,
        settings: FillSettings,
        events: FillEvents,
        *,
        plan: FillPlan[FileKey],
        table: FillTable,
        delivery: Delivery,
        completion: Completion,
        failures: FailurePolicy,
        origin_backoff: OriginBackoff,
        locator: Locator,
        rates: Rates,
        tally: Tally,
    ) -> None:
        self._quantum = quantum(settings.read_deadline)
        self._events = events
        self._plan = plan
        self._table = table
        self._delivery = delivery
        self._completion = completion
        self._failures = failures
        self._origin_backoff = origin_backoff
        self._locator = locator
        self._rates = rates
        self._tally = tally
        self.regional: Regional | None = None
        self.fetched_bytes = 0
        """Bytes of whole chunks that came since the start."""

    def on_opened(self, fill: Fill) -> None:
        if fill.target.entry.file.digest is None:
            self._completion.check(fill)  # an empty file waited for nothing but its blob

    def on_blob_lost(self, fill: Fill) -> None:
        self._plan.refill(fill.target.key)
        self._table.demand_again(fill.target)
        self._table.wakeup.set()

    def on_located(self, fill: Fill) -> None:
        if not fill.target.serve_unsealed and fill.target.waiting:
            self._plan.demand_whole(fill.target.key)  # readers wait for the seal, and that for every chunk
            if self.regional is not None:
                self.regional.demand(fill.target.key, (), whole=True)
            self._table.wakeup.set()

    def on_progress(self, request: FetchRequest, count: int) -> None:
        target, now = request.fill.target, trio.current_time()
        request.counted += count
        key = target.key
        if self.regional is not None:
            key = self.regional.plan_key(request)
            self.regional.progressed(request)
        self._plan.progressed(key, request.chunk, count, now)
        effort = target.efforts.get(request.chunk)
        if effort is not None and effort.received(request.counted, now):
            target.last_progress = self._table.last_arrival[target.key.pipeline] = now
        self._rates.add(target.key.pipeline, count, now)

    def on_paused(self, seconds: float) -> None:
        self._plan.pause(trio.current_time() + seconds)

    def on_hashed(self, fill: Fill) -> None:
        self._completion.check(fill)

    def on_hash_failed(self, fill: Fill, error: InstantStartError) -> None:
        self._completion.hash_failed(fill, error)

    def on_hash_impossible(self, fill: Fill, error: InstantStartError) -> None:
        self._table.fail(fill, error)

    def on_worker_lost(self, fill: Fill, lost: list[FetchRequest]) -> None:
        for request in lost:
            self._tally.failed(request.source.key, WORKER_LOST)
            if request.piece is not None and self.regional is not None:
                self.regional.lost(request)
            else:
                self._plan.failed(fill.target.key, request.chunk)
        self._table.stream_ended(fill)
        self._completion.check(fill)
        self._table.wakeup.set()

    def on_arrived(self, request: FetchRequest) -> None:
        fill, chunk = request.fill, request.chunk
        target = fill.target
        self._delivery.finish(request)
        self._table.stream_ended(fill)
        self._plan.arrived(target.key, chunk)
        if request.answered is not None:
            self._tally.answered(request.source.key, request.answered)
        if chunk not in target.present:  # else it came with the whole file
            self._chunk_complete(request, chunk)
        self._completion.check(fill)
        self._table.wakeup.set()

    def on_streamed(self, request: FetchRequest, chunk: int) -> None:
        target = request.fill.target
        if chunk in target.present:
            return
        if chunk != request.chunk:  # that one is in flight as long as the stream is
            self._plan.arrived(target.key, chunk)
        self._chunk_complete(request, chunk)
        if chunk != request.chunk:
            # The stream brings these chunks first: the readers of its own one see that as progress.
            target.efforts[request.chunk] = Effort(trio.current_time(), self._quantum)
        self._completion.check(request.fill)
        self._table.wakeup.set()

    def on_waits(self, request: FetchRequest) -> None:
        fill = request.fill
        self._delivery.finish(request)
        self._plan.failed(fill.target.key, request.chunk)
        fill.target.efforts.pop(request.chunk, None)  # its readers wait for what the stream brings
        if any(other.worker is not None for other in fill.requests):
            fill.streaming = True
            self._plan.hold(fill.target.key, math.inf)
        self._table.stream_ended(fill)
        self._table.wakeup.set()

    def on_failed(self, request: FetchRequest, error: InstantStartError, silent: float, *, counts: bool = True) -> None:
        fill = request.fill
        self._delivery.finish(request)
        if fill.done:
            return
        self._table.stream_ended(fill)
        self._tally.failed(request.source.key, error.code)
        if request.piece is not None and self.regional is not None:
            self.regional.failed(request, error)
            self._table.wakeup.set()
            if not isinstance(error, StoreError):
                return
        self._failures.apply(request, error, silent, counts=counts)

    def _chunk_complete(self, request: FetchRequest, chunk: int) -> None:
        """Make a chunk present that is whole and written, and wake its readers."""
        fill = request.fill
        target = fill.target
        key, now = target.key, trio.current_time()
        source = request.source.key
        length = target.present.byte_range(chunk).length
        self.fetched_bytes += length
        self._tally.came(source, length)
        self._rates.add(key.pipeline, max(length - request.counted, 0), now)
        request.counted = max(request.counted - length, 0)
        from_tier = request.piece is not None
        if fill.location is not None and fill.location.foreseen and not from_tier:
            self._locator.foresaw(source, key.pipeline, rightly=True)
        target.present.add(chunk)
        if target.state is FileState.ABSENT:
            target.state = FileState.FILLING
        target.last_progress = self._table.last_arrival[key.pipeline] = now
        target.efforts.pop(chunk, None)
        if not from_tier:
            fill.failures = fill.refused = fill.stale = fill.missing = 0
            fill.slow = False
            fill.streak.answered()
            if fill.held_until and not fill.streaming:
                fill.held_until = 0.0
                self._plan.release(key)
            self._origin_backoff.origin_answered(source, host_of(source, request.url), key)
        if self.regional is not None:
            self.regional.came(fill, chunk, request)
        committer = self._completion.committer
        if target.error is not None and committer.stuck is None:
            target.error = None
            self._events.failure(target, None)
        committer.dirty(target, chunk)
        target.wake()
        self._events.chunk_present(target, chunk)
