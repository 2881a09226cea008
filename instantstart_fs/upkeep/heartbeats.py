"""This host's part in knowing where the region is warm. It says what it holds, counts the other living hosts, and
answers where a pipeline is.

A heartbeat is one small object (regional/heartbeats.py). If it cannot be written, nothing fails: it is tried again with
growing pauses, and `status` says that the tier is down. While the tier's breaker is open no heartbeat is tried.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Pipeline
from instantstart_fs.core import placement
from instantstart_fs.core.placement import Holding, Placement
from instantstart_fs.core.retry import Backoff
from instantstart_fs.core.status import TierStatus, UpstreamStatus
from instantstart_fs.errors import InstantStartError, OriginUnavailable
from instantstart_fs.filler.events import UpstreamHealth
from instantstart_fs.filler.region_follow import ask_tier
from instantstart_fs.filler.regional import Regional
from instantstart_fs.regional import heartbeats, hygiene
from instantstart_fs.regional.heartbeats import HeartbeatReader, HostRecord
from instantstart_fs.views.pipelines import Pipelines
from instantstart_fs.views.status import rfc3339

log = logging.getLogger(__name__)

FIRST_BEAT = 2.0
"""Seconds after the start, at most."""
TICK_SECONDS = 1.0
SOONEST_BEAT = 5.0
"""Seconds between two heartbeats at least, though something has become warm."""
ASK_SECONDS = 10.0
"""Seconds for one answer of the tier."""
KEEP_SECONDS = 5.0
"""Seconds for which an answer about placement is kept. Who asks more often gets the same one."""
KEEP_SHARE = 20
"""An answer is also kept for so many times the seconds that it took."""
MOST_NAMESAKES = 4
"""Heartbeats of this host's own name that one count reads: who can write to the bucket can put there any number."""
MOST_MET = 16
"""Other lives of this host's own name that a heartbeat names."""
BATCH = 64
"""Pipelines between two pauses."""
_T = TypeVar("_T")


class Written(msgspec.Struct, frozen=True):
    """How far one pipeline is written back; see ``control.protocol.RegionState``."""

    owed_bytes: int
    unsealed: int
    files: int
    sealed: int | None = None


def two_of_one_name(host: str) -> str:
    return f"another host of the region calls itself {host!r}, too; give each its own name ([regional] host)"


def _upstream(tier: UpstreamHealth) -> UpstreamStatus:
    if tier.broken:
        return UpstreamStatus(tier.endpoint, "down", rfc3339(tier.broken_since_ns), tier.broken)
    return UpstreamStatus(tier.endpoint, "ok" if tier.asked else "unknown")


class Heartbeats:
    """The heartbeats of this host, and what it knows of the others. On the trio thread. ``warmed`` grows with each
    pipeline that becomes warm here."""

    def __init__(self, catalog: Catalog, regional: Regional, pipelines: Pipelines, warmed: Callable[[], int]) -> None:
        self._catalog = catalog
        self._regional = regional
        self._settings = regional.settings
        self._pipelines = pipelines
        self._warmed = warmed
        self._store = self._settings.stores[0]
        self._own = self._settings.key.host(self._settings.host)
        self._threads = trio.CapacityLimiter(4)
        """Threads for questions. Beats have threads of their own, so that a tier that hangs on a listing makes no host
        look dead."""
        self._beats = trio.CapacityLimiter(2)
        self._reader = HeartbeatReader(self._store, self._settings.key)
        self._name = ""
        """The object that this host has written."""
        self._has_namesake = False
        self._said: dict[str, HostRecord | None] = {}
        """Heartbeats of this host's own name that others wrote, without what they hold; None for one that is none."""
        self._met: tuple[str, ...] = ()
        """Their lives. One that names this process's own is another host's: each answers the other by naming it."""
        self._told: tuple[str, ...] = ()
        """Those that this host's last heartbeat names."""
        self._storage_clock: tuple[float, float] | None = None
        """The storage's clock and this process's own, at one moment."""
        self._counted_at = -math.inf
        self._failures = 0
        self._state = TierStatus("unknown", None)
        self._looking = trio.Lock()
        self._good_until = -math.inf
        self._look: heartbeats.Look | None = None
        self._no_look: InstantStartError | None = None
        """The reason why the last look told nothing."""

    @property
    def hosts(self) -> int:
        """Return how many hosts of the region live, this one included."""
        return self._regional.hosts

    @property
    def endpoint(self) -> str:
        return f"{self._store.scheme}://{self._store.endpoint}"

    # -- how the tier fares --------------------------------------------------------------------------------------------

    @property
    def tier(self) -> TierStatus:
        """The tier's state: as fills find it, else as heartbeats do."""
        found = self._regional.statistics
        state = TierStatus("down", rfc3339(found.broken_since_ns), found.broken) if found.broken else self._state
        upstream = tuple(_upstream(tier) for tier in found.upstream)
        return msgspec.structs.replace(state, warning=self._warning, upstream=upstream)

    def tier_of(self, pipeline: Pipeline) -> TierStatus:
        """The tier's state for one pipeline, which may be refused."""
        refused = self._regional.refusal(pipeline.id)
        if refused is None:
            return self.tier
        return msgspec.structs.replace(self.tier, state="refused", since=rfc3339(refused[0]), why=refused[1])

    @property
    def _warning(self) -> str:
        return two_of_one_name(self._settings.host) if self._has_namesake else ""

    def _now_is(self, state: TierStatus) -> None:
        if state.state != self._state.state:
            self._state = state
        elif state.why != self._state.why:
            self._state = msgspec.structs.replace(state, since=self._state.since)

    # -- beating -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send heartbeats until cancelled."""
        await trio.sleep(random.random() * FIRST_BEAT)
        while True:
            warmed, began = self._warmed(), trio.current_time()
            if self._regional.answers:
                try:
                    await self.beat()
                except InstantStartError as error:
                    log.debug("no heartbeat: %s", error.message)
                except Exception:
                    log.exception("no heartbeat")
            end = trio.current_time() + self._pause()
            while trio.current_time() < end:
                await trio.sleep(TICK_SECONDS)
                has_news = self._warmed() != warmed or self._met != self._told
                if not self._failures and has_news and trio.current_time() >= began + SOONEST_BEAT:
                    break

    def _pause(self) -> float:
        period = placement.beat_period(self.hosts)
        if self._failures:
            return Backoff(period, max(600.0, period)).delay(self._failures, random.random())
        return period * (1 - placement.JITTER + 2 * placement.JITTER * random.random())

    async def beat(self) -> None:
        """Say what this host holds, and count the others where that is due. Raises InstantStartError."""
        name, data = heartbeats.object_of(self._settings.key, await self._record())
        before, self._name = self._name, name
        try:
            await self._ask(lambda: self._store.put(name, data), self._beats)
        except InstantStartError as error:
            self._failures += 1
            await self._find_out(error)
            raise
        self._failures = 0
        self._regional.answered()
        self._now_is(TierStatus("ok", rfc3339(time.time_ns())))
        if before and before != name:
            with contextlib.suppress(InstantStartError):  # it expires
                await self._ask(lambda: self._store.delete(before), self._beats)
        asked = self._met and not self._has_namesake  # another host may answer
        if asked or trio.current_time() - self._counted_at >= placement.count_period(self.hosts):
            await self._count()

    async def _find_out(self, error: InstantStartError) -> None:
        """Find out whether a tier that could not be written can be read."""
        now = rfc3339(time.time_ns())
        try:
            await self._ask(lambda: next(iter(self._store.list(heartbeats.DIRECTORY, 1)), None), self._beats)
            self._regional.answered()
            self._now_is(TierStatus("read-only", now, error.message))
        except InstantStartError as worse:
            self._now_is(TierStatus("down", now, worse.message))

    async def _count(self) -> None:
        listed = await self._ask(lambda: heartbeats.listed(self._store), self._beats)
        now, found = trio.current_time(), heartbeats.by_host(listed)
        own = {stored.name: stored.modified for host, stored in listed if host == self._own}
        written = own.pop(self._name, None)
        if written is not None:
            self._storage_clock = (written, now)
        alive = heartbeats.living(found, self._storage_now() or heartbeats.newest(found))
        self._regional.hosts = max(1, len(alive))
        self._counted_at = now
        await self._look_for_namesakes(own)

    async def _look_for_namesakes(self, own: dict[str, float]) -> None:
        """Find out whether one of these heartbeats, all of this host's name, is another host's: one that names this
        life. Any other may be what this host said before it was restarted, or be put there again by somebody."""
        now, life = self._storage_now(), self._settings.life
        if now is None:
            return
        names = placement.namesakes(own, now, self.hosts)
        said = {name: self._said[name] for name in names if name in self._said}
        # What was read stays what it is. What could not be may have been put over another host's, which comes again.
        unread = sorted((name for name in names if said.get(name) is None), key=lambda name: name in said)
        for name in unread[:MOST_NAMESAKES]:
            record = await self._ask(partial(heartbeats.read, self._store, self._settings.key, name), self._beats)
            said[name] = None if record is None else msgspec.structs.replace(record, entries=b"")
        self._said = said
        others = [one for name in names if (one := said.get(name)) is not None and one.life not in ("", life)]
        found = any(life in one.met for one in others)
        self._met = tuple(sorted({one.life for one in others[:MOST_MET]}))
        if found and not self._has_namesake:
            log.error("%s", two_of_one_name(self._settings.host))
        self._has_namesake = found

    def _storage_now(self) -> float | None:
        if self._storage_clock is None:
            return None
        there, here = self._storage_clock
        return there + trio.current_time() - here

    async def _record(self) -> HostRecord:
        """Return what is here, the pipelines requested last first."""
        found: list[tuple[str, Holding]] = []
        for position, pipeline in enumerate(list(self._catalog.pipelines.values())):
            if position % BATCH == 0:
                await trio.lowlevel.checkpoint()
            if pipeline.removed:
                continue
            status = self._pipelines.status_of(pipeline)
            if status.cached_bytes or status.state == "filling":
                slot = self._settings.key.slot(pipeline.spec)
                revision = self._settings.key.revision(slot, status.revision)
                holding = Holding(slot, revision, status.state, status.cached_bytes, status.total_bytes)
                found.append((status.last_request or "", holding))
        found.sort(key=lambda item: item[0], reverse=True)
        entries = placement.pack(holding for _, holding in found)
        left_out = max(0, len(found) - placement.MOST_HOLDINGS)
        self._told = self._met
        return HostRecord(self._settings.host, entries, left_out, self._settings.life, self._told)

    async def _ask(self, call: Callable[[], _T], threads: trio.CapacityLimiter | None = None) -> _T:
        return await ask_tier(call, ASK_SECONDS, threads or self._threads)

    # -- what the tier has of a pipeline -------------------------------------------------------------------------------

    async def written(self, pipeline: str, *, check: bool) -> Written:
        """Return how far write-back is. ``check`` asks the tier which files it has whole. Raises PipelineNotFound, and
        InstantStartError where the tier does not say."""
        await self._pipelines.ensure_loaded(pipeline)
        generation = self._catalog.pipeline(pipeline).current
        entries = list(generation.manifest.files) if generation is not None else []
        owed, unsealed = self._regional.owed(pipeline)
        if not check or generation is None:
            return Written(owed, unsealed, len(entries))
        key, slot = self._settings.key, self._settings.key.slot(self._pipelines.spec(pipeline))
        size = generation.manifest.chunk_size

        def count() -> int:
            places = (one.name.split("/") for one in self._store.list(f"v1/{slot}/", hygiene.MOST))
            sealed = {parts[2] for parts in places if len(parts) == 4 and parts[3] == "seal"}
            return sum(
                not entry.file.size or key.pin(slot, entry.path, entry.file, size) in sealed for entry in entries
            )

        return Written(owed, unsealed, len(entries), await self._ask(count))

    # -- where a pipeline is -------------------------------------------------------------------------------------------

    async def placement(self, pipeline: str) -> Placement:
        """Return where a pipeline is, at most KEEP_SECONDS old.

        An error is kept for as long: of many who ask a tier that hangs, one waits for it. Raises PipelineNotFound, and
        InstantStartError where the tier does not say.
        """
        slot = self._settings.key.slot(self._pipelines.spec(pipeline))
        pinned = self._pipelines.status(pipeline, with_files=False).revision
        revision = self._settings.key.revision(slot, pinned)
        async with self._looking:
            if trio.current_time() >= self._good_until:
                await self._look_again()
            if self._look is None:
                error = self._no_look
                raise OriginUnavailable(error.message if error is not None else "the regional tier does not say")
            look = self._look
        hosts = await self._ask(lambda: self._reader.holding(slot, look.now, revision))
        return Placement(pipeline, tuple(hosts), look.hosts, look.unread, rfc3339(int(look.now * 1e9)) or "")

    async def _look_again(self) -> None:
        began, now = trio.current_time(), self._storage_now()
        try:
            self._look = await self._ask(lambda: self._reader.look(now))
        except InstantStartError as error:
            self._look, self._no_look = None, error
            self._good_until = trio.current_time() + KEEP_SECONDS
        else:
            took = trio.current_time() - began
            self._good_until = trio.current_time() + max(KEEP_SECONDS, KEEP_SHARE * took)
