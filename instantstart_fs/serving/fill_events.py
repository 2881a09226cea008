"""Applies the filler's reports, and findings of lost or wrong bytes, to files. Only this module changes their states.

A file whose bytes are wrong, lost or unreadable gets a fresh incarnation. It goes through the channel ``replaced`` to
serving/reads.py, which fetches it again if it was wanted.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.failure import Failure
from instantstart_fs.catalog.model import CachedFile, Generation, Pipeline
from instantstart_fs.catalog.slots import is_present
from instantstart_fs.core.incidents import Incident
from instantstart_fs.core.manifest import same_bytes
from instantstart_fs.errors import (
    FillCancelled,
    IndexStuck,
    InstantStartError,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreLost,
)
from instantstart_fs.filler.events import FillEvents
from instantstart_fs.filler.target import FileState, FillTarget
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.serving.admission import Admissions
from instantstart_fs.serving.open_by import processes_holding
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.shielded import ShieldedOperations
from instantstart_fs.telemetry.telemetry import FoundBy, Telemetry

log = logging.getLogger(__name__)


class Exposure(NamedTuple):
    """Wrong bytes that were served: the file was open ``opens`` times, and mapped pages cannot be recalled."""

    pipeline: str
    path: str
    reason: str
    opens: int


class Replacement(NamedTuple):
    """A fresh incarnation; ``wanted``: whether somebody wants its bytes."""

    file: CachedFile
    wanted: bool
    exposure: Exposure | None


class FillEventHandler(FillEvents):
    """Owned by the Library. ``on_growth``: called when new bytes have come."""

    def __init__(
        self,
        catalog: Catalog,
        open_files: OpenFiles,
        telemetry: Telemetry,
        admissions: Admissions,
        on_growth: Callable[[], None],
        shielded: ShieldedOperations,
    ) -> None:
        self._catalog = catalog
        self._open_files = open_files
        self._telemetry = telemetry
        self._admissions = admissions
        self._on_growth = on_growth
        self._replaced = trio.open_memory_channel[Replacement](math.inf)
        self._looking = trio.CapacityLimiter(1)
        self._replacing: set[CachedFile] = set()
        self._shielded = shielded
        self._incidents: dict[str, dict[str, Incident]] = {}
        """Pipeline → error code → the incident under way."""

    @property
    def replaced(self) -> trio.MemoryReceiveChannel[Replacement]:
        return self._replaced[1]

    # -- FillEvents ----------------------------------------------------------------------------------------------

    def chunk_present(self, target: FillTarget, chunk: int) -> None:
        file = self._file_of(target)
        if file is None:
            return
        file.state = FileState.FILLING
        length = target.present.byte_range(chunk).length
        file.generation.add_cached_bytes(file, length)
        file.generation.reservations.pop((file.entry.index, chunk), None)
        self._telemetry.fetched(file, length)
        pipeline = file.generation.pipeline
        if pipeline.failure is not None and pipeline.failure.lifted_by(file):
            pipeline.failure = None  # it goes on after all; an error of another file stays
        pipeline.grown_at_ns = self._catalog.now_ns()
        self._on_growth()
        pipeline.changed()

    def target_sealed(self, target: FillTarget) -> None:
        file = self._file_of(target)
        if file is None:
            return
        file.state = target.state
        file.bitmap = b""
        self._open_files.sealed(file)
        drop_target(file)
        generation = file.generation
        generation.completed(file, target.allocated)
        self._open_files.listener.sealed(file.key)
        if self._catalog.passthrough and generation is generation.pipeline.head:
            self._catalog.invalidate_file(file)
        warm = generation is generation.pipeline.head and generation.load_set_complete
        self._telemetry.completed(file, warm=warm)
        if warm:
            generation.filling_load_set = False
            generation.pipeline.failure = None
            log.info("warm: %d bytes", generation.load_bytes, extra={"pipeline": generation.pipeline.id})
        elif generation.undecided and generation.fill_is_over:
            generation.filling_load_set = False
        generation.pipeline.changed()
        self._catalog.bind_gate.wake(generation.pipeline.id)

    def target_poisoned(self, target: FillTarget, error: InstantStartError) -> None:
        file = self._file_of(target)
        if file is not None:
            self._poison(file, error, wanted=True)

    def target_failed(self, target: FillTarget, error: InstantStartError) -> None:
        file = self._file_of(target)
        if file is None:
            return
        file.generation.filling_load_set = False
        file.generation.release_reservations(file)
        blob = target.blob
        if blob is not None and blob.fd >= 0:
            # Space was set aside for chunks that were on their way: it stays taken until they are fetched again.
            with contextlib.suppress(InstantStartError):
                file.generation.set_allocated(file, blob.allocated_bytes())
        file.generation.invalidate_counts()
        if isinstance(error, StoreFull):
            self._admissions.disk_full(file.generation.pipeline, error)
        elif not isinstance(error, FillCancelled):
            self._telemetry.fill_failed(error)
            self.set_failure(file.generation.pipeline, error, final=True, file=file)
        file.generation.pipeline.changed()

    def failure(self, target: FillTarget, error: InstantStartError | None) -> None:
        file = self._file_of(target)
        if file is None:
            return
        pipeline = file.generation.pipeline
        if error is not None:
            file.generation.invalidate_counts()  # what could not be made durable is not present any more
            if isinstance(error, StoreFull):
                return  # space is freed, or target_failed says that there is none
            self.set_failure(pipeline, error, final=False)
        elif pipeline.failure is not None and not pipeline.failure.final:
            self._log_recovery(pipeline)
            pipeline.failure = None
            pipeline.changed()

    # -- bytes that are lost or wrong ------------------------------------------------------------------------------

    async def replace_damaged(
        self, file: CachedFile, problem: InstantStartError, *, wanted: bool, found_by: FoundBy
    ) -> None:
        """Replace a complete file whose bytes are lost, unreadable or wrong; fetch it again if it is ``wanted``.

        Later opens get the new incarnation; reads by handles of this one fail with ``problem``.

        Raises:
            StoreError: the index could not be written, and nothing has changed.
            IndexStuck: writing takes too long. The replacement goes on.
        """
        if not file.complete or file in self._replacing or not is_present(self._catalog, file):
            return
        self._replacing.add(file)

        async def work() -> None:
            try:
                with self._open_files.using(file.generation), file.generation.pipeline.changing():
                    async with self._catalog.bind_gate.withdrawn(file.generation.pipeline.id):
                        if self._catalog.file(file.key) is not file:
                            return  # evicted, before this was begun
                        await self._replace_damaged(file, problem, wanted=wanted)
                        self._telemetry.damaged(found_by)
                        if isinstance(problem, StoreLost):
                            await self._replace_lost(file.generation, found_by)
                await self._replace_shared(file, problem)
            finally:
                self._replacing.discard(file)

        with trio.move_on_after(self._catalog.index.commit_deadline) as waiting:
            await self._shielded.run_to_completion(work)
        if waiting.cancelled_caught:
            raise IndexStuck(
                f"{file.entry.path}: it is to be dropped ({problem.message}), and the index takes no commits"
            )

    def integrity_error(self, file: CachedFile) -> InstantStartError | None:
        """Return why the file is unusable, or soon will be, whatever its state says; None if no error is known."""
        if file.stale_error is not None:
            return file.stale_error
        if file in self._replacing or not file.complete:
            return StoreDamaged(f"{file.entry.path}: the store's bytes are being dropped")
        return None

    async def _replace_shared(self, file: CachedFile, problem: InstantStartError) -> None:
        """Replace the file in the other generations that share it on disk: they have the same bad bytes."""
        generation = file.generation
        for other in list(generation.pipeline.generations()):
            for twin in () if other is generation else other.files:
                if twin.entry.path == file.entry.path and twin.complete:
                    if same_bytes(twin.entry.file, file.entry.file):
                        current = other is generation.pipeline.head
                        await self.replace_damaged(twin, problem, wanted=current, found_by="update")
                    break

    async def _replace_lost(self, generation: Generation, found_by: FoundBy) -> None:
        """Check all files of a generation of which one was lost: somebody may have removed a directory. Lost ones
        are replaced at once, so that the state shown is true, and fetched in parallel."""
        pipeline, store = generation.pipeline, self._catalog.store
        there = await trio.to_thread.run_sync(store.survey, pipeline.id, generation.number)
        lost = [file for file in generation.files if file.complete and there.get(file.entry.path) != file.size]
        lost = [file for file in lost if file not in self._replacing and is_present(self._catalog, file)]
        if not lost:
            return
        self._replacing.update(lost)
        try:
            log.error("%d more files are lost from the store, and dropped", len(lost), extra={"pipeline": pipeline.id})
            records = [(file.entry.index, FileRecord(FileState.ABSENT.value, file.incarnation + 1)) for file in lost]

            def write(txn: WriteTxn) -> None:
                for index, record in records:
                    txn.put_file(pipeline.id, generation.number, index, record)

            await self._catalog.index.write(write)
            for file in lost:
                if is_present(self._catalog, file):
                    problem = StoreLost(f"{file.entry.path} is missing from the store")
                    self._poison(file, problem, wanted=generation.in_load_set(file.entry.index), quiet=True)
                    self._telemetry.damaged(found_by)
        finally:
            self._replacing.difference_update(lost)

    async def _replace_damaged(self, file: CachedFile, problem: InstantStartError, *, wanted: bool) -> None:
        generation, index = file.generation, file.entry.index
        record = FileRecord(FileState.ABSENT.value, file.incarnation + 1)
        log.error("%s: dropped: %s", file.entry.path, problem.message, extra={"pipeline": generation.pipeline.id})
        await self._catalog.index.write(
            lambda txn: txn.put_file(generation.pipeline.id, generation.number, index, record)
        )
        try:
            await trio.to_thread.run_sync(
                self._catalog.store.delete_blob, generation.pipeline.id, generation.number, file.entry.path
            )
        except StoreError as error:
            # The index does not speak of it any more. The next fill frees space for it, or says why not.
            log.error("%s: cannot be removed: %s", file.entry.path, error.message)
        if is_present(self._catalog, file):
            self._poison(file, problem, wanted=wanted)

    def _poison(self, file: CachedFile, error: InstantStartError, *, wanted: bool, quiet: bool = False) -> None:
        """Put a fresh incarnation in the place of one whose bytes are wrong, and fetch it again if it is wanted.

        The caller has unlinked the store's file and written incarnation + 1 to the index.
        """
        pipeline = file.generation.pipeline
        file.state = FileState.POISONED
        self._telemetry.poisoned(file)
        file.generation.release_reservations(file)
        drop_target(file)
        exposed = file.handles and not isinstance(error, StoreLost)  # what is lost was right to the end
        exposure = Exposure(pipeline.id, file.entry.path, error.message, file.handles) if exposed else None
        new = self._catalog.replace_file(file, error)
        if isinstance(error, StoreLost):
            file.generation.suspect = True
        self.set_failure(pipeline, error, final=False, quiet=quiet)
        self._replaced[0].send_nowait(Replacement(new, wanted, exposure))

    def set_failure(
        self,
        pipeline: Pipeline,
        error: InstantStartError,
        *,
        final: bool,
        file: CachedFile | None = None,
        quiet: bool = False,
    ) -> None:
        if not quiet:
            self._log_incident(pipeline, error)
        pipeline.failure = Failure(error, self._catalog.now_ns(), final=final, file=file)
        pipeline.changed()

    def _log_incident(self, pipeline: Pipeline, error: InstantStartError) -> None:
        """Log an error once for all files and requests that meet it, and then from time to time how often."""
        now = trio.current_time()
        known = self._incidents.setdefault(pipeline.id, {})
        incident = known.setdefault(error.code, Incident(now))
        if incident.noticed(now):
            often = f" ({incident.count} times in {now - incident.since:.0f} s)" if incident.count > 1 else ""
            log.warning("%s: %s%s", error.code, error.message, often, extra={"pipeline": pipeline.id})

    def _log_recovery(self, pipeline: Pipeline) -> None:
        now = trio.current_time()
        known = self._incidents.get(pipeline.id, {})
        for code, incident in list(known.items()):
            if incident.ended(now):
                del known[code]
            elif incident.over(now):
                log.info(
                    "%s is over: %d times in %.0f s",
                    code,
                    incident.count,
                    now - incident.since,
                    extra={"pipeline": pipeline.id},
                )
        if not known:
            self._incidents.pop(pipeline.id, None)

    def reset_incidents(self, pipeline: Pipeline) -> None:
        """Log errors anew from now on: `warm` or `update` asks on purpose."""
        self._incidents.pop(pipeline.id, None)

    def _file_of(self, target: FillTarget) -> CachedFile | None:
        """The file that this target fills; None when another incarnation has taken its place."""
        file = self._catalog.file(target.key)
        return file if file is not None and file.target is target else None

    async def log_exposure(self, exposure: Exposure) -> None:
        """Log which processes have it open. Runs in a thread, one at a time: /proc of a busy host takes seconds."""
        processes: list[str] = []
        with contextlib.suppress(OSError):  # no descriptor to look with
            processes = await run_abandonable(
                processes_holding, f"/{exposure.pipeline}/{exposure.path}", limiter=self._looking
            )
        log.error(
            "%s: wrong bytes were served before the digest proved it (%s); %d opens hold it, processes: %s",
            exposure.path,
            exposure.reason,
            exposure.opens,
            ", ".join(processes) or "unknown",
            extra={"pipeline": exposure.pipeline},
        )


def drop_target(file: CachedFile) -> None:
    """Close a target that the filler has finished, with its descriptor."""
    if file.target is not None and file.target.blob is not None:
        file.target.blob.close()
    file.target = None
