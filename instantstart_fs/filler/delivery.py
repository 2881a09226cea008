"""Orders on their way to the fetch processes, and their reports on the way back.

    dispatch ─► blob open? ─► located? ─► worker? ─► Fetch ─► … ─► Arrived | Failed ─► DeliveryEvents

Owns the worker pool, the numbers that files and requests have there, and the tasks that open blobs and locate files.
Decides nothing about what is fetched, when, or what a failure means: that is its owner's (filler/scheduler.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Set
from typing import Protocol

import trio

from instantstart_fs.core.fillqueue import Request
from instantstart_fs.core.serving import may_serve_unsealed
from instantstart_fs.errors import InstantStartError, OutOfResources, from_code
from instantstart_fs.filler.breakers import host_of
from instantstart_fs.filler.messages import (
    Arrived,
    Closed,
    CloseFile,
    Failed,
    Fetch,
    Hashed,
    HashFailed,
    OpenFile,
    Progress,
    Report,
    SetLocation,
    Stop,
    Streamed,
    Urge,
    Waits,
    WorkerSettings,
)
from instantstart_fs.filler.pool import Worker, WorkerPool
from instantstart_fs.filler.sources import Locator, expired
from instantstart_fs.filler.state import Filling, FillSettings, Sent
from instantstart_fs.filler.target import FileKey
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import BlobStore

log = logging.getLogger(__name__)

RESOURCE_SECONDS = 1.0
"""Until what found no descriptor is tried again."""
QUIET_SECONDS = 10.0
"""How long ``wait_quiet`` waits for a worker's word before that worker is killed."""
OPEN_THREADS = 8


class DeliveryEvents(Protocol):
    """What the owner is told, on the trio thread."""

    def on_arrived(self, sent: Sent) -> None:
        """Its chunk is whole and written."""
        ...

    def on_progress(self, sent: Sent, count: int) -> None:
        """``count`` more of its bytes came."""
        ...

    def on_streamed(self, sent: Sent, chunk: int) -> None:
        """The request takes all of its file: this chunk of it is whole and written."""
        ...

    def on_waits(self, sent: Sent) -> None:
        """It came to nothing, since another request takes all of its file."""
        ...

    def on_failed(self, sent: Sent, error: InstantStartError, silent: float, *, counts: bool = True) -> None:
        """``silent``: seconds without a byte. ``counts``: False for the others of a batch that failed for one and the
        same reason."""
        ...

    def on_paused(self, seconds: float) -> None:
        """For so long background fetches bring nothing, 0 = they go on."""
        ...

    def on_opened(self, filling: Filling) -> None:
        """Its blob is open."""
        ...

    def on_emptied(self, filling: Filling) -> None:
        """The store had lost the file: nothing of it is present any more."""
        ...

    def on_located(self, filling: Filling) -> None:
        """It has a fresh address; ``target.serve_unsealed`` says whether the way there protects the bytes."""
        ...

    def on_hashed(self, filling: Filling) -> None:
        """``filling.hashed`` is the digest over the whole file."""
        ...

    def on_hash_failed(self, filling: Filling, error: InstantStartError) -> None:
        """Its bytes cannot be read back from the store."""
        ...

    def on_unhashable(self, filling: Filling, error: InstantStartError) -> None:
        """It was to be opened for its hash alone, and that cannot be."""
        ...

    def on_worker_lost(self, filling: Filling, lost: list[Sent]) -> None:
        """The worker that had it died; these requests of it come to nothing."""
        ...


PAUSE_SHARE = 0.5
"""Demands may have the line for themselves for so much of the time: somebody's demands have no end."""
PAUSE_SAVED = 4.0
"""Seconds of it that are saved up."""


class Pausing:
    """How long background may be paused for a demand. Times are seconds of one monotonic clock."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._left = PAUSE_SAVED
        self._at = 0.0
        self._until = 0.0

    def pause(self, now: float) -> float:
        """When the pause that begins, or goes on, now must end."""
        self._settle(now)
        self._until = now + max(min(self._longest, self._left), 0.0)
        return self._until

    def end(self, now: float) -> None:
        """It ends earlier."""
        self._settle(now)
        self._until = min(self._until, now)

    def _settle(self, now: float) -> None:
        paused = max(min(now, self._until) - self._at, 0.0)
        self._left = min(self._left - paused + PAUSE_SHARE * (now - self._at - paused), PAUSE_SAVED)
        self._at = now


class Delivery:
    """``nursery``: where its tasks run; None while nobody fills."""

    def __init__(self, store: BlobStore, settings: FillSettings, locator: Locator, events: DeliveryEvents) -> None:
        self._settings = settings
        self._locator = locator
        self._events = events
        self.pool = WorkerPool(
            store,
            settings.workers,
            WorkerSettings(
                connect_timeout=settings.connect_timeout,
                stall_timeout=settings.stall_timeout,
                pause_limit=settings.demand_pause,
            ),
            self._on_report,
            self._on_death,
        )
        self.nursery: trio.Nursery | None = None
        self._sent: dict[int, Sent] = {}
        self._files: dict[int, Filling] = {}
        self._closing: dict[int, tuple[str, Worker]] = {}
        self._pausing = Pausing(settings.demand_pause)
        self._opening: set[Filling] = set()
        """Those whose blob is being made."""
        self._numbers = 0
        self._quiet = trio.Event()
        self._open_limiter = trio.CapacityLimiter(OPEN_THREADS)

    def received(self, pipeline: str) -> int:
        """Bytes of its chunks that came so far and are not whole."""
        return sum(sent.counted for sent in self._sent.values() if sent.filling.target.key.pipeline == pipeline)

    @property
    def in_flight(self) -> int:
        """Requests that are waiting for a worker, or with one."""
        return len(self._sent)

    def in_flight_at(self, host: str, origin: OriginKey) -> int:
        """How many of them are meant for this host, as ``breakers.host_of`` names it. O(requests in flight)."""
        return sum(
            1 for sent in self._sent.values() if sent.filling.source.key == origin and host_of(origin, sent.url) == host
        )

    async def wait_quiet(self, pipeline: str) -> None:
        """Return when no worker writes into a cancelled file of the pipeline. One that does not say so within
        QUIET_SECONDS is killed: then it is so."""
        # Only what is cancelled by now: other files of the pipeline may be filled, opened and closed all the time.
        opening = {filling for filling in self._opening if filling.done and filling.target.key.pipeline == pipeline}
        closing = {number for number, (name, _) in self._closing.items() if name == pipeline}
        with trio.move_on_after(QUIET_SECONDS) as scope:
            await self._wait_closed(opening, closing)
        if scope.cancelled_caught:
            for worker in {self._closing[number][1] for number in closing & self._closing.keys()}:
                log.error(
                    "the fetch worker %d does not close a file; it is killed", worker.pid, extra={"pipeline": pipeline}
                )
                worker.kill()
            await self._wait_closed(opening, closing)

    async def _wait_closed(self, opening: Set[Filling], closing: Set[int]) -> None:
        while opening & self._opening or closing & self._closing.keys():
            await self._quiet.wait()

    # -- out -------------------------------------------------------------------------------------------------------

    def dispatch(self, request: Request[FileKey], filling: Filling) -> None:
        self._numbers += 1
        sent = Sent(self._numbers, filling, request.chunk, request.demand)
        self._sent[sent.number] = sent
        filling.sent.add(sent)
        if filling.worker is not None and filling.location is not None and not expired(filling.location):
            self._send(sent)
        else:
            filling.waiting.append(sent)
            self.prepare_soon(filling)

    def _send(self, sent: Sent) -> None:
        filling = sent.filling
        worker = filling.worker
        assert worker is not None
        sent.worker = worker
        sent.generation = filling.generation
        sent.url = filling.location.url if filling.location is not None else None
        worker.in_flight += 1
        worker.send(Fetch(sent.number, filling.file, sent.chunk, sent.demand, filling.target.has_reader()))
        if sent.demand:
            self._pause_for(sent)

    def _pause_for(self, sent: Sent) -> None:
        """Background leaves the line to a demand, unless that may well be stuck itself."""
        if len(self._sent) > 1 and not sent.filling.failures and not sent.filling.slow:
            self._set_pause(self._pausing.pause(time.monotonic()))

    def _set_pause(self, until: float) -> None:
        self.pool.pause_background_until(until)
        self._events.on_paused(max(until - time.monotonic(), 0.0))

    def urge(self, filling: Filling, chunks: range) -> None:
        """A reader waits for these chunks, which may be in flight for nobody in particular."""
        for sent in filling.sent:
            if sent.chunk in chunks and not sent.demand:
                sent.demand = True
                if sent.worker is not None:
                    sent.worker.send(Urge(sent.number))
                    self._pause_for(sent)

    def stop(self, filling: Filling, chunk: int) -> None:
        """Give the request for this chunk up: its connection is wanted by others."""
        for sent in list(filling.sent):
            if sent.chunk == chunk:
                if sent.worker is not None:
                    sent.worker.send(Stop(sent.number, filling.file, chunk))
                elif sent in filling.waiting:
                    filling.waiting.remove(sent)
                self.unsend(sent)

    def unsend(self, sent: Sent) -> None:
        """It is over, whichever way."""
        if self._sent.pop(sent.number, None) is None:
            return
        sent.filling.sent.discard(sent)
        if sent.worker is not None:
            sent.worker.in_flight -= 1
            if sent.demand and not any(other.demand and other.worker is not None for other in self._sent.values()):
                self._pausing.end(time.monotonic())
                self._set_pause(0.0)

    def prepare_soon(self, filling: Filling) -> None:
        if not filling.preparing and self.nursery is not None:
            filling.preparing = True
            # From here on: ``wait_quiet`` must not miss a task that has not run yet.
            self._opening.add(filling)
            self.nursery.start_soon(self._prepare, filling)

    async def _prepare(self, filling: Filling) -> None:
        """Open the blob, locate the file, give it to a worker, send what waits."""
        target = filling.target
        try:
            try:
                if not filling.done:
                    await self._open_blob(filling)
            finally:
                self._opening.discard(filling)
                self._set_quiet()
            self._events.on_opened(filling)
            fresh = False
            while not (filling.done or filling.sealing):
                # One that comes expired (this clock is ahead, the credentials end) is tried: the server knows better.
                if filling.waiting and (filling.location is None or (expired(filling.location) and not fresh)):
                    location = await self._locator.locate(
                        filling.source, target.entry, target.key.pipeline, foresee=filling.may_foresee
                    )
                    self._located(filling, location)
                    fresh = True
                    continue
                if filling.worker is None:
                    worker = await self.pool.wait_worker()
                    if not filling.done:
                        self._open_at(filling, worker)
                    continue
                break
            if not filling.done:
                waiting, filling.waiting = filling.waiting, []
                for sent in waiting:
                    self._send(sent)
        except InstantStartError as error:
            if isinstance(error, OutOfResources) and not filling.waiting and self.nursery is not None:
                self.nursery.start_soon(self._prepare_later, filling)  # for its hash alone; nobody else would ask again
            elif not filling.done:
                if not filling.waiting:  # opened for its hash alone
                    self._events.on_unhashable(filling, error)
                waiting, filling.waiting = filling.waiting, []
                for position, sent in enumerate(waiting):
                    sent.generation = filling.generation
                    self._events.on_failed(sent, error, 0.0, counts=position == 0)
        finally:
            filling.preparing = False

    async def _prepare_later(self, filling: Filling) -> None:
        await trio.sleep(RESOURCE_SECONDS)
        if not filling.done and filling.worker is None:
            self.prepare_soon(filling)

    def _located(self, filling: Filling, location: Location) -> None:
        if filling.done:
            return  # cancelled meanwhile: the plan does not know it any more
        target = filling.target
        filling.location = location
        filling.generation += 1
        target.serve_unsealed = may_serve_unsealed(self._settings.serve_unsealed, location.trusted)
        self._events.on_located(filling)
        if filling.worker is not None:
            filling.worker.send(SetLocation(filling.file, location))

    async def _open_blob(self, filling: Filling) -> None:
        target = filling.target
        if target.blob is not None:
            return
        blob: BlobFile = await trio.to_thread.run_sync(target.open_blob, limiter=self._open_limiter)
        if filling.done and target.failed:
            blob.close()
            return
        target.blob = blob
        if blob.created and target.present.count:
            # The store lost the file that the index speaks of: nothing of it is present.
            for chunk in range(target.present.chunks):
                target.present.discard(chunk)
                target.durable.discard(chunk)
            if not filling.done:
                self._events.on_emptied(filling)

    def _open_at(self, filling: Filling, worker: Worker) -> None:
        target = filling.target
        assert target.blob is not None
        self._numbers += 1
        number, present, file = self._numbers, target.present, target.entry.file
        # Before anything is noted: there may be no descriptor for it, and then the worker knows nothing of the file.
        worker.send(
            OpenFile(number, target.entry.path, file.size, present.chunk_size, file.digest, present.to_bytes()),
            target.blob.fd,
        )
        filling.file = number
        filling.worker = worker
        filling.hashed = None
        self._files[number] = filling
        worker.files.add(number)
        if filling.location is not None:
            worker.send(SetLocation(filling.file, filling.location))

    def close_at_worker(self, filling: Filling) -> None:
        worker, filling.worker = filling.worker, None
        if worker is not None:
            self._files.pop(filling.file, None)
            self._closing[filling.file] = (filling.target.key.pipeline, worker)
            worker.send(CloseFile(filling.file))
        filling.file = 0
        filling.hashed = None

    # -- back ------------------------------------------------------------------------------------------------------

    def _on_report(self, worker: Worker, report: Report) -> None:
        match report:
            case Arrived(request=number, answered=answered):
                sent = self._sent.get(number)
                if sent is not None:
                    sent.answered = answered
                    self._events.on_arrived(sent)
            case Progress(request=number, bytes=count):
                sent = self._sent.get(number)
                if sent is not None:
                    self._events.on_progress(sent, count)
            case Streamed(request=number, chunk=chunk):
                sent = self._sent.get(number)
                if sent is not None:
                    self._events.on_streamed(sent, chunk)
            case Waits(request=number):
                sent = self._sent.get(number)
                if sent is not None:
                    self._events.on_waits(sent)
            case Failed():
                sent = self._sent.get(report.request)
                if sent is not None:
                    error = from_code(report.code, report.message, retry_after=report.retry_after, fault=report.fault)
                    self._events.on_failed(sent, error, report.silent)
            case Hashed(file=number, digest=digest):
                filling = self._files.get(number)
                if filling is not None:
                    filling.hashed = digest
                    self._events.on_hashed(filling)
            case HashFailed(file=number):
                filling = self._files.get(number)
                if filling is not None:
                    self._events.on_hash_failed(filling, from_code(report.code, report.message))
            case Closed(file=number):
                worker.files.discard(number)
                self._closing.pop(number, None)
                self._set_quiet()

    def _on_death(self, worker: Worker) -> None:
        for number in [number for number, (_, holder) in self._closing.items() if holder is worker]:
            del self._closing[number]
        for filling in [filling for filling in self._files.values() if filling.worker is worker]:
            self._files.pop(filling.file, None)
            filling.worker, filling.file, filling.hashed = None, 0, None
            lost = [sent for sent in filling.sent if sent.worker is worker]
            for sent in lost:
                self.unsend(sent)
            self._events.on_worker_lost(filling, lost)
        self._set_quiet()

    def _set_quiet(self) -> None:
        quiet, self._quiet = self._quiet, trio.Event()
        quiet.set()
