"""Words what the page of one pipeline shows: its files, sources, users and cold starts. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.humanize import human_bytes
from instantstart_fs.core.status import FileStatus, PipelineStatus
from instantstart_fs.web import view_model
from instantstart_fs.web.problems import Problem, problem

MAX_FILES = 500
"""The most rows of the table. A longer page would help nobody."""
MAX_LISTED = 5_000
"""The most files of a pipeline that is listed at all. Listing takes time on the loop, for which readers wait."""


class FileRow(msgspec.Struct, frozen=True):
    path: str
    state: str
    size: str
    percent: int
    note: str


class PipelineView(msgspec.Struct, frozen=True):
    """What the page shows of one pipeline. ``files`` is None where there are too many to list; ``file_count`` counts
    all. ``used_by`` is None for callers who may not know; ``revision`` is "" without details."""

    row: view_model.Row
    generation: int
    revision: str
    cached: str
    problem: Problem | None
    skipped: str
    files: tuple[FileRow, ...] | None
    file_count: int
    used_by: tuple[str, ...] | None
    cold_starts: tuple[view_model.ColdStartRow, ...]


def pipeline_view(
    status: PipelineStatus,
    records: Sequence[ColdStart],
    used_by: Sequence[str] | None,
    now: float,
    *,
    details: bool,
    everything: bool,
) -> PipelineView:
    """Build the view. ``now`` is the wall clock in seconds."""
    files = status.files
    count = len(files) if files is not None else status.listed.count if status.listed is not None else 0
    skipped = status.skipped
    return PipelineView(
        row=view_model.row(status, now, details=details, everything=everything),
        generation=status.generation,
        revision=status.revision if details else "",
        cached=f"{human_bytes(status.cached_bytes)} of {human_bytes(status.total_bytes)}",
        problem=problem(status, details=details),
        skipped=f"{skipped.count}: {'; '.join(skipped.first)}" if skipped is not None else "",
        files=None if files is None else tuple(_file(file) for file in files[:MAX_FILES]),
        file_count=count,
        used_by=None if used_by is None else tuple(used_by),
        cold_starts=view_model.cold_starts(records, now),
    )


def _file(file: FileStatus) -> FileRow:
    share = 100 if file.cached_bytes >= file.size else file.cached_bytes * 100 // file.size
    note = f"left out: {file.left_out}" if file.left_out is not None else ""
    if not note and file.untouched:
        note = "not opened by the last 3 starts"
    return FileRow(file.path, file.state, human_bytes(file.size), share, note or ("learned" if file.learned else ""))
