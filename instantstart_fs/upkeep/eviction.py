"""Evictor: keeps the store below its limits by core/eviction's plans, whole pipelines, least recently requested first.
What there is to evict is in upkeep/inventory.py; how a pipeline is emptied, in admin/.

It runs when new bytes have come (``wake``), every LOOK_SECONDS (others may fill the disk, pipelines grow idle, the
clock may be set), before a fill begins (``admit``), and when the filesystem itself is full (``free_space``). One
decision at a time: space that one admission counts on must not be given to another.
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
from instantstart_fs.core.clockwatch import ClockState, ClockWatch
from instantstart_fs.core.eviction import Candidate, Refusal
from instantstart_fs.errors import InstantStartError, StoreError
from instantstart_fs.index.access_times import AccessTimes
from instantstart_fs.index.environment import Index

log = logging.getLogger(__name__)

INTERVAL = 2.0
"""Least seconds between two runs: each walks over all pipelines."""
LOOK_SECONDS = 60.0
SAVE_SECONDS = 3600.0
"""Seconds between two saves of the clocks for the next daemon. While eviction is suspended they are saved every
LOOK_SECONDS."""
SAVE_DEADLINE = 5.0
"""Seconds that the last save of the clocks may take, at the end."""
ATTEMPTS = 4
"""How often an admission is decided again because a pipeline came into use before its eviction."""


class Evictions(Protocol):
    """Empties pipelines (admin/administration.py)."""

    async def evict_unused(self, pipeline: str) -> None:
        """Evict a pipeline. Raises PipelineBusy if it came into use, or was requested, since it was chosen."""
        ...

    async def evictions_end(self) -> None:
        """Return once no eviction is under way whose ``evict_unused`` was cancelled."""
        ...


class Inventory(Protocol):
    """The candidates for eviction (upkeep/inventory.py)."""

    def budget(self) -> eviction.Budget:
        """The limits of the store, and the filesystem's free space now."""
        ...

    def candidates(self) -> Sequence[Candidate]:
        """Return all pipelines with cached or promised bytes. The sum of their bytes is the usage."""
        ...


def _nothing() -> None:
    pass


def boottime() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_identity() -> str:
    """The kernel's identity of this boot; "" where it does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class Evictor:
    """On the trio thread.

    It has more than 8 collaborators, because it is made with each clock and callback that it needs, which tests set;
    four are parts of the library.

    Args:
        inventory: What there is to evict, and how full the store is.
        evictions: Returns what empties pipelines. Called when something is first evicted: emptying a pipeline cancels
            its fills, and fills ask this object for space, so one of the two is built later.
        access: Told when the wall clock jumped: stored times that lie in the future count as now.
        index: Keeps the clocks for the next daemon.
        now: The wall clock, seconds.
        keep_hot: Seconds for which a request protects a pipeline.
        max_idle: Seconds after which an idle pipeline is evicted; None = never.
        boot: A clock that is never set, seconds.
        boot_id: The boot that ``boot`` counts from.
        known: The clocks as an earlier daemon saved them.
        on_pass: Called after each run: there may be space now for refused admissions.
    """

    def __init__(
        self,
        inventory: Inventory,
        evictions: Callable[[], Evictions],
        access: AccessTimes,
        index: Index,
        now: Callable[[], float],
        *,
        keep_hot: float = 0.0,
        max_idle: float | None = None,
        boot: Callable[[], float] = boottime,
        boot_id: str = "",
        known: ClockState | None = None,
        on_pass: Callable[[], None] = _nothing,
    ) -> None:
        self._inventory = inventory
        self._evictions = evictions
        self._access = access
        self._index = index
        self._on_pass = on_pass
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
        """Run soon: new bytes have come, or more may be evicted than before."""
        self._woken.set()

    def suspended(self) -> bool:
        """Whether eviction is suspended because the wall clock was set (design rule 9)."""
        boot = self._boot()
        if self._watch.observe(self._now(), boot):
            self._access.clock_was_set()
            self._saved = None
            self._clock_was_set.set()  # saved at once, for the next daemon
            self.wake()
            log.warning("the wall clock was set by more than an hour: nothing is evicted for keep_hot from now on")
        return self._watch.suspended(boot)

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
            # Two jumps may cancel each other out: the next daemon would see none, and not suspend eviction.
            with trio.move_on_after(SAVE_DEADLINE, shield=True):
                await self._save_clock()

    async def _save_clock(self) -> None:
        rests, boot = self.suspended(), self._boot()
        if self._saved is not None and boot - self._saved.boot < (LOOK_SECONDS if rests else SAVE_SECONDS):
            return
        state = self._watch.state(self._now(), boot)
        try:
            await self._index.write(lambda txn: txn.put_clock(state))
        except StoreError as error:
            if not self._saving_fails:
                log.warning("the clocks are not noted for the next start: %s", error.message)
            self._saving_fails = True
        else:
            self._saved, self._saving_fails = state, False

    async def run_once(self) -> None:
        """Evict what is idle for too long, then what is too much."""
        if not self.suspended():
            async with self._deciding():
                candidates = self._inventory.candidates()
                if self._max_idle is not None:
                    await self._evict(eviction.idle(candidates, self._max_idle, self._now()), "idle")
                    candidates = self._inventory.candidates()
                for _ in range(ATTEMPTS):
                    usage = sum(candidate.bytes for candidate in candidates)
                    chosen = eviction.plan(usage, self._inventory.budget(), candidates, self._now())
                    if await self._evict(chosen, "space") == len(chosen):
                        break
                    candidates = self._inventory.candidates()
        self._on_pass()

    def decide(self, pipeline: str, needed: int, *, own: int, quota: int | None) -> eviction.Admission:
        """Decide, without acting, what ``admit`` would do now."""
        candidates = self._inventory.candidates()
        usage = sum(candidate.bytes for candidate in candidates)
        others = [candidate for candidate in candidates if candidate.pipeline != pipeline]
        if self.suspended():
            others = [msgspec.structs.replace(candidate, hot=True) for candidate in others]
        return eviction.admit(
            usage,
            self._inventory.budget(),
            others,
            self._now(),
            needed,
            own=own,
            quota=quota,
        )

    def free_bytes(self) -> int:
        """Return how many bytes may come in now without evicting anything."""
        candidates = self._inventory.candidates()
        usage = sum(candidate.bytes for candidate in candidates)
        return eviction.free_bytes(usage, self._inventory.budget()) - sum(
            candidate.promised for candidate in candidates
        )

    async def admit(
        self, pipeline: str, needed: int, promise: Callable[[], None], *, own: int, quota: int | None
    ) -> Refusal | None:
        """Make space for ``needed`` bytes of ``pipeline`` before the first of them is written.

        Args:
            pipeline: Its id.
            needed: Bytes on disk.
            promise: Called when there is space: from then on the pipeline is a candidate with these bytes.
            own: Bytes that the pipeline has already.
            quota: Its limit in bytes; None = none.

        Returns:
            None once there is space, or why there is none.
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
        """Evict others down to the low watermark: the filesystem is full under ``pipeline``, whatever the store's own
        bytes say (others may fill the disk). Returns whether anything was freed."""
        if self.suspended():
            return False
        async with self._deciding():
            candidates = self._inventory.candidates()
            budget = self._inventory.budget()
            usage = max(sum(candidate.bytes for candidate in candidates), budget.capacity)
            others = [candidate for candidate in candidates if candidate.pipeline != pipeline]
            for _ in range(ATTEMPTS):
                chosen = eviction.plan(usage, budget, others, self._now())
                if not chosen or await self._evict(chosen, f"a full disk under {pipeline}"):
                    return bool(chosen)
                others = [candidate for candidate in self._inventory.candidates() if candidate.pipeline != pipeline]
            return False

    @asynccontextmanager
    async def _deciding(self) -> AsyncIterator[None]:
        """Hold the lock of decisions inside the block. First wait for evictions whose requester was cancelled: their
        bytes still count as used, and would cost another pipeline its own."""
        async with self._lock:
            await self._evictions().evictions_end()
            yield

    async def _evict(self, chosen: Sequence[str], why: str) -> int:
        """Evict these in order; how many were."""
        freed = 0
        for pipeline in chosen:
            try:
                await self._evictions().evict_unused(pipeline)
                freed += 1
                log.info("evicted for %s", why, extra={"pipeline": pipeline})
            except InstantStartError as error:
                log.info("not evicted: %s", error.message, extra={"pipeline": pipeline})
        return freed
