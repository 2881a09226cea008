"""Whether a pipeline's own credentials may read its source: the tier gives nothing to one that is refused.

Asked before the first use, for each model, and again when the answer is old: a refusal after RECHECK_REFUSAL at the
latest, a permission after [origins] recheck_access, where that is set. An origin that does not answer refuses nobody:
the pipeline was listed there, and a region is to outlive its origins' outages.
"""

from __future__ import annotations

import logging
import math
import time
from typing import NamedTuple

import trio

from instantstart_fs.errors import AccessRefused, CredentialsUnusable, InstantStartError, OriginHidden
from instantstart_fs.filler.target import FillTarget
from instantstart_fs.origins.base import Origin

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
RECHECK_REFUSAL = 60.0


class _Answer(NamedTuple):
    """``refusal``: why not, "" = it may. ``since_ns``: the wall clock of the first of these answers."""

    refusal: str
    asked_at: float
    since_ns: int


class SourceAccess:
    """On the trio thread. ``recheck``: seconds for which a permission is good, None = for this process' life."""

    def __init__(self, recheck: float | None) -> None:
        self._allowed_for = recheck if recheck is not None else math.inf
        self._refused_for = min(RECHECK_REFUSAL, self._allowed_for)
        self._answers: dict[tuple[str, int], _Answer] = {}
        """By pipeline and model."""
        self._asking: dict[tuple[str, int], trio.Event] = {}

    def refusal(self, pipeline: str) -> tuple[int, str] | None:
        """Since when (wall clock, nanoseconds) and why one of its models is refused, as of the last answer."""
        for (name, _), answer in self._answers.items():
            if name == pipeline and answer.refusal:
                return answer.since_ns, answer.refusal
        return None

    def refuses(self, target: FillTarget) -> bool:
        """Whether it is known that the tier may not serve this file; an old answer is none, the file asks again."""
        answer = self._answers.get((target.key.pipeline, target.entry.model))
        return answer is not None and bool(answer.refusal) and not self._is_old(answer)

    def forget(self, pipeline: str) -> None:
        """It is gone."""
        for place in [place for place in self._answers if place[0] == pipeline]:
            del self._answers[place]

    async def may_use(self, pipeline: str, model: int, origin: Origin) -> bool:
        """Whether the tier may serve this model's files."""
        place = (pipeline, model)
        while place in self._asking:
            await self._asking[place].wait()
        answer = self._answers.get(place)
        if answer is None or self._is_old(answer):
            done = self._asking[place] = trio.Event()
            try:
                refusal = await self._ask(origin)
                same = answer is not None and bool(answer.refusal) == bool(refusal)
                since = answer.since_ns if answer is not None and same else time.time_ns()
                self._answers[place] = now = _Answer(refusal, trio.current_time(), since)
                if refusal and not same:
                    log.warning(
                        "nothing is taken from the regional tier: the source refuses this pipeline (%s)",
                        refusal,
                        extra={"pipeline": place[0]},
                    )
                answer = now
            finally:
                del self._asking[place]
                done.set()
        return not answer.refusal

    async def _ask(self, origin: Origin) -> str:
        """Why it is refused, "" = it is not."""
        try:
            with trio.move_on_after(CHECK_SECONDS):
                await trio.to_thread.run_sync(origin.check, abandon_on_cancel=True)
        except (AccessRefused, CredentialsUnusable, OriginHidden) as error:
            return error.message
        except InstantStartError as error:
            log.debug("whether the source may be read is not known: %s", error.message)
        except Exception:  # one origin's odd answer is not worth the filler
            log.exception("whether the source may be read is not known")
        return ""

    def _is_old(self, answer: _Answer) -> bool:
        return trio.current_time() - answer.asked_at >= (self._refused_for if answer.refusal else self._allowed_for)
