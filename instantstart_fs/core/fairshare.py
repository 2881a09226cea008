"""Fair shares: which pipeline gets the next free place at an origin, and which slow request is preempted for another.

Pure decisions over the tables of core/fillqueue.py; it changes none of them. The figures behind the rules are in
docs/decisions/fair-share.md. A decision is O(lanes with work).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Generic

from instantstart_fs.core.fillqueue import Entry, Flight, K, Lane, Pool

LAST_FACTOR = 4.0
"""The only flight of a lane is preempted, by a lane that has none, after this many times as long."""


def next_entry(lane: Lane[K]) -> Entry[K] | None:
    """The entry whose background the lane sends next; drops stale heap entries."""
    while lane.background:
        _, version, _, entry = lane.background[0]
        if version == entry.version and entry.background and entry.free and entry.next_background() >= 0:
            return entry
        heapq.heappop(lane.background)
        if version == entry.heaped:
            entry.heaped = -1
    return None


def has_work(pool: Pool[K]) -> bool:
    """Whether a lane of ``pool`` has something to send."""
    return any(lane.demanded or next_entry(lane) is not None for lane in pool.lanes.values())


def _wanted(lane: Lane[K]) -> int:
    """Requests that ``lane`` would send if there were places."""
    return sum(len(entry.demands) for entry in lane.demanded.values()) or 1


class FairShare(Generic[K]):
    """Decides whose request goes next. ``connections``: background requests in flight per pool; ``headroom``: how many
    more demands may be in flight, half of which one pipeline leaves to the others."""

    def __init__(self, connections: int, headroom: int) -> None:
        self._connections = connections
        self._headroom = headroom
        self._reserve = headroom // 2
        self.paused_until = 0.0
        """Background requests bring nothing until then, which is not their fault."""
        self.background = True
        """Whether background is sent at present."""

    def ceiling(self, pool: Pool[K]) -> int:
        """Requests that may be in flight in ``pool``, demands included."""
        ceiling = self._connections + self._headroom
        return ceiling if pool.limit is None else min(ceiling, pool.limit)

    def _may(self, lane: Lane[K], ceiling: int) -> bool:
        """Whether one more request of ``lane`` may be in flight."""
        most = max(ceiling - self._reserve, 1)
        return lane.in_flight < (most if lane.limit is None else min(most, lane.limit))

    def choose(self, pool: Pool[K], ceiling: int, background: bool) -> Lane[K] | Entry[K] | None:
        """Choose what gets the next place of ``pool``, which has less than ``ceiling`` in flight: a lane, for its next
        demand, or an entry, for its next background chunk; None if nothing may be sent. ``background``: False allows
        demands only."""
        lanes = [lane for lane in pool.lanes.values() if self._may(lane, ceiling)]
        demanding = min(
            (lane for lane in lanes if lane.demanded), key=lambda lane: (lane.in_flight, lane.served), default=None
        )
        background = background and pool.in_flight - pool.demands < self._connections
        if demanding is not None:
            claims = sum(1 for lane in pool.lanes.values() if lane.demanded or lane.demands)
            if background and demanding.demands >= max(ceiling // (claims + 1), 1):
                starved = self._best([lane for lane in lanes if not lane.flights and not lane.demanded])
                if starved is not None:
                    return starved
            return demanding
        if not background:
            return None
        if pool.in_flight >= min(self._connections, ceiling):
            # Beyond its connections only demands get a place, and lanes that have nothing in flight.
            lanes = [lane for lane in lanes if not lane.flights] if pool.demands else []
        return self._best(lanes)

    def _best(self, lanes: Iterable[Lane[K]]) -> Entry[K] | None:
        """The entry whose background is next, over all ``lanes``."""
        best: tuple[int, int] | None = None
        chosen: Entry[K] | None = None
        for lane in lanes:
            place = (lane.in_flight, lane.served)
            if lane.background and (best is None or place < best):
                top = next_entry(lane)
                if top is not None:
                    best, chosen = place, top
        return chosen

    def slow_at(self, flight: Flight[K]) -> float:
        """Return when ``flight`` counts as slow, unless more of it comes before."""
        since = flight.since if flight.demand else max(flight.since, self.paused_until)
        return since + flight.entry.patience

    def waiting(self, pool: Pool[K]) -> list[Lane[K]]:
        """Lanes that have something to send and found no place, for no other reason than the pool's size."""
        return [
            lane
            for lane in pool.lanes.values()
            if lane.limit is None
            and (lane.demanded or (self.background and not lane.flights and next_entry(lane) is not None))
        ]

    def preemptible(self, pool: Pool[K], now: float) -> list[Flight[K]]:
        """The flights to stop now, since lanes with less than their share wait. A lane keeps its own share."""
        waiting = self.waiting(pool)
        if not waiting:
            return []
        ceiling = self.ceiling(pool)
        share = max(ceiling // sum(1 for lane in pool.lanes.values() if lane.flights or lane in waiting), 1)
        needed = sum(min(share - lane.in_flight, _wanted(lane)) for lane in waiting if lane.in_flight < share)
        found: list[Flight[K]] = []
        for lane in sorted(pool.lanes.values(), key=lambda lane: -lane.in_flight):
            slow = sorted((flight for flight in lane.flights if self.slow_at(flight) <= now), key=self.slow_at)
            found += slow[: max(min(lane.in_flight - share, needed - len(found)), 0)]
        if not found and any(not lane.flights for lane in waiting):
            for lane in pool.lanes.values():
                if len(lane.flights) == 1 and share == 1:
                    (flight,) = lane.flights
                    if self.slow_at(flight) + (LAST_FACTOR - 1) * flight.entry.patience <= now:
                        return [flight]
        for lane in waiting:
            # Within a pipeline: slow requests of one file are preempted for a file that has none.
            others = sum(1 for entry in lane.demanded.values() if not entry.in_flight)
            if others and not any(flight.lane is lane for flight in found):
                spare = (f for f in lane.flights if len(f.entry.in_flight) > 1 and self.slow_at(f) <= now)
                found += sorted(spare, key=self.slow_at)[:others]
        return found
