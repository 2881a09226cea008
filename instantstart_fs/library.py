"""The composition root of what lies between the mount and the origins: builds the parts and runs their tasks.

Callers take the part that they need: the mount ``mounted`` and ``bindings``, staging ``shards``, the control socket
those of control/parts.py, the page ``snapshots`` and ``telemetry``. Nothing is forwarded here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
import trio

from instantstart_fs.admin.administration import Administration
from instantstart_fs.admin.cold_starts import ColdStarts
from instantstart_fs.admin.lifecycle import Lifecycle
from instantstart_fs.admin.origin_checks import OriginChecks
from instantstart_fs.admin.verification import Verifier
from instantstart_fs.catalog.bind_gate import BindGate
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.loadset_learner import LoadSetLearner
from instantstart_fs.catalog.model import Pipeline
from instantstart_fs.catalog.residency import Residency
from instantstart_fs.config import Config
from instantstart_fs.core.coldstart import Facts
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.status import PipelineState, TierStatus
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.scheduler import Filler, FillSettings
from instantstart_fs.index.access_times import AccessTimes
from instantstart_fs.index.environment import Index
from instantstart_fs.origins.base import Origin
from instantstart_fs.origins.bounds import IN_THE_DAEMON
from instantstart_fs.origins.registry import OriginSettings, open_origin
from instantstart_fs.serving.admission import Admissions
from instantstart_fs.serving.bindings import Bindings
from instantstart_fs.serving.fill_events import FillEventHandler
from instantstart_fs.serving.leases import Leases
from instantstart_fs.serving.mounted import MountedPipelines
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.reads import Reads
from instantstart_fs.serving.replacements import run_replacements
from instantstart_fs.serving.shards import Shards
from instantstart_fs.serving.shielded import ShieldedOperations
from instantstart_fs.serving.startupcaches import StartupCaches
from instantstart_fs.serving.warm_requests import WarmRequests
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.telemetry.telemetry import Telemetry
from instantstart_fs.upkeep.access_recheck import Rechecker
from instantstart_fs.upkeep.activity import ActivityMeter
from instantstart_fs.upkeep.eviction import Evictor, boot_identity, boottime
from instantstart_fs.upkeep.inventory import Inventory
from instantstart_fs.upkeep.scrub import Scrubber
from instantstart_fs.upkeep.snapshot import Snapshots
from instantstart_fs.upkeep.start import remove_superseded
from instantstart_fs.views.namespace import Namespace
from instantstart_fs.views.pipelines import Pipelines, load_set_facts
from instantstart_fs.views.status import pipeline_state
from instantstart_fs.views.store_summary import RegionSummary

if TYPE_CHECKING:
    from instantstart_fs.config.sections import RegionalConfig
    from instantstart_fs.filler.regional import Regional
    from instantstart_fs.regional.keys import RegionKey
    from instantstart_fs.serving.rack_server import RackServer
    from instantstart_fs.serving.startup_region import RegionalStartups
    from instantstart_fs.upkeep.heartbeats import Heartbeats
    from instantstart_fs.upkeep.rack_beats import RackBeats

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0
"""Grace period at shutdown for flushing last-access times and pipelines' errors, in seconds."""
GIVE_UP_SECONDS = 15.0
"""Seconds after which the shutdown waits for no commit any more; systemd waits longer."""


class Library:
    """The composition of all parts, which are its attributes; on the trio thread. It has more than 8 collaborators,
    because it builds all parts.

    ``held``: nodeids that the kernel holds open from an earlier daemon, one for each handle. ``taking_over``: readers
    wait for the mount, so fetch workers are started once it stands. ``now_ns``: the wall clock, in nanoseconds.
    ``boot``: a clock that nobody sets, in seconds; ``boot_id``: the boot of the machine that it counts from.
    """

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
        self._held = held
        self.store = store
        self.index = index
        origin_settings = OriginSettings(
            config.origins.huggingface, config.origins.s3, allow_private=config.origins.allow_private
        )
        here = msgspec.structs.replace(origin_settings, bounds=IN_THE_DAEMON)

        def opener(spec: PipelineSpec, model: ModelSpec) -> Origin:
            return open_origin(spec, model, here)

        # The catalog, and what it reports to.
        self.open_files = OpenFiles(store)
        self.bind_gate = BindGate()
        self.catalog = Catalog(store, index, opener, now_ns, bind_gate=self.bind_gate, retire=self.open_files.retire)
        self.access = AccessTimes(index, clock=now_ns)
        self.learner = LoadSetLearner(self.catalog)
        self.telemetry = Telemetry(index, now_ns, self._facts, learner=self.learner)
        self.residency = Residency(self.catalog)

        # Space. Evicting cancels fills, and fills need space: the evictor asks for ``admin`` when it first evicts.
        self.inventory = Inventory(self.catalog, self.access, self.bind_gate, self._is_filling, config)
        self.evictor = Evictor(
            self.inventory,
            lambda: self.admin,
            self.access,
            index,
            lambda: now_ns() / 1e9,
            keep_hot=config.eviction.keep_hot,
            max_idle=config.eviction.max_idle,
            boot=boot,
            boot_id=boot_id(),
            known=index.read(lambda txn: txn.clock()),
            on_pass=lambda: self.admissions.reevaluate(self.catalog.pipelines.values()),
        )
        self.admissions = Admissions(self.evictor)

        # Serving.
        self.shielded = ShieldedOperations()
        self.fill_events = FillEventHandler(
            self.catalog, self.open_files, self.telemetry, self.admissions, self.evictor.wake, self.shielded
        )
        region = None
        if config.regional is not None:
            from instantstart_fs.filler.region_settings import region_settings  # late: only a region needs it

            region = region_settings(config.regional, config.origins.recheck_access)
        self._regional_startups: RegionalStartups | None = None
        if region is not None and config.regional is not None and config.regional.startup_caches:
            from instantstart_fs.serving.startup_region import RegionalStartups

            key = region.key
            self._regional_startups = RegionalStartups(
                region,
                config.regional.startup_caches,
                lambda pipeline: self._slot_of(pipeline, key),
                self._may_use_tier,
            )
        self.startup = StartupCaches(self.catalog, self.evictor, self._regional_startups)
        self.filler = Filler(
            store,
            index,
            FillSettings(
                workers=config.fill.worker_count,
                connections=config.fill.connections,
                read_deadline=config.fill.read_deadline,
                serve_unsealed=config.fill.serve_unsealed,
            ),
            self.fill_events,
            free_space=self.evictor.free_space,
            region=region,
            slot_of=self._slot_of,
        )
        if taking_over:
            self.filler.hold_workers()
        self.reads = Reads(
            self.catalog,
            self.access,
            config.fill.read_deadline,
            self.telemetry,
            self.open_files,
            self.fill_events,
            self.filler,
            self.admissions,
            self.learner,
        )
        self.bindings = Bindings(
            self.catalog,
            self.bind_gate,
            self.access,
            self.open_files,
            self.telemetry,
            self.fill_events.replace_damaged,
            config.eviction.keep_hot,
        )
        self.warming = WarmRequests(self.catalog, self.reads, self.learner)
        self.leases = Leases(
            self.catalog, self.access, self.open_files, self.reads, self.warming, config.fill.read_deadline
        )
        self.shards = Shards(self.catalog, self.open_files, self.telemetry)

        # Upkeep and administration.
        self.lifecycle = Lifecycle(self.catalog, self.reads, self.open_files, config.fill.chunk_size, origin_settings)
        self.verifier = Verifier(self.catalog, self.reads)
        self.scrubber: Scrubber | None = None
        if config.store.scrub is not None:
            self.scrubber = Scrubber(
                self.catalog,
                self.reads,
                self.telemetry,
                ActivityMeter(self.telemetry, self.filler, self.leases).now,
                period=config.store.scrub,
                rate=config.store.scrub_rate,
            )
        self.rechecker: Rechecker | None = None
        if config.origins.recheck_access is not None:
            self.rechecker = Rechecker(
                self.catalog,
                self.reads,
                self.telemetry,
                self.lifecycle.sources.check_source,
                period=config.origins.recheck_access,
                hide=config.origins.on_refusal == "hide",
            )
        self.pipelines = Pipelines(
            self.catalog,
            self.access,
            self.filler,
            keep_hot=config.eviction.keep_hot,
            scrub=self.scrubber.status if self.scrubber is not None else lambda pipeline: None,
            access=self.rechecker.status if self.rechecker is not None else lambda pipeline: None,
            tier=self._tier_of,
        )
        self.heartbeats: Heartbeats | None = None
        if self.filler.regional is not None:
            from instantstart_fs.upkeep.heartbeats import Heartbeats  # late: only a region needs it

            self.heartbeats = Heartbeats(
                self.catalog, self.filler.regional, self.pipelines, lambda: self.telemetry.totals.warmed
            )
        self.rack_server: RackServer | None = None
        self.rack_beats: RackBeats | None = None
        if config.regional is not None and self.filler.regional is not None:
            self._join_rack(config.regional, self.filler.regional)
        self.admin = Administration(
            self.catalog,
            self.lifecycle,
            self.pipelines,
            reads=self.reads,
            access=self.access,
            learner=self.learner,
            telemetry=self.telemetry,
            bindings=self.bindings,
            evictor=self.evictor,
            inventory=self.inventory,
            shielded=self.shielded,
            startup=self.startup,
            rechecker=self.rechecker,
        )

        self.origin_checks = OriginChecks(self.catalog, self.lifecycle)
        self.cold_starts = ColdStarts(self.catalog, self.telemetry)

        # What others see.
        self.namespace = Namespace(self.catalog, self.access, self._state_of, config.eviction.keep_hot)
        self.mounted = MountedPipelines(
            self.catalog, self.namespace, self.pipelines, self.reads, self.open_files, self.filler
        )
        self.snapshots = Snapshots(
            self.catalog,
            self.pipelines,
            self.inventory,
            self.telemetry,
            self.scrubber,
            self.rechecker,
            self._region_summary,
        )

    def _join_rack(self, config: RegionalConfig, regional: Regional) -> None:
        if regional.rack is None:
            return
        from instantstart_fs.serving.rack_chunks import RackChunks  # late: only a rack needs them
        from instantstart_fs.serving.rack_server import RackServer
        from instantstart_fs.upkeep.rack_beats import RackBeats

        key = regional.settings.key
        chunks = RackChunks(self.catalog, self.open_files, regional.rack, key)
        server = RackServer(config.rack_listen, config.rack_rate, config.host, key.tickets, regional.rack, chunks)
        self.rack_server = server
        self.rack_beats = RackBeats(regional, regional.rack, lambda: server.address)

    def _slot_of(self, pipeline: str, key: RegionKey) -> str | None:
        """The pipeline's slot in a regional tier that has this key."""
        found = self.catalog.pipelines.get(pipeline)
        return key.slot(found.spec) if found is not None else None

    async def _may_use_tier(self, pipeline: str, model: int, origin: Origin) -> bool:
        found = self.filler.regional
        return found is not None and await found.access.may_use(pipeline, model, origin)

    def _region_summary(self) -> RegionSummary | None:
        found = self.filler.regional
        if found is None or self.heartbeats is None:
            return None
        return RegionSummary(self.heartbeats.endpoint, self.heartbeats.tier, found.hosts, found.statistics)

    def _tier_of(self, pipeline: Pipeline) -> TierStatus | None:
        return self.heartbeats.tier_of(pipeline) if self.heartbeats is not None else None

    def _is_filling(self, pipeline: str) -> bool:
        return self.filler.is_filling(pipeline)

    def _state_of(self, pipeline: Pipeline) -> PipelineState:
        return pipeline_state(pipeline, filling=self.filler.is_filling(pipeline.id))

    def _facts(self, pipeline: Pipeline) -> Facts:
        return load_set_facts(pipeline, self._state_of(pipeline))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load what the store holds, run the background tasks; on leaving, flush what must not be lost."""
        ending = trio.CancelScope()
        async with AsyncExitStack() as after, trio.open_nursery() as nursery:
            after.callback(ending.cancel)  # operations on the index then have all the time they take
            await nursery.start(self.access.run)
            await trio.to_thread.run_sync(self.catalog.load, frozenset(self._held))
            if self.rechecker is not None:
                self.rechecker.recall()
            # Before anything can be evicted or deleted.
            self.reads.restore_handles(self._held)
            await trio.to_thread.run_sync(remove_superseded, self.catalog)
            await trio.to_thread.run_sync(self.telemetry.load)
            nursery.start_soon(self.telemetry.run)
            nursery.start_soon(self.learner.run)
            await nursery.start(self.shielded.run)
            if self._regional_startups is not None:
                await nursery.start(self.startup.run)
            await nursery.start(self.filler.run)
            nursery.start_soon(run_replacements, self.catalog, self.fill_events, self.reads)
            nursery.start_soon(self.lifecycle.drop_drained)
            nursery.start_soon(self.residency.run)
            nursery.start_soon(self.catalog.records.keep_failures)
            nursery.start_soon(self.evictor.run)
            self.evictor.wake()
            if self.scrubber is not None:
                nursery.start_soon(self.scrubber.run)
            if self.rechecker is not None:
                nursery.start_soon(self.rechecker.run)
            if self.heartbeats is not None:
                nursery.start_soon(self.heartbeats.run)
            if self.rack_server is not None and self.rack_beats is not None:
                nursery.start_soon(self.rack_server.run)
                nursery.start_soon(self.rack_beats.run)
            try:
                yield
            finally:
                # What is under way then (a commit, half an eviction) is finished, unless the disk hangs.
                trio.lowlevel.spawn_system_task(self._give_up_later, ending)
                with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_SECONDS):
                    for flush in (self.access.flush, self.catalog.records.save_failures):
                        try:
                            await flush()
                        except InstantStartError as error:
                            log.warning("not written at the end: %s", error.message)
                nursery.cancel_scope.cancel()

    async def _give_up_later(self, ending: trio.CancelScope) -> None:
        with ending:
            await trio.sleep(GIVE_UP_SECONDS)
            self.index.give_up()
