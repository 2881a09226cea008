"""Writes summaries of unchanged pipelines, so that a start need not read them, and unloads unused generations.

A pipeline is *clean* while the index has its summary (index/schema.py, SummaryRecord). A change removes the summary
before it begins; here it is written again, once nothing has happened to the pipeline between two looks. A pipeline that
is not clean is read whole at the next start, and what a crash may have left of it is removed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

import trio

from instantstart_fs.catalog.accounting import Counts
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Generation, Pipeline, UnloadedGeneration
from instantstart_fs.catalog.summaries import summary_of
from instantstart_fs.errors import InstantStartError
from instantstart_fs.index.schema import SummaryRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.layout import generation_number

log = logging.getLogger(__name__)

LOOK_SECONDS = 15.0
"""Seconds between two looks. By then the kernel was told of the last change (Catalog.expire_names relies on that)."""
MOST_FILES = 200_000
"""How many files of unused generations stay in memory: some 200 MB."""
IDLE_SECONDS = 60.0
"""A generation stays loaded for so long after its last use, however many files are in memory."""
BATCH = 256
"""How many summaries one transaction takes, and how many pipelines are looked at between two pauses."""


class Residency:
    """Owned by the Library; on the trio thread. ``clock``: seconds, as ``Pipeline.used_at``."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalog = catalog
        self._clock = clock
        self._before: dict[str, tuple[Generation, Counts]] = {}

    async def run(self) -> None:
        """Write summaries and unload generations every LOOK_SECONDS, until cancelled."""
        failing = False
        while True:
            await trio.sleep(LOOK_SECONDS)
            try:
                await self.run_once()
                failing = False
            except InstantStartError as error:
                # Costs no more than time at the next start.
                if not failing:
                    log.warning("summaries cannot be written, trying on: %s", error.message)
                failing = True

    async def run_once(self) -> None:
        """Write summaries of unchanged pipelines, then unload unused generations. Raises StoreError."""
        here = [one for one in self._catalog.pipelines.values() if isinstance(one.head, Generation)]
        if not here:
            self._before = {}
            return
        clean = await trio.to_thread.run_sync(self._clean)
        before, self._before = self._before, {}
        for position, pipeline in enumerate(here):
            if pipeline.id not in clean and is_clean(pipeline):
                generation = pipeline.head
                assert isinstance(generation, Generation)
                self._before[pipeline.id] = (generation, generation.counts)
            if position % BATCH == 0:
                await trio.lowlevel.checkpoint()
        ready = {name: seen for name, seen in self._before.items() if before.get(name) == seen}
        names = list(ready)
        for start in range(0, len(names), BATCH):
            await self._checkpoint({name: ready[name] for name in names[start : start + BATCH]})
        await self._unload(here, clean)

    def _clean(self) -> set[str]:
        return self._catalog.index.read(lambda txn: set(txn.summarized()))

    async def _checkpoint(self, ready: Mapping[str, tuple[Generation, Counts]]) -> None:
        alone = await trio.to_thread.run_sync(self._alone, {name: seen[0].number for name, seen in ready.items()})
        summaries: dict[str, SummaryRecord] = {}
        for name in alone:
            pipeline = self._catalog.pipelines.get(name)
            generation, counts = ready[name]
            if pipeline is None or pipeline.head is not generation or generation.counts != counts:
                continue
            if is_clean(pipeline):
                summaries[name] = summary_of(generation)
                # A fill that begins from here on removes the summary again: that comes later in the writer's queue.
                self._catalog.without_summary.discard(name)

        def write(txn: WriteTxn) -> None:
            for name, summary in summaries.items():
                record = txn.get_pipeline(name)
                if record is not None and record.generation == summary.generation:
                    txn.put_summary(name, summary)

        if summaries:
            await self._catalog.index.write(write)

    def _alone(self, numbers: Mapping[str, int]) -> list[str]:
        """Return the pipelines whose slots have no other generation. Blocks."""
        listed = self._catalog.store.tree.list_directory
        return [
            name
            for name, number in numbers.items()
            if {generation_number(entry) for entry in listed(name)} - {None} == {number}
        ]

    async def _unload(self, here: list[Pipeline], clean: set[str]) -> None:
        """Unload generations, least recently used first, until few enough files are in memory."""
        count = sum(pipeline.head.file_count for pipeline in here if pipeline.head is not None)
        if count <= MOST_FILES:
            return
        for pipeline in self._unloadable(here, clean):
            generation = pipeline.head
            if isinstance(generation, Generation):
                self._catalog.unload(generation)
                count -= generation.file_count
            if count <= MOST_FILES:
                return
            await trio.lowlevel.checkpoint()  # what comes next is looked at after it

    def _unloadable(self, here: list[Pipeline], clean: set[str]) -> Iterator[Pipeline]:
        latest = self._clock() - IDLE_SECONDS
        for pipeline in sorted(here, key=lambda one: one.used_at):
            if pipeline.used_at > latest:
                return
            if pipeline.id in clean and not pipeline.removed and is_clean(pipeline) and is_unused(pipeline):
                yield pipeline


def is_clean(pipeline: Pipeline) -> bool:
    """Whether the index is right about its files, and nothing is under way that would change them."""
    generation = pipeline.head
    if isinstance(generation, UnloadedGeneration):
        return True
    return (
        generation is not None
        and not (pipeline.removed or pipeline.draining or pipeline.lock.locked() or pipeline.changes)
        and not pipeline.leftovers
        and generation.eviction_done is None
        and generation.owed_index_write is None
        and all(file.target is None for file in generation.files)
    )


def is_unused(pipeline: Pipeline) -> bool:
    """Whether nothing in memory is needed that the index does not have."""
    generation = pipeline.head
    return isinstance(generation, Generation) and not (
        generation.handles
        or generation.retainers
        or generation.filling_load_set
        or generation.reservations
        or pipeline.uncached is not None
        or any(file.reader is not None or file.served_uncached for file in generation.files)
    )
