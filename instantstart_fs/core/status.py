"""The values that `status --json` and `ls --json` print: stable, documented in docs/CONFIGURATION.md. Times are RFC
3339 or null.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PipelineState = Literal["cold", "filling", "partial", "warm", "unverified", "error"]


class FillStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """The progress of a fill. ``received_bytes``: bytes of incomplete chunks that came so far; they are no part of
    ``cached_bytes``."""

    bytes_per_second: int
    eta_seconds: int | None
    received_bytes: int = 0


class ErrorStatus(msgspec.Struct, frozen=True):
    code: str
    message: str
    since: str


class ScrubStatus(msgspec.Struct, frozen=True):
    """The scrub of a pipeline. ``proven``: when the last whole pass over its files began. ``state``: of the next one;
    it rests while there is demand."""

    proven: str | None
    state: Literal["waiting", "reading", "resting"]


class AccessStatus(msgspec.Struct, frozen=True):
    """``verdict``: whether its credentials may fetch its source; unknown: nobody has said so yet. ``checked``: the last
    answer. ``trouble``: what the last question led to, null when that was a yes."""

    verdict: Literal["allowed", "refused", "unknown"]
    checked: str | None
    trouble: str | None


class SkippedStatus(msgspec.Struct, frozen=True):
    """Files of the source that no filesystem can show: how many, and the first of them as "name: reason"."""

    count: int
    first: tuple[str, ...]


class ListedStatus(msgspec.Struct, frozen=True):
    """The number of a pipeline's files, and their bytes."""

    count: int
    size: int


class OriginCheck(msgspec.Struct, frozen=True):
    """Whether the daemon could fetch a byte of a source: ``code`` is "" where it could, else that of the error with
    this ``message``. ``model``: its name within the pipeline. ``unasked``: so many other sources were not asked, being
    the same, or too many."""

    pipeline: str
    model: str
    source: str
    unasked: int = 0
    code: str = ""
    message: str = ""


class FileStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """``left_out``: why it is not in the load set, where it is not. ``learned``: it is in the load set since an engine
    read it, or somebody asked for it. ``untouched``: weights of the load set that none of the last three starts has
    opened."""

    path: str
    state: str
    size: int
    cached_bytes: int
    digest: str | None
    left_out: str | None = None
    learned: bool = False
    untouched: bool = False


class VariantStatus(msgspec.Struct, frozen=True):
    """A variant to choose. ``label``: the words that tell it from the others, or its name; ``include``: a glob that
    chooses it; ``size``: of all its files, in bytes."""

    kind: str
    label: str
    include: str
    size: int
    chosen: bool


TierState = Literal["ok", "read-only", "down", "refused", "unknown"]


class UpstreamStatus(msgspec.Struct, frozen=True):
    """How this host fares with another region's tier. ``ok``: it has answered; ``down``: it is left alone, or was and
    has not answered since; ``unknown``: it was not asked yet. ``since``: RFC 3339, when it began to be down; ``why``:
    "" while it is not."""

    endpoint: str
    state: Literal["ok", "down", "unknown"]
    since: str | None = None
    why: str = ""


class TierStatus(msgspec.Struct, frozen=True):
    """How this host fares with the regional tier. ``read-only``: it takes no writes; ``down``: it is left alone;
    ``refused``: this pipeline gets nothing out of it, since its source refuses its credentials; ``unknown``: it was not
    asked yet. ``since``: RFC 3339, when that began; ``why``: "" while it is ok. ``warning``: what is wrong beside that,
    "" = nothing. ``upstream``: the other regions' tiers."""

    state: TierState
    since: str | None
    why: str = ""
    warning: str = ""
    upstream: tuple[UpstreamStatus, ...] = ()


class PipelineStatus(msgspec.Struct, frozen=True, omit_defaults=False):
    """``cached_bytes``/``total_bytes`` speak of the load set (docs/SEMANTICS.md). ``revision``: what each model was
    pinned to, joined by spaces. ``files`` is None in `ls`. ``uncached`` is null unless a miss is served without being
    kept, ``scrub`` without `store.scrub`, ``access`` without `origins.recheck_access` or where there is nobody to ask,
    ``skipped`` where the source holds nothing that cannot be shown, and in `ls`.
    ``startup_bytes``: of disk, that its startup caches take, null without any. ``tier``: null
    without a regional tier. ``listed`` stands for ``files``
    where somebody asked for those in brief. ``undecided`` unless one of so many variants is to be chosen; ``variants``
    come with ``files``, where there are any.
    """

    pipeline: str
    state: PipelineState
    cached_bytes: int
    total_bytes: int
    source: tuple[str, ...]
    generation: int
    revision: str
    last_request: str | None
    hot_until: str | None
    pinned: bool
    leases: int
    fill: FillStatus | None
    error: ErrorStatus | None
    uncached: str | None = None
    scrub: ScrubStatus | None = None
    access: AccessStatus | None = None
    skipped: SkippedStatus | None = None
    undecided: int | None = None
    variants: tuple[VariantStatus, ...] | None = None
    listed: ListedStatus | None = None
    startup_bytes: int | None = None
    tier: TierStatus | None = None
    files: tuple[FileStatus, ...] | None = None

    @property
    def brief(self) -> PipelineStatus:
        """Return the status without its lists of files."""
        return msgspec.structs.replace(self, files=None, variants=None, listed=None)
