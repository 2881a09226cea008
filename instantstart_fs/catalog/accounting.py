"""Counts a generation's bytes: cached, reserved by admissions, and allocated on the disk.

It only counts. serving/admission.py decides whether bytes may come in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.tree import Tree
from instantstart_fs.filler.target import FileState

OVERHEAD_BLOCKS = 3
"""The most blocks that a file takes on the disk beyond its bytes: the rest of its last block, its seal record, the map
of its extents."""


class Counts(NamedTuple):
    """A generation's counts. Of the load set: ``cached`` bytes, ``complete`` files, and how many of these are
    ``unverified``. Of all files: cached bytes (``everything``), bytes on disk (``allocated``), and how many are
    complete (``finished``)."""

    cached: int
    complete: int
    unverified: int
    everything: int
    allocated: int
    finished: int


class Uncached(NamedTuple):
    """The reason why a pipeline's reads are served straight from its origin. ``retry_at``: when space is asked for
    again, by trio.current_time()."""

    text: str
    retry_at: float


class CountedFile(Protocol):
    """The part of catalog.model.CachedFile that is counted. ``extra``: bytes of disk beyond its cached bytes'
    blocks."""

    entry: FileEntry
    state: FileState
    extra: int

    @property
    def size(self) -> int: ...
    @property
    def complete(self) -> bool: ...
    @property
    def cached_bytes(self) -> int: ...


class Account:
    """The account of a generation with these files and this tree; catalog.model.Generation is one."""

    tree: Tree
    load_bytes: int
    total_bytes: int
    _in_load_set: Collection[int]

    def __init__(self) -> None:
        self.block = 4096
        """Block size of the store's filesystem, in bytes."""
        self.filling_load_set = False
        self.filling_everything = False
        self.reservations: dict[tuple[int, int], int] = {}
        """(file, chunk) → bytes that were admitted for a single read and have not come yet."""
        self.shared_with_current: frozenset[int] = frozenset()
        """Of a superseded generation: the files that the current generation shares and counts as its own."""
        self._counts: Counts | None = None
        self._incomplete: dict[int, int] = {}
        """Directory node → how many of its files are not complete; of those that somebody listed."""

    @property
    def counted(self) -> Sequence[CountedFile]:
        """The files, by manifest index."""
        raise NotImplementedError

    @property
    def load_set(self) -> tuple[int, ...]:
        """File indices, in load order."""
        raise NotImplementedError

    def in_load_set(self, index: int) -> bool:
        return index in self._in_load_set

    def invalidate_counts(self) -> None:
        """Recompute the counts when they are next needed. For changes that neither ``add_cached_bytes`` nor
        ``completed`` covers."""
        self._counts = None
        self._incomplete.clear()

    def add_cached_bytes(self, file: CountedFile, count: int) -> None:
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

    def completed(self, file: CountedFile, allocated: int) -> None:
        """Count ``file`` as complete. All its bytes were counted before; it is sealed or unverified now, and takes
        ``allocated`` bytes of disk (0: not measured). Constant time."""
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

    def set_allocated(self, file: CountedFile, allocated: int) -> None:
        """``file`` takes ``allocated`` bytes of disk (0: not known). If it is counted already, call
        ``invalidate_counts``."""
        file.extra = allocated - self._rounded(file.cached_bytes) if allocated else 0

    def _rounded(self, count: int) -> int:
        return -(-count // self.block) * self.block

    @property
    def own_allocated(self) -> int:
        """The bytes of disk that this generation's files take and that no later generation shares."""
        shared_with_current = (self.counted[index] for index in self.shared_with_current)
        return self.counts.allocated - sum(
            self._rounded(file.size) + file.extra for file in shared_with_current if file.complete
        )

    def missing_bytes(self, *, everything: bool) -> int:
        """Return the absent bytes of the load set, or of all files."""
        counts = self.counts
        return self.total_bytes - counts.everything if everything else self.load_bytes - counts.cached

    def needed_bytes(self, *, everything: bool) -> int:
        """Return the bytes of disk that filling the absent bytes takes at most."""
        missing = self.missing_bytes(everything=everything)
        return missing + self._overhead(everything=everything) if missing else 0

    def _overhead(self, *, everything: bool) -> int:
        unfinished = (
            len(self.counted) - self.counts.finished if everything else len(self.load_set) - self.counts.complete
        )
        return unfinished * OVERHEAD_BLOCKS * self.block

    @property
    def reserved_bytes(self) -> int:
        """Return the admitted bytes of disk that have not come yet: of the running fill and of single reads."""
        promised = 0
        if self.filling_load_set:
            everything = self.filling_everything
            promised = self.missing_bytes(everything=everything) + self._overhead(everything=everything)
        return promised + self.reserved_outside_fill(filling=self.filling_load_set, everything=self.filling_everything)

    def reserved_outside_fill(self, *, filling: bool, everything: bool) -> int:
        """Return the bytes admitted for single reads that no such fill covers."""
        if not self.reservations or (filling and everything):
            return 0
        return sum(
            length for (index, _), length in self.reservations.items() if not (filling and index in self._in_load_set)
        )

    def reserve(self, file: CountedFile, present: ChunkMap, chunks: Sequence[int]) -> None:
        """Reserve those of these chunks that are absent, until they come."""
        self.reservations.update(self.unreserved(file, present, chunks))

    def unreserved(self, file: CountedFile, present: ChunkMap, chunks: Sequence[int]) -> dict[tuple[int, int], int]:
        """Return those of these chunks that are neither present nor reserved, and their bytes of disk."""
        index = file.entry.index
        return {
            (index, chunk): self._rounded(present.byte_range(chunk).length)
            for chunk in chunks
            if chunk not in present and (index, chunk) not in self.reservations
        }

    def release_reservations(self, file: CountedFile) -> None:
        """Drop the reservations of a file: nothing more of it will come."""
        index = file.entry.index
        for key in [key for key in self.reservations if key[0] == index]:
            del self.reservations[key]

    @property
    def counts(self) -> Counts:
        """The counts. They are kept up to date, so that listing 10,000 pipelines or sealing 10,000 files costs no
        walks."""
        if self._counts is None:
            cached = complete = unverified = everything = allocated = finished = 0
            for file in self.counted:
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
        """Compute now what takes a walk over all files. For a thread, so that the loop need not."""
        _ = self.counts
        for node, entry in enumerate(self.tree.nodes):
            if entry.children is not None:
                self.mostly_complete(node)

    def mostly_complete(self, node: int) -> bool:
        """Whether at least three in four entries of a directory are complete files or directories."""
        children = self.tree.nodes[node].children or {}
        incomplete = self._incomplete.get(node)
        if incomplete is None:
            nodes = self.tree.nodes
            incomplete = self._incomplete[node] = sum(
                nodes[child].file >= 0 and not self.counted[nodes[child].file].complete for child in children.values()
            )
        return incomplete * 4 <= len(children)
