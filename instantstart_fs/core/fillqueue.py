"""The fill plan's tables: files, the requests in flight, and the pools and lanes that share an origin's connections.

Values and their bookkeeping only: which request is sent next is decided in core/fairshare.py, what is wanted in
core/fillplan.py.

- An **entry** is a file that is not complete.
- A **pool** is one origin key, with its limit of requests in flight.
- A **lane** is one pipeline within one pool.
- A **flight** is one request in flight. It keeps the pool and the lane that it was sent in, whatever becomes of its
  file.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

from instantstart_fs.core.chunks import ChunkMap

K = TypeVar("K", bound=Hashable)
"""The type of a file's key (FileKey)."""

SLOW_SECONDS = 2.0
"""A flight slower than SLOW_RATE for this long may be preempted by one that waits. The time doubles each time, so that
an origin that is slow for everybody still gets requests through."""
SLOW_RATE = 16 * 1024
"""Bytes a second below which a flight counts as slow."""
MOST_PATIENCE = 32.0


class Request(msgspec.Struct, Generic[K], frozen=True):
    """Fetch this chunk now. ``demand``: a reader waits for it."""

    key: K
    chunk: int
    demand: bool


class Flight(Generic[K]):
    """A request in flight. ``since``: start of the interval in which ``received`` bytes came; it restarts while the
    flight is fast enough."""

    __slots__ = ("chunk", "demand", "entry", "lane", "pool", "received", "since")

    def __init__(self, entry: Entry[K], chunk: int, demand: bool, now: float) -> None:
        self.entry = entry
        self.chunk = chunk
        self.pool = entry.pool
        self.lane = entry.lane
        self.demand = demand
        self.since = now
        self.received = 0


class Lane(Generic[K]):
    __slots__ = ("background", "demanded", "demands", "entries", "flights", "limit", "served")

    def __init__(self) -> None:
        self.entries = 0
        """Files that use this lane now; without any it is dropped."""
        self.flights: dict[Flight[K], None] = {}
        self.demands = 0
        """Flights that are demands."""
        self.limit: int | None = None
        self.served = 0
        self.demanded: dict[K, Entry[K]] = {}
        """Entries with demands that can be sent now, in order of arrival."""
        self.background: list[tuple[int, int, int, Entry[K]]] = []
        """A heap of (rank, version, tie-breaker, entry). Stale where the entry's version has changed."""

    @property
    def in_flight(self) -> int:
        return len(self.flights)


class Pool(Generic[K]):
    __slots__ = ("demands", "held_until", "in_flight", "lanes", "limit", "limits")

    def __init__(self) -> None:
        self.in_flight = 0
        self.demands = 0
        self.limit: int | None = None
        self.limits: dict[str, int] = {}
        """Limits of single pipelines."""
        self.held_until = 0.0
        self.lanes: dict[str, Lane[K]] = {}


class Entry(Generic[K]):
    __slots__ = (
        "background",
        "cursor",
        "demands",
        "heaped",
        "held_until",
        "in_flight",
        "key",
        "lane",
        "last_demand",
        "pipeline",
        "pool",
        "preempted",
        "present",
        "rank",
        "shut",
        "suspect",
        "todo",
        "version",
        "wanted",
        "whole",
    )

    def __init__(self, key: K, pipeline: str, pool: Pool[K], lane: Lane[K], present: ChunkMap) -> None:
        self.key = key
        self.pipeline = pipeline
        self.pool = pool
        self.lane = lane
        self.present = present
        self.todo = bytearray(b"\1") * present.chunks
        if present.count:
            self.todo = bytearray(0 if chunk in present else 1 for chunk in range(present.chunks))
        self.in_flight: dict[int, Flight[K]] = {}
        self.shut: set[int] = set()
        """Chunks that are not to be requested: they come from elsewhere."""
        self.suspect = False
        self.preempted = 0
        """How often in a row one of its flights was preempted."""
        self.wanted: set[int] = set()
        """Chunks that readers wait for, from ``demand`` until arrival or ``undemand``."""
        self.demands: dict[int, None] = {}
        """Those of ``wanted`` that are not in flight, in the order to request them."""
        self.whole = False
        """Readers wait for the whole file."""
        self.background = False
        self.rank = 0
        self.version = 0
        self.heaped = -1
        """The version with which it is in its lane's heap."""
        self.cursor = 0
        self.held_until = 0.0
        self.last_demand: int | None = None

    @property
    def free(self) -> bool:
        """Whether one more request of this file may be in flight."""
        return not self.held_until and not (self.suspect and self.in_flight)

    @property
    def patience(self) -> float:
        """Seconds without progress after which a flight counts as slow."""
        return min(SLOW_SECONDS * 2.0 ** min(self.preempted, 8), MOST_PATIENCE)

    def next_background(self) -> int:
        """The next chunk to request from the cursor on, wrapping round; -1 if none is left."""
        found = self.todo.find(1, self.cursor)
        return found if found >= 0 else self.todo.find(1, 0, self.cursor)
