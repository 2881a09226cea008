"""When an origin is asked again: backoff, Retry-After, the breaker, and the next source of a chain.

Keeps the plan and the fillings in step with what origins answer; sends nothing and ends nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.retry import believed_retry_after
from instantstart_fs.errors import InstantStartError, OriginBroken
from instantstart_fs.filler.breakers import Breakers
from instantstart_fs.filler.state import Filling, FillSettings
from instantstart_fs.filler.target import FileKey
from instantstart_fs.origins.base import OriginKey


class Pacing:
    """``fillings``: the scheduler's own table, which it alone changes."""

    def __init__(
        self,
        plan: FillPlan[FileKey],
        fillings: Mapping[FileKey, Filling],
        breakers: Breakers,
        settings: FillSettings,
    ) -> None:
        self._plan = plan
        self._fillings = fillings
        self._breakers = breakers
        self._settings = settings
        self._random = random.Random()

    def backoff(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row."""
        return self._settings.backoff.delay(failures, self._random.random())

    def next_link(self, filling: Filling) -> bool:
        """Ask the next source of the chain from now on; False at its end."""
        if filling.link + 1 >= len(filling.links):
            return False
        filling.link += 1
        filling.renew()
        filling.refused = filling.stale = filling.missing = 0
        self._plan.move(filling.target.key, filling.source.key)
        return True

    def hold(self, filling: Filling) -> None:
        """Back off. Failures that come while it is held already are of the same burst and do not count."""
        now = trio.current_time()
        if now >= filling.held_until:
            filling.failures += 1
            filling.held_until = now + self.backoff(filling.failures)
            self._plan.hold(filling.target.key, filling.held_until)

    def throttled(self, filling: Filling, error: InstantStartError, now: float) -> None:
        origin = filling.source.key
        retry_after = believed_retry_after(error.retry_after)
        if retry_after is None:
            self.hold(filling)
            until = filling.held_until
        else:
            until = now + retry_after + self._random.random() * min(1.0, 0.1 + retry_after / 10)
        self._plan.hold_origin(origin, until)
        if retry_after is None or filling.target.deadline_extended_to >= until:
            return
        for key in self._plan.keys_of(origin):
            other = self._fillings[key].target
            # After the pause the usual deadline begins anew.
            other.deadline_extended_to = max(other.deadline_extended_to, until + self._settings.read_deadline)
            other.error = error

    def origin_answers(self, origin: OriginKey, host: str, file: FileKey) -> None:
        if not self._breakers.succeeded(origin, host, file):
            return
        self._plan.set_limit(origin, None, file.pipeline)
        for key in self._plan.keys_of(origin, file.pipeline):
            filling = self._fillings[key]
            self.show_breaker(filling)
            if filling.target.broken is None and isinstance(filling.target.error, OriginBroken):
                filling.target.error = None

    def origin_fails(
        self, origin: OriginKey, host: str, file: FileKey, silent: float, error: InstantStartError
    ) -> None:
        opened = self._breakers.failed(origin, host, file, silent, error)
        if opened == "pipeline":
            for key in self._plan.keys_of(origin, file.pipeline):
                filling = self._fillings[key]
                self.show_breaker(filling)
                # The breaker paces the probes: a file's own backoff must not hold up the one that closes it.
                filling.held_until = 0.0
                self._plan.release(key)
                filling.target.wake()
        elif opened == "file" and file in self._fillings:
            self.show_breaker(self._fillings[file])
            self._plan.hold(file, self._breakers.probe_at(file) or 0.0)
            self._fillings[file].target.wake()

    def show_breaker(self, filling: Filling) -> None:
        filling.target.broken = self._breakers.broken(filling.source.key, filling.target.key)
