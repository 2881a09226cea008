"""Finds out whether a pipeline's own credentials may read its source. The tier gives nothing to one that is refused.

Each model's source is asked before the first use, and again when the answer is old: a refusal after RECHECK_REFUSAL at
the latest, a permission after [origins] recheck_access, where that is set.

An origin that does not answer refuses nobody: the pipeline was listed there, and a region is to outlive its origins'
outages. The origin is asked again RECHECK_REFUSAL later, and nobody waits for that. A refusal stands until the origin
takes it back.

Who lists a source to pin it has proved as much, so a pipeline that is used right after it was added asks nobody.

An answer belongs to one Origin: a later pipeline of the same name, or a new generation, opens another one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import trio

from instantstart_fs.errors import AccessRefused, CredentialsUnusable, InstantStartError, OriginHidden
from instantstart_fs.filler.target import FillTarget
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.origins.base import Origin

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
RECHECK_REFUSAL = 60.0
PROVED_SECONDS = 60.0
"""How long the proof of a listing stands in for an answer: use may begin days after a pipeline was added."""
MOST_ANSWERS = 2
"""The most answers of one model. An old generation may have readers beside the new one."""


class _Answer(NamedTuple):
    """One answer. ``refusal`` is the reason, "" for a permission. ``known`` is False where the origin did not answer.
    ``since_ns`` is the wall clock of the first of these answers. It counts for ``lasts`` seconds."""

    refusal: str
    known: bool
    asked_at: float
    since_ns: int
    lasts: float


class _Question:
    """A question that is being asked. ``answer`` is there once it is ``over``, unless it was cancelled."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.answer: _Answer | None = None


class _Call:
    """A call to an origin that is under way, and what came of it once it is ``over`` (``SourceAccess._ask``)."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.refusal: str | None = None


class SourceAccess:
    """The answers of all pipelines. On the trio thread. ``recheck`` is the seconds for which a permission holds, None
    for the process's life. ``nursery`` runs the questions; None where there is none now."""

    def __init__(self, recheck: float | None, nursery: Callable[[], trio.Nursery | None]) -> None:
        self._allowed_for = recheck if recheck is not None else math.inf
        self._refused_for = min(RECHECK_REFUSAL, self._allowed_for)
        self._nursery = nursery
        self._answers: dict[tuple[str, int], dict[Origin, _Answer]] = {}
        """Answers by pipeline and model, the latest one last."""
        self._asking: dict[tuple[str, int, Origin], _Question] = {}
        self._calls: dict[Origin, _Call] = {}
        self._in_threads: set[Origin] = set()
        """Origins that a thread asks. One that hangs is not asked by a second one."""
        self._forgets = 0

    def refusal(self, pipeline: str) -> tuple[int, str] | None:
        """Return since when (wall clock, nanoseconds) and why a model of the pipeline is refused, as of the last
        answer."""
        for (name, _), answers in self._answers.items():
            latest = next(reversed(answers.values()))
            if name == pipeline and latest.refusal:
                return latest.since_ns, latest.refusal
        return None

    def refuses(self, target: FillTarget) -> bool:
        """Whether the tier is known to be closed to this file. An old answer counts for nothing; the file asks
        again."""
        answer = self._answers.get((target.key.pipeline, target.entry.model), {}).get(target.origin)
        return answer is not None and bool(answer.refusal) and not self._is_old(answer)

    def forget(self, pipeline: str) -> None:
        """Forget the pipeline. Answers that are still to come are dropped."""
        self._forgets += 1
        for place in [place for place in self._answers if place[0] == pipeline]:
            del self._answers[place]

    def proved(self, pipeline: str, model: int, origin: Origin, asked_at: float) -> None:
        """Note that the source was listed, by the same credentials. ``asked_at`` is when that began."""
        lasts = min(PROVED_SECONDS, self._allowed_for)
        self._keep(pipeline, model, origin, _Answer("", True, asked_at, time.time_ns(), lasts))

    async def may_use(self, pipeline: str, model: int, origin: Origin) -> bool:
        """Whether the tier may serve this model's files. Nothing may be used while the region's tasks do not run."""
        place = pipeline, model, origin
        while True:
            answer = self._answers.get((pipeline, model), {}).get(origin)
            if answer is not None and not self._is_old(answer):
                return not answer.refusal
            nursery = self._nursery()
            if nursery is None:
                return False
            question = self._asking.get(place)
            if question is None:
                # Not in the asker's task: a reader that is killed takes its question with it, and the next one would
                # find an origin that does not answer.
                question = self._asking[place] = _Question()
                nursery.start_soon(self._find_out, pipeline, model, origin, answer, question)
            if answer is not None and not answer.known and not answer.refusal:
                return True
            await question.over.wait()
            if question.answer is not None:
                return not question.answer.refusal

    async def _find_out(
        self, pipeline: str, model: int, origin: Origin, last: _Answer | None, question: _Question
    ) -> None:
        """Ask the origin. ``last`` is what it said before."""
        forgets = self._forgets
        try:
            refusal = await self._ask(origin)
            known = refusal is not None
            if refusal is None:
                refusal = last.refusal if last is not None else ""
            if last is None and self._answers.get((pipeline, model)):
                last = next(reversed(self._answers[pipeline, model].values()))
            same = last is not None and bool(last.refusal) == bool(refusal)
            since = last.since_ns if last is not None and same else time.time_ns()
            lasts = self._allowed_for if known and not refusal else self._refused_for
            answer = question.answer = _Answer(refusal, known, trio.current_time(), since, lasts)
            if forgets != self._forgets:
                return
            self._keep(pipeline, model, origin, answer)
            if refusal and not same:
                log.warning(
                    "nothing is taken from the regional tier: the source refuses this pipeline (%s)",
                    refusal,
                    extra={"pipeline": pipeline},
                )
        finally:
            del self._asking[pipeline, model, origin]
            question.over.set()

    def _keep(self, pipeline: str, model: int, origin: Origin, answer: _Answer) -> None:
        answers = self._answers.setdefault((pipeline, model), {})
        answers.pop(origin, None)
        answers[origin] = answer
        if len(answers) > MOST_ANSWERS:
            del answers[next(iter(answers))]

    async def _ask(self, origin: Origin) -> str | None:
        """Return why the source is refused, "" where it is not; None where the origin does not say."""
        call = self._calls.get(origin)
        if call is not None:  # another pipeline's, of the same origin
            await call.over.wait()
            return call.refusal
        if origin in self._in_threads:
            return None
        call = self._calls[origin] = _Call()
        try:
            call.refusal = await self._call(origin)
            return call.refusal
        finally:
            del self._calls[origin]
            call.over.set()

    async def _call(self, origin: Origin) -> str | None:
        self._in_threads.add(origin)

        def check() -> None:
            try:
                origin.check()
            finally:
                self._in_threads.discard(origin)

        try:
            await run_abandonable(check, deadline=CHECK_SECONDS)
            return ""
        except trio.TooSlowError:
            log.debug("whether the source may be read is not known: it does not answer")
        except (AccessRefused, CredentialsUnusable, OriginHidden) as error:
            return error.message
        except InstantStartError as error:
            log.debug("whether the source may be read is not known: %s", error.message)
        except Exception:  # one origin's odd answer is not worth the filler
            log.exception("whether the source may be read is not known")
        return None

    def _is_old(self, answer: _Answer) -> bool:
        return trio.current_time() - answer.asked_at >= answer.lasts
