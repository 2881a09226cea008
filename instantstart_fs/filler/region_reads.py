"""Reads of what there is no room for, from a regional tier: whole chunks of files that a tier has sealed, each proven
before its reader sees it. Nothing is put into the tier, and nothing is kept but the last chunks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.region import CHUNK_DEADLINE
from instantstart_fs.errors import InstantStartError, OriginMisbehaved, OriginNotFound, OriginUnavailable
from instantstart_fs.filler.messages import Piece
from instantstart_fs.filler.region_claims import Claims
from instantstart_fs.filler.region_follow import Place, Routes, Tiers
from instantstart_fs.filler.target import FileKey
from instantstart_fs.origins.base import Origin

if TYPE_CHECKING:
    from instantstart_fs.filler.fetch import Fetcher
    from instantstart_fs.regional.records import Seal

FILES, CHUNKS = 256, 4
"""Seals and chunks that are kept in memory."""
UNSEALED_SECONDS = 60.0
"""How long a file without a seal is not asked about again."""
THREADS = 8


class _Chunk:
    """A sink (filler/fetch.py) that keeps one chunk in memory."""

    def __init__(self, start: int, length: int) -> None:
        self.data = bytearray(length)
        self.given_up = False
        self._start = start

    def write(self, data: memoryview, offset: int) -> None:
        at = offset - self._start
        self.data[at : at + len(data)] = data

    def before_read(self) -> None:
        if self.given_up:
            from instantstart_fs.filler.fetch import Abandoned

            raise Abandoned

    def progress(self, count: int) -> None:
        pass

    def take_whole(self) -> None:
        return None


class TierReads:
    """On the trio thread. ``places``: of a file in each tier (pipeline, entry, chunk size)."""

    def __init__(
        self,
        tiers: Tiers,
        claims: Claims,
        routes: Routes,
        places: Callable[[str, FileEntry, int], list[Place]],
    ) -> None:
        self._tiers = tiers
        self._claims = claims
        self._routes = routes
        self._places = places
        self._seals: OrderedDict[FileKey, tuple[Seal | None, int, float]] = OrderedDict()
        """The seal, of which tier, and when that was asked (trio)."""
        self._chunks: OrderedDict[tuple[FileKey, int], bytearray] = OrderedDict()
        self._threads = trio.CapacityLimiter(THREADS)
        self.bytes = 0
        """Bytes that came from tiers since the start."""

    async def read(
        self, key: FileKey, entry: FileEntry, chunk_size: int, origin: Origin, wanted: ByteRange, fetcher: Fetcher
    ) -> bytearray | None:
        """The bytes ``wanted`` of the file; None where they are to come from its origin."""
        if self._tiers.is_broken() or self._tiers.nursery is None:
            return None
        try:
            if not await self._claims.access.may_use(key.pipeline, entry.model, origin):
                return None
            seal, source = await self._seal(key, entry, chunk_size)
            if seal is None:
                return None
            chunks = ChunkMap(entry.file.size, chunk_size)
            found = bytearray()
            for chunk in chunks.chunks_of(wanted):
                place = chunks.byte_range(chunk)
                data = await self._chunk(key, entry, chunk_size, chunk, place, seal, source, fetcher)
                found += data[max(wanted.start - place.start, 0) : wanted.stop - place.start]
            return found
        except InstantStartError as error:
            missing, wrong = isinstance(error, OriginNotFound), isinstance(error, OriginMisbehaved)
            reason = "missing" if missing else "wrong" if wrong else "failed"
            self._tiers.count(reason)
            if reason != "missing":
                self._routes.tier_failed(error)
            self._seals[key] = (None, 0, trio.current_time())
            return None

    async def _seal(self, key: FileKey, entry: FileEntry, chunk_size: int) -> tuple[Seal | None, int]:
        seal, source, asked = self._seals.get(key, (None, 0, -UNSEALED_SECONDS))
        if seal is not None or trio.current_time() - asked < UNSEALED_SECONDS:
            return seal, source
        for source, place in enumerate(self._places(key.pipeline, entry, chunk_size)):
            seal = await self._claims.find_seal(key.pipeline, entry, chunk_size, source, place)
            if seal is not None:
                break
        self._seals[key] = (seal, source, trio.current_time())
        while len(self._seals) > FILES:
            self._seals.popitem(last=False)
        return seal, source

    async def _chunk(
        self,
        key: FileKey,
        entry: FileEntry,
        chunk_size: int,
        chunk: int,
        where: ByteRange,
        seal: Seal,
        source: int,
        fetcher: Fetcher,
    ) -> bytearray:
        """Raises InstantStartError, at the latest after twice CHUNK_DEADLINE."""
        from instantstart_fs.filler.fetch import new_buffer
        from instantstart_fs.filler.pieces import fetch_piece
        from instantstart_fs.regional.records import chunk_name

        kept = self._chunks.get((key, chunk))
        if kept is not None:
            return kept
        tier, place = self._tiers.sources[source], self._places(key.pipeline, entry, chunk_size)[source]
        address = tier.store.address(chunk_name(place.slot, place.pin, chunk))
        digest = seal.digests[32 * chunk : 32 * (chunk + 1)]
        piece = Piece(address.url, tier.secret.chunk_key(place.pin, chunk, where.length), digest, address.headers)
        sink = _Chunk(where.start, where.length)
        try:
            with trio.move_on_after(2 * CHUNK_DEADLINE) as scope:
                await trio.to_thread.run_sync(
                    lambda: fetch_piece(fetcher, piece, where, new_buffer(), sink),
                    abandon_on_cancel=True,
                    limiter=self._threads,
                )
        except BaseException:
            sink.given_up = True
            raise
        if scope.cancelled_caught:
            sink.given_up = True
            raise OriginUnavailable("the tier is too slow")
        self._tiers.answers(source)
        self.bytes += where.length
        self._chunks[(key, chunk)] = sink.data
        while len(self._chunks) > CHUNKS:
            self._chunks.popitem(last=False)
        return sink.data
