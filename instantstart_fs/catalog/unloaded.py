"""Generations that nobody has looked into: their summary stands for them, and the manifest is read when somebody does.

A start reads one summary for each pipeline. A generation's manifest, tree and file records come with the first lookup
below its directory, the first read, or whatever else asks for more than a summary says.
When a summary may be trusted: index/schema.py, SummaryRecord.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from instantstart_fs.catalog.accounting import Counts
from instantstart_fs.core.tree import NODEIDS_PER_NODE
from instantstart_fs.index.schema import SummaryRecord

P = TypeVar("P", bound="Owner")


class Owner(Protocol):
    """What is needed of catalog.model.Pipeline."""

    directory_nodeids: dict[str, int]

    @property
    def id(self) -> str: ...


class Unloaded(Generic[P]):
    """What is known of a generation that is not in memory, under the names that catalog.model.Generation has for it."""

    def __init__(self, pipeline: P, summary: SummaryRecord) -> None:
        self.pipeline = pipeline
        self.summary = summary
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
