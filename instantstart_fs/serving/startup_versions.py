"""Startup caches that a pipeline has on this host. What is known of them, and what the index counts, follow the disk.

They are read from the slot when somebody first asks; how much disk they take is known at the start from the index
(``Pipeline.startup_bytes``). A write or a deletion that fails may have been done all the same: what is known is then
forgotten and read anew, and until then the most that may be there counts.

On the trio thread; what blocks is in threads, and what only reads is given up at a deadline.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Pipeline
from instantstart_fs.core.startupcache import StartupRecord, Suspects, surplus
from instantstart_fs.errors import InstantStartError, PipelineBusy, StoreDamaged, StoreError
from instantstart_fs.ipc.threads import open_abandonable, run_abandonable
from instantstart_fs.store import startupcaches as on_disk
from instantstart_fs.store.layout import STARTUP

log = logging.getLogger(__name__)
_T = TypeVar("_T")

LOCK_SECONDS = 60.0
"""Seconds that a save waits for a change of its pipeline (an update may list an origin for minutes)."""
DISK_SECONDS = 30.0
"""Seconds for what is read of the store: names, a record, an open."""
SLOWEST_READ = 10_000_000
"""Bytes a second at which a whole pack is read again, at least."""


class Versions:
    """Owned by StartupCaches. ``suspects`` forgets what is deleted."""

    def __init__(self, catalog: Catalog, suspects: Suspects) -> None:
        self._catalog = catalog
        self._suspects = suspects
        self._known: dict[Pipeline, list[StartupRecord]] = {}

    def known(self, pipeline: Pipeline) -> list[StartupRecord]:
        """Those that were read, newest first."""
        return sorted(self._known.get(pipeline, ()), key=lambda record: record.number, reverse=True)

    async def all(self, pipeline: Pipeline, patience: float = LOCK_SECONDS) -> list[StartupRecord]:
        """Newest first. Raises PipelineBusy after ``patience`` seconds without the pipeline's lock, StoreError."""
        if pipeline not in self._known:
            async with self.locked(pipeline, patience):
                await self._read(pipeline)
        return self.known(pipeline)

    async def _read(self, pipeline: Pipeline) -> list[StartupRecord]:
        """With the pipeline's lock held. What cannot be read any more is deleted, with a word in the log."""
        if pipeline in self._known:
            return self._known[pipeline]
        store, found = self._catalog.store, []
        for number in await _reading(on_disk.numbers, store, pipeline.id):
            try:
                found.append(await _reading(on_disk.load, store, pipeline.id, number))
            except StoreDamaged as error:
                log.warning("%s; it is deleted", error.message, extra={"pipeline": pipeline.id})
                await trio.to_thread.run_sync(store.delete_entry, pipeline.id, STARTUP, str(number))
        self._known[pipeline] = found
        await self._count(pipeline)
        return found

    async def open(self, pipeline: Pipeline, record: StartupRecord) -> int:
        """A descriptor of its pack, which is the caller's. Raises StoreDamaged, StoreError."""
        try:
            return await open_abandonable(
                on_disk.open_pack, self._catalog.store, pipeline.id, record, deadline=DISK_SECONDS
            )
        except trio.TooSlowError:
            raise _too_slow(DISK_SECONDS) from None

    async def problem(self, pipeline: Pipeline, record: StartupRecord) -> str | None:
        """Read it again: what is wrong with it. Raises StoreError."""
        seconds = DISK_SECONDS + record.size / SLOWEST_READ
        return await _reading(on_disk.problem, self._catalog.store, pipeline.id, record, deadline=seconds)

    @asynccontextmanager
    async def locked(self, pipeline: Pipeline, patience: float = LOCK_SECONDS) -> AsyncIterator[None]:
        """Hold the pipeline's lock inside the block: nothing deletes its slot meanwhile. Raises PipelineBusy,
        PipelineNotFound."""
        with trio.move_on_after(patience) as scope:
            await pipeline.lock.acquire()
        if scope.cancelled_caught:
            raise PipelineBusy(f"{pipeline.id}: an update, an eviction or a removal is under way; try again")
        try:
            self._catalog.pipeline(pipeline.id)
            yield
        finally:
            pipeline.lock.release()

    async def add(self, pipeline: Pipeline, record: StartupRecord, incoming: on_disk.IncomingPack) -> StartupRecord:
        """With the pipeline's lock held: what came whole becomes a version; the one that is there already, where it is
        the same. Raises StoreError."""
        records = await self._read(pipeline)
        same = [found for found in records if found.key == record.key]
        newest = max(same, key=lambda found: found.number, default=None)
        if newest is not None and newest.digest == record.digest:
            return newest
        record = msgspec.structs.replace(record, number=max([0, *(found.number for found in records)]) + 1)
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(incoming.commit, pipeline.id, record)
            except InstantStartError:
                self._known.pop(pipeline, None)
                await self._note(pipeline, pipeline.startup_bytes + on_disk.taken(record))
                raise
            records.append(record)
            await self._count(pipeline)
            try:
                for old in surplus(records):
                    await self._delete(pipeline, old)
            except InstantStartError as error:  # this one is kept all the same
                log.warning("old startup caches stay: %s", error.message, extra={"pipeline": pipeline.id})
            else:
                await self._count(pipeline)
        log.info(
            "startup cache %d saved: %d files, %d bytes",
            *(record.number, record.files, record.size),
            extra={"pipeline": pipeline.id},
        )
        return record

    async def _delete(self, pipeline: Pipeline, record: StartupRecord) -> None:
        """With the pipeline's lock held. Raises StoreError."""
        await self._delete_entry(pipeline, str(record.number))
        self._known[pipeline].remove(record)
        self._suspects.forget(pipeline.id, record.number)

    async def _delete_entry(self, pipeline: Pipeline, *below: str) -> None:
        try:
            await trio.to_thread.run_sync(self._catalog.store.delete_entry, pipeline.id, STARTUP, *below)
        except InstantStartError:
            self._known.pop(pipeline, None)
            raise

    async def drop(self, pipeline: Pipeline, records: list[StartupRecord], patience: float = LOCK_SECONDS) -> None:
        """Delete these, where they are there. Raises PipelineBusy, StoreError."""
        async with self.locked(pipeline, patience):
            known = await self._read(pipeline)
            for record in records:
                if record in known:
                    await self._delete(pipeline, record)
            await self._count(pipeline)

    async def drop_all(self, pipeline: Pipeline) -> None:
        """Delete all of an evicted pipeline's. Raises PipelineBusy, StoreError."""
        if not pipeline.startup_bytes and not self._known.get(pipeline):
            return
        async with self.locked(pipeline):
            await self._delete_entry(pipeline)
            self._known[pipeline] = []
            self._suspects.forget(pipeline.id)
            await self._count(pipeline)

    def forget(self, pipeline: Pipeline) -> None:
        """Forget a pipeline that was removed."""
        self._known.pop(pipeline, None)
        self._suspects.forget(pipeline.id)

    async def _count(self, pipeline: Pipeline) -> None:
        await self._note(pipeline, sum(on_disk.taken(record) for record in self._known[pipeline]))

    async def _note(self, pipeline: Pipeline, taken: int) -> None:
        """How much disk they take, in memory and in the index; what the index does not take now, it gets later."""
        if pipeline.startup_bytes == taken:
            return
        pipeline.startup_bytes = taken
        pipeline.changed()
        noted = False
        try:
            await self._catalog.records.save_upkeep(pipeline)
            noted = True
        except InstantStartError as error:
            log.warning("startup caches: not noted, trying on: %s", error.message, extra={"pipeline": pipeline.id})
        finally:
            if not noted:  # cancelled, too
                self._catalog.records.save_upkeep_soon(pipeline)


async def _reading(read: Callable[..., _T], *arguments: object, deadline: float | None = None) -> _T:
    """In a thread that is given up: a disk that hangs keeps nobody, nor the threads of others. For what only reads, and
    closes what it opened. Raises StoreError at the deadline."""
    seconds = DISK_SECONDS if deadline is None else deadline
    try:
        return await run_abandonable(read, *arguments, deadline=seconds)
    except trio.TooSlowError:
        raise _too_slow(seconds) from None


def _too_slow(seconds: float) -> StoreError:
    return StoreError(f"the store's disk does not answer within {seconds:.0f} s")
