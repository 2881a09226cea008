"""The catalog: all pipelines in memory, the nodeids that name them, and the invalidations for the kernel.

It loads store and index at start, hands out nodeids, and publishes and withdraws pipelines and generations. Every
change of something that the kernel may have cached is sent as an Invalidation.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import NamedTuple

import trio

from instantstart_fs.catalog.bind_gate import BindGate
from instantstart_fs.catalog.failure import Failure
from instantstart_fs.catalog.gc_control import gc_paused
from instantstart_fs.catalog.inodes import NodeTable
from instantstart_fs.catalog.model import CachedFile, Generation, OpenOrigin, Pipeline, UnloadedGeneration
from instantstart_fs.catalog.nodeids import NodeidSupply
from instantstart_fs.catalog.reader import GenerationReader
from instantstart_fs.catalog.records import Records
from instantstart_fs.catalog.summaries import summary_of
from instantstart_fs.core.learned import Learned
from instantstart_fs.core.loadset import RULES
from instantstart_fs.core.manifest import Manifest
from instantstart_fs.errors import (
    InstantStartError,
    OutOfResources,
    PipelineNotFound,
)
from instantstart_fs.filler.target import FileKey, FileState
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import UpkeepRecord
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.vfs import ROOT, Invalidation

log = logging.getLogger(__name__)


class SharedFile(NamedTuple):
    """A complete file that a new generation takes over: the ``old`` one, its state when it was taken, and the bytes of
    disk that it takes."""

    old: CachedFile
    state: FileState
    allocated: int


_NOTHING_SHARED: Mapping[int, SharedFile] = MappingProxyType({})


def _ignore(file: CachedFile) -> None:
    pass


class Catalog:
    """Owned by the Library. ``now_ns``: the wall clock in nanoseconds. ``retire``: called for each incarnation of a
    file that no new open will find. ``bind_gate``: closed while a complete file changes.

    It has more than 8 collaborators, because it is the one place that keeps pipelines, nodeids and records in step."""

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        open_origin: OpenOrigin,
        now_ns: Callable[[], int] = time.time_ns,
        *,
        bind_gate: BindGate | None = None,
        retire: Callable[[CachedFile], None] = _ignore,
    ) -> None:
        self.store = store
        self.index = index
        self.open_origin = open_origin
        self.now_ns = now_ns
        self.pipelines: dict[str, Pipeline] = {}
        self.nodes = NodeTable()
        self.passthrough = False
        """Whether the mount lets the kernel read complete files itself. The mount sets it by vfs.Vfs.use_passthrough:
        it knows only after it has negotiated with the kernel (FUSE_INIT), which needs a loaded catalog to answer from.
        So it is no argument of the constructor."""
        self.retire = retire
        self.bind_gate = bind_gate or BindGate()
        self.without_summary: set[str] = set()
        """Pipelines that the index surely has no summary of; see ``invalidate_summary``."""
        self.dirty_at_start: list[Pipeline] = []
        """The pipelines that ``load`` found without a summary. They may hold what a crash left."""
        self.pending_deletions: list[tuple[str, int]] = []
        """(pipeline, bytes of disk) of everything that is out of view and not deleted yet."""
        self._loading: dict[UnloadedGeneration, trio.Event] = {}
        """The generations that a thread is reading now, with the event of the reading's end."""
        self.records = Records(store, index)
        self.nodeids = NodeidSupply(index)
        self.reader = GenerationReader(store, index, open_origin)
        self._send, self.invalidations = trio.open_memory_channel[Invalidation](math.inf)

    # -- loading -------------------------------------------------------------------------------------------------

    def load(self, held: Collection[int] = ()) -> None:
        """Fill the catalog from the index and the slots' manifests. Blocks; before the loop serves anybody.

        Superseded generations are loaded, as draining, where the kernel holds a nodeid of theirs open (``held``).

        A pipeline that has a summary is not read any further. One whose manifest cannot be read is shown in the state
        ``error``; the others are not touched by it.
        """
        slots = set(self.store.tree.list_directory())
        summaries = self.index.read(lambda txn: dict(txn.summaries()))
        upkeep = self.index.read(lambda txn: dict(txn.upkeep()))
        unloaded: list[UnloadedGeneration] = []
        for record in self.index.read(lambda txn: list(txn.pipelines())):
            pipeline = Pipeline(
                record.spec, dict(record.directory_nodeids), pinned=record.pinned, created_at_ns=record.created_at_ns
            )
            summary = summaries.get(pipeline.id)
            known = upkeep.get(pipeline.id, UpkeepRecord())
            pipeline.scrubbed, pipeline.access = known.scrubbed, known.access
            pipeline.startup_bytes = known.startup_bytes
            pipeline.learned, pipeline.learned_read = known.learned or Learned(), known.learned is not None
            clean = summary is not None and summary.rules == RULES and pipeline.id in slots
            if summary is not None and clean and summary.generation == record.generation:
                found = UnloadedGeneration(pipeline, summary, self._load_blocking)
                unloaded.append(found)
                pipeline.current = found
            else:
                self._load_whole(pipeline, record.generation, held)
                self.dirty_at_start.append(pipeline)
            self.pipelines[pipeline.id] = pipeline
            self.nodes.add_pipeline(pipeline)
        self.nodes.load_blocks(unloaded)
        for name, known in upkeep.items():
            if name in self.pipelines:
                self.records.recall(self.pipelines[name], known.failure)
        for pipeline in self.pipelines.values():
            pipeline.on_failure = self.records.save_upkeep_soon
        # Now: when a file proves wrong there may be no space, or no index, to reserve any.
        self.nodeids.fill()
        strangers = slots - self.pipelines.keys()
        unknown = sorted(name for name in strangers if self.store.metadata.has_pipeline(name))
        if unknown:
            log.warning(
                "%d pipeline(s) lie in the store and not in the index (%s): stop the daemon, `instantstart fsck` "
                "brings them back",
                len(unknown),
                ", ".join(unknown[:5]),
            )

    def _load_whole(self, pipeline: Pipeline, number: int, held: Collection[int]) -> None:
        try:
            pipeline.current = self._load_generation(pipeline, number)
            if held:
                self._load_draining(pipeline, held)
        except OutOfResources:
            raise  # nothing is wrong with it
        except InstantStartError as error:
            self._unreadable(pipeline, error)

    def _unreadable(self, pipeline: Pipeline, error: InstantStartError) -> None:
        log.error("cannot be served: %s", error.message, extra={"pipeline": pipeline.id})
        # The error stays, and its frames hold what was read so far.
        for seen in (error, error.__cause__):
            if seen is not None:
                traceback.clear_frames(seen.__traceback__)
        pipeline.failure = Failure(error, self.now_ns(), final=True)

    async def ensure_loaded(self, pipeline: Pipeline) -> Generation | None:
        """Return ``pipeline.current``, read in a thread if it is not in memory. All who ask meanwhile share one
        reading. Returns None if the pipeline was removed, or if it cannot be read (then its ``failure`` says why)."""
        while isinstance(unloaded := pipeline.head, UnloadedGeneration) and not pipeline.removed:
            under_way = self._loading.get(unloaded)
            if under_way is not None:
                await under_way.wait()
                continue
            done = self._loading[unloaded] = trio.Event()
            read: Generation | InstantStartError
            try:
                read = await trio.to_thread.run_sync(self.reader.read_patiently, unloaded)
            except InstantStartError as error:
                read = error
            finally:
                del self._loading[unloaded]
                done.set()
            # Meanwhile it may have been removed, or read by somebody who could not wait.
            if isinstance(read, OutOfResources):
                self._want(unloaded.pipeline, read)
                return None
            if pipeline.head is unloaded and not pipeline.removed:
                pipeline.current = self._put_in_place(unloaded, read)
            elif isinstance(read, Generation):
                read.end()
        return pipeline.current if not pipeline.removed else None

    def _load_blocking(self, unloaded: UnloadedGeneration) -> Generation | UnloadedGeneration | None:
        """``ensure_loaded`` for callers that cannot await. Blocks while one manifest is read and decoded."""
        read: Generation | InstantStartError
        try:
            read = self.reader.read_unloaded(unloaded)
        except OutOfResources as error:
            self._want(unloaded.pipeline, error)
            return unloaded
        except InstantStartError as error:
            read = error
        return self._put_in_place(unloaded, read)

    def _want(self, pipeline: Pipeline, error: OutOfResources) -> None:
        """Record that a generation cannot be read for want of resources. The next request tries again."""
        if pipeline.failure is None or not isinstance(pipeline.failure.error, OutOfResources):
            log.warning("cannot be read now: %s", error.message, extra={"pipeline": pipeline.id})
            pipeline.failure = Failure(error, self.now_ns(), final=False)

    def _put_in_place(self, unloaded: UnloadedGeneration, read: Generation | InstantStartError) -> Generation | None:
        """Replace ``unloaded`` by the generation that was read, or record the error that kept it from being read."""
        self.nodes.drop_unloaded(unloaded)
        if isinstance(read, InstantStartError):
            self._unreadable(unloaded.pipeline, read)
            return None
        self._place(read)
        failure = unloaded.pipeline.failure
        if failure is not None and isinstance(failure.error, OutOfResources):
            unloaded.pipeline.failure = None
        return read

    def unload(self, generation: Generation) -> None:
        """Keep the summary alone in memory. For generations that are clean and unused (catalog/residency.py)."""
        unloaded = UnloadedGeneration(generation.pipeline, summary_of(generation), self._load_blocking)
        self.nodes.unload(generation, unloaded)
        generation.pipeline.current = unloaded
        generation.end()

    async def invalidate_summary(self, pipeline: Pipeline) -> None:
        """Delete the pipeline's summary durably. Call it before the first byte in its slot changes. Raises
        StoreError."""
        if pipeline.id not in self.without_summary:
            with pipeline.changing():  # no summary is made while this one goes
                await self.index.write(lambda txn: txn.delete_summary(pipeline.id), patience=self.index.commit_deadline)
            self.without_summary.add(pipeline.id)

    def _load_draining(self, pipeline: Pipeline, held: Collection[int]) -> None:
        numbers = self.index.read(lambda txn: [record.number for record in txn.generations(pipeline.id)])
        for number in numbers:
            if pipeline.current is not None and number == pipeline.current.number:
                continue
            try:
                generation = self._load_generation(pipeline, number)
            except OutOfResources:
                raise  # what is open must not be taken for superseded, and deleted
            except InstantStartError as error:
                log.warning("generation %d: %s", number, error.message, extra={"pipeline": pipeline.id})
                continue
            block = range(generation.base, generation.base + generation.nodeid_count)
            incarnations = {nodeid for file in generation.files for nodeid in (file.nodeid, file.passthrough_nodeid)}
            if any(nodeid in block or nodeid in incarnations for nodeid in held):
                generation.shared_with_current = self._shared_with_current(generation)
                pipeline.draining.append(generation)
            else:
                self.forget_generation(generation)
                generation.end()

    def _shared_with_current(self, draining: Generation) -> frozenset[int]:
        """Return the indices of the files of ``draining`` that the current generation shares."""
        current = draining.pipeline.current
        if current is None:
            return frozenset()
        complete = {file.entry.path for file in current.files if file.complete}
        one, other = draining.number, current.number
        return frozenset(
            file.entry.index
            for file in draining.files
            if file.complete
            and file.entry.path in complete
            and self.store.shared(draining.pipeline.id, one, other, file.entry.path)
        )

    def _load_generation(self, pipeline: Pipeline, number: int) -> Generation:
        generation = self.reader.read(pipeline, number)
        self._place(generation)
        return generation

    def _place(self, generation: Generation) -> None:
        """Enter a generation into the inode table, so that its files are found by their nodeids."""
        for file in generation.files:
            if file.nodeid == 0:
                file.nodeid = self.nodeids.spare()  # never fall back to the old one
            if file.nodeid != generation.default_file_nodeid(file.entry.index):
                self.nodes.add_file(file)
        self.nodes.add_block(generation)

    @asynccontextmanager
    async def making(self, pipeline: Pipeline, manifest: Manifest) -> AsyncIterator[Generation]:
        """Make a generation (see ``new_generation``), and release it after the block unless it is shown by then."""
        made = await self.new_generation(pipeline, manifest)
        try:
            yield made
        finally:
            if pipeline.head is not made:
                made.end()

    async def new_generation(self, pipeline: Pipeline, manifest: Manifest) -> Generation:
        """Make a generation without cached bytes, with nodeids of its own. In a thread: 100,000 files take a second."""

        def make() -> Generation:
            with gc_paused(len(manifest.files)):
                return Generation(pipeline, manifest, 0, self.open_origin)

        def fill_in() -> None:
            with gc_paused(made.file_count):
                made.set_absent()
                made.count_all()

        made = await trio.to_thread.run_sync(make)
        made.base = await self.nodeids.reserve(made.nodeid_count)
        made.block = self.store.block_size
        await trio.to_thread.run_sync(fill_in)
        return made

    # -- finding -------------------------------------------------------------------------------------------------

    def pipeline(self, pipeline_id: str) -> Pipeline:
        """Return the pipeline of that id. Raises PipelineNotFound."""
        found = self.pipelines.get(pipeline_id)
        if found is None:
            raise PipelineNotFound(
                f"there is no pipeline {pipeline_id!r}; `instantstart ls` lists them, `instantstart add` makes one"
            )
        return found

    def file(self, key: FileKey) -> CachedFile | None:
        """Return the present incarnation of that file, also of a generation that is draining; None if there is none."""
        pipeline = self.pipelines.get(key.pipeline)
        for generation in pipeline.generations() if pipeline is not None else ():
            if generation.number == key.generation:
                return generation.files[key.index]
        return None

    # -- publishing ----------------------------------------------------------------------------------------------

    def publish(self, pipeline: Pipeline) -> None:
        """Show a new pipeline in the mount."""
        self.pipelines[pipeline.id] = pipeline
        pipeline.on_failure = self.records.save_upkeep_soon
        self.nodes.add_pipeline(pipeline)
        self.invalidate(1, pipeline.id)

    def withdraw(self, pipeline: Pipeline) -> None:
        """Take a pipeline out of view; handles that are open stay valid."""
        pipeline.removed = True
        self.pipelines.pop(pipeline.id, None)
        self.nodes.drop_pipeline(pipeline)
        for generation in pipeline.heads():
            if isinstance(generation, UnloadedGeneration):
                self.nodes.drop_unloaded(generation)
            else:
                self.forget_generation(generation)
                self._retire_files(generation)
        self.invalidate(1, pipeline.id)
        pipeline.changed()

    def end(self, pipeline: Pipeline) -> None:
        """Release a withdrawn pipeline's memory: no operation on it follows."""
        for generation in pipeline.heads():
            if isinstance(generation, Generation):
                generation.end()
        pipeline.current = None
        pipeline.draining = []

    async def set_hidden(self, pipeline: Pipeline, reason: str | None) -> None:
        """Hide a pipeline, or show it again (None). Nodeids and open files stay valid. Raises MountFailed if a bind
        mount cannot be removed: call it again then."""
        if pipeline.removed or (pipeline.hidden is None and reason is None):
            return
        turned = (pipeline.hidden is None) != (reason is None)
        pipeline.hidden = reason
        pipeline.changed()
        if turned:
            self.invalidate(ROOT, pipeline.id)
            if (shown := await self.ensure_loaded(pipeline)) is not None:
                self._renew_names(shown)
        # A hidden pipeline may have no bind mounts: entering removes them. At its end they are made where they may be.
        async with self.bind_gate.withdrawn(pipeline.id):
            pass

    def _renew_names(self, generation: Generation) -> None:
        """Invalidate all names of the generation that the kernel may have cached."""
        tree = generation.tree
        for nodeid in sorted(generation.pipeline.directory_nodeids.values()):
            node = generation.node_of_root(nodeid)
            for name in sorted((tree.nodes[node].children or ()) if node is not None else ()):
                self.invalidate(nodeid, name)
            self._invalidate_listing(nodeid)

    def switch_generation(self, new: Generation, kept: Mapping[int, SharedFile] = _NOTHING_SHARED) -> Generation | None:
        """Show another generation (or the same one emptied, under new nodeids) from now on; the superseded one.
        ``kept``: by index, the files of the new one that are complete already.

        The superseded generation keeps its nodeids while somebody holds it open: drop it with ``forget_generation``.
        """
        pipeline = new.pipeline
        if new.sorted_with != pipeline.learned.wanted:
            new.sort_again()  # it has learned something since that one was made
        old = pipeline.current
        for index, found in kept.items():
            new.files[index].state = found.state
            new.set_allocated(new.files[index], found.allocated)
        if kept:
            new.invalidate_counts()
        if old is not None:
            old.shared_with_current = frozenset(found.old.entry.index for found in kept.values())
        self.nodes.add_block(new)
        pipeline.current = new
        names: set[tuple[int, str]] = set()
        for generation in (old, new):
            if generation is None:
                continue
            for nodeid in pipeline.directory_nodeids.values():
                node = generation.node_of_root(nodeid)
                if node is not None:
                    names.update((nodeid, name) for name in generation.tree.nodes[node].children or ())
        for parent, name in sorted(names):
            self.invalidate(parent, name)
        for nodeid in sorted(pipeline.directory_nodeids.values()):
            self._invalidate_listing(nodeid)
        if old is not None:
            self._retire_files(old)
        pipeline.changed()
        return old

    @contextmanager
    def deleting(self, *generations: Generation | UnloadedGeneration) -> Iterator[None]:
        """Count the generations' bytes as used inside the block, although they are not shown any more."""
        count = sum(generation.own_allocated + generation.reserved_bytes for generation in generations)
        entry = (generations[0].pipeline.id, count) if generations else ("", 0)
        self.pending_deletions.append(entry)
        try:
            yield
        finally:
            self.pending_deletions.remove(entry)

    def _retire_files(self, generation: Generation) -> None:
        for file in generation.files:
            self.retire(file)

    def forget_generation(self, generation: Generation) -> None:
        self.nodes.drop_generation(generation)

    def replace_file(self, old: CachedFile, reason: InstantStartError) -> CachedFile:
        """Put a new, absent incarnation in the place of ``old``, under a nodeid of its own, and return it. Open handles
        keep the old one."""
        generation = old.generation
        old.stale_error = reason
        self.nodes.drop_file(old.nodeid)
        new = CachedFile(generation, old.entry, FileState.ABSENT, old.incarnation + 1, self.nodeids.spare(), b"")
        generation.files[old.entry.index] = new
        generation.invalidate_counts()
        self.nodes.add_file(new)
        self.invalidate_file(new)
        self._invalidate_listing(self._parent(new))  # it tells inode numbers, too
        self.retire(old)
        generation.pipeline.changed()
        return new

    def invalidate_file(self, file: CachedFile) -> None:
        """Tell the kernel that the file's name leads to another nodeid now."""
        tree = file.generation.tree
        self.invalidate(self._parent(file), tree.nodes[tree.node_of_file(file.entry.index)].name)

    def _parent(self, file: CachedFile) -> int:
        tree = file.generation.tree
        return file.generation.nodeid(tree.nodes[tree.node_of_file(file.entry.index)].parent)

    def expire_names(self) -> None:
        """Expire the names that an update or a seal changes: an earlier daemon may have died before it told the
        kernel."""
        for pipeline in self.pipelines.values():
            self._send.send_nowait(Invalidation(ROOT, pipeline.id, expire=True))
            generation = pipeline.head
            # A clean pipeline has not changed for so long that the kernel was told (catalog/residency.py).
            if not isinstance(generation, Generation):
                continue
            tree = generation.tree
            for nodeid in pipeline.directory_nodeids.values():
                node = generation.node_of_root(nodeid)
                for name in (tree.nodes[node].children or ()) if node is not None else ():
                    self._send.send_nowait(Invalidation(nodeid, name, expire=True))
                self._invalidate_listing(nodeid)

    def invalidate(self, parent: int, name: str) -> None:
        self._send.send_nowait(Invalidation(parent, name))

    def _invalidate_listing(self, directory: int) -> None:
        self._send.send_nowait(Invalidation(directory, None, directory, listing=True))
