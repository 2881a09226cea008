"""What to fetch next: the filler's pure state machine.

Demand, arrivals, failures and time go in; ``next_requests`` says which chunk of which file to ask of which origin. No
IO, no clock, no trio. The filler (filler/scheduler.py) alone drives it, and carries out every request that it is given.

Words: an **entry** is a file that is not complete; a **pool** is one origin key, with its limit of requests in flight;
a **lane** is one pipeline within one pool; a **flight** is one request in flight.

Invariants (tests/model/test_fillplan_model.py checks them against generated histories):
- a chunk is in flight at most once, and never when it is present;
- background requests of a pool never exceed ``connections``, all of its requests never ``connections + headroom``, and
  those of one lane leave ``headroom // 2`` of that to others;
- a demand that may be sent goes ahead of background, unless its lane has its share of the pool in demands already, and
  the background's lane has nothing in flight;
- a file whose last request failed (``suspect``) has one request in flight, until one of its chunks arrives;
- within a lane, background goes in the given order, from the demanded chunk of the demanded file onward, and round;
- between lanes: the one with the fewest requests in flight, then the one served longest ago;
- a flight gives way only where it is slow and somebody waits who has less than a share; its own lane keeps its share.

Cost: a decision is O(lanes with work) and finding a file's next chunk is one memchr over a byte per chunk (125 KB for
1 TB); requests are never materialized ahead.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import msgspec

from instantstart_fs.core.chunks import ChunkMap

K = TypeVar("K", bound=Hashable)
"""What names a file (FileKey)."""


SLOW_SECONDS = 2.0
"""A flight that brings less than SLOW_RATE for so long gives way to who waits; the time doubles each time that it did,
so that an origin that is slow to answer everybody is not asked in vain for ever."""
SLOW_RATE = 16 * 1024
"""Bytes per second."""
MOST_PATIENCE = 32.0
LAST_FACTOR = 4.0
"""The only flight of its lane gives way, to a lane that has none, after so many times as long."""


class Request(msgspec.Struct, Generic[K], frozen=True):
    """Fetch this chunk now. ``demand``: a reader waits for it."""

    key: K
    chunk: int
    demand: bool


class PoolState(msgspec.Struct, frozen=True):
    """``queued``: files with something to ask for, held ones included."""

    in_flight: int
    demands_in_flight: int
    queued: int


class _Flight(Generic[K]):
    """``since``: from when on ``received`` counts, moved up while it comes fast enough."""

    __slots__ = ("chunk", "demand", "entry", "lane", "pool", "received", "since")

    def __init__(self, entry: _Entry[K], chunk: int, demand: bool, now: float) -> None:
        self.entry = entry
        self.chunk = chunk
        self.pool = entry.pool
        self.lane = entry.lane
        self.demand = demand
        self.since = now
        self.received = 0


class _Lane(Generic[K]):
    __slots__ = ("background", "demanded", "demands", "entries", "flights", "limit", "served")

    def __init__(self) -> None:
        self.entries = 0
        """Files that are asked of its pool now; without any it is dropped."""
        self.flights: dict[_Flight[K], None] = {}
        self.demands = 0
        """Those of them that are demands."""
        self.limit: int | None = None
        self.served = 0
        self.demanded: dict[K, _Entry[K]] = {}
        """Entries with demands that may be sent now, in order of arrival."""
        self.background: list[tuple[int, int, int, _Entry[K]]] = []
        """A heap of (rank, version, tie-breaker, entry); stale when the entry's version moved on."""

    @property
    def in_flight(self) -> int:
        return len(self.flights)


class _Pool(Generic[K]):
    __slots__ = ("demands", "held_until", "in_flight", "lanes", "limit", "limits")

    def __init__(self) -> None:
        self.in_flight = 0
        self.demands = 0
        self.limit: int | None = None
        self.limits: dict[str, int] = {}
        """Of single pipelines."""
        self.held_until = 0.0
        self.lanes: dict[str, _Lane[K]] = {}


class _Entry(Generic[K]):
    __slots__ = (
        "background",
        "cursor",
        "demands",
        "gave_way",
        "heaped",
        "held_until",
        "in_flight",
        "key",
        "lane",
        "last_demand",
        "pipeline",
        "pool",
        "present",
        "rank",
        "suspect",
        "todo",
        "version",
        "wanted",
        "whole",
    )

    def __init__(self, key: K, pipeline: str, pool: _Pool[K], lane: _Lane[K], present: ChunkMap) -> None:
        self.key = key
        self.pipeline = pipeline
        self.pool = pool
        self.lane = lane
        self.present = present
        self.todo = bytearray(b"\1") * present.chunks
        if present.count:
            self.todo = bytearray(0 if chunk in present else 1 for chunk in range(present.chunks))
        self.in_flight: dict[int, _Flight[K]] = {}
        self.suspect = False
        self.gave_way = 0
        """How often in a row one of its flights did."""
        self.wanted: set[int] = set()
        """Chunks that readers wait for: from ``demand`` until they arrive or nobody waits any more."""
        self.demands: dict[int, None] = {}
        """Those of them that are not in flight, in the order in which they are to be asked for."""
        self.whole = False
        """Readers wait for all of it."""
        self.background = False
        self.rank = 0
        self.version = 0
        self.heaped = -1
        """The version under which it lies in its lane's heap."""
        self.cursor = 0
        self.held_until = 0.0
        self.last_demand: int | None = None

    @property
    def free(self) -> bool:
        """Whether one more request of it may be in flight."""
        return not self.held_until and not (self.suspect and self.in_flight)

    @property
    def patience(self) -> float:
        return min(SLOW_SECONDS * 2.0 ** min(self.gave_way, 8), MOST_PATIENCE)

    def next_background(self) -> int:
        """The next chunk to ask for from the cursor on, round the end; -1 if none is left."""
        found = self.todo.find(1, self.cursor)
        return found if found >= 0 else self.todo.find(1, 0, self.cursor)


def _wanted(lane: _Lane[K]) -> int:
    """How many requests it would send if there were room."""
    return sum(len(entry.demands) for entry in lane.demanded.values()) or 1


class FillPlan(Generic[K]):
    """``connections``: requests in flight per origin key; ``headroom``: how many more demands may have, half of which
    one pipeline leaves to the others."""

    def __init__(self, connections: int, headroom: int = 4) -> None:
        self._connections = connections
        self._headroom = headroom
        self._reserve = headroom // 2
        self._paused_until = 0.0
        self._background = True
        self._pools: dict[Hashable, _Pool[K]] = {}
        self._entries: dict[K, _Entry[K]] = {}
        self._pipelines: dict[str, dict[K, _Entry[K]]] = {}
        self._held: list[tuple[float, int, _Entry[K]]] = []
        self._sequence = itertools.count(1)
        self._latest_demand: dict[str, K] = {}
        self._first: dict[str, int] = {}
        """Per pipeline, a rank below which none of its files was ever put: the next in front goes below it."""
        self._last: dict[str, int] = {}
        """The same at the other end."""

    # -- what is known -------------------------------------------------------------------------------------------

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def add(self, key: K, pipeline: str, origin: Hashable, present: ChunkMap) -> None:
        """Know a file. No effect if it is known. ``present`` is watched, not copied: call ``arrived`` when it grows."""
        if key in self._entries:
            return
        pool, lane = self._lane(origin, pipeline)
        lane.entries += 1
        entry = _Entry(key, pipeline, pool, lane, present)
        self._entries[key] = entry
        self._pipelines.setdefault(pipeline, {})[key] = entry

    def remove(self, key: K) -> None:
        """Forget a file: its requests in flight no longer count. No effect if it is unknown."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        for chunk in list(entry.in_flight):
            self._landed(entry, chunk)
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
        """From now on ask another origin for this file (the next link of its chain of sources)."""
        entry = self._entries[key]
        entry.lane.demanded.pop(key, None)
        entry.version += 1
        entry.suspect, entry.gave_way = False, 0
        self._leave_lane(entry)
        entry.pool, entry.lane = self._lane(origin, entry.pipeline)
        entry.lane.entries += 1
        self._ready(entry)

    def refill(self, key: K) -> None:
        """``present`` lost chunks (a failed fdatasync): look at it again."""
        entry = self._entries[key]
        for chunk in range(entry.present.chunks):
            entry.todo[chunk] = 0 if chunk in entry.present or chunk in entry.in_flight else 1
        for chunk in entry.wanted:
            if entry.todo[chunk]:
                entry.demands[chunk] = None
        self._ready(entry)

    # -- what is wanted ------------------------------------------------------------------------------------------

    def demand(self, key: K, chunks: Iterable[int]) -> bool:
        """Readers wait for these chunks, until they arrive, ``undemand`` is called or the file is removed: a failed
        request changes nothing about that. True if any of them must still be asked for (or was, just before)."""
        entry = self._entries[key]
        fresh = False
        for chunk in chunks:
            if chunk in entry.present:
                continue
            entry.last_demand = chunk
            entry.wanted.add(chunk)
            if chunk in entry.in_flight:
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
        """Nobody waits for these chunks any more. What is in flight goes on; it is not asked for again on their behalf.
        No effect if the file is unknown."""
        entry = self._entries.get(key)
        if entry is None:
            return
        for chunk in chunks:
            entry.wanted.discard(chunk)
            entry.demands.pop(chunk, None)
        if not entry.demands:
            entry.lane.demanded.pop(key, None)

    def demand_whole(self, key: K) -> None:
        """Readers wait for all of this file, until ``undemand_whole``: it is filled whatever the order says."""
        self._entries[key].whole = True
        self.add_background(key)

    def undemand_whole(self, key: K) -> None:
        """Nobody waits for all of it any more; it keeps its place in the order that holds now. No effect if the file is
        unknown."""
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
        """Fill these files too, in this order, after what the pipeline's order holds. The file demanded last, if it is
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
        """Fill the whole of this file, before the rest of its pipeline. No effect if it is filled in its turn."""
        entry = self._entries[key]
        if entry.background:
            return
        entry.background = True
        entry.rank = self._in_front(entry.pipeline)
        entry.version += 1
        self._ready(entry)

    # -- what happened -------------------------------------------------------------------------------------------

    def arrived(self, key: K, chunk: int) -> None:
        """The chunk is present. Chunks that nobody asked for are taken as well."""
        entry = self._entries.get(key)
        if entry is None:
            return
        self._landed(entry, chunk)
        entry.todo[chunk] = 0
        entry.demands.pop(chunk, None)
        entry.wanted.discard(chunk)
        entry.suspect, entry.gave_way = False, 0
        if not entry.demands:
            entry.lane.demanded.pop(key, None)
        self._ready(entry)

    def progressed(self, key: K, chunk: int, count: int, now: float) -> None:
        """``count`` more bytes of a request in flight have come."""
        entry = self._entries.get(key)
        flight = entry.in_flight.get(chunk) if entry is not None else None
        if flight is not None:
            flight.received += count
            if flight.received >= SLOW_RATE * (now - flight.since):
                flight.since, flight.received = now, 0

    def pause(self, until: float) -> None:
        """Background requests bring nothing until then, which is not their fault."""
        self._paused_until = until

    def failed(self, key: K, chunk: int, *, held_until: float = 0.0, suspect: bool = False) -> None:
        """The request came to nothing: it is asked for again, not before ``held_until`` (for the whole file).
        ``suspect``: it may be the file's fault."""
        entry = self._entries.get(key)
        if entry is None or chunk not in entry.in_flight:
            return
        self._landed(entry, chunk)
        self._suspect(entry, suspect)
        if chunk in entry.present:
            return
        entry.todo[chunk] = 1
        if chunk in entry.wanted:
            entry.demands[chunk] = None
        if chunk < entry.cursor:
            entry.cursor = chunk
        self.hold(key, held_until)
        self._ready(entry)

    def hold(self, key: K, until: float) -> None:
        """Ask nothing for this file before ``until``. Holding never shortens an earlier hold: ``release`` ends it."""
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
        """Ask nothing of this origin before ``until`` (a Retry-After)."""
        pool = self._pool(origin)
        pool.held_until = max(pool.held_until, until)

    def set_limit(self, origin: Hashable, limit: int | None, pipeline: str | None = None) -> None:
        """What a breaker allows of the origin, to all or to one pipeline: None = as much as there is, 0 = nothing, 1 =
        a probe."""
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
        """Everything that should be sent now; it counts as in flight from here on.

        ``background``: False = demands only.
        """
        self._background = background
        while self._held and self._held[0][0] <= now:
            until, _, entry = heapq.heappop(self._held)
            if self._entries.get(entry.key) is entry and entry.held_until == until:
                entry.held_until = 0.0
                self._ready(entry)
        requests: list[Request[K]] = []
        for pool in self._pools.values():
            if pool.held_until > now:
                continue
            ceiling = self._ceiling(pool)
            while pool.in_flight < ceiling:
                request = self._take(pool, ceiling, now, background=background)
                if request is None:
                    break
                requests.append(request)
        return requests

    def give_way(self, now: float) -> list[Request[K]]:
        """The requests to stop now, since others wait: they count as failed, and are asked for again in their turn.

        Call it after ``next_requests``, and that again when it has found any.
        """
        stopped: list[Request[K]] = []
        for pool in self._pools.values():
            if pool.held_until > now or pool.limit is not None:
                continue
            for flight in self._slow(pool, now):
                entry = flight.entry
                if entry.in_flight.get(flight.chunk) is not flight:
                    continue
                stopped.append(Request(entry.key, flight.chunk, flight.demand))
                entry.gave_way += 1
                self.failed(entry.key, flight.chunk, suspect=True)
        return stopped

    def next_time(self, now: float) -> float | None:
        """When ``next_requests`` may have more to say although nothing happened; None = not by time alone."""
        while self._held:
            until, _, entry = self._held[0]
            if self._entries.get(entry.key) is entry and entry.held_until == until:
                break
            heapq.heappop(self._held)
        times = [self._held[0][0]] if self._held else []
        times += [pool.held_until for pool in self._pools.values() if pool.held_until > now and self._has_work(pool)]
        for pool in self._pools.values():
            if pool.held_until <= now and pool.limit is None and self._waiting(pool):
                flights = (flight for lane in pool.lanes.values() for flight in lane.flights)
                times += [when for flight in flights if (when := self._slow_at(flight)) > now]
        return min(times, default=None)

    def in_flight(self, origin: Hashable) -> int:
        pool = self._pools.get(origin)
        return pool.in_flight if pool is not None else 0

    def idle(self, origin: Hashable, pipeline: str) -> bool:
        """Whether nothing of the pipeline is in flight there or would be sent if it might."""
        pool = self._pools.get(origin)
        lane = pool.lanes.get(pipeline) if pool is not None else None
        return lane is None or not (lane.flights or lane.demanded or self._top(lane) is not None)

    def keys_of(self, origin: Hashable, pipeline: str | None = None) -> list[K]:
        """The files (of one pipeline) that are asked of this origin. O(files): for rare events only."""
        pool = self._pools.get(origin)
        entries = self._entries.values() if pipeline is None else self._pipelines.get(pipeline, {}).values()
        return [entry.key for entry in entries if entry.pool is pool]

    def queued(self) -> int:
        """How many chunks are wanted and not in flight. O(files)."""
        return sum(entry.todo.count(1) if entry.background else len(entry.demands) for entry in self._entries.values())

    # -- inside --------------------------------------------------------------------------------------------------

    def _in_front(self, pipeline: str) -> int:
        """A rank before all others of the pipeline, in constant time."""
        self._first[pipeline] = rank = self._first.get(pipeline, 0) - 1
        return rank

    def _leave_lane(self, entry: _Entry[K]) -> None:
        entry.lane.entries -= 1
        self._drop_idle(entry.pool, entry.lane, entry.pipeline)

    def _drop_idle(self, pool: _Pool[K], lane: _Lane[K], pipeline: str) -> None:
        """Drop the lane with its last file and flight, and the pool with its last lane unless it still has something to
        say."""
        if lane.entries or lane.flights:
            return
        if pool.lanes.get(pipeline) is lane:
            del pool.lanes[pipeline]
        if not (pool.lanes or pool.in_flight or pool.held_until or pool.limit is not None or pool.limits):
            for origin in [origin for origin, known in self._pools.items() if known is pool]:
                del self._pools[origin]

    def _pool(self, origin: Hashable) -> _Pool[K]:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = _Pool()
        return pool

    def _lane(self, origin: Hashable, pipeline: str) -> tuple[_Pool[K], _Lane[K]]:
        pool = self._pool(origin)
        lane = pool.lanes.get(pipeline)
        if lane is None:
            lane = pool.lanes[pipeline] = _Lane()
            lane.limit = pool.limits.get(pipeline)
        return pool, lane

    def _ready(self, entry: _Entry[K]) -> None:
        """Put the entry where ``_take_…`` looks, if it may be asked for."""
        if not entry.free:
            return
        if entry.demands:
            entry.lane.demanded[entry.key] = entry
        if entry.background and entry.heaped != entry.version and entry.next_background() >= 0:
            entry.heaped = entry.version
            heapq.heappush(entry.lane.background, (entry.rank, entry.version, next(self._sequence), entry))

    def _top(self, lane: _Lane[K]) -> _Entry[K] | None:
        while lane.background:
            _, version, _, entry = lane.background[0]
            if version == entry.version and entry.background and entry.free and entry.next_background() >= 0:
                return entry
            heapq.heappop(lane.background)
            if version == entry.heaped:
                entry.heaped = -1
        return None

    def _has_work(self, pool: _Pool[K]) -> bool:
        return any(lane.demanded or self._top(lane) is not None for lane in pool.lanes.values())

    def _suspect(self, entry: _Entry[K], suspect: bool) -> None:
        if not suspect:
            return
        entry.suspect = True
        if entry.in_flight:
            entry.lane.demanded.pop(entry.key, None)

    def _ceiling(self, pool: _Pool[K]) -> int:
        ceiling = self._connections + self._headroom
        return ceiling if pool.limit is None else min(ceiling, pool.limit)

    def _may(self, lane: _Lane[K], ceiling: int) -> bool:
        """Whether one more request of it may be in flight."""
        most = max(ceiling - self._reserve, 1)
        return lane.in_flight < (most if lane.limit is None else min(most, lane.limit))

    def _take(self, pool: _Pool[K], ceiling: int, now: float, *, background: bool) -> Request[K] | None:
        """The next request of this pool, which has room for one."""
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
                    return self._send_background(starved, now)
            return self._send_demand(demanding, now)
        if not background:
            return None
        if pool.in_flight >= min(self._connections, ceiling):
            # Beyond its connections demands alone have a place, and who has none.
            lanes = [lane for lane in lanes if not lane.flights] if pool.demands else []
        chosen = self._best(lanes)
        return self._send_background(chosen, now) if chosen is not None else None

    def _best(self, lanes: Iterable[_Lane[K]]) -> _Entry[K] | None:
        """The entry whose background comes next."""
        best: tuple[int, int] | None = None
        chosen: _Entry[K] | None = None
        for lane in lanes:
            place = (lane.in_flight, lane.served)
            if lane.background and (best is None or place < best):
                top = self._top(lane)
                if top is not None:
                    best, chosen = place, top
        return chosen

    def _send_demand(self, lane: _Lane[K], now: float) -> Request[K]:
        key, entry = next(iter(lane.demanded.items()))
        chunk = next(iter(entry.demands))
        del entry.demands[chunk]
        del lane.demanded[key]
        request = self._sent(entry, chunk, now, demand=True)
        if entry.demands and entry.free:
            lane.demanded[key] = entry  # to the back: readers of several files take turns
        return request

    def _send_background(self, entry: _Entry[K], now: float) -> Request[K]:
        chunk = entry.next_background()
        entry.cursor = chunk + 1
        demand = chunk in entry.demands
        if demand:
            del entry.demands[chunk]
            if not entry.demands:
                entry.lane.demanded.pop(entry.key, None)
        return self._sent(entry, chunk, now, demand=demand)

    def _sent(self, entry: _Entry[K], chunk: int, now: float, *, demand: bool) -> Request[K]:
        pool, lane = entry.pool, entry.lane
        entry.todo[chunk] = 0
        flight = entry.in_flight[chunk] = _Flight(entry, chunk, demand, now)
        pool.in_flight += 1
        pool.demands += demand
        lane.flights[flight] = None
        lane.demands += demand
        lane.served = next(self._sequence)
        return Request(entry.key, chunk, demand)

    def _landed(self, entry: _Entry[K], chunk: int) -> None:
        flight = entry.in_flight.pop(chunk, None)
        if flight is not None:
            flight.pool.in_flight -= 1
            flight.pool.demands -= flight.demand
            del flight.lane.flights[flight]
            flight.lane.demands -= flight.demand
            self._drop_idle(flight.pool, flight.lane, entry.pipeline)

    # -- giving way ----------------------------------------------------------------------------------------------

    def _slow_at(self, flight: _Flight[K]) -> float:
        """When it counts as slow, if nothing more comes until then."""
        since = flight.since if flight.demand else max(flight.since, self._paused_until)
        return since + flight.entry.patience

    def _waiting(self, pool: _Pool[K]) -> list[_Lane[K]]:
        """Lanes that have something to ask for and found no place, though nothing but the pool's size forbids it."""
        return [
            lane
            for lane in pool.lanes.values()
            if lane.limit is None
            and (lane.demanded or (self._background and not lane.flights and self._top(lane) is not None))
        ]

    def _slow(self, pool: _Pool[K], now: float) -> list[_Flight[K]]:
        waiting = self._waiting(pool)
        if not waiting:
            return []
        ceiling = self._ceiling(pool)
        share = max(ceiling // sum(1 for lane in pool.lanes.values() if lane.flights or lane in waiting), 1)
        needed = sum(min(share - lane.in_flight, _wanted(lane)) for lane in waiting if lane.in_flight < share)
        found: list[_Flight[K]] = []
        for lane in sorted(pool.lanes.values(), key=lambda lane: -lane.in_flight):
            slow = sorted((flight for flight in lane.flights if self._slow_at(flight) <= now), key=self._slow_at)
            found += slow[: max(min(lane.in_flight - share, needed - len(found)), 0)]
        if not found and any(not lane.flights for lane in waiting):
            for lane in pool.lanes.values():
                if len(lane.flights) == 1 and share == 1:
                    (flight,) = lane.flights
                    if self._slow_at(flight) + (LAST_FACTOR - 1) * flight.entry.patience <= now:
                        return [flight]
        for lane in waiting:
            # Within a pipeline: one file's slow requests give way to a file that has none.
            others = sum(1 for entry in lane.demanded.values() if not entry.in_flight)
            if others and not any(flight.lane is lane for flight in found):
                spare = (f for f in lane.flights if len(f.entry.in_flight) > 1 and self._slow_at(f) <= now)
                found += sorted(spare, key=self._slow_at)[:others]
        return found

    def state(self, origin: Hashable) -> PoolState:
        pool = self._pool(origin)
        mine = (entry for entry in self._entries.values() if entry.pool is pool)
        queued = sum(1 for entry in mine if entry.demands or entry.background)
        return PoolState(pool.in_flight, pool.demands, queued)
