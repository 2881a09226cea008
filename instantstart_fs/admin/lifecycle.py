"""What changes pipelines: add, update, remove, evict, verify.

Each holds the pipeline's lock, so one of them runs at a time. Orders that a crash may cut at any point:

    add      slot's pipeline.json and manifest.json, then the index record      a slot without a record is an orphan:
                                                                                removed by the next add of that id
    update   manifest.json of n+1, names of unchanged files in it, then the     generations other than the record's are
             record says n+1 and that these are complete, then n is deleted     removed at start
    evict    index forgets the files (new nodeids), then the bytes go           files without a record are removed when
                                                                                they are filled again
    remove   index forgets the pipeline, then the slot goes                     like add's orphan
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import msgspec
import trio

from instantstart_fs.admin.access_proof import prove_access
from instantstart_fs.catalog.catalog import Catalog, SharedFile
from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.catalog.summaries import summary_of
from instantstart_fs.core import access
from instantstart_fs.core.chunks import MAX_CHUNKS
from instantstart_fs.core.limits import MAX_BYTES, MAX_ID
from instantstart_fs.core.manifest import Manifest, ManifestFile, ModelManifest, ModelSpec, PipelineSpec, same_bytes
from instantstart_fs.core.names import validate_model_name, validate_origin_paths, validate_pipeline_id
from instantstart_fs.errors import (
    FillCancelled,
    IndexStuck,
    InstantStartError,
    InvalidName,
    OriginMisbehaved,
    OriginUnavailable,
    OriginUnsupported,
    PipelineBusy,
    PipelineExists,
    StoreDamaged,
    StoreError,
    UsageError,
)
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord, SummaryRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.origins.bounds import TooLarge
from instantstart_fs.origins.lister import Lister, Order, What
from instantstart_fs.origins.settings import OriginSettings
from instantstart_fs.serving.fill_events import drop_target
from instantstart_fs.serving.open_by import UsingProcess, known, listed, processes_using
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.reads import Reads
from instantstart_fs.upkeep.rehash import Pace, rehash

log = logging.getLogger(__name__)

RESOLVE_DEADLINE = 300.0
"""Seconds for listing and pinning one source: a million keys are a thousand S3 listing pages."""

RESOLVE_AT_ONCE = 32
"""Sources that are listed at the same time; the others wait, and their deadline with them."""

PROC_SCAN_DEADLINE = 5.0
"""Seconds for a look through /proc: a busy host's takes one."""

MOST_HELD = 2000
"""Files whose inode numbers in the store are looked up for it."""

NO_VISIBLE_PROCESS = (
    "nobody whom this daemon can see (a process that it may not look at, the kernel itself, or its own verify or scrub)"
)
FILES_OPEN = "somebody has files of it open"
"""How a refusal ends that says no more."""

CHECK_DEADLINE = 60.0
"""Seconds for one source to say whether it may be fetched: a few small requests."""


class VerifyReport(msgspec.Struct, frozen=True):
    """``files`` and ``bytes`` read; ``healed``: were wrong, are being fetched again; ``unproven``: have no digest."""

    files: int
    bytes: int
    healed: tuple[str, ...]
    unproven: tuple[str, ...]


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
        self._looking = trio.CapacityLimiter(1)
        self._chunk_size = chunk_size
        self._settings = settings
        self._adding: set[str] = set()
        self._resolving = trio.Semaphore(RESOLVE_AT_ONCE)

    async def add(self, spec: PipelineSpec) -> Pipeline:
        """Resolve and pin every model, store the manifest, show the pipeline. Raises PipelineExists, OriginError, …"""
        _validate(spec)
        catalog = self._catalog
        if spec.id in catalog.pipelines or spec.id in self._adding:
            raise PipelineExists(
                f"there is a pipeline {spec.id!r} already; `instantstart update {spec.id}` looks for a newer revision, "
                f"`instantstart remove {spec.id}` makes room for another source"
            )
        self._adding.add(spec.id)
        try:
            models = await self._resolve(spec)
            manifest = Manifest(
                pipeline=spec.id,
                generation=1,
                chunk_size=self._chunk_size,
                models=models,
                resolved_at_ns=catalog.now_ns(),
            )
            names = ["", *(model.name for model in models if model.name)]
            first = await catalog.reserve_nodeids(2 * len(names))
            directory_nodeids = {name: first + 2 * position for position, name in enumerate(names)}
            pipeline = Pipeline(spec, directory_nodeids, pinned=spec.pinned, created_at_ns=catalog.now_ns())
            async with catalog.making(pipeline, manifest) as fresh:
                await trio.to_thread.run_sync(self._write_slot, spec, manifest, True)
                catalog.without_summary.discard(spec.id)  # an earlier pipeline of that name may have been
                await self._record(fresh, summary=summary_of(fresh))
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
            models = await self._resolve(pipeline.spec)
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
                    # What is covered is opened for this, and opening that would be a request.
                    async with catalog.bind_gate.withdrawn(pipeline.id):
                        kept = await self._share(old, new) if old is not None else {}
                        await self._record(new, kept)
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

    async def _share(self, old: Generation, new: Generation) -> dict[int, SharedFile]:
        """What ``new`` takes over of ``old``, by its own index: complete files whose bytes it wants as well."""
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
        """Files that were found bad in the old generation while the new one took them over are bad there, too."""
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
        """Forget the pipeline and its bytes. Complete files stay readable for those who hold them open, and take their
        space until then: those are returned, as far as they can be seen.

        Raises PipelineBusy while it is leased, unless by ``force``.
        """
        pipeline = self._catalog.pipeline(pipeline_id)
        async with pipeline.lock:
            self._still_there(pipeline)
            if pipeline.leases and not force:
                by_force = f"end that first, or `instantstart remove --force {pipeline_id}`"
                raise PipelineBusy(f"{pipeline_id}: {_leased(pipeline)}; {by_force}")
            processes = await self._processes_using(pipeline)
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
        """``evict``, and a refusal says who is in the way. By ``force`` neither leases nor opens are: complete files
        stay readable for those who hold them open, of others they get an error, and the space is free once they close
        them: who they are, as far as can be seen, is returned as well."""
        pipeline = self._catalog.pipeline(pipeline_id)
        if force:
            self._refuse_pinned(pipeline)
            processes = await self._processes_using(pipeline)
            return await self.evict(pipeline_id, force=True), processes
        try:
            return await self.evict(pipeline_id), []
        except PipelineBusy as error:
            if pipeline.removed or pipeline.pinned or not (pipeline.leases or error.message.endswith(FILES_OPEN)):
                raise
            by_force = f"end that first, or `instantstart evict --force {pipeline_id}`"
            if pipeline.leases:
                raise PipelineBusy(f"{pipeline_id}: {_leased(pipeline)}; {by_force}") from error
            found = await self._processes_using(pipeline)
            who = (
                listed(found)
                if found
                else "nobody whom this daemon can see: a container's process, or the kernel's own"
            )
            raise PipelineBusy(f"{error.message}: {who}; {by_force}") from error

    async def _processes_using(self, pipeline: Pipeline) -> list[UsingProcess]:
        """Which processes have files of it open or mapped, or were handed them; nobody after HOLDERS_DEADLINE."""
        generations = [found for found in pipeline.heads() if isinstance(found, Generation)]
        if not any(generation.handles for generation in generations) and not pipeline.leases:
            return []
        files = [file for generation in generations for file in generation.files if file.handles or file.complete]
        inodes: dict[str, set[int]] = {}
        for file in files:
            inodes.setdefault(file.entry.path.rpartition("/")[2], set()).add(file.nodeid)
        held = [(file.triple, file.entry.path) for file in files if file.complete][:MOST_HELD]

        def look() -> list[UsingProcess]:
            # Whom a file was handed, or who has it bound over the mount, has the store's own open.
            for (name, generation, _), path in held:
                with contextlib.suppress(InstantStartError):
                    blob = self._catalog.store.existing_blob(name, generation, path)
                    if blob is not None:
                        with blob:
                            inodes[path.rpartition("/")[2]].add(os.fstat(blob.fd).st_ino)
            return processes_using(inodes)

        with trio.move_on_after(PROC_SCAN_DEADLINE):
            return await run_abandonable(look, limiter=self._looking)
        return []

    async def evict(
        self, pipeline_id: str, refuse: Callable[[Pipeline], None] | None = None, *, force: bool = False
    ) -> int:
        """Drop the pipeline's bytes, keep its manifest; the number of bytes dropped. ``refuse`` is asked at the moment
        from which on nothing can come in between, and may raise.

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
        """From the next admission on. What is there stays, and so does what was admitted."""
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

    async def verify(
        self, pipeline_id: str, progress: Callable[[int, int], None], rate: float | None = None
    ) -> VerifyReport:
        """Read every complete file again, at most ``rate`` bytes a second, past the page cache, and compare its digest;
        what is wrong is dropped and fetched again.

        ``progress(bytes done, bytes in all)`` is called on the trio thread.
        """
        pipeline = self._catalog.pipeline(pipeline_id)
        generation = await self._catalog.ensure_loaded(pipeline)
        if generation is None:
            raise pipeline.failure.error if pipeline.failure else StoreDamaged(f"{pipeline_id} has no manifest")
        files = [file for file in generation.files if file.complete]
        total, done, healed, unproven = sum(file.size for file in files), 0, [], []
        pace = Pace(rate)
        with self._reads.using(generation):
            for file in files:
                if file.entry.file.digest is None:
                    unproven.append(file.entry.path)
                began = done

                def read(count: int) -> None:
                    nonlocal done
                    done += count
                    progress(done, total)

                problem = await rehash(self._catalog.store, file, pace.wait, read)
                done = began + file.size
                progress(done, total)
                if problem is not None and self._catalog.file(file.key) is file:
                    healed.append(file.entry.path)
                    await self._reads.replace_damaged(file, problem, wanted=True, found_by="verify")
        return VerifyReport(files=len(files), bytes=total, healed=tuple(healed), unproven=tuple(unproven))

    async def check_access(self, pipeline_id: str) -> tuple[str, ...]:
        """Prove that every source may be fetched with the pipeline's own credentials, by a byte of it; the sources.

        Asks with fresh clients: what an earlier one was allowed proves nothing. Raises what an origin answers.
        """
        pipeline = self._catalog.pipeline(pipeline_id)
        await self._catalog.ensure_loaded(pipeline)  # its own files are the best proof
        for model in pipeline.spec.models:
            await self.check_source(pipeline.spec, model, fetch=True)
        return tuple(model.source for model in pipeline.spec.models)

    async def check_source(self, spec: PipelineSpec, model: ModelSpec, *, fetch: bool = False) -> None:
        """The same of one source; ``fetch``: also by one byte of its pinned files, as far as they are in memory."""
        pipeline = self._catalog.pipelines.get(spec.id)
        pinned: tuple[ManifestFile, ...] = ()
        if pipeline is not None and isinstance(pipeline.head, Generation):
            for found in pipeline.head.manifest.models:
                if (found.name, found.source) == (model.name, model.source):
                    pinned = found.files

        lister = self._lister("check", spec, model, CHECK_DEADLINE)

        def check() -> None:
            origin = self._catalog.open_origin(spec, model)
            try:
                origin.check()
            except TooLarge:
                lister.run()
            if fetch and access.asks_somebody([model.source]):
                prove_access(origin, pinned)

        with trio.move_on_after(CHECK_DEADLINE) as scope:
            try:
                await run_abandonable(check)
            except InstantStartError:
                raise
            except Exception as error:
                raise _unforeseen(spec, model, error) from error
            finally:
                lister.end()
        if scope.cancelled_caught:
            raise OriginUnavailable(f"{model.source}: no answer within {CHECK_DEADLINE:g} s")

    # -- steps -----------------------------------------------------------------------------------------------------

    async def _resolve(self, spec: PipelineSpec) -> tuple[ModelManifest, ...]:
        resolved: list[ModelManifest | None] = [None] * len(spec.models)
        failures: list[InstantStartError] = []

        async def one(position: int) -> None:
            model = spec.models[position]

            lister = self._lister("resolve", spec, model, RESOLVE_DEADLINE)

            def resolve() -> ModelManifest | None:
                try:
                    return self._catalog.open_origin(spec, model).resolve()
                except TooLarge:
                    log.info("%s is large: a process of its own lists it", model.source, extra={"pipeline": spec.id})
                    return lister.run()

            try:
                # Threads of their own: an origin that hangs must not use up those that read the store.
                async with self._resolving:
                    with trio.move_on_after(RESOLVE_DEADLINE) as scope:
                        resolved[position] = await run_abandonable(resolve)
                if scope.cancelled_caught:
                    raise OriginUnavailable(f"{model.source}: no answer within {RESOLVE_DEADLINE:g} s")
            except InvalidName as error:
                # The caller's own names were looked at before: this is one of the origin's.
                failures.append(OriginUnsupported(f"{model.source}: {error.message}"))
            except InstantStartError as error:
                failures.append(error)
            except Exception as error:
                failures.append(_unforeseen(spec, model, error))
            finally:
                lister.end()

        async with trio.open_nursery() as nursery:
            for position in range(len(spec.models)):
                nursery.start_soon(one, position)
        if failures:
            raise failures[0]
        models = tuple(model for model in resolved if model is not None)
        await trio.to_thread.run_sync(self._refuse_unservable, models)
        return models

    def _refuse_unservable(self, models: Sequence[ModelManifest]) -> None:
        """In a thread: a hundred thousand files take a moment."""
        for model in models:
            for file in model.files:
                if file.size > MAX_CHUNKS * self._chunk_size:
                    raise OriginUnsupported(
                        f"{model.source}: {file.path} has {file.size} bytes; with fill.chunk_size = {self._chunk_size} "
                        f"a file may have {MAX_CHUNKS * self._chunk_size}"
                    )
        # The origins have validated their own names; together with the models' names they must not collide either.
        validate_origin_paths(
            f"{model.name}/{file.path}" if model.name else file.path for model in models for file in model.files
        )

    def _lister(self, what: What, spec: PipelineSpec, model: ModelSpec, seconds: float) -> Lister:
        return Lister(Order(what, spec, model, self._settings, seconds))

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
            raise PipelineBusy(f"{pipeline.id}: {_leased(pipeline)}")
        if pipeline.in_use:
            raise PipelineBusy(f"{pipeline.id}: {FILES_OPEN}")

    def _still_there(self, pipeline: Pipeline) -> None:
        if pipeline.removed:
            self._catalog.pipeline(pipeline.id)
            raise PipelineBusy(f"{pipeline.id}: it was removed and added again meanwhile")


def _leased(pipeline: Pipeline) -> str:
    """``2 lease(s) hold it: pid 7 (vllm, uid 1000), …``"""
    processes = [known(lessee.pid, lessee.uid) for lessee in pipeline.lessees]
    return f"{pipeline.leases} lease(s) hold it" + (f": {listed(processes)}" if processes else "")


def drop_targets(generation: Generation) -> None:
    """After ``wait_quiet``: let go of what was filling."""
    for file in generation.files:
        drop_target(file)


def _unforeseen(spec: PipelineSpec, model: ModelSpec, error: Exception) -> OriginMisbehaved:
    """An origin's answer, or our reading of it, broke in a way that its seam does not know. The log has the traceback;
    the message does not repeat what may hold a signature."""
    log.error("%s cannot be read", model.source, exc_info=error, extra={"pipeline": spec.id})
    return OriginMisbehaved(f"{model.source}: {type(error).__name__} while reading what it answered; see the log")


def _generation_record(new: Generation) -> GenerationRecord:
    manifest = new.manifest
    return GenerationRecord(
        pipeline=manifest.pipeline,
        number=manifest.generation,
        nodeid_base=new.base,
        file_count=len(manifest.files),
        chunk_size=manifest.chunk_size,
    )


def _validate(spec: PipelineSpec) -> None:
    validate_pipeline_id(spec.id)
    names: Sequence[str] = [validate_model_name(model.name) for model in spec.models]
    if not names:
        raise InvalidName(f"{spec.id}: a pipeline needs at least one source")
    if len(set(names)) != len(names):
        raise InvalidName(f"{spec.id}: two models have the same name")
    if "" in names and len(names) > 1:
        raise InvalidName(f"{spec.id}: with several models, each needs a name (--model NAME=SOURCE)")
    if spec.mode & ~0o777:
        raise InvalidName(f"{spec.id}: mode {spec.mode:o} is not a permission mode")
    # A client may be anybody's program: what the kernel's protocol or the index cannot say would fail later, for all.
    if not (0 <= spec.uid <= MAX_ID and 0 <= spec.gid <= MAX_ID):
        raise UsageError(f"{spec.id}: owner {spec.uid}:{spec.gid} is out of range")
    if spec.quota is not None and not 0 <= spec.quota <= MAX_BYTES:
        raise UsageError(f"{spec.id}: quota {spec.quota} is not a size")
