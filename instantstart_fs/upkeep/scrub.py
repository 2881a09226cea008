"""The scrub: reads complete files again in the background, so that bytes that rotted or were exchanged under their seal
are found before an engine loads them.

core/scrub.py decides which pipeline is read, when, and when to pause. This module reads (by upkeep/rehash.py: past the
page cache, at a bounded rate), replaces damaged files (Reads.replace_damaged) and records its progress. It pauses while
there is demand. Its reads count neither as open nor as requested, so a pipeline can be evicted, updated and removed
under it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import CachedFile, Pipeline
from instantstart_fs.core import scrub
from instantstart_fs.core.scrub import Activity, IdleDetector, ScrubCandidate
from instantstart_fs.core.status import ScrubStatus
from instantstart_fs.errors import InstantStartError
from instantstart_fs.serving.reads import Reads
from instantstart_fs.telemetry.telemetry import Telemetry
from instantstart_fs.upkeep.rehash import Pace, rehash
from instantstart_fs.views.status import rfc3339

log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
"""The longest time, in seconds, between two looks for a pipeline that is due: pipelines come and go."""
REST_SECONDS = 1.0
"""The longest time, in seconds, between two looks whether there is still demand."""
SAVE_SECONDS = 60.0
RETRY_SECONDS = 300.0
"""Seconds until the next try after the index could not record a bad file."""
BATCH = 1000
"""Absent files that are skipped without a pause."""


class _GivenUp(Exception):
    """The file that was being read was replaced or removed."""


class Scrubber:
    """Owned by the Library. ``period``: seconds between two passes over a pipeline. ``rate``: bytes per second.
    ``activity``: tells what readers and fills do."""

    def __init__(
        self,
        catalog: Catalog,
        reads: Reads,
        telemetry: Telemetry,
        activity: Callable[[], Activity],
        *,
        period: float,
        rate: float,
    ) -> None:
        self._catalog = catalog
        self._reads = reads
        self._telemetry = telemetry
        self._activity = activity
        self._period = period
        self._rate = rate
        self._quiet = IdleDetector()
        self._reading_now: str | None = None
        self.resting = False
        """Whether a pass is paused by demand."""

    async def run(self) -> None:
        """Scrub one pipeline after the other, until cancelled."""
        while True:
            pause = await self.run_once()
            await trio.sleep(pause)

    async def run_once(self) -> float:
        """Read one pipeline if one is due, and return the seconds until the next look."""
        due, wait = scrub.next_pass(self._accounts(), self._period, self._now())
        if due is None:
            return min(wait, LOOK_SECONDS, self._period)
        pipeline = self._catalog.pipelines[due]
        self._reading_now = due
        try:
            with pipeline.changing():
                await self._pass(pipeline)
        except _GivenUp:
            pass
        except InstantStartError as error:
            log.error("scrub postponed: %s", error.message, extra={"pipeline": due})
            return RETRY_SECONDS
        finally:
            self._reading_now = None
            self.resting = False
            pipeline.changed()
        return 0.0

    def overdue(self) -> float:
        """Return the seconds by which the pipeline that waits longest is late."""
        return scrub.overdue(self._accounts(), self._period, self._now())

    def status(self, pipeline: Pipeline) -> ScrubStatus:
        """Return what `status` shows of the scrub."""
        under_way = self._reading_now == pipeline.id
        return ScrubStatus(
            proven=rfc3339(pipeline.scrubbed.proven_at_ns or None),
            state="waiting" if not under_way else "resting" if self.resting else "reading",
        )

    def _now(self) -> float:
        return self._catalog.now_ns() / 1e9

    def _accounts(self) -> list[ScrubCandidate]:
        return [
            # A pipeline that was never scrubbed was proven when it was sealed, and so not before it was added.
            ScrubCandidate(pipeline.id, 1, (pipeline.scrubbed.proven_at_ns or pipeline.created_at_ns) / 1e9)
            for pipeline in self._catalog.pipelines.values()
            if pipeline.head is not None and pipeline.head.counts.finished
        ]

    async def _pass(self, pipeline: Pipeline) -> None:
        generation = await self._catalog.ensure_loaded(pipeline)
        if generation is None:
            return
        pipeline.scrubbed = pipeline.scrubbed.begun(generation.number, self._catalog.now_ns())
        pace, saved_at, files, found = Pace(self._rate), trio.current_time(), 0, 0
        shown = generation.files  # a copy: Generation.end clears the generation's own
        for index in range(pipeline.scrubbed.next_index, len(shown)):
            file = shown[index]
            if file.complete and file.stale_error is None:
                found += await self._file(file, pace)
                files += 1
            elif index % BATCH == 0:
                await trio.lowlevel.checkpoint()
            if generation is not pipeline.head or pipeline.removed:
                raise _GivenUp
            pipeline.scrubbed = pipeline.scrubbed.done(index + 1)
            if trio.current_time() >= saved_at + SAVE_SECONDS:
                saved_at = trio.current_time()
                await self._save(pipeline)
        pipeline.scrubbed = pipeline.scrubbed.finished()
        await self._save(pipeline)
        log.info("scrub: %d files read, %d of them bad", files, found, extra={"pipeline": pipeline.id})

    async def _file(self, file: CachedFile, pace: Pace) -> bool:
        """Check one file; True if it was bad. Raises _GivenUp, StoreError (the index cannot record it)."""

        async def ready(count: int) -> None:
            while (rest := self._quiet.observe(self._activity(), trio.current_time())) > 0:
                self.resting = True
                await trio.sleep(min(rest, REST_SECONDS))
                self._check_shown(file)
            self.resting = False
            await pace.wait(count)
            self._check_shown(file)

        problem = await rehash(self._catalog.store, file, ready, self._telemetry.scrubbed)
        if problem is None:
            return False
        self._check_shown(file)
        await self._reads.replace_damaged(file, problem, wanted=True, found_by="scrub")
        return True

    def _check_shown(self, file: CachedFile) -> None:
        """Raise _GivenUp if the file was replaced: an evicted file takes space for as long as it is open here."""
        generation = file.generation
        if file.stale_error is not None or generation.pipeline.removed or generation is not generation.pipeline.head:
            raise _GivenUp

    async def _save(self, pipeline: Pipeline) -> None:
        try:
            await self._catalog.records.save_upkeep(pipeline)
        except InstantStartError as error:
            # Costs no more than reading some files once more after a restart.
            log.warning("scrub: its progress cannot be saved: %s", error.message, extra={"pipeline": pipeline.id})
