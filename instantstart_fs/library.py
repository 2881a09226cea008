"""The library: what pipelines there are, what of them is here, and how to get the rest.

It builds the parts, runs their background tasks, and is what the mount (vfs.Vfs) and the control server talk to:

    catalog    what is known of pipelines in memory
    serving    opens, reads, bind mounts
    admin      add, update, remove, evict, verify
    upkeep     eviction, scrub, access checks
    views      names, attributes, status
    telemetry  counters, records of cold starts

All methods belong on the trio thread.
"""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import msgspec
import trio

from instantstart_fs.admin.lifecycle import Admin, VerifyReport
from instantstart_fs.admin.origin_checks import OriginChecks
from instantstart_fs.catalog import loadsets
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.learning import Learning
from instantstart_fs.catalog.model import Generation, Lessee, Pipeline
from instantstart_fs.catalog.residency import Residency
from instantstart_fs.catalog.unloaded import UnloadedGeneration
from instantstart_fs.config import Config
from instantstart_fs.core import eviction, staging
from instantstart_fs.core.clockwatch import ClockState
from instantstart_fs.core.coldstart import ColdStart, Facts, Moment
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.scrub import Activity
from instantstart_fs.core.sight import Sight
from instantstart_fs.core.status import OriginCheck, PipelineState, PipelineStatus
from instantstart_fs.errors import (
    InstantStartError,
    OutOfResources,
    PipelineBusy,
    ReadDeadline,
    StoreDamaged,
    StoreFull,
    VariantNotChosen,
)
from instantstart_fs.filler.scheduler import Filler, FillSettings, FillStatistics
from instantstart_fs.filler.target import FileKey
from instantstart_fs.index.access_times import AccessTimes
from instantstart_fs.index.environment import Index
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.origins.base import Origin
from instantstart_fs.origins.bounds import IN_THE_DAEMON
from instantstart_fs.origins.registry import OriginSettings, open_origin
from instantstart_fs.serving.admission import Admissions
from instantstart_fs.serving.bindings import Bindings
from instantstart_fs.serving.export import Handover
from instantstart_fs.serving.fill_events import FillEventHandler
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.open_notifications import OpenListener
from instantstart_fs.serving.reads import Handle, Reads
from instantstart_fs.serving.shielded import ShieldedOperations
from instantstart_fs.serving.startupcaches import StartupCaches
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.layout import generation_number
from instantstart_fs.store.tree import REMOVED
from instantstart_fs.telemetry.telemetry import Telemetry
from instantstart_fs.upkeep.access_recheck import Rechecker
from instantstart_fs.upkeep.eviction import Evictor, boot_identity, boottime
from instantstart_fs.upkeep.scrub import Scrubber
from instantstart_fs.vfs import Attributes, Filesystem, Invalidation, NotLoaded, OpenFile
from instantstart_fs.views import status
from instantstart_fs.views.namespace import Namespace
from instantstart_fs.views.store_summary import ScrubSummary, StoreSummary, StoreSummaryBuilder

__all__ = ["Library", "VerifyReport"]

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0
"""For which the end waits for the last accesses to be written."""
GIVE_UP_SECONDS = 15.0
"""After which the end waits for no commit any more; systemd waits longer."""

EVICTION = "eviction"
"""The kind of errand."""

MAX_INDEX_JSON = 64 * 1024 * 1024
"""Bytes: that of a model of 100,000 tensors has 10 MB; a larger one orders nothing."""


PREFETCH_SECONDS = 600.0
"""A prefetch holds its lease as long as its weights are held; for so long it is taken for reading."""


class Library:
    """See the module. Implements view.Vfs."""

    def __init__(
        self,
        config: Config,
        store: BlobStore,
        index: Index,
        *,
        held: Sequence[int] = (),
        taking_over: bool = False,
        now_ns: Callable[[], int] = time.time_ns,
        boot: Callable[[], float] = boottime,
        boot_id: Callable[[], str] = boot_identity,
    ) -> None:
        """``held``: the nodeids that the kernel holds open from an earlier daemon, one for each handle.
        ``taking_over``: readers wait for the mount; fetch workers are not started before ``settle``. ``now_ns``: the
        wall clock. ``boot``: one that nobody sets, seconds; ``boot_id``: since which start of the machine it runs."""
        self._held = held
        self._config = config
        self._store = store
        self._index = index
        origin_settings = OriginSettings(
            config.origins.huggingface, config.origins.s3, allow_private=config.origins.allow_private
        )

        here = msgspec.structs.replace(origin_settings, bounds=IN_THE_DAEMON)

        def opener(spec: PipelineSpec, model: ModelSpec) -> Origin:
            return open_origin(spec, model, here)

        self._catalog = Catalog(store, index, opener, now_ns)
        self._access = AccessTimes(index, clock=now_ns)
        self._learning = Learning(self._catalog)
        self.telemetry = Telemetry(index, self._catalog.now_ns, self._facts, learning=self._learning)
        self._open_files = OpenFiles(self._catalog)
        self._open_files.on_release = self._learning.closed
        settings = FillSettings(
            workers=config.fill.worker_count,
            connections=config.fill.connections,
            read_deadline=config.fill.read_deadline,
            serve_unsealed=config.fill.serve_unsealed,
        )
        self._removal_told = False
        self._evictor = Evictor(
            self,
            lambda: self._catalog.now_ns() / 1e9,
            keep_hot=config.eviction.keep_hot,
            max_idle=config.eviction.max_idle,
            boot=boot,
            boot_id=boot_id(),
            known=index.read(lambda txn: txn.clock()),
        )
        self._admissions = Admissions(self._evictor)
        self._shielded = ShieldedOperations()
        self.startup = StartupCaches(self._catalog, self._evictor)
        fill_events = FillEventHandler(
            self._catalog, self._open_files, self.telemetry, self._admissions, self._evictor.wake, self._shielded
        )
        region = None
        if config.regional is not None:
            from instantstart_fs.filler.region_settings import region_settings  # late: only a region needs it

            region = region_settings(config.regional)
        self._region_key = region.key if region is not None else None
        self._filler = Filler(
            store,
            index,
            settings,
            fill_events,
            free_space=self._evictor.free_space,
            region=region,
            slot_of=self._slot_of,
        )
        if taking_over:
            self._filler.hold_workers()
        self._reads = Reads(
            self._catalog,
            self._access,
            config.fill.read_deadline,
            self.telemetry,
            self._open_files,
            fill_events,
            self._filler,
            self._admissions,
            self._learning,
        )
        self._admin = Admin(self._catalog, self._reads, self._open_files, config.fill.chunk_size, origin_settings)
        self._origin_checks = OriginChecks(self._catalog, self._admin)
        self._bindings = Bindings(
            self._catalog, self._access, self._open_files, self.telemetry, config.eviction.keep_hot
        )
        self._bindings.replace_damaged = fill_events.replace_damaged
        self.scrubber: Scrubber | None = None
        if config.store.scrub is not None:
            self.scrubber = Scrubber(
                self._catalog,
                self._reads,
                self.telemetry,
                self._activity,
                period=config.store.scrub,
                rate=config.store.scrub_rate,
            )
        self._prefetches: Counter[float] = Counter()
        """Prefetches under way, by when they began."""
        self.rechecker: Rechecker | None = None
        if config.origins.recheck_access is not None:
            self.rechecker = Rechecker(
                self._catalog,
                self._reads,
                self.telemetry,
                self._admin.check_source,
                period=config.origins.recheck_access,
                hide=config.origins.on_refusal == "hide",
            )
        self.residency = Residency(self._catalog)
        self._namespace = Namespace(self._catalog, self._access, self._state_of, config.eviction.keep_hot)

    def _slot_of(self, pipeline: str) -> str | None:
        """The pipeline's slot in the regional tier."""
        found = self._catalog.pipelines.get(pipeline)
        return self._region_key.slot(found.spec) if found is not None and self._region_key is not None else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load what the store holds, run the background tasks; on leaving, flush what must not be lost."""
        ending = trio.CancelScope()
        async with AsyncExitStack() as after, trio.open_nursery() as nursery:
            after.callback(ending.cancel)  # whoever uses the index then has all the time it takes
            await nursery.start(self._access.run)
            await trio.to_thread.run_sync(self._catalog.load, frozenset(self._held))
            if self.rechecker is not None:
                self.rechecker.recall()
            # Before anything can be evicted or deleted.
            self._reads.restore_handles(self._held)
            await trio.to_thread.run_sync(self._remove_superseded)
            await trio.to_thread.run_sync(self.telemetry.load)
            nursery.start_soon(self.telemetry.run)
            nursery.start_soon(self._learning.run)
            await nursery.start(self._shielded.run)
            await nursery.start(self._filler.run)
            nursery.start_soon(self._reads.run_replacements)
            nursery.start_soon(self._drop_drained)
            nursery.start_soon(self.residency.run)
            nursery.start_soon(self._catalog.keep_failures)
            nursery.start_soon(self._evictor.run)
            self._evictor.wake()
            if self.scrubber is not None:
                nursery.start_soon(self.scrubber.run)
            if self.rechecker is not None:
                nursery.start_soon(self.rechecker.run)
            try:
                yield
            finally:
                # What is under way then (a commit, half an eviction) is finished; unless the disk hangs.
                trio.lowlevel.spawn_system_task(self._give_up_later, ending)
                with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_SECONDS):
                    for flush in (self._access.flush, self._catalog.save_failures):
                        try:
                            await flush()
                        except InstantStartError as error:
                            log.warning("not written at the end: %s", error.message)
                nursery.cancel_scope.cancel()

    async def _give_up_later(self, ending: trio.CancelScope) -> None:
        with ending:
            await trio.sleep(GIVE_UP_SECONDS)
            self._index.give_up()

    async def _drop_drained(self) -> None:
        async for generation in self._open_files.drained_generations:
            await self._admin.drop_generation(generation)
            del generation  # the next may be long in coming

    def _remove_superseded(self) -> None:
        """What an update, an eviction or a fill left behind when the daemon died; in a thread, before anything is
        filled. Of what is settled (catalog/residency.py) nothing is left behind."""
        for pipeline in self._catalog.dirty_at_start:
            current = pipeline.current
            if current is None:
                continue
            kept = {generation.number for generation in pipeline.generations()}
            try:
                for name in self._store.tree.list_directory(pipeline.id):
                    number = generation_number(name)
                    if number is not None and number not in kept:
                        self._store.delete_generation(pipeline.id, number)
                        self._index.write_sync(
                            functools.partial(_forget_generation, pipeline.id, number),
                            patience=self._index.commit_deadline,
                        )
                self._catalog.trim(current)
            except InstantStartError as error:
                pipeline.leftovers = True
                # One slot that cannot be cleaned must not keep the others from being served.
                log.error("what it left behind stays: %s", error.message, extra={"pipeline": pipeline.id})

    # -- view.Vfs -------------------------------------------------------------------------------------------------

    @property
    def invalidations(self) -> trio.MemoryReceiveChannel[Invalidation]:
        return self._catalog.invalidations

    @property
    def bindings(self) -> Bindings:
        return self._bindings

    def use_passthrough(self, on: bool, closing: Callable[[int], None] | None = None) -> None:
        self._catalog.passthrough = on
        self._open_files.closing = closing

    async def ensure_loaded(self, pipeline: str) -> None:
        """Read what is not in memory of it, so that what asks for all of it (``status``) need not."""
        found = self._catalog.pipelines.get(pipeline)
        if (
            found is not None
            and await self._catalog.ensure_loaded(found) is None
            and isinstance(found.head, UnloadedGeneration)
        ):
            raise found.failure.error if found.failure else OutOfResources(f"{pipeline}: cannot be read now")

    def lookup(self, parent: int, name: str) -> Attributes:
        return self._namespace.lookup(parent, name)

    def attributes(self, nodeid: int) -> Attributes:
        return self._namespace.attributes(nodeid)

    def list_directory(self, nodeid: int) -> Sequence[str]:
        return self._namespace.list_directory(nodeid)

    def keeps_listing(self, nodeid: int) -> bool:
        return self._namespace.keeps_listing(nodeid)

    def readlink(self, nodeid: int) -> str:
        return self._namespace.readlink(nodeid)

    def xattrs(self, nodeid: int) -> dict[str, bytes]:
        return self._namespace.xattrs(nodeid)

    def filesystem(self) -> Filesystem:
        space = self._store.space()
        return Filesystem(
            total_bytes=space.f_blocks * space.f_frsize,
            available_bytes=space.f_bavail * space.f_frsize,
            # Everybody may ask: the number of files would say how many one has that is hidden.
            files=len(self._catalog.pipelines),
        )

    def open_nowait(self, nodeid: int) -> Handle | None:
        return self._reads.open_nowait(nodeid)

    async def open(self, nodeid: int) -> Handle:
        return await self._reads.open(nodeid)

    async def read_into(self, file: OpenFile, offset: int, buffer: memoryview) -> int:
        assert isinstance(file, Handle)
        return await self._reads.read_into(file, offset, buffer)

    def reopen(self, nodeid: int) -> Handle:
        return self._reads.reopen(nodeid)

    def on_mounted(self, *, resumed: bool) -> None:
        self._reads.release_unclaimed()
        self._filler.start_workers()
        if resumed:
            self._catalog.expire_names()

    def release(self, file: OpenFile) -> None:
        assert isinstance(file, Handle)
        self._reads.release(file)

    # -- administration --------------------------------------------------------------------------------------------

    async def add(self, spec: PipelineSpec) -> PipelineStatus:
        """Resolve, pin and show a new pipeline. Raises PipelineExists, UsageError, OriginError, StoreError."""
        pipeline = await self._admin.add(spec)
        await self._may_be_fetched(pipeline)
        return self._status(pipeline, with_files=False)

    async def update(self, pipeline: str) -> PipelineStatus:
        """Resolve again and switch to a new generation if anything changed. Raises like add, and PipelineNotFound."""
        if not await self._admin.update(pipeline):
            # Asked again on purpose: what failed for good at the same pins may be tried anew.
            generation = await self._catalog.ensure_loaded(self._catalog.pipeline(pipeline))
            if generation is not None:
                with generation.retained():
                    await self._reads.reset_failures(generation)
        await self._may_be_fetched(self._catalog.pipeline(pipeline))
        return self.status(pipeline)

    async def _may_be_fetched(self, pipeline: Pipeline) -> None:
        """Its sources were just listed with its credentials."""
        if self.rechecker is not None:
            await self.rechecker.note(pipeline, None)

    async def remove(self, pipeline: str, *, force: bool = False) -> list[str]:
        """Who still has files of it open, whose space is free once they are closed. Raises PipelineNotFound,
        PipelineBusy (leased; not by ``force``)."""
        found = self._catalog.pipeline(pipeline)
        processes = await self._admin.remove(pipeline, force=force)
        self._learning.forget(found)
        self.telemetry.forget(pipeline)
        self.startup.forget(found)
        if pipeline not in self._catalog.pipelines:
            self._access.forget(pipeline)
        return [str(holder) for holder in processes]

    async def evict(self, pipeline: str, *, force: bool = False) -> list[str]:
        """As ``remove`` says. Raises PipelineNotFound, PipelineBusy (pinned; leased or open, but by ``force``)."""
        self._bindings.poll_releases(pipeline)
        dropped, processes = await self._admin.evict_by_hand(pipeline, force=force)
        self.telemetry.evicted(dropped)
        await self.startup.evicted(pipeline)
        self._evictor.wake()
        return [str(holder) for holder in processes]

    async def evict_unused(self, pipeline: str) -> None:
        """``evict`` for the evictor: PipelineBusy, too, if it was requested since it was chosen, or is being changed:
        an update may take minutes, and whoever waits for room waits for this."""
        if self._catalog.pipeline(pipeline).lock.locked():
            raise PipelineBusy(f"{pipeline} is being changed")

        def refuse(found: Pipeline) -> None:
            if self._evictor.suspended() or not self._candidate(found, locked=False).evictable:
                raise PipelineBusy(f"{found.id}: it was requested meanwhile, or the clock was set")

        async def work() -> None:
            self.telemetry.evicted(await self._admin.evict(pipeline, refuse))
            await self.startup.evicted(pipeline)
            self._evictor.wake()

        # Whoever needs the room may be a reader, whose patience ends.
        await self._shielded.run_to_completion(work, EVICTION)

    async def evictions_end(self) -> None:
        await self._shielded.wait_idle(EVICTION)

    async def set_pinned(self, pipeline: str, pinned: bool) -> None:
        await self._admin.set_pinned(pipeline, pinned)

    async def set_quota(self, pipeline: str, quota: int | None) -> None:
        """Bytes of disk that its files may take from now on; None: as many as there are. Raises PipelineNotFound,
        StoreError."""
        await self._admin.set_quota(pipeline, quota)

    def touch(self, pipeline: str) -> None:
        """Count a request now."""
        self._access.record_request(self._catalog.pipeline(pipeline).id, self._catalog.now_ns())

    async def include(self, pipeline: str, globs: Sequence[str]) -> None:
        """What these match, as those of `add` do, belongs to the load set from now on. Raises PipelineNotFound, and
        UsageError where a glob matches nothing."""
        while True:
            generation = await self._readable(pipeline)
            name, files = generation.pipeline.id, generation.manifest.files
            with generation.retained():
                indices = await trio.to_thread.run_sync(loadsets.included, name, files, globs)
            if generation is self._visible(pipeline).head:  # an update may have come meanwhile
                break
        self._learning.want(generation, indices)

    async def warm(self, pipeline: str, *, everything: bool = False) -> None:
        """Start filling the load set (``everything``: all files) in the background. Raises what forbids it now:
        VariantNotChosen, while all that is no variant is filled; StoreFull when there is no room for it, with what
        would have to go."""
        generation = await self._readable(pipeline)
        asked = generation.undecided and not (everything or generation.load_set_complete)
        question = loadsets.question(generation) if asked else ""
        with generation.retained():
            await self._reads.reset_failures(generation)
            refused = await self._reads.start_fill(generation, everything=everything)
        if refused is not None:
            raise StoreFull(f"{pipeline}: {refused.text}")
        if question:
            raise VariantNotChosen(question)

    async def _readable(self, pipeline: str) -> Generation:
        """Raises PipelineNotFound, why it is out of view, and why its manifest cannot be read."""
        found = self._visible(pipeline)
        generation = await self._catalog.ensure_loaded(found)
        if generation is None:
            raise found.failure.error if found.failure else InstantStartError(f"{pipeline}: cannot be served")
        return generation

    def _visible(self, pipeline: str) -> Pipeline:
        """Raises PipelineNotFound, and why it is out of view."""
        found = self._catalog.pipeline(pipeline)
        found.check_visible()
        return found

    def status(self, pipeline: str, *, with_files: bool = True) -> PipelineStatus:
        return self._status(self._catalog.pipeline(pipeline), with_files=with_files, in_brief=not with_files)

    def mark(self, pipeline: str, moment: Moment, at_ns: int | None = None, start: str = "") -> None:
        """A moment of a cold start that a filesystem cannot see; wall clock, None for now; ``start``: of the one with
        that id. Raises PipelineNotFound, NoColdStart."""
        self.telemetry.mark(self._catalog.pipeline(pipeline).id, moment, at_ns, start)

    async def begin_start(self, pipeline: str, start: str, requested_ns: int | None) -> str:
        """`run` begins a start, or asks once more for the one that is called ``start``; its id. Raises
        PipelineNotFound."""
        found = self._catalog.pipeline(pipeline)
        await self._catalog.ensure_loaded(found)
        self._catalog.pipeline(pipeline)
        if not start:
            start = secrets.token_hex(8)
            self.telemetry.begin_start(found, start, requested_ns)
        return start

    def report_start(self, pipeline: str, start: str, **changes: object) -> None:
        """What `run` says of its start. Raises PipelineNotFound, NoColdStart."""
        self.telemetry.report_start(self._catalog.pipeline(pipeline).id, start, **changes)

    def end_start(self, pipeline: str, start: str) -> None:
        """The connection of that `run` has ended."""
        self.telemetry.end_start(pipeline, start)

    def cold_starts(self, pipeline: str) -> list[ColdStart]:
        """The last ones, newest first. Raises PipelineNotFound."""
        return self.telemetry.cold_starts(self._catalog.pipeline(pipeline).id)

    def fill_statistics(self) -> FillStatistics:
        return self._filler.statistics()

    async def store_summary(self) -> StoreSummary:
        """Everything at a glance, for the page and the metrics; lets others run while it looks."""
        builder = StoreSummaryBuilder(self.budget(), self._catalog.now_ns(), len(self._catalog.nodes))
        for pipeline in list(self._catalog.pipelines.values()):
            if not pipeline.removed:
                candidate = self._candidate(pipeline)
                builder.add(self._status(pipeline, with_files=False), candidate)
            if builder.wants_a_pause:
                await trio.lowlevel.checkpoint()
        scrubber = self.scrubber
        scrub = None if scrubber is None else ScrubSummary(scrubber.overdue(), scrubber.resting)
        access = None if self.rechecker is None else self.rechecker.verdicts()
        latest = self.telemetry.latest(builder.COLD_STARTS)
        found = (self.telemetry.spread(name) for name in dict.fromkeys(record.pipeline for record in latest))
        return builder.build(latest, scrub, access, [spread for spread in found if spread is not None])

    async def prove_index_writable(self) -> None:
        """Raises StoreError."""
        await self._index.write(lambda txn: txn.prove_writable(self._catalog.now_ns()))

    def store_problem(self) -> str | None:
        """What is wrong with the store's directory; logged once."""
        if not self._store.tree.removed():
            return None
        if not self._removal_told:
            self._removal_told = True
            log.error("the store %s: %s", self._store.root, REMOVED)
        return "removed"

    def pipeline_of(self, nodeid: int) -> str | None:
        """Whose file or directory that is; None for the mount's own, and for what is gone."""
        try:
            found = self._catalog.nodes.find(nodeid)
        except NotLoaded as unloaded:
            return unloaded.pipeline
        if isinstance(found, Pipeline):
            return found.id
        generation = found[0] if isinstance(found, tuple) else found.generation if found is not None else None
        return generation.pipeline.id if generation is not None else None

    def list(self) -> list[PipelineStatus]:
        return [
            self._status(self._catalog.pipelines[pipeline], with_files=False)
            for pipeline in sorted(self._catalog.pipelines)
        ]

    @property
    def count(self) -> int:
        """How many pipelines there are."""
        return len(self._catalog.pipelines)

    def list_where(self, shown: Callable[[PipelineSpec], bool]) -> Sequence[PipelineStatus]:
        """The same of those whose specification is ``shown``: the others cost a look at their specification."""
        found = [pipeline for pipeline in self._catalog.pipelines.values() if shown(pipeline.spec)]
        return [self._status(pipeline, with_files=False) for pipeline in sorted(found, key=lambda one: one.id)]

    def names_where(self, prefix: str, shown: Callable[[PipelineSpec], bool]) -> Sequence[str]:
        """Ids that begin with ``prefix``, of those whose specification is ``shown``; in no order."""
        return [
            name
            for name, pipeline in self._catalog.pipelines.items()
            if name.startswith(prefix) and shown(pipeline.spec)
        ]

    def shown_to(self, pipeline: str, sight: Sight) -> bool:
        """Whether that caller sees more of it than its name. What is out of view is shown to its owner alone, and to
        those who administer; what is not there to nobody."""
        found = self._catalog.pipelines.get(pipeline)
        if found is None:
            return False
        return sight.sees(found.spec) and (found.hidden is None or sight.everything or sight.owns(found.spec))

    def owners(self) -> frozenset[tuple[int, int]]:
        """(uid, gid) of all pipelines."""
        return frozenset((pipeline.spec.uid, pipeline.spec.gid) for pipeline in self._catalog.pipelines.values())

    def spec(self, pipeline: str) -> PipelineSpec:
        """What the pipeline was configured with. Raises PipelineNotFound."""
        return self._catalog.pipeline(pipeline).spec

    async def wait_changed(self, pipeline: str, timeout: float) -> None:
        """Return at the next progress or change of state, at the latest after ``timeout`` seconds."""
        await self._catalog.pipeline(pipeline).wait_changed(timeout)

    async def verify(
        self, pipeline: str, progress: Callable[[int, int], None], rate: float | None = None
    ) -> VerifyReport:
        """See Admin.verify. ``rate``: bytes a second at most."""
        return await self._admin.verify(pipeline, progress, rate)

    async def check_origins(self, shown: Callable[[PipelineSpec], bool]) -> Sequence[OriginCheck]:
        """See OriginChecks.run."""
        return await self._origin_checks.run(shown)

    async def check_access(self, pipeline: str) -> tuple[str, ...]:
        """The pipeline's sources, all of which its own credentials may fetch. Raises what an origin answers. With
        `recheck_access`, the answer counts as one of its checks."""
        if self.rechecker is None:
            return await self._admin.check_access(pipeline)
        found = self._catalog.pipeline(pipeline)
        await self.rechecker.check(found)
        return tuple(model.source for model in found.spec.models)

    @contextmanager
    def lease(self, pipeline: str, lessee: Lessee | None = None) -> Iterator[None]:
        """While held the pipeline counts as requested and in use. ``lessee``: whom to name to those in whose way it
        is."""
        found = self._catalog.pipeline(pipeline)
        found.leases += 1
        if lessee is not None:
            found.lessees.append(lessee)
        self._access.record_request(found.id, self._catalog.now_ns())
        found.changed()
        try:
            yield
        finally:
            found.leases -= 1
            if lessee is not None:
                found.lessees.remove(lessee)
            if not found.removed:
                self._access.record_request(found.id, self._catalog.now_ns())
            found.changed()

    @asynccontextmanager
    async def opening(
        self, pipeline: str, deadlines: Mapping[str, float], lessee: Lessee | None = None
    ) -> AsyncIterator[Handover]:
        """Under a lease: its weight files, to be handed to a process that reads them itself, in the order of
        core.weights.schedule. A pipeline that is not warm is filled; nothing of it is staged. Raises PipelineNotFound,
        and what forbids filling it."""
        with self.lease(pipeline, lessee), self.rest_staging(pipeline):
            found = self._visible(pipeline)
            generation = await self._catalog.ensure_loaded(found)
            if generation is None or not generation.load_set_complete:
                # Room may have to be made, from others whose bytes take a while to go.
                with trio.move_on_after(self._config.fill.read_deadline) as asking:
                    await self.warm(pipeline)
                if asking.cancelled_caught:
                    raise ReadDeadline(
                        f"{pipeline}: its fill did not begin within {self._config.fill.read_deadline:g} s"
                    )
                generation = await self._catalog.ensure_loaded(found)
            assert generation is not None
            with self._reads.using(generation), self._prefetching():
                yield Handover(self._reads, self._store, generation, self._config.fill.read_deadline, deadlines)

    @contextmanager
    def _prefetching(self) -> Iterator[None]:
        """Whoever was handed descriptors reads by them now; nobody tells when it is done."""
        began = trio.current_time()
        self._prefetches[began] += 1
        try:
            yield
        finally:
            self._prefetches[began] -= 1

    # -- staging ---------------------------------------------------------------------------------------------------

    def notify_opens(self, listener: OpenListener) -> None:
        """Tell it of opens and releases from now on, and at once of what is open already."""
        self._open_files.notify(listener)

    @contextmanager
    def rest_staging(self, pipeline: str) -> Iterator[None]:
        """Meanwhile nothing of the pipeline is staged: whoever reads it past the page cache wants the disk and the
        memory for itself. Nests."""
        listener = self._open_files.listener
        listener.rest(pipeline, True)
        try:
            yield
        finally:
            listener.rest(pipeline, False)

    def _generation(self, pipeline: str, number: int) -> Generation | None:
        found = self._catalog.pipelines.get(pipeline)
        generations = found.generations() if found is not None else ()
        return next((generation for generation in generations if generation.number == number), None)

    def shards(self, pipeline: str, generation: int) -> tuple[staging.Shard, ...]:
        """The weight files of that generation's load set in the natural order of their names, as they are now; empty
        when it is gone."""
        found = self._generation(pipeline, generation)
        return found.shards() if found is not None else ()

    async def load_order(self, pipeline: str, generation: int) -> tuple[int, ...]:
        """File indices of its shards as an engine reads them. Raises StoreError."""
        found = self._generation(pipeline, generation)
        if found is None:
            return ()
        shards = found.shards()
        indexes: dict[str, bytes] = {}
        if staging.needs_index(shards):
            for file in found.files:
                if file.entry.path.endswith(".index.json") and file.complete and file.size <= MAX_INDEX_JSON:
                    opener = functools.partial(self._read_stored, pipeline, generation, file.entry.path)
                    indexes[file.entry.path] = await trio.to_thread.run_sync(opener)
        return tuple(shard.index for shard in staging.in_load_order(shards, indexes))

    def staged(self, pipeline: str, count: int, *, file_done: bool) -> None:
        """That many more bytes were brought into the page cache; see Telemetry.staged."""
        self.telemetry.staged(pipeline, count, file_done=file_done)

    def open_stored(self, key: FileKey) -> int:
        """A read-only descriptor of the store's own file, complete, for the caller to close; it does not hold the file
        in use. Raises StoreError."""
        file = self._catalog.file(key)
        if file is None or not file.passthrough_eligible:
            raise StoreDamaged(f"{key.pipeline}: file {key.index} is not complete any more")
        return self._open_files.duplicate(file)

    def _read_stored(self, pipeline: str, generation: int, path: str) -> bytes:
        blob = self._store.existing_blob(pipeline, generation, path)
        if blob is None:
            return b""
        with blob:
            return blob.pread(0, blob.size)

    # -- evictor.Shelves -------------------------------------------------------------------------------------------

    def budget(self) -> eviction.Budget:
        """The store's capacity and watermarks."""
        space = self._store.space()
        store = self._config.store
        capacity = store.capacity.of(space.f_blocks * space.f_frsize)
        return eviction.Budget(
            capacity=capacity,
            low=store.low_watermark,
            high=store.high_watermark,
            floor=store.min_free.of(space.f_blocks * space.f_frsize),
            free=space.f_bavail * space.f_frsize,
        )

    def candidates(self) -> Sequence[eviction.Candidate]:
        """Every pipeline with cached bytes."""
        found = (self._candidate(pipeline) for pipeline in self._catalog.pipelines.values())
        candidates = [candidate for candidate in found if candidate.frees]
        # Being deleted: taken until it is done, and nothing that anybody could evict once more.
        candidates += [
            eviction.Candidate(name, count, 0.0, open=True) for name, count in self._catalog.pending_deletions if count
        ]
        return candidates

    def _candidate(self, pipeline: Pipeline, *, locked: bool | None = None) -> eviction.Candidate:
        """``locked``: whether an administrative change is under way; None: look."""
        requested = (self._access.last_request(pipeline.id) or 0) / 1e9
        generation = pipeline.head
        complete = generation is not None and generation.load_set_complete
        return eviction.Candidate(
            pipeline=pipeline.id,
            bytes=pipeline.allocated,
            # What was never requested counts from when it came here: warming one must not make it the next to go.
            last_request=max(requested, pipeline.grown_at_ns / 1e9),
            hot=eviction.is_hot(requested, self._config.eviction.keep_hot, self._catalog.now_ns() / 1e9),
            pinned=pipeline.pinned,
            # One that is being updated (its origin may take minutes) must not hold up the others' eviction. A fill that
            # no reader waits for may be cancelled; being the latest to grow, it goes last.
            open=pipeline.in_use
            or self._bindings.recently_busy(pipeline.id)
            or (pipeline.lock.locked() if locked is None else locked),
            leased=pipeline.leases > 0,
            partial=not (complete or self._filler.is_filling(pipeline.id)),
            promised=generation.reserved_bytes if generation is not None else 0,
        )

    def clock_was_set(self) -> None:
        self._access.clock_was_set()

    async def save_clock(self, state: ClockState) -> None:
        await self._index.write(lambda txn: txn.put_clock(state))

    def reevaluate(self) -> None:
        self._admissions.reevaluate(self._catalog.pipelines.values())

    # -- state -----------------------------------------------------------------------------------------------------

    def _facts(self, pipeline: Pipeline) -> Facts:
        generation = pipeline.current
        if generation is None:
            return Facts(self._state_of(pipeline), 0, 0, 0)
        weights = sum(index in generation.known.weights for index in generation.load_set)
        return Facts(self._state_of(pipeline), generation.counts.cached, generation.load_bytes, weights)

    def _activity(self) -> Activity:
        """What readers and fills do. The kernel's own reads of complete files show in their opens alone."""
        totals, fills = self.telemetry.totals, self._filler.statistics()
        events = totals.opens.total() + totals.reads + totals.staged_bytes + fills.fetched_bytes
        recent = trio.current_time() - PREFETCH_SECONDS
        self._prefetches = +Counter({began: count for began, count in self._prefetches.items() if began > recent})
        return Activity(events, busy=fills.in_flight > 0 or bool(self._prefetches))

    def _state_of(self, pipeline: Pipeline) -> PipelineState:
        return status.pipeline_state(pipeline, filling=self._filler.is_filling(pipeline.id))

    def _status(self, pipeline: Pipeline, *, with_files: bool, in_brief: bool = False) -> PipelineStatus:
        return status.pipeline_status(
            pipeline,
            self._access,
            filling=self._filler.is_filling(pipeline.id),
            rate=self._filler.rate(pipeline.id),
            received=self._filler.received(pipeline.id),
            keep_hot=self._config.eviction.keep_hot,
            with_files=with_files,
            in_brief=in_brief,
            scrub=self.scrubber.status(pipeline) if self.scrubber is not None else None,
            access=self.rechecker.status(pipeline) if self.rechecker is not None else None,
        )


def _forget_generation(pipeline: str, number: int, txn: WriteTxn) -> None:
    txn.delete_generation(pipeline, number)
