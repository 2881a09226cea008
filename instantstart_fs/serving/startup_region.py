"""Startup caches of the region. A start that finds none here takes one that another host of the region compiled, and
what is saved here goes to the tier.

On the trio thread; the storage is asked in threads that are given up when it is slow. A failure means a start without
that cache, after a bounded wait. The tier is then left alone for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec
import trio

from instantstart_fs.catalog.model import Generation
from instantstart_fs.core.manifest import Manifest
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.errors import InstantStartError, OriginMisbehaved
from instantstart_fs.filler.region_follow import RegionSettings, ask_tier
from instantstart_fs.ipc.threads import LentDescriptor
from instantstart_fs.origins.base import Origin
from instantstart_fs.regional.records import Forged
from instantstart_fs.regional.startup import Entry, Place, identity_of

log = logging.getLogger(__name__)

FIND_SECONDS = 3.0
"""Seconds for the question what the tier has; a start waits for it."""
PIECE_SECONDS = 10.0
"""Seconds for one piece (4 MiB) of a pack."""
SAVE_SECONDS = 600.0
LEFT_ALONE = 30.0
"""Seconds without a question after one that failed."""
TRIES, AGAIN = 4, 45.0
"""How often a save is tried, and the seconds between two tries."""
MOST_WAITING = 32
"""Saves that wait for their turn; beyond, they stay on this host."""
_T = TypeVar("_T")


class _Save(msgspec.Struct, frozen=True):
    """A save that waits. ``pack`` is a descriptor of its own."""

    pipeline: str
    place: Place
    record: StartupRecord
    pack: int


class RegionalStartups:
    """The startup caches of the region. Owned by the Library.

    ``slot_of`` returns a pipeline's slot, None where none is to be used. ``may_use`` says whether the pipeline's own
    credentials may read the source of its model at that position (filler/region_access.py).
    """

    def __init__(
        self,
        settings: RegionSettings,
        slot_of: Callable[[str], str | None],
        may_use: Callable[[str, int, Origin], Awaitable[bool]],
    ) -> None:
        self._settings = settings
        self._slot_of = slot_of
        self._may_use = may_use
        self._left_alone_until = 0.0
        self._threads = trio.CapacityLimiter(8)
        self._queue, self._waiting = trio.open_memory_channel[_Save](MOST_WAITING)

    def place(self, pipeline: str, key: Mapping[str, str], manifest: Manifest) -> Place | None:
        """Return where the startup caches of this key are; None if a pipeline has no slot."""
        slot = self._slot_of(pipeline)
        if slot is None:
            return None
        identity = identity_of(key, content_of(manifest))
        return Place(self._settings.stores[0], self._settings.key, slot, identity)

    async def may_use(self, generation: Generation) -> bool:
        """Whether every source of the pipeline may be read. Code that another host compiled from them needs the same
        protection. Raises OriginError, UsageError."""
        pipeline, allowed = generation.pipeline.id, True

        async def ask(model: int, origin: Origin) -> None:
            nonlocal allowed
            allowed = await self._may_use(pipeline, model, origin) and allowed

        models = range(len(generation.manifest.models))
        origins = [await trio.to_thread.run_sync(generation.origin, model) for model in models]
        async with trio.open_nursery() as nursery:
            for model, origin in enumerate(origins):
                nursery.start_soon(ask, model, origin)
        return allowed

    async def find(self, pipeline: str, place: Place) -> Entry | None:
        """Return what the region has there. Never raises; never takes longer than FIND_SECONDS."""
        if trio.current_time() < self._left_alone_until:
            return None
        try:
            return await ask_tier(place.latest, FIND_SECONDS, self._threads)
        except (InstantStartError, Forged) as error:
            self._failed(pipeline, "asked for", error)
            return None

    async def read(self, place: Place, record: StartupRecord) -> AsyncGenerator[bytes, None]:
        """Yield the pack, piece by piece, each proven. Raises OriginError."""
        pieces = place.read(record)
        while True:
            try:
                piece = await ask_tier(lambda: next(pieces, b""), PIECE_SECONDS, self._threads)
            except Forged as error:
                raise OriginMisbehaved(str(error)) from error
            if not piece:
                return
            yield piece

    def put(self, pipeline: str, place: Place, record: StartupRecord, pack: int) -> None:
        """Have the pack saved in the tier later. Takes the descriptor over."""
        if not self._settings.write_back:
            os.close(pack)
            return
        try:
            self._queue.send_nowait(_Save(pipeline, place, record, pack))
        except trio.WouldBlock:
            os.close(pack)
            log.warning("a startup cache stays on this host: too many wait", extra={"pipeline": pipeline})

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Save what waits, until cancelled."""
        task_status.started()
        try:
            async for save in self._waiting:
                try:
                    await self._save(save)
                except Exception:  # one cache is not worth the daemon
                    log.exception("a startup cache stays on this host", extra={"pipeline": save.pipeline})
                finally:
                    os.close(save.pack)
        finally:
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    os.close(self._waiting.receive_nowait().pack)

    async def _save(self, save: _Save) -> None:
        for left in range(TRIES - 1, -1, -1):
            lent = LentDescriptor(save.pack)

            def put(lent: LentDescriptor = lent) -> bool:
                with lent.taken() as fd:
                    return save.place.save(
                        save.record, lambda count, at: os.pread(fd, count, at), self._settings.host, time.time()
                    )

            try:
                if await ask_tier(put, SAVE_SECONDS, self._threads):
                    log.info(
                        "startup cache %d is the region's, too", save.record.number, extra={"pipeline": save.pipeline}
                    )
                return
            except (InstantStartError, OSError) as error:
                if not left:
                    self._failed(save.pipeline, "saved", error)
                    return
            finally:
                lent.close()
            await trio.sleep(AGAIN)

    def _failed(self, pipeline: str, what: str, error: Exception) -> None:
        self._left_alone_until = trio.current_time() + LEFT_ALONE
        said = error.message if isinstance(error, InstantStartError) else str(error)
        log.warning("a startup cache could not be %s in the region: %s", what, said, extra={"pipeline": pipeline})


def content_of(manifest: Manifest) -> str:
    """Return a digest of a generation's content. It is the same on all hosts that pinned the same bytes."""
    models = [
        (model.name, model.revision, [(file.path, file.size, str(file.digest), file.version) for file in model.files])
        for model in manifest.models
    ]
    return hashlib.sha256(msgspec.json.encode(models)).hexdigest()
