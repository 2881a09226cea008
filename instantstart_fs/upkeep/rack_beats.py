"""Tells the rack where this host answers, and finds out who else does: one small object and one listing per beat.

A record that cannot be written is nobody's failure: neighbours then take from the tier what this host owns.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable

import trio

from instantstart_fs.core import placement
from instantstart_fs.core.retry import Backoff
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.region_follow import ask_tier
from instantstart_fs.filler.region_rack import RackLevel
from instantstart_fs.filler.regional import Regional
from instantstart_fs.regional.racks import Rack, RackReader, RackRecord, object_of

log = logging.getLogger(__name__)

FIRST_BEATS, FIRST_SECONDS = 4, 2.0
"""Hosts that start together find each other soon."""
MOST_SECONDS = 300.0
"""Between two beats of a host that its tier does not tell the clock: each time it waits for longer."""
UNBOUND_SECONDS = 1.0
ASK_SECONDS = 10.0
CLOCK_SECONDS = 600.0
"""For which the storage's clock is believed without being told again."""


class RackBeats:
    """On the trio thread. ``address``: where this host answers its rack, "" while it does not."""

    def __init__(self, regional: Regional, level: RackLevel, address: Callable[[], str]) -> None:
        settings = regional.settings
        self._regional = regional
        self._level = level
        self._address = address
        self._settings = settings
        self._store = settings.stores[0]
        self._reader = RackReader(self._store, settings.key, settings.rack)
        self._threads = trio.CapacityLimiter(2)
        self._name = ""
        self._clock: tuple[float, float] | None = None
        """The storage's clock, and this process' own, at one moment."""
        level.clock = self.clock

    def clock(self) -> float | None:
        """The storage's, None where it is not known."""
        if self._clock is None:
            return None
        there, here = self._clock
        passed = trio.current_time() - here
        return there + passed if passed <= CLOCK_SECONDS else None

    async def run(self) -> None:
        """Until cancelled."""
        beats = misses = 0
        while True:
            if not self._address():
                await trio.sleep(UNBOUND_SECONDS)
                continue
            if self._regional.answers:
                try:
                    await self.beat()
                    beats += 1
                except InstantStartError as error:
                    log.debug("the rack does not hear of this host: %s", error.message)
                except Exception:
                    log.exception("the rack does not hear of this host")
            # Without the clock no neighbour is asked, and none is served.
            misses = misses + 1 if self.clock() is None else 0
            await trio.sleep(self._pause(beats, misses))

    def _pause(self, beats: int, misses: int) -> float:
        period = placement.beat_period(self._regional.hosts)
        if misses:
            return Backoff(FIRST_SECONDS, max(MOST_SECONDS, period)).delay(misses, random.random())
        if beats < FIRST_BEATS:
            period = FIRST_SECONDS
        return period * (1 - placement.JITTER + 2 * placement.JITTER * random.random())

    async def beat(self) -> None:
        """Say where this host answers; find out who else does. Raises InstantStartError."""
        settings = self._settings
        name, data = object_of(settings.key, RackRecord(settings.host, settings.rack, self._address()))
        before, self._name = self._name, name

        def exchange() -> Rack:
            self._store.put(name, data)
            if before and before != name:
                with contextlib.suppress(InstantStartError):  # it expires
                    self._store.delete(before)
            return self._reader.read(name)

        asked = trio.current_time()
        found = await ask_tier(exchange, ASK_SECONDS, self._threads)
        if found.clock is not None:
            self._clock = (found.clock, asked)
        self._level.live(found.hosts)
