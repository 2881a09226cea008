"""Delivers requests to the fetch processes and their reports back: opens blobs, locates files, numbers files and
requests. It does not decide what is fetched, when, or what a failure means.

    dispatch ─► blob open? ─► located? ─► worker? ─► Fetch ─► … ─► Arrived | Failed ─► DeliveryEvents
"""

from __future__ import annotations

import logging
import time
from collections.abc import Set
from typing import Protocol

import trio

from instantstart_fs.core.fillqueue import Request
from instantstart_fs.core.trust import may_serve_unsealed
from instantstart_fs.errors import InstantStartError, OutOfResources, from_code
from instantstart_fs.filler.breakers import host_of
from instantstart_fs.filler.fill import FetchRequest, Fill
from instantstart_fs.filler.messages import (
    Arrived,
    Closed,
    CloseFile,
    Failed,
    Fetch,
    Hashed,
    HashFailed,
    OpenFile,
    Piece,
    Progress,
    Report,
    SetLocation,
    Stop,
    Streamed,
    Urge,
    Waits,
    WorkerSettings,
)
from instantstart_fs.filler.pause_budget import PauseBudget
from instantstart_fs.filler.pool import Worker, WorkerPool
from instantstart_fs.filler.settings import FillSettings
from instantstart_fs.filler.sources import Locator, Source, expired
from instantstart_fs.filler.target import FileKey
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import BlobStore

log = logging.getLogger(__name__)

RESOURCE_SECONDS = 1.0
"""Delay before an open that found no descriptor is tried again."""
QUIET_SECONDS = 10.0
"""Seconds that ``wait_quiet`` waits for a worker's confirmation before it kills the worker."""
OPEN_THREADS = 8


class DeliveryEvents(Protocol):
    """The events of ``Delivery.run``, on the trio thread."""

    def on_arrived(self, request: FetchRequest) -> None:
        """The chunk is whole and written."""
        ...

    def on_progress(self, request: FetchRequest, count: int) -> None:
        """``count`` more bytes of the request came."""
        ...

    def on_streamed(self, request: FetchRequest, chunk: int) -> None:
        """The request takes all of its file: this chunk of it is whole and written."""
        ...

    def on_waits(self, request: FetchRequest) -> None:
        """A request ended without fetching, since another request takes the whole file."""
        ...

    def on_failed(self, request: FetchRequest, error: InstantStartError, silent: float, *, counts: bool = True) -> None:
        """The request failed. ``silent``: seconds without a byte. ``counts``: False for the others of a batch that
        failed for one and the same reason."""
        ...

    def on_paused(self, seconds: float) -> None:
        """Background fetches pause for this long; 0 = they go on."""
        ...

    def on_opened(self, fill: Fill) -> None:
        """The blob is open."""
        ...

    def on_blob_lost(self, fill: Fill) -> None:
        """The store had lost the file: none of it is present any more."""
        ...

    def on_located(self, fill: Fill) -> None:
        """There is a fresh location; ``target.serve_unsealed`` says whether the way there protects the bytes."""
        ...

    def on_hashed(self, fill: Fill) -> None:
        """``fill.hashed`` is the digest over the whole file."""
        ...

    def on_hash_failed(self, fill: Fill, error: InstantStartError) -> None:
        """The bytes cannot be read back from the store."""
        ...

    def on_hash_impossible(self, fill: Fill, error: InstantStartError) -> None:
        """The file was to be opened only for hashing, and cannot be opened."""
        ...

    def on_worker_lost(self, fill: Fill, lost: list[FetchRequest]) -> None:
        """The worker that had the file open died; these requests of the file are lost."""
        ...


class Delivery:
    """Delivers requests while ``run`` runs, on the trio thread."""

    def __init__(self, store: BlobStore, settings: FillSettings, locator: Locator, *, region: bool = False) -> None:
        self._settings = settings
        self._locator = locator
        self._events: DeliveryEvents
        """Set by ``run``; before it nothing is dispatched, so nothing is reported."""
        self.pool = WorkerPool(
            store,
            settings.workers,
            WorkerSettings(
                connect_timeout=settings.connect_timeout,
                stall_timeout=settings.stall_timeout,
                pause_limit=settings.demand_pause,
                region=region,
            ),
            self._on_report,
            self._on_death,
        )
        self._nursery: trio.Nursery | None = None
        self._requests: dict[int, FetchRequest] = {}
        self._files: dict[int, Fill] = {}
        self._closing: dict[int, tuple[str, Worker]] = {}
        self._pauses = PauseBudget(settings.demand_pause)
        self._opening: set[Fill] = set()
        """Fills whose blob is being opened."""
        self._numbers = 0
        self._quiet = trio.Event()
        self._open_limiter = trio.CapacityLimiter(OPEN_THREADS)

    async def run(
        self,
        events: DeliveryEvents,
        *,
        start_workers: trio.Event | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Deliver until cancelled, then end the workers.

        Args:
            events: Told what the workers report.
            start_workers: Start the workers when this is set; None = at once.
            task_status: Started when a worker is ready; at once with ``start_workers``.
        """
        self._events = events
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                if start_workers is None:
                    await self.pool.run(task_status=task_status)
                else:
                    task_status.started()
                    await start_workers.wait()
                    await self.pool.run(needed=False)  # readers have the mount: what is cached is served
            finally:
                self._nursery = None

    def received(self, pipeline: str) -> int:
        """Return the bytes received of chunks that are not whole yet."""
        return sum(
            request.counted for request in self._requests.values() if request.fill.target.key.pipeline == pipeline
        )

    @property
    def in_flight(self) -> int:
        """Requests that are waiting for a worker, or with one."""
        return len(self._requests)

    def in_flight_at(self, host: str, origin: OriginKey) -> int:
        """Requests in flight to this host, as ``breakers.host_of`` names it. O(requests in flight)."""
        return sum(
            request.source.key == origin and host_of(origin, request.url) == host for request in self._requests.values()
        )

    async def wait_quiet(self, pipeline: str) -> None:
        """Return when no worker writes into a cancelled file of the pipeline. A worker that does not confirm that
        within QUIET_SECONDS is killed."""
        # Only files that are cancelled by now: others of the pipeline may be opened and closed all the time.
        opening = {fill for fill in self._opening if fill.done and fill.target.key.pipeline == pipeline}
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

    async def _wait_closed(self, opening: Set[Fill], closing: Set[int]) -> None:
        while opening & self._opening or closing & self._closing.keys():
            await self._quiet.wait()

    # -- out -------------------------------------------------------------------------------------------------------

    def dispatch(
        self, planned: Request[FileKey], fill: Fill, piece: Piece | None = None, source: Source | None = None
    ) -> FetchRequest:
        """Send a request, once its file is open, located and given to a worker; to a tier (``source``), if ``piece`` is
        given, without a location."""
        self._numbers += 1
        request = FetchRequest(self._numbers, fill, planned.chunk, planned.demand)
        request.piece = piece
        if source is not None:
            request.source = source
        self._requests[request.number] = request
        fill.requests.add(request)
        if fill.worker is not None and (piece is not None or _located(fill)):
            self._send(request)
        else:
            fill.unsent.append(request)
            self.schedule_open(fill)
        return request

    def _send(self, request: FetchRequest) -> None:
        fill = request.fill
        worker = fill.worker
        assert worker is not None
        request.worker = worker
        request.location_epoch = fill.location_epoch
        if request.piece is not None:
            request.url = request.piece.url
        else:
            request.source = fill.source
            request.url = fill.location.url if fill.location is not None else None
        worker.in_flight += 1
        worker.send(
            Fetch(request.number, fill.file, request.chunk, request.demand, fill.target.has_reader(), request.piece)
        )
        if request.demand:
            self._pause_for(request)

    def _pause_for(self, request: FetchRequest) -> None:
        """Pause background for a demand, unless that is probably stuck itself."""
        if len(self._requests) > 1 and not request.fill.failures and not request.fill.slow:
            self._set_pause(self._pauses.pause(time.monotonic()))

    def _set_pause(self, until: float) -> None:
        self.pool.pause_background_until(until)
        self._events.on_paused(max(until - time.monotonic(), 0.0))

    def urge(self, fill: Fill, chunks: range) -> None:
        """Turn background requests for these chunks into demands: a reader waits for them."""
        for request in fill.requests:
            if request.chunk in chunks and not request.demand:
                request.demand = True
                if request.worker is not None:
                    request.worker.send(Urge(request.number))
                    self._pause_for(request)

    def stop(self, fill: Fill, chunk: int) -> None:
        """Give up the request for this chunk, to free its connection for others."""
        for request in list(fill.requests):
            if request.chunk == chunk:
                self.stop_request(request)

    def stop_request(self, request: FetchRequest) -> None:
        """Give it up. No effect on one that is over."""
        fill = request.fill
        if request not in fill.requests:
            return
        if request.worker is not None:
            request.worker.send(Stop(request.number, fill.file, request.chunk))
        elif request in fill.unsent:
            fill.unsent.remove(request)
        self.finish(request)

    def finish(self, request: FetchRequest) -> None:
        """Forget a request that is over, whichever way. Calling it again has no effect."""
        if self._requests.pop(request.number, None) is None:
            return
        request.fill.requests.discard(request)
        if request.worker is not None:
            request.worker.in_flight -= 1
            if request.demand and not any(
                other.demand and other.worker is not None for other in self._requests.values()
            ):
                self._pauses.end(time.monotonic())
                self._set_pause(0.0)

    def schedule_open(self, fill: Fill) -> None:
        """Have the file opened, located and given to a worker soon. No effect while that is under way."""
        if not fill.preparing and self._nursery is not None:
            fill.preparing = True
            # Already here: ``wait_quiet`` must not miss a task that has not started yet.
            self._opening.add(fill)
            self._nursery.start_soon(self._prepare, fill)

    async def _prepare(self, fill: Fill) -> None:
        """Open the blob, locate the file, give it to a worker, send what waits."""
        target = fill.target
        try:
            try:
                if not fill.done:
                    await self._open_blob(fill)
            finally:
                self._opening.discard(fill)
                self._set_quiet()
            self._events.on_opened(fill)
            fresh = False
            while not (fill.done or fill.sealing):
                # A fresh location that has expired already (clock ahead, credentials ending) is tried: the server
                # decides.
                if fill.worker is not None:
                    pieces = [request for request in fill.unsent if request.piece is not None]
                    fill.unsent = [request for request in fill.unsent if request.piece is None]
                    for request in pieces:
                        self._send(request)
                elif any(request.piece is not None for request in fill.unsent):
                    worker = await self.pool.wait_worker()
                    if not fill.done:
                        self._open_at(fill, worker)
                    continue
                if fill.unsent and (fill.location is None or (expired(fill.location) and not fresh)):
                    location = await self._locator.locate(
                        fill.source, target.entry, target.key.pipeline, foresee=fill.may_foresee
                    )
                    self._located(fill, location)
                    fresh = True
                    continue
                if fill.worker is None:
                    worker = await self.pool.wait_worker()
                    if not fill.done:
                        self._open_at(fill, worker)
                    continue
                break
            if not fill.done:
                unsent, fill.unsent = fill.unsent, []
                for request in unsent:
                    self._send(request)
        except InstantStartError as error:
            if isinstance(error, OutOfResources) and not fill.unsent and self._nursery is not None:
                self._nursery.start_soon(self._prepare_later, fill)  # only for hashing: nothing else would try again
            elif not fill.done:
                if not fill.unsent and target.present.complete and not fill.sealing:  # opened only for hashing
                    self._events.on_hash_impossible(fill, error)
                unsent, fill.unsent = fill.unsent, []
                for position, request in enumerate(unsent):
                    request.source, request.location_epoch = fill.source, fill.location_epoch
                    self._events.on_failed(request, error, 0.0, counts=position == 0)
        finally:
            fill.preparing = False

    async def _prepare_later(self, fill: Fill) -> None:
        await trio.sleep(RESOURCE_SECONDS)
        if not fill.done and fill.worker is None:
            self.schedule_open(fill)

    def _located(self, fill: Fill, location: Location) -> None:
        if fill.done:
            return  # cancelled meanwhile: it is not in the plan any more
        target = fill.target
        fill.location = location
        fill.location_epoch += 1
        target.serve_unsealed = may_serve_unsealed(self._settings.serve_unsealed, location.trusted)
        self._events.on_located(fill)
        if fill.worker is not None:
            fill.worker.send(SetLocation(fill.file, location))

    async def _open_blob(self, fill: Fill) -> None:
        target = fill.target
        if target.blob is not None:
            return
        blob: BlobFile = await trio.to_thread.run_sync(target.open_blob, limiter=self._open_limiter)
        if fill.done and target.failed:
            blob.close()
            return
        target.blob = blob
        if blob.created and target.present.count:
            # The store lost the file that the index knows: none of it is present.
            for chunk in range(target.present.chunks):
                target.present.discard(chunk)
                target.durable.discard(chunk)
            if not fill.done:
                self._events.on_blob_lost(fill)

    def _open_at(self, fill: Fill, worker: Worker) -> None:
        target = fill.target
        assert target.blob is not None
        self._numbers += 1
        number, present, file = self._numbers, target.present, target.entry.file
        # Before anything is recorded: if there is no descriptor for it, the worker does not know the file.
        worker.send(
            OpenFile(
                number,
                target.entry.path,
                file.size,
                present.chunk_size,
                None if fill.unhashed else file.digest,
                present.to_bytes(),
            ),
            target.blob.fd,
        )
        fill.file = number
        fill.worker = worker
        fill.hashed = None
        self._files[number] = fill
        worker.files.add(number)
        if fill.location is not None:
            worker.send(SetLocation(fill.file, fill.location))

    def close_in_worker(self, fill: Fill) -> None:
        """Have the worker close the file; what it has hashed is discarded. No effect while no worker has it open."""
        worker, fill.worker = fill.worker, None
        if worker is not None:
            self._files.pop(fill.file, None)
            self._closing[fill.file] = (fill.target.key.pipeline, worker)
            worker.send(CloseFile(fill.file))
        fill.file = 0
        fill.hashed = None

    # -- back ------------------------------------------------------------------------------------------------------

    def _on_report(self, worker: Worker, report: Report) -> None:
        match report:
            case Arrived(request=number, answered=answered, digest=proven):
                request = self._requests.get(number)
                if request is not None:
                    request.answered, request.digest = answered, proven
                    self._events.on_arrived(request)
            case Progress(request=number, bytes=count):
                request = self._requests.get(number)
                if request is not None:
                    self._events.on_progress(request, count)
            case Streamed(request=number, chunk=chunk):
                request = self._requests.get(number)
                if request is not None:
                    self._events.on_streamed(request, chunk)
            case Waits(request=number):
                request = self._requests.get(number)
                if request is not None:
                    self._events.on_waits(request)
            case Failed():
                request = self._requests.get(report.request)
                if request is not None:
                    error = from_code(report.code, report.message, retry_after=report.retry_after, fault=report.fault)
                    self._events.on_failed(request, error, report.silent)
            case Hashed(file=number, digest=digest):
                fill = self._files.get(number)
                if fill is not None:
                    fill.hashed = digest
                    self._events.on_hashed(fill)
            case HashFailed(file=number):
                fill = self._files.get(number)
                if fill is not None:
                    self._events.on_hash_failed(fill, from_code(report.code, report.message))
            case Closed(file=number):
                worker.files.discard(number)
                self._closing.pop(number, None)
                self._set_quiet()

    def _on_death(self, worker: Worker) -> None:
        for number in [number for number, (_, holder) in self._closing.items() if holder is worker]:
            del self._closing[number]
        for fill in [fill for fill in self._files.values() if fill.worker is worker]:
            self._files.pop(fill.file, None)
            fill.worker, fill.file, fill.hashed = None, 0, None
            lost = [request for request in fill.requests if request.worker is worker]
            for request in lost:
                self.finish(request)
            self._events.on_worker_lost(fill, lost)
        self._set_quiet()

    def _set_quiet(self) -> None:
        quiet, self._quiet = self._quiet, trio.Event()
        quiet.set()


def _located(fill: Fill) -> bool:
    return fill.location is not None and not expired(fill.location)
