"""Decides which pipeline is scrubbed (read and compared again), when, and when that pauses. Pure: time is a parameter;
upkeep/scrub.py reads.

A pass goes over one pipeline's complete files in manifest order. The next one is of the pipeline that was proven the
longest time ago, once that is more than ``period``. A pass that a restart, or an update, cut short goes on, or begins
from the start. While there is demand, and for QUIET_SECONDS after it, nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

QUIET_SECONDS = 30.0
"""An engine that loads shard by shard opens the next one sooner than that."""


class ScrubCandidate(msgspec.Struct, frozen=True):
    """A pipeline with ``bytes`` of complete files. ``proven_at``: seconds of the wall clock; all that was complete then
    has been read and compared since."""

    pipeline: str
    bytes: int
    proven_at: float


class ScrubProgress(msgspec.Struct, frozen=True):
    """The scrub state of a pipeline. ``proven_at_ns``: start of the last whole pass, 0 = none. ``began_at_ns``: start
    of the pass under way over ``generation``, whose files below ``next_index`` are done; 0 = none."""

    proven_at_ns: int = 0
    began_at_ns: int = 0
    generation: int = 0
    next_index: int = 0

    @property
    def under_way(self) -> bool:
        return self.began_at_ns > 0

    def begun(self, generation: int, now_ns: int) -> ScrubProgress:
        """The pass that is to go on now."""
        if self.under_way and self.generation == generation:
            return self
        return ScrubProgress(self.proven_at_ns, now_ns, generation, 0)

    def done(self, next_index: int) -> ScrubProgress:
        return msgspec.structs.replace(self, next_index=next_index)

    def finished(self) -> ScrubProgress:
        return ScrubProgress(proven_at_ns=self.began_at_ns)


class Activity(msgspec.Struct, frozen=True):
    """``events`` grows with whatever readers and fills do; ``busy``: something is under way this very moment."""

    events: int
    busy: bool


def next_pass(accounts: Iterable[ScrubCandidate], period: float, now: float) -> tuple[str | None, float]:
    """Return (the pipeline to read now, 0), or (None, seconds until one is due: infinite if there is none)."""
    oldest: tuple[float, str] | None = None
    for account in accounts:
        if account.bytes > 0:
            # A time that has not come yet proves nothing: the clock was set.
            proven_at = account.proven_at if account.proven_at <= now else -math.inf
            oldest = min(oldest, (proven_at, account.pipeline)) if oldest else (proven_at, account.pipeline)
    if oldest is None:
        return None, math.inf
    wait = oldest[0] + period - now
    return (oldest[1], 0.0) if wait <= 0 else (None, wait)


def overdue(accounts: Iterable[ScrubCandidate], period: float, now: float) -> float:
    """Seconds by which the longest unproven pipeline is late; 0 while none is."""
    late = (now - account.proven_at - period for account in accounts if account.bytes > 0 and account.proven_at <= now)
    return max(0.0, max(late, default=0.0))


class IdleDetector:
    """Notices demand. ``quiet``: seconds without any, after which there is none."""

    def __init__(self, quiet: float = QUIET_SECONDS) -> None:
        self._quiet = quiet
        self._events: int | None = None
        self._until = -math.inf

    def observe(self, activity: Activity, now: float) -> float:
        """Seconds to pause from ``now`` (monotonic) on; 0: there is no demand."""
        if activity.busy or (self._events is not None and activity.events != self._events):
            self._until = now + self._quiet
        self._events = activity.events
        return max(0.0, self._until - now)
