"""Learns from engines' reads which files belong to a pipeline's load set. The rules of core/loadset.py come first.

A file that an engine has read to its end belongs to the load set from then on. Of several variants, the one that an
engine begins to load is the wanted one.

A *start* begins with an open of a weight file, and ends when the pipeline was quiet for QUIET_SECONDS with nothing
open. A file counts once a start has read all of it. A complete file counts when it is opened, where the kernel reads it
itself and the daemon sees no reads. A copy of a repository is no start: a program that reads the documentation and the
images as well reads everything, so what it read is forgotten.

Runs on the trio thread. It costs a few comparisons for each open, and one for each read. A task of its own writes what
was learned to the slot and to the index. What cannot be written is kept until the daemon ends, and tried again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import CachedFile, Generation, Pipeline, counts_as_request
from instantstart_fs.errors import InstantStartError

log = logging.getLogger(__name__)

QUIET_SECONDS = 30.0
"""Seconds without an open weight file after which the next open belongs to another start."""
RETRY_SECONDS = 10.0


class _Start:
    """One engine's start. ``last``: when a weight file was last opened or closed; ``opened``: weight files, by path, in
    the order of their first opens; ``learned``: paths that this start has added."""

    __slots__ = ("last", "learned", "opened")

    def __init__(self, now: float) -> None:
        self.last = now
        self.opened: dict[str, None] = {}
        self.learned: set[str] = set()


class LoadSetLearner:
    """Owned by the Library. ``clock``: seconds."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float] = trio.current_time) -> None:
        self._catalog = catalog
        self._clock = clock
        self._starts: dict[Pipeline, _Start] = {}
        self._aside: dict[Pipeline, tuple[int, set[int]]] = {}
        """Pipeline → (generation, files outside the load set that were opened since the last start ended)."""
        self._unsaved: dict[Pipeline, None] = {}
        self._failing = False
        self._wake = trio.Event()

    # -- what happens ----------------------------------------------------------------------------------------------

    def opened(self, file: CachedFile, *, passthrough: bool) -> None:
        """A file was opened. ``passthrough``: the kernel reads it itself."""
        generation = file.generation
        if counts_as_request(file):
            start = self._start(generation)
            start.opened.setdefault(file.entry.path)
            if passthrough and not generation.in_load_set(file.entry.index):
                self.read_whole(file)
        elif not generation.in_load_set(file.entry.index):
            self._opened_aside(file)
            if passthrough:
                self.read_whole(file)

    def closed(self, file: CachedFile) -> None:
        start = self._starts.get(file.generation.pipeline)
        if start is not None:
            start.last = self._clock()

    def read_whole(self, file: CachedFile) -> None:
        """Note that readers have got as many bytes of the file as it has."""
        generation = file.generation
        pipeline = generation.pipeline
        start = self._starts.get(pipeline)
        if start is None or generation.in_load_set(file.entry.index) or not file.size:
            return
        start.last = self._clock()
        if generation is pipeline.head and not self._copied(generation):
            start.learned.update(self.want(generation, (file.entry.index,)))

    def begins_to_load(self, file: CachedFile) -> None:
        """Note that an engine reads the file's weights, not only its header: this variant is the wanted one."""
        generation = file.generation
        if not generation.known.open or generation is not generation.pipeline.head:
            return
        index = file.entry.index
        if any(index in variant.files for choice in generation.known.open for variant in choice.variants):
            self._start(generation).learned.update(self.want(generation, (index,)))

    def want(self, generation: Generation, indices: Collection[int]) -> set[str]:
        """Add these files to the load set, with the other parts of their variants. Returns the paths that are new in
        it."""
        before = frozenset(generation.load_set)
        if (aside := self._aside.get(generation.pipeline)) is not None:
            aside[1].difference_update(indices)
        generation.want(indices)
        paths = {generation.files[index].entry.path for index in generation.load_set if index not in before}
        pipeline = generation.pipeline
        pipeline.learned = pipeline.learned.wanting(sorted(paths))
        generation.sorted_with = pipeline.learned.wanted
        self._save(pipeline)
        if paths:
            shown = ", ".join(sorted(paths)[:5]) + (", …" if len(paths) > 5 else "")
            log.info("belongs to what an engine loads from now on: %s", shown, extra={"pipeline": pipeline.id})
        return paths

    def forget(self, pipeline: Pipeline) -> None:
        """Forget a removed pipeline."""
        for known in (self._starts, self._aside):
            known.pop(pipeline, None)
        self._unsaved.pop(pipeline, None)

    # -- starts ----------------------------------------------------------------------------------------------------

    def _start(self, generation: Generation) -> _Start:
        pipeline, now = generation.pipeline, self._clock()
        start = self._starts.get(pipeline)
        # The open that is told of may be counted by now.
        if start is not None and now - start.last >= QUIET_SECONDS and generation.handles <= 1:
            self._end(pipeline, start)
            start = None
        if start is None:
            start = self._starts[pipeline] = _Start(now)
        start.last = now
        return start

    def _end(self, pipeline: Pipeline, start: _Start) -> None:
        del self._starts[pipeline]
        self._aside.pop(pipeline, None)
        before = pipeline.learned.order
        pipeline.learned = pipeline.learned.after_start(start.opened)
        if pipeline.learned.order != before and isinstance(pipeline.head, Generation):
            pipeline.head.follow(pipeline.learned.order)
        self._save(pipeline)

    def end_all(self) -> None:
        """End all starts: the daemon ends."""
        for pipeline, start in list(self._starts.items()):
            self._end(pipeline, start)

    # -- copies ----------------------------------------------------------------------------------------------------

    def _opened_aside(self, file: CachedFile) -> None:
        generation = file.generation
        number, seen = self._aside.get(generation.pipeline, (0, set()))
        if number != generation.number:
            number, seen = generation.number, set()
        seen.add(file.entry.index)
        self._aside[generation.pipeline] = (number, seen)
        start = self._starts.get(generation.pipeline)
        if start is not None and start.learned and self._copied(generation):
            self._unlearn(generation, start)

    def _copied(self, generation: Generation) -> bool:
        """Whether somebody has opened every file that an engine has no use for."""
        number, seen = self._aside.get(generation.pipeline, (0, set()))
        return bool(seen) and number == generation.number and len(seen) >= generation.known.useless

    def _unlearn(self, generation: Generation, start: _Start) -> None:
        pipeline = generation.pipeline
        log.info(
            "is being copied: what was read meanwhile is not what an engine loads", extra={"pipeline": pipeline.id}
        )
        pipeline.learned = pipeline.learned.without(start.learned)
        start.learned = set()
        generation.sort_again()
        self._save(pipeline)

    # -- keeping it ------------------------------------------------------------------------------------------------

    def _save(self, pipeline: Pipeline) -> None:
        self._unsaved[pipeline] = None
        self._wake.set()

    async def run(self) -> None:
        """Write what is learned until cancelled, and then a last time."""
        try:
            while True:
                with trio.move_on_after(QUIET_SECONDS if self._starts else math.inf):
                    await self._wake.wait()
                self._wake = trio.Event()
                now = self._clock()
                for pipeline, start in list(self._starts.items()):
                    held = any(generation.handles for generation in pipeline.heads())
                    if not held and now - start.last >= QUIET_SECONDS:
                        self._end(pipeline, start)
                if not await self._write():
                    await trio.sleep(RETRY_SECONDS)
                    self._wake.set()
        finally:
            self.end_all()
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await self._write()

    async def _write(self) -> bool:
        for pipeline in list(self._unsaved):
            del self._unsaved[pipeline]
            written = pipeline.removed
            try:
                if not written:
                    written = await self._catalog.records.save_learned(pipeline)
                self._failing = False
            except InstantStartError as error:
                if not self._failing:
                    told = {"pipeline": pipeline.id}
                    log.warning("what it has learned is not written down, trying on: %s", error.message, extra=told)
                self._failing = True
            finally:
                if not written:
                    self._unsaved[pipeline] = None
        return not self._unsaved
