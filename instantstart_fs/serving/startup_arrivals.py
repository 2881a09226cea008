"""A startup cache that another host of the region saved comes to this one. A start waits for it for a while; it comes
all the same, for the next one. On the trio thread.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import msgspec
import trio

from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.core.startuppack import MAX_BYTES
from instantstart_fs.errors import InstantStartError, PipelineBusy
from instantstart_fs.regional.startup import Entry, Place
from instantstart_fs.serving.startup_region import RegionalStartups

log = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""Seconds that starts wait for a pack, from when it was first asked for."""
BRING_SECONDS = 900.0
"""Seconds for which it may come in all."""
FAILED_SECONDS = 300.0
"""Seconds for which a pack that did not come whole is not tried again: each start would wait for it in vain."""
AT_ONCE = 4
TURN_SECONDS = 5.0
"""Seconds that one waits while AT_ONCE others come."""

Pieces = AsyncGenerator[bytes, None]


class TakeIn(Protocol):
    """Keep a version whose bytes come. ``overtakes``: a newer one was found wrong. Raises StoreError, OriginError,
    DigestMismatch, PipelineBusy."""

    async def __call__(
        self, pipeline: Pipeline, record: StartupRecord, pieces: Pieces, *, overtakes: bool
    ) -> StartupRecord: ...


class _Arrival:
    """``until``: starts wait so long."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.done = trio.Event()
        self.record: StartupRecord | None = None


class Arrivals:
    """Owned by StartupCaches."""

    def __init__(self, region: RegionalStartups, take_in: TakeIn, now_ns: Callable[[], int]) -> None:
        self._region = region
        self._take_in = take_in
        self._now_ns = now_ns
        self._coming: dict[tuple[Pipeline, str], _Arrival] = {}
        self._failed: dict[tuple[str, str], float] = {}
        self._turns = trio.Semaphore(AT_ONCE)
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Bring what is asked for, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def bring(
        self, pipeline: Pipeline, generation: Generation, place: Place, key: dict[str, str]
    ) -> StartupRecord | None:
        """A version of exactly that key, saved for the same user, which is then one of this host's. None where there is
        none, or none yet. Never raises."""
        if self._nursery is None:
            return None
        coming = self._coming.get((pipeline, place.name))
        if coming is None:
            coming = self._coming[pipeline, place.name] = _Arrival(trio.current_time() + WAIT_SECONDS)
            self._nursery.start_soon(self._bring, coming, pipeline, generation, place, key)
        with trio.move_on_at(coming.until):
            await coming.done.wait()
        if not coming.done.is_set():
            log.warning(
                "a startup cache of the region comes too slowly for this start; a later one has it",
                extra={"pipeline": pipeline.id},
            )
        return coming.record

    async def _bring(
        self, coming: _Arrival, pipeline: Pipeline, generation: Generation, place: Place, key: dict[str, str]
    ) -> None:
        try:
            with trio.move_on_after(BRING_SECONDS) as scope:
                coming.record = await self._brought(pipeline, generation, place, key)
            if scope.cancelled_caught:
                log.warning("no startup cache from the region: it comes too slowly", extra={"pipeline": pipeline.id})
        except InstantStartError as error:
            log.warning("no startup cache from the region: %s", error.message, extra={"pipeline": pipeline.id})
        except Exception:  # one cache is not worth the daemon
            log.exception("no startup cache from the region", extra={"pipeline": pipeline.id})
        finally:
            del self._coming[pipeline, place.name]
            coming.done.set()

    async def _brought(
        self, pipeline: Pipeline, generation: Generation, place: Place, key: dict[str, str]
    ) -> StartupRecord | None:
        with trio.move_on_after(TURN_SECONDS) as scope:
            await self._turns.acquire()
        if scope.cancelled_caught:
            return None
        try:
            with generation.retained():
                if not await self._region.may_use(generation):
                    return None
            for entry in await self._region.find(pipeline.id, place):
                if not self._has_failed(place, entry) and 0 < entry.record.size <= MAX_BYTES:
                    found = await self._one(pipeline, place, entry, key)
                    if found is not None:
                        return found
            return None
        finally:
            self._turns.release()

    async def _one(self, pipeline: Pipeline, place: Place, entry: Entry, key: dict[str, str]) -> StartupRecord | None:
        """None where it did not come whole: an older one may. Raises PipelineBusy."""
        record = msgspec.structs.replace(
            entry.record, number=0, uid=pipeline.spec.uid, saved_at_ns=self._now_ns(), key=key, host=entry.by
        )
        name, whole = (place.name, entry.record.digest), False
        try:
            pieces = self._region.read(place, entry.record)
            found = await self._take_in(pipeline, record, pieces, overtakes=self._region.has_wrong(place))
            whole = True
            return found
        except PipelineBusy:
            whole = True
            raise
        except InstantStartError as error:
            log.warning(
                "a startup cache of the region, by %s, is not used: %s",
                *(entry.by, error.message),
                extra={"pipeline": pipeline.id},
            )
            return None
        finally:
            if not whole:
                self._failed[name] = trio.current_time() + FAILED_SECONDS

    def _has_failed(self, place: Place, entry: Entry) -> bool:
        now = trio.current_time()
        self._failed = {name: until for name, until in self._failed.items() if until > now}
        return (place.name, entry.record.digest) in self._failed
