"""Asks origins from time to time whether each pipeline's own credentials may still fetch its source, and hides a
pipeline when they may not.

core/access.py decides what an answer means and when to ask again. The mount neither lists nor finds a hidden pipeline,
none of its files is opened, bound, handed over or fetched, and `status` says why. Its bytes stay until they are evicted
like others, so it is warm when access comes back. Files that are open stay open: a descriptor cannot be revoked.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.core import access
from instantstart_fs.core.access import Outcome
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.status import AccessStatus
from instantstart_fs.errors import InstantStartError
from instantstart_fs.serving.reads import Reads
from instantstart_fs.telemetry.telemetry import Telemetry
from instantstart_fs.views.status import rfc3339

log = logging.getLogger(__name__)

AT_ONCE = 16
"""Checks at the same time: each may take a minute."""
LOOK_SECONDS = 60.0
"""Seconds at most between two looks for checks that are due: pipelines come and go."""


class Rechecker:
    """Owned by the Library. ``ask`` raises OriginError if the origin refuses a source. ``period``: seconds between
    checks. ``hide``: whether a refused pipeline is hidden, or only reported."""

    def __init__(
        self,
        catalog: Catalog,
        reads: Reads,
        telemetry: Telemetry,
        ask: Callable[[PipelineSpec, ModelSpec], Awaitable[None]],
        *,
        period: float,
        hide: bool,
    ) -> None:
        self._catalog = catalog
        self._reads = reads
        self._telemetry = telemetry
        self._ask = ask
        self._period = period
        self._hide = hide
        self._asking = trio.Semaphore(AT_ONCE)

    def recall(self) -> None:
        """Hide the pipelines that were refused when an earlier daemon ended. Call it before anything is served."""
        for pipeline in self._concerned():
            if self._hide and pipeline.access.verdict == "refused":
                pipeline.hidden = _refusal(pipeline)
                log.warning("%s", pipeline.hidden, extra={"pipeline": pipeline.id})

    async def run(self) -> None:
        """Check the pipelines that are due, until cancelled."""
        while True:
            pause = await self.run_once()
            await trio.sleep(pause)

    async def run_once(self) -> float:
        """Check all pipelines that are due, and return the seconds until the next look."""
        async with trio.open_nursery() as nursery:
            for pipeline in self._concerned():
                if self._due_in(pipeline) <= 0:
                    nursery.start_soon(self._check_one, pipeline)
        wait = min((self._due_in(pipeline) for pipeline in self._concerned()), default=math.inf)
        return min(max(wait, 0.1), LOOK_SECONDS, self._period)

    async def check(self, pipeline: Pipeline) -> None:
        """Check all sources of a pipeline now, and act on the answer. Raises the refusal."""
        found: list[InstantStartError] = []
        async with self._asking:
            for model in pipeline.spec.models:
                try:
                    await self._ask(pipeline.spec, model)
                except InstantStartError as error:
                    found.append(error)
        answer = access.worst(found)
        await self.note(pipeline, answer)
        if answer is not None:
            raise answer

    async def note(self, pipeline: Pipeline, error: InstantStartError | None) -> None:
        """Act on the answer of a pipeline's origins (None: it may be fetched)."""
        if pipeline.removed or not access.asks_somebody(model.source for model in pipeline.spec.models):
            return
        before, outcome = pipeline.access, access.judge(error)
        pipeline.access = after = access.after(before, error, self._catalog.now_ns())
        self._telemetry.access_checked(outcome)
        if outcome == "unknown" and after.failures == 1:
            log.warning("access check: no answer: %s", after.message, extra={"pipeline": pipeline.id})
        elif outcome == "refused" and after.verdict != "refused":
            log.warning("access check: refused, asked once more: %s", after.message, extra={"pipeline": pipeline.id})
        if after.verdict != before.verdict:
            self._log_verdict(pipeline)
        pipeline.changed()
        await self._act(pipeline)
        try:
            await self._catalog.records.save_upkeep(pipeline)
        except InstantStartError as problem:
            # A restart would ask again at once.
            log.warning("access check: not noted: %s", problem.message, extra={"pipeline": pipeline.id})

    def status(self, pipeline: Pipeline) -> AccessStatus | None:
        """Return what `status` shows; None if the pipeline's origins cannot be asked."""
        if not access.asks_somebody(model.source for model in pipeline.spec.models):
            return None
        found = pipeline.access
        return AccessStatus(
            verdict=found.verdict,
            checked=rfc3339(found.checked_at_ns or None),
            trouble=f"{found.code}: {found.message}" if found.code else None,
        )

    def verdicts(self) -> dict[Outcome, int]:
        """Return the number of pipelines by verdict. "unknown": the last check was not answered."""
        counts: Counter[Outcome] = Counter()
        for pipeline in self._concerned():
            found = pipeline.access
            counts["unknown" if found.failures and found.verdict == "allowed" else found.verdict] += 1
        return {"allowed": counts["allowed"], "refused": counts["refused"], "unknown": counts["unknown"]}

    def _concerned(self) -> list[Pipeline]:
        pipelines = self._catalog.pipelines.values()
        return [one for one in pipelines if access.asks_somebody(model.source for model in one.spec.models)]

    def _due_in(self, pipeline: Pipeline) -> float:
        return access.due_in(pipeline.access, pipeline.id, self._period, self._catalog.now_ns())

    async def _check_one(self, pipeline: Pipeline) -> None:
        try:
            await self.check(pipeline)
        except InstantStartError:
            pass  # noted
        except Exception:
            # One origin's client that breaks must not end the others' checks, nor the daemon.
            log.exception("access check failed", extra={"pipeline": pipeline.id})
            await self.note(pipeline, InstantStartError("the check itself failed; the log has the traceback"))

    def _log_verdict(self, pipeline: Pipeline) -> None:
        refused = pipeline.access.verdict == "refused"
        if refused and self._hide:
            log.error("%s", _refusal(pipeline), extra={"pipeline": pipeline.id})
        elif refused:
            log.error("access check: refused: %s", pipeline.access.message, extra={"pipeline": pipeline.id})
        elif pipeline.hidden is not None:
            log.info("access check: allowed again: back in view", extra={"pipeline": pipeline.id})

    async def _act(self, pipeline: Pipeline) -> None:
        hidden = _refusal(pipeline) if self._hide and pipeline.access.verdict == "refused" else None
        if hidden is not None and pipeline.hidden is None:
            self._reads.filler.fill(pipeline.id, [])  # nobody fills it in the background any more
            if isinstance(pipeline.head, Generation):
                pipeline.head.filling_load_set = False
        try:
            await self._catalog.set_hidden(pipeline, hidden)
        except InstantStartError as error:
            log.error("access check: %s", error.message, extra={"pipeline": pipeline.id})


def _refusal(pipeline: Pipeline) -> str:
    return (
        f"{pipeline.id}: out of view, since its source refuses its credentials ({pipeline.access.message}); mend them, "
        f"then `instantstart verify {pipeline.id} --access`"
    )
