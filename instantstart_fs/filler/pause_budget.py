"""Limits how long background fetches pause for a demand: they leave it the bandwidth, but not for ever. Pure: time is a
parameter."""

from __future__ import annotations

PAUSE_SHARE = 0.5
"""Fraction of the time that demands may have the bandwidth alone: some readers' demands never end."""
PAUSE_SAVED = 4.0
"""Seconds of pause that can be saved up."""


class PauseBudget:
    """Limits how long background may be paused for a demand. ``longest``: seconds at a time. Times are of one monotonic
    clock."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._left = PAUSE_SAVED
        self._at = 0.0
        self._until = 0.0

    def pause(self, now: float) -> float:
        """Begin or prolong a pause now; when it must end."""
        self._account(now)
        self._until = now + max(min(self._longest, self._left), 0.0)
        return self._until

    def end(self, now: float) -> None:
        """End the pause now."""
        self._account(now)
        self._until = min(self._until, now)

    def _account(self, now: float) -> None:
        paused = max(min(now, self._until) - self._at, 0.0)
        self._left = min(self._left - paused + PAUSE_SHARE * (now - self._at - paused), PAUSE_SAVED)
        self._at = now
