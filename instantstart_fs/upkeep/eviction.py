"""Evictor: carries out core/eviction's plans. Whole pipelines, least recently requested first.

Looks when new bytes have come (``wake``), every LOOK_SECONDS (others may fill the disk, pipelines grow idle, the clock
may be set), before a fill begins (``admit``), and when the filesystem itself is full (``free_space``). What there is to
evict, how full the store is and how a pipeline is emptied are the library's to say; this only asks, decides by the
plan, and does it. One decision at a time: what one admission counts on, no other may give away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
import trio

from instantstart_fs.core import eviction
from instantstart_fs.core.eviction import Candidate, ClockState, ClockWatch, Refusal
from instantstart_fs.errors import InstantStartError, StoreError

log = logging.getLogger(__name__)

INTERVAL = 2.0
"""Least seconds between two looks: a look costs a walk over all pipelines."""
LOOK_SECONDS = 60.0
SAVE_SECONDS = 3600.0
"""Between two notes of the clocks, for the next daemon; while nothing is evicted, every LOOK_SECONDS."""
SAVE_DEADLINE = 5.0
"""For the last note of the clocks, at the end."""
ATTEMPTS = 4
"""How often an admission is decided anew because somebody took what was to be evicted into use."""


class EvictionHost(Protocol):
    """The library's side."""

    def budget(self) -> eviction.Budget: ...

    def candidates(self) -> Sequence[Candidate]:
        """All pipelines with cached or promised bytes; their bytes together are the usage."""
        ...

    def clock_was_set(self) -> None:
        """The wall clock jumped: times that now lie in the future count as now from here on."""
        ...

    async def evict_unused(self, pipeline: str) -> None:
        """Raises PipelineBusy if it may not go any more: it came into use, or was requested, since it was chosen."""
        ...

    async def evictions_end(self) -> None:
        """Return once no eviction is under way that ``evict_unused`` began and whose asker has gone."""
        ...

    async def save_clock(self, state: ClockState) -> None:
        """Keep it for the next daemon. Raises StoreError."""
        ...

    def reevaluate(self) -> None:
        """Room may have appeared for what was refused."""
        ...


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_identity() -> str:
    """Which start of the machine this is; "" where the kernel does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class Evictor:
    """``now``: the wall clock, ``boot``: a clock that nobody sets, both in seconds. ``keep_hot``, ``max_idle`` too.
    ``boot_id``: since which start of the machine ``boot`` runs; ``known``: what an earlier daemon saved of both."""

    def __init__(
        self,
        shelves: EvictionHost,
        now: Callable[[], float],
        *,
        keep_hot: float = 0.0,
        max_idle: float | None = None,
        boot: Callable[[], float] = boottime,
        boot_id: str = "",
        known: ClockState | None = None,
    ) -> None:
        self._shelves = shelves
        self._now = now
        self._boot = boot
        self._max_idle = max_idle
        self._watch = ClockWatch(keep_hot, boot_id, known)
        self._saved: ClockState | None = None
        self._saving_fails = False
        self._woken = trio.Event()
        self._clock_was_set = trio.Event()
        self._lock = trio.Lock()
        if known is None:
            self._watch.observe(now(), boot())

    def wake(self) -> None:
        """New bytes have come, or something may go that might not: look soon."""
        self._woken.set()

    def rests(self) -> bool:
        """Whether nothing is evicted for now, because the wall clock was set (design rule 9)."""
        boot = self._boot()
        if self._watch.observe(self._now(), boot):
            self._shelves.clock_was_set()
            self._saved = None
            self._clock_was_set.set()  # noted at once, for the next daemon
            self.wake()
            log.warning("the wall clock was set by more than an hour: nothing is evicted for keep_hot from now on")
        return self._watch.rests(boot)

    async def run(self) -> None:
        """Keep the store below its high watermark, as far as the plan can, until cancelled."""
        try:
            while True:
                with trio.move_on_after(LOOK_SECONDS):
                    await self._woken.wait()
                self._woken = trio.Event()
                self._clock_was_set = trio.Event()
                await self.run_once()
                await self._save_clock()
                with trio.move_on_after(INTERVAL):
                    await self._clock_was_set.wait()
        finally:
            # Two jumps may cancel each other out: the next daemon would see none, and not rest.
            with trio.move_on_after(SAVE_DEADLINE, shield=True):
                await self._save_clock()

    async def _save_clock(self) -> None:
        rests, boot = self.rests(), self._boot()
        if self._saved is not None and boot - self._saved.boot < (LOOK_SECONDS if rests else SAVE_SECONDS):
            return
        state = self._watch.state(self._now(), boot)
        try:
            await self._shelves.save_clock(state)
        except StoreError as error:
            if not self._saving_fails:
                log.warning("the clocks are not noted for the next start: %s", error.message)
            self._saving_fails = True
        else:
            self._saved, self._saving_fails = state, False

    async def run_once(self) -> None:
        """One look: what is idle for too long goes, then what is too much."""
        if not self.rests():
            async with self._deciding():
                candidates = self._shelves.candidates()
                if self._max_idle is not None:
                    await self._evict(eviction.idle(candidates, self._max_idle, self._now()), "idle")
                    candidates = self._shelves.candidates()
                for _ in range(ATTEMPTS):
                    usage = sum(candidate.bytes for candidate in candidates)
                    chosen = eviction.plan(usage, self._shelves.budget(), candidates, self._now())
                    if await self._evict(chosen, "room") == len(chosen):
                        break
                    candidates = self._shelves.candidates()
        self._shelves.reevaluate()

    def decide(self, pipeline: str, needed: int, *, own: int, quota: int | None) -> eviction.Admission:
        """What ``admit`` would do now."""
        candidates = self._shelves.candidates()
        usage = sum(candidate.bytes for candidate in candidates)
        others = [candidate for candidate in candidates if candidate.pipeline != pipeline]
        if self.rests():
            others = [msgspec.structs.replace(candidate, hot=True) for candidate in others]
        return eviction.admit(
            usage,
            self._shelves.budget(),
            others,
            self._now(),
            needed,
            own=own,
            quota=quota,
        )

    def free_bytes(self) -> int:
        """How many bytes may come in right now without evicting anybody."""
        candidates = self._shelves.candidates()
        usage = sum(candidate.bytes for candidate in candidates)
        return eviction.room(usage, self._shelves.budget()) - sum(candidate.promised for candidate in candidates)

    async def admit(
        self, pipeline: str, needed: int, promise: Callable[[], None], *, own: int, quota: int | None
    ) -> Refusal | None:
        """Make room for ``needed`` bytes of ``pipeline`` before the first of them is written; None once it is made.

        ``promise`` is called at that moment: from then on the pipeline is a candidate with them.
        """
        async with self._deciding():
            for _ in range(ATTEMPTS):
                decision = self.decide(pipeline, needed, own=own, quota=quota)
                if decision.refusal is not None:
                    return decision.refusal
                if not decision.evict:
                    promise()
                    return None
                await self._evict(decision.evict, f"{needed} bytes of {pipeline}")
            return Refusal("store full", needed, 0, kept="everything is taken into use as soon as it is to go")

    async def free_space(self, pipeline: str) -> bool:
        """The filesystem is full while ``pipeline`` is filled: evict others down to the low watermark, counting the
        store as full whatever its own bytes say (somebody else may fill the disk). Whether anything was freed."""
        if self.rests():
            return False
        async with self._deciding():
            candidates = self._shelves.candidates()
            budget = self._shelves.budget()
            usage = max(sum(candidate.bytes for candidate in candidates), budget.capacity)
            others = [candidate for candidate in candidates if candidate.pipeline != pipeline]
            for _ in range(ATTEMPTS):
                chosen = eviction.plan(usage, budget, others, self._now())
                if not chosen or await self._evict(chosen, f"a full disk under {pipeline}"):
                    return bool(chosen)
                others = [candidate for candidate in self._shelves.candidates() if candidate.pipeline != pipeline]
            return False

    @asynccontextmanager
    async def _deciding(self) -> AsyncIterator[None]:
        """One at a time. What the one before began to evict, and did not live to see the end of, is gone by then: still
        counted as taken, it would cost another pipeline its bytes."""
        async with self._lock:
            await self._shelves.evictions_end()
            yield

    async def _evict(self, chosen: Sequence[str], why: str) -> int:
        """How many were."""
        freed = 0
        for pipeline in chosen:
            try:
                await self._shelves.evict_unused(pipeline)
                freed += 1
                log.info("evicted for %s", why, extra={"pipeline": pipeline})
            except InstantStartError as error:
                log.info("not evicted: %s", error.message, extra={"pipeline": pipeline})
        return freed
