"""What the filler is told, what it tells, and what it remembers of each file that it fills. Values and bookkeeping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from instantstart_fs.core.faults import Streak
from instantstart_fs.core.histogram import Histogram
from instantstart_fs.core.retry import Backoff
from instantstart_fs.core.serving import ServeUnsealed

if TYPE_CHECKING:
    from instantstart_fs.errors import InstantStartError
    from instantstart_fs.filler.pool import Worker
    from instantstart_fs.filler.sources import Source
    from instantstart_fs.filler.target import FillTarget
    from instantstart_fs.origins.base import Location


class FillSettings(msgspec.Struct, frozen=True):
    """``connections``: fetches at once per origin and credentials, over all workers. Sizes in bytes, times in seconds.

    ``demand_headroom``: how many more fetches demands may have. ``demand_pause``: how long background fetches leave
    their sockets unread for a demand, at most.
    """

    workers: int = 2
    connections: int = 16
    read_deadline: float = 60.0
    serve_unsealed: ServeUnsealed = "auto"
    commit_bytes: int = 256 * 1024 * 1024
    commit_seconds: float = 1.0
    connect_timeout: float = 10.0
    stall_timeout: float = 15.0
    locate_timeout: float = 30.0
    demand_headroom: int = 4
    demand_pause: float = 2.0
    backoff: Backoff = Backoff()


class FillEvents(Protocol):
    """What the library is told; sync, on the trio thread. Must not raise."""

    def chunk_present(self, target: FillTarget, chunk: int) -> None: ...

    def target_sealed(self, target: FillTarget) -> None:
        """Sealed or unverified: the blob has its seal record and the index says so."""
        ...

    def target_poisoned(self, target: FillTarget, error: InstantStartError) -> None:
        """A digest mismatch: the target has failed, its record is the next incarnation's, its blob is unlinked. Put a
        fresh FillTarget in its place; call ``demand`` or ``fill`` for it to be fetched again."""
        ...

    def target_failed(self, target: FillTarget, error: InstantStartError) -> None:
        """For good, but for what ``demand`` revives."""
        ...

    def failure(self, target: FillTarget, error: InstantStartError | None) -> None:
        """Transient; None = over."""
        ...


class BreakerState(msgspec.Struct, frozen=True):
    origin: str
    state: str
    in_flight: int


class FillStatistics(msgspec.Struct, frozen=True):
    """``queued`` chunks are wanted and not in flight. ``fetched_from``: bytes by scheme and endpoint."""

    workers: int
    worker_deaths: int
    files: int
    in_flight: int
    queued: int
    retries: int
    fetched_bytes: int
    commits: int
    poisoned: int
    index_stuck: bool
    fetched_from: tuple[tuple[str, int], ...]
    origins: tuple[BreakerState, ...]
    retried: tuple[tuple[tuple[str, str], int], ...] = ()
    """Requests that failed, by origin (as in ``fetched_from``) and error code."""
    answers: tuple[tuple[str, Histogram], ...] = ()
    """Seconds from a request to the first byte of its answer, by origin."""


class Sent:
    """A request on its way. ``worker`` is None until it was given to one; ``counted`` bytes are in the rate already;
    ``url``: the address that it is fetched from, None while that is not known."""

    __slots__ = ("answered", "chunk", "counted", "demand", "filling", "generation", "number", "url", "worker")

    def __init__(self, number: int, filling: Filling, chunk: int, demand: bool) -> None:
        self.number = number
        self.filling = filling
        self.chunk = chunk
        self.demand = demand
        self.worker: Worker | None = None
        self.counted = 0
        self.answered: float | None = None
        """Seconds until its answer began."""
        self.generation = 0
        self.url: str | None = None


class Filling:
    """The filler's side of one target. ``file``: its number at ``worker``, 0 = not open there."""

    def __init__(self, target: FillTarget, links: tuple[Source, ...]) -> None:
        self.target = target
        self.links = links
        self.link = 0
        self.location: Location | None = None
        self.generation = 0
        """Counts the locations, so that a late failure of an old one does not spend the new one."""
        self.may_foresee = True
        """False once it was not where it had been foreseen."""
        self.worker: Worker | None = None
        self.file = 0
        self.preparing = False
        self.waiting: list[Sent] = []
        self.sent: set[Sent] = set()
        self.failures = 0
        self.slow = False
        """One of its requests gave way to others' since a chunk of it last came."""
        self.held_until = 0.0
        self.refused = 0
        """How often in a row its source refused it."""
        self.stale = 0
        """How often in a row an address was refused by who is no source (a CDN, a proxy)."""
        self.missing = 0
        self.streak = Streak()
        self.streaming = False
        """One request takes all of the file (a server that ignores ranges), and nothing else is asked for meanwhile."""
        self.hash_failures = 0
        self.hashed: str | None = None
        self.sealing = False
        self.done = False

    def renew(self) -> None:
        """Its address is no good: ask for another before the next fetch."""
        self.location = None
        self.generation += 1

    @property
    def source(self) -> Source:
        return self.links[self.link]
