"""Decides when an origin is asked again: backoff, Retry-After, circuit breakers, and the next source of a chain.

It holds files in the fill plan and releases them, and wakes readers whose origin's breaker opens. It sends no request
and ends no fill.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.retry import believed_retry_after
from instantstart_fs.errors import InstantStartError, OriginBroken
from instantstart_fs.filler.breakers import Breakers
from instantstart_fs.filler.fill import Fill
from instantstart_fs.filler.settings import FillSettings
from instantstart_fs.filler.target import FileKey
from instantstart_fs.origins.base import OriginKey


class OriginBackoff:
    """Backs off from origins that fail. ``fills``: the fills of the fill table, which alone changes them."""

    def __init__(
        self,
        plan: FillPlan[FileKey],
        fills: Mapping[FileKey, Fill],
        breakers: Breakers,
        settings: FillSettings,
    ) -> None:
        self._plan = plan
        self._fills = fills
        self._breakers = breakers
        self._settings = settings
        self._random = random.Random()

    def backoff(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row."""
        return self._settings.backoff.delay(failures, self._random.random())

    def next_link(self, fill: Fill) -> bool:
        """Use the next source of the chain from now on; False at its end."""
        if fill.link + 1 >= len(fill.links):
            return False
        fill.link += 1
        fill.discard_location()
        fill.refused = fill.stale = fill.missing = 0
        self._plan.move(fill.target.key, fill.source.key)
        return True

    def hold(self, fill: Fill) -> None:
        """Back off. Failures while the file is held already belong to the same burst and do not count."""
        now = trio.current_time()
        if now >= fill.held_until:
            fill.failures += 1
            fill.held_until = now + self.backoff(fill.failures)
            self._plan.hold(fill.target.key, fill.held_until)

    def throttled(self, fill: Fill, error: InstantStartError, now: float) -> None:
        """Pause the whole origin as its Retry-After asks, or back off without one; readers' deadlines follow."""
        origin = fill.source.key
        retry_after = believed_retry_after(error.retry_after)
        if retry_after is None:
            self.hold(fill)
            until = fill.held_until
        else:
            until = now + retry_after + self._random.random() * min(1.0, 0.1 + retry_after / 10)
        self._plan.hold_origin(origin, until)
        if retry_after is None or fill.target.deadline_extended_to >= until:
            return
        for key in self._plan.keys_of(origin):
            other = self._fills[key].target
            # After the pause the usual deadline begins anew.
            other.deadline_extended_to = max(other.deadline_extended_to, until + self._settings.read_deadline)
            other.error = error

    def origin_answered(self, origin: OriginKey, host: str, file: FileKey) -> None:
        """Note a good answer; closes the breakers of this file and its pipeline at ``host``."""
        if not self._breakers.succeeded(origin, host, file):
            return
        self._plan.set_limit(origin, None, file.pipeline)
        for key in self._plan.keys_of(origin, file.pipeline):
            fill = self._fills[key]
            self.sync_breaker(fill)
            if fill.target.broken is None and isinstance(fill.target.error, OriginBroken):
                fill.target.error = None

    def origin_failed(
        self, origin: OriginKey, host: str, file: FileKey, silent: float, error: InstantStartError
    ) -> None:
        """Note a failure after ``silent`` seconds without a byte; may open a breaker."""
        opened = self._breakers.failed(origin, host, file, silent, error)
        if opened == "pipeline":
            for key in self._plan.keys_of(origin, file.pipeline):
                fill = self._fills[key]
                self.sync_breaker(fill)
                # The breaker paces the probes: a file's own backoff must not hold up the one that closes it.
                fill.held_until = 0.0
                self._plan.release(key)
                fill.target.wake()
        elif opened == "file" and file in self._fills:
            self.sync_breaker(self._fills[file])
            self._plan.hold(file, self._breakers.probe_at(file) or 0.0)
            self._fills[file].target.wake()

    def sync_breaker(self, fill: Fill) -> None:
        """Show the target whether a breaker is open for it."""
        fill.target.broken = self._breakers.broken(fill.source.key, fill.target.key)
