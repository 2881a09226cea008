"""How long a reader waits for another host of the region, and a fetch for a tier. Pure: time is a parameter."""

from __future__ import annotations

LEAST_PATIENCE, FIRST_PATIENCE, MOST_PATIENCE = 0.25, 1.0, 2.0
"""Seconds a reader's chunk waits for a claim: as long as fetching one from the origin takes, within these bounds; the
middle one while no fetch was measured."""
CHUNK_DEADLINE = 2.0
"""Seconds without a byte after which a reader's chunk is taken from the next source."""
BACKGROUND_DEADLINE = 6.0
"""The same for a chunk that nobody waits for: a host or tier that is busy is not a dead one."""
CHUNK_SLOWEST = 20.0
"""Seconds within which a whole chunk has to come from a tier, if nobody waits for it."""
TICK_COUNTS = 0.25
"""Seconds that pass for a deadline between two looks at it, at most: what this host itself slept through is not the
tier's silence."""


class Patience:
    """How long a reader's chunk waits for another host: as long as a fetch from the origin takes here.

    ``progress`` grows with all that this host gets of the origin."""

    def __init__(self) -> None:
        self.progress = 0
        self._typical: float | None = None

    def took(self, seconds: float) -> None:
        """A chunk came from the origin in ``seconds``."""
        self._typical = seconds if self._typical is None else 0.8 * self._typical + 0.2 * seconds

    @property
    def seconds(self) -> float:
        if self._typical is None:
            return FIRST_PATIENCE
        return min(max(self._typical, LEAST_PATIENCE), MOST_PATIENCE)


class FairClock:
    """Seconds that count for deadlines: those in which this host looked. Each look adds at most TICK_COUNTS, so that a
    machine that was stopped or busy does not take its own absence for the silence of others."""

    def __init__(self, now: float) -> None:
        self._last = now
        self.time = 0.0

    def look(self, now: float) -> float:
        self.time += min(max(now - self._last, 0.0), TICK_COUNTS)
        self._last = now
        return self.time


def give_up_at(began: float, last_byte: float, *, demanded: bool) -> float:
    """When a fetch from a tier has taken too long. Times are of one FairClock. ``last_byte``: when something last came,
    ``began`` while nothing did."""
    if demanded:
        return min(last_byte + CHUNK_DEADLINE, began + 2 * CHUNK_DEADLINE)
    return min(last_byte + BACKGROUND_DEADLINE, began + CHUNK_SLOWEST)
