"""Uncached reads: bytes go from the origin straight to their reader while the store has no space for a pipeline
(docs/SEMANTICS.md, Space). Nothing is written to the store.

Blocks of BLOCK bytes are fetched in THREADS threads of the daemon per pipeline, so that a pipeline with a stuck source
delays no other. The last blocks are kept for the next read of a sequential reader: memory is bounded by CACHE_BLOCKS,
and by THREADS for each pipeline that is read so. Readers of one block share one fetch.

Where a regional tier has the file sealed, its chunks are taken from there (filler/region_reads.py): they are proven.

Each block passes the checks of a chunk that goes into the store (filler/fetch.py: length, Content-Range, the pinned
ETag). A digest over the whole file cannot be computed, so ``serve_unsealed`` decides as for unsealed files: bytes from
a protected address are served, reads of others fail. A file that fits into one block is fetched whole and proven by its
digest.
"""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.core.faults import Streak
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.retry import REPEAT_SECONDS, believed_retry_after
from instantstart_fs.core.trust import may_serve_unsealed
from instantstart_fs.errors import (
    AccessRefused,
    DigestMismatch,
    InstantStartError,
    LocationExpired,
    OriginMisbehaved,
    OriginThrottled,
    OriginUnavailable,
    ReadDeadline,
    StoreFull,
)
from instantstart_fs.filler.breakers import Breakers, host_of
from instantstart_fs.filler.messages import WorkerSettings
from instantstart_fs.filler.origin_backoff import OriginBackoff
from instantstart_fs.filler.settings import FillSettings
from instantstart_fs.filler.sources import Locator, expired
from instantstart_fs.filler.tally import Tally
from instantstart_fs.filler.target import FileKey, LiveFile
from instantstart_fs.origins.base import Location, Origin

if TYPE_CHECKING:
    from instantstart_fs.filler.fetch import Fetcher
    from instantstart_fs.filler.region_reads import TierReads

BLOCK = 4 * 1024 * 1024
"""Bytes of one GET. The kernel's readahead asks for 128 KiB to 1 MiB at a time."""
CACHE_BLOCKS = 8
THREADS = 4
LOCATIONS = 256


class _BufferSink:
    """A sink (filler/fetch.py) that keeps the bytes in memory."""

    def __init__(self, wanted: ByteRange) -> None:
        self.data = bytearray(wanted.length)
        self.abandoned = False
        self.answered: float | None = None
        self._start = wanted.start

    def write(self, data: memoryview, offset: int) -> None:
        at = offset - self._start
        self.data[at : at + len(data)] = data

    def before_read(self) -> None:
        if self.abandoned:
            from instantstart_fs.filler.fetch import Abandoned

            raise Abandoned

    def progress(self, count: int) -> None:
        pass

    def take_whole(self) -> None:
        """Refuse the whole file: nothing is kept here, so each block would fetch it again."""


class _PendingBlock:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: InstantStartError | None = None


class UncachedReader:
    """Shares the locator, the breakers and the counters of the filler. On the trio thread."""

    def __init__(
        self, locator: Locator, settings: FillSettings, breakers: Breakers, origin_backoff: OriginBackoff, tally: Tally
    ) -> None:
        self._tally = tally
        self._locator = locator
        self._settings = settings
        self._breakers = breakers
        self._origin_backoff = origin_backoff
        self.tiers: TierReads | None = None
        """The tiers that are asked before the origin."""
        self._threads: dict[str, trio.CapacityLimiter] = {}
        self._blocks: OrderedDict[tuple[LiveFile, int], bytearray] = OrderedDict()
        self._pending: dict[tuple[LiveFile, int], _PendingBlock] = {}
        self._gave_up: dict[tuple[LiveFile, int], tuple[float, ReadDeadline]] = {}
        """Waits that ended without their block within the last REPEAT_SECONDS."""
        self._last_error: dict[LiveFile, str] = {}
        """The message of a file's last failed fetch, until one succeeds."""
        self._locations: OrderedDict[LiveFile, Location] = OrderedDict()
        self._random = random.Random()
        self.bytes = 0
        """Bytes served since the start."""

    @functools.cached_property
    def _fetcher(self) -> Fetcher:
        # Imported here: urllib3 is a tenth of the daemon's start, for what most daemons never do.
        from instantstart_fs.filler.fetch import Fetcher

        settings = self._settings
        return Fetcher(WorkerSettings(connect_timeout=settings.connect_timeout, stall_timeout=settings.stall_timeout))

    def forget(self, pipeline: str) -> None:
        """Drop what is in memory of a pipeline. What is still under way for it ends as it would."""
        for place in [place for place in self._blocks if place[0][0].pipeline == pipeline]:
            del self._blocks[place]
        self._threads.pop(pipeline, None)
        for file in [file for file in self._locations if file[0].pipeline == pipeline]:
            del self._locations[file]
        for file in [file for file in self._last_error if file[0].pipeline == pipeline]:
            del self._last_error[file]

    def in_memory(self, key: FileKey, source: Origin, offset: int, length: int) -> bool:
        """Whether these bytes are in memory from the last reads."""
        blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        return all(((key, source), block) in self._blocks for block in blocks)

    async def read(
        self,
        key: FileKey,
        entry: FileEntry,
        chunk_size: int,
        source: Origin,
        offset: int,
        view: memoryview,
        since: float | None = None,
    ) -> None:
        """Fill ``view`` with the file's bytes from ``offset``.

        Args:
            key: The file.
            entry: Its manifest entry.
            chunk_size: Of its generation.
            source: Where to fetch it from.
            offset: First byte; the whole view must lie within the file.
            view: Takes the bytes.
            since: trio.current_time() since which the reader waits; None = now.

        Raises:
            ReadDeadline: No block came within ``read_deadline`` seconds. It is repeated at once for readers of the same
                block within REPEAT_SECONDS (see FillTarget.wait_readable).
            InstantStartError: The block cannot be had.
        """
        done, since = 0, trio.current_time() if since is None else since
        while done < len(view):
            block, skip = divmod(offset + done, BLOCK)
            place, now = ((key, source), block), trio.current_time()
            if place not in self._blocks:
                self._gave_up = {where: what for where, what in self._gave_up.items() if what[0] > now - REPEAT_SECONDS}
                if place in self._gave_up:
                    raise self._gave_up[place][1]
            with trio.move_on_at(since + self._settings.read_deadline) as scope:
                data = await self._block(key, entry, chunk_size, source, block)
            if scope.cancelled_caught:
                said = f" ({self._last_error[key, source]})" if (key, source) in self._last_error else ""
                error = ReadDeadline(f"{entry.path}: no bytes within {self._settings.read_deadline:g} s{said}")
                self._gave_up.setdefault(place, (trio.current_time(), error))
                raise error
            since = trio.current_time()
            count = min(len(data) - skip, len(view) - done)
            view[done : done + count] = memoryview(data)[skip : skip + count]
            done += count
        self.bytes += done

    async def _block(self, key: FileKey, entry: FileEntry, chunk_size: int, source: Origin, block: int) -> bytearray:
        place = ((key, source), block)
        while True:
            data = self._blocks.get(place)
            if data is not None:
                self._blocks.move_to_end(place)
                return data
            other = self._pending.get(place)
            if other is None:
                break
            await other.done.wait()
            if other.error is not None:
                raise other.error
        mine = self._pending[place] = _PendingBlock()
        try:
            data = await self._load(key, entry, chunk_size, source, block)
            self._blocks[place] = data
            while len(self._blocks) > CACHE_BLOCKS:
                self._blocks.popitem(last=False)
            return data
        except InstantStartError as error:
            mine.error = error
            raise
        finally:
            del self._pending[place]
            mine.done.set()

    async def _load(self, key: FileKey, entry: FileEntry, chunk_size: int, source: Origin, block: int) -> bytearray:
        """Fetch with retries and backoff; the caller has a deadline. Raises errors that a retry cannot mend."""
        if self.tiers is not None and chunk_size:
            wanted = ByteRange(block * BLOCK, min((block + 1) * BLOCK, entry.file.size))
            found = await self.tiers.read(key, entry, chunk_size, source, wanted, self._fetcher)
            if found is not None:
                return found
        failures = refused = stale = 0
        streak = Streak()
        while True:
            broken = self._breakers.broken(source.key, key, half_open=False)
            if broken is not None:
                raise broken
            started, known = trio.current_time(), self._locations.get((key, source))
            try:
                data = await self._fetch(key, entry, source, block)
            except LocationExpired as error:
                # Only the source can refuse access, when asked for a fresh address.
                self._tally.failed(source.key, error.code)
                self._locations.pop((key, source), None)
                self._note(key, source, error)
                final = streak.failed(error)
                if final is not None:
                    raise final from error
                stale += 1
                if stale > 1:
                    await trio.sleep(self._settings.backoff.delay(stale - 1, self._random.random()))
                continue
            except AccessRefused as error:
                self._tally.failed(source.key, error.code)
                refused += 1
                if self._locations.pop((key, source), None) is None or refused > 1:
                    raise
                continue
            except OriginUnavailable as error:
                self._tally.failed(source.key, error.code)
                asked = self._locations.pop((key, source), known)
                self._note(key, source, error)
                final = streak.failed(error)
                if final is not None:
                    raise final from error
                failures += 1
                pause = self._settings.backoff.delay(failures, self._random.random())
                if isinstance(error, OriginThrottled):
                    pause = max(pause, believed_retry_after(error.retry_after) or 0.0)
                elif not isinstance(error, OriginMisbehaved):
                    host = host_of(source.key, asked.url if asked is not None else None)
                    self._origin_backoff.origin_failed(source.key, host, key, trio.current_time() - started, error)
                await trio.sleep(pause)
                continue
            used = self._locations.get((key, source))
            self._origin_backoff.origin_answered(
                source.key, host_of(source.key, used.url if used is not None else None), key
            )
            self._last_error.pop((key, source), None)
            return data

    def _note(self, key: FileKey, source: Origin, error: InstantStartError) -> None:
        self._last_error[key, source] = error.message
        if len(self._last_error) > LOCATIONS:
            del self._last_error[next(iter(self._last_error))]

    async def _fetch(self, key: FileKey, entry: FileEntry, source: Origin, block: int) -> bytearray:
        size, digest = entry.file.size, entry.file.digest
        wanted = ByteRange(block * BLOCK, min((block + 1) * BLOCK, size))
        location = self._locations.get((key, source))
        if location is None or expired(location):
            location = self._locations[key, source] = await self._locator.locate(source, entry, key.pipeline)
            while len(self._locations) > LOCATIONS:
                self._locations.popitem(last=False)
        provable = digest is not None and wanted.length == size
        if not provable and not may_serve_unsealed(self._settings.serve_unsealed, location.trusted):
            raise StoreFull(
                f"{entry.path}: there is no space to keep it, and bytes that come unprotected may not be served "
                "before the whole file is proven (fill.serve_unsealed)"
            )
        sink = _BufferSink(wanted)
        where = location

        def get() -> None:
            from instantstart_fs.filler.fetch import new_buffer

            sink.answered = self._fetcher.fetch(where, wanted, size, new_buffer(), sink)
            if digest is not None and provable:
                hasher = new_hasher(digest, size)
                hasher.update(bytes(sink.data))
                if hasher.hexdigest() != digest.value:
                    raise DigestMismatch(f"{entry.path}: the bytes that came are not those that were pinned")

        try:
            threads = self._threads.setdefault(key.pipeline, trio.CapacityLimiter(THREADS))
            await trio.to_thread.run_sync(get, abandon_on_cancel=True, limiter=threads)
        except trio.Cancelled:
            sink.abandoned = True
            raise
        if sink.answered is not None:
            self._tally.answered(source.key, sink.answered)
        return sink.data
