"""Adds, updates, removes and evicts pipelines by name, with all that follows for the other parts of the library.

A change itself is made in lifecycle.py. Here follow its effects on counters, access checks, startup caches and the
evictor. Who may ask for a change is decided in control/callers.py.
"""

from __future__ import annotations

from instantstart_fs.admin.lifecycle import Lifecycle
from instantstart_fs.admin.users import Users
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.loadset_learner import LoadSetLearner
from instantstart_fs.catalog.model import Pipeline
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import PipelineBusy
from instantstart_fs.index.access_times import AccessTimes
from instantstart_fs.serving.bindings import Bindings
from instantstart_fs.serving.open_by import known
from instantstart_fs.serving.reads import Reads
from instantstart_fs.serving.shielded import ShieldedOperations
from instantstart_fs.serving.startupcaches import StartupCaches
from instantstart_fs.telemetry.telemetry import Telemetry
from instantstart_fs.upkeep.access_recheck import Rechecker
from instantstart_fs.upkeep.eviction import Evictor
from instantstart_fs.upkeep.inventory import Inventory
from instantstart_fs.views.pipelines import Pipelines

EVICTION = "eviction"
"""The kind of shielded operation."""


class Administration:
    """Changes of pipelines; on the trio thread.

    It has more than 8 collaborators, because a pipeline that comes or goes has to be made known to each of them.

    ``rechecker``: None where origins are not asked again.
    """

    def __init__(
        self,
        catalog: Catalog,
        lifecycle: Lifecycle,
        pipelines: Pipelines,
        *,
        reads: Reads,
        access: AccessTimes,
        learner: LoadSetLearner,
        telemetry: Telemetry,
        bindings: Bindings,
        evictor: Evictor,
        inventory: Inventory,
        shielded: ShieldedOperations,
        startup: StartupCaches,
        rechecker: Rechecker | None,
    ) -> None:
        self._catalog = catalog
        self._lifecycle = lifecycle
        self._pipelines = pipelines
        self._reads = reads
        self._access = access
        self._learner = learner
        self._telemetry = telemetry
        self._bindings = bindings
        self._evictor = evictor
        self._inventory = inventory
        self._shielded = shielded
        self._startup = startup
        self._rechecker = rechecker
        self._users = Users(catalog.store)

    async def used_by(self, pipeline: str) -> list[str]:
        """Return, in words, what keeps the pipeline from being evicted: leases, and processes that have files of it
        open. Looks through /proc, for some seconds at most. Raises PipelineNotFound."""
        found = self._catalog.pipeline(pipeline)
        leases = [f"lease: {known(lessee.pid, lessee.uid)}" for lessee in found.lessees]
        return leases + [f"open: {process}" for process in await self._users.processes_using(found)]

    async def add(self, spec: PipelineSpec) -> PipelineStatus:
        """Resolve, pin and show a new pipeline. Raises PipelineExists, UsageError, OriginError, StoreError."""
        pipeline = await self._lifecycle.add(spec)
        await self._note_allowed(pipeline)
        return self._pipelines.status_of(pipeline)

    async def update(self, pipeline: str) -> PipelineStatus:
        """Resolve again and switch to a new generation if anything changed. Raises like add, and PipelineNotFound."""
        if not await self._lifecycle.update(pipeline):
            # Asked again on purpose: what failed for good at the same pins may be tried anew.
            generation = await self._catalog.ensure_loaded(self._catalog.pipeline(pipeline))
            if generation is not None:
                with generation.retained():
                    await self._reads.reset_failures(generation)
        await self._note_allowed(self._catalog.pipeline(pipeline))
        return self._pipelines.status(pipeline)

    async def _note_allowed(self, pipeline: Pipeline) -> None:
        """Record a passed access check: its sources were just listed with its credentials."""
        if self._rechecker is not None:
            await self._rechecker.note(pipeline, None)

    async def remove(self, pipeline: str, *, force: bool = False) -> list[str]:
        """Remove a pipeline. Returns the processes that still have files of it open: their space is free once they
        close them. Raises PipelineNotFound, PipelineBusy (leased; not with ``force``)."""
        found = self._catalog.pipeline(pipeline)
        processes = await self._lifecycle.remove(pipeline, force=force)
        self._learner.forget(found)
        self._telemetry.forget(pipeline)
        self._startup.forget(found)
        if pipeline not in self._catalog.pipelines:
            self._access.forget(pipeline)
        return [str(process) for process in processes]

    async def evict(self, pipeline: str, *, force: bool = False) -> list[str]:
        """Delete a pipeline's bytes and keep its manifest. Returns what ``remove`` returns. Raises PipelineNotFound,
        PipelineBusy (pinned; without ``force`` also leased or open)."""
        self._bindings.poll_releases(pipeline)
        dropped, processes = await self._lifecycle.evict_by_hand(pipeline, force=force)
        self._telemetry.evicted(dropped)
        await self._startup.evicted(pipeline)
        self._evictor.wake()
        return [str(process) for process in processes]

    async def evict_unused(self, pipeline: str) -> None:
        """Evict a pipeline for the evictor. Raises PipelineBusy also if it was requested since it was chosen, or is
        being changed: an update may take minutes, and a fill that needs space waits for this."""
        if self._catalog.pipeline(pipeline).lock.locked():
            raise PipelineBusy(f"{pipeline} is being changed")

        def refuse(found: Pipeline) -> None:
            if self._evictor.suspended() or not self._inventory.candidate(found, locked=False).evictable:
                raise PipelineBusy(f"{found.id}: it was requested meanwhile, or the clock was set")

        async def work() -> None:
            self._telemetry.evicted(await self._lifecycle.evict(pipeline, refuse))
            await self._startup.evicted(pipeline)
            self._evictor.wake()

        # The caller may be a read whose deadline ends.
        await self._shielded.run_to_completion(work, EVICTION)

    async def evictions_end(self) -> None:
        """Return once no eviction of ``evict_unused`` is under way."""
        await self._shielded.wait_idle(EVICTION)

    def touch(self, pipeline: str) -> None:
        """Count a request now. Raises PipelineNotFound."""
        self._access.record_request(self._catalog.pipeline(pipeline).id, self._catalog.now_ns())

    async def check_access(self, pipeline: str, token_file: str | None = None) -> tuple[str, ...]:
        """Prove that the pipeline's own credentials may fetch all of its sources, and return these. Raises
        PipelineNotFound, OriginError. With `recheck_access`, the answer counts as one of its checks. ``token_file``:
        prove it of that hub token, in place of its own; what it is refused says nothing of the pipeline."""
        if self._rechecker is None or token_file is not None:
            return await self._lifecycle.sources.check_access(pipeline, token_file)
        found = self._catalog.pipeline(pipeline)
        await self._rechecker.check(found)
        return tuple(model.source for model in found.spec.models)
