"""Finds out what the tiers hold of a file, and shares the pulling of the rest with other hosts by claims.

    start ─► waiting ─► asking (has a tier its seal?) ─► sealed
                                ├─► parked ─► followed (list, look at claims, claim) ─► all is here
                                └─► upstream (the own tier is left alone)

Few files are asked about and followed at once, in the order in which they are filled; those with readers go first. It
decides nothing: core/region.py's PullPlan does. It waits for the tier in threads, never on a reader's way.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.claims import ClaimBudget, ClaimMark, looking_period, starting_delay
from instantstart_fs.core.region import GROUP_CHUNKS
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InstantStartError,
    OriginMisbehaved,
    OriginNotFound,
    OriginUnsupported,
)
from instantstart_fs.filler.region_access import SourceAccess
from instantstart_fs.filler.region_follow import Follow, Place, RegionSettings, Routes, Tiers
from instantstart_fs.filler.region_records import FileRecords, UseMarkers

if TYPE_CHECKING:
    from instantstart_fs.core.manifest import FileEntry
    from instantstart_fs.regional.records import Seal

log = logging.getLogger(__name__)

LIST_SECONDS = 0.5
RETRY_SECONDS = 0.5
SEAL_TRIES = 3
TURNS_SECONDS = 12.0
"""Seconds. A file of which every look at the tier fails for so long is fetched without it."""
LONE_BUDGET = 4 * GROUP_CHUNKS
"""The most chunks of a pipeline that this host has in hand while no other host pulls it."""
MOST_ASKED, MOST_FOLLOWED = 8, 8
"""The most files in the background. As many more may be for readers."""
CLAIM_TRIES = 3
"""Claims of a group that the tier refuses before this host pulls the group without one. Chunks that are put keep the
breaker of writes shut meanwhile."""
WATCHED = 16
WINDOW = 32
"""Files among which each host has an order of its own."""


class Claims:
    """Follows files in the tiers. On the trio thread. ``hosts`` is how many hosts the region has now, ``putting`` how
    many chunks of a pipeline are here and in the tier soon. ``won`` and ``lost`` count claims."""

    def __init__(
        self,
        settings: RegionSettings,
        tiers: Tiers,
        routes: Routes,
        hosts: Callable[[], int],
        putting: Callable[[str], int],
    ) -> None:
        self._settings = settings
        self._tiers = tiers
        self._routes = routes
        self._hosts = hosts
        self._putting = putting
        self._waiting: deque[Follow] = deque()
        self._parked: deque[Follow] = deque()
        self._asking = 0
        self._following: set[Follow] = set()
        self._budgets: dict[str, ClaimBudget] = {}
        self._claiming: set[Follow] = set()
        """Files of which this host has claims."""
        self.access = SourceAccess(settings.recheck, lambda: tiers.nursery)
        self.markers = UseMarkers(tiers)
        self.won = self.lost = 0
        self._unsupported = False
        """Whether the tier has said that it cannot create an object only where there is none."""

    # -- whose turn it is --------------------------------------------------------------------------------------------

    def start(self, follow: Follow) -> None:
        """Have the tiers asked about this file when its turn comes."""
        follow.state = "waiting"
        follow.pull.background = True
        (self._waiting.appendleft if follow.pull.has_readers else self._waiting.append)(follow)
        self._pump()

    def urge(self, follow: Follow) -> None:
        """Ask about a file now because a reader waits for it, unless too many files have readers."""
        line = {"waiting": self._waiting, "parked": self._parked}.get(follow.state)
        if line is not None and line[0] is not follow:
            line.remove(follow)
            line.appendleft(follow)
        self._pump()

    def _pump(self) -> None:
        nursery = self._tiers.nursery
        if nursery is None:
            return
        while self._waiting and self._asking < _most(MOST_ASKED, self._waiting[0]):
            follow = self._next_waiting()
            if not follow.over():
                self._asking += 1
                follow.state = "asking"
                nursery.start_soon(self._ask, follow)
        while self._parked and len(self._following) < _most(MOST_FOLLOWED, self._parked[0]):
            follow = self._parked.popleft()
            if not follow.over():
                follow.state = "followed"
                self._following.add(follow)
                nursery.start_soon(self._follow, follow)

    def _next_waiting(self) -> Follow:
        """Return the next file.

        Each host takes small files in another order. They are claimed whole, one after the other, and hosts that want
        the same claim at once would wait for one another in the tier.
        """
        best = first = self._waiting[0]
        if first.pull.groups == 1 and not first.pull.has_readers:
            best = max(itertools.islice(self._waiting, WINDOW), key=lambda follow: follow.score)
        self._waiting.remove(best)
        return best

    # -- whether a tier has it whole ---------------------------------------------------------------------------------

    async def _ask(self, follow: Follow) -> None:
        try:
            target = follow.target
            if not await self.access.may_use(target.key.pipeline, target.entry.model, target.origin):
                self._routes.turn_off(follow)
                return
            if not follow.own_left:
                self.markers.mark(follow.slot)
            for source, tier in enumerate(self._tiers.sources):
                if not (source and tier.is_broken()) and await self._take_seal(follow, source) and source == 0:
                    return
            if not (follow.over() or follow.own_left or await self._claim_whole(follow)):
                self._routes.apply(follow)
                follow.state = "parked"
                (self._parked.appendleft if follow.pull.has_readers else self._parked.append)(follow)
            if follow.own_left and not follow.over():
                self._routes.go_upstream(follow)
        finally:
            self._asking -= 1
            self._pump()

    async def _claim_whole(self, follow: Follow) -> bool:
        """Claim a file of a single group without a listing first. There may be ten thousand such files."""
        if follow.pull.groups > 1 or not self._settings.write_back or not self._tiers.takes_writes():
            return False
        records = FileRecords(self._settings, self._tiers, follow)
        for take in follow.pull.next_claims(1, trio.current_time()):
            await self._claim(follow, records, take.group, take.epoch)
        if not follow.pull.held():
            return False
        if not follow.own_left:
            follow.state = "pulled"
        return True

    async def _take_seal(self, follow: Follow, source: int) -> bool:
        """Whether this tier has the whole file.

        The region's own tier is asked SEAL_TRIES times at most. Its breaker stays shut where it gives everything but
        this seal, and the files behind this one have to get on.
        """
        left = SEAL_TRIES
        while not (follow.over() or (source == 0 and follow.own_left)):
            try:
                target = follow.target
                seal = await self.find_seal(
                    follow.key.pipeline, target.entry, target.present.chunk_size, source, follow.places[source]
                )
            except InstantStartError as error:
                left -= 1
                self._failed(follow, error, source)
                if source or not left:
                    return False
                await trio.sleep(RETRY_SECONDS)
                continue
            if seal is None or follow.over() or (source == 0 and follow.own_left):
                return False
            follow.seals[source] = seal
            follow.pull.sealed(source)
            if source == 0:
                follow.state = "sealed"
                if self._settings.trust_seals and follow.began_empty and follow.fill.worker is None:
                    follow.fill.unhashed = follow.target.entry.file.digest is not None
            self._routes.apply(follow)
            return True
        return False

    def _failed(self, follow: Follow, error: InstantStartError, source: int = 0) -> None:
        """Note that this tier failed for the file."""
        self._tiers.count("failed")
        self._routes.tier_failed(source, error)  # turns it off where that is too often
        if source == 0 and isinstance(error, AccessRefused | CredentialsUnusable):
            self._routes.leave_own(follow)

    async def find_seal(
        self, pipeline: str, entry: FileEntry, chunk_size: int, source: int, place: Place
    ) -> Seal | None:
        """Return the file's seal in this tier. Raises InstantStartError where the tier does not answer."""
        from instantstart_fs.regional.records import Forged, most_seal, seal_name, unpack_seal

        tier, size = self._tiers.sources[source], entry.file.size
        name, store = seal_name(place.slot, place.pin), tier.store
        try:
            data = await self._tiers.ask(lambda: store.get(name, most_seal(size, chunk_size)), source)
            tier.answered()
            return unpack_seal(tier.secret, name, data, size, chunk_size)
        except OriginNotFound:
            tier.answered()
            return None
        except (Forged, OriginMisbehaved) as error:
            self._tiers.count("forged")
            log.error("the regional tier holds a seal that is none: %s", error, extra={"pipeline": pipeline})
            return None

    # -- claims --------------------------------------------------------------------------------------------------------

    async def _follow(self, follow: Follow) -> None:
        """Claim what nobody pulls, and find out what others have put, until the file is complete."""
        records = FileRecords(self._settings, self._tiers, follow)
        pipeline = follow.key.pipeline
        try:
            if pipeline not in self._budgets:
                self._budgets[pipeline] = ClaimBudget(GROUP_CHUNKS, LONE_BUDGET)
                await trio.sleep(starting_delay(self._hosts(), random.random()))
            worked_at = trio.current_time()
            while not (follow.over() or follow.pull.complete):
                follow.changed = trio.Event()
                try:
                    await self._turn(follow, records)
                    worked_at = trio.current_time()
                except InstantStartError as error:
                    self._failed(follow, error)
                    if trio.current_time() - worked_at >= TURNS_SECONDS:  # whatever else of the tier works
                        self._routes.leave_own(follow)
                if follow.over() or follow.pull.complete:
                    break
                await self._pause(follow)
        finally:
            self._following.discard(follow)
            if not any(other.key.pipeline == pipeline for other in (*self._following, *self._parked)):
                self._budgets.pop(pipeline, None)
            self._pump()

    async def _turn(self, follow: Follow, records: FileRecords) -> None:
        """Take one look at the tier, and act on it."""
        pull, now = follow.pull, trio.current_time()
        pull.lag = self._tiers.lag
        if now - follow.listed_at >= looking_period(self._hosts(), LIST_SECONDS) / 2:
            chunks, claims, stamps = await self._tiers.ask(records.listing)
            follow.listed_at = now = trio.current_time()
            pull.listed(chunks, claims, now, stamps)
            self._routes.apply(follow)
            self._look_round(follow, now)
        for take in pull.watches(WATCHED, trio.current_time()):
            mark = await self._tiers.ask(lambda take=take: records.read(take.group, take.epoch))  # type: ignore[misc]
            self._saw(follow, take.group, take.epoch, mark)
        takes = pull.next_claims(self._due(follow), trio.current_time())
        if takes:
            self._budgets[follow.key.pipeline].claimed(trio.current_time())
        for take in takes:
            if self._settings.write_back and self._tiers.takes_writes():
                await self._claim(follow, records, take.group, take.epoch)
            else:
                pull.unclaimed(take.group)  # it gives nothing, so it holds nobody up
        self._routes.apply(follow)

    def _look_round(self, follow: Follow, now: float) -> None:
        pipeline = follow.key.pipeline
        others = sum(one.pull.others(now) for one in self._following if one.key.pipeline == pipeline)
        self._budgets[pipeline].looked(now, others=others)

    def _due(self, follow: Follow) -> int:
        pipeline = follow.key.pipeline
        budget = self._budgets[pipeline]
        pulling = sum(one.pull.holding for one in self._following if one.key.pipeline == pipeline)
        if follow.pull.has_readers:  # no reader waits for a put
            return budget.left(pulling)
        return budget.due(pulling, self._putting(pipeline))

    def _saw(self, follow: Follow, group: int, epoch: int, mark: ClaimMark | str) -> None:
        pull, now = follow.pull, trio.current_time()
        if mark == "forged":
            self._tiers.count("forged")
            pull.forged(group, epoch)
        elif not isinstance(mark, ClaimMark):
            pull.vanished(group, epoch)
        elif mark.host == self._settings.me:
            self._won(follow, group, epoch)
        else:
            pull.seen(group, epoch, mark, now)

    def _won(self, follow: Follow, group: int, epoch: int) -> None:
        self.won += 1
        follow.pull.recovered(group, epoch, trio.current_time())
        self._claiming.add(follow)
        self._routes.apply(follow)

    async def _claim(self, follow: Follow, records: FileRecords, group: int, epoch: int) -> None:
        pull = follow.pull
        try:
            won = await self._tiers.ask(lambda: records.claim(group, epoch))
            self._tiers.writes.succeeded()
            if (
                won and follow.pull.groups > 1
            ):  # who had it may have put all of it, and removed the claim, since this host looked
                pull.listed(await self._tiers.ask(lambda: records.chunks(group)), {}, trio.current_time())
        except InstantStartError as error:
            tries = follow.unclaimed[group] = follow.unclaimed.get(group, 0) + 1
            if isinstance(error, OriginUnsupported):
                pull.unclaimed(group)
                if not self._unsupported:
                    log.warning("the regional tier takes no claims, so hosts may pull a chunk twice: %s", error.message)
                self._unsupported = True
                return
            # Where the put was only slow, its record tells by and by: a listing names it.
            (pull.unasked if tries < CLAIM_TRIES else pull.unclaimed)(group)
            if self._tiers.writes.failed(trio.current_time(), 1.0) or not self._tiers.takes_writes():
                log.warning("the regional tier takes no claims: %s", error.message)
            return
        if won:
            self._won(follow, group, epoch)
        else:
            self.lost += 1
            pull.lost(group, trio.current_time())

    async def _pause(self, follow: Follow) -> None:
        """Until the next look; less, once there is room for a claim or a reader waits."""
        waits = looking_period(self._hosts(), LIST_SECONDS) * (0.75 + random.random() / 2)
        with trio.move_on_after(waits):
            await follow.changed.wait()
            while not (follow.over() or follow.pull.complete or self._due(follow) > 0):
                follow.changed = trio.Event()
                await follow.changed.wait()
        await trio.sleep(0.02)

    async def renew_forever(self) -> None:
        """Renew this host's claims, whatever else it waits for, and remove claims of what is in the tier."""
        while True:
            await trio.sleep(0.5)
            async with trio.open_nursery() as nursery:
                for follow in list(self._claiming):
                    nursery.start_soon(self._renew, follow)

    async def _renew(self, follow: Follow) -> None:
        records = FileRecords(self._settings, self._tiers, follow)
        for group, epoch, whole in follow.pull.held():
            # Of a file that is one group the claim stays until it is sealed: others look for nothing else.
            put = not follow.is_putting(group)
            if follow.pull.groups == 1 and not follow.own_left:
                put = follow.closed
            if put and (whole or follow.over()):
                follow.pull.released(group)
                with contextlib.suppress(InstantStartError):  # else it expires
                    await self._tiers.ask(lambda group=group, epoch=epoch: records.remove(group, epoch))  # type: ignore[misc]
        for renewal in follow.pull.renewals(trio.current_time()):
            with contextlib.suppress(InstantStartError):  # the next one comes soon
                await self._tiers.ask(lambda renewal=renewal: records.renew(renewal))  # type: ignore[misc]
        if not follow.pull.held():
            self._claiming.discard(follow)


def _most(count: int, follow: Follow) -> int:
    return 2 * count if follow.pull.has_readers else count
