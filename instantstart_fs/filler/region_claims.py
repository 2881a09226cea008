"""Finds out what the tiers hold of a file, and shares the pulling of the rest with other hosts by claims.

It decides nothing: core/region.py's PullPlan does. It waits for the tier in threads, never on a reader's way.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.region import GROUP_CHUNKS, ClaimMark
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InstantStartError,
    OriginMisbehaved,
    OriginNotFound,
)
from instantstart_fs.filler.region_follow import Follow, RegionSettings, Routes, Tiers

if TYPE_CHECKING:
    from instantstart_fs.regional.records import Seal

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
LIST_SECONDS = 0.5
MOST_LISTED = 200_000
"""Names of one file that are read: a listing may have no end."""
ROOM = 2 * GROUP_CHUNKS
"""Chunks of a file under this host's claims at once."""
MOST_FOLLOWED = 64
WATCHED = 16


class Claims:
    """On the trio thread. ``followed``: how many files are followed now; ``won`` and ``lost`` count claims;
    ``allowed``: by pipeline, whether its own credentials may read the source, once that was asked."""

    def __init__(self, settings: RegionSettings, tiers: Tiers, routes: Routes, followed: Callable[[], int]) -> None:
        self._settings = settings
        self._tiers = tiers
        self._routes = routes
        self._followed = followed
        self._life = secrets.token_hex(8)
        self.allowed: dict[str, bool] = {}
        self._checking: dict[str, trio.Event] = {}
        self._used: dict[str, str] = {}
        self.won = self.lost = 0

    async def _may_use(self, follow: Follow) -> bool:
        """Whether the pipeline's own credentials may read the source: asked once, before the first use."""
        pipeline = follow.key.pipeline
        while pipeline in self._checking:
            await self._checking[pipeline].wait()
        if pipeline not in self.allowed:
            done = self._checking[pipeline] = trio.Event()
            try:
                with trio.move_on_after(CHECK_SECONDS):
                    await trio.to_thread.run_sync(
                        follow.target.origin.check, abandon_on_cancel=True, limiter=self._tiers.threads
                    )
                self.allowed[pipeline] = True  # an origin that does not answer refuses nobody: it was listed here
            except (AccessRefused, CredentialsUnusable) as error:
                self.allowed[pipeline] = False
                log.warning(
                    "nothing is taken from the regional tier: the source refuses this pipeline (%s)",
                    error.message,
                    extra={"pipeline": pipeline},
                )
            except InstantStartError:
                self.allowed[pipeline] = True
            finally:
                del self._checking[pipeline]
                done.set()
        return self.allowed.get(pipeline, False)

    async def ask(self, follow: Follow) -> None:
        """Find out what the tiers have of a file; then follow it, if no seal says that all is there."""
        try:
            if not await self._may_use(follow):
                self._routes.turn_off(follow)
                return
            self._mark_used(follow.slot)
            for source in range(len(self._tiers.sources)):
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
                self._routes.apply(follow)
                return
            while self._followed() >= MOST_FOLLOWED:
                self._routes.apply(follow)
                await trio.sleep(LIST_SECONDS)
            if follow.over():
                return
            follow.state = "followed"
            await self._follow(follow)
        except InstantStartError as error:
            self._routes.tier_failed(error)
            self._routes.turn_off(follow)

    def _mark_used(self, slot: str) -> None:
        """Once a day and host: what is not used goes (`instantstart regional gc`)."""
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if self._used.get(slot) == day or self._tiers.nursery is None:
            return
        self._used[slot] = day
        name = f"v1/{slot}/used/{day}"

        async def mark() -> None:
            with contextlib.suppress(InstantStartError):
                await self._tiers.ask(lambda: self._tiers.sources[0].store.put_new(name, b""))

        self._tiers.nursery.start_soon(mark)

    async def _find_seal(self, follow: Follow, source: int) -> Seal | None:
        from instantstart_fs.regional.records import Forged, most_seal, seal_name, unpack_seal

        name, store = seal_name(follow.slot, follow.pin), self._tiers.sources[source].store
        size, chunk_size = follow.target.entry.file.size, follow.target.present.chunk_size
        try:
            data = await self._tiers.ask(lambda: store.get(name, most_seal(size, chunk_size)))
            self._tiers.answers(source)
            return unpack_seal(self._settings.key, name, data, size, chunk_size)
        except OriginNotFound:
            self._tiers.answers(source)
            return None
        except (Forged, OriginMisbehaved) as error:
            self._tiers.count("forged")
            log.error("the regional tier holds a seal that is none: %s", error, extra={"pipeline": follow.key.pipeline})
            return None
        except InstantStartError:
            if source == 0:
                raise
            return None

    async def _follow(self, follow: Follow) -> None:
        """Claim what nobody pulls, and find out what others have put, until all is here."""
        from instantstart_fs.regional import records

        store, pull, key = self._tiers.sources[0].store, follow.pull, self._settings.key
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
            chunks, claims = await self._tiers.ask(look)
            pull.listed(chunks, claims, trio.current_time())
            self._routes.apply(follow)
            for take in pull.watches(WATCHED, trio.current_time()):
                mark = await self._tiers.ask(lambda take=take: read(take.group, take.epoch))  # type: ignore[misc]
                if isinstance(mark, ClaimMark):
                    pull.seen(take.group, take.epoch, mark, trio.current_time())
                elif mark == "forged":
                    self._tiers.count("forged")
                    pull.forged(take.group, take.epoch)
                else:
                    pull.vanished(take.group, take.epoch)
            room = ROOM - pull.holding
            for take in pull.next_claims(room, trio.current_time()) if self._settings.write_back else ():
                name, data = record(take.group, take.epoch, ClaimMark("", 0, 0))
                try:
                    won = await self._tiers.ask(lambda name=name, data=data: store.put_new(name, data))  # type: ignore[misc]
                except InstantStartError as error:
                    self._routes.tier_failed(error)
                    pull.unclaimed(take.group)
                else:
                    if won:
                        self.won += 1
                        follow.claims[take.group] = take.epoch
                        pull.won(take.group, trio.current_time())
                    else:
                        self.lost += 1
                        pull.lost(take.group, trio.current_time())
                self._routes.apply(follow)
            if not self._settings.write_back:  # it gives nothing, so it holds nobody up
                for take in pull.next_claims(room, trio.current_time()):
                    pull.unclaimed(take.group)
            for renewal in pull.renewals(trio.current_time()):
                name, data = record(renewal.group, renewal.epoch, renewal.mark)
                await self._tiers.ask(lambda name=name, data=data: store.put(name, data))  # type: ignore[misc]
            pull.take_finished()
            self._routes.apply(follow)
            if follow.over() or pull.complete:
                break
            waits = LIST_SECONDS * (0.75 + random.random() / 2)
            if pull.holding <= ROOM // 2:
                with trio.move_on_after(waits):
                    await follow.changed.wait()
                await trio.sleep(0.02)
            else:
                await trio.sleep(waits)
