"""Reads and writes the tier's records of one file that is followed. Its calls block; use threads."""

from __future__ import annotations

import math
import time

import trio

from instantstart_fs.core.claims import ClaimMark, Renewal
from instantstart_fs.core.region import GROUP_CHUNKS
from instantstart_fs.errors import InstantStartError, OriginMisbehaved, OriginNotFound
from instantstart_fs.filler.region_follow import Follow, RegionSettings, Tiers
from instantstart_fs.regional import records

MARK_SECONDS = 3600.0
"""So much earlier than its last use a slot may seem to have been used last."""
MARK_AGAIN_SECONDS = 60.0
"""Seconds after which a marker that could not be written is tried again."""
MOST_LISTED = 200_000
"""The most names of one file that are read. A listing may have no end."""


class FileRecords:
    """The calls. Thread-safe; all raise InstantStartError."""

    def __init__(self, settings: RegionSettings, tiers: Tiers, follow: Follow) -> None:
        self._key = settings.key
        self._store = tiers.sources[0].store
        self._slot, self._pin = follow.slot, follow.pin
        self._host, self._life = settings.host, settings.life

    def listing(self) -> tuple[list[int], dict[int, int], dict[int, float]]:
        """Return the chunks that the tier has, the epoch of each claimed group, and when that claim's record last
        changed."""
        below = records.directory(self._slot, self._pin)
        chunks: list[int] = []
        claims: dict[int, int] = {}
        stamps: dict[int, float] = {}
        for found in self._store.list(below, MOST_LISTED):
            what = records.listed(found.name.removeprefix(below))
            if what is None:
                continue
            number, epoch = what
            if epoch is None:
                chunks.append(number)
            elif epoch >= claims.get(number, 0):
                claims[number], stamps[number] = epoch, found.modified
        return chunks, claims, stamps

    def chunks(self, group: int) -> list[int]:
        """Return the chunks of a group that the tier has."""
        below = records.directory(self._slot, self._pin)
        found = self._store.list(f"{below}{records.near(group * GROUP_CHUNKS)}", MOST_LISTED)
        names = (records.listed(one.name.removeprefix(below)) for one in found)
        return [what[0] for what in names if what is not None and what[1] is None]

    def read(self, group: int, epoch: int) -> ClaimMark | str:
        """Read a claim's record: "vanished" where there is none, "forged" where no host of the region wrote it."""
        name = records.claim_name(self._slot, self._pin, group, epoch)
        try:
            claim = records.unpack_claim(self._key, name, self._store.get(name, records.MOST_RECORD))
        except OriginNotFound:
            return "vanished"
        except (records.Forged, OriginMisbehaved):
            return "forged"
        return ClaimMark(f"{claim.host}/{claim.life}", claim.beat, claim.done)

    def claim(self, group: int, epoch: int) -> bool:
        """Try to claim the group. Returns whether this host has it now."""
        name, data = self._record(group, epoch, 0, 0)
        return self._store.put_new(name, data)

    def renew(self, renewal: Renewal) -> None:
        name, data = self._record(renewal.group, renewal.epoch, renewal.mark.beat, renewal.mark.done)
        self._store.put(name, data)

    def remove(self, group: int, epoch: int) -> None:
        self._store.delete(records.claim_name(self._slot, self._pin, group, epoch))

    def _record(self, group: int, epoch: int, beat: int, done: int) -> tuple[str, bytes]:
        name = records.claim_name(self._slot, self._pin, group, epoch)
        return name, records.pack(self._key, "claim", name, records.ClaimRecord(self._host, self._life, beat, done))


class UseMarkers:
    """Marks slots as used: `instantstart regional gc` removes what is not. One small object for each day, written again
    MARK_SECONDS later at the soonest. On the trio thread."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._marked: dict[str, float] = {}
        """By slot, when that was done or begun."""

    def mark(self, slot: str) -> None:
        """Mark the slot, where that is due. Nobody waits for it."""
        now, nursery = trio.current_time(), self._tiers.nursery
        if nursery is None or self._tiers.own.is_broken() or now - self._marked.get(slot, -math.inf) < MARK_SECONDS:
            return
        self._marked[slot] = now
        nursery.start_soon(self._write, slot)

    async def _write(self, slot: str) -> None:
        name = f"v1/{slot}/used/{time.strftime('%Y-%m-%d', time.gmtime())}"
        try:
            await self._tiers.ask(lambda: self._tiers.own.store.put(name, b""))
        except InstantStartError:  # a tier may take no puts at all, and uses may be thousands a second
            self._marked[slot] = trio.current_time() - MARK_SECONDS + MARK_AGAIN_SECONDS
