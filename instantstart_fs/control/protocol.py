"""The control protocol, version 1: what goes over the socket. Values alone; how one is a line is in lines.py.

Each message is one JSON object on one line. The client sends one request at a time:

    {"v": 1, "request": {"op": "status", "pipeline": "my-llm"}}

and the server answers with any number of progress messages, then exactly one ``done`` or ``failed``:

    {"type": "progress", "status": {…} | null, "done_bytes": 0, "total_bytes": 0}
    {"type": "done", "result": …}
    {"type": "failed", "code": "pipeline-not-found", "message": "…", "retry_after": null}

``open`` answers with ``opening`` (what there is), then ``handed`` messages, whose descriptors come beside them
(SCM_RIGHTS, in the files' order, at most MAX_HANDED_FILES × 2 of them), and ``progress`` in between.
With ``stream`` it answers with ``parts`` messages instead: files before they are complete, and what comes of them.

After ``done`` of a ``lease`` or an ``open`` the lease lasts until the connection ends. Closing the connection ends a
wait, not what is waited for.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from instantstart_fs.core.coldstart import Moment
from instantstart_fs.core.limits import MAX_BYTES, MAX_TIME_NS, MIN_RATE
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.startupcache import Outcome, StartupRecord
from instantstart_fs.core.status import TierStatus
from instantstart_fs.core.weights import WeightSet
from instantstart_fs.errors import InstantStartError, from_code

MAX_HANDED_FILES = 32
"""The most files of one ``handed`` message. Each has two descriptors, and the kernel takes 253 at once."""
MAX_NAMES = 1000
"""The most ids in the answer to ``names``. Nobody reads more after a TAB."""
MAX_INCLUDED, MAX_GLOB = 32, 4096
"""Globs of one ``include``, which a pipeline's owner may ask for, and characters of each: the loop compares each with
every file, 10,000 of them in about 30 ms."""


class _Request(msgspec.Struct, frozen=True, tag_field="op", forbid_unknown_fields=True):
    pass


class Ping(_Request, frozen=True, tag="ping"):
    """→ DaemonInfo."""


class Add(_Request, frozen=True, tag="add"):
    """→ PipelineStatus, once resolved and pinned. ``warm``: start filling the load set then."""

    spec: PipelineSpec
    warm: bool = False


class Update(_Request, frozen=True, tag="update"):
    """→ PipelineStatus of the generation that is now shown."""

    pipeline: str


class Remove(_Request, frozen=True, tag="remove", omit_defaults=True):
    """→ null, or a list of those (as messages name them) who still have files of it open: their space is free once
    they close them. ``force``: leases do not keep it from going, they are ended."""

    pipeline: str
    force: bool = False


class Evict(_Request, frozen=True, tag="evict", omit_defaults=True):
    """→ as for ``remove``. ``force``: neither leases nor opens keep its bytes from going."""

    pipeline: str
    force: bool = False


class Pin(_Request, frozen=True, tag="pin"):
    """→ null. Pins, or with ``pinned`` false unpins."""

    pipeline: str
    pinned: bool = True


class Touch(_Request, frozen=True, tag="touch"):
    """→ null. Counts as a request."""

    pipeline: str


class Warm(_Request, frozen=True, tag="warm"):
    """→ PipelineStatus: at once, or with ``wait`` when all is there, with ``progress`` (status) on the way."""

    pipeline: str
    everything: bool = False
    wait: bool = False


class Include(_Request, frozen=True, tag="include"):
    """→ null. What these globs match belongs to the load set from now on: it chooses a variant, say."""

    pipeline: str
    globs: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=MAX_GLOB)], ...], msgspec.Meta(max_length=MAX_INCLUDED)
    ]


class Verify(_Request, frozen=True, tag="verify"):
    """→ VerifyResult, with ``progress`` (done_bytes, total_bytes) on the way. ``rate``: bytes a second at most."""

    pipeline: str
    rate: Annotated[float, msgspec.Meta(ge=MIN_RATE, le=MAX_BYTES)] | None = None


class Access(_Request, frozen=True, tag="access", omit_defaults=True):
    """→ list of the sources that its own credentials (or the token in that file) may still fetch: all of them."""

    pipeline: str
    token_file: str | None = None


class AskRegion(_Request, frozen=True, tag="region", omit_defaults=True):
    """→ RegionState. ``check``: the tier is asked what it holds of the pipeline."""

    pipeline: str
    check: bool = False


class CheckOrigins(_Request, frozen=True, tag="check-origins"):
    """→ list of core.status.OriginCheck: what the daemon gets when it fetches one byte from each of its origins. Of the
    pipelines that the caller owns, or of all."""


class Lease(_Request, frozen=True, tag="lease"):
    """→ null; holds until the connection ends."""

    pipeline: str


class Open(_Request, frozen=True, tag="open"):
    """→ ``opening``, ``handed``…, null: read-only descriptors of the weight files as each is complete, for callers
    who may read the pipeline's files in the mount. A lease until the connection ends; a cold pipeline is filled. They
    come as core.weights.schedule says for these ``deadlines`` (model → seconds). ``stream``: files come before they
    are complete, in ``parts``."""

    pipeline: str
    deadlines: dict[str, float] = {}
    stream: bool = False


class Ls(_Request, frozen=True, tag="ls"):
    """→ list of PipelineStatus without files."""


class Names(_Request, frozen=True, tag="names"):
    """→ list of at most MAX_NAMES ids that begin with ``prefix``, sorted, of what the caller may see, for a shell."""

    prefix: str = ""


class Specs(_Request, frozen=True, tag="specs"):
    """→ list of PipelineSpec: how they were asked for. For those who administer."""


class Status(_Request, frozen=True, tag="status", omit_defaults=True):
    """→ PipelineStatus with files; ``brief``: with ``listed`` in their place."""

    pipeline: str
    brief: bool = False


class Mark(_Request, frozen=True, tag="mark", omit_defaults=True):
    """→ null. A moment of a cold start that the filesystem cannot see; ``at_ns``: wall clock, null for now; ``start``:
    of which start, "" where nobody named one."""

    pipeline: str
    moment: Moment
    at_ns: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_NS)] | None = None
    start: str = ""


class StartupBegin(_Request, frozen=True, tag="startup-begin", omit_defaults=True):
    """→ ``handed`` with a read-only descriptor of a startup cache, where there is one for this start, and core.startup-
    cache's choice. Begins a cold-start record, and the fill. ``key``: what the engine's compiled code depends on;
    ``without``: versions that proved damaged; ``start``: of the same start, asked again; ``requested_ns``: wall
    clock."""

    pipeline: str
    key: dict[str, str]
    restore: bool = True
    without: Annotated[tuple[int, ...], msgspec.Meta(max_length=64)] = ()
    start: str = ""
    requested_ns: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_NS)] | None = None


class StartupSave(_Request, frozen=True, tag="startup-save"):
    """→ ``handed`` with the writing end of a pipe, for ``size`` bytes, then StartupRecord."""

    pipeline: str
    key: dict[str, str]
    generation: str
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
    digest: Annotated[str, msgspec.Meta(max_length=128)]
    files: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
    view: Annotated[str, msgspec.Meta(max_length=4096)]
    layouts: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=128)], ...], msgspec.Meta(max_length=64)]


class StartupReport(_Request, frozen=True, tag="startup-report"):
    """→ null. What `run` knows of its start. ``phases``: seconds. ``failed``: ended by itself before it was ready."""

    pipeline: str
    start: str
    restore_seconds: float
    command_after: float
    outcome: Outcome
    phases: dict[str, float]
    ended: bool
    status: int | None = None
    failed: bool = False


class StartupCaches(_Request, frozen=True, tag="startup-caches"):
    """→ list of StartupRecord, newest first."""

    pipeline: str


class StartupVerify(_Request, frozen=True, tag="startup-verify"):
    """→ StartupVerified. Reads the startup caches again, and deletes those that are damaged."""

    pipeline: str


class StartupRemove(_Request, frozen=True, tag="startup-remove"):
    """→ how many were removed. ``numbers``: of the versions; none: all."""

    pipeline: str
    numbers: Annotated[tuple[int, ...], msgspec.Meta(max_length=1024)] = ()


class ColdStarts(_Request, frozen=True, tag="cold-starts"):
    """→ list of core.coldstart.ColdStart, newest first."""

    pipeline: str


Request = (
    Mark
    | StartupBegin
    | StartupSave
    | StartupReport
    | StartupCaches
    | StartupVerify
    | StartupRemove
    | ColdStarts
    | Ping
    | Add
    | Update
    | Remove
    | Evict
    | Pin
    | Touch
    | Warm
    | Include
    | Verify
    | Access
    | AskRegion
    | CheckOrigins
    | Lease
    | Open
    | Ls
    | Names
    | Specs
    | Status
)


class DaemonInfo(msgspec.Struct, frozen=True):
    """What a daemon says about itself. ``uptime`` in seconds; ``ready``: the mount answers; ``transport``: who
    serves it ("passthrough" or "pyfuse3"), and why not passthrough, in brackets; ``requests``: how many of each kind
    the kernel has sent since the mount ("read": warm files that the kernel reads itself send none); ``http``: the
    page's address, "" without one."""

    version: str
    pid: int
    mount: str
    store: str
    uptime: float
    pipelines: int
    ready: bool
    transport: str = ""
    requests: dict[str, int] = {}
    http: str = ""
    tier: TierStatus | None = None
    """How this host fares with the regional tier; None without one."""
    staging: dict[str, int] = {}
    """mount.staging.Statistics; empty where staging is off."""


class RegionState(msgspec.Struct, frozen=True):
    """How far the tier has one pipeline: ``owed_bytes`` wait to be written to it, ``unsealed`` files wait for their
    seal there. Of all its ``files``, ``sealed`` are sealed there; None where that was not asked."""

    owed_bytes: int
    unsealed: int
    files: int
    tier: TierStatus
    sealed: int | None = None


class VerifyResult(msgspec.Struct, frozen=True):
    """``healed`` files had wrong bytes, which were deleted and come again; ``unproven`` ones have no digest."""

    files: int
    bytes: int
    healed: tuple[str, ...]
    unproven: tuple[str, ...]


class StartupBegun(msgspec.Struct, frozen=True):
    """``start``: its id; ``generation``: what the pipeline holds, to be said when this start saves; ``outcome``,
    ``record``, ``differs``: core.startupcache.Choice; ``warning``: why the fill does not begin, "" if it does."""

    start: str
    generation: str
    mount: str
    outcome: Outcome
    record: StartupRecord | None
    differs: tuple[str, ...]
    warning: str


class StartupVerified(msgspec.Struct, frozen=True):
    """``damaged``: number → what was wrong; deleted."""

    read: int
    damaged: dict[str, str]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """``status`` for a wait; bytes for a verification."""

    status: Any = None
    done_bytes: int = 0
    total_bytes: int = 0


class Opening(msgspec.Struct, frozen=True, tag="opening"):
    weights: WeightSet


class HandedFile(msgspec.Struct, frozen=True):
    """``descriptors``: 1, or 2 with the same file opened O_DIRECT."""

    path: str
    descriptors: int


class Handed(msgspec.Struct, frozen=True, tag="handed"):
    files: tuple[HandedFile, ...]


class Part(msgspec.Struct, frozen=True):
    """News of a file. ``descriptors``: as of HandedFile; 0 where it was handed over before. ``ranges``: [start, end) in
    bytes that can be read now, and could not before. ``complete``: all of it is there and proven; nothing more comes of
    it. ``again``: what was read of it before is void."""

    path: str
    descriptors: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    complete: bool = False
    again: bool = False


class Parts(msgspec.Struct, frozen=True, tag="parts"):
    files: tuple[Part, ...]


class Done(msgspec.Struct, frozen=True, tag="done"):
    result: Any = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    code: str
    message: str
    retry_after: float | None = None

    def error(self) -> InstantStartError:
        """Return the error as it was raised on the other side."""
        return from_code(self.code, self.message, retry_after=self.retry_after)


Response = Progress | Opening | Handed | Parts | Done | Failed


def failed(error: InstantStartError) -> Failed:
    """Return the answer that carries ``error``."""
    return Failed(error.code, error.message, error.retry_after)
