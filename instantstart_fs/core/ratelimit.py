"""A token bucket for rate limits: how long to wait so that something keeps a rate. Pure: time is a parameter."""

from __future__ import annotations


class Bucket:
    """``rate`` tokens a second, ``burst`` of them at once after a rest. Time in seconds of any clock that never goes
    back; ``now`` is when the bucket is made, full."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def take(self, now: float, count: float = 1.0) -> float:
        """Take ``count`` tokens and return the seconds to wait before using them.

        The bucket may go into debt, which the next caller waits for as well: callers are served one after the other,
        and all of them together never faster than ``rate``.
        """
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = max(now, self._at)
        self._tokens -= count
        return max(0.0, -self._tokens / self._rate)
