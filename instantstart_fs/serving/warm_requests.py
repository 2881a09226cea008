"""Starts the fill of a pipeline's load set on request, and extends the load set on request."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from instantstart_fs.catalog import loadsets
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.loadset_learner import LoadSetLearner
from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.errors import InstantStartError, StoreFull, VariantNotChosen
from instantstart_fs.serving.reads import Reads


class WarmRequests:
    """Carries out requests of ``warm``. Use it on the trio thread."""

    def __init__(self, catalog: Catalog, reads: Reads, learner: LoadSetLearner) -> None:
        self._catalog = catalog
        self._reads = reads
        self._learner = learner

    async def warm(self, pipeline: str, *, everything: bool = False) -> None:
        """Start filling the load set (``everything``: all files) in the background.

        Raises VariantNotChosen where a variant has to be chosen first (what is not part of a variant is filled), and
        StoreFull where there is no space, with what would have to be evicted.
        """
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

    async def include(self, pipeline: str, globs: Sequence[str]) -> None:
        """Add the files that these globs match to the load set, as `add --include` does. Raises PipelineNotFound, and
        UsageError where a glob matches nothing."""
        while True:
            generation = await self._readable(pipeline)
            name, files = generation.pipeline.id, generation.manifest.files
            with generation.retained():
                indices = await trio.to_thread.run_sync(loadsets.included, name, files, globs)
            if generation is self.visible(pipeline).head:  # an update may have replaced it
                break
        self._learner.want(generation, indices)

    def visible(self, pipeline: str) -> Pipeline:
        """Raises PipelineNotFound, and AccessRefused while it is hidden."""
        found = self._catalog.pipeline(pipeline)
        found.check_visible()
        return found

    async def _readable(self, pipeline: str) -> Generation:
        """Raises as ``visible`` does, and why its manifest cannot be read."""
        found = self.visible(pipeline)
        generation = await self._catalog.ensure_loaded(found)
        if generation is None:
            raise found.failure.error if found.failure else InstantStartError(f"{pipeline}: cannot be served")
        return generation
