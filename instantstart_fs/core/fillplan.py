"""The fill plan: a pure state machine that decides which chunk of which file to request next. It has no I/O and no
clock.

Demand, arrivals, failures and time go in; ``next_requests`` returns the requests to send. Only the filler
(filler/scheduler.py) drives it, and it carries out every request. Who gets the next place is decided in
core/fairshare.py; entry, pool, lane and flight are defined in core/fillqueue.py.

Invariants (tests/model/test_fillplan_model.py checks them against generated histories):
- a chunk is in flight at most once, and never when it is present;
- background requests of a pool never exceed ``connections``, all of its requests never ``connections + headroom``, and
  those of one lane leave ``headroom // 2`` of that to others;
- a demand that may be sent goes ahead of background, unless its lane has its share of the pool in demands already, and
  the background's lane has nothing in flight;
- a file whose last request failed (``suspect``) has one request in flight, until one of its chunks arrives;
- within a lane, background goes in the given order, from the demanded chunk of the demanded file onward, and round;
- between lanes: the one with the fewest requests in flight, then the one served longest ago;
- a flight is preempted only where it is slow and a lane with less than its share waits; its own lane keeps its share.

Cost: a decision is O(lanes with work); finding a file's next chunk is one memchr over a byte per chunk (125 KB for
1 TB). Requests are never materialized ahead.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.fairshare import FairShare, has_work, next_entry
from instantstart_fs.core.fillqueue import SLOW_RATE, Entry, Flight, K, Lane, Pool, Request


class FillPlan(Generic[K]):
    """The plan of all pipelines.

    It has more than 25 public methods, because every event changes the same tables, and a part of the class alone
    would keep no invariant.

    Args:
        connections: Background requests in flight per origin key.
        headroom: How many more demands may be, half of which one pipeline leaves to the others.
    """

    def __init__(self, connections: int, headroom: int = 4) -> None:
        self._shares: FairShare[K] = FairShare(connections, headroom)
        self._pools: dict[Hashable, Pool[K]] = {}
        self._entries: dict[K, Entry[K]] = {}
        self._pipelines: dict[str, dict[K, Entry[K]]] = {}
        self._held: list[tuple[float, int, Entry[K]]] = []
        self._sequence = itertools.count(1)
        self._latest_demand: dict[str, K] = {}
        self._first: dict[str, int] = {}
        """Per pipeline, the lowest rank given so far: the next file in front gets a lower one."""
        self._last: dict[str, int] = {}
        """The same at the other end."""

    # -- what is known -------------------------------------------------------------------------------------------

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def add(self, key: K, pipeline: str, origin: Hashable, present: ChunkMap) -> None:
        """Add a file. No effect if it is known. ``present`` is not copied: call ``arrived`` when it grows."""
        if key in self._entries:
            return
        pool, lane = self._lane(origin, pipeline)
        lane.entries += 1
        entry = Entry(key, pipeline, pool, lane, present)
        self._entries[key] = entry
        self._pipelines.setdefault(pipeline, {})[key] = entry

    def remove(self, key: K) -> None:
        """Forget a file: its requests in flight no longer count. No effect if it is unknown."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        for chunk in list(entry.in_flight):
            self._finish_flight(entry, chunk)
        entry.version += 1
        entry.background = entry.whole = False
        entry.demands.clear()
        entry.wanted.clear()
        entry.lane.demanded.pop(key, None)
        self._leave_lane(entry)
        siblings = self._pipelines[entry.pipeline]
        del siblings[key]
        if not siblings:
            del self._pipelines[entry.pipeline]
            for known in (self._latest_demand, self._first, self._last):
                known.pop(entry.pipeline, None)

    def move(self, key: K, origin: Hashable) -> None:
        """Request this file from another origin from now on (the next link of its chain of sources)."""
        entry = self._entries[key]
        entry.lane.demanded.pop(key, None)
        entry.version += 1
        entry.suspect, entry.preempted = False, 0
        self._leave_lane(entry)
        entry.pool, entry.lane = self._lane(origin, entry.pipeline)
        entry.lane.entries += 1
        self._ready(entry)

    def refill(self, key: K) -> None:
        """Read ``present`` again: it lost chunks (a failed fdatasync)."""
        entry = self._entries[key]
        for chunk in range(entry.present.chunks):
            entry.todo[chunk] = not (chunk in entry.present or chunk in entry.in_flight or chunk in entry.shut)
        for chunk in entry.wanted:
            if entry.todo[chunk]:
                entry.demands[chunk] = None
        self._ready(entry)

    def shut(self, key: K, chunks: Iterable[int]) -> None:
        """Do not request these chunks until ``open``: they come from elsewhere. Requests in flight go on."""
        entry = self._entries.get(key)
        if entry is None:
            return
        for chunk in chunks:
            entry.shut.add(chunk)
            entry.todo[chunk] = 0
            entry.demands.pop(chunk, None)
        if not entry.demands:
            entry.lane.demanded.pop(key, None)

    def open(self, key: K, chunk: int) -> None:
        """Request this chunk as any other."""
        entry = self._entries.get(key)
        if entry is None or chunk not in entry.shut:
            return
        entry.shut.discard(chunk)
        if chunk in entry.present or chunk in entry.in_flight:
            return
        entry.todo[chunk] = 1
        if chunk in entry.wanted:
            entry.demands[chunk] = None
        self._ready(entry)

    # -- what is wanted ------------------------------------------------------------------------------------------

    def demand(self, key: K, chunks: Iterable[int]) -> bool:
        """Put these chunks first: readers wait for them, until they arrive, ``undemand`` is called or the file is
        removed. A failed request changes nothing about that. Returns whether any of them was newly queued."""
        entry = self._entries[key]
        fresh = False
        for chunk in chunks:
            if chunk in entry.present:
                continue
            entry.last_demand = chunk
            entry.wanted.add(chunk)
            if chunk in entry.in_flight or chunk in entry.shut:
                continue
            if chunk not in entry.demands:
                entry.demands[chunk] = None
                fresh = True
                entry.cursor = (chunk + 1) % entry.present.chunks
        if entry.last_demand is not None:
            self._latest_demand[entry.pipeline] = key
        if fresh:
            if entry.background and entry.rank != self._first.get(entry.pipeline):
                entry.rank = self._in_front(entry.pipeline)
                entry.version += 1
            self._ready(entry)
        return fresh

    def undemand(self, key: K, chunks: Iterable[int]) -> None:
        """Withdraw a demand. Requests in flight go on, but are not repeated for its sake. No effect on an unknown
        file."""
        entry = self._entries.get(key)
        if entry is None:
            return
        for chunk in chunks:
            entry.wanted.discard(chunk)
            entry.demands.pop(chunk, None)
        if not entry.demands:
            entry.lane.demanded.pop(key, None)

    def demand_whole(self, key: K) -> None:
        """Fill the whole file whatever the order says, until ``undemand_whole``: readers wait for all of it."""
        self._entries[key].whole = True
        self.add_background(key)

    def undemand_whole(self, key: K) -> None:
        """Withdraw ``demand_whole``; the file keeps its place in the present order. No effect on an unknown file."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.whole = False

    def set_background(self, pipeline: str, keys: Sequence[K]) -> None:
        """Fill these files of the pipeline in this order; others of it only on demand. Replaces the last order.

        The file demanded last, if it is among them, goes first, from behind the demanded chunk onward. Files that
        readers wait for as a whole stay, in front.
        """
        wanted = {key: rank for rank, key in enumerate(keys) if key in self._entries}
        latest = self._latest_demand.get(pipeline)
        for entry in self._pipelines.get(pipeline, {}).values():
            rank = wanted.get(entry.key, -1 if entry.whole else None)
            entry.version += 1
            entry.background = rank is not None
            if rank is None:
                continue
            entry.rank = rank
            if entry.key == latest and entry.last_demand is not None:
                entry.rank = -1
                entry.cursor = (entry.last_demand + 1) % max(entry.present.chunks, 1)
            self._ready(entry)
        self._first[pipeline], self._last[pipeline] = -1, len(keys)

    def append_background(self, pipeline: str, keys: Sequence[K]) -> None:
        """Fill these files too, in this order, after the pipeline's present order. The file demanded last, if it is
        among them, goes first, as in ``set_background``."""
        latest = self._latest_demand.get(pipeline)
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.background:
                continue
            entry.background = True
            entry.version += 1
            if key == latest and entry.last_demand is not None:
                entry.rank = self._in_front(pipeline)
                entry.cursor = (entry.last_demand + 1) % max(entry.present.chunks, 1)
            else:
                entry.rank = self._last[pipeline] = self._last.get(pipeline, 0) + 1
            self._ready(entry)

    def add_background(self, key: K) -> None:
        """Fill this whole file before the rest of its pipeline. No effect if it is in the order already."""
        entry = self._entries[key]
        if entry.background:
            return
        entry.background = True
        entry.rank = self._in_front(entry.pipeline)
        entry.version += 1
        self._ready(entry)

    # -- what happened -------------------------------------------------------------------------------------------

    def arrived(self, key: K, chunk: int) -> None:
        """Note that a chunk is present, requested or not."""
        entry = self._entries.get(key)
        if entry is None:
            return
        self._finish_flight(entry, chunk)
        entry.todo[chunk] = 0
        entry.demands.pop(chunk, None)
        entry.wanted.discard(chunk)
        entry.suspect, entry.preempted = False, 0
        if not entry.demands:
            entry.lane.demanded.pop(key, None)
        self._ready(entry)

    def progressed(self, key: K, chunk: int, count: int, now: float) -> None:
        """Note ``count`` more bytes of a request in flight."""
        entry = self._entries.get(key)
        flight = entry.in_flight.get(chunk) if entry is not None else None
        if flight is not None:
            flight.received += count
            if flight.received >= SLOW_RATE * (now - flight.since):
                flight.since, flight.received = now, 0

    def pause(self, until: float) -> None:
        """Do not count background requests as slow before ``until``: they are paused for a demand."""
        self._shares.paused_until = until

    def failed(self, key: K, chunk: int, *, held_until: float = 0.0, suspect: bool = False) -> None:
        """Note a failed request: its chunk is requested again, the file not before ``held_until``.
        ``suspect``: the file may be the cause, so it gets one request at a time until one arrives."""
        entry = self._entries.get(key)
        if entry is None or chunk not in entry.in_flight:
            return
        self._finish_flight(entry, chunk)
        self._suspect(entry, suspect)
        if chunk in entry.present or chunk in entry.shut:
            return
        entry.todo[chunk] = 1
        if chunk in entry.wanted:
            entry.demands[chunk] = None
        if chunk < entry.cursor:
            entry.cursor = chunk
        self.hold(key, held_until)
        self._ready(entry)

    def hold(self, key: K, until: float) -> None:
        """Request nothing of this file before ``until``. Never shortens an earlier hold; ``release`` ends it."""
        entry = self._entries.get(key)
        if entry is None or until <= entry.held_until:
            return
        entry.held_until = until
        entry.version += 1
        entry.lane.demanded.pop(key, None)
        heapq.heappush(self._held, (until, next(self._sequence), entry))

    def release(self, key: K) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.held_until:
            entry.held_until = 0.0
            self._ready(entry)

    def hold_origin(self, origin: Hashable, until: float) -> None:
        """Request nothing from this origin before ``until`` (a Retry-After)."""
        pool = self._pool(origin)
        pool.held_until = max(pool.held_until, until)

    def set_limit(self, origin: Hashable, limit: int | None, pipeline: str | None = None) -> None:
        """Set what a breaker allows at the origin, for all or for one pipeline: None = no limit, 0 = nothing, 1 = a
        probe."""
        pool = self._pool(origin)
        if pipeline is None:
            pool.limit = limit
            return
        if limit is None:
            pool.limits.pop(pipeline, None)
        else:
            pool.limits[pipeline] = limit
        lane = pool.lanes.get(pipeline)
        if lane is not None:
            lane.limit = limit

    # -- deciding ------------------------------------------------------------------------------------------------

    def next_requests(self, now: float, *, background: bool = True) -> list[Request[K]]:
        """Take every request that should be sent now; they count as in flight from here on.

        ``background``: False = demands only.
        """
        self._shares.background = background
        while self._held and self._held[0][0] <= now:
            until, _, entry = heapq.heappop(self._held)
            if self._entries.get(entry.key) is entry and entry.held_until == until:
                entry.held_until = 0.0
                self._ready(entry)
        requests: list[Request[K]] = []
        for pool in self._pools.values():
            if pool.held_until > now:
                continue
            ceiling = self._shares.ceiling(pool)
            while pool.in_flight < ceiling:
                chosen = self._shares.choose(pool, ceiling, background)
                if chosen is None:
                    break
                if isinstance(chosen, Lane):
                    requests.append(self._send_demand(chosen, now))
                else:
                    requests.append(self._send_background(chosen, now))
        return requests

    def preempt(self, now: float) -> list[Request[K]]:
        """Take the slow requests to stop now because others wait; they count as failed and are repeated in their turn.

        Call it after ``next_requests``, and ``next_requests`` again if it returns any.
        """
        stopped: list[Request[K]] = []
        for pool in self._pools.values():
            if pool.held_until > now or pool.limit is not None:
                continue
            for flight in self._shares.preemptible(pool, now):
                entry = flight.entry
                if entry.in_flight.get(flight.chunk) is not flight:
                    continue
                stopped.append(Request(entry.key, flight.chunk, flight.demand))
                entry.preempted += 1
                self.failed(entry.key, flight.chunk, suspect=True)
        return stopped

    def next_time(self, now: float) -> float | None:
        """Return when ``next_requests`` may return more although nothing happened; None if no time changes that."""
        while self._held:
            until, _, entry = self._held[0]
            if self._entries.get(entry.key) is entry and entry.held_until == until:
                break
            heapq.heappop(self._held)
        times = [self._held[0][0]] if self._held else []
        times += [pool.held_until for pool in self._pools.values() if pool.held_until > now and has_work(pool)]
        for pool in self._pools.values():
            if pool.held_until <= now and pool.limit is None and self._shares.waiting(pool):
                flights = (flight for lane in pool.lanes.values() for flight in lane.flights)
                times += [when for flight in flights if (when := self._shares.slow_at(flight)) > now]
        return min(times, default=None)

    def in_flight(self, origin: Hashable) -> int:
        pool = self._pools.get(origin)
        return pool.in_flight if pool is not None else 0

    def idle(self, origin: Hashable, pipeline: str) -> bool:
        """Whether nothing of the pipeline is in flight at the origin, nor would be sent if it were allowed."""
        pool = self._pools.get(origin)
        lane = pool.lanes.get(pipeline) if pool is not None else None
        return lane is None or not (lane.flights or lane.demanded or next_entry(lane) is not None)

    def keys_of(self, origin: Hashable, pipeline: str | None = None) -> list[K]:
        """The files (of one pipeline) that are requested from this origin. O(files): for rare events only."""
        pool = self._pools.get(origin)
        entries = self._entries.values() if pipeline is None else self._pipelines.get(pipeline, {}).values()
        return [entry.key for entry in entries if entry.pool is pool]

    def queued(self) -> int:
        """Count the chunks that are wanted and not in flight. O(files)."""
        return sum(entry.todo.count(1) if entry.background else len(entry.demands) for entry in self._entries.values())

    # -- inside --------------------------------------------------------------------------------------------------

    def _in_front(self, pipeline: str) -> int:
        """A rank before all others of the pipeline, in constant time."""
        self._first[pipeline] = rank = self._first.get(pipeline, 0) - 1
        return rank

    def _leave_lane(self, entry: Entry[K]) -> None:
        entry.lane.entries -= 1
        self._drop_idle(entry.pool, entry.lane, entry.pipeline)

    def _drop_idle(self, pool: Pool[K], lane: Lane[K], pipeline: str) -> None:
        """Drop the lane with its last file and flight, and the pool with its last lane unless a hold or limit
        remains."""
        if lane.entries or lane.flights:
            return
        if pool.lanes.get(pipeline) is lane:
            del pool.lanes[pipeline]
        if not (pool.lanes or pool.in_flight or pool.held_until or pool.limit is not None or pool.limits):
            for origin in [origin for origin, known in self._pools.items() if known is pool]:
                del self._pools[origin]

    def _pool(self, origin: Hashable) -> Pool[K]:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool()
        return pool

    def _lane(self, origin: Hashable, pipeline: str) -> tuple[Pool[K], Lane[K]]:
        pool = self._pool(origin)
        lane = pool.lanes.get(pipeline)
        if lane is None:
            lane = pool.lanes[pipeline] = Lane()
            lane.limit = pool.limits.get(pipeline)
        return pool, lane

    def _ready(self, entry: Entry[K]) -> None:
        """Queue the entry in its lane, if a request of it may be sent."""
        if not entry.free:
            return
        if entry.demands:
            entry.lane.demanded[entry.key] = entry
        if entry.background and entry.heaped != entry.version and entry.next_background() >= 0:
            entry.heaped = entry.version
            heapq.heappush(entry.lane.background, (entry.rank, entry.version, next(self._sequence), entry))

    def _suspect(self, entry: Entry[K], suspect: bool) -> None:
        if not suspect:
            return
        entry.suspect = True
        if entry.in_flight:
            entry.lane.demanded.pop(entry.key, None)

    def _send_demand(self, lane: Lane[K], now: float) -> Request[K]:
        key, entry = next(iter(lane.demanded.items()))
        chunk = next(iter(entry.demands))
        del entry.demands[chunk]
        del lane.demanded[key]
        request = self._sent(entry, chunk, now, demand=True)
        if entry.demands and entry.free:
            lane.demanded[key] = entry  # to the back: readers of several files take turns
        return request

    def _send_background(self, entry: Entry[K], now: float) -> Request[K]:
        chunk = entry.next_background()
        entry.cursor = chunk + 1
        demand = chunk in entry.demands
        if demand:
            del entry.demands[chunk]
            if not entry.demands:
                entry.lane.demanded.pop(entry.key, None)
        return self._sent(entry, chunk, now, demand=demand)

    def _sent(self, entry: Entry[K], chunk: int, now: float, *, demand: bool) -> Request[K]:
        pool, lane = entry.pool, entry.lane
        entry.todo[chunk] = 0
        flight = entry.in_flight[chunk] = Flight(entry, chunk, demand, now)
        pool.in_flight += 1
        pool.demands += demand
        lane.flights[flight] = None
        lane.demands += demand
        lane.served = next(self._sequence)
        return Request(entry.key, chunk, demand)

    def _finish_flight(self, entry: Entry[K], chunk: int) -> None:
        flight = entry.in_flight.pop(chunk, None)
        if flight is not None:
            flight.pool.in_flight -= 1
            flight.pool.demands -= flight.demand
            del flight.lane.flights[flight]
            flight.lane.demands -= flight.demand
            self._drop_idle(flight.pool, flight.lane, entry.pipeline)
