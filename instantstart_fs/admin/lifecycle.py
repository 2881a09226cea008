"""Changes pipelines on disk, in the index and in memory: add, update, remove, evict.

Each operation holds the pipeline's lock, so only one runs at a time. A crash may interrupt these orders at any point:

    add      slot's pipeline.json and manifest.json, then the index record      a slot without a record is an orphan:
                                                                                removed by the next add of that id
    update   manifest.json of n+1, names of unchanged files in it, then the     generations other than the record's are
             record says n+1 and that these are complete, then n is deleted     removed at start
    evict    index forgets the files (new nodeids), then the bytes go           files without a record are removed when
                                                                                they are filled again
    remove   index forgets the pipeline, then the slot goes                     like add's orphan
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import msgspec
import trio

from instantstart_fs.admin.sources import Sources
from instantstart_fs.admin.users import Users, leased
from instantstart_fs.catalog.catalog import Catalog, SharedFile
from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.catalog.summaries import summary_of
from instantstart_fs.core.manifest import Manifest, PipelineSpec, same_bytes
from instantstart_fs.core.specification import validate_spec
from instantstart_fs.errors import (
    FillCancelled,
    IndexStuck,
    InstantStartError,
    PipelineBusy,
    PipelineExists,
    StoreError,
)
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord, SummaryRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.origins.settings import OriginSettings
from instantstart_fs.serving.fill_events import drop_target
from instantstart_fs.serving.open_by import UsingProcess, listed
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.reads import Reads

log = logging.getLogger(__name__)

NO_VISIBLE_PROCESS = (
    "nobody whom this daemon can see (a process that it may not look at, the kernel itself, or its own verify or scrub)"
)
FILES_OPEN = "somebody has files of it open"
"""The reason of a refusal when no process can be named."""


class Lifecycle:
    """Owned by the Library. ``chunk_size`` in bytes, for new generations. ``settings``: of the
    origins, for listing processes."""

    def __init__(
        self,
        catalog: Catalog,
        reads: Reads,
        open_files: OpenFiles,
        chunk_size: int,
        settings: OriginSettings = OriginSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self._catalog = catalog
        self._reads = reads
        self._open_files = open_files
        self._users = Users(catalog.store)
        self._chunk_size = chunk_size
        self.sources = Sources(catalog, chunk_size, settings)
        self._adding: set[str] = set()

    async def add(self, spec: PipelineSpec) -> Pipeline:
        """Resolve and pin every model, store the manifest, show the pipeline. Raises PipelineExists, OriginError, …"""
        validate_spec(spec)
        catalog = self._catalog
        if spec.id in catalog.pipelines or spec.id in self._adding:
            raise PipelineExists(
                f"there is a pipeline {spec.id!r} already; `instantstart update {spec.id}` looks for a newer revision, "
                f"`instantstart remove {spec.id}` lets you add another source"
            )
        self._adding.add(spec.id)
        try:
            asked_at = trio.current_time()
            models = await self.sources.resolve(spec)
            manifest = Manifest(
                pipeline=spec.id,
                generation=1,
                chunk_size=self._chunk_size,
                models=models,
                resolved_at_ns=catalog.now_ns(),
            )
            names = ["", *(model.name for model in models if model.name)]
            first = await catalog.nodeids.reserve(2 * len(names))
            directory_nodeids = {name: first + 2 * position for position, name in enumerate(names)}
            pipeline = Pipeline(spec, directory_nodeids, pinned=spec.pinned, created_at_ns=catalog.now_ns())
            async with catalog.making(pipeline, manifest) as fresh:
                await trio.to_thread.run_sync(self._write_slot, spec, manifest, True)
                catalog.without_summary.discard(spec.id)  # an earlier pipeline of that name may have been
                await self._record(fresh, summary=summary_of(fresh))
                await self._note_proof(fresh, asked_at)
                catalog.switch_generation(fresh)
                catalog.publish(pipeline)
        finally:
            self._adding.discard(spec.id)
        log.info("added: %d files, %d bytes", len(manifest.files), manifest.total_bytes, extra={"pipeline": spec.id})
        return pipeline

    async def update(self, pipeline_id: str) -> bool:
        """Resolve again; True if a new generation is shown now, False if nothing has changed."""
        catalog = self._catalog
        pipeline = catalog.pipeline(pipeline_id)
        async with pipeline.lock:
            self._still_there(pipeline)
            asked_at = trio.current_time()
            models = await self.sources.resolve(pipeline.spec)
            old = await catalog.ensure_loaded(pipeline)
            if old is not None and await trio.to_thread.run_sync(old.manifest.models.__eq__, models):
                pipeline.failure = None
                return False
            numbers = await trio.to_thread.run_sync(catalog.store.metadata.generations, pipeline_id)
            manifest = Manifest(
                pipeline=pipeline_id,
                generation=max([*numbers, old.number if old else 0]) + 1,
                chunk_size=self._chunk_size,
                models=models,
                resolved_at_ns=catalog.now_ns(),
            )
            async with catalog.making(pipeline, manifest) as new:
                await catalog.invalidate_summary(pipeline)
                await trio.to_thread.run_sync(self._write_slot, pipeline.spec, manifest, False)
                try:
                    # A bound file would be opened through its bind mount here, which would count as a request.
                    async with catalog.bind_gate.withdrawn(pipeline.id):
                        kept = await self._share(old, new) if old is not None else {}
                        await self._record(new, kept)
                        await self._note_proof(new, asked_at)
                        catalog.switch_generation(new, kept)
                except IndexStuck:
                    raise  # the daemon ends: the next one finds out which generation it is to be
                except InstantStartError:
                    # Its names would keep the old generation's bytes on the disk when that is evicted.
                    await trio.to_thread.run_sync(catalog.store.delete_generation, pipeline_id, manifest.generation)
                    raise
            pipeline.failure = None
            weights = frozenset(new.files[index].entry.path for index in new.known.weights)
            pipeline.learned = pipeline.learned.after_update(weights)
            if old is not None:
                await self._distrust(new, kept)
                log.info(
                    "generation %d: %d of %d files are those of generation %d and stay",
                    *(manifest.generation, len(kept), len(manifest.files), old.number),
                    extra={"pipeline": pipeline_id},
                )
                # No more background filling of the old one; those who hold its files open still get their reads.
                self._reads.filler.fill(pipeline_id, [])
                pipeline.draining.append(old)
                if not old.handles:
                    await self.drop_generation(old)
        return True

    async def _note_proof(self, generation: Generation, asked_at: float) -> None:
        """Tell a regional tier that the sources were just read by the pipeline's own credentials."""
        regional = self._reads.filler.regional
        if regional is not None:
            for model in range(len(generation.manifest.models)):
                origin = await trio.to_thread.run_sync(generation.origin, model)
                regional.access.proved(generation.pipeline.id, model, origin, asked_at)

    async def _share(self, old: Generation, new: Generation) -> dict[int, SharedFile]:
        """Return the complete files of ``old`` that ``new`` takes over, by their index in ``new``."""
        before = {file.entry.path: file for file in old.files if file.complete and file.stale_error is None}
        wanted = {
            entry.path: entry.index
            for entry in new.manifest.files
            if (file := before.get(entry.path)) is not None and same_bytes(file.entry.file, entry.file)
        }
        states = {path: before[path].state for path in wanted}
        proofs = {path: before[path].proof for path in sorted(wanted)}
        given = await trio.to_thread.run_sync(
            self._catalog.store.share, old.pipeline.id, old.number, new.number, proofs
        )
        return {wanted[path]: SharedFile(before[path], states[path], allocated) for path, allocated in given.items()}

    async def _distrust(self, new: Generation, kept: Mapping[int, SharedFile]) -> None:
        """Replace shared files in the new generation that were found bad in the old one meanwhile."""
        for index, found in kept.items():
            problem = self._reads.integrity_error(found.old)
            if problem is not None:
                await self._reads.replace_damaged(new.files[index], problem, wanted=True, found_by="update")

    async def drop_drained(self) -> None:
        """Delete superseded generations when their last open ends, until cancelled."""
        async for generation in self._open_files.drained_generations:
            await self.drop_generation(generation)
            del generation  # the next may be long in coming

    async def drop_generation(self, generation: Generation) -> None:
        """Delete a superseded generation that nobody holds open any more."""
        pipeline = generation.pipeline
        if generation.handles:
            return
        if generation not in pipeline.draining:
            if generation is not pipeline.head:
                generation.end()  # evicted or removed while it was in use
            return
        with self._catalog.deleting(generation):
            await self._drop_generation(generation)

    async def _drop_generation(self, generation: Generation) -> None:
        pipeline = generation.pipeline
        pipeline.draining.remove(generation)
        self._catalog.forget_generation(generation)
        for file in generation.files:
            if file.target is not None:
                self._reads.filler.cancel_target(
                    file.target, FillCancelled(f"{pipeline.id}: a newer generation has taken this one's place")
                )
        await self._reads.filler.wait_quiet(pipeline.id)
        drop_targets(generation)
        generation.end()
        if pipeline.removed:
            return
        try:
            await self._catalog.index.write(lambda txn: txn.delete_generation(pipeline.id, generation.number))
            await trio.to_thread.run_sync(self._catalog.store.delete_generation, pipeline.id, generation.number)
        except InstantStartError as error:
            # Nobody sees it any more; the next start tries again.
            log.error(
                "generation %d is not deleted: %s", generation.number, error.message, extra={"pipeline": pipeline.id}
            )

    async def remove(self, pipeline_id: str, *, force: bool = False) -> list[UsingProcess]:
        """Remove the pipeline and its bytes. Complete files stay readable to processes that have them open, and take
        space until then. Returns those processes, as far as they can be seen.

        Raises PipelineBusy while it is leased, unless by ``force``.
        """
        pipeline = self._catalog.pipeline(pipeline_id)
        async with pipeline.lock:
            self._still_there(pipeline)
            if pipeline.leases and not force:
                by_force = f"end that first, or `instantstart remove --force {pipeline_id}`"
                raise PipelineBusy(f"{pipeline_id}: {leased(pipeline)}; {by_force}")
            processes = await self._users.processes_using(pipeline)
            self._still_there(pipeline)
            async with self._catalog.bind_gate.withdrawn(pipeline.id):
                taken = self._catalog.deleting(*pipeline.heads())
                for generation in pipeline.heads():
                    if isinstance(generation, Generation):
                        self._open_files.keep_readers_open(generation)
                self._catalog.withdraw(pipeline)
                self._adding.add(pipeline_id)
                try:
                    with trio.CancelScope(shield=True), taken:
                        cancelled = FillCancelled(f"{pipeline_id}: the pipeline was removed")
                        self._reads.filler.cancel_pipeline(pipeline_id, cancelled)
                        self._reads.filler.reset_failures(pipeline_id)  # a later one of this name has bytes of its own
                        await self._reads.filler.wait_quiet(pipeline_id)
                        for generation in pipeline.heads():
                            if isinstance(generation, Generation):
                                drop_targets(generation)
                        await self._catalog.index.write(lambda txn: txn.delete_pipeline(pipeline_id))
                        await trio.to_thread.run_sync(self._catalog.store.delete_pipeline, pipeline_id)
                finally:
                    self._adding.discard(pipeline_id)
                    self._catalog.end(pipeline)
        log.info("removed", extra={"pipeline": pipeline_id})
        return processes

    async def evict_by_hand(self, pipeline_id: str, *, force: bool = False) -> tuple[int, list[UsingProcess]]:
        """Evict as ``evict`` does, but name the processes that use it if it refuses. ``force``: evict it though it is
        in use.

        Processes that have a complete file open can read on; of other files they get an error. The space is free once
        they close them. Returns the bytes dropped, and those processes, as far as they can be seen."""
        pipeline = self._catalog.pipeline(pipeline_id)
        if force:
            self._refuse_pinned(pipeline)
            processes = await self._users.processes_using(pipeline)
            return await self.evict(pipeline_id, force=True), processes
        try:
            return await self.evict(pipeline_id), []
        except PipelineBusy as error:
            if pipeline.removed or pipeline.pinned or not (pipeline.leases or error.message.endswith(FILES_OPEN)):
                raise
            by_force = f"end that first, or `instantstart evict --force {pipeline_id}`"
            if pipeline.leases:
                raise PipelineBusy(f"{pipeline_id}: {leased(pipeline)}; {by_force}") from error
            found = await self._users.processes_using(pipeline)
            who = (
                listed(found)
                if found
                else "nobody whom this daemon can see: a container's process, or the kernel's own"
            )
            raise PipelineBusy(f"{error.message}: {who}; {by_force}") from error

    async def evict(
        self, pipeline_id: str, refuse: Callable[[Pipeline], None] | None = None, *, force: bool = False
    ) -> int:
        """Delete the pipeline's bytes, keep its manifest; return the number of bytes. ``refuse`` may raise: it is
        called at the point from which on nothing can intervene.

        Raises PipelineBusy while it is pinned, leased or open; by ``force`` only while it is pinned.
        """
        refuse_in_use = self._refuse_pinned if force else self._refuse_in_use
        catalog = self._catalog
        pipeline = catalog.pipeline(pipeline_id)
        async with pipeline.lock:
            self._still_there(pipeline)
            refuse_in_use(pipeline)
            old = await catalog.ensure_loaded(pipeline)
            if old is None:
                return 0
            if force:
                for superseded in list(pipeline.draining):
                    self._open_files.keep_readers_open(superseded)
                    with catalog.deleting(superseded):
                        await self._drop_generation(superseded)
            async with (
                catalog.making(pipeline, old.manifest) as new,
                catalog.bind_gate.withdrawn(pipeline.id, idle_only=not force),
            ):
                # From here to the switch nothing awaits: nobody can open the old generation in between.
                refuse_in_use(pipeline)
                self._open_files.keep_readers_open(old)
                if refuse is not None:
                    refuse(pipeline)
                dropped = sum(file.cached_bytes for file in old.files)
                cancelled = FillCancelled(f"{pipeline_id}: the pipeline was evicted")
                with catalog.deleting(old):
                    self._reads.filler.cancel_pipeline(pipeline_id, cancelled)
                    catalog.switch_generation(new)
                    catalog.forget_generation(old)
                    new.eviction_done = trio.Event()
                    # Half an eviction would leave bytes that the index calls sealed under a fill that writes over them.
                    with trio.CancelScope(shield=True):
                        try:
                            await self._reads.filler.wait_quiet(pipeline_id)

                            number, record = old.number, _generation_record(new)

                            def forget_files(txn: WriteTxn) -> None:
                                txn.delete_files(pipeline_id, number)
                                txn.put_generation(record)

                            drop_targets(old)
                            try:
                                await catalog.index.write(forget_files)
                            except StoreError:
                                new.owed_index_write = forget_files
                                raise
                            finally:
                                # Also when the index could not be told: missing bytes heal, and none come before
                                # it was.
                                await trio.to_thread.run_sync(catalog.store.empty_generation, pipeline_id, old.number)
                        finally:
                            old.end()
                            new.eviction_done.set()
                            new.eviction_done = None
                pipeline.failure = None
                pipeline.changed()
        log.info("evicted: %d bytes", dropped, extra={"pipeline": pipeline_id})
        return dropped

    async def set_pinned(self, pipeline_id: str, pinned: bool) -> None:
        pipeline = self._catalog.pipeline(pipeline_id)
        async with pipeline.lock:
            self._still_there(pipeline)
            spec = msgspec.structs.replace(pipeline.spec, pinned=pinned)
            number = pipeline.head.number if pipeline.head else 0
            record = msgspec.structs.replace(self._pipeline_record(pipeline, number, pinned), spec=spec)
            await trio.to_thread.run_sync(self._catalog.store.metadata.write_pipeline, spec)
            await self._catalog.index.write(lambda txn: txn.put_pipeline(record))
            pipeline.spec, pipeline.pinned = spec, pinned
            pipeline.changed()

    async def set_quota(self, pipeline_id: str, quota: int | None) -> None:
        """Limit the bytes of disk (None: no limit) from the next admission on; what is there or admitted stays."""
        pipeline = self._catalog.pipeline(pipeline_id)
        async with pipeline.lock:
            self._still_there(pipeline)
            spec = msgspec.structs.replace(pipeline.spec, quota=quota)
            number = pipeline.head.number if pipeline.head else 0
            record = msgspec.structs.replace(self._pipeline_record(pipeline, number, pipeline.pinned), spec=spec)
            await trio.to_thread.run_sync(self._catalog.store.metadata.write_pipeline, spec)
            await self._catalog.index.write(lambda txn: txn.put_pipeline(record))
            pipeline.spec = spec
            pipeline.uncached = None  # what the old one refused is asked anew
            pipeline.changed()

    # -- steps -----------------------------------------------------------------------------------------------------

    def _write_slot(self, spec: PipelineSpec, manifest: Manifest, fresh: bool) -> None:
        store = self._catalog.store
        if fresh and spec.id in store.metadata.pipelines():
            store.delete_pipeline(spec.id)
        store.metadata.write_pipeline(spec)
        store.metadata.write_manifest(manifest)

    async def _record(
        self, new: Generation, kept: Mapping[int, SharedFile] | None = None, summary: SummaryRecord | None = None
    ) -> None:
        pipeline, number = new.pipeline, new.number
        record = self._pipeline_record(pipeline, number, pipeline.pinned)
        generation = _generation_record(new)

        def write(txn: WriteTxn) -> None:
            # Where a manifest was removed by hand, an earlier generation may have had this number.
            txn.delete_files(pipeline.id, number)
            txn.put_generation(generation)
            txn.put_pipeline(record)
            for index, found in (kept or {}).items():
                file = FileRecord(found.state.value, allocated=found.allocated)
                txn.put_file(pipeline.id, number, index, file)
            if summary is not None:
                txn.put_summary(pipeline.id, summary)

        await self._catalog.index.write(write)

    @staticmethod
    def _pipeline_record(pipeline: Pipeline, generation: int, pinned: bool) -> PipelineRecord:
        return PipelineRecord(
            spec=pipeline.spec,
            generation=generation,
            next_generation=generation + 1,
            pinned=pinned,
            created_at_ns=pipeline.created_at_ns,
            directory_nodeids=pipeline.directory_nodeids,
        )

    @staticmethod
    def _refuse_pinned(pipeline: Pipeline) -> None:
        if pipeline.pinned:
            raise PipelineBusy(f"{pipeline.id}: it is pinned; `instantstart unpin {pipeline.id}` first")

    @classmethod
    def _refuse_in_use(cls, pipeline: Pipeline) -> None:
        cls._refuse_pinned(pipeline)
        if pipeline.leases:
            raise PipelineBusy(f"{pipeline.id}: {leased(pipeline)}")
        if pipeline.in_use:
            raise PipelineBusy(f"{pipeline.id}: {FILES_OPEN}")

    def _still_there(self, pipeline: Pipeline) -> None:
        if pipeline.removed:
            self._catalog.pipeline(pipeline.id)
            raise PipelineBusy(f"{pipeline.id}: it was removed and added again meanwhile")


def drop_targets(generation: Generation) -> None:
    """Close the targets of a generation whose fills have ended (``wait_quiet``)."""
    for file in generation.files:
        drop_target(file)


def _generation_record(new: Generation) -> GenerationRecord:
    manifest = new.manifest
    return GenerationRecord(
        pipeline=manifest.pipeline,
        number=manifest.generation,
        nodeid_base=new.base,
        file_count=len(manifest.files),
        chunk_size=manifest.chunk_size,
    )
