"""Answers questions about pipelines by name: status, specification, who sees which of them. Changes nothing.

views/status.py makes a status; views/store_summary.py makes the summary of the whole store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Pipeline, UnloadedGeneration
from instantstart_fs.core.coldstart import Facts
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.sight import Sight
from instantstart_fs.core.status import AccessStatus, PipelineState, PipelineStatus, ScrubStatus, TierStatus
from instantstart_fs.errors import OutOfResources
from instantstart_fs.filler.scheduler import Filler
from instantstart_fs.views import status


def _none(pipeline: Pipeline) -> None:
    return None


class Pipelines:
    """Answers questions about pipelines. ``keep_hot``: seconds. ``scrub``, ``access``, ``tier``: functions that tell
    what these tasks know of a pipeline; None if they do not run. Use it on the trio thread."""

    def __init__(
        self,
        catalog: Catalog,
        clocks: status.Clocks,
        filler: Filler,
        *,
        keep_hot: float,
        scrub: Callable[[Pipeline], ScrubStatus | None] = _none,
        access: Callable[[Pipeline], AccessStatus | None] = _none,
        tier: Callable[[Pipeline], TierStatus | None] = _none,
    ) -> None:
        self._catalog = catalog
        self._clocks = clocks
        self._filler = filler
        self._keep_hot = keep_hot
        self._scrub = scrub
        self._access = access
        self._tier = tier

    def __len__(self) -> int:
        return len(self._catalog.pipelines)

    async def ensure_loaded(self, pipeline: str) -> None:
        """Load the pipeline's metadata before a ``status`` with all files. Raises InstantStartError if it cannot be
        loaded."""
        found = self._catalog.pipelines.get(pipeline)
        if found is None:
            return
        if await self._catalog.ensure_loaded(found) is None and isinstance(found.head, UnloadedGeneration):
            raise found.failure.error if found.failure else OutOfResources(f"{pipeline}: cannot be read now")

    def status(self, pipeline: str, *, with_files: bool = True) -> PipelineStatus:
        """Return the pipeline's status. Raises PipelineNotFound."""
        return self.status_of(self._catalog.pipeline(pipeline), with_files=with_files, in_brief=not with_files)

    def status_of(self, pipeline: Pipeline, *, with_files: bool = False, in_brief: bool = False) -> PipelineStatus:
        return status.pipeline_status(
            pipeline,
            self._clocks,
            filling=self._filler.is_filling(pipeline.id),
            rate=self._filler.rate(pipeline.id),
            received=self._filler.received(pipeline.id),
            keep_hot=self._keep_hot,
            with_files=with_files,
            in_brief=in_brief,
            scrub=self._scrub(pipeline),
            access=self._access(pipeline),
            tier=self._tier(pipeline),
        )

    def list(self) -> list[PipelineStatus]:
        """Return the status of all pipelines, by id."""
        return [self.status_of(self._catalog.pipelines[name]) for name in sorted(self._catalog.pipelines)]

    def list_where(self, shown: Callable[[PipelineSpec], bool]) -> Sequence[PipelineStatus]:
        """Return the pipelines whose specification is ``shown``, by id. The others cost a look at their
        specification."""
        found = [pipeline for pipeline in self._catalog.pipelines.values() if shown(pipeline.spec)]
        return [self.status_of(pipeline) for pipeline in sorted(found, key=lambda one: one.id)]

    def names_where(self, prefix: str, shown: Callable[[PipelineSpec], bool]) -> Sequence[str]:
        """Ids that begin with ``prefix``, of those whose specification is ``shown``; in no order."""
        return [
            name
            for name, pipeline in self._catalog.pipelines.items()
            if name.startswith(prefix) and shown(pipeline.spec)
        ]

    def shown_to(self, pipeline: str, sight: Sight) -> bool:
        """Whether that caller sees more than the pipeline's name. A hidden pipeline is shown only to its owner and
        administrators, a missing one to nobody."""
        found = self._catalog.pipelines.get(pipeline)
        if found is None:
            return False
        return sight.sees(found.spec) and (found.hidden is None or sight.everything or sight.owns(found.spec))

    def owners(self) -> frozenset[tuple[int, int]]:
        """Return (uid, gid) of all pipelines."""
        return frozenset((pipeline.spec.uid, pipeline.spec.gid) for pipeline in self._catalog.pipelines.values())

    def spec(self, pipeline: str) -> PipelineSpec:
        """Return what the pipeline was added with. Raises PipelineNotFound."""
        return self._catalog.pipeline(pipeline).spec

    async def wait_changed(self, pipeline: str, timeout: float) -> None:
        """Return at the next progress or change of state, at the latest after ``timeout`` seconds. Raises
        PipelineNotFound."""
        await self._catalog.pipeline(pipeline).wait_changed(timeout)


def load_set_facts(pipeline: Pipeline, state: PipelineState) -> Facts:
    """Return the facts that a cold start's record notes at its begin."""
    generation = pipeline.current
    if generation is None:
        return Facts(state, 0, 0, 0)
    weights = sum(index in generation.known.weights for index in generation.load_set)
    return Facts(state, generation.counts.cached, generation.load_bytes, weights)
