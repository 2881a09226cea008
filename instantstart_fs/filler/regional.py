"""The regional tier's part in filling: chunks come from the tier where it has them, and go into it where it has not.

A file under a region has two entries in the fill plan: one in the tier's pool (``TierKey``), one in its origin's. Each
chunk is open in one of them at most; core/region.py's PullPlan says in which. What the tier does not give, gives late
or gives wrong is opened at the origin, chunk by chunk; the origin's own path is as it is without a region.

    Filler.enter ─► Follow (asked → sealed | followed | off) ─► PullPlan ─► open here or there ─► requests
    chunks from the origin ─► write-back (read, digest, put) ─► seal, once this host has proven the file

With a rack level (filler/region_rack.py) what the tier holds is asked of the neighbour that owns it in the rack first.

Everything that waits for the tier runs in threads, with a deadline, and never on the way of a reader: a demanded chunk
goes to the origin when its patience ends, whatever the tier's threads do meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.fillqueue import Request
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.patience import FairClock, Patience, give_up_at
from instantstart_fs.core.region import PullPlan
from instantstart_fs.errors import InstantStartError, OriginUnavailable, StoreError
from instantstart_fs.filler.delivery import Delivery
from instantstart_fs.filler.events import RegionStatistics
from instantstart_fs.filler.fill import FetchRequest, Fill
from instantstart_fs.filler.messages import Piece
from instantstart_fs.filler.region_claims import Claims
from instantstart_fs.filler.region_follow import Follow, Place, RegionSettings, Tiers, reason_of
from instantstart_fs.filler.region_reads import TierReads
from instantstart_fs.filler.region_routes import FileRoutes
from instantstart_fs.filler.region_writeback import PUTS, WriteBack
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.target import FileKey, FillTarget
from instantstart_fs.filler.tierkey import file_key
from instantstart_fs.origins.base import OriginKey

if TYPE_CHECKING:
    from instantstart_fs.filler.region_rack import Neighbour, RackLevel
    from instantstart_fs.regional.keys import RegionKey

log = logging.getLogger(__name__)

TICK = 0.05
SWEEP_TICKS = 20


class Regional:
    """The tier's part in filling. On the trio thread. ``slot_of`` returns a pipeline's slot, None where it has none.
    ``serve_verified``: whether readers get chunks that the region's seal proves before the file is sealed here.

    It has more than 8 collaborators, because it joins the filler's tables to the tier's claims, routes and write-back.
    """

    def __init__(
        self,
        settings: RegionSettings,
        slot_of: Callable[[str, RegionKey], str | None],
        plan: FillPlan[FileKey],
        table: FillTable,
        delivery: Delivery,
        *,
        serve_verified: bool,
    ) -> None:
        self._serve_verified = serve_verified
        self.settings = self._settings = settings
        self._slot_of = slot_of
        self._plan = plan
        self._table = table
        self._delivery = delivery
        self._tiers = Tiers(settings)
        self.hosts = 1
        """How many hosts the region has, as far as their heartbeats tell."""
        self.rack: RackLevel | None = None
        if settings.rack:
            from instantstart_fs.filler.region_rack import RackLevel  # late: few have it

            self.rack = RackLevel(settings, plan, table)
        self._routes = FileRoutes(self._tiers, plan, table, delivery, self.rack)
        self._writeback = WriteBack(settings, self._tiers)
        self._claims = Claims(settings, self._tiers, self._routes, lambda: self.hosts, self._writeback.putting)
        self._routes.ask_again = self._claims.start
        self.access = self._claims.access
        self.reads = TierReads(self._tiers, self._claims, self._routes, self._places)
        self._patience: dict[OriginKey, Patience] = {}
        self._follows = self._routes.follows
        self._busy: set[Follow] = set()
        """Files with readers or requests. Time alone may change something for them."""
        self._clock = FairClock(0.0)
        self._taken = self._missed = 0

    @property
    def statistics(self) -> RegionStatistics:
        return RegionStatistics(
            taken_bytes=self._taken + self.reads.bytes,
            missed_bytes=self._missed,
            put_bytes=self._writeback.put_bytes,
            claims_won=self._claims.won,
            claims_lost=self._claims.lost,
            fallbacks=tuple(sorted(self._tiers.fallbacks.items())),
            broken=self._tiers.own.told,
            broken_since_ns=self._tiers.own.told_at_ns,
            left_alone=self._tiers.left_alone,
            upstream=self._tiers.upstream,
            pending=self._writeback.pending,
            rack=self.rack.statistics if self.rack is not None else None,
        )

    @property
    def answers(self) -> bool:
        """Whether the tier may be asked now: its breaker is not open."""
        return not self._tiers.own.is_broken()

    def answered(self) -> None:
        """End the pause of the tier: it has answered somebody else."""
        if self._tiers.own.told and self.answers:
            self._tiers.own.answered()

    def owed(self, pipeline: str) -> tuple[int, int]:
        """Return the bytes of a pipeline that wait to be put into the tier, and how many files wait for their seal."""
        follows = [one for one in (*self._follows.values(), *self._writeback.detached) if one.key.pipeline == pipeline]
        owed = sum(one.target.present.byte_range(chunk).length for one in follows for chunk in one.to_put)
        return owed, sum(one in self._writeback.detached for one in follows)

    def forget(self, pipeline: str) -> None:
        """Forget the pipeline."""
        self.access.forget(pipeline)
        self.reads.forget(pipeline)

    def refusal(self, pipeline: str) -> tuple[int, str] | None:
        """Return since when (wall clock) and why this pipeline gets nothing from the tier."""
        return self.access.refusal(pipeline)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow, claim and write back until cancelled."""
        async with trio.open_nursery() as nursery:
            self._tiers.nursery = nursery
            try:
                nursery.start_soon(self._tick_forever)
                nursery.start_soon(self._claims.renew_forever)
                if self._settings.write_back:
                    for _ in range(PUTS):
                        nursery.start_soon(self._writeback.run)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._tiers.nursery = None
                for follow in [*self._follows.values(), *self._writeback.detached]:
                    follow.close()

    # -- what the filler says ----------------------------------------------------------------------------------------

    def enter(self, fill: Fill) -> None:
        """Take up a file of the plan, if its pipeline has a slot in the tier."""
        target = fill.target
        chunks = target.present.chunks
        refused = self.access.refuses(target)
        if not chunks or self._tiers.nursery is None or refused or not (self.answers or self._tiers.upstream_answers):
            return
        places = self._places(target.key.pipeline, target.entry, target.present.chunk_size)
        if not places:
            return
        present = [chunk in target.present for chunk in range(chunks)]
        patience = self._patience.setdefault(target.origin.key, Patience())
        pull = PullPlan(self._settings.me, places[0].pin, present, patience, upstream=len(self._tiers.sources) - 1)
        follow = self._follows[target.key] = Follow(fill, places, pull)
        if not self.answers:
            follow.own_left = True
            pull.leave_own(asking=True)
        if self.rack is not None:
            self.rack.enter(follow)
        self._plan.add(follow.tier_key, target.key.pipeline, self._tiers.sources[0].key, target.present)
        self._plan.shut(target.key, range(chunks))

    def _places(self, pipeline: str, entry: FileEntry, chunk_size: int) -> list[Place]:
        """Return the file's names in each tier; none where its pipeline has no slot."""
        places: list[Place] = []
        for tier in self._tiers.sources:
            slot = self._slot_of(pipeline, tier.secret)
            if slot is None:
                return []
            places.append(Place(slot, tier.secret.pin(slot, entry.path, entry.file, chunk_size)))
        return places

    def keys(self, key: FileKey) -> tuple[FileKey, ...]:
        """Return the plan's entries of a file."""
        follow = self._follows.get(key)
        return (key,) if follow is None else (follow.tier_key, key)

    def plan_key(self, request: FetchRequest) -> FileKey:
        """Return under which of the plan's entries a request is in flight."""
        key = request.fill.target.key
        follow = self._follows.get(key) if request.piece is not None else None
        return key if follow is None else follow.tier_key

    def demand(self, key: FileKey, chunks: Iterable[int], *, whole: bool = False) -> None:
        follow = self._follows.get(key)
        if follow is not None:
            wanted = list(chunks)
            self._plan.demand(follow.tier_key, wanted)
            follow.pull.demand(wanted, trio.current_time())
            if whole:
                follow.pull.demand_whole(trio.current_time())
            self._busy.add(follow)
            if self.rack is not None:
                self.rack.demand(follow, wanted)
            self._claims.urge(follow)
            follow.changed.set()

    def undemand(self, key: FileKey, chunks: list[int], *, whole: bool) -> None:
        follow = self._follows.get(key)
        if follow is not None:
            self._plan.undemand(follow.tier_key, chunks)
            follow.pull.undemand(chunks)
            if whole:
                follow.pull.undemand_whole()

    def leave(self, key: FileKey) -> None:
        """End the file's part in the tier. Its fill is over, with or without success."""
        follow = self._follows.pop(key, None)
        if follow is None:
            return
        if self.rack is not None:
            self.rack.leave(follow)
        self._plan.remove(follow.tier_key)
        follow.flights.clear()
        self._busy.discard(follow)
        follow.ended = True
        follow.changed.set()
        self._writeback.detached.add(follow)

    def reread(self, key: FileKey) -> None:
        """Note that bytes of the file have been lost here."""
        follow = self._follows.get(key)
        if follow is None:
            return
        for chunk in range(follow.target.present.chunks):
            if chunk not in follow.target.present:
                follow.pull.left(chunk)
                follow.proven.discard(chunk)
                follow.target.verified.discard(chunk)
                follow.digests.pop(chunk, None)
                follow.to_put.discard(chunk)
        self._plan.refill(follow.tier_key)
        self._routes.apply(follow)

    def send(self, request: Request[FileKey], fill: Fill) -> None:
        """Fetch this chunk from the tier, as the plan asks."""
        follow = self._follows.get(file_key(request.key))
        if follow is None or follow.fill is not fill:
            self._plan.failed(request.key, request.chunk)
            return
        if follow.state == "fresh" and self._tiers.nursery is not None:
            self._claims.start(follow)
        if follow.state in ("fresh", "waiting", "asking"):
            self._park(follow, request.chunk)
            return
        source = follow.pull.route(request.chunk)
        if not 0 <= source < len(self._tiers.sources):
            self._park(follow, request.chunk)
            return
        self._dispatch(follow, request, source)

    def came(self, fill: Fill, chunk: int, request: FetchRequest) -> None:
        """Note that a chunk has come. ``request`` brought it."""
        follow = self._follows.get(fill.target.key)
        if follow is None:
            return
        flight = follow.flights.pop(chunk, None)
        if flight is not None and flight[0] is not request:  # it came with a whole file while the tier was asked for it
            self._delivery.stop_request(flight[0])
        self._plan.arrived(follow.tier_key, chunk)
        follow.pull.came(chunk)
        length = fill.target.present.byte_range(chunk).length
        if request.piece is not None:
            self._taken += length
            source = flight[2] if flight is not None else 0
            if self.rack is None or not self.rack.gave(request, length):
                self._tiers.sources[source].answered()
            if source == 0:
                follow.digests[chunk] = request.digest
            seal = follow.seals.get(source)
            if seal is not None:
                follow.proven.add(chunk)
                if self._settings.trust_seals and self._serve_verified:
                    fill.target.verified.add(chunk)
                if len(follow.proven) == follow.pull.chunks and follow.fill.unhashed:
                    fill.proven_by = f"region:{seal.by}"
            if source:
                self._writeback.add(follow, chunk)
        else:
            self._missed += length
            if request.answered is not None:
                self._patience[fill.target.origin.key].took(request.answered + 0.05)
            self._writeback.add(follow, chunk)
        if self.rack is not None:
            self.rack.go_on(follow, chunk)
        follow.changed.set()

    def failed(self, request: FetchRequest, error: InstantStartError) -> None:
        """Note that a tier did not give a chunk. The next source is asked."""
        follow = self._follows.get(request.fill.target.key)
        if follow is None:
            return
        _, _, source = follow.flights.pop(request.chunk, (request, 0.0, 0))
        if isinstance(error, StoreError):  # not the tier's fault
            self._plan.failed(follow.tier_key, request.chunk, held_until=trio.current_time() + 2.0)
            return
        if self.rack is not None and (neighbour := self.rack.asked(request)) is not None:
            self._neighbour_failed(follow, request.chunk, neighbour, error)
            return
        self._fall_back(follow, request.chunk, source, error)

    def lost(self, request: FetchRequest) -> None:
        """Note that the worker of a request died."""
        follow = self._follows.get(request.fill.target.key)
        if follow is not None:
            follow.flights.pop(request.chunk, None)
            self._plan.failed(follow.tier_key, request.chunk)

    def preempted(self, key: FileKey, chunk: int) -> None:
        follow = self._follows.get(file_key(key))
        if follow is not None:
            follow.flights.pop(chunk, None)

    def progressed(self, request: FetchRequest) -> None:
        """Note that more of a chunk has come."""
        follow = self._follows.get(request.fill.target.key)
        if follow is None:
            return
        follow.pull.progressed()
        if request.chunk in follow.flights:
            follow.last_byte[request.chunk] = self._clock.time

    def sealed(self, target: FillTarget, proof: str) -> None:
        """Note that the file is whole. ``proof`` is what this host proved it by, "" where the region's seal did."""
        # A target that failed, and was tried again while its puts went on, was followed twice.
        follows = [one for one in self._writeback.detached if one.target is target]
        if not follows:
            return
        follow = max(follows, key=lambda one: len(one.digests))
        for one in follows:
            one.decided = True
            if one is not follow:
                self._writeback.check_done(one)
        if not proof or not self._settings.write_back or follow.fd < 0 or follow.state == "off":
            return
        follow.sealed_here = proof
        for chunk in range(follow.pull.chunks):
            if chunk not in follow.digests and chunk not in follow.to_put:
                self._writeback.add(follow, chunk)
        self._writeback.check_done(follow)

    def poisoned(self, target: FillTarget) -> None:
        """Take back what this host has put of the file, and what it took unproven by a seal: the bytes are wrong."""
        for follow in [one for one in (*self._writeback.detached, *self._follows.values()) if one.target is target]:
            put, follow.put, follow.to_put = follow.put, set(), set()
            if self._settings.write_back and 0 not in follow.seals:
                put |= follow.digests.keys()
            if put and self._tiers.nursery is not None:
                self._tiers.nursery.start_soon(self._writeback.take_back, follow, put)

    # -- routes --------------------------------------------------------------------------------------------------------

    def _park(self, follow: Follow, chunk: int) -> None:
        self._plan.shut(follow.tier_key, [chunk])
        self._plan.failed(follow.tier_key, chunk)

    def _dispatch(self, follow: Follow, request: Request[FileKey], source: int) -> None:
        from instantstart_fs.regional.records import chunk_name

        chunk = request.chunk
        length = follow.target.present.byte_range(chunk).length
        seal = follow.seals.get(source)
        digest = seal.digests[32 * chunk : 32 * (chunk + 1)] if seal is not None else b""
        try:
            slot, pin = follow.places[source]
            tier = self._tiers.sources[source]
            address = tier.store.address(chunk_name(slot, pin, chunk))
        except InstantStartError as error:
            self._plan.failed(follow.tier_key, chunk)
            self._fall_back(follow, chunk, source, error)
            return
        key = tier.secret.chunk_key(pin, chunk, length)
        chosen = None
        if source == 0 and self.rack is not None:
            reader = request.demand or follow.pull.demanded(chunk)
            chosen = self.rack.choose(follow, chunk, key, digest, reader=reader)
        if chosen is not None:
            sent = self._delivery.dispatch(request, follow.fill, chosen[1], chosen[0])
        else:
            sent = self._delivery.dispatch(request, follow.fill, Piece(address.url, key, digest, address.headers), tier)
        follow.flights[chunk] = (sent, self._clock.time, source)
        follow.last_byte[chunk] = self._clock.time
        self._busy.add(follow)

    def _fall_back(self, follow: Follow, chunk: int, source: int, error: InstantStartError) -> None:
        reason = reason_of(error)
        self._tiers.count(reason)
        if reason == "wrong":
            log.error("the regional tier gave wrong bytes: %s", error.message, extra={"pipeline": follow.key.pipeline})
        if reason != "missing":
            self._routes.tier_failed(source, error)
        follow.proven.discard(chunk)
        follow.pull.failed(chunk, source)
        self._plan.failed(follow.tier_key, chunk)
        self._routes.apply(follow)

    def _neighbour_failed(self, follow: Follow, chunk: int, neighbour: Neighbour, error: InstantStartError) -> None:
        assert self.rack is not None
        self.rack.failed(neighbour, follow, chunk, error)
        follow.proven.discard(chunk)
        self._plan.failed(follow.tier_key, chunk)
        self._table.wakeup.set()

    async def _tick_forever(self) -> None:
        """Check readers' patience and the deadlines of requests, some times a second. One check is cheap."""
        self._clock = FairClock(trio.current_time())
        ticks = 0
        while True:
            await trio.sleep(TICK)
            ticks += 1
            now, fair = trio.current_time(), self._clock.look(trio.current_time())
            if ticks % SWEEP_TICKS == 0:
                for follow in list(self._writeback.detached):
                    self._writeback.check_done(follow)
            for follow in list(self._busy):
                if follow.state == "off" or not (follow.flights or follow.pull.has_readers):
                    self._busy.discard(follow)
                    continue
                if follow.pull.next_patience() <= now:
                    self._routes.apply(follow)
                self._check_flights(follow, fair)

    def _check_flights(self, follow: Follow, fair: float) -> None:
        for chunk, (request, began, source) in list(follow.flights.items()):
            if chunk not in follow.flights:  # its tier was left alone because of one before it
                continue
            if request.worker is None:
                follow.flights[chunk] = (request, fair, source)
                follow.last_byte[chunk] = fair
                continue
            demanded = request.demand or follow.pull.demanded(chunk)
            neighbour = self.rack.asked(request) if self.rack is not None else None
            patient = give_up_at if neighbour is None or self.rack is None else self.rack.give_up_at
            if fair < patient(began, follow.last_byte.get(chunk, began), demanded=demanded):
                continue
            self._delivery.stop(follow.fill, chunk)
            follow.flights.pop(chunk, None)
            if neighbour is not None:
                self._neighbour_failed(follow, chunk, neighbour, OriginUnavailable("it is too slow"))
                continue
            error = OriginUnavailable("the tier is too slow")
            if follow.pull.slow(chunk, source):
                self._tiers.count("failed")
                self._plan.failed(follow.tier_key, chunk)
                self._routes.tier_failed(source, error)
            else:
                self._fall_back(follow, chunk, source, error)
