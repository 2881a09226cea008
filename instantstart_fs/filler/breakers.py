"""The circuit breakers of all origins: one each per origin and credentials. Bookkeeping over core/retry's Breaker.

Lives on the trio thread. What follows from a breaker that opens or closes (held files, readers to wake) is its owner's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import trio

from instantstart_fs.core.retry import Breaker
from instantstart_fs.errors import InstantStartError, OriginBroken
from instantstart_fs.origins.base import OriginKey

log = logging.getLogger(__name__)


class Breakers:
    def __init__(self) -> None:
        self._breakers: dict[OriginKey, Breaker] = {}
        self._last_failure: dict[OriginKey, str] = {}

    def items(self) -> Iterator[tuple[OriginKey, Breaker]]:
        """Those of origins that have ever failed."""
        yield from self._breakers.items()

    def succeeded(self, origin: OriginKey) -> bool:
        """The origin answered. True if that closed its breaker."""
        breaker = self._breakers.get(origin)
        if breaker is None or not breaker.succeeded():
            return False
        log.info("%s answers again", origin)
        return True

    def failed(self, origin: OriginKey, silent: float, error: InstantStartError) -> bool:
        """The origin failed after ``silent`` seconds without a byte. True if that opened its breaker (anew)."""
        breaker = self._breakers.setdefault(origin, Breaker())
        was_closed = breaker.closed
        self._last_failure[origin] = error.message
        if not breaker.failed(trio.current_time(), silent):
            return False
        if was_closed:
            log.warning("%s is down: %s", origin, error.message)
        return True

    def broken(self, origin: OriginKey) -> OriginBroken | None:
        """What to refuse reads with while this origin is known to be down; None while it is not."""
        breaker = self._breakers.get(origin)
        if breaker is None or breaker.closed:
            return None
        wait = max((breaker.probe_at or 0.0) - trio.current_time(), 0.0)
        reason = self._last_failure.get(origin, "it does not answer")
        return OriginBroken(f"{origin} is down ({reason}); tried again in {wait:.0f} s")
