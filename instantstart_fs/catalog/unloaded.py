"""Generations that nobody has looked into: their summary stands for them, and the manifest is read when somebody does.

A start reads one summary for each pipeline. A generation's manifest, tree and file records come with the first lookup
below its directory, the first read, or whatever else asks for more than a summary says.
When a summary may be trusted: index/schema.py, SummaryRecord.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from instantstart_fs.core.loadset import RULES
from instantstart_fs.core.tree import NODEIDS_PER_NODE
from instantstart_fs.index.schema import SummaryRecord

if TYPE_CHECKING:
    from instantstart_fs.catalog.model import Generation, Pipeline


class Counts(NamedTuple):
    """Of the load set: ``cached`` bytes, ``complete`` files, ``unverified`` ones among these; ``everything``: the
    cached bytes of all files; ``allocated``: the bytes of disk that these take; ``finished``: how many of all files are
    complete."""

    cached: int
    complete: int
    unverified: int
    everything: int
    allocated: int
    finished: int


class UnloadedGeneration:
    """What is known of a generation that is not in memory; the same names as ``state.Generation`` has for it.
    ``load`` reads the rest: None, and the pipeline in trouble, where that cannot be read; this very object, where it
    cannot be read now."""

    def __init__(
        self,
        pipeline: Pipeline,
        summary: SummaryRecord,
        load: Callable[[UnloadedGeneration], Generation | UnloadedGeneration | None],
    ) -> None:
        self.pipeline = pipeline
        self.summary = summary
        self._load_blocking = load
        self.number = summary.generation
        self.base = summary.nodeid_base
        self.nodeid_count = NODEIDS_PER_NODE * summary.nodes
        self.file_count = summary.files
        self.load_bytes = summary.load_bytes
        self.total_bytes = summary.total_bytes
        self.revision = summary.revision
        self.resolved_at_ns = summary.resolved_at_ns
        self.counts = Counts(*summary.counts)
        self.undecided = summary.undecided
        self.handles = 0
        self.reserved_bytes = 0

    def load(self) -> Generation | UnloadedGeneration | None:
        return self._load_blocking(self)

    @property
    def load_set_complete(self) -> bool:
        complete = self.counts.complete == self.summary.load_files and not self.undecided
        return complete or self.counts.finished == self.file_count

    @property
    def own_allocated(self) -> int:
        return self.counts.allocated

    def subdirectories(self, nodeid: int) -> int | None:
        """See Generation.subdirectories."""
        for name, candidate in self.pipeline.directory_nodeids.items():
            if candidate == nodeid:
                return self.summary.subdirectories.get(name)
        return None


def summary_of(generation: Generation) -> SummaryRecord:
    """What stands for it as it is now."""
    block = range(generation.base, generation.base + generation.nodeid_count)
    found = {name: generation.subdirectories(nodeid) for name, nodeid in generation.pipeline.directory_nodeids.items()}
    return SummaryRecord(
        generation=generation.number,
        nodeid_base=generation.base,
        nodes=len(generation.tree),
        files=generation.file_count,
        load_files=len(generation.load_set),
        load_bytes=generation.load_bytes,
        total_bytes=generation.total_bytes,
        revision=generation.revision,
        resolved_at_ns=generation.resolved_at_ns,
        subdirectories={name: count for name, count in found.items() if count is not None},
        counts=tuple(generation.counts),
        nodeids=tuple(file.nodeid for file in generation.files if file.nodeid not in block),
        rules=RULES,
        undecided=generation.undecided,
    )
