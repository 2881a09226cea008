"""The live state of pipelines, generations and files in memory. It does no IO of its own.

The Library owns these objects; they live on the trio thread. A ``CachedFile`` is one incarnation of one file:
poisoning, eviction and update never change one but put another, with another nodeid, in its place, so a handle that
holds the old one can never see the new bytes, nor the other way round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from instantstart_fs.catalog.accounting import Account, Counts, Uncached
from instantstart_fs.catalog.failure import Failure
from instantstart_fs.catalog.unloaded import Unloaded
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
from instantstart_fs.index.schema import SummaryRecord
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
    hold it; ``reader`` is their shared descriptor; ``served_bytes`` were given to readers by the daemon.
    ``stale_error``: why another incarnation has taken its place. ``extra``: bytes of disk beyond the blocks of its
    cached bytes, as far as they were measured (its attributes' block, extents). ``served_uncached``: bytes of it were
    served straight from the origin, and may lie in a page cache unproven.
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
        """Return what the seal of the complete file must say."""
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
        """Return a new map of the chunks that were durable when this incarnation was loaded."""
        return ChunkMap(self.size, self.generation.manifest.chunk_size, self.bitmap or None)

    @property
    def cached_bytes(self) -> int:
        if self.complete:
            return self.size
        if self.target is not None:
            return self.target.present.present_bytes
        return self.chunk_map().present_bytes if self.bitmap else 0


class Lessee(NamedTuple):
    """A process that holds a lease, as the kernel names the peer of a connection. ``pid``: 0 if /proc does not show
    it."""

    pid: int
    uid: int


class Generation(Account):
    """One resolved generation of a pipeline and the state of its files, by manifest index.

    Directory nodes have the nodeid ``base + 2·node``, but the pipeline's and the models' roots keep theirs for the
    pipeline's life (containers hold them bound).
    """

    def __init__(self, pipeline: Pipeline, manifest: Manifest, base: int, open_origin: OpenOrigin) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.manifest = manifest
        self.number = manifest.generation
        self.resolved_at_ns = manifest.resolved_at_ns
        self.base = base
        self._open_origin = open_origin
        self._origins: dict[int, Origin] = {}
        self.tree = Tree(manifest.files, [model.name for model in manifest.models])
        self.sorted_with = pipeline.learned.wanted
        self.known = sort_files(manifest.files, self._hints())
        """The files sorted into load set, weights, left out; ``sorted_with``: with which learned facts."""
        self._in_load_set: Collection[int] = frozenset(self.known.order)
        self.load_bytes = sum(manifest.files[index].file.size for index in self.load_set)
        self.total_bytes = manifest.total_bytes
        self.files: list[CachedFile] = []
        self.handles = 0
        self.retainers = 0
        """How many callers count on finding this very object in its pipeline again; see ``retained``."""
        self._ended = False
        self.eviction_done: trio.Event | None = None
        """The event that fills wait for. It exists while an eviction removes the store's files."""
        self.suspect = False
        """Whether the store has lost a file of this generation, and perhaps its slot's metadata too."""
        self.checked_at = -math.inf
        """When the slot was last checked, by trio.current_time()."""
        self.owed_index_write: Callable[[WriteTxn], None] | None = None
        """The index write that an eviction could not make; until then the index may name bytes that were deleted."""
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
    def counted(self) -> Sequence[CachedFile]:
        return self.files

    @property
    def undecided(self) -> int:
        """The number of variants of which one has to be chosen; 0 if no choice is needed."""
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
        """Add these files to the load set, with the other parts of what they are part of. The pipeline's learned facts
        must say the same before the next ``await``."""
        self._know(with_wanted(self.known, indices))

    def sort_again(self) -> None:
        """Sort the files into the load set anew, after other learned facts changed. Walks over all files."""
        self._know(sort_files(self.manifest.files, self._hints()))
        self.sorted_with = self.pipeline.learned.wanted

    def follow(self, order: Sequence[str]) -> None:
        """Fetch and stage the weight files in this order from now on: an engine was seen to open them so."""
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
        """The pinned revisions of all models, as `status` shows them."""
        return " ".join(model.revision for model in self.manifest.models)

    def subdirectories(self, nodeid: int) -> int | None:
        """Return how many subdirectories the directory of a constant nodeid has; None if this generation lacks it."""
        node = self.node_of_root(nodeid)
        return None if node is None else self.tree.subdirectories(node)

    @contextmanager
    def retained(self) -> Iterator[None]:
        """Keep the generation in memory inside the block. For code that awaits without having a file of it open."""
        self.retainers += 1
        try:
            yield
        finally:
            self.retainers -= 1
            if self._ended:
                self.end()

    def end(self) -> None:
        """Release a generation that is not shown any more. Does nothing while it is retained or a file is open: call it
        again then. It breaks the reference cycles with its files (catalog/gc_control.py)."""
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
        """``origin`` if it was opened before, else None; never blocks."""
        return self._origins.get(model)

    @property
    def nodeid_count(self) -> int:
        return NODEIDS_PER_NODE * len(self.tree)

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
        """Make all files absent, of incarnation 0, under the default nodeids of this generation's block."""
        self.files = [
            CachedFile(self, entry, FileState.ABSENT, 0, self.default_file_nodeid(entry.index), b"")
            for entry in self.manifest.files
        ]
        self._counts = Counts(0, 0, 0, 0, 0, 0)

    @property
    def load_set_complete(self) -> bool:
        """Whether an engine can start: its load set is complete and no variant is to be chosen, or all files are."""
        complete = self.counts.complete == len(self.load_set) and not self.undecided
        return complete or self.counts.finished == len(self.manifest.files)

    @property
    def fill_is_over(self) -> bool:
        """Whether all that was to be filled is here. While a variant is to be chosen, an engine needs more."""
        if self.filling_everything:
            return self.counts.finished == len(self.manifest.files)
        return self.counts.complete == len(self.load_set)


class UnloadedGeneration(Unloaded["Pipeline"]):
    """A generation of which only the summary is in memory. ``load`` reads the rest, and may block. It returns None, and
    sets the pipeline's error, if that cannot be read; and this object if it cannot be read now."""

    def __init__(
        self,
        pipeline: Pipeline,
        summary: SummaryRecord,
        load: Callable[[UnloadedGeneration], Generation | UnloadedGeneration | None],
    ) -> None:
        super().__init__(pipeline, summary)
        self._load = load

    def load(self) -> Generation | UnloadedGeneration | None:
        return self._load(self)


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
        """When this daemon last saw a byte come in: wall clock, ns."""
        self._head: Generation | UnloadedGeneration | None = None
        self.used_at = time.monotonic()
        """When somebody last looked into the pipeline, by time.monotonic()."""
        self.changes = 0
        """How many tasks are changing its files without its lock; see ``changing``."""
        self.leftovers = False
        """Whether bytes may lie in the store that no record speaks of: the next start gives them back."""
        self.draining: list[Generation] = []
        """Superseded generations that somebody still holds open."""
        self.leases = 0
        self.lessees: list[Lessee] = []
        """The processes that hold leases, as far as they are known."""
        self._failure: Failure | None = None
        self.on_failure: Callable[[Pipeline], None] = lambda pipeline: None
        """Called when ``failure`` was set or lifted."""
        self.uncached: Uncached | None = None
        self.scrubbed = ScrubProgress()
        """How far the scrub has come with this pipeline (upkeep/scrub.py)."""
        self.learned = Learned()
        """The load-set facts that were learned from engines (catalog/loadset_learner.py)."""
        self.learned_read = True
        """Whether that is what the store has of it; else it is read with the manifest."""
        self.startup_bytes = 0
        """Bytes of disk that its startup caches take (serving/startupcaches.py)."""
        self.startup_promised = 0
        """Bytes of disk promised to startup caches that are being saved: what has come, and what may still come."""
        self.access = Access()
        """The last answer of its origins to its credentials (upkeep/access_recheck.py)."""
        self.hidden: str | None = None
        """The reason why it is hidden, or None. A hidden pipeline is not found in the mount, nor its files opened."""
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
        """The generation that is shown, read from the store if it is not in memory; None if it cannot be read.

        Reading blocks for a second and more for a hundred thousand files. On the loop, await
        ``Catalog.ensure_loaded`` first."""
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
        """The current generation, or its summary if it is not in memory. Never reads: for walks over all pipelines."""
        return self._head

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark that index and memory may disagree inside the block: no summary is written then."""
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
        """Raise AccessRefused if the pipeline is hidden."""
        if self.hidden is not None:
            raise AccessRefused(self.hidden)

    @property
    def in_use(self) -> bool:
        return self.leases > 0 or any(generation.handles for generation in self.heads())

    @property
    def allocated(self) -> int:
        """The bytes of disk that its files and its startup caches take."""
        return self.startup_bytes + self.startup_promised + sum(generation.own_allocated for generation in self.heads())

    def current_nowait(self) -> Generation | None:
        """Return ``current`` without reading. Raises NotLoaded if it is not in memory."""
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


def counts_as_request(file: CachedFile) -> bool:
    """Whether opening this file is a request for its pipeline: whether it holds weights."""
    return file.entry.index in file.generation.known.weights
