"""Groups one event that affects many files: logged once, then counted. Pure: time is a parameter (seconds of one
monotonic clock).
"""

from __future__ import annotations

REMIND_SECONDS = 60.0
"""Seconds after which an incident that goes on is logged again; then twice as long, up to MOST_REMIND."""
MOST_REMIND = 3600.0
QUIET_SECONDS = 30.0
"""Seconds without a failure after which an incident is over. A connection that fails every other time is one
incident."""


class Incident:
    """A failure, for as long as it lasts. ``count``: how often it was noticed; ``since``: when it was first noticed."""

    __slots__ = ("_over_at", "_over_told", "_pause", "_told_at", "count", "since")

    def __init__(self, now: float) -> None:
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.since = now
        self.count = 0
        self._told_at = now
        self._pause = 0.0
        self._over_at: float | None = None
        self._over_told = False

    def noticed(self, now: float) -> bool:
        """Count the event once more. True if it should be logged."""
        if self._over_at is not None and now - self._over_at >= QUIET_SECONDS:
            self._begin(now)
        self._over_at = None
        self.count += 1
        if now - self._told_at < self._pause:
            return False
        self._told_at = now
        self._pause = min(max(self._pause * 2, REMIND_SECONDS), MOST_REMIND)
        self._over_told = False
        return True

    def over(self, now: float) -> bool:
        """End the event, as it seems. True if that should be logged: it was counted more often than logged."""
        if self._over_at is None:
            self._over_at = now
        if self.count < 2 or self._over_told:
            return False
        self._over_told = True
        return True

    def ended(self, now: float) -> bool:
        """Return whether it has been over for so long that it may be forgotten."""
        return self._over_at is not None and now - self._over_at >= QUIET_SECONDS
