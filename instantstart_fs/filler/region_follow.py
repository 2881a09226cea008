"""What the parts of a region's filling share: a file that is followed, the tiers, and how they fare."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import msgspec
import trio

from instantstart_fs.core import rendezvous
from instantstart_fs.core.manifest import ManifestFile
from instantstart_fs.core.region import GROUP_CHUNKS, PullPlan
from instantstart_fs.core.retry import Breaker
from instantstart_fs.errors import InstantStartError, OriginMisbehaved, OriginNotFound, OriginUnavailable
from instantstart_fs.filler.events import UpstreamHealth
from instantstart_fs.filler.fill import FetchRequest, Fill
from instantstart_fs.filler.tierkey import TierKey
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.origins.base import Location, OriginKey

if TYPE_CHECKING:
    from instantstart_fs.regional.keys import RegionKey
    from instantstart_fs.regional.records import Seal
    from instantstart_fs.regional.store import TierStore

log = logging.getLogger(__name__)

ASK_SECONDS = 4.0
"""For one answer of the tier to what is no chunk."""
LAG_KEPT = 0.9
"""How much of the slowest answer's time the next one leaves."""
THREADS = 16
_T = TypeVar("_T")


class TierSource:
    """A tier as the counters know it, and how it fares. It locates nothing: its chunks are objects of their own.

    ``told``: why it was left alone, "" once it has answered again; ``told_at_ns``: the wall clock when that began, 0
    while not. ``asked``: it has answered, or failed. ``upstream``: it is another region's.
    """

    def __init__(self, store: TierStore, secret: RegionKey, *, upstream: bool = False) -> None:
        self.store = store
        self.secret = secret
        self._kind = "upstream" if upstream else "regional"
        self.key = OriginKey("tier", store.endpoint, "")
        self.breaker = Breaker(threshold=3, grace=0.0, window=1.0, first=5.0, cap=120.0)
        self.asked = False
        self.told = ""
        self.told_at_ns = 0

    def is_broken(self) -> bool:
        """Whether it is left alone now."""
        return self.breaker.limit(trio.current_time()) == 0

    def answered(self) -> None:
        self.asked = True
        self.breaker.succeeded()
        if self.told:
            log.info("the %s tier %s answers again", self._kind, self.store.endpoint)
        self.told, self.told_at_ns = "", 0

    def failed(self, error: InstantStartError) -> bool:
        """It did not do what it was asked. Whether it is to be left alone for a while."""
        self.asked = True
        if not (self.breaker.failed(trio.current_time(), 1.0) or self.is_broken()):
            return False
        if not self.told:
            log.warning("the %s tier %s is left alone for a while: %s", self._kind, self.store.endpoint, error.message)
            self.told_at_ns = time.time_ns()
        self.told = error.message
        return True

    def locate(self, file: ManifestFile) -> Location:
        raise OriginUnavailable(f"{file.path}: a tier keeps no files")


class WriteRate:
    """What a host may write to its tier, whatever writes: ``rate`` bytes a second, None = any. On the trio thread."""

    def __init__(self, rate: int | None) -> None:
        self.rate = rate
        self._until = 0.0

    async def wait(self, length: int) -> None:
        """Until ``length`` bytes more are within the rate."""
        if self.rate is not None:
            self._until = max(self._until, trio.current_time()) + length / self.rate
            await trio.sleep_until(self._until)


class RegionSettings(msgspec.Struct, frozen=True):
    """``stores``: the region's own tier, then those asked before the origin; ``keys``: of each. ``trust_seals``: a file
    whose every chunk is what a seal of the region says is not hashed here. ``rate``: that of write-back and of startup
    caches together. ``recheck``: seconds after which an origin is asked again whether a pipeline may be read, None =
    it is not. ``rack``: whose hosts give each other chunks, "" = they do not. ``life``: tells this process from another
    that calls itself the same host."""

    host: str
    key: RegionKey
    stores: tuple[TierStore, ...]
    keys: tuple[RegionKey, ...]
    trust_seals: bool = True
    write_back: bool = True
    rate: WriteRate = WriteRate(None)
    recheck: float | None = None
    rack: str = ""
    life: str = msgspec.field(default_factory=lambda: secrets.token_hex(8))

    @property
    def me(self) -> str:
        """This host, in this life of its daemon."""
        return f"{self.host}/{self.life}"


class Place(NamedTuple):
    """Names of a file in one tier: they depend on its key."""

    slot: str
    pin: str


class Line:
    """What of a file a host of a rack takes, when and from whom (filler/region_rack.py)."""

    def __init__(self) -> None:
        self.waiting: deque[int] = deque()
        """Chunks that the tier has, in this host's order."""
        self.ahead: set[int] = set()
        """Those of them that were opened and have not come."""
        self.owed: set[int] = set()
        """Chunks that a neighbour asks this host for: it takes them from the tier itself."""
        self.tried: dict[int, int] = {}
        """How many neighbours did not give a chunk."""


class Follow:
    """A file under the region. ``state``: fresh (nobody asked for it) | waiting (for its turn) | asking (for a seal) |
    sealed | parked (no seal; waits for its turn to be followed) | followed | pulled (all of it by this host) |
    upstream (only other regions' tiers are asked) | off (no tier is).

    ``own_left``: the region's own tier is asked for nothing more of it.
    ``score``: of this host for it; the higher, the sooner it is this host's turn among files that it could pull whole.
    """

    def __init__(self, fill: Fill, places: list[Place], pull: PullPlan) -> None:
        self.fill = fill
        self.target = fill.target
        self.key = fill.target.key
        self.tier_key = TierKey(self.key.pipeline, self.key.generation, self.key.index)
        self.places = places
        """Of the file in each tier."""
        self.slot, self.pin = places[0]
        self.pull = pull
        self.state = "fresh"
        self.own_left = False
        self.score = rendezvous.score(pull.host, self.pin) if pull.groups == 1 else 0
        self.closed = False
        self.seals: dict[int, Seal] = {}
        self.digests: dict[int, bytes] = {}
        self.proven: set[int] = set()
        self.line = Line()
        """Of chunks that the tier has, which a host of a rack opens one after the other."""
        self.began_empty = fill.target.present.count == 0
        self.flights: dict[int, tuple[FetchRequest, float, int]] = {}
        """By chunk: the request, when it was sent (FairClock), which source."""
        self.last_byte: dict[int, float] = {}
        self.unclaimed: dict[int, int] = {}
        """By group, how often the tier did not take a claim of it."""
        self.to_put: set[int] = set()
        self.put: set[int] = set()
        self.fd = -1
        self.sealed_here = ""
        """What this host has proven it by, once it has."""
        self.changed = trio.Event()
        self.listed_at = -math.inf
        self.ended = False
        self.decided = False
        """The file is complete here, and whatever follows of that was begun."""

    def is_putting(self, group: int) -> bool:
        """Whether some of this group of chunks is still to be put into the tier."""
        return any(chunk // GROUP_CHUNKS == group for chunk in self.to_put)

    def over(self) -> bool:
        """Nothing more is to be found out of it in any tier."""
        return self.ended or self.state in ("upstream", "off")

    def close(self) -> None:
        """Nothing more is put of it."""
        self.closed = True
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def reason_of(error: InstantStartError) -> str:
    """Why a tier did not give a chunk: missing | wrong | failed."""
    if isinstance(error, OriginNotFound):
        return "missing"
    return "wrong" if isinstance(error, OriginMisbehaved) else "failed"


async def ask_tier(call: Callable[[], _T], seconds: float, threads: trio.CapacityLimiter) -> _T:
    """Return what a call that waits for a tier's storage does, run in a thread that is given up after ``seconds``: then
    raises OriginUnavailable. Else raises whatever the call does."""
    try:
        return await run_abandonable(call, deadline=seconds, limiter=threads)
    except trio.TooSlowError:
        raise OriginUnavailable(f"the regional tier does not answer within {seconds:g} s") from None


class Routes(Protocol):
    """What claims and answers of the tier change (filler/regional.py)."""

    def apply(self, follow: Follow) -> None:
        """Open each chunk where its plan says."""
        ...

    def turn_off(self, follow: Follow) -> None:
        """Ask the tiers for nothing more of this file."""
        ...

    def leave_own(self, follow: Follow) -> None:
        """Ask the region's own tier for nothing more of this file."""
        ...

    def go_upstream(self, follow: Follow) -> None:
        """The own tier was left, and it is known what upstream tiers have of the file."""
        ...

    def tier_failed(self, source: int, error: InstantStartError) -> None:
        """This tier did not do what it was asked."""
        ...


class Tiers:
    """The tiers, and the threads that wait for them. On the trio thread. A tier of another region that fails is no
    reason to leave the region's own alone, and the other way round.

    ``fallbacks``: by reason, how often something was not had from a tier.
    """

    def __init__(self, settings: RegionSettings) -> None:
        pairs = zip(settings.stores, settings.keys, strict=True)
        self.sources = [TierSource(store, key, upstream=bool(at)) for at, (store, key) in enumerate(pairs)]
        self.threads = trio.Semaphore(THREADS)
        self._abandoned = trio.CapacityLimiter(4 * THREADS)
        """Threads that were given up end by themselves, within the store's own deadlines."""
        self.nursery: trio.Nursery | None = None
        """While filling runs."""
        self.writes = Breaker(threshold=3, grace=0.0, window=1.0, first=10.0, cap=600.0)
        """Of what is put into the region's own tier: one that is full, or read-only, still serves."""
        self.lag = 0.0
        """Seconds that the slowest answer took of late."""
        self.fallbacks: dict[str, int] = {}

    @property
    def own(self) -> TierSource:
        """The region's own."""
        return self.sources[0]

    @property
    def left_alone(self) -> tuple[tuple[str, bool], ...]:
        """Of each tier, by endpoint. Heartbeats find out when the own one is well again; an upstream one is tried by
        the next fill."""
        alone = [bool(self.own.told), *(tier.is_broken() for tier in self.sources[1:])]
        return tuple((tier.store.endpoint, this) for tier, this in zip(self.sources, alone, strict=True))

    @property
    def upstream(self) -> tuple[UpstreamHealth, ...]:
        return tuple(
            UpstreamHealth(tier.store.endpoint, tier.asked, tier.told, tier.told_at_ns) for tier in self.sources[1:]
        )

    @property
    def upstream_answers(self) -> bool:
        """Whether some upstream tier may be asked now."""
        return any(not tier.is_broken() for tier in self.sources[1:])

    def count(self, reason: str) -> None:
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def takes_writes(self) -> bool:
        return self.writes.limit(trio.current_time()) != 0

    async def ask(self, call: Callable[[], _T], source: int = 0) -> _T:
        """In a thread that is given up after ASK_SECONDS. Raises InstantStartError, whatever the call raises: what a
        tier answers is not worth the filler. ``source``: which tier is asked; how slow another one is says nothing
        about claims in the region's own."""
        async with self.threads:  # waiting for a thread is no silence of the tier
            began = trio.current_time()
            try:
                return await ask_tier(call, ASK_SECONDS, self._abandoned)
            except InstantStartError:
                raise
            except Exception as error:
                log.exception("the regional tier's answer is not understood")
                said = f"the regional tier's answer is not understood ({type(error).__name__})"
                raise OriginUnavailable(said) from error
            finally:
                if source == 0:
                    self.lag = max(trio.current_time() - began, self.lag * LAG_KEPT)
