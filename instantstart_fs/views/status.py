"""Computes what is shown of pipelines and files: attributes, xattrs, states and status. It changes nothing.

docs/SEMANTICS.md defines the results. Nothing here counts as a request or starts a fill.
"""

from __future__ import annotations

import datetime
import stat
from typing import Protocol

from instantstart_fs.catalog import loadsets
from instantstart_fs.catalog.failure import Failure
from instantstart_fs.catalog.model import CachedFile, Generation, Pipeline
from instantstart_fs.core.eviction import without_others
from instantstart_fs.core.status import (
    AccessStatus,
    ErrorStatus,
    FileStatus,
    FillStatus,
    ListedStatus,
    PipelineState,
    PipelineStatus,
    ScrubStatus,
    SkippedStatus,
    TierStatus,
)
from instantstart_fs.errors import AccessRefused
from instantstart_fs.filler.target import FileState
from instantstart_fs.vfs import Attributes, Private

BLOCK = 512
SKIPS_SHOWN = 10


class Clocks(Protocol):
    """The times that are shown: now, and of requests and reads. Nanoseconds of the wall clock."""

    def last_request(self, pipeline: str) -> int | None: ...

    def last_access(self, pipeline: str, generation: int, index: int) -> int | None: ...


def rfc3339(ns: int | None) -> str | None:
    """A wall-clock time in nanoseconds as RFC 3339 in UTC, to the second; None stays None."""
    if ns is None:
        return None
    return datetime.datetime.fromtimestamp(ns // 1_000_000_000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def pipeline_state(pipeline: Pipeline, *, filling: bool) -> PipelineState:
    """cold | filling | partial | warm | unverified | error, as docs/SEMANTICS.md defines them."""
    generation = pipeline.head
    if generation is None or pipeline.hidden is not None:
        return "error"
    if generation.load_set_complete:
        return "unverified" if generation.counts.unverified else "warm"
    if pipeline.failure is not None and pipeline.failure.final:
        return "error"
    if filling:
        return "filling"
    return "partial" if generation.counts.everything else "cold"


def state_directory(state: PipelineState) -> str:
    """Return which of .warm, .filling and .cold lists a pipeline of this state."""
    if state in ("warm", "unverified"):
        return ".warm"
    return ".filling" if state == "filling" else ".cold"


def blocks(size: int, cached: int) -> int:
    """Return st_blocks (units of 512 bytes) for so many cached bytes. Never 0 for a file that has bytes: GNU tar -S
    and cp take 0 blocks for one large hole."""
    if size == 0:
        return 0
    return max(1, -(-cached // BLOCK))


def file_attributes(file: CachedFile, clocks: Clocks, nodeid: int) -> Attributes:
    """Return a file's attributes. ``nodeid``: the one of its two that is asked about; both look the same."""
    spec = file.generation.pipeline.spec
    mtime = file.entry.file.mtime_ns
    accessed = clocks.last_access(*file.triple)
    return Attributes(
        nodeid=nodeid,
        kind="file",
        mode=stat.S_IFREG | (spec.mode & 0o444),
        uid=spec.uid,
        gid=spec.gid,
        size=file.size,
        blocks=blocks(file.size, file.cached_bytes),
        atime_ns=accessed if accessed is not None else mtime,
        mtime_ns=mtime,
        ctime_ns=mtime,
        nlink=1,
        stable=file.complete,
        shown_inode=file.nodeid,
    )


def directory_attributes(
    nodeid: int, *, mode: int, uid: int, gid: int, time_ns: int, children: int, stable: bool
) -> Attributes:
    return Attributes(
        nodeid=nodeid,
        kind="dir",
        mode=stat.S_IFDIR | mode,
        uid=uid,
        gid=gid,
        size=4096,
        blocks=8,
        atime_ns=time_ns,
        mtime_ns=time_ns,
        ctime_ns=time_ns,
        nlink=2 + children,
        stable=stable,
    )


def link_attributes(pipeline: Pipeline) -> Attributes:
    """Return the attributes of the symlink ``.warm/<id>`` and its like, whose target is ``../<id>``. The directory
    that holds it tells the pipeline's state, so only users who may list the pipeline find it."""
    spec = pipeline.spec
    return Attributes(
        nodeid=pipeline.link_nodeid,
        kind="symlink",
        mode=stat.S_IFLNK | 0o777,
        uid=0,
        gid=0,
        size=len(link_target(pipeline)),
        blocks=0,
        atime_ns=pipeline.created_at_ns,
        mtime_ns=pipeline.created_at_ns,
        ctime_ns=pipeline.created_at_ns,
        nlink=1,
        stable=False,
        private=None if spec.mode & 0o005 == 0o005 else Private(spec.uid, spec.gid, spec.mode),
    )


def link_target(pipeline: Pipeline) -> str:
    return f"../{pipeline.id}"


def root_attributes(pipeline: Pipeline, nodeid: int, resolved_at_ns: int, children: int) -> Attributes:
    """Return the attributes of a pipeline's or model's directory, which stays for the pipeline's life. ``children``:
    directories in it."""
    spec = pipeline.spec
    # stat(2) of a pipeline's root is for everybody: of a walled one no more than its owner and that it was added.
    walled = nodeid == pipeline.root_nodeid and spec.mode & 0o005 != 0o005
    return directory_attributes(
        nodeid,
        mode=spec.mode & 0o555,
        uid=spec.uid,
        gid=spec.gid,
        time_ns=pipeline.created_at_ns if walled else resolved_at_ns,
        children=-1 if walled else children,  # a link count of 1 is "unknown" to find(1) and its like
        stable=True,
    )


def tree_directory_attributes(generation: Generation, node: int) -> Attributes:
    """Return the attributes of a directory in a generation (also of the pipeline's root)."""
    return root_attributes(
        generation.pipeline, generation.nodeid(node), generation.resolved_at_ns, generation.tree.subdirectories(node)
    )


def file_xattrs(file: CachedFile, state: PipelineState, clocks: Clocks, keep_hot: float) -> dict[str, str]:
    """Return user.instantstart.* of a file, without the prefix."""
    model = file.generation.manifest.models[file.entry.model]
    values = {
        "state": file.state.value,
        "cached_bytes": str(file.cached_bytes),
        "total_bytes": str(file.size),
        "source": model.source,
        "revision": model.revision,
        "generation": str(file.generation.number),
    }
    if file.entry.file.digest is not None:
        values["digest"] = str(file.entry.file.digest)
    accessed = rfc3339(clocks.last_access(*file.triple))
    if accessed:
        values["last_access"] = accessed
    hot_until = hot_until_ns(clocks.last_request(file.generation.pipeline.id), keep_hot)
    if hot_until:
        values["hot_until"] = rfc3339(hot_until) or ""
    error = file.stale_error or (file.target.error if file.target is not None else None)
    if error is not None:
        values["error"] = f"{error.code}: {error.message}"
    return values


def pipeline_xattrs(pipeline: Pipeline, state: PipelineState, clocks: Clocks, keep_hot: float) -> dict[str, str]:
    """Return user.instantstart.* of a pipeline's directory, without the prefix."""
    values = {"state": state, "source": " ".join(model.source for model in pipeline.spec.models)}
    generation = pipeline.head
    if generation is not None:
        values["cached_bytes"] = str(generation.counts.cached)
        values["total_bytes"] = str(generation.load_bytes)
        values["revision"] = generation.revision
    requested = clocks.last_request(pipeline.id)
    if requested is not None:
        values["last_access"] = rfc3339(requested) or ""
        values["hot_until"] = rfc3339(hot_until_ns(requested, keep_hot)) or ""
    if pipeline.uncached is not None:
        values["uncached"] = without_others(pipeline.uncached.text)
    if pipeline.hidden is not None:
        values["error"] = f"{AccessRefused.code}: {pipeline.hidden}"
    elif pipeline.failure is not None:
        values["error"] = f"{pipeline.failure.error.code}: {pipeline.failure.error.message}"
    return values


def hot_until_ns(last_request_ns: int | None, keep_hot: float) -> int | None:
    return None if last_request_ns is None else last_request_ns + int(keep_hot * 1e9)


def pipeline_status(
    pipeline: Pipeline,
    clocks: Clocks,
    *,
    filling: bool,
    rate: float,
    received: int = 0,
    keep_hot: float,
    with_files: bool,
    in_brief: bool = False,
    scrub: ScrubStatus | None = None,
    access: AccessStatus | None = None,
    tier: TierStatus | None = None,
) -> PipelineStatus:
    """Return what `status` and `ls` show of a pipeline.

    Args:
        rate: bytes per second that its fills receive.
        received: bytes of chunks that are still on their way.
        in_brief: without the lists of files; their numbers, if the pipeline is in memory."""
    listed = pipeline.current if with_files else None
    brief = pipeline.head if in_brief and isinstance(pipeline.head, Generation) else None
    choices = listed or brief
    generation = pipeline.head
    cached = generation.counts.cached if generation else 0
    total = generation.load_bytes if generation else 0
    requested = clocks.last_request(pipeline.id)
    fill = None
    if filling:
        received = max(min(received, total - cached), 0)
        eta = round((total - cached - received) / rate) if rate > 0 else None
        fill = FillStatus(bytes_per_second=round(rate), eta_seconds=eta, received_bytes=received)
    failure = pipeline.failure
    if pipeline.hidden is not None:
        failure = Failure(AccessRefused(pipeline.hidden), pipeline.access.since_ns, final=True)
    return PipelineStatus(
        pipeline=pipeline.id,
        state=pipeline_state(pipeline, filling=filling),
        cached_bytes=cached,
        total_bytes=total,
        source=tuple(model.source for model in pipeline.spec.models),
        generation=generation.number if generation else 0,
        revision=generation.revision if generation else "",
        last_request=rfc3339(requested),
        hot_until=rfc3339(hot_until_ns(requested, keep_hot)),
        pinned=pipeline.pinned,
        leases=pipeline.leases,
        fill=fill,
        error=None
        if failure is None
        else ErrorStatus(code=failure.error.code, message=failure.error.message, since=rfc3339(failure.since_ns) or ""),
        uncached=pipeline.uncached.text if pipeline.uncached is not None else None,
        scrub=scrub,
        access=access,
        skipped=_skipped(pipeline),
        undecided=(generation.undecided or None) if generation is not None else None,
        variants=loadsets.variants(choices) if choices is not None else None,
        listed=ListedStatus(len(brief.files), brief.total_bytes) if brief is not None else None,
        startup_bytes=pipeline.startup_bytes or None,
        tier=tier,
        files=_file_statuses(listed) if listed is not None else None,
    )


def _skipped(pipeline: Pipeline) -> SkippedStatus | None:
    """Return the files that the load set leaves out. The pipeline must be in memory."""
    if not isinstance(pipeline.head, Generation):
        return None
    found = [model.skipped for model in pipeline.head.manifest.models if model.skipped is not None]
    if not found:
        return None
    first = tuple(name for skipped in found for name in skipped.first)
    return SkippedStatus(sum(skipped.count for skipped in found), first[:SKIPS_SHOWN])


def _file_statuses(generation: Generation) -> tuple[FileStatus, ...]:
    explained = loadsets.Explained(generation)
    return tuple(_file_status(file, explained) for file in generation.files)


def _file_status(file: CachedFile, explained: loadsets.Explained) -> FileStatus:
    digest = file.entry.file.digest
    state = file.state
    if file.target is not None and state is not FileState.POISONED:
        state = file.target.state
    return FileStatus(
        path=file.entry.path,
        state=state.value,
        size=file.size,
        cached_bytes=file.cached_bytes,
        digest=str(digest) if digest else None,
        left_out=explained.left_out(file.entry),
        learned=explained.learned(file.entry),
        untouched=explained.untouched(file.entry),
    )
