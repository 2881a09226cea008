"""Generations that are not loaded: a summary stands for each until more is needed.

A start reads one summary per pipeline. The generation's manifest, tree and file records are read at the first lookup
below its directory, the first read, or any other question that the summary does not answer. index/schema.py
(SummaryRecord) says when a summary may be trusted.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from instantstart_fs.catalog.accounting import Counts
from instantstart_fs.core.tree import NODEIDS_PER_NODE
from instantstart_fs.index.schema import SummaryRecord

P = TypeVar("P", bound="Owner")


class Owner(Protocol):
    """The part of catalog.model.Pipeline that is used here."""

    directory_nodeids: dict[str, int]

    @property
    def id(self) -> str: ...


class Unloaded(Generic[P]):
    """A generation that is not in memory, with the attributes of catalog.model.Generation that its summary has."""

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
