"""Puts chunks that came from elsewhere into the region's own tier, and seals a file there once this host has proven it.

No reader ever waits for a put.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

import trio

from instantstart_fs.errors import InstantStartError, OriginUnavailable
from instantstart_fs.filler.region_follow import Follow, RegionSettings, Tiers, ask_tier
from instantstart_fs.ipc.threads import LentDescriptor

if TYPE_CHECKING:
    from instantstart_fs.regional.store import TierStore

log = logging.getLogger(__name__)

PUTS = 4
"""The most chunks that are put at once."""
BEHIND_SECONDS = 4.0
"""When a chunk has waited so long for its put to begin, the tier is slower than what fills it."""
MOST_OPEN = 1000
"""The most files that are written back at once. Each needs a descriptor. Where the tier, or ``rate``, is slower than
the origin, many small files would otherwise take all descriptors that the daemon may have."""


class _Put:
    """One chunk on its way into the tier, in a thread that may be given up and end later, or never.

    It reads by a descriptor of its own. The file may be closed meanwhile, and its number be another file's.
    """

    def __init__(self, settings: RegionSettings, store: TierStore, follow: Follow, chunk: int) -> None:
        from instantstart_fs.regional.records import chunk_name

        self._store = store
        self._follow = follow
        self._owed = follow.to_put
        self._losses = follow.target.losses
        self._where = follow.target.present.byte_range(chunk)
        self._name = chunk_name(follow.slot, follow.pin, chunk)
        self._key = settings.key.chunk_key(follow.pin, chunk, self._where.length)
        self._lent = LentDescriptor(follow.fd)
        self.close = self._lent.close

    def withdrawn(self) -> bool:
        """Whether the bytes may be wrong, because the file proved wrong or lost some of them meanwhile."""
        return self._follow.to_put is not self._owed or self._follow.target.losses != self._losses

    def __call__(self) -> bytes | None:
        """Put the chunk. Blocks. Returns its digest; None where it was withdrawn meanwhile and removed again. Raises
        OriginError, and OSError where the file cannot be read."""
        from instantstart_fs.regional.keys import keyed_digest
        from instantstart_fs.regional.records import HEADER

        with self._lent.taken() as fd:
            data = bytearray(HEADER + self._where.length)
            view = memoryview(data)
            done = 0
            while done < self._where.length:
                count = os.preadv(fd, [view[HEADER + done :]], self._where.start + done)
                if count <= 0:
                    raise OriginUnavailable("the file ends early")
                done += count
        digest = keyed_digest(self._key, view[HEADER:])
        view[:HEADER] = digest
        if self.withdrawn():
            return None
        try:
            self._store.put(self._name, data)
        finally:
            if self.withdrawn():  # here, not by who waited for it: that one may have gone
                self._store.delete(self._name)
        return None if self.withdrawn() else digest


class WriteBack:
    """The queue and its tasks. On the trio thread. ``detached`` holds the files whose fill is over and of which
    something is still to be put; ``put_bytes`` counts what was put."""

    def __init__(self, settings: RegionSettings, tiers: Tiers) -> None:
        self._settings = settings
        self._tiers = tiers
        self.detached: set[Follow] = set()
        self._queue: deque[tuple[Follow, int, float]] = deque()
        """What is to be put, since when."""
        self._putting: Counter[str] = Counter()
        """By pipeline, chunks of files of several groups that are queued or being put."""
        self._open: set[Follow] = set()
        """Files with a descriptor, and some that have closed theirs."""
        self._sealing: set[Follow] = set()
        """Files whose seal is being put: others wait for that, and for the claim's end after it."""
        self._full = False
        self._more = trio.Event()
        self._threads = trio.CapacityLimiter(PUTS)
        self.put_bytes = 0

    @property
    def pending(self) -> int:
        return len(self._queue)

    def putting(self, pipeline: str) -> int:
        """Chunks of the pipeline that others wait for, and that are in the tier soon. None where puts are behind, wait
        for ``rate`` or are not taken: then nothing is to wait for them."""
        behind = self._queue and trio.current_time() - self._queue[0][2] > BEHIND_SECONDS
        if behind or self._settings.rate.rate is not None or not self._tiers.takes_writes():
            return 0
        return self._putting[pipeline]

    def add(self, follow: Follow, chunk: int) -> None:
        if not self._settings.write_back or follow.state == "off" or (follow.target.blob is None and follow.fd < 0):
            return
        if follow.fd < 0 and follow.target.blob is not None:
            if self._is_full():
                self._tiers.count("not-written")
                return
            try:
                follow.fd = os.dup(follow.target.blob.fd)
            except OSError:
                return
            self._open.add(follow)
        follow.to_put.add(chunk)
        self._queue.append((follow, chunk, trio.current_time()))
        if follow.pull.groups > 1:
            self._putting[follow.key.pipeline] += 1
        more, self._more = self._more, trio.Event()
        more.set()

    def _is_full(self) -> bool:
        if len(self._open) >= MOST_OPEN:
            self._open = {one for one in self._open if not one.closed}
        full, before = len(self._open) >= MOST_OPEN, self._full
        self._full = full
        if full and not before:
            log.warning("%d files wait to be written to the regional tier: others are not, meanwhile", MOST_OPEN)
        return full

    async def run(self) -> None:
        while True:
            while not self._queue:
                await self._more.wait()
            follow, chunk, _ = self._queue.popleft()
            try:
                if chunk in follow.to_put and not self._tiers.own.is_broken() and self._tiers.takes_writes():
                    await self._put_chunk(follow, chunk)
                    self._tiers.writes.succeeded()
            except InstantStartError as error:
                self._failed(follow, error.message)
            except OSError as error:
                self._failed(follow, f"the file cannot be read: {error.strerror}")
            except Exception as error:  # one chunk is not worth the filler
                log.exception("a chunk was not written", extra={"pipeline": follow.key.pipeline})
                self._failed(follow, type(error).__name__)
            finally:
                self._ended(follow)
                follow.to_put.discard(chunk)
                self.check_done(follow)

    def _ended(self, follow: Follow) -> None:
        """A chunk of this file is no longer queued or being put."""
        pipeline = follow.key.pipeline
        if follow.pull.groups > 1:
            self._putting[pipeline] -= 1
            if not self._putting[pipeline]:
                del self._putting[pipeline]
        follow.changed.set()

    def _failed(self, follow: Follow, why: str) -> None:
        log.warning("a chunk was not written to the regional tier: %s", why, extra={"pipeline": follow.key.pipeline})
        self._tiers.count("not-written")
        self._tiers.writes.failed(trio.current_time(), 1.0)

    async def _put_chunk(self, follow: Follow, chunk: int) -> None:
        from instantstart_fs.regional.store import put_seconds

        owed = follow.to_put  # ``poisoned`` puts another in its place
        length = follow.target.present.byte_range(chunk).length
        await self._settings.rate.wait(length)
        if follow.to_put is not owed or chunk not in owed or follow.fd < 0:
            return
        put = _Put(self._settings, self._tiers.sources[0].store, follow, chunk)
        follow.put.add(chunk)  # from now on it may be there, whatever becomes of the thread
        try:
            digest = await ask_tier(put, put_seconds(length), self._threads)
        finally:
            put.close()
        if digest is None or put.withdrawn():
            return
        follow.digests[chunk] = digest
        self.put_bytes += length
        follow.pull.progressed()

    async def take_back(self, follow: Follow, chunks: set[int]) -> None:
        from instantstart_fs.regional.records import chunk_name

        for chunk in chunks:
            name = chunk_name(follow.slot, follow.pin, chunk)
            try:
                await self._tiers.ask(lambda name=name: self._tiers.sources[0].store.delete(name))  # type: ignore[misc]
            except InstantStartError as error:
                log.error("wrong bytes stay in the regional tier, and no seal will name them: %s", error.message)
                return

    def check_done(self, follow: Follow) -> None:
        """Seal the file in the tier if it is complete there, and close what is no longer needed."""
        if not follow.ended or follow.to_put or follow not in self.detached or follow in self._sealing:
            return
        if follow.sealed_here and len(follow.digests) == follow.pull.chunks and self._tiers.nursery is not None:
            proof, follow.sealed_here = follow.sealed_here, ""
            self._sealing.add(follow)
            self._tiers.nursery.start_soon(self._seal, follow, proof)
            return
        if follow.decided or follow.target.failed:
            self.detached.discard(follow)
            follow.close()

    async def _seal(self, follow: Follow, proof: str) -> None:
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
                await self._tiers.ask(lambda: self._tiers.sources[0].store.put(name, data))
        except InstantStartError as error:
            log.warning("the regional tier has no seal: %s", error.message, extra={"pipeline": follow.key.pipeline})
        finally:
            self._sealing.discard(follow)
            self.detached.discard(follow)
            follow.close()
