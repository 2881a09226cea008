"""Startup caches of all pipelines: which one a start may have, keeping what a start has compiled, and letting it go.

On the trio thread; what blocks is in threads. What this host has is startup_versions.py's matter; it counts for the
pipeline's quota and goes with its eviction.

Whatever goes wrong here costs a start its head start, never its success.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.core.startupcache import (
    MOST_FAILED,
    Choice,
    StartupRecord,
    Suspects,
    check_key,
    choose,
    whole_key,
)
from instantstart_fs.core.startuppack import MAX_BYTES
from instantstart_fs.errors import (
    DigestMismatch,
    InstantStartError,
    NoSuchEntry,
    OriginUnavailable,
    PermissionRefused,
    PipelineBusy,
    PipelineNotFound,
    StoreDamaged,
    StoreFull,
)
from instantstart_fs.serving.admission import Space
from instantstart_fs.serving.startup_versions import LOCK_SECONDS, Versions
from instantstart_fs.serving.turns import Turns
from instantstart_fs.store import startupcaches as on_disk

if TYPE_CHECKING:
    from instantstart_fs.regional.startup import Place
    from instantstart_fs.serving.startup_arrivals import Arrivals, Pieces
    from instantstart_fs.serving.startup_region import RegionalStartups

log = logging.getLogger(__name__)

SAVING_AT_ONCE, OF_ONE_USER = 8, 2
"""Saves of all pipelines: each takes the disk's bandwidth. Who saves slowly holds up nobody else."""
START_LOCK_SECONDS = 3.0
"""Seconds that a start waits for a change of its pipeline: it can begin without a cache."""

OFFER_SECONDS = 70.0
"""Seconds in all, those for a pack from the region among them (startup_arrivals.WAIT_SECONDS): the client waits 75
(startup/run.py)."""


class Offer(msgspec.Struct, frozen=True):
    """What a start gets. ``generation``: what the pipeline holds, to be said again when the start saves. ``pack``: a
    descriptor that is the caller's to close, -1 without one. ``problem``: why it gets none, where that is no matter of
    its key. ``left_out``: the version that it gets none of because engines failed with it, 0 = there is none."""

    choice: Choice
    generation: str = ""
    pack: int = -1
    problem: str = ""
    left_out: int = 0


class Evictor(Space, Protocol):
    """Decides about the store's space (upkeep/eviction.py), and looks again when bytes have gone."""

    def wake(self) -> None: ...


class StartupCaches:
    """Owned by the Library."""

    def __init__(self, catalog: Catalog, evictor: Evictor, region: RegionalStartups | None = None) -> None:
        self._catalog = catalog
        self._evictor = evictor
        self._region = region
        self._saving = trio.Semaphore(SAVING_AT_ONCE)
        self._turns = Turns(OF_ONE_USER)
        self.suspects = Suspects()
        self._versions = Versions(catalog, self.suspects)
        self._arrivals: Arrivals | None = None
        if region is not None:
            from instantstart_fs.serving.startup_arrivals import Arrivals  # late: only a region needs it

            self._arrivals = Arrivals(region, self._take_in, catalog.now_ns)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """With a region: save there, and bring from there, until cancelled."""
        assert self._region is not None and self._arrivals is not None
        async with trio.open_nursery() as nursery:
            await nursery.start(self._region.run)
            await nursery.start(self._arrivals.run)
            task_status.started()

    # -- what there is ---------------------------------------------------------------------------------------------

    async def records(self, pipeline_id: str) -> list[StartupRecord]:
        """Newest first."""
        return await self._versions.all(self._catalog.pipeline(pipeline_id))

    # -- a start ---------------------------------------------------------------------------------------------------

    async def offer(
        self, pipeline_id: str, key: Mapping[str, str], uid: int, *, restore: bool, without: tuple[int, ...] = ()
    ) -> Offer:
        """What the start of ``uid`` with that key may have. ``restore``: whether it wants any; ``without``: versions
        that it found damaged: they are read again, and deleted if they are. Raises PipelineNotFound and nothing else:
        whatever is wrong with the caches is a start without one."""
        pipeline = self._catalog.pipeline(pipeline_id)
        generation = ""
        try:
            generation = await self._generation(pipeline)
            if uid != pipeline.spec.uid:
                return Offer(Choice("not-owner"), generation)
            if not restore:
                return Offer(Choice("off"), generation)
            check_key(key)
            with trio.move_on_after(OFFER_SECONDS):
                return await self._offer(
                    pipeline, self._whole(pipeline, key, uid, generation), uid, generation, without
                )
            raise PipelineBusy(f"{pipeline_id}: no startup cache was found within {OFFER_SECONDS:g} s")
        except PipelineNotFound:
            raise
        except InstantStartError as error:
            log.warning("a start gets no startup cache: %s", error.message, extra={"pipeline": pipeline_id})
            return Offer(Choice("failed"), generation, problem=error.message)

    async def _offer(
        self, pipeline: Pipeline, key: Mapping[str, str], uid: int, generation: str, without: tuple[int, ...]
    ) -> Offer:
        """Raises PipelineBusy, StoreError."""
        await self._versions.all(pipeline, START_LOCK_SECONDS)
        if without:
            with contextlib.suppress(PipelineBusy):  # it is not chosen, and the next start finds it damaged again
                await self.verify(pipeline.id, only=without, patience=START_LOCK_SECONDS)
        records, left_out = self._versions.known(pipeline), self.suspects.of(pipeline.id)
        trusted = [record for record in records if record.number not in left_out]
        for _ in range(len(records) + 1):
            choice = choose(trusted, key, uid=uid, without=without)
            if choice.record is None:
                brought = await self._from_region(pipeline, key, uid)
                if brought is not None and brought.number not in left_out:
                    choice = Choice("restored", brought)
            if choice.record is None:
                return _without_suspect(choice, choose(records, key, uid=uid, without=without), generation)
            try:
                return Offer(choice, generation, await self._versions.open(pipeline, choice.record))
            except StoreDamaged as error:
                log.warning("%s", error.message, extra={"pipeline": pipeline.id})
                without = (*without, choice.record.number)
                with contextlib.suppress(PipelineBusy):
                    await self._versions.drop(pipeline, [choice.record], START_LOCK_SECONDS)
        return Offer(Choice("damaged"), generation)

    async def _from_region(self, pipeline: Pipeline, key: Mapping[str, str], uid: int) -> StartupRecord | None:
        """A version of exactly that key, saved for the same user on another host, which is then one of this host's.
        Never raises."""
        generation = await self._catalog.ensure_loaded(pipeline)
        if self._region is None or self._arrivals is None or generation is None:
            return None
        place = self._region.place(pipeline.id, key, generation.manifest, uid)
        return await self._arrivals.bring(pipeline, generation, place, dict(key)) if place is not None else None

    async def _take_in(
        self, pipeline: Pipeline, record: StartupRecord, pieces: Pieces, *, overtakes: bool
    ) -> StartupRecord:
        """``overtakes``: a newer one of the region is wrong, so that this one becomes its newest. Raises StoreError,
        OriginError, DigestMismatch, PipelineBusy."""
        async with aclosing(pieces):
            for known in self._versions.known(pipeline):
                if known.key == record.key and known.digest == record.digest:
                    return known
            async with self._incoming(pipeline, record) as receiving:
                async for piece in pieces:
                    await receiving.write(piece)
                kept = await self.keep(pipeline, record, receiving.incoming)
        if overtakes:
            await self._to_region(pipeline, kept)
        return kept

    async def _to_region(self, pipeline: Pipeline, record: StartupRecord) -> None:
        """What a start of this host has saved. Never raises."""
        if self._region is None or (place := await self._place(pipeline, record)) is None:
            return
        try:
            pack = await self._versions.open(pipeline, record)
        except StoreDamaged:
            return  # it went meanwhile
        except InstantStartError as error:
            log.warning("a startup cache stays on this host: %s", error.message, extra={"pipeline": pipeline.id})
            return
        self._region.put(pipeline.id, place, record, pack)

    async def _place(self, pipeline: Pipeline, record: StartupRecord) -> Place | None:
        """Where it is in the region. None where it does not travel; one of another generation has no place that is
        known any more."""
        generation = await self._catalog.ensure_loaded(pipeline)
        if self._region is None or generation is None or record.key.get("generation") != _name_of(generation):
            return None
        return self._region.place(pipeline.id, record.key, generation.manifest, record.uid)

    async def _generation(self, pipeline: Pipeline) -> str:
        return _name_of(await self._catalog.ensure_loaded(pipeline))

    def _whole(self, pipeline: Pipeline, key: Mapping[str, str], uid: int, generation: str) -> dict[str, str]:
        number, _, revision = generation.partition(" ")
        sources = [model.source for model in pipeline.spec.models]
        return whole_key(key, uid=uid, generation=int(number or 0), sources=sources, revision=revision)

    # -- saving ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def receiving(
        self,
        pipeline_id: str,
        key: Mapping[str, str],
        uid: int,
        *,
        generation: str,
        size: int,
        digest: str,
        files: int,
        view: str,
        layouts: tuple[str, ...],
    ) -> AsyncIterator[Receiving]:
        """Around the arrival of a pack. Raises PermissionRefused for another's pipeline, PipelineBusy when it was
        updated since the start, StoreFull."""
        check_key(key)
        pipeline = self._catalog.pipeline(pipeline_id)
        if uid != pipeline.spec.uid:
            raise PermissionRefused(
                f"uid {uid} may not save a startup cache of {pipeline_id}, which belongs to uid {pipeline.spec.uid}"
            )
        if generation != await self._generation(pipeline):
            raise PipelineBusy(f"{pipeline_id} was updated since this start began: its startup cache is not kept")
        if not 0 < size <= MAX_BYTES:
            raise StoreFull(f"a startup cache may have {MAX_BYTES} bytes, this one has {size}")
        record = StartupRecord(
            number=0,
            saved_at_ns=self._catalog.now_ns(),
            uid=uid,
            size=size,
            digest=digest,
            files=files,
            view=view,
            layouts=layouts,
            key=self._whole(pipeline, key, uid, generation),
        )
        async with self._turns.of(uid), self._saving, self._incoming(pipeline, record) as receiving:
            yield receiving

    @asynccontextmanager
    async def _incoming(self, pipeline: Pipeline, record: StartupRecord) -> AsyncIterator[Receiving]:
        """Room for its pack, and a file for it. Raises StoreFull."""
        taken = on_disk.taken(record)
        await self._admit(pipeline, taken)
        incoming = None
        try:
            incoming = await trio.to_thread.run_sync(on_disk.IncomingPack, self._catalog.store, record.size)
            yield Receiving(self, pipeline, record, incoming)
        finally:
            with trio.CancelScope(shield=True):
                if incoming is not None:
                    await trio.to_thread.run_sync(incoming.drop)
                pipeline.startup_promised -= taken
                pipeline.changed()

    async def _admit(self, pipeline: Pipeline, needed: int) -> None:
        """Reserve space: from then on it counts as taken. Raises StoreFull."""

        def promise() -> None:
            pipeline.startup_promised += needed

        refusal = await self._evictor.admit(
            pipeline.id, needed, promise, own=pipeline.allocated, quota=pipeline.spec.quota
        )
        if refusal is not None:
            raise StoreFull(f"{pipeline.id}: no room for its startup cache: {refusal}")

    async def keep(self, pipeline: Pipeline, record: StartupRecord, incoming: on_disk.IncomingPack) -> StartupRecord:
        """What came whole becomes a version; the one that is there already, where it is the same."""
        if incoming.received != record.size or incoming.digest != record.digest:
            raise DigestMismatch(
                f"{pipeline.id}: of a startup cache of {record.size} bytes {incoming.received} came, "
                "or other ones than were announced: it is not kept"
            )
        async with self._versions.locked(pipeline):
            if record.key.get("generation", "") != await self._generation(pipeline):
                raise PipelineBusy(f"{pipeline.id} was updated meanwhile: its startup cache is not kept")
            record = await self._versions.add(pipeline, record, incoming)
        self._evictor.wake()
        return record

    # -- letting go ------------------------------------------------------------------------------------------------

    async def remove(self, pipeline_id: str, numbers: tuple[int, ...]) -> int:
        """These versions (none: all), here and, with all others of their keys, in the region; how many there were here.
        Raises NoSuchEntry; OriginError where only the region's are left."""
        pipeline = self._catalog.pipeline(pipeline_id)
        records = await self.records(pipeline_id)
        chosen = [record for record in records if record.number in numbers] if numbers else records
        if missing := set(numbers) - {record.number for record in chosen}:
            raise NoSuchEntry(f"{pipeline_id}: there is no startup cache {min(missing)}")
        await self._versions.drop(pipeline, chosen)
        try:
            await self._withdraw(pipeline, chosen)
        except InstantStartError as error:
            raise OriginUnavailable(
                f"{pipeline_id}: removed from this host; in the region they may be left: {error.message}"
            ) from error
        return len(chosen)

    async def _withdraw(self, pipeline: Pipeline, records: list[StartupRecord]) -> None:
        """Raises OriginError."""
        places = [await self._place(pipeline, record) for record in records]
        for place in {place.name: place for place in places if place is not None}.values():
            assert self._region is not None
            await self._region.remove(place)

    async def verify(
        self, pipeline_id: str, *, only: tuple[int, ...] = (), patience: float = LOCK_SECONDS
    ) -> tuple[int, dict[int, str]]:
        """Read them again: (how many were read, number → why it was deleted). Raises PipelineBusy after ``patience``
        seconds without the pipeline's lock."""
        pipeline = self._catalog.pipeline(pipeline_id)
        known = await self._versions.all(pipeline, patience)
        records = [record for record in known if not only or record.number in only]
        bad: dict[int, str] = {}
        for record in records:
            problem = await self._versions.problem(pipeline, record)
            if problem is not None and record in self._versions.known(pipeline):
                bad[record.number] = problem
                log.warning("startup cache %d is deleted: %s", record.number, problem, extra={"pipeline": pipeline_id})
        if bad:
            await self._versions.drop(pipeline, [record for record in records if record.number in bad], patience)
        return len(records), bad

    async def evicted(self, pipeline_id: str) -> None:
        """The pipeline's weights have gone: these go with them."""
        if (pipeline := self._catalog.pipelines.get(pipeline_id)) is not None:
            await self._versions.drop_all(pipeline)

    def forget(self, pipeline: Pipeline) -> None:
        """Forget a pipeline that was removed."""
        self._versions.forget(pipeline)


def _name_of(generation: Generation | None) -> str:
    return f"{generation.number} {generation.revision}".strip() if generation is not None else ""


def _without_suspect(choice: Choice, otherwise: Choice, generation: str) -> Offer:
    """None is given; ``otherwise`` is what would be, if engines had not failed with it."""
    if otherwise.record is None:
        return Offer(choice, generation)
    problem = (
        f"version {otherwise.record.number} is left out, since the last {MOST_FAILED} starts that had it ended before "
        "they were ready; `instantstart startup-cache rm` removes it"
    )
    return Offer(Choice("failed"), generation, problem=problem, left_out=otherwise.record.number)


class Receiving:
    """A pack on its way in."""

    def __init__(
        self, caches: StartupCaches, pipeline: Pipeline, record: StartupRecord, incoming: on_disk.IncomingPack
    ) -> None:
        self._caches = caches
        self._pipeline = pipeline
        self._record = record
        self.incoming = incoming

    async def write(self, data: bytes) -> None:
        """Append ``data``. Raises StoreError."""
        await trio.to_thread.run_sync(self.incoming.write, data)

    async def keep(self) -> StartupRecord:
        """Keep the pack, all of which has come. Raises DigestMismatch, StoreError."""
        record = await self._caches.keep(self._pipeline, self._record, self.incoming)
        await self._caches._to_region(self._pipeline, record)
        return record
