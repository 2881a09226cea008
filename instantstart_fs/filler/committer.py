"""Group commit: makes present chunks durable and complete files sealed (design rules 1 and 2). It does not know where
bytes come from or whether a digest matched.

Every ``commit_bytes`` of new chunks, or ``commit_seconds`` after the first, and at once when a file awaits its seal:
1. take what is dirty now; chunks that arrive from here on wait for the next commit;
2. fdatasync each file that has some; seal each file that is complete (small ones many at a time, so that they share the
   journal's commits);
3. ONE index transaction with all bitmaps and all seals;
4. only then ``durable`` grows and ``state`` becomes sealed.

| a crash after | leaves                                            | repaired by                              |
|---------------|---------------------------------------------------|------------------------------------------|
| 1, 2          | bytes the index does not speak of                 | fetched again                            |
| 2 (seal)      | a seal record, an index that says filling         | opening the file takes the record away   |
| poison: index | bytes of the old incarnation, spoken of by nobody | fetched over                             |

A failed fdatasync or seal proves nothing about what was written before it: all chunks of that file that were not yet
durable are dropped and fetched again (``on_lost``). A full index loses nothing: the group waits, is tried again every
few seconds, and ``stuck`` is set meanwhile. ``stuck`` is also set while a transaction does not end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Literal, Protocol

import msgspec
import trio

from instantstart_fs.errors import IndexFull, InstantStartError, StoreError
from instantstart_fs.filler.target import FileKey, FileState, FillTarget
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.blobfile import Seal, SealRecord, seal_all
from instantstart_fs.store.blobstore import BlobStore

log = logging.getLogger(__name__)

SYNC_THREADS = 8
SEAL_SECONDS = 0.05
SEAL_GROUP = 256
"""A seal waits this long for others, or until there are SEAL_GROUP: thousands of small files share their commits. With
a large file among them it does not wait."""
SMALL_FILE = 1024 * 1024
SEAL_TOGETHER = 64
"""Files of at most SMALL_FILE bytes that one call seals; a larger file has a call of its own."""
RETRY_SECONDS = 5.0
FLUSH_SECONDS = 10.0


class CommitEvents(Protocol):
    """The events of the committer, on the trio thread."""

    def on_sealed(self, target: FillTarget) -> None:
        """The file is sealed, or unverified, on disk and in the index."""
        ...

    def on_poisoned(self, target: FillTarget) -> None:
        """The record of a poisoned file is the next incarnation's, and its bytes are deleted."""
        ...

    def on_lost(self, target: FillTarget, error: InstantStartError) -> None:
        """Chunks that were not durable may be lost: a sync or a seal failed."""
        ...

    def on_stuck(self, targets: list[FillTarget], error: InstantStartError | None) -> None:
        """The index takes no commits; None: it does again."""
        ...


class Committer:
    """Commits chunks in groups. ``commit_bytes``, ``commit_seconds``: the size and age at which a group is
    committed."""

    def __init__(
        self, store: BlobStore, index: Index, commit_bytes: int, commit_seconds: float, events: CommitEvents
    ) -> None:
        self._store = store
        self._index = index
        self._commit_bytes = commit_bytes
        self._commit_seconds = commit_seconds
        self._events = events
        self._dirty: dict[FillTarget, set[int]] = {}
        self._dirty_bytes = 0
        self._seals: dict[FillTarget, Literal["sealed", "unverified"]] = {}
        self._large = False
        """Whether a large file waits to be sealed."""
        self._poisoned: dict[FillTarget, None] = {}
        self._busy: set[FillTarget] = set()
        self._forgotten: set[FillTarget] = set()
        self._limiter = trio.CapacityLimiter(SYNC_THREADS)
        self._wakeup = trio.Event()
        self._idle = trio.Event()
        self.commits = 0
        self.stuck: InstantStartError | None = None

    # -- what to commit ------------------------------------------------------------------------------------------

    def dirty(self, target: FillTarget, chunk: int) -> None:
        """Commit this chunk, which is present now."""
        self._dirty.setdefault(target, set()).add(chunk)
        self._dirty_bytes += target.present.chunk_size
        if len(self._dirty) == 1 or self._dirty_bytes >= self._commit_bytes:
            self._wakeup.set()

    def seal(self, target: FillTarget, state: Literal["sealed", "unverified"]) -> None:
        """Seal the file: every chunk is present, and proven unless ``state`` is "unverified"."""
        self._seals[target] = state
        self._large = self._large or target.entry.file.size > SMALL_FILE
        self._wakeup.set()

    def poison(self, target: FillTarget) -> None:
        """Drop the record of a file whose bytes are wrong, then delete the file."""
        self._dirty.pop(target, None)
        self._poisoned[target] = None
        self._wakeup.set()

    def discard_dirty(self, target: FillTarget) -> None:
        """Forget the file's chunks that are not durable: they are not present any more."""
        self._dirty.pop(target, None)
        self._seals.pop(target, None)

    def forget_pipeline(self, pipeline: str) -> None:
        """Commit nothing more of a pipeline that goes away; ``wait_quiet`` returns when that is so."""
        for group in (self._dirty, self._seals, self._poisoned, self._busy):
            for target in [target for target in group if target.key.pipeline == pipeline]:
                self.forget(target)

    def forget(self, target: FillTarget) -> None:
        """Commit nothing more of the file."""
        self._dirty.pop(target, None)
        self._seals.pop(target, None)
        self._poisoned.pop(target, None)
        if target in self._busy:
            self._forgotten.add(target)

    async def wait_quiet(self, pipeline: str) -> None:
        """Return when no commit under way touches this pipeline's files."""
        while any(target.key.pipeline == pipeline for target in self._busy):
            await self._idle.wait()

    # -- committing ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit until cancelled; then once more, so that a stop costs no refetch."""
        try:
            while True:
                await self._wakeup.wait()
                await self._gather()
                self._wakeup = trio.Event()
                # A group that has begun is finished: otherwise its chunks would be fetched again.
                with trio.CancelScope(shield=True):
                    await self.commit()
                if self.stuck is not None:
                    await trio.sleep(RETRY_SECONDS)
                    self._wakeup.set()
        finally:
            with trio.move_on_after(FLUSH_SECONDS, shield=True):
                await self.commit()

    async def _gather(self) -> None:
        """Wait until the group is large or old enough, only a moment where a seal is awaited."""
        with trio.move_on_after(self._commit_seconds) as scope:
            while self._dirty_bytes < self._commit_bytes and len(self._seals) < SEAL_GROUP:
                if self._large:  # its own fsync is what it costs: company saves nothing, and somebody waits for it
                    return
                if self._seals or self._poisoned:
                    scope.deadline = min(scope.deadline, trio.current_time() + SEAL_SECONDS)
                self._wakeup = trio.Event()
                await self._wakeup.wait()

    async def commit(self) -> None:
        """Commit one group: everything that is pending now."""
        seals, self._seals = self._seals, {}
        self._large = False
        poisoned, self._poisoned = self._poisoned, {}
        dirty, self._dirty = self._dirty, {}
        self._dirty_bytes = 0
        if not (seals or poisoned or dirty):
            # What could not be committed was forgotten meanwhile: the next group finds out about the index.
            self._unstick([])
            return
        for target in (*seals, *poisoned):
            dirty.pop(target, None)
        self._busy = {target for group in (seals, poisoned, dirty) for target in group}
        self._forgotten = set()
        try:
            failed: dict[FillTarget, InstantStartError] = {}
            async with trio.open_nursery() as nursery:
                for target in dirty:
                    nursery.start_soon(self._sync, target, failed)
                for together in _in_groups(seals):
                    nursery.start_soon(self._seal, together, failed)
            dropped = self._forgotten | failed.keys()
            synced = {target: chunks for target, chunks in dirty.items() if target not in dropped}
            sealed = {target: state for target, state in seals.items() if target not in dropped}
            bad = [target for target in poisoned if target not in self._forgotten]
            committed = await self._record(synced, sealed, bad)
            if committed:
                for target in bad:
                    await self._unlink(target)
            forgotten = self._forgotten
            if not committed:
                self._put_back(synced, sealed, bad, forgotten)
        finally:
            self._busy = set()
            self._forgotten = set()
            idle, self._idle = self._idle, trio.Event()
            idle.set()
        self.commits += committed
        for target, error in failed.items():
            self._events.on_lost(target, error)
        if not committed:
            return
        for target, chunks in synced.items():
            for chunk in chunks:
                target.durable.add(chunk)
        for target, state in sealed.items():
            if target not in forgotten:
                target.state = FileState(state)
                self._events.on_sealed(target)
        for target in bad:
            if target not in forgotten:
                self._events.on_poisoned(target)

    async def _sync(self, target: FillTarget, failed: dict[FillTarget, InstantStartError]) -> None:
        blob = target.blob
        if blob is None or blob.fd < 0:
            self._forgotten.add(target)  # the library has closed it
            return
        try:
            await trio.to_thread.run_sync(blob.datasync, limiter=self._limiter)
        except InstantStartError as error:
            failed[target] = error

    async def _seal(
        self,
        targets: list[tuple[FillTarget, Literal["sealed", "unverified"]]],
        failed: dict[FillTarget, InstantStartError],
    ) -> None:
        now = time.time_ns()
        seals: dict[FillTarget, Seal] = {}
        for target, state in targets:
            assert target.blob is not None
            file = target.entry.file
            digest = str(file.digest) if file.digest is not None and state == "sealed" else None
            record = SealRecord(
                size=file.size, state=state, digest=digest, sealed_at_ns=now, proof=target.proven_by or msgspec.UNSET
            )
            seals[target] = Seal(target.blob, record, mtime_ns=file.mtime_ns or None)
        keep_pages = {target for target in seals if target.has_reader()}

        def seal() -> dict[FillTarget, InstantStartError]:
            errors = seal_all(list(seals.values()))
            found = {target: errors[seal.blob] for target, seal in seals.items() if seal.blob in errors}
            for target in seals.keys() - found.keys():
                blob = seals[target].blob
                try:
                    target.allocated = blob.allocated_bytes()
                except InstantStartError as error:
                    found[target] = error
                if target not in keep_pages:
                    blob.drop_pages()  # clean by now, and hashed
            return found

        failed |= await trio.to_thread.run_sync(seal, limiter=self._limiter)

    async def _record(
        self,
        synced: dict[FillTarget, set[int]],
        sealed: dict[FillTarget, Literal["sealed", "unverified"]],
        bad: list[FillTarget],
    ) -> bool:
        if not (synced or sealed or bad):
            return True
        # The operation runs on the index's thread, so it gets values.
        puts: list[tuple[FileKey, FileRecord]] = []
        for target, chunks in synced.items():
            bits = bytearray(target.durable.to_bytes())
            for chunk in chunks:
                bits[chunk >> 3] |= 1 << (chunk & 7)
            puts.append((target.key, FileRecord(FileState.FILLING.value, target.incarnation, 0, bytes(bits))))
        puts += [
            (target.key, FileRecord(state, target.incarnation, allocated=target.allocated))
            for target, state in sealed.items()
        ]
        replaced = [(target.key, target.incarnation) for target in bad]

        def write(txn: WriteTxn) -> None:
            for key, record in puts:
                _put(txn, key, record)
            for key, incarnation in replaced:
                _record_poisoned(txn, key, incarnation)

        def late(error: StoreError) -> None:
            # It may still succeed, so nothing is put back or released before it has ended.
            log.error("%s; filling pauses", error.message)
            self.stuck = error
            self._events.on_stuck([*synced, *sealed, *bad], error)

        try:
            await self._index.write(write, late=late)
        except StoreError as error:
            kind = "the index is full" if isinstance(error, IndexFull) else "the index cannot be written"
            log.error("%s: %s; filling pauses and tries again", kind, error.message)
            self.stuck = error
            self._events.on_stuck([*synced, *sealed, *bad], error)
            return False
        self._unstick([*synced, *sealed, *bad])
        return True

    def _unstick(self, targets: list[FillTarget]) -> None:
        if self.stuck is not None:
            self.stuck = None
            self._events.on_stuck(targets, None)

    async def _unlink(self, target: FillTarget) -> None:
        key = target.key
        try:
            await trio.to_thread.run_sync(
                self._store.delete_blob, key.pipeline, key.generation, target.entry.path, limiter=self._limiter
            )
        except InstantStartError as error:
            # The index no longer knows these bytes: they will be overwritten.
            log.error("%s: the poisoned bytes cannot be unlinked: %s", target.entry.path, error.message)

    def _put_back(
        self,
        synced: dict[FillTarget, set[int]],
        sealed: dict[FillTarget, Literal["sealed", "unverified"]],
        bad: list[FillTarget],
        forgotten: set[FillTarget],
    ) -> None:
        for target, chunks in synced.items():
            if target not in forgotten:
                self._dirty.setdefault(target, set()).update(chunks)
        for target, state in sealed.items():
            if target not in forgotten:
                self._seals.setdefault(target, state)
        for target in bad:
            if target not in forgotten:
                self._poisoned[target] = None


def _in_groups(
    seals: dict[FillTarget, Literal["sealed", "unverified"]],
) -> Iterator[list[tuple[FillTarget, Literal["sealed", "unverified"]]]]:
    """The seals, in groups that one call each writes."""
    small = [item for item in seals.items() if item[0].entry.file.size <= SMALL_FILE]
    for start in range(0, len(small), SEAL_TOGETHER):
        yield small[start : start + SEAL_TOGETHER]
    yield from ([item] for item in seals.items() if item[0].entry.file.size > SMALL_FILE)


def _put(txn: WriteTxn, key: FileKey, record: FileRecord) -> None:
    old = txn.get_file(key.pipeline, key.generation, key.index)
    if old is not None and old.incarnation != record.incarnation:
        return  # another incarnation is in its place: the bytes of this one are obsolete
    nodeid = old.nodeid if old is not None else 0
    txn.put_file(key.pipeline, key.generation, key.index, msgspec.structs.replace(record, nodeid=nodeid))


def _record_poisoned(txn: WriteTxn, key: FileKey, incarnation: int) -> None:
    old = txn.get_file(key.pipeline, key.generation, key.index)
    if old is not None and old.incarnation != incarnation:
        return
    # nodeid 0 with an incarnation above 0: the library gives it a fresh one.
    txn.put_file(key.pipeline, key.generation, key.index, FileRecord(FileState.ABSENT.value, incarnation + 1, 0, b""))
