"""Backoff, circuit breaker and what counts as progress. Pure: time and chance are parameters; which errors count is
decided by the callers.

Times are seconds of any one monotonic clock. Neither object knows what failed; the filler decides which errors count
(core/fillplan asks for nothing while a breaker's ``limit`` is 0).
"""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_RETRY_AFTER = 600.0
"""A server's Retry-After is followed up to 10 minutes (design rule 3)."""


REPEAT_SECONDS = 2.0
"""Seconds for which the error of a failed wait is repeated at once. The kernel asks again for a page whose readahead
failed, and the reader must not wait for its deadline twice."""
SLOWEST = 4096
"""Bytes a second below which there is no progress: a body that drips would keep its reader waiting for ever."""
QUANTUM = 256 * 1024


class Effort:
    """The progress of one chunk over all its requests. ``moved``: when it last advanced.

    Only bytes that no earlier request had brought are progress: a server may send the same half again and again.
    ``quantum``: bytes that count as a step.
    """

    __slots__ = ("_best", "moved", "quantum")

    def __init__(self, moved: float, quantum: int) -> None:
        self.moved = moved
        self.quantum = quantum
        self._best = 0

    def received(self, count: int, now: float) -> bool:
        """Note that the running request has brought ``count`` bytes so far. True if that is progress."""
        if count < self._best + self.quantum:
            return False
        self._best, self.moved = count, now
        return True


def quantum(no_progress: float) -> int:
    """Return the bytes that must come within a deadline of ``no_progress`` seconds."""
    return int(min(QUANTUM, SLOWEST * no_progress)) or 1


class Backoff(msgspec.Struct, frozen=True):
    """Exponential delays with full-range jitter: ``base`` · 2^(n−1), at most ``cap``, times 0.5 … 1."""

    base: float = 0.25
    cap: float = 30.0

    def delay(self, failures: int, chance: float) -> float:
        """Seconds to wait after the ``failures``-th failure in a row (from 1). ``chance`` is from [0, 1)."""
        exponent = min(max(failures, 1) - 1, 32)
        full: float = min(self.cap, self.base * 2.0**exponent)
        return full * (0.5 + chance / 2)


def believed_retry_after(seconds: float | None) -> float | None:
    """A Retry-After as it is followed: not negative, at most MAX_RETRY_AFTER."""
    return None if seconds is None else min(max(seconds, 0.0), MAX_RETRY_AFTER)


class Breaker:
    """The circuit breaker of one pipeline at one host, or of one file.

    closed → open: ``threshold`` failures in a row over at least ``grace`` seconds, or two in a row over ``window``
    seconds, with no success between. The time a request spent in silence counts (a black hole is known after its first
    time-outs), but a burst of reset connections alone does not open it: an error to a reader may be a SIGBUS.
    open → half-open: after ``first`` seconds, doubling with each failed probe up to ``cap``. half-open lets one request
    through; its success closes, its failure opens again. Failures of requests sent before it opened change nothing.
    """

    def __init__(
        self,
        *,
        threshold: int = 5,
        grace: float = 5.0,
        window: float = 10.0,
        first: float = 1.0,
        cap: float = 60.0,
    ) -> None:
        self._threshold = threshold
        self._grace = grace
        self._window = window
        self._first = first
        self._cap = cap
        self._failures = 0
        self._streak_start = 0.0
        self._probe_at: float | None = None
        self._probe_delay = first

    @property
    def closed(self) -> bool:
        return self._probe_at is None

    @property
    def probe_at(self) -> float | None:
        """When one request may be tried again; None while closed."""
        return self._probe_at

    def state(self, now: float) -> Literal["closed", "open", "half-open"]:
        if self._probe_at is None:
            return "closed"
        return "open" if now < self._probe_at else "half-open"

    def limit(self, now: float) -> int | None:
        """Requests that may be in flight at once: None = no limit, 0 = none, 1 = a probe."""
        return {"closed": None, "open": 0, "half-open": 1}[self.state(now)]

    def succeeded(self) -> bool:
        """Note an answer. True if that closed the breaker."""
        was_open = self._probe_at is not None
        self._failures = 0
        self._probe_at = None
        self._probe_delay = self._first
        return was_open

    def failed(self, now: float, silent: float = 0.0, *, may_open: bool = True) -> bool:
        """Note a failure after ``silent`` seconds without a byte. True if that opened the breaker (again, after a
        probe). ``may_open``: False only counts the failure."""
        if self._probe_at is not None:
            if now < self._probe_at:
                return False
            self._probe_delay = min(self._probe_delay * 2, self._cap)
            self._probe_at = now + self._probe_delay
            return True
        start = now - max(silent, 0.0)
        self._streak_start = start if self._failures == 0 else min(self._streak_start, start)
        self._failures += 1
        lasted = now - self._streak_start
        if not may_open:
            return False
        if (self._failures >= self._threshold and lasted >= self._grace) or (
            self._failures >= 2 and lasted >= self._window
        ):
            self._probe_delay = self._first
            self._probe_at = now + self._first
            return True
        return False
