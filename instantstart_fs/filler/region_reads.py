"""Reads from a regional tier for files that the store has no space for.

Whole chunks of files that a tier has sealed are fetched, and each is proven before its reader sees it. Nothing is put
into the tier, and nothing is kept but the last chunks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import trio

from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.patience import CHUNK_DEADLINE
from instantstart_fs.errors import InstantStartError, OriginUnavailable
from instantstart_fs.filler.messages import Piece
from instantstart_fs.filler.region_claims import Claims
from instantstart_fs.filler.region_follow import Place, Routes, Tiers, reason_of
from instantstart_fs.filler.target import FileKey, LiveFile
from instantstart_fs.origins.base import Origin

if TYPE_CHECKING:
    from instantstart_fs.filler.fetch import Fetcher
    from instantstart_fs.regional.records import Seal

FILES, CHUNKS = 256, 4
"""Seals and chunks that are kept in memory."""
UNSEALED_SECONDS = 60.0
"""Seconds until a file without a seal in the region's own tier is asked about again."""
THREADS = 8
QUEUE_SECONDS = 2 * CHUNK_DEADLINE
"""Seconds that a chunk waits for one of the threads. Then it is read from the origin, and no failure is counted."""


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


class _Sealed(NamedTuple):
    """A file that is whole in a tier. ``source`` is that tier; ``place`` holds the file's names there."""

    seal: Seal
    source: int
    place: Place


class _Pending:
    """A chunk that is being fetched. ``data`` is set when it has come; ``given_up`` sends its readers to the origin."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.data: bytearray | None = None
        self.given_up = False


class TierReads:
    """The reads from tiers. On the trio thread. ``places`` gives a file's names in each tier (pipeline, entry, chunk
    size)."""

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
        self._seals: OrderedDict[LiveFile, tuple[_Sealed | None, float]] = OrderedDict()
        """The seal, None where no tier has one; and when that was asked (trio's clock)."""
        self._chunks: OrderedDict[tuple[LiveFile, int], bytearray] = OrderedDict()
        self._finding: dict[LiveFile, trio.Event] = {}
        self._pending: dict[tuple[LiveFile, int], _Pending] = {}
        self._threads = trio.Semaphore(THREADS)
        self._abandoned = trio.CapacityLimiter(4 * THREADS)
        """Threads that were given up. They end by themselves, within the fetcher's own deadlines."""
        self.bytes = 0
        """Bytes that came from tiers since the start."""

    def forget(self, pipeline: str) -> None:
        """Drop what is in memory of a pipeline. Fetches that run for it go on."""
        for file in [file for file in self._seals if file[0].pipeline == pipeline]:
            del self._seals[file]
        for place in [place for place in self._chunks if place[0][0].pipeline == pipeline]:
            del self._chunks[place]

    async def read(
        self, key: FileKey, entry: FileEntry, chunk_size: int, origin: Origin, wanted: ByteRange, fetcher: Fetcher
    ) -> bytearray | None:
        """Return the bytes ``wanted`` of the file; None where they have to come from its origin."""
        if self._tiers.nursery is None or all(tier.is_broken() for tier in self._tiers.sources):
            return None
        file, source = (key, origin), 0
        try:
            if not await self._claims.access.may_use(key.pipeline, entry.model, origin):
                return None
            sealed = await self._find(file, entry, chunk_size)
            if sealed is None:
                return None
            source = sealed.source
            if source == 0:
                self._claims.markers.mark(sealed.place.slot)
            chunks = ChunkMap(entry.file.size, chunk_size)
            found = bytearray()
            for chunk in chunks.chunks_of(wanted):
                where = chunks.byte_range(chunk)
                data = await self._chunk(file, sealed, chunk, where, fetcher)
                if data is None:
                    return None
                found += data[max(wanted.start - where.start, 0) : wanted.stop - where.start]
            return found
        except InstantStartError as error:
            reason = reason_of(error)
            self._tiers.count(reason)
            if reason != "missing":
                self._routes.tier_failed(source, error)
            self._keep(file, None)
            return None

    def _keep(self, file: LiveFile, sealed: _Sealed | None) -> None:
        self._seals[file] = (sealed, trio.current_time())
        while len(self._seals) > FILES:
            self._seals.popitem(last=False)

    async def _find(self, file: LiveFile, entry: FileEntry, chunk_size: int) -> _Sealed | None:
        while file in self._finding:
            await self._finding[file].wait()
        known, asked = self._seals.get(file, (None, -UNSEALED_SECONDS))
        if known is None or known.source:
            if trio.current_time() - asked < UNSEALED_SECONDS:
                return known
        elif not self._tiers.own.is_broken():
            return known
        pipeline, sealed = file[0].pipeline, None
        done = self._finding[file] = trio.Event()
        try:
            for source, place in enumerate(self._places(pipeline, entry, chunk_size)):
                if self._tiers.sources[source].is_broken():
                    continue
                try:
                    seal = await self._claims.find_seal(pipeline, entry, chunk_size, source, place)
                except InstantStartError as error:
                    if source == 0:
                        raise
                    self._tiers.count("failed")
                    self._routes.tier_failed(source, error)
                    continue
                if seal is not None:
                    sealed = _Sealed(seal, source, place)
                    break
            self._keep(file, sealed)
        finally:
            del self._finding[file]
            done.set()
        return sealed

    async def _chunk(
        self, file: LiveFile, sealed: _Sealed, chunk: int, where: ByteRange, fetcher: Fetcher
    ) -> bytearray | None:
        """Return a chunk. Its readers share one fetch: the one that began it gets its failure, the others get None.
        Raises InstantStartError."""
        wanted = (file, chunk)
        while True:
            kept = self._chunks.get(wanted)
            if kept is not None:
                self._chunks.move_to_end(wanted)
                return kept
            other = self._pending.get(wanted)
            if other is None:
                break
            await other.done.wait()
            if other.data is not None or other.given_up:
                return other.data
        mine = self._pending[wanted] = _Pending()
        try:
            mine.data = await self._fetch(sealed, chunk, where, fetcher)
            mine.given_up = mine.data is None
            if mine.data is not None:
                self._chunks[wanted] = mine.data
                while len(self._chunks) > CHUNKS:
                    self._chunks.popitem(last=False)
            return mine.data
        except InstantStartError:
            mine.given_up = True
            raise
        finally:  # where its reader was cancelled, another one fetches it
            del self._pending[wanted]
            mine.done.set()

    async def _fetch(self, sealed: _Sealed, chunk: int, where: ByteRange, fetcher: Fetcher) -> bytearray | None:
        """Fetch a chunk. None where no thread is free in time, or the tier is left alone by then.

        Raises InstantStartError, at the latest twice CHUNK_DEADLINE after the tier was asked.
        """
        from instantstart_fs.filler.fetch import new_buffer
        from instantstart_fs.filler.pieces import fetch_piece
        from instantstart_fs.regional.records import chunk_name

        tier, place = self._tiers.sources[sealed.source], sealed.place
        with trio.move_on_after(QUEUE_SECONDS) as waiting:  # for a thread of ours: that is no silence of the tier
            await self._threads.acquire()
        if waiting.cancelled_caught:
            return None
        try:
            if tier.is_broken():
                return None
            address = tier.store.address(chunk_name(place.slot, place.pin, chunk))
            digest = sealed.seal.digests[32 * chunk : 32 * (chunk + 1)]
            piece = Piece(address.url, tier.secret.chunk_key(place.pin, chunk, where.length), digest, address.headers)
            sink = _Chunk(where.start, where.length)
            try:
                with trio.move_on_after(2 * CHUNK_DEADLINE) as asking:
                    await trio.to_thread.run_sync(
                        lambda: fetch_piece(fetcher, piece, where, new_buffer(), sink),
                        abandon_on_cancel=True,
                        limiter=self._abandoned,
                    )
            except BaseException:
                sink.given_up = True
                raise
            if asking.cancelled_caught:
                sink.given_up = True
                raise OriginUnavailable("the tier is too slow")
        finally:
            self._threads.release()
        tier.answered()
        self.bytes += where.length
        return sink.data
