"""Checks for `doctor` that this daemon can fetch from its origins: one byte from each, with the code, credentials and
environment of its fills. `doctor` itself runs as another user in another environment.

The work is bounded. Each pair of origin and credentials is asked first, then other sources up to MOST_CHECKS, all
within DEADLINE, AT_ONCE of them at a time. Answers are kept for KEPT_SECONDS, however many callers ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from instantstart_fs.admin.lifecycle import Lifecycle
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.status import OriginCheck
from instantstart_fs.errors import InstantStartError, OriginUnavailable

DEADLINE = 25.0
"""Seconds for all of them."""
MOST_CHECKS = 64
AT_ONCE = 16
KEPT_SECONDS = 10.0


class OriginChecks:
    """Owned by the Library, on the trio thread."""

    def __init__(self, catalog: Catalog, lifecycle: Lifecycle) -> None:
        self._catalog = catalog
        self._lifecycle = lifecycle
        self._one_at_a_time = trio.Lock()
        self._kept: dict[tuple[str, str, str], tuple[float, OriginCheck]] = {}

    async def run(self, shown: Callable[[PipelineSpec], bool]) -> Sequence[OriginCheck]:
        """Check the origins of the pipelines that are ``shown``. An origin's error is a finding, and is not raised."""
        async with self._one_at_a_time:
            now = trio.current_time()
            self._kept = {key: found for key, found in self._kept.items() if now - found[0] < KEPT_SECONDS}
            specs = [pipeline.spec for pipeline in self._catalog.pipelines.values() if shown(pipeline.spec)]
            chosen = choose(specs, MOST_CHECKS)
            found: list[OriginCheck | None] = [None] * len(chosen)
            limiter = trio.CapacityLimiter(AT_ONCE)

            async def check(position: int, spec: PipelineSpec, model: ModelSpec, others: int) -> None:
                async with limiter:
                    found[position] = await self._check(spec, model, others)

            with trio.move_on_after(DEADLINE):
                async with trio.open_nursery() as nursery:
                    for position, (spec, model, others) in enumerate(chosen):
                        nursery.start_soon(check, position, spec, model, others)
            late = OriginUnavailable(f"no answer within {DEADLINE:g} s")
            return [
                _finding(spec, model, others, late) if answer is None else answer
                for answer, (spec, model, others) in zip(found, chosen, strict=True)
            ]

    async def _check(self, spec: PipelineSpec, model: ModelSpec, others: int) -> OriginCheck:
        key = (spec.id, model.name, model.source)
        if key in self._kept:
            return self._kept[key][1]
        failure: InstantStartError | None = None
        try:
            pipeline = self._catalog.pipelines.get(spec.id)
            if pipeline is not None:
                await self._catalog.ensure_loaded(pipeline)  # its own files are the best proof
            await self._lifecycle.sources.check_source(spec, model, fetch=True)
        except InstantStartError as error:
            failure = error
        found = _finding(spec, model, others, failure)
        self._kept[key] = (trio.current_time(), found)
        return found


def choose(specs: Sequence[PipelineSpec], most: int) -> list[tuple[PipelineSpec, ModelSpec, int]]:
    """Choose the sources to ask, with the number of other sources that each stands for.

    One for each pair of origin and credentials comes first, then further sources up to ``most``; in the order of the
    pipelines' ids."""
    first: dict[tuple[str | None, ...], list[tuple[PipelineSpec, ModelSpec]]] = {}
    for spec in sorted(specs, key=lambda spec: spec.id):
        for model in spec.models:
            scheme = model.source.partition("://")[0]
            who = "anonymous" if spec.anonymous else spec.aws_profile
            first.setdefault((scheme, spec.endpoint_url, spec.token_file, who), []).append((spec, model))
    chosen: list[tuple[PipelineSpec, ModelSpec]] = []
    seen: set[tuple[str | None, ...]] = set()
    depth = 0
    while len(chosen) < most and any(len(of_one) > depth for of_one in first.values()):
        for key, of_one in first.items():
            if depth < len(of_one) and len(chosen) < most:
                spec, model = of_one[depth]
                if (*key, model.source) not in seen:
                    seen.add((*key, model.source))
                    chosen.append((spec, model))
        depth += 1
    unasked = sum(map(len, first.values())) - len(chosen)
    ordered = sorted(chosen, key=lambda found: (found[0].id, found[1].name))
    return [(spec, model, unasked if not position else 0) for position, (spec, model) in enumerate(ordered)]


def _finding(spec: PipelineSpec, model: ModelSpec, others: int, error: InstantStartError | None) -> OriginCheck:
    return OriginCheck(
        pipeline=spec.id,
        model=model.name,
        source=model.source,
        unasked=others,
        code="" if error is None else error.code,
        message="" if error is None else error.message,
    )
