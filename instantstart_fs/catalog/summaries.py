"""Makes summaries of generations. A summary stands for its generation while that is not in memory."""

from __future__ import annotations

from instantstart_fs.catalog.model import Generation
from instantstart_fs.core.loadset import RULES
from instantstart_fs.index.schema import SummaryRecord


def summary_of(generation: Generation) -> SummaryRecord:
    """Return the generation's summary as of now."""
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
