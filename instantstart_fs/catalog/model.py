"""The live state of pipelines, generations and files. Values and bookkeeping; no IO of its own, no waiting.

The Library owns these objects; they live on the trio thread. A ``CachedFile`` is one incarnation of one file:
poisoning, eviction and update never change one but put another, with another nodeid, in its place, so a handle that
holds the old one can never see the new bytes, nor the other way round.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from instantstart_fs.catalog.unloaded import Counts, UnloadedGeneration
from instantstart_fs.core.access import Access
from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.learned import Learned
from instantstart_fs.core.loadset import Hints, LoadSet, in_seen_order, sort_files, with_wanted
from instantstart_fs.core.manifest import FileEntry, Manifest, ModelSpec, PipelineSpec
from instantstart_fs.core.scrub import ScrubProgress
from instantstart_fs.core.staging import Shard
from instantstart_fs.core.tree import NODEIDS_PER_NODE, Tree
from instantstart_fs.errors import AccessRefused
from instantstart_fs.filler.target import COMPLETE, FileKey, FileState, FillTarget
from instantstart_fs.store.blobstore import Proof
from instantstart_fs.vfs import NotLoaded

if TYPE_CHECKING:
    from instantstart_fs.errors import InstantStartError
    from instantstart_fs.index.transactions import WriteTxn
    from instantstart_fs.origins.base import Origin
    from instantstart_fs.store.blobfile import BlobFile

OpenOrigin = Callable[["PipelineSpec", "ModelSpec"], "Origin"]
"""Opens a model's source with its pipeline's credentials. May block."""


class CachedFile:
    """One incarnation of one file.

    ``bitmap``: durable presence while neither sealed nor filling (then the target knows). ``handles``: how many opens
    hold it; ``reader`` is their shared descriptor; ``served_bytes`` were given to readers by the daemon. ``gone``: why
    another incarnation has taken its place. ``extra``: bytes of disk beyond the blocks of its cached bytes, as far as
    they were measured (its attributes' block, extents). ``passed``: bytes of it were served straight from the origin,
    and may lie in a page cache unproven.
    """

    __slots__ = (
        "bitmap",
        "entry",
        "extra",
        "generation",
        "handles",
        "incarnation",
        "nodeid",
        "reader",
        "served_bytes",
        "served_uncached",
        "stale_error",
        "state",
        "target",
    )

    def __init__(
        self, generation: Generation, entry: FileEntry, state: FileState, incarnation: int, nodeid: int, bitmap: bytes
    ) -> None:
        self.generation = generation
        self.entry = entry
        self.state = state
        self.incarnation = incarnation
        self.nodeid = nodeid
        self.bitmap = bitmap
        self.target: FillTarget | None = None
        self.reader: BlobFile | None = None
        self.handles = 0
        self.served_bytes = 0
        self.stale_error: InstantStartError | None = None
        self.extra = 0
        self.served_uncached = False

    @property
    def triple(self) -> tuple[str, int, int]:
        return self.generation.pipeline.id, self.generation.number, self.entry.index

    @property
    def key(self) -> FileKey:
        return FileKey(*self.triple)

    @property
    def size(self) -> int:
        return self.entry.file.size

    @property
    def proof(self) -> Proof:
        """What its seal must say once it is complete."""
        digest = self.entry.file.digest
        return Proof(self.size, None if digest is None else str(digest))

    @property
    def complete(self) -> bool:
        return self.state in COMPLETE

    @property
    def passthrough_nodeid(self) -> int:
        """The odd one beside ``nodeid``: opens of it are passed through to the store's file, and only of it."""
        return self.nodeid + 1

    @property
    def passthrough_eligible(self) -> bool:
        """Whether the kernel may read the store's file itself from now on: all of it is there, for good."""
        return self.complete and self.stale_error is None and self.size > 0

    def chunk_map(self) -> ChunkMap:
        """A fresh map of what was durable when this incarnation was loaded."""
        return ChunkMap(self.size, self.generation.manifest.chunk_size, self.bitmap or None)

    @property
    def cached_bytes(self) -> int:
        if self.complete:
            return self.size
        if self.target is not None:
            return self.target.present.present_bytes
        return self.chunk_map().present_bytes if self.bitmap else 0


OVERHEAD_BLOCKS = 3
"""What a file takes on the disk beyond its bytes, at most: the rest of its last block, its seal record, the map of its
extents."""


class Lessee(NamedTuple):
    """Who holds a lease, as the kernel says of the other end of a connection; ``pid``: 0 where it is not in sight."""

    pid: int
    uid: int


class Uncached(NamedTuple):
    """A pipeline's reads are served straight from its origin. ``retry_at``: trio.current_time() from which on it is
    asked for room again."""

    text: str
    retry_at: float


class Generation:
    """One resolved generation of a pipeline and the state of its files, by manifest index.

    Directory nodes have the nodeid ``base + 2·node``, but the pipeline's and the models' roots keep theirs for the
    pipeline's life (containers hold them bound).
    """

    def __init__(self, pipeline: Pipeline, manifest: Manifest, base: int, open_origin: OpenOrigin) -> None:
        self.pipeline = pipeline
        self.manifest = manifest
        self.number = manifest.generation
        self.base = base
        self._open_origin = open_origin
        self._origins: dict[int, Origin] = {}
        self.tree = Tree(manifest.files, [model.name for model in manifest.models])
        self.sorted_with = pipeline.learned.wanted
        self.known = sort_files(manifest.files, self._hints())
        """Which files are its load set, which are weights, what is left out; ``sorted_with``: and what was learned."""
        self._in_load_set: Collection[int] = frozenset(self.known.order)
        self.load_bytes = sum(manifest.files[index].file.size for index in self.load_set)
        self.total_bytes = manifest.total_bytes
        self.files: list[CachedFile] = []
        self.handles = 0
        self.retainers = 0
        """How many count on finding this very object again in its pipeline; see ``kept``."""
        self._ended = False
        self.filling_load_set = False
        self.filling_everything = False
        self.reservations: dict[tuple[int, int], int] = {}
        """(file, chunk) → bytes: what single reads were admitted for and what has not come yet."""
        self.block = 4096
        """Of the store's filesystem, bytes."""
        self._counts: Counts | None = None
        self._incomplete: dict[int, int] = {}
        """Directory node → how many of its files are not complete; of those that somebody listed."""
        self.shared_with_current: frozenset[int] = frozenset()
        """Of a superseded generation: files that the one after it shares; there they are counted."""
        self.eviction_done: trio.Event | None = None
        """Set while the store's files are being taken away (eviction): fills wait for it."""
        self.suspect = False
        """Whether the store has lost something of it, and perhaps what its slot says of itself."""
        self.checked_at = -math.inf
        """When that was looked at last; trio.current_time()."""
        self.owed_index_write: Callable[[WriteTxn], None] | None = None
        """What an eviction could not write: until then the index may speak of bytes that are gone."""
        self._root_nodeids = {
            self.tree.child(0, name) if name else 0: nodeid for name, nodeid in pipeline.directory_nodeids.items()
        }
        self._root_nodes = {nodeid: node for node, nodeid in self._root_nodeids.items() if node is not None}

    def _hints(self) -> Hints:
        include = {model.name: model.include for model in self.pipeline.spec.models}
        return Hints(
            include={at: include.get(model.name, ()) for at, model in enumerate(self.manifest.models)},
            wanted=frozenset(self.pipeline.learned.wanted),
            order=self.pipeline.learned.order,
        )

    @property
    def load_set(self) -> tuple[int, ...]:
        """File indices, in load order."""
        return self.known.order

    @property
    def undecided(self) -> int:
        """How many variants there are of which somebody has to choose one; 0: nothing is to be chosen."""
        if not self.known.open:
            return 0
        # An earlier version fetched all variants: whichever the engine loads is here.
        missing = [
            choice
            for choice in self.known.open
            if not all(self._here(index) for variant in choice.variants for index in variant.files)
        ]
        return sum(len(choice.variants) for choice in missing)

    def _here(self, index: int) -> bool:
        return index < len(self.files) and self.files[index].complete

    def want(self, indices: Collection[int]) -> None:
        """These belong to the load set from now on, with the other parts of what they are part of. What the pipeline
        has learned says so as well, as soon as nothing awaits."""
        self._know(with_wanted(self.known, indices))

    def sort_again(self) -> None:
        """What the pipeline has learned has changed in another way. Walks over all files."""
        self._know(sort_files(self.manifest.files, self._hints()))
        self.sorted_with = self.pipeline.learned.wanted

    def follow(self, order: Sequence[str]) -> None:
        """An engine was seen to open the weight files in this order: they are fetched and staged in it from now on."""
        self._know(in_seen_order(self.known, self.manifest.files, order))

    def _know(self, known: LoadSet) -> None:
        self.known = known
        self._in_load_set = frozenset(known.order)
        self.load_bytes = sum(self.manifest.files[index].file.size for index in known.order)
        self.invalidate_counts()
        self.pipeline.changed()

    @property
    def file_count(self) -> int:
        return len(self.manifest.files)

    @property
    def revision(self) -> str:
        """As `status` shows it: of all models."""
        return " ".join(model.revision for model in self.manifest.models)

    @property
    def resolved_at_ns(self) -> int:
        return self.manifest.resolved_at_ns

    def subdirectories(self, nodeid: int) -> int | None:
        """How many directories lie in that of one of the constant nodeids; None: it has none here."""
        node = self.node_of_root(nodeid)
        return None if node is None else self.tree.subdirectories(node)

    @contextmanager
    def retained(self) -> Iterator[None]:
        """Meanwhile it stays in memory: for who holds it over an await without having a file of it open."""
        self.retainers += 1
        try:
            yield
        finally:
            self.retainers -= 1
            if self._ended:
                self.end()

    def end(self) -> None:
        """Nobody finds it any more. Once nobody keeps it or has a file of it open (call it again then), it and its
        files let go of each other: the collector would never find them (catalog/gc_control.py)."""
        self._ended = True
        if not self.retainers and not self.handles:
            self.files = []
            self.shared_with_current = frozenset()

    def origin(self, model: int) -> Origin:
        """The origin of the model at that position, opened on first use. Blocks: call it in a thread.

        Opened late so that a warm pipeline starts with no credentials at hand. Raises OriginError, UsageError.
        """
        found = self._origins.get(model)
        if found is None:
            spec = self.pipeline.spec
            name = self.manifest.models[model].name
            wanted = next(candidate for candidate in spec.models if candidate.name == name)
            found = self._origins.setdefault(model, self._open_origin(spec, wanted))
        return found

    def opened_origin(self, model: int) -> Origin | None:
        """The same if it was opened before, else None; never blocks."""
        return self._origins.get(model)

    @property
    def nodeid_count(self) -> int:
        return NODEIDS_PER_NODE * len(self.tree)

    def in_load_set(self, index: int) -> bool:
        return index in self._in_load_set

    def default_file_nodeid(self, index: int) -> int:
        return self.base + NODEIDS_PER_NODE * self.tree.node_of_file(index)

    def nodeid(self, node: int) -> int:
        """The nodeid of a tree node: of its current incarnation, for a file."""
        file = self.tree.nodes[node].file
        if file >= 0:
            return self.files[file].nodeid
        return self._root_nodeids.get(node, self.base + NODEIDS_PER_NODE * node)

    def node_of_root(self, nodeid: int) -> int | None:
        """The tree node of one of the constant directory nodeids."""
        return self._root_nodes.get(nodeid)

    def shards(self) -> tuple[Shard, ...]:
        """The weight files of the load set, in the natural order of their names."""
        files = (self.files[index] for index in self.load_set)
        return tuple(
            Shard(file.entry.index, file.entry.path, file.size, file.passthrough_eligible)
            for file in files
            if counts_as_request(file)
        )

    def set_absent(self) -> None:
        """All files absent, incarnation 0, with the default nodeids of this generation's block."""
        self.files = [
            CachedFile(self, entry, FileState.ABSENT, 0, self.default_file_nodeid(entry.index), b"")
            for entry in self.manifest.files
        ]
        self._counts = Counts(0, 0, 0, 0, 0, 0)

    def invalidate_counts(self) -> None:
        """Recompute the counts when they are next needed. For changes that neither ``add_cached_bytes`` nor
        ``completed`` covers."""
        self._counts = None
        self._incomplete.clear()

    def add_cached_bytes(self, file: CachedFile, count: int) -> None:
        """``count`` more bytes of ``file`` are here. Constant time: it is called for each chunk."""
        if self._counts is not None:
            cached, complete, unverified, everything, allocated, finished = self._counts
            inside = self.in_load_set(file.entry.index)
            self._counts = Counts(
                cached + (count if inside else 0),
                complete,
                unverified,
                everything + count,
                allocated + self._rounded(count),
                finished,
            )

    def completed(self, file: CachedFile, allocated: int) -> None:
        """``file``, all of whose bytes were counted, became sealed or unverified, and takes ``allocated`` bytes of disk
        (0: not measured). Constant time."""
        parent = self.tree.nodes[self.tree.node_of_file(file.entry.index)].parent
        if parent in self._incomplete:
            self._incomplete[parent] -= 1
        before = file.extra
        self.set_allocated(file, allocated)
        if self._counts is not None:
            cached, complete, unverified, everything, taken, finished = self._counts
            inside = self.in_load_set(file.entry.index)
            self._counts = Counts(
                cached,
                complete + inside,
                unverified + (inside and file.state is FileState.UNVERIFIED),
                everything,
                taken + file.extra - before,
                finished + 1,
            )

    def set_allocated(self, file: CachedFile, allocated: int) -> None:
        """``file`` takes ``allocated`` bytes of disk (0: not known). If it is counted already, call
        ``invalidate_counts``."""
        file.extra = allocated - self._rounded(file.cached_bytes) if allocated else 0

    def _rounded(self, count: int) -> int:
        return -(-count // self.block) * self.block

    @property
    def own_allocated(self) -> int:
        """Bytes of disk that its files take and no later generation's."""
        shared_with_current = (self.files[index] for index in self.shared_with_current)
        return self.counts.allocated - sum(
            self._rounded(file.size) + file.extra for file in shared_with_current if file.complete
        )

    def missing_bytes(self, *, everything: bool) -> int:
        """Of the load set, or of all files: bytes that are not here."""
        counts = self.counts
        return self.total_bytes - counts.everything if everything else self.load_bytes - counts.cached

    def needed_bytes(self, *, everything: bool) -> int:
        """Bytes of disk that the fill of what is missing takes, at most."""
        missing = self.missing_bytes(everything=everything)
        return missing + self._overhead(everything=everything) if missing else 0

    def _overhead(self, *, everything: bool) -> int:
        unfinished = len(self.files) - self.counts.finished if everything else len(self.load_set) - self.counts.complete
        return unfinished * OVERHEAD_BLOCKS * self.block

    @property
    def reserved_bytes(self) -> int:
        """Bytes of disk that were admitted and are still to come: by the fill under way, and for single reads."""
        promised = 0
        if self.filling_load_set:
            everything = self.filling_everything
            promised = self.missing_bytes(everything=everything) + self._overhead(everything=everything)
        return promised + self.reserved_outside_fill(filling=self.filling_load_set, everything=self.filling_everything)

    def reserved_outside_fill(self, *, filling: bool, everything: bool) -> int:
        """Bytes admitted for single reads that are no part of such a fill."""
        if not self.reservations or (filling and everything):
            return 0
        return sum(
            length for (index, _), length in self.reservations.items() if not (filling and index in self._in_load_set)
        )

    def reserve(self, file: CachedFile, present: ChunkMap, chunks: Sequence[int]) -> None:
        """Those of these chunks that are not here were admitted: they count as promised until they come."""
        self.reservations.update(self.unreserved(file, present, chunks))

    def unreserved(self, file: CachedFile, present: ChunkMap, chunks: Sequence[int]) -> dict[tuple[int, int], int]:
        """Those that are neither here nor promised to a single read, with their bytes of disk."""
        index = file.entry.index
        return {
            (index, chunk): self._rounded(present.byte_range(chunk).length)
            for chunk in chunks
            if chunk not in present and (index, chunk) not in self.reservations
        }

    def release_reservations(self, file: CachedFile) -> None:
        """Nothing more of this file will come for the reads that were admitted."""
        index = file.entry.index
        for key in [key for key in self.reservations if key[0] == index]:
            del self.reservations[key]

    @property
    def counts(self) -> Counts:
        """Kept up to date, so that neither 10,000 pipelines to list nor 10,000 files to seal cost a walk each."""
        if self._counts is None:
            cached = complete = unverified = everything = allocated = finished = 0
            for file in self.files:
                here = file.cached_bytes
                everything += here
                finished += file.complete
                allocated += self._rounded(here) + file.extra if here or file.extra else 0
                if file.entry.index in self._in_load_set:
                    cached += here
                    complete += file.complete
                    unverified += file.state is FileState.UNVERIFIED
            self._counts = Counts(cached, complete, unverified, everything, allocated, finished)
        return self._counts

    def count_all(self) -> None:
        """What takes a walk over all files, now: in a thread, so that the loop need not."""
        _ = self.counts
        for node, entry in enumerate(self.tree.nodes):
            if entry.children is not None:
                self.mostly_complete(node)

    def mostly_complete(self, node: int) -> bool:
        """Of a directory: whether at least three in four entries are complete files or directories."""
        children = self.tree.nodes[node].children or {}
        incomplete = self._incomplete.get(node)
        if incomplete is None:
            nodes = self.tree.nodes
            incomplete = self._incomplete[node] = sum(
                nodes[child].file >= 0 and not self.files[nodes[child].file].complete for child in children.values()
            )
        return incomplete * 4 <= len(children)

    @property
    def load_set_complete(self) -> bool:
        """Whether an engine can start: all that it loads is here (and somebody has said what that is), or all there
        is."""
        complete = self.counts.complete == len(self.load_set) and not self.undecided
        return complete or self.counts.finished == len(self.manifest.files)

    @property
    def fill_is_over(self) -> bool:
        """Whether what was to be filled is here, which is not all that an engine loads while a variant is to be
        chosen."""
        if self.filling_everything:
            return self.counts.finished == len(self.manifest.files)
        return self.counts.complete == len(self.load_set)


class Failure:
    """What went wrong last with a pipeline. ``final``: filling has stopped because of it. ``file``: with which one.
    ``recalled``: of an earlier daemon, with the file of that index (-1: with none)."""

    __slots__ = ("error", "file", "final", "index", "recalled", "since_ns")

    def __init__(
        self,
        error: InstantStartError,
        since_ns: int,
        *,
        final: bool,
        file: CachedFile | None = None,
        index: int = -1,
        recalled: bool = False,
    ) -> None:
        self.error = error
        self.since_ns = since_ns
        self.final = final
        self.file = file
        self.index = index if file is None else file.entry.index
        self.recalled = recalled

    def lifted_by(self, file: CachedFile) -> bool:
        """Whether bytes of that file, which have come, show that it goes on after all."""
        if self.recalled:
            return self.index in (-1, file.entry.index)
        return self.final and self.file is file


class Pipeline:
    """A pipeline as the daemon knows it. ``directory_nodeids``: "" and each model's name → constant nodeid."""

    def __init__(
        self, spec: PipelineSpec, directory_nodeids: dict[str, int], *, pinned: bool, created_at_ns: int
    ) -> None:
        self.spec = spec
        self.directory_nodeids = directory_nodeids
        self.pinned = pinned
        self.created_at_ns = created_at_ns
        self.grown_at_ns = created_at_ns
        """When the last byte came, as far as this daemon saw it."""
        self._head: Generation | UnloadedGeneration | None = None
        self.used_at = time.monotonic()
        """When somebody last looked into it, seconds."""
        self.changes = 0
        """How many are changing its files without its lock; see ``changing``."""
        self.leftovers = False
        """Whether bytes may lie in the store that no record speaks of: the next start gives them back."""
        self.draining: list[Generation] = []
        """Superseded generations that somebody still holds open."""
        self.leases = 0
        self.lessees: list[Lessee] = []
        """Those of the leases whose holder is known."""
        self._failure: Failure | None = None
        self.on_failure: Callable[[Pipeline], None] = lambda pipeline: None
        """Told when ``failure`` was set or lifted."""
        self.uncached: Uncached | None = None
        self.scrubbed = ScrubProgress()
        """How far the scrub has come with it (upkeep/scrub.py)."""
        self.learned = Learned()
        """What engines were seen to load (catalog/learning.py)."""
        self.learned_read = True
        """Whether that is what the store has of it; else it is read with the manifest."""
        self.startup_bytes = 0
        """Bytes of disk that its startup caches take (library/startupcaches.py)."""
        self.access = Access()
        """What its origins said last to its credentials (upkeep/access_recheck.py)."""
        self.hidden: str | None = None
        """Why it is out of view: nobody finds it in the mount, and nothing of it is opened."""
        self.lock = trio.Lock()
        """Held by add, update, evict and remove: one of them at a time."""
        self.removed = False
        self._changed = trio.Event()

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def failure(self) -> Failure | None:
        return self._failure

    @failure.setter
    def failure(self, failure: Failure | None) -> None:
        if failure is not self._failure:
            self._failure = failure
            self.on_failure(self)

    @property
    def current(self) -> Generation | None:
        """The generation that is shown, read from the store if it is not in memory. None: it cannot be.

        Reads it blocks, a second and more for a hundred thousand files: where others are served meanwhile,
        ``Catalog.ensure_loaded`` comes first."""
        self.used_at = time.monotonic()
        found = self._head
        if isinstance(found, UnloadedGeneration):
            read = found.load()
            self._head = read
            return None if isinstance(read, UnloadedGeneration) else read
        return found

    @current.setter
    def current(self, generation: Generation | UnloadedGeneration | None) -> None:
        self._head = generation

    @property
    def head(self) -> Generation | UnloadedGeneration | None:
        """The same as far as it is known without reading anything: what walks over all pipelines asks this one."""
        return self._head

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Meanwhile the index and memory may say different things of its files, or both may be wrong."""
        self.changes += 1
        try:
            yield
        finally:
            self.changes -= 1

    @property
    def root_nodeid(self) -> int:
        return self.directory_nodeids[""]

    @property
    def link_nodeid(self) -> int:
        """The nodeid of the symlink to it in .warm, .filling or .cold: the unused odd one beside its directory's."""
        return self.root_nodeid + 1

    def check_visible(self) -> None:
        """Raises AccessRefused while it is out of view."""
        if self.hidden is not None:
            raise AccessRefused(self.hidden)

    @property
    def in_use(self) -> bool:
        return self.leases > 0 or any(generation.handles for generation in self.heads())

    @property
    def allocated(self) -> int:
        """Bytes of disk that its files and its startup caches take."""
        return self.startup_bytes + sum(generation.own_allocated for generation in self.heads())

    def current_nowait(self) -> Generation | None:
        """``current`` without reading anything. Raises NotInMemory where that would be needed."""
        self.used_at = time.monotonic()
        if isinstance(self._head, UnloadedGeneration):
            raise NotLoaded(self.id)
        return self._head

    def heads(self) -> Iterator[Generation | UnloadedGeneration]:
        """``generations`` without reading anything."""
        if self._head is not None:
            yield self._head
        yield from self.draining

    def generations(self) -> Iterator[Generation]:
        current = self.current
        if current is not None:
            yield current
        yield from self.draining

    def changed(self) -> None:
        """Wake everyone in ``wait_changed``."""
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def wait_changed(self, timeout: float) -> None:
        """Return at the next change of state or progress, at the latest after ``timeout`` seconds."""
        with trio.move_on_after(timeout):
            await self._changed.wait()


class NodeTable:
    """nodeid → what it names. Blocks of consecutive nodeids belong to generations; re-incarnated files and constant
    directories are kept one by one."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._blocks: list[tuple[int, int, Generation | UnloadedGeneration]] = []
        self._single: dict[int, CachedFile | Pipeline | UnloadedGeneration] = {}

    def __len__(self) -> int:
        """Entries: a block counts once."""
        return len(self._blocks) + len(self._single)

    def add_block(self, generation: Generation | UnloadedGeneration) -> None:
        position = bisect.bisect(self._bases, generation.base)
        self._bases.insert(position, generation.base)
        self._blocks.insert(position, (generation.base, generation.nodeid_count, generation))

    def load_blocks(self, unloaded: Iterable[UnloadedGeneration]) -> None:
        """``add_folded`` for many at once."""
        for generation in unloaded:
            self._blocks.append((generation.base, generation.nodeid_count, generation))
            for nodeid in generation.summary.nodeids:
                self._single[nodeid] = generation
        self._blocks.sort(key=lambda block: block[0])
        self._bases = [block[0] for block in self._blocks]

    def unload(self, generation: Generation, unloaded: UnloadedGeneration) -> None:
        """``unloaded`` stands for ``generation`` from now on."""
        self.drop_generation(generation)
        self.add_block(unloaded)
        for nodeid in unloaded.summary.nodeids:
            self._single[nodeid] = unloaded

    def drop_unloaded(self, unloaded: UnloadedGeneration) -> None:
        self._drop_block(unloaded)
        for nodeid in unloaded.summary.nodeids:
            self._single.pop(nodeid, None)

    def drop_generation(self, generation: Generation) -> None:
        """Forget its block and the nodeids of its re-incarnated files."""
        self._drop_block(generation)
        for file in generation.files:
            self._single.pop(file.nodeid, None)

    def _drop_block(self, generation: Generation | UnloadedGeneration) -> None:
        position = bisect.bisect_left(self._bases, generation.base)
        if position < len(self._bases) and self._blocks[position][2] is generation:
            del self._bases[position], self._blocks[position]

    def add_pipeline(self, pipeline: Pipeline) -> None:
        for nodeid in pipeline.directory_nodeids.values():
            self._single[nodeid] = pipeline
        self._single[pipeline.link_nodeid] = pipeline

    def drop_pipeline(self, pipeline: Pipeline) -> None:
        for nodeid in pipeline.directory_nodeids.values():
            self._single.pop(nodeid, None)
        self._single.pop(pipeline.link_nodeid, None)

    def add_file(self, file: CachedFile) -> None:
        self._single[file.nodeid] = file

    def drop_file(self, nodeid: int) -> None:
        self._single.pop(nodeid, None)

    def find(self, nodeid: int) -> CachedFile | Pipeline | tuple[Generation, int] | None:
        """A file (by either of its nodeids), a pipeline (constant directory or symlink), a (generation, directory
        node), or None (stale). Raises NotInMemory where a generation has to be read first."""
        single = self._single.get(nodeid)
        if isinstance(single, UnloadedGeneration):
            raise NotLoaded(single.pipeline.id)
        if single is not None:
            return single
        single = self._single.get(nodeid - 1)
        if isinstance(single, CachedFile):
            return single
        if isinstance(single, UnloadedGeneration):
            raise NotLoaded(single.pipeline.id)
        position = bisect.bisect(self._bases, nodeid) - 1
        if position < 0:
            return None
        base, count, generation = self._blocks[position]
        if nodeid - base >= count:
            return None
        if isinstance(generation, UnloadedGeneration):
            raise NotLoaded(generation.pipeline.id)
        generation.pipeline.used_at = time.monotonic()
        node, mode = divmod(nodeid - base, NODEIDS_PER_NODE)
        file = generation.tree.nodes[node].file
        if file < 0:
            return (generation, node) if mode == 0 else None
        found = generation.files[file]
        return found if found.nodeid == nodeid - mode else None


def counts_as_request(file: CachedFile) -> bool:
    """Whether opening this file is a request for its pipeline: whether it holds weights."""
    return file.entry.index in file.generation.known.weights
