"""ReadTxn and WriteTxn: typed access to the index's records inside one operation. Threads and commits are
index/environment.py's.

Every method raises StoreDamaged for what cannot be read. A WriteTxn's puts raise IndexFull (the map has no space) or
StoreFull (the disk has none) **before** the last space is used, so that deletes, and puts of no more than the operation
has deleted, always find the pages that LMDB's copy-on-write needs: a full index can be emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import lmdb

from instantstart_fs.core.clockwatch import ClockState
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.errors import StoreError
from instantstart_fs.index import schema
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord, SummaryRecord, UpkeepRecord

if TYPE_CHECKING:
    Transaction = lmdb.Transaction[bytes]
    Databases = Mapping[str, lmdb._Database]

_CHECK_EVERY = 64
"""Puts between two checks of the space left: 64 records of a few KiB stay far below the reserve."""


class ReadTxn:
    """A consistent view. ``Index.read`` makes one."""

    def __init__(self, transaction: Transaction, databases: Databases) -> None:
        self._transaction = transaction
        self._databases = databases

    def _get(self, database: str, key: bytes) -> bytes | None:
        return self._transaction.get(key, db=self._databases[database])

    def _scan(self, database: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        with self._transaction.cursor(self._databases[database]) as cursor:
            if not cursor.set_range(prefix):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value

    def get_pipeline(self, pipeline: str) -> PipelineRecord | None:
        value = self._get("pipelines", schema.pipeline_key(pipeline))
        return None if value is None else schema.decode_pipeline(value)

    def pipelines(self) -> Iterator[PipelineRecord]:
        """Yield all pipelines, by id."""
        for _, value in self._scan("pipelines"):
            yield schema.decode_pipeline(value)

    def get_generation(self, pipeline: str, generation: int) -> GenerationRecord | None:
        value = self._get("generations", schema.generation_key(pipeline, generation))
        return None if value is None else schema.decode_generation(value)

    def generations(self, pipeline: str) -> Iterator[GenerationRecord]:
        """The generations of ``pipeline``, ascending."""
        for _, value in self._scan("generations", schema.pipeline_prefix(pipeline)):
            yield schema.decode_generation(value)

    def get_file(self, pipeline: str, generation: int, index: int) -> FileRecord | None:
        """Return the file's record; None for a file that is absent and was never filled."""
        value = self._get("files", schema.file_key(pipeline, generation, index))
        return None if value is None else schema.decode_file(value)

    def files(self, pipeline: str, generation: int) -> Iterator[tuple[int, FileRecord]]:
        """Yield (index, record) of each file that has one, ascending: one range scan."""
        for key, value in self._scan("files", schema.generation_key(pipeline, generation)):
            yield schema.parse_file_key(key)[2], schema.decode_file(value)

    def last_request(self, pipeline: str) -> int | None:
        """Wall clock, ns; as it was recorded (it may lie in the future)."""
        value = self._get("requests", schema.pipeline_key(pipeline))
        return None if value is None else schema.decode_u64(value)

    def last_requests(self) -> dict[str, int]:
        return {key.decode("ascii"): schema.decode_u64(value) for key, value in self._scan("requests")}

    def last_access(self, pipeline: str, generation: int, index: int) -> int | None:
        """Wall clock, ns; as it was recorded."""
        value = self._get("atimes", schema.file_key(pipeline, generation, index))
        return None if value is None else schema.decode_u64(value)

    def accesses(self, pipeline: str, generation: int) -> Iterator[tuple[int, int]]:
        """Yield (index, ns) of each file that was ever read."""
        for key, value in self._scan("atimes", schema.generation_key(pipeline, generation)):
            yield schema.parse_file_key(key)[2], schema.decode_u64(value)

    def cold_starts(self) -> Iterator[ColdStart]:
        """Yield all cold starts, by pipeline and time."""
        for _, value in self._scan("coldstarts"):
            yield schema.decode_cold_start(value)

    def upkeep(self) -> Iterator[tuple[str, UpkeepRecord]]:
        """Yield (pipeline, record), by id."""
        for key, value in self._scan("upkeep"):
            yield key.decode("ascii"), schema.decode_upkeep(value)

    def get_upkeep(self, pipeline: str) -> UpkeepRecord | None:
        value = self._get("upkeep", schema.pipeline_key(pipeline))
        return None if value is None else schema.decode_upkeep(value)

    def summaries(self) -> Iterator[tuple[str, SummaryRecord]]:
        """Yield (pipeline, record), by id."""
        for key, value in self._scan("summaries"):
            yield key.decode("ascii"), schema.decode_summary(value)

    def summarized(self) -> Iterator[str]:
        """The pipelines that have a summary, by id."""
        for key, _ in self._scan("summaries"):
            yield key.decode("ascii")

    def clock(self) -> ClockState | None:
        """The clocks as the last daemon saved them."""
        value = self._get("meta", schema.META_CLOCK)
        return None if value is None else schema.decode_clock(value)

    def store_identity(self) -> str | None:
        """The identity of the store that the index belongs to; None in a new index or one of an earlier version."""
        value = self._get("meta", schema.META_STORE)
        return None if value is None else value.decode("ascii", "replace")

    def dump(self) -> dict[str, dict[bytes, bytes]]:
        """Return all keys and values. For tests, and for probing a suspect index."""
        return {database: dict(self._scan(database)) for database in schema.DATABASES}


class WriteTxn(ReadTxn):
    """The writes of one operation. All of them happen, or none if the operation raises.

    It has more than 25 public methods, two or three per kind of record: they are typed put and delete, without logic of
    their own.
    """

    def __init__(
        self,
        transaction: Transaction,
        databases: Databases,
        no_space: Callable[[Transaction], StoreError | None],
        take_nodeids: Callable[[int | None, int], int],
    ) -> None:
        super().__init__(transaction, databases)
        self._no_space = no_space
        self._take_nodeids = take_nodeids
        self._puts = 0
        self._freed = 0
        self._full: StoreError | None = None
        self._invalidated: set[str] = set()
        """Pipelines whose summary this operation has deleted."""

    def _invalidate_summary(self, pipeline: str) -> None:
        if pipeline not in self._invalidated:
            self._delete("summaries", schema.pipeline_key(pipeline))
            self._invalidated.add(pipeline)

    def _put(self, database: str, key: bytes, value: bytes) -> None:
        if self._full is not None or self._puts % _CHECK_EVERY == 0:
            self._full = self._no_space(self._transaction)
        self._puts += 1
        if self._full is not None:
            old = self._get(database, key)
            grows = len(value) - len(old) if old is not None else len(key) + len(value)
            if grows > self._freed:
                raise self._full
            self._freed -= max(grows, 0)
        self._transaction.put(key, value, db=self._databases[database])

    def _delete(self, database: str, key: bytes) -> bool:
        old = self._transaction.pop(key, db=self._databases[database])
        if old is None:
            return False
        self._freed += len(key) + len(old)
        return True

    def _delete_range(self, database: str, prefix: bytes) -> int:
        count = 0
        with self._transaction.cursor(self._databases[database]) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key().startswith(prefix):
                self._freed += len(cursor.key()) + len(cursor.value())
                found = cursor.delete()
                count += 1
        return count

    def put_pipeline(self, record: PipelineRecord) -> None:
        self._put("pipelines", schema.pipeline_key(record.spec.id), schema.encode(record))

    def delete_pipeline(self, pipeline: str) -> None:
        """Delete a pipeline with its generations, files, times and cold starts. No effect if it is not there."""
        self._delete("pipelines", schema.pipeline_key(pipeline))
        self._delete("requests", schema.pipeline_key(pipeline))
        self._delete("upkeep", schema.pipeline_key(pipeline))
        self._invalidate_summary(pipeline)
        for database in ("generations", "files", "atimes", "coldstarts"):
            self._delete_range(database, schema.pipeline_prefix(pipeline))

    def put_generation(self, record: GenerationRecord) -> None:
        self._invalidate_summary(record.pipeline)
        self._put("generations", schema.generation_key(record.pipeline, record.number), schema.encode(record))

    def delete_generation(self, pipeline: str, generation: int) -> None:
        """Delete a generation with its files and their times. No effect if it is not there."""
        self._invalidate_summary(pipeline)
        key = schema.generation_key(pipeline, generation)
        self._delete("generations", key)
        for database in ("files", "atimes"):
            self._delete_range(database, key)

    def put_file(self, pipeline: str, generation: int, index: int, record: FileRecord) -> None:
        self._invalidate_summary(pipeline)
        self._put("files", schema.file_key(pipeline, generation, index), schema.encode(record))

    def delete_file(self, pipeline: str, generation: int, index: int) -> bool:
        """Forget a file's state (not its times). Returns whether it had one."""
        self._invalidate_summary(pipeline)
        return self._delete("files", schema.file_key(pipeline, generation, index))

    def delete_files(self, pipeline: str, generation: int) -> int:
        """Forget the state of all files of a generation (not their times). Returns how many had one."""
        self._invalidate_summary(pipeline)
        return self._delete_range("files", schema.generation_key(pipeline, generation))

    def put_last_request(self, pipeline: str, at_ns: int) -> None:
        self._put("requests", schema.pipeline_key(pipeline), schema.encode_u64(at_ns))

    def put_last_access(self, pipeline: str, generation: int, index: int, at_ns: int) -> None:
        self._put("atimes", schema.file_key(pipeline, generation, index), schema.encode_u64(at_ns))

    def put_cold_start(self, record: ColdStart) -> None:
        self._put("coldstarts", schema.cold_start_key(record.pipeline, record.started_ns), schema.encode(record))

    def delete_cold_start(self, pipeline: str, started_ns: int) -> bool:
        return self._delete("coldstarts", schema.cold_start_key(pipeline, started_ns))

    def put_upkeep(self, pipeline: str, record: UpkeepRecord) -> None:
        self._put("upkeep", schema.pipeline_key(pipeline), schema.encode(record))

    def put_summary(self, pipeline: str, record: SummaryRecord) -> None:
        """Store a summary, after everything else that the operation does to the pipeline."""
        self._invalidated.discard(pipeline)
        self._put("summaries", schema.pipeline_key(pipeline), schema.encode(record))

    def delete_summary(self, pipeline: str) -> None:
        """Delete a summary: the pipeline's files, or its slot, are about to change."""
        self._invalidate_summary(pipeline)

    def put_clock(self, state: ClockState) -> None:
        self._put("meta", schema.META_CLOCK, schema.encode(state))

    def put_store_identity(self, identity: str) -> None:
        self._put("meta", schema.META_STORE, identity.encode("ascii"))

    def prove_writable(self, at_ns: int) -> None:
        """Write a small record; raises what any write would."""
        self._put("meta", schema.META_HEALTH, schema.encode_u64(at_ns))

    def reserve_nodeids(self, count: int) -> int:
        """Reserve ``count`` consecutive nodeids that were never used, across restarts and lost indexes; the first one.

        If the operation fails they are not reserved. Raises StoreFull or StoreReadOnly if the high-water mark cannot be
        written.
        """
        if count < 1:
            raise ValueError(f"cannot reserve {count} nodeids")
        value = self._get("meta", schema.META_NODEIDS)
        first = self._take_nodeids(None if value is None else schema.decode_u64(value), count)
        self._put("meta", schema.META_NODEIDS, schema.encode_u64(first + count))
        return first

    def clear(self) -> None:
        """Forget everything but the format, the nodeid counter and the clocks (fsck)."""
        for database in schema.DATABASES:
            if database != "meta":
                self._transaction.drop(self._databases[database], delete=False)
