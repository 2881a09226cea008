"""The regional tier's part in filling: chunks come from the tier where it has them, and go into it where it has not.

A file under a region has two entries in the fill plan: one in the tier's pool (``TierKey``), one in its origin's. Each
chunk is open in one of them at most; core/region.py's PullPlan says in which. What the tier does not give, gives late
or gives wrong is opened at the origin, chunk by chunk; the origin's own path is as it is without a region.

    Filler.enter ─► Follow (asked → sealed | followed | off) ─► PullPlan ─► open here or there ─► requests
    chunks from the origin ─► write-back (read, digest, put) ─► seal, once this host has proven the file

Everything that waits for the tier runs in threads, with a deadline, and never on the way of a reader: a demanded chunk
goes to the origin when its patience ends, whatever the tier's threads do meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.fillqueue import Request
from instantstart_fs.core.manifest import ManifestFile
from instantstart_fs.core.region import GROUP_CHUNKS, WAIT, ClaimMark, Patience, PullPlan, give_up_at
from instantstart_fs.core.retry import Breaker
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InstantStartError,
    OriginMisbehaved,
    OriginNotFound,
    OriginUnavailable,
    StoreError,
)
from instantstart_fs.filler.delivery import Delivery
from instantstart_fs.filler.events import RegionStatistics
from instantstart_fs.filler.fill import FetchRequest, Fill
from instantstart_fs.filler.messages import Piece
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.target import FileKey, FillTarget
from instantstart_fs.filler.tierkey import TierKey, file_key
from instantstart_fs.origins.base import Location, OriginKey

if TYPE_CHECKING:
    from instantstart_fs.regional.keys import RegionKey
    from instantstart_fs.regional.records import Seal
    from instantstart_fs.regional.store import TierStore

log = logging.getLogger(__name__)

ASK_SECONDS = 4.0
"""For one answer of the tier to what is no chunk."""
CHECK_SECONDS = 10.0
LIST_SECONDS = 0.5
MOST_LISTED = 200_000
"""Names of one file that are read: a listing may have no end."""
ROOM = 2 * GROUP_CHUNKS
"""Chunks of a file under this host's claims at once."""
MOST_FOLLOWED = 64
PUTS = 4
WATCHED = 16
THREADS = 16
TICK = 0.05
_T = TypeVar("_T")


class TierSource:
    """A tier as the counters know it. It locates nothing: its chunks are objects of their own."""

    def __init__(self, store: TierStore) -> None:
        self.store = store
        self.key = OriginKey("tier", store.endpoint, "")

    def locate(self, file: ManifestFile) -> Location:
        raise OriginUnavailable(f"{file.path}: a tier keeps no files")


class RegionSettings(msgspec.Struct, frozen=True):
    """``stores``: the region's own tier, then those asked before the origin. ``trust_seals``: a file whose every chunk
    is what a seal of the region says is not hashed here. ``rate``: bytes a second that are written back, None = any."""

    host: str
    key: RegionKey
    stores: tuple[TierStore, ...]
    trust_seals: bool = True
    write_back: bool = True
    rate: int | None = None


class _Follow:
    """A file under the region. ``state``: fresh | asking | sealed | followed | off."""

    def __init__(self, fill: Fill, slot: str, pin: str, pull: PullPlan) -> None:
        self.fill = fill
        self.target = fill.target
        self.key = fill.target.key
        self.tier_key = TierKey(self.key.pipeline, self.key.generation, self.key.index)
        self.slot = slot
        self.pin = pin
        self.pull = pull
        self.state = "fresh"
        self.seals: dict[int, Seal] = {}
        self.digests: dict[int, bytes] = {}
        self.proven: set[int] = set()
        self.began_empty = fill.target.present.count == 0
        self.parked: list[int] = []
        self.flights: dict[int, tuple[FetchRequest, float, int]] = {}
        """By chunk: the request, when it was sent (trio), which source."""
        self.last_byte: dict[int, float] = {}
        self.to_put: set[int] = set()
        self.put: set[int] = set()
        self.fd = -1
        self.sealed_here = ""
        """What this host has proven it by, once it has."""
        self.changed = trio.Event()
        self.claims: dict[int, int] = {}
        self.ended = False
        self.settled = False
        """The file is complete here, and whatever follows of that was begun."""

    def over(self) -> bool:
        return self.ended or self.state == "off"


class Regional:
    """On the trio thread. ``slot_of``: the slot of a pipeline, None where none is to be used."""

    def __init__(
        self,
        settings: RegionSettings,
        slot_of: Callable[[str], str | None],
        plan: FillPlan[FileKey],
        table: FillTable,
        delivery: Delivery,
    ) -> None:
        self._settings = settings
        self._slot_of = slot_of
        self._plan = plan
        self._table = table
        self._delivery = delivery
        self._sources = [TierSource(store) for store in settings.stores]
        self._life = secrets.token_hex(8)
        self._patience: dict[OriginKey, Patience] = {}
        self._follows: dict[FileKey, _Follow] = {}
        self._detached: set[_Follow] = set()
        self._queue: deque[tuple[_Follow, int]] = deque()
        self._more = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._threads = trio.CapacityLimiter(THREADS)
        self._put_threads = trio.CapacityLimiter(PUTS)
        self._breaker = Breaker(threshold=3, grace=0.0, window=1.0, first=5.0, cap=120.0)
        self._allowed: dict[str, bool] = {}
        self._checking: dict[str, trio.Event] = {}
        self._fallbacks: dict[str, int] = {}
        self._taken = self._put = self._won = self._lost = 0
        self._told = ""
        self._used: dict[str, str] = {}
        self._puts_until = 0.0

    @property
    def statistics(self) -> RegionStatistics:
        return RegionStatistics(
            taken_bytes=self._taken,
            put_bytes=self._put,
            claims_won=self._won,
            claims_lost=self._lost,
            fallbacks=tuple(sorted(self._fallbacks.items())),
            broken=self._told,
            pending=len(self._queue),
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow, claim and write back until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                nursery.start_soon(self._tick_forever)
                if self._settings.write_back:
                    for _ in range(PUTS):
                        nursery.start_soon(self._put_forever)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None
                for follow in [*self._follows.values(), *self._detached]:
                    _close(follow)

    # -- what the filler says ----------------------------------------------------------------------------------------

    def enter(self, fill: Fill) -> None:
        """A file is in the plan: put it under the region, if its pipeline has a slot there."""
        target = fill.target
        chunks = target.present.chunks
        if not chunks or self._nursery is None or self._is_broken() or self._allowed.get(target.key.pipeline) is False:
            return
        slot = self._slot_of(target.key.pipeline)
        if slot is None:
            return
        pin = self._settings.key.pin(slot, target.entry.path, target.entry.file, target.present.chunk_size)
        present = [chunk in target.present for chunk in range(chunks)]
        patience = self._patience.setdefault(target.origin.key, Patience())
        pull = PullPlan(self._settings.host, pin, present, patience, upstream=len(self._sources) - 1)
        follow = self._follows[target.key] = _Follow(fill, slot, pin, pull)
        self._plan.add(follow.tier_key, target.key.pipeline, self._sources[0].key, target.present)
        self._plan.shut(target.key, range(chunks))

    def keys(self, key: FileKey) -> tuple[FileKey, ...]:
        """The plan's entries of a file."""
        follow = self._follows.get(key)
        return (key,) if follow is None else (follow.tier_key, key)

    def demand(self, key: FileKey, chunks: Iterable[int]) -> None:
        follow = self._follows.get(key)
        if follow is not None:
            wanted = list(chunks)
            self._plan.demand(follow.tier_key, wanted)
            follow.pull.demand(wanted, trio.current_time())
            follow.changed.set()

    def undemand(self, key: FileKey, chunks: list[int]) -> None:
        follow = self._follows.get(key)
        if follow is not None:
            self._plan.undemand(follow.tier_key, chunks)
            follow.pull.undemand(chunks)

    def leave(self, key: FileKey) -> None:
        """The fill is over, whichever way."""
        follow = self._follows.pop(key, None)
        if follow is None:
            return
        self._plan.remove(follow.tier_key)
        follow.flights.clear()
        follow.ended = True
        follow.changed.set()
        self._detached.add(follow)

    def reread(self, key: FileKey) -> None:
        """Bytes that were here are not any more."""
        follow = self._follows.get(key)
        if follow is None:
            return
        for chunk in range(follow.target.present.chunks):
            if chunk not in follow.target.present:
                follow.pull.left(chunk)
                follow.proven.discard(chunk)
                follow.digests.pop(chunk, None)
        self._plan.refill(follow.tier_key)
        self._apply(follow)

    def send(self, request: Request[FileKey], fill: Fill) -> None:
        """The plan asks for this chunk of the tier."""
        follow = self._follows.get(file_key(request.key))
        if follow is None or follow.fill is not fill:
            self._plan.failed(request.key, request.chunk)
            return
        if follow.state == "fresh" and self._nursery is not None:
            follow.state = "asking"
            follow.pull.background = True
            self._nursery.start_soon(self._ask, follow)
        if follow.state in ("fresh", "asking"):
            self._park(follow, request.chunk)
            return
        source = follow.pull.route(request.chunk)
        if not 0 <= source < len(self._sources):
            self._park(follow, request.chunk)
            return
        self._dispatch(follow, request, source)

    def came(self, fill: Fill, chunk: int, request: FetchRequest) -> None:
        """A chunk is present. ``request``: what brought it."""
        follow = self._follows.get(fill.target.key)
        if follow is None:
            return
        flight = follow.flights.pop(chunk, None)
        self._plan.arrived(follow.tier_key, chunk)
        follow.pull.came(chunk)
        length = fill.target.present.byte_range(chunk).length
        if request.piece is not None:
            self._taken += length
            self._breaker.succeeded()
            self._told = ""
            follow.digests[chunk] = request.digest
            source = flight[2] if flight is not None else 0
            seal = follow.seals.get(source)
            if seal is not None:
                follow.proven.add(chunk)
                if len(follow.proven) == follow.pull.chunks and follow.fill.unhashed:
                    fill.proven_by = f"region:{seal.by}"
            if source:
                self._write_back(follow, chunk)
        else:
            if request.answered is not None:
                self._patience[fill.target.origin.key].took(request.answered + 0.05)
            self._write_back(follow, chunk)
        follow.changed.set()

    def failed(self, request: FetchRequest, error: InstantStartError) -> None:
        """A tier did not give a chunk: the next source is asked."""
        follow = self._follows.get(request.fill.target.key)
        if follow is None:
            return
        _, _, source = follow.flights.pop(request.chunk, (request, 0.0, 0))
        if isinstance(error, StoreError):  # not the tier's fault
            self._plan.failed(follow.tier_key, request.chunk, held_until=trio.current_time() + 2.0)
            return
        self._fall_back(follow, request.chunk, source, error)

    def lost(self, request: FetchRequest) -> None:
        """Its worker died."""
        follow = self._follows.get(request.fill.target.key)
        if follow is not None:
            follow.flights.pop(request.chunk, None)
            self._plan.failed(follow.tier_key, request.chunk)

    def preempted(self, key: FileKey, chunk: int) -> None:
        follow = self._follows.get(file_key(key))
        if follow is not None:
            follow.flights.pop(chunk, None)

    def progressed(self, request: FetchRequest) -> None:
        follow = self._follows.get(request.fill.target.key)
        if follow is not None and request.chunk in follow.flights:
            follow.last_byte[request.chunk] = trio.current_time()

    def sealed(self, target: FillTarget, proof: str) -> None:
        """The file is whole and proven by this host itself (``proof``), or by the region's seal ("")."""
        follow = next((one for one in self._detached if one.target is target), None)
        if follow is None:
            return
        follow.settled = True
        if not proof or not self._settings.write_back or follow.fd < 0 or follow.state == "off":
            return
        follow.sealed_here = proof
        for chunk in range(follow.pull.chunks):
            if chunk not in follow.digests and chunk not in follow.to_put:
                self._write_back(follow, chunk)
        self._check_done(follow)

    def poisoned(self, target: FillTarget) -> None:
        """The bytes are wrong: what this host put of them is taken back."""
        for follow in [one for one in (*self._detached, *self._follows.values()) if one.target is target]:
            put, follow.put, follow.to_put = follow.put, set(), set()
            if put and self._nursery is not None:
                self._nursery.start_soon(self._take_back, follow, put)

    # -- routes --------------------------------------------------------------------------------------------------------

    def _park(self, follow: _Follow, chunk: int) -> None:
        self._plan.shut(follow.tier_key, [chunk])
        self._plan.failed(follow.tier_key, chunk)

    def _apply(self, follow: _Follow) -> None:
        """Open each chunk where its plan says."""
        if follow.ended:
            return
        for chunk, source in follow.pull.take_moves(trio.current_time()):
            if source == WAIT:
                continue
            if source < len(self._sources):
                self._plan.open(follow.tier_key, chunk)
            else:
                self._plan.shut(follow.tier_key, [chunk])
                self._plan.open(follow.key, chunk)
        self._table.wakeup.set()

    def _dispatch(self, follow: _Follow, request: Request[FileKey], source: int) -> None:
        from instantstart_fs.regional.records import chunk_name

        chunk = request.chunk
        length = follow.target.present.byte_range(chunk).length
        seal = follow.seals.get(source)
        digest = seal.digests[32 * chunk : 32 * (chunk + 1)] if seal is not None else b""
        try:
            address = self._sources[source].store.address(chunk_name(follow.slot, follow.pin, chunk))
        except InstantStartError as error:
            self._plan.failed(follow.tier_key, chunk)
            self._fall_back(follow, chunk, source, error)
            return
        piece = Piece(address.url, self._settings.key.chunk_key(follow.pin, chunk, length), digest, address.headers)
        sent = self._delivery.dispatch(request, follow.fill, piece, self._sources[source])
        now = trio.current_time()
        follow.flights[chunk] = (sent, now, source)
        follow.last_byte[chunk] = now

    def _fall_back(self, follow: _Follow, chunk: int, source: int, error: InstantStartError) -> None:
        if isinstance(error, OriginNotFound):
            reason = "missing"
        elif isinstance(error, OriginMisbehaved):
            reason = "wrong"
        else:
            reason = "failed"
        self._fallbacks[reason] = self._fallbacks.get(reason, 0) + 1
        if reason == "wrong":
            log.error("the regional tier gave wrong bytes: %s", error.message, extra={"pipeline": follow.key.pipeline})
        if reason != "missing":
            self._tier_failed(error)
        follow.proven.discard(chunk)
        follow.pull.failed(chunk, source)
        self._plan.failed(follow.tier_key, chunk)
        self._apply(follow)

    def _tier_failed(self, error: InstantStartError) -> None:
        now = trio.current_time()
        if self._breaker.failed(now, 1.0) or self._is_broken():
            if not self._told:
                log.warning("the regional tier is left alone for a while: %s", error.message)
            self._told = error.message
            for follow in list(self._follows.values()):
                self._turn_off(follow)

    def _tier_answers(self, source: int) -> None:
        if source == 0:
            self._breaker.succeeded()
            self._told = ""

    def _is_broken(self) -> bool:
        return self._breaker.limit(trio.current_time()) == 0

    def _turn_off(self, follow: _Follow) -> None:
        """The tier is asked for nothing more of this file."""
        if follow.state == "off":
            return
        follow.state = "off"
        follow.pull.give_up()
        for chunk in list(follow.flights):
            self._delivery.stop(follow.fill, chunk)
            follow.flights.pop(chunk, None)
            self._plan.failed(follow.tier_key, chunk)
        self._apply(follow)
        follow.changed.set()

    async def _tick_forever(self) -> None:
        """Readers' patience and the deadlines of flights: a cheap look, some times a second."""
        while True:
            await trio.sleep(TICK)
            now = trio.current_time()
            for follow in list(self._detached):
                self._check_done(follow)
            for follow in list(self._follows.values()):
                if follow.state == "off":
                    continue
                if follow.pull.next_time(now) <= now:
                    self._apply(follow)
                for chunk, (request, began, source) in list(follow.flights.items()):
                    if request.worker is None:
                        began = follow.last_byte[chunk] = now
                        follow.flights[chunk] = (request, now, source)
                        continue
                    if now < give_up_at(began, follow.last_byte.get(chunk, began), demanded=request.demand):
                        continue
                    self._delivery.stop(follow.fill, chunk)
                    follow.flights.pop(chunk, None)
                    self._fall_back(follow, chunk, source, OriginUnavailable("the tier is too slow"))

    # -- asking --------------------------------------------------------------------------------------------------------

    async def _thread(self, call: Callable[[], _T]) -> _T:
        """In a thread that is given up after ASK_SECONDS. Raises InstantStartError."""
        with trio.move_on_after(ASK_SECONDS):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
        raise OriginUnavailable(f"the regional tier does not answer within {ASK_SECONDS:g} s")

    async def _may_use(self, follow: _Follow) -> bool:
        """Whether the pipeline's own credentials may read the source: asked once, before the first use."""
        pipeline = follow.key.pipeline
        while pipeline in self._checking:
            await self._checking[pipeline].wait()
        if pipeline not in self._allowed:
            done = self._checking[pipeline] = trio.Event()
            try:
                with trio.move_on_after(CHECK_SECONDS):
                    await trio.to_thread.run_sync(
                        follow.target.origin.check, abandon_on_cancel=True, limiter=self._threads
                    )
                self._allowed[pipeline] = True  # an origin that does not answer refuses nobody: it was listed here
            except (AccessRefused, CredentialsUnusable) as error:
                self._allowed[pipeline] = False
                log.warning(
                    "nothing is taken from the regional tier: the source refuses this pipeline (%s)",
                    error.message,
                    extra={"pipeline": pipeline},
                )
            except InstantStartError:
                self._allowed[pipeline] = True
            finally:
                del self._checking[pipeline]
                done.set()
        return self._allowed.get(pipeline, False)

    async def _ask(self, follow: _Follow) -> None:
        """Find out what the tiers have of a file; then follow it, if no seal says that all is there."""
        try:
            if not await self._may_use(follow):
                self._turn_off(follow)
                return
            self._mark_used(follow.slot)
            for source in range(len(self._sources)):
                seal = await self._find_seal(follow, source)
                if seal is not None:
                    follow.seals[source] = seal
                    follow.pull.sealed(source)
                    if source == 0:
                        break
            if follow.over():
                return
            if 0 in follow.seals:
                follow.state = "sealed"
                if self._settings.trust_seals and follow.began_empty and follow.fill.worker is None:
                    follow.fill.unhashed = follow.target.entry.file.digest is not None
                self._apply(follow)
                return
            while sum(one.state == "followed" for one in self._follows.values()) >= MOST_FOLLOWED:
                self._apply(follow)
                await trio.sleep(LIST_SECONDS)
            if follow.over():
                return
            follow.state = "followed"
            await self._follow(follow)
        except InstantStartError as error:
            self._tier_failed(error)
            self._turn_off(follow)

    def _mark_used(self, slot: str) -> None:
        """Once a day and host: what is not used goes (`instantstart regional gc`)."""
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if self._used.get(slot) == day or self._nursery is None:
            return
        self._used[slot] = day
        name = f"v1/{slot}/used/{day}"

        async def mark() -> None:
            with contextlib.suppress(InstantStartError):
                await self._thread(lambda: self._sources[0].store.put_new(name, b""))

        self._nursery.start_soon(mark)

    async def _find_seal(self, follow: _Follow, source: int) -> Seal | None:
        from instantstart_fs.regional.records import Forged, most_seal, seal_name, unpack_seal

        name, store = seal_name(follow.slot, follow.pin), self._sources[source].store
        size, chunk_size = follow.target.entry.file.size, follow.target.present.chunk_size
        try:
            data = await self._thread(lambda: store.get(name, most_seal(size, chunk_size)))
            self._tier_answers(source)
            return unpack_seal(self._settings.key, name, data, size, chunk_size)
        except OriginNotFound:
            self._tier_answers(source)
            return None
        except (Forged, OriginMisbehaved) as error:
            self._fallbacks["forged"] = self._fallbacks.get("forged", 0) + 1
            log.error("the regional tier holds a seal that is none: %s", error, extra={"pipeline": follow.key.pipeline})
            return None
        except InstantStartError:
            if source == 0:
                raise
            return None

    async def _follow(self, follow: _Follow) -> None:
        """Claim what nobody pulls, and find out what others have put, until all is here."""
        from instantstart_fs.regional import records

        store, pull, key = self._sources[0].store, follow.pull, self._settings.key
        below = records.directory(follow.slot, follow.pin)

        def look() -> tuple[list[int], dict[int, int]]:
            chunks: list[int] = []
            claims: dict[int, int] = {}
            for found in store.list(below, MOST_LISTED):
                what = records.listed(found.name.removeprefix(below))
                if what is None:
                    continue
                number, epoch = what
                if epoch is None:
                    chunks.append(number)
                else:
                    claims[number] = max(epoch, claims.get(number, 0))
            return chunks, claims

        def read(group: int, epoch: int) -> ClaimMark | str:
            name = records.claim_name(follow.slot, follow.pin, group, epoch)
            try:
                claim = records.unpack_claim(key, name, store.get(name, records.MOST_RECORD))
            except OriginNotFound:
                return "vanished"
            except (records.Forged, OriginMisbehaved):
                return "forged"
            return ClaimMark(f"{claim.host}/{claim.life}", claim.beat, claim.done)

        def record(group: int, epoch: int, mark: ClaimMark) -> tuple[str, bytes]:
            name = records.claim_name(follow.slot, follow.pin, group, epoch)
            claim = records.ClaimRecord(self._settings.host, self._life, mark.beat, mark.done)
            return name, records.pack(key, "claim", name, claim)

        while not (follow.over() or pull.complete):
            follow.changed = trio.Event()
            chunks, claims = await self._thread(look)
            pull.listed(chunks, claims, trio.current_time())
            self._apply(follow)
            for take in pull.watches(WATCHED, trio.current_time()):
                mark = await self._thread(lambda take=take: read(take.group, take.epoch))  # type: ignore[misc]
                if isinstance(mark, ClaimMark):
                    pull.seen(take.group, take.epoch, mark, trio.current_time())
                elif mark == "forged":
                    self._fallbacks["forged"] = self._fallbacks.get("forged", 0) + 1
                    pull.forged(take.group, take.epoch)
                else:
                    pull.vanished(take.group, take.epoch)
            room = ROOM - pull.holding
            for take in pull.next_claims(room, trio.current_time()) if self._settings.write_back else ():
                name, data = record(take.group, take.epoch, ClaimMark("", 0, 0))
                try:
                    won = await self._thread(lambda name=name, data=data: store.put_new(name, data))  # type: ignore[misc]
                except InstantStartError as error:
                    self._tier_failed(error)
                    pull.unclaimed(take.group)
                else:
                    if won:
                        self._won += 1
                        follow.claims[take.group] = take.epoch
                        pull.won(take.group, trio.current_time())
                    else:
                        self._lost += 1
                        pull.lost(take.group, trio.current_time())
                self._apply(follow)
            if not self._settings.write_back:  # it gives nothing, so it holds nobody up
                for take in pull.next_claims(room, trio.current_time()):
                    pull.unclaimed(take.group)
            for renewal in pull.renewals(trio.current_time()):
                name, data = record(renewal.group, renewal.epoch, renewal.mark)
                await self._thread(lambda name=name, data=data: store.put(name, data))  # type: ignore[misc]
            pull.take_finished()
            self._apply(follow)
            if follow.over() or pull.complete:
                break
            waits = LIST_SECONDS * (0.75 + random.random() / 2)
            if pull.holding <= ROOM // 2:
                with trio.move_on_after(waits):
                    await follow.changed.wait()
                await trio.sleep(0.02)
            else:
                await trio.sleep(waits)

    # -- write-back ----------------------------------------------------------------------------------------------------

    def _write_back(self, follow: _Follow, chunk: int) -> None:
        if not self._settings.write_back or follow.state == "off" or (follow.target.blob is None and follow.fd < 0):
            return
        if follow.fd < 0 and follow.target.blob is not None:
            try:
                follow.fd = os.dup(follow.target.blob.fd)
            except OSError:
                return
        follow.to_put.add(chunk)
        self._queue.append((follow, chunk))
        more, self._more = self._more, trio.Event()
        more.set()

    async def _put_forever(self) -> None:
        while True:
            while not self._queue:
                await self._more.wait()
            follow, chunk = self._queue.popleft()
            if chunk not in follow.to_put:
                continue
            try:
                if not self._is_broken():
                    await self._put_chunk(follow, chunk)
            except InstantStartError as error:
                log.warning(
                    "a chunk was not written to the regional tier: %s",
                    error.message,
                    extra={"pipeline": follow.key.pipeline},
                )
                self._fallbacks["not-written"] = self._fallbacks.get("not-written", 0) + 1
                self._breaker.failed(trio.current_time(), 1.0)
            finally:
                follow.to_put.discard(chunk)
                self._check_done(follow)

    async def _put_chunk(self, follow: _Follow, chunk: int) -> None:
        from instantstart_fs.regional.keys import keyed_digest
        from instantstart_fs.regional.records import HEADER, chunk_name

        wanted = follow.target.present.byte_range(chunk)
        name = chunk_name(follow.slot, follow.pin, chunk)
        key, store, fd = (
            self._settings.key.chunk_key(follow.pin, chunk, wanted.length),
            self._sources[0].store,
            follow.fd,
        )

        def put() -> bytes:
            data = bytearray(HEADER + wanted.length)
            view = memoryview(data)
            done = 0
            while done < wanted.length:
                count = os.preadv(fd, [view[HEADER + done :]], wanted.start + done)
                if count <= 0:
                    raise OriginUnavailable("the file ends early")
                done += count
            digest = keyed_digest(key, view[HEADER:])
            view[:HEADER] = digest
            store.put(name, data)
            return digest

        if self._settings.rate is not None:
            now = trio.current_time()
            self._puts_until = max(self._puts_until, now) + wanted.length / self._settings.rate
            await trio.sleep_until(self._puts_until)
        try:
            digest = await trio.to_thread.run_sync(put, limiter=self._put_threads)
        except OSError as error:
            raise OriginUnavailable(f"it cannot be read: {error.strerror}") from error
        follow.digests[chunk] = digest
        follow.put.add(chunk)
        self._put += wanted.length
        await self._release_claim(follow, chunk // GROUP_CHUNKS)

    async def _release_claim(self, follow: _Follow, group: int) -> None:
        """Remove this host's claim once all of its group is in the tier."""
        from instantstart_fs.regional.records import claim_name

        chunks = range(group * GROUP_CHUNKS, min((group + 1) * GROUP_CHUNKS, follow.pull.chunks))
        if group not in follow.claims or not all(chunk in follow.digests for chunk in chunks):
            return
        name = claim_name(follow.slot, follow.pin, group, follow.claims.pop(group))
        with contextlib.suppress(InstantStartError):  # else it expires
            await self._thread(lambda: self._sources[0].store.delete(name))

    async def _take_back(self, follow: _Follow, chunks: set[int]) -> None:
        from instantstart_fs.regional.records import chunk_name

        for chunk in chunks:
            name = chunk_name(follow.slot, follow.pin, chunk)
            try:
                await self._thread(lambda name=name: self._sources[0].store.delete(name))  # type: ignore[misc]
            except InstantStartError as error:
                log.error("wrong bytes stay in the regional tier, and no seal will name them: %s", error.message)
                return

    def _check_done(self, follow: _Follow) -> None:
        """Seal the file in the tier, or let go of it."""
        if not follow.ended or follow.to_put or follow not in self._detached:
            return
        if follow.sealed_here and len(follow.digests) == follow.pull.chunks and self._nursery is not None:
            proof, follow.sealed_here = follow.sealed_here, ""
            self._nursery.start_soon(self._seal, follow, proof)
            return
        if follow.settled or follow.target.failed:
            self._detached.discard(follow)
            _close(follow)

    async def _seal(self, follow: _Follow, proof: str) -> None:
        from instantstart_fs.regional.records import Seal, pack, seal_name

        name, pull = seal_name(follow.slot, follow.pin), follow.pull
        seal = Seal(
            follow.target.entry.file.size,
            follow.target.present.chunk_size,
            b"".join(follow.digests[chunk] for chunk in range(pull.chunks)),
            proof,
            self._settings.host,
            time.time(),
        )
        data = pack(self._settings.key, "seal", name, seal)
        try:
            if 0 not in follow.seals:
                await self._thread(lambda: self._sources[0].store.put(name, data))
        except InstantStartError as error:
            log.warning("the regional tier has no seal: %s", error.message, extra={"pipeline": follow.key.pipeline})
        finally:
            self._detached.discard(follow)
            _close(follow)


def _close(follow: _Follow) -> None:
    fd, follow.fd = follow.fd, -1
    if fd >= 0:
        os.close(fd)
