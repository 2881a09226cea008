"""Opens and reads files for the mount. Absent bytes are asked of the filler, and waited for.

A read of bytes that the page cache has touches neither the network nor another thread. A read of absent bytes asks the
filler (ahead of all background work) and waits for the chunk. The first READ beyond a weight file's
header starts the background fill of the pipeline's load set, from that file on.

The filler's reports are applied in serving/fill_events.py; serving/open_files.py has the open files.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence

import trio

from instantstart_fs.catalog.accounting import Uncached
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.loadset_learner import LoadSetLearner
from instantstart_fs.catalog.model import CachedFile, Generation, counts_as_request
from instantstart_fs.catalog.slots import check_present, prepare_filling
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.coldstart_tracker import Starts
from instantstart_fs.core.loadset import READAHEAD_ALLOWANCE, fill_threshold, safetensors_header_length
from instantstart_fs.errors import InstantStartError, NoSuchEntry, ReadDeadline, StoreDamaged, StoreFull
from instantstart_fs.filler.scheduler import Filler
from instantstart_fs.filler.target import FileState, FillTarget
from instantstart_fs.index.access_times import AccessTimes
from instantstart_fs.serving.admission import Admissions
from instantstart_fs.serving.fill_events import FillEventHandler, drop_target
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.telemetry.telemetry import Served, Telemetry
from instantstart_fs.vfs import NotLoaded

log = logging.getLogger(__name__)

MOST_WAITING = 16_384
"""Waiting reads of one pipeline at a time; more fail at once. They share the mount's tasks and memory."""
FILL_SLICE = 1000
"""Files that are handed to the filler without a pause: a million must not stop the loop."""


class Handle:
    """One open of one file incarnation, by one of its two nodeids. ``backing``: see vfs.OpenFile."""

    __slots__ = ("backing", "file", "nodeid", "released", "starts")

    def __init__(self, file: CachedFile, nodeid: int, backing: int | None) -> None:
        self.file = file
        self.nodeid = nodeid
        self.backing = backing
        self.released = False
        self.starts: Starts = ()
        """The cold starts that its reads belong to."""

    @property
    def pipeline(self) -> str:
        return self.file.generation.pipeline.id

    @property
    def sealed(self) -> bool:
        return self.file.complete

    @property
    def keep_cache(self) -> bool:
        # What came straight from the origin was never proven: it ends with the opens that asked for it.
        return not (self.file.served_uncached or self.file.generation.pipeline.uncached is not None)


class Reads:
    """Owned by the Library. ``read_deadline``: seconds without progress after which a waiting read fails.

    In a cold read the catalog, the filler, admission and telemetry meet, so it has 8 collaborators.
    """

    def __init__(
        self,
        catalog: Catalog,
        access: AccessTimes,
        read_deadline: float,
        telemetry: Telemetry,
        open_files: OpenFiles,
        fill_events: FillEventHandler,
        filler: Filler,
        admissions: Admissions,
        learner: LoadSetLearner,
    ) -> None:
        self._catalog = catalog
        self._access = access
        self._read_deadline = read_deadline
        self._telemetry = telemetry
        self._open_files = open_files
        self._fill_events = fill_events
        self.filler = filler
        self._admissions = admissions
        self._learner = learner
        self._restored: dict[int, list[Handle]] = {}
        self._waiting: dict[str, int] = {}
        """Reads that wait, by pipeline."""
        self.using = open_files.using
        self.replace_damaged = fill_events.replace_damaged
        self.integrity_error = fill_events.integrity_error

    # -- the mount's side ----------------------------------------------------------------------------------------

    async def open(self, nodeid: int) -> Handle:
        """See vfs.Vfs.open. Raises NoSuchEntry (the kernel then looks the name up again and finds another nodeid)
        where a file that was complete is not, or no longer, what its record says."""
        try:
            return self._open(nodeid)
        except StoreDamaged as error:
            file = self._catalog.nodes.find(nodeid)
            if not isinstance(file, CachedFile) or not file.complete:
                self._telemetry.failed("open", error)
                raise
            if not file.handles:
                self._open_files.close_reader(file)
            await self.replace_damaged(file, error, wanted=True, found_by="open")
            raise NoSuchEntry(f"{file.entry.path} was dropped: {error.message}") from error

    def open_nowait(self, nodeid: int) -> Handle | None:
        """See vfs.Vfs.open_nowait."""
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
            self._telemetry.failed("open", error)
            raise
        handle.starts = self._telemetry.opened(handle.file, passthrough=handle.backing is not None)
        return handle

    def _take(self, nodeid: int) -> Handle:
        file = self._catalog.nodes.find(nodeid)
        if not isinstance(file, CachedFile):
            raise NoSuchEntry(f"node {nodeid} is no file, or is gone")
        file.generation.pipeline.check_visible()
        weight = counts_as_request(file)
        if weight and not file.complete:
            self._fail_fast(file)
        if weight:
            self._access.record_request(file.generation.pipeline.id, self._catalog.now_ns())
        backing = None
        if nodeid == file.passthrough_nodeid:
            backing = self._open_files.backing(file)
            # Nobody will tell of its reads.
            self._access.record_read(*file.triple, self._catalog.now_ns())
        elif file.complete:
            # What is lost is found out here, where its reader can be given another; at a read it would be an error.
            self._open_files.check(file)
        else:
            self._open_files.check_descriptors(file)
        return self._handle(file, nodeid, backing)

    def _handle(self, file: CachedFile, nodeid: int, backing: int | None) -> Handle:
        self._open_files.acquire(file)
        return Handle(file, nodeid, backing)

    def restore_handles(self, nodeids: Sequence[int]) -> None:
        """Restore the handles that the kernel holds open from an earlier daemon, one for each nodeid given. Their files
        are not evicted or deleted from now on. Nodeids that name nothing any more are left out."""
        for nodeid in nodeids:
            try:
                file = self._catalog.nodes.find(nodeid)
            except NotLoaded as unloaded:
                _ = self._catalog.pipelines[unloaded.pipeline].current  # nobody is served yet who would wait for it
                file = self._catalog.nodes.find(nodeid)
            if not isinstance(file, CachedFile):
                continue
            backing = None
            if nodeid == file.passthrough_nodeid:
                # Its close tells the session when nobody needs the backing id any more.
                with contextlib.suppress(StoreDamaged):
                    backing = self._open_files.reader(file)
            self._restored.setdefault(nodeid, []).append(self._handle(file, nodeid, backing))

    def reopen(self, nodeid: int) -> Handle:
        """See vfs.Vfs.reopen."""
        handles = self._restored.get(nodeid)
        if not handles:
            raise NoSuchEntry(f"node {nodeid}")
        handle = handles.pop()
        handle.starts = self._telemetry.opened(handle.file, passthrough=handle.backing is not None)
        return handle

    def release_unclaimed(self) -> None:
        """End the handles of the earlier daemon that the kernel did not ask for again."""
        restored, self._restored = self._restored, {}
        for handles in restored.values():
            for handle in handles:
                handle.starts = self._telemetry.opened(handle.file, passthrough=handle.backing is not None)
                self.release(handle)
        self._open_files.queue_drained(self._catalog.pipelines.values())

    def _fail_fast(self, file: CachedFile) -> None:
        """Raise at open what would fail later: the engine gets a traceback there, and a SIGBUS at a page fault."""
        refusal = self.filler.refusal(file.target) if file.target is not None else None
        if refusal is not None and not isinstance(refusal, StoreFull):
            raise refusal
        origin = file.generation.opened_origin(file.entry.model)
        if origin is not None:
            broken = self.filler.breaker_open(origin.key, file.key)
            if broken is not None:
                raise broken

    async def read_into(self, handle: Handle, offset: int, buffer: memoryview) -> int:
        """See vfs.Vfs.read_into."""
        try:
            count = await self._read_into(handle, offset, buffer)
        except InstantStartError as error:
            self._telemetry.failed("read", error)
            raise
        self._telemetry.read(handle.file, handle.starts, count)
        return count

    async def _read_into(self, handle: Handle, offset: int, buffer: memoryview) -> int:
        file = handle.file
        length = min(len(buffer), file.size - offset)
        if length <= 0:
            return 0
        self._access.record_read(*file.triple, self._catalog.now_ns())
        since = trio.current_time()
        source: Served = "store"
        if not file.complete:
            with self._one_more_waits(file):
                found = await self._wait_readable(handle, ByteRange(offset, offset + length), since)
                if found is None:
                    return await self._read_through(handle, offset, buffer[:length], since)
                source = found
        if file.stale_error is not None:
            raise file.stale_error
        view = buffer[:length]
        try:
            done = self._open_files.read_cached(file, offset, view)
            if done < length:
                fd = self._open_files.reader(file)
                await trio.to_thread.run_sync(self._open_files.read_blocking, file, fd, offset + done, view[done:])
        except StoreDamaged as error:
            await self.replace_damaged(file, error, wanted=True, found_by="read")
            raise
        # Poisoned while the bytes were copied: nobody may see them.
        if file.stale_error is not None:
            raise file.stale_error
        self._telemetry.served(source, length)
        return length

    def release(self, handle: Handle) -> None:
        """See vfs.Vfs.release."""
        if handle.released:
            return
        handle.released = True
        self._telemetry.closed(handle.file, handle.starts)
        self._open_files.release(handle.file)

    @contextlib.contextmanager
    def _one_more_waits(self, file: CachedFile) -> Iterator[None]:
        """Count a waiting read inside the block. Raises ReadDeadline where the pipeline has too many."""
        pipeline = file.generation.pipeline.id
        count = self._waiting.get(pipeline, 0)
        if count >= MOST_WAITING:
            raise ReadDeadline(f"{file.entry.path}: {count} reads of this pipeline wait already")
        self._waiting[pipeline] = count + 1
        try:
            yield
        finally:
            self._waiting[pipeline] -= 1
            if not self._waiting[pipeline]:
                del self._waiting[pipeline]

    # -- asking the filler ---------------------------------------------------------------------------------------

    async def _wait_readable(self, handle: Handle, wanted: ByteRange, since: float) -> Served | None:
        """Wait until the store has these bytes. True: it had them before; None: it has no space for them.
        ``since``: when the read came (trio's clock). ``read_deadline`` counts from there, for all waits together."""
        file = handle.file
        if file.stale_error is not None:
            raise file.stale_error
        target: FillTarget | None = None
        # Space may have to be freed, and the bytes of others take a while to go.
        with trio.move_on_at(since + self._read_deadline) as asking:
            while target is None or file.target is not target:  # `warm` may have dropped it meanwhile
                target = await self.target(file)
                if target is None:
                    return "store"
                if self._starts_fill(file, target, wanted.start):
                    self._learner.begins_to_load(file)
                    refused = await self.start_fill(file.generation, first=file)
                    if refused is not None:
                        return "store" if target.readable(wanted) else None
                if target.readable(wanted):
                    return "store"
                if not await self._admitted(file, target, wanted):
                    return "store" if target.readable(wanted) else None
        if asking.cancelled_caught or target is None:
            raise ReadDeadline(f"{file.entry.path}: no space was freed for it within {self._read_deadline:g} s")
        try:
            self.filler.demand(target, wanted)
            try:
                with self._telemetry.waiting(file, handle.starts):
                    await target.wait_readable(wanted, self._read_deadline, since)
            finally:
                if target.failed:
                    file.generation.release_reservations(file)
        except StoreFull as error:
            self._admissions.disk_full(file.generation.pipeline, error)
            return None
        return "fetched"

    async def _admitted(self, file: CachedFile, target: FillTarget, wanted: ByteRange) -> bool:
        """Whether the chunks of ``wanted`` may come into the store."""
        if self.filler.in_background(target):
            return True
        chunks = target.present.chunks_of(wanted) if target.serve_unsealed else range(target.present.chunks)
        return await self._admissions.admit_chunks(file, target.present, chunks)

    async def _read_through(self, handle: Handle, offset: int, view: memoryview, since: float) -> int:
        """Read straight from the origin into ``view``; nothing is kept in the store."""
        file = handle.file
        origin = file.generation.opened_origin(file.entry.model)
        assert origin is not None, "target() opened it"
        file.served_uncached = True
        near = self.filler.in_memory(file.key, origin, offset, len(view))
        with contextlib.nullcontext() if near else self._telemetry.waiting(file, handle.starts):
            chunk_size = file.generation.manifest.chunk_size
            await self.filler.read_through(file.key, file.entry, origin, offset, view, since, chunk_size=chunk_size)
        self._telemetry.uncached(handle.starts, len(view))
        if file.stale_error is not None:
            raise file.stale_error
        self._telemetry.served("passed", len(view))
        return len(view)

    def _starts_fill(self, file: CachedFile, target: FillTarget, offset: int) -> bool:
        path, chunk_size = file.entry.file.path, target.present.chunk_size
        if file.generation.filling_load_set and file.generation.in_load_set(file.entry.index):
            return False
        if not counts_as_request(file):
            # A large file of another kind, read on and on: fetch ahead of its reader, but nothing else.
            return offset >= chunk_size and file.size > chunk_size
        if offset < min(READAHEAD_ALLOWANCE, file.size // 2):
            return False
        header = None
        if path.endswith(".safetensors") and target.present.chunks and 0 in target.present and file.size >= 8:
            prefix = bytearray(8)
            if self._open_files.read_cached(file, 0, memoryview(prefix)) == 8:
                header = safetensors_header_length(bytes(prefix))
        return offset >= fill_threshold(file.size, header, weights=True)

    async def start_fill(
        self, generation: Generation, first: CachedFile | None = None, *, everything: bool = False
    ) -> Uncached | None:
        """Fill the load set in the background (or ``everything``), from ``first`` on. Returns the refusal if there
        is no space for it: then nothing begins.

        A ``first`` outside the load set, or of a superseded generation, is filled beside what is being filled; so is
        one that is to be fetched again while the load set is being filled.
        """
        with generation.retained():
            refused = await self._start_fill(generation, first, everything=everything)
        if refused is not None:
            self.end_idle_fill(generation)
        return refused

    async def _start_fill(
        self, generation: Generation, first: CachedFile | None, *, everything: bool
    ) -> Uncached | None:
        if generation.eviction_done is not None:
            await generation.eviction_done.wait()  # its old bytes are still being deleted, and count
        under_way = generation.filling_load_set and self.filler.is_filling(generation.pipeline.id)
        if first is not None and (
            under_way or generation is not generation.pipeline.head or not generation.in_load_set(first.entry.index)
        ):
            target = await self.target(first)
            if target is not None and not self.filler.in_background(target):
                if not await self._admissions.admit_chunks(first, target.present, range(target.present.chunks)):
                    return generation.pipeline.uncached
                if first.target is not target:
                    return await self._start_fill(generation, first, everything=everything)
                self.filler.fill_also(target)
                if target.failed:
                    generation.release_reservations(first)
                generation.pipeline.changed()
            return None
        refused = await self._admissions.admit_fill(generation, everything=everything)
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
            pipeline = generation.pipeline
            if pipeline.removed or pipeline.hidden is not None or generation is not pipeline.head:
                generation.filling_load_set = False  # what is shown now has a fill of its own
                return
            targets = [target for target in targets if generation.files[target.key.index].target is target]
            order = self.filler.fill if start == 0 else self.filler.fill_more
            order(pipeline.id, targets)
            pipeline.changed()
            await trio.lowlevel.checkpoint()
        if generation.load_set_complete or generation.fill_is_over:
            generation.filling_load_set = False

    async def target(self, file: CachedFile) -> FillTarget | None:
        """The fill of this incarnation, made when it is first wanted; None when the file is complete. It may be dropped
        at each ``await`` that follows: what is given to the filler is ``file.target`` still.

        Raises what keeps it from being filled.
        """
        generation = file.generation
        if generation.eviction_done is not None:
            await generation.eviction_done.wait()
        if file.target is None:
            origin = generation.opened_origin(file.entry.model)
            if origin is None:
                origin = await trio.to_thread.run_sync(generation.origin, file.entry.model)
            if not file.complete:
                await prepare_filling(self._catalog, file)
        check_present(self._catalog, file)
        if file.target is None and not file.complete:
            assert origin is not None
            opener = functools.partial(
                self._catalog.store.fresh_blob,
                *(generation.pipeline.id, generation.number, file.entry.path, file.entry.file.size),
            )
            file.target = FillTarget(
                file.key,
                file.entry,
                file.incarnation,
                file.chunk_map(),
                origin,
                opener,
                has_reader=lambda: generation.handles > 0,
            )
            self.filler.judge(file.target)
        return file.target

    # -- fills that have ended -------------------------------------------------------------------------------------

    def end_idle_fill(self, generation: Generation) -> None:
        """Note that the load set is not being filled, where nothing is: else no read would begin it again."""
        if not self.filler.is_filling(generation.pipeline.id):
            generation.filling_load_set = False

    async def reset_failures(self, generation: Generation) -> None:
        """Let files that failed for good be fetched again at once: `warm` or `update` asks on purpose.

        Not one whose wrong bytes are not deleted yet: the next incarnation is fetched as soon as they are.
        """
        pipeline = generation.pipeline
        self.filler.reset_failures(pipeline.id)
        self._fill_events.reset_incidents(pipeline)
        failed = [file for file in generation.files if _failed(file.target)]
        if failed:
            await self.filler.wait_quiet(pipeline.id)
        for file in failed:
            if file.target is not None and _failed(file.target):
                file.bitmap = file.target.durable.to_bytes()
                drop_target(file)
                generation.invalidate_counts()  # what is not durable is not present any more
                pipeline.leftovers = True
        pipeline.failure = None


def _failed(target: FillTarget | None) -> bool:
    """Whether a new target may take the place of this one, which has failed. A poisoned one keeps its place until the
    committer has deleted its bytes: they would be served again, and what came after them would be deleted with them."""
    return target is not None and target.failed and target.state is not FileState.POISONED
