"""Writes a pipeline's error, upkeep times and learned facts, so that they outlive a restart. Files are not its matter.

They go to the index, learned facts also to the slot. The catalog reads them at the start.
"""

from __future__ import annotations

import logging

import trio

from instantstart_fs.catalog.failure import Failure
from instantstart_fs.catalog.model import Pipeline
from instantstart_fs.core.learned import Learned
from instantstart_fs.errors import DigestMismatch, InstantStartError, OriginError, from_code
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FailureRecord, UpkeepRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.blobstore import BlobStore

log = logging.getLogger(__name__)

UPKEEP_SECONDS = 1.0
"""Seconds between two writes of pipelines' errors: an origin that comes and goes costs one write a second at most."""


class Records:
    """Writes what a restart must know of pipelines. Use it on the trio thread."""

    def __init__(self, store: BlobStore, index: Index) -> None:
        self._store = store
        self._index = index
        self._unsaved: dict[str, Pipeline] = {}
        """The pipelines whose error the index does not know yet."""
        self._saving = trio.Event()

    @staticmethod
    def recall(pipeline: Pipeline, record: FailureRecord | None) -> None:
        """Give ``pipeline`` the error that an earlier daemon recorded."""
        head = pipeline.head
        if record is None or pipeline.failure is not None or head is None or head.number != record.generation:
            return
        error = from_code(record.code, record.message)
        pipeline.failure = Failure(error, record.since_ns, final=record.final, index=record.file, recalled=True)

    def save_upkeep_soon(self, pipeline: Pipeline) -> None:
        """Have ``keep_failures`` write the pipeline's upkeep times and its error."""
        self._unsaved[pipeline.id] = pipeline
        self._saving.set()

    async def keep_failures(self) -> None:
        """Write changed errors of pipelines, until cancelled. If writing fails, a restart forgets the error: no
        more."""
        failing = False
        while True:
            await self._saving.wait()
            try:
                await self.save_failures()
                failing = False
            except InstantStartError as error:
                if not failing:
                    log.warning("errors of pipelines are not noted, trying on: %s", error.message)
                failing = True
            await trio.sleep(UPKEEP_SECONDS)

    async def save_failures(self) -> None:
        """Write all changed errors now. Raises StoreError."""
        self._saving = trio.Event()
        while self._unsaved:
            _, pipeline = self._unsaved.popitem()
            try:
                await self.save_upkeep(pipeline)
            except BaseException:
                self.save_upkeep_soon(pipeline)
                raise

    async def save_upkeep(self, pipeline: Pipeline) -> None:
        """Write the pipeline's upkeep times and its error. Raises StoreError."""
        record = _upkeep_record(pipeline)

        def write(txn: WriteTxn) -> None:
            if txn.get_pipeline(pipeline.id) is not None:
                txn.put_upkeep(pipeline.id, record)

        if not pipeline.removed:
            await self._index.write(write)

    async def save_learned(self, pipeline: Pipeline) -> bool:
        """Write the pipeline's learned facts to its slot and the index. False if it is being changed: try later. Raises
        StoreError."""
        try:
            pipeline.lock.acquire_nowait()  # else it might be written into a slot that is being deleted
        except trio.WouldBlock:
            return False
        try:
            if not pipeline.removed:
                learned, record = pipeline.learned, _upkeep_record(pipeline)

                def write(txn: WriteTxn) -> None:
                    if txn.get_pipeline(pipeline.id) is None:
                        return
                    before = (txn.get_upkeep(pipeline.id) or UpkeepRecord()).learned or Learned()
                    if before.wanted != learned.wanted:
                        txn.delete_summary(pipeline.id)  # it counts another load set
                    txn.put_upkeep(pipeline.id, record)

                # The index first: it is what the next start believes. The slot is asked where there is none.
                await self._index.write(write)
                await trio.to_thread.run_sync(self._store.metadata.write_learned, pipeline.id, learned)
        finally:
            pipeline.lock.release()
        return True


def _upkeep_record(pipeline: Pipeline) -> UpkeepRecord:
    learned = pipeline.learned if pipeline.learned_read else None
    return UpkeepRecord(pipeline.scrubbed, pipeline.access, _failure_record(pipeline), learned, pipeline.startup_bytes)


def _failure_record(pipeline: Pipeline) -> FailureRecord | None:
    """Return the record of the error; None for an error that a start finds by itself, or that is momentary."""
    failure, head = pipeline.failure, pipeline.head
    if failure is None or head is None:
        return None
    if not failure.final and not isinstance(failure.error, OriginError | DigestMismatch):
        return None
    return FailureRecord(
        failure.error.code,
        failure.error.message,
        failure.since_ns,
        failure.final,
        failure.file.triple[1] if failure.file is not None else head.number,
        failure.index,
    )
