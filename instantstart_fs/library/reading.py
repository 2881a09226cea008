"""Opening and reading: where the mount's demand meets the filler.

A read of present bytes touches neither the network nor another thread, where the page cache has them. A read of absent
bytes asks the filler (ahead of all background work) and waits for the chunk. The first READ beyond a weight file's
header starts the background fill of the pipeline's load set, from that file on.

Also the filler's listener (FillEvents): what it reports changes the files' states here and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import msgspec
import trio

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.loadset import READAHEAD_ALLOWANCE, fill_threshold, is_weight_file, safetensors_header_length
from instantstart_fs.core.manifest import same_bytes
from instantstart_fs.errors import (
    FillCancelled,
    InstantStartError,
    NoSuchEntry,
    StoreDamaged,
    StoreFull,
)
from instantstart_fs.filler.scheduler import Filler
from instantstart_fs.filler.target import FileState, FillTarget
from instantstart_fs.index.access_log import AccessLog
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.library.admission import Admissions
from instantstart_fs.library.holders import processes_holding
from instantstart_fs.library.observing import Observer
from instantstart_fs.library.shelf import Shelf
from instantstart_fs.library.state import CachedFile, Generation, Pipeline, Trouble, Uncached, counts_as_request
from instantstart_fs.library.watching import Nobody, Watcher

log = logging.getLogger(__name__)

FILL_SLICE = 1000
"""Files that are ordered without a pause: a million of them must not stop everybody else."""
IDLE_READERS = 256
"""Descriptors of files that were open a while ago: the shards of some pipelines, and a quarter of the least limit of
open files (1024) that a daemon may be given."""


class Handle:
    """One open of one file incarnation, by one of its two nodeids; ``backing``: see view.OpenFile."""

    __slots__ = ("backing", "file", "nodeid", "released")

    def __init__(self, file: CachedFile, nodeid: int, backing: int | None) -> None:
        self.file = file
        self.nodeid = nodeid
        self.backing = backing
        self.released = False

    @property
    def pipeline(self) -> str:
        return self.file.generation.pipeline.id

    @property
    def sealed(self) -> bool:
        return self.file.complete

    @property
    def keep_cache(self) -> bool:
        # What came straight from the origin was never proven: it ends with the opens that asked for it.
        return not (self.file.passed or self.file.generation.pipeline.uncached is not None)


class Reading:
    """Owned by the Library. ``read_deadline``: seconds without progress after which a waiting read fails."""

    def __init__(self, shelf: Shelf, access: AccessLog, read_deadline: float, observer: Observer) -> None:
        self._shelf = shelf
        self._access = access
        self._read_deadline = read_deadline
        self._observer = observer
        self._filler: Filler | None = None
        self._admissions: Admissions | None = None
        self._on_growth: Callable[[], None] = lambda: None
        self._drained = trio.open_memory_channel[Generation](math.inf)
        self._replaced = trio.open_memory_channel[tuple[CachedFile, bool]](math.inf)
        self._discarding: set[CachedFile] = set()
        self._inherited: dict[int, list[Handle]] = {}
        self._idle: OrderedDict[CachedFile, None] = OrderedDict()
        """Complete files that nobody has open, whose descriptor is kept: opening and registering it anew was half of
        the time of an open. The least recently used comes first."""
        self.closing: Callable[[int], None] | None = None
        """See view.View.use_passthrough."""
        self.watcher: Watcher = Nobody()
        shelf.retire = self._retire

    def attach(self, filler: Filler, admissions: Admissions, on_growth: Callable[[], None]) -> None:
        """The filler and this object know each other; the filler comes second. ``on_growth``: new bytes have come."""
        self._filler = filler
        self._admissions = admissions
        self._on_growth = on_growth

    @property
    def filler(self) -> Filler:
        assert self._filler is not None, "attach() comes first"
        return self._filler

    @property
    def admissions(self) -> Admissions:
        assert self._admissions is not None, "attach() comes first"
        return self._admissions

    @property
    def drained_generations(self) -> trio.MemoryReceiveChannel[Generation]:
        """Superseded generations whose last handle has just been released."""
        return self._drained[1]

    # -- the mount's side ----------------------------------------------------------------------------------------

    async def open(self, nodeid: int) -> Handle:
        """See view.View.open. Raises NoSuchEntry (the kernel then looks the name up again and finds another nodeid)
        where a file that was complete is not, or no longer, what its record says."""
        try:
            return self._open(nodeid)
        except StoreDamaged as error:
            file = self._shelf.nodes.find(nodeid)
            if not isinstance(file, CachedFile) or nodeid != file.passthrough_nodeid:
                self._observer.failed("open", error)
                raise
            if not file.handles:
                self._close_reader(file)
            await self.discard(file, error, wanted=True)
            raise NoSuchEntry(f"{file.entry.path}: was dropped: {error.message}") from error

    def open_nowait(self, nodeid: int) -> Handle | None:
        """See view.View.open_nowait."""
        try:
            return self._open(nodeid)
        except StoreDamaged:
            return None

    def _open(self, nodeid: int) -> Handle:
        try:
            handle = self._take(nodeid)
        except (NoSuchEntry, StoreDamaged):
            raise  # it is looked up, or opened, once more
        except InstantStartError as error:
            self._observer.failed("open", error)
            raise
        self._observer.opened(handle.file, passthrough=handle.backing is not None)
        return handle

    def _take(self, nodeid: int) -> Handle:
        file = self._shelf.nodes.find(nodeid)
        if not isinstance(file, CachedFile):
            raise NoSuchEntry(f"node {nodeid} is no file, or is gone")
        weight = counts_as_request(file)
        if weight and not file.complete:
            self._refuse_hopeless(file)
        if weight:
            self._access.record_request(file.generation.pipeline.id, self._shelf.now_ns())
        backing = None
        if nodeid == file.passthrough_nodeid:
            backing = self._backing(file)
            # Nobody will tell of its reads.
            self._access.record_read(*file.triple, self._shelf.now_ns())
        return self._handle(file, nodeid, backing)

    def _handle(self, file: CachedFile, nodeid: int, backing: int | None) -> Handle:
        self._idle.pop(file, None)
        file.handles += 1
        file.generation.handles += 1
        if counts_as_request(file) and file.handles == 1 and file.generation.in_load_set(file.entry.index):
            self.watcher.opened(file.key)
        return Handle(file, nodeid, backing)

    def inherit(self, nodeids: Sequence[int]) -> None:
        """The kernel holds these open, one for each handle: nothing of theirs is evicted or deleted from now on. What
        is gone is left out."""
        for nodeid in nodeids:
            file = self._shelf.nodes.find(nodeid)
            if not isinstance(file, CachedFile):
                continue
            backing = None
            if nodeid == file.passthrough_nodeid:
                # Its close tells the session when nobody needs the backing id any more.
                with contextlib.suppress(StoreDamaged):
                    backing = self._reader(file)
            self._inherited.setdefault(nodeid, []).append(self._handle(file, nodeid, backing))

    def reopen(self, nodeid: int) -> Handle:
        """See view.View.reopen."""
        handles = self._inherited.get(nodeid)
        if not handles:
            raise NoSuchEntry(f"node {nodeid}")
        handle = handles.pop()
        self._observer.opened(handle.file, passthrough=handle.backing is not None)
        return handle

    def drop_inherited(self) -> None:
        """Whoever was to be reopened is."""
        inherited, self._inherited = self._inherited, {}
        for handles in inherited.values():
            for handle in handles:
                self._observer.opened(handle.file, passthrough=handle.backing is not None)
                self.release(handle)
        for pipeline in self._shelf.pipelines.values():
            for generation in pipeline.draining:
                if not generation.handles:
                    self._drained[0].send_nowait(generation)

    def _backing(self, file: CachedFile) -> int:
        """The descriptor that the kernel is to read. Raises NoSuchEntry, StoreDamaged."""
        if not file.passable:
            raise NoSuchEntry(f"{file.entry.path}: is not complete any more")
        fd = self._reader(file)
        found = os.fstat(fd)
        if found.st_size != file.size or not found.st_nlink:
            raise StoreDamaged(
                f"{file.entry.path}: the store's file has {found.st_size} bytes of {file.size}, {found.st_nlink} names"
            )
        return fd

    def _refuse_hopeless(self, file: CachedFile) -> None:
        """An error at open is a traceback in the engine; one at a page fault is a SIGBUS. So refuse early."""
        refusal = self.filler.refusal(file.target) if file.target is not None else None
        if refusal is not None and not isinstance(refusal, StoreFull):
            raise refusal
        origin = file.generation.opened_origin(file.entry.model)
        if origin is not None:
            broken = self.filler.breaker_open(origin.key)
            if broken is not None:
                raise broken

    async def read_into(self, handle: Handle, offset: int, buffer: memoryview) -> int:
        """See view.View.read_into."""
        try:
            count = await self._read_into(handle, offset, buffer)
        except InstantStartError as error:
            self._observer.failed("read", error)
            raise
        self._observer.read(handle.file, count)
        return count

    async def _read_into(self, handle: Handle, offset: int, buffer: memoryview) -> int:
        file = handle.file
        length = min(len(buffer), file.size - offset)
        if length <= 0:
            return 0
        self._access.record_read(*file.triple, self._shelf.now_ns())
        if not file.complete and not await self._wait_readable(file, ByteRange(offset, offset + length)):
            return await self._read_through(file, offset, buffer[:length])
        if file.gone is not None:
            raise file.gone
        view = buffer[:length]
        try:
            done = self._read_cached(file, offset, view)
            if done < length:
                await trio.to_thread.run_sync(self._read_blocking, file, offset + done, view[done:])
        except StoreDamaged as error:
            await self.discard(file, error, wanted=True)
            raise
        # Poisoned while the bytes were copied: nobody may see them.
        if file.gone is not None:
            raise file.gone
        return length

    def release(self, handle: Handle) -> None:
        """See view.View.release."""
        if handle.released:
            return
        handle.released = True
        file = handle.file
        self._observer.closed(file)
        file.handles -= 1
        if file.handles == 0 and counts_as_request(file) and file.generation.in_load_set(file.entry.index):
            self.watcher.released(file.key)
        if file.handles == 0 and file.reader is not None:
            generation = file.generation
            current = generation is generation.pipeline.current and not generation.pipeline.removed
            if file.passable and current:
                self._keep_idle(file)
            else:
                self._close_reader(file)
        self._let_go(file.generation)

    def _keep_idle(self, file: CachedFile) -> None:
        self._idle[file] = None
        self._idle.move_to_end(file)
        if len(self._idle) > IDLE_READERS:
            oldest, _ = self._idle.popitem(last=False)
            self._close_reader(oldest)

    def _retire(self, file: CachedFile) -> None:
        """Nobody will open it again: an idle descriptor would keep its deleted bytes on the disk."""
        self.watcher.retired(file.key)
        if not file.handles:
            self._close_reader(file)

    def _close_reader(self, file: CachedFile) -> None:
        self._idle.pop(file, None)
        if file.reader is not None:
            if self.closing is not None:
                self.closing(file.passthrough_nodeid)
            file.reader.close()
            file.reader = None

    def close_idle(self, generation: Generation) -> None:
        """Let go of descriptors that nobody reads by: they look as if somebody had the files open."""
        for file in generation.files:
            if not file.handles:
                self._close_reader(file)

    @contextlib.contextmanager
    def using(self, generation: Generation) -> Iterator[None]:
        """Meanwhile nothing of the generation is evicted or deleted, as if a file of it were open."""
        generation.handles += 1
        try:
            yield
        finally:
            self._let_go(generation)

    def _let_go(self, generation: Generation) -> None:
        generation.handles -= 1
        if generation.handles == 0 and generation is not generation.pipeline.current:
            self._drained[0].send_nowait(generation)

    def _read_cached(self, file: CachedFile, offset: int, view: memoryview) -> int:
        """As many bytes as the page cache has at once; 0 when it would block."""
        try:
            return os.preadv(self._reader(file), [view], offset, os.RWF_NOWAIT)
        except OSError:
            # EAGAIN: not cached. EOPNOTSUPP: this filesystem knows no RWF_NOWAIT. What is really wrong, the blocking
            # read meets again.
            return 0

    def _read_blocking(self, file: CachedFile, offset: int, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._reader(file), [view[done:]], offset + done)
                if count == 0:
                    raise StoreDamaged(f"{file.entry.path}: the store's file is shorter than the manifest says")
                done += count
        except OSError as error:
            raise StoreDamaged(f"{file.entry.path}: cannot be read from the store: {error.strerror}") from error

    def _reader(self, file: CachedFile) -> int:
        if file.reader is None:
            generation = file.generation
            blob = self._shelf.store.existing_blob(generation.pipeline.id, generation.number, file.entry.path)
            if blob is None:
                raise StoreDamaged(f"{file.entry.path}: missing from the store; run `instantstart verify`")
            try:
                if file.complete and blob.seal_record() is None:
                    # The index is wrong about it: what was never written reads as zeros.
                    raise StoreDamaged(f"{file.entry.path}: the store's file is not the one that was sealed")
            except BaseException:
                blob.close()
                raise
            file.reader = blob
        return file.reader.fd

    # -- asking the filler ---------------------------------------------------------------------------------------

    async def _wait_readable(self, file: CachedFile, wanted: ByteRange) -> bool:
        """Return when the store has these bytes; False when it has no room for them."""
        if file.gone is not None:
            raise file.gone
        target = await self.target(file)
        if target is None:
            return True
        if self._wants_weights(file, target, wanted.start):
            refused = await self.start_fill(file.generation, first=file)
            if refused is not None:
                return target.readable(wanted)
        if target.readable(wanted):
            return True
        if not await self._admitted(file, target, wanted):
            return target.readable(wanted)
        try:
            self.filler.demand(target, wanted)
            since, failed = trio.current_time(), True
            try:
                await target.wait_readable(wanted, self._read_deadline)
                failed = False
            finally:
                self._observer.waited(file, trio.current_time() - since, failed=failed)
        except StoreFull as error:
            self.admissions.disk_full(file.generation.pipeline, error)
            return False
        return True

    async def _admitted(self, file: CachedFile, target: FillTarget, wanted: ByteRange) -> bool:
        """Whether the chunks of ``wanted`` may come into the store."""
        generation = file.generation
        if self.filler.in_background(target):
            return True
        chunks = target.present.chunks_of(wanted) if target.serve_unsealed else range(target.present.chunks)
        needed = sum(target.present.byte_range(chunk).length for chunk in chunks if chunk not in target.present)
        return await self.admissions.some(generation, needed)

    async def _read_through(self, file: CachedFile, offset: int, view: memoryview) -> int:
        """Straight from the origin; nothing of it is kept."""
        origin = file.generation.opened_origin(file.entry.model)
        assert origin is not None, "target() opened it"
        file.passed = True
        await self.filler.read_through(file.key, file.entry, origin, offset, view)
        if file.gone is not None:
            raise file.gone
        return len(view)

    def _wants_weights(self, file: CachedFile, target: FillTarget, offset: int) -> bool:
        path, chunk_size = file.entry.file.path, target.present.chunk_size
        if file.generation.filling_load_set and file.generation.in_load_set(file.entry.index):
            return False
        if not is_weight_file(path):
            # A large file of another kind, read on and on: fetch ahead of its reader, but nothing else.
            return offset >= chunk_size and file.size > chunk_size
        if offset < min(READAHEAD_ALLOWANCE, file.size // 2):
            return False
        header = None
        if path.endswith(".safetensors") and target.present.chunks and 0 in target.present and file.size >= 8:
            prefix = bytearray(8)
            if self._read_cached(file, 0, memoryview(prefix)) == 8:
                header = safetensors_header_length(bytes(prefix))
        return offset >= fill_threshold(path, file.size, header)

    async def start_fill(
        self, generation: Generation, first: CachedFile | None = None, *, everything: bool = False
    ) -> Uncached | None:
        """Fill the load set in the background (or ``everything``), from ``first`` on. What it says when there is no
        room for that: then nothing begins.

        A ``first`` outside the load set, or of a superseded generation, is filled beside what is being filled; so is
        one that is to be fetched again while the load set is being filled.
        """
        under_way = generation.filling_load_set and self.filler.is_filling(generation.pipeline.id)
        if first is not None and (
            under_way or generation is not generation.pipeline.current or not generation.in_load_set(first.entry.index)
        ):
            target = await self.target(first)
            if target is not None and not self.filler.in_background(target):
                missing = first.size - target.present.present_bytes
                if not await self.admissions.some(generation, missing):
                    return generation.pipeline.uncached
                self.filler.fill_also(target)
                generation.pipeline.changed()
            return None
        refused = await self.admissions.whole(generation, everything=everything)
        if refused is not None:
            return refused
        try:
            await self._fill(generation, first, everything=everything)
        except BaseException:
            generation.filling_load_set = False
            raise
        return None

    async def _fill(self, generation: Generation, first: CachedFile | None, *, everything: bool) -> None:
        wanted = list(generation.load_set)
        if everything:
            wanted += [index for index in range(len(generation.files)) if not generation.in_load_set(index)]
        if first is not None:
            position = wanted.index(first.entry.index)
            wanted = wanted[position:] + wanted[:position]
        for start in range(0, max(len(wanted), 1), FILL_SLICE):
            targets = []
            for index in wanted[start : start + FILL_SLICE]:
                if not generation.files[index].complete:
                    target = await self.target(generation.files[index])
                    if target is not None:
                        targets.append(target)
            if generation.pipeline.removed:
                return
            order = self.filler.fill if start == 0 else self.filler.fill_more
            order(generation.pipeline.id, targets)
            generation.pipeline.changed()
            await trio.lowlevel.checkpoint()
        if generation.load_set_complete:
            generation.filling_load_set = False

    async def target(self, file: CachedFile) -> FillTarget | None:
        """The fill of this incarnation, made when it is first wanted; None when the file is complete.

        Raises what keeps it from being filled.
        """
        generation = file.generation
        if generation.ready is not None:
            await generation.ready.wait()
        if file.target is None:
            origin = generation.opened_origin(file.entry.model)
            if origin is None:
                origin = await trio.to_thread.run_sync(generation.origin, file.entry.model)
        if file.gone is not None:
            raise file.gone
        if generation.pipeline.removed:
            raise FillCancelled(f"{generation.pipeline.id}: the pipeline was removed")
        if self._shelf.file(file.key) is not file:
            raise FillCancelled(f"{generation.pipeline.id}: the pipeline was evicted or updated meanwhile")
        if file.target is None and not file.complete:
            assert origin is not None
            store = self._shelf.store
            opener = functools.partial(
                store.blob, generation.pipeline.id, generation.number, file.entry.path, file.entry.file.size
            )
            file.target = FillTarget(file.key, file.entry, file.incarnation, file.chunk_map(), origin, opener)
            file.target.has_reader = lambda: generation.handles > 0
        return file.target

    # -- FillEvents: what the filler reports ---------------------------------------------------------------------

    def chunk_present(self, target: FillTarget, chunk: int) -> None:
        file = self._file_of(target)
        if file is None:
            return
        file.state = FileState.FILLING
        length = target.present.byte_range(chunk).length
        file.generation.grew(file, length)
        self._observer.fetched(file, length)
        pipeline = file.generation.pipeline
        if pipeline.trouble is not None and pipeline.trouble.final and pipeline.trouble.file is file:
            pipeline.trouble = None  # it goes on after all; the trouble of another file stays
        pipeline.grown_at_ns = self._shelf.now_ns()
        self._on_growth()
        pipeline.changed()

    def target_sealed(self, target: FillTarget) -> None:
        file = self._file_of(target)
        if file is None:
            return
        file.state = target.state
        file.bitmap = b""
        drop_target(file)
        generation = file.generation
        generation.completed(file, target.allocated)
        self.watcher.sealed(file.key)
        if self._shelf.passthrough and generation is generation.pipeline.current:
            self._shelf.invalidate_file(file)
        warm = generation is generation.pipeline.current and generation.load_set_complete
        self._observer.completed(file, warm=warm)
        if warm:
            generation.filling_load_set = False
            generation.pipeline.trouble = None
            log.info("warm: %d bytes", generation.load_bytes, extra={"pipeline": generation.pipeline.id})
        generation.pipeline.changed()
        self._shelf.on_complete(file)

    def target_poisoned(self, target: FillTarget, error: InstantStartError) -> None:
        file = self._file_of(target)
        if file is not None:
            self._poison(file, error, wanted=True)

    async def discard(self, file: CachedFile, problem: InstantStartError, *, wanted: bool) -> None:
        """Drop a complete file whose bytes are lost, unreadable or wrong; fetch it again if it is ``wanted``.

        Later opens get the new incarnation; handles of this one get ``problem``. Raises StoreError if the index cannot
        be told: then nothing has changed.
        """
        if file.gone is not None or not file.complete or file.generation.pipeline.removed:
            return
        if file in self._discarding or self._shelf.file(file.key) is not file:
            return
        self._discarding.add(file)
        try:
            with self.using(file.generation):
                async with self._shelf.uncovered(file.generation.pipeline):
                    await self._discard(file, problem, wanted=wanted)
        finally:
            self._discarding.discard(file)
        await self._discard_shared(file, problem)

    def doubt(self, file: CachedFile) -> InstantStartError | None:
        """Why that file is not, or soon no longer, what its state says; None: nothing is known against it."""
        if file.gone is not None:
            return file.gone
        if file in self._discarding or not file.complete:
            return StoreDamaged(f"{file.entry.path}: the store's bytes are being dropped")
        return None

    async def _discard_shared(self, file: CachedFile, problem: InstantStartError) -> None:
        """Other generations that have the same file on disk have the same bad bytes."""
        generation = file.generation
        for other in list(generation.pipeline.generations()):
            for twin in () if other is generation else other.files:
                if twin.entry.path == file.entry.path and twin.complete:
                    if same_bytes(twin.entry.file, file.entry.file):
                        await self.discard(twin, problem, wanted=other is generation.pipeline.current)
                    break

    async def _discard(self, file: CachedFile, problem: InstantStartError, *, wanted: bool) -> None:
        generation, index = file.generation, file.entry.index
        record = FileRecord(FileState.ABSENT.value, file.incarnation + 1)
        log.error("%s: dropped: %s", file.entry.path, problem.message, extra={"pipeline": generation.pipeline.id})
        await self._shelf.index.write(
            lambda txn: txn.put_file(generation.pipeline.id, generation.number, index, record)
        )
        await trio.to_thread.run_sync(
            self._shelf.store.delete_blob, generation.pipeline.id, generation.number, file.entry.path
        )
        if file.gone is None and not generation.pipeline.removed:
            self._poison(file, problem, wanted=wanted)

    def _poison(self, file: CachedFile, error: InstantStartError, *, wanted: bool) -> None:
        """Put a fresh incarnation in the place of one whose bytes are wrong, and fetch it again if it is wanted.

        The store's file was unlinked and the index told (incarnation + 1) by whoever found out.
        """
        pipeline = file.generation.pipeline
        file.state = FileState.POISONED
        self._observer.poisoned(file)
        drop_target(file)
        self._log_holders(file, error)
        new = self._shelf.replace_file(file, error)
        self._set_trouble(pipeline, error, final=False)
        self._replaced[0].send_nowait((new, wanted))

    def target_failed(self, target: FillTarget, error: InstantStartError) -> None:
        file = self._file_of(target)
        if file is None:
            return
        file.generation.filling_load_set = False
        file.generation.counts_changed()
        if isinstance(error, StoreFull):
            self.admissions.disk_full(file.generation.pipeline, error)
        elif not isinstance(error, FillCancelled):
            self._observer.fill_failed(error)
            self._set_trouble(file.generation.pipeline, error, final=True, file=file)
        file.generation.pipeline.changed()

    def trouble(self, target: FillTarget, error: InstantStartError | None) -> None:
        file = self._file_of(target)
        if file is None:
            return
        pipeline = file.generation.pipeline
        if error is not None:
            file.generation.counts_changed()  # what could not be made durable is not present any more
            if isinstance(error, StoreFull):
                return  # room is made, or target_failed says that there is none
            self._set_trouble(pipeline, error, final=False)
        elif pipeline.trouble is not None and not pipeline.trouble.final:
            pipeline.trouble = None
            pipeline.changed()

    def _set_trouble(
        self, pipeline: Pipeline, error: InstantStartError, *, final: bool, file: CachedFile | None = None
    ) -> None:
        log.warning("%s: %s", error.code, error.message, extra={"pipeline": pipeline.id})
        pipeline.trouble = Trouble(error, self._shelf.now_ns(), final=final, file=file)
        pipeline.changed()

    def _file_of(self, target: FillTarget) -> CachedFile | None:
        """The file that this target fills; None when another incarnation has taken its place."""
        file = self._shelf.file(target.key)
        return file if file is not None and file.target is target else None

    def _log_holders(self, file: CachedFile, error: InstantStartError) -> None:
        if not file.handles:
            return
        path = f"/{file.generation.pipeline.id}/{file.entry.path}"
        log.error(
            "%s: wrong bytes were served before the digest proved it (%s); %d opens hold it, processes: %s",
            file.entry.path,
            error.message,
            file.handles,
            ", ".join(processes_holding(path)) or "unknown",
            extra={"pipeline": file.generation.pipeline.id},
        )

    # -- background tasks ----------------------------------------------------------------------------------------

    async def run_replacements(self) -> None:
        """Record the nodeids of new incarnations, then fetch those files again that somebody wanted."""
        async for file, wanted in self._replaced[1]:
            generation = file.generation
            try:
                await self._shelf.index.write(functools.partial(_record_nodeid, file))
                if wanted:
                    await self.start_fill(generation, first=file)
            except InstantStartError as error:
                self._set_trouble(generation.pipeline, error, final=True)

    async def forgive(self, generation: Generation) -> None:
        """Somebody asks again on purpose: what failed for good may be tried anew at once."""
        pipeline = generation.pipeline
        self.filler.forgive(pipeline.id)
        failed = [file for file in generation.files if file.target is not None and file.target.failed]
        if failed:
            await self.filler.wait_quiet(pipeline.id)
        for file in failed:
            if file.target is not None and file.target.failed:
                file.bitmap = file.target.durable.to_bytes()
                drop_target(file)
        pipeline.trouble = None


def drop_target(file: CachedFile) -> None:
    """Let go of a target that the filler has done with, and of its descriptor."""
    if file.target is not None and file.target.blob is not None:
        file.target.blob.close()
    file.target = None


def _record_nodeid(file: CachedFile, txn: WriteTxn) -> None:
    """Keep what the record says of the file's presence; it may be filling already."""
    key = file.key
    if file.generation.pipeline.removed or file.gone is not None:
        return
    record = txn.get_file(key.pipeline, key.generation, key.index) or FileRecord("absent", file.incarnation)
    txn.put_file(key.pipeline, key.generation, key.index, msgspec.structs.replace(record, nodeid=file.nodeid))
