"""The cold-start record: what happened between a pipeline's first open and the moment its engine has its weights. Pure
values; core/coldstart_tracker.py makes the records.

What one says, how it is cut into phases and drawn on a scale, which marks it takes, and how many are kept. How records
come about is core/coldstart_tracker.py's.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import msgspec

from instantstart_fs.core.status import PipelineState
from instantstart_fs.errors import UsageError

PENDING_SECONDS = 1800.0
"""How long a ``requested`` waits for the open that it led to."""
MARK_SECONDS = 3600.0
"""How long after its begin a record takes ``ready`` and ``first-token``."""
FUTURE_SECONDS = 60.0
"""How far ahead of this machine's clock a mark's time may be: another machine's clock told it."""
LATE_SECONDS = 600.0
"""A ``ready`` or ``first-token`` so long after what went before it is called late."""
SCALE_FACTOR = 3.0
"""What is only marked, and not seen, stretches the scale of a drawing to this many usual cold starts at most."""
PER_PIPELINE = 20
OVERALL = 5000
"""Records kept: of one pipeline, and of all; the oldest go first."""

Moment = Literal["requested", "ready", "first-token"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
PhaseName = Literal["scheduling", "fetching", "loading", "engine", "first-token"]


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """One cold start. ``…_after``: seconds after the first open, None while it has not happened. Sizes in bytes.

    ``state``, ``cached_bytes``, ``total_bytes``, ``weight_files``: of the load set at the first open. ``daemon_bytes``:
    what READ requests were answered with; ``passthrough_bytes``: the sizes of the files opened in passthrough, whose
    reads nobody sees. ``sealed_after``, ``staged_after``, ``opened_after``: when the last weight file was sealed,
    staged, opened for the first time. ``interrupted``: the daemon ended meanwhile. ``…_ns``: wall clock, from ``mark``.

    ``uncached_bytes``: came straight from the origin to their reader, and were not kept. ``waited_after``: the end of
    the last wait for bytes that were not here; ``waited_seconds``: the time in which at least one read so waited.
    ``fetching_seconds``: until the last weight file was sealed, and what was waited after that; None in records of
    older versions.
    """

    pipeline: str
    started_ns: int
    state: PipelineState
    cached_bytes: int = 0
    total_bytes: int = 0
    weight_files: int = 0
    opened_files: int = 0
    fetched_bytes: int = 0
    staged_bytes: int = 0
    daemon_bytes: int = 0
    passthrough_bytes: int = 0
    sealed_after: float | None = None
    staged_after: float | None = None
    opened_after: float | None = None
    read_after: float | None = None
    waits: int = 0
    slowest_wait: float = 0.0
    slowest_file: str | None = None
    errors: int = 0
    ended_after: float | None = None
    interrupted: bool = False
    requested_ns: int | None = None
    ready_ns: int | None = None
    first_token_ns: int | None = None
    uncached_bytes: int = 0
    waited_after: float | None = None
    waited_seconds: float = 0.0
    fetching_seconds: float | None = None

    @property
    def live(self) -> bool:
        return self.ended_after is None and not self.interrupted

    @property
    def loaded_after(self) -> float:
        """Seconds from the first open to the last sign that weights were being loaded."""
        signs = (self.sealed_after, self.staged_after, self.opened_after, self.read_after, self.waited_after)
        return max(sign or 0.0 for sign in signs)

    def after(self, moment: Moment) -> float | None:
        """Seconds from the first open to that mark, negative for ``requested``; None without it."""
        at = {"requested": self.requested_ns, "ready": self.ready_ns, "first-token": self.first_token_ns}[moment]
        return None if at is None else (at - self.started_ns) / 1e9


class Facts(msgspec.Struct, frozen=True):
    """A pipeline's load set when a cold start begins."""

    state: PipelineState
    cached_bytes: int
    total_bytes: int
    weight_files: int


class Phase(msgspec.Struct, frozen=True):
    """A stretch of a cold start: seconds after the first open."""

    name: PhaseName
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def phases(record: ColdStart) -> tuple[Phase, ...]:
    """The record cut into stretches that follow one another without a gap; those that took no time are left out.

    scheduling: requested → first open. fetching and loading: → the last weight file opened, staged or read. Of that
    time, fetching is what passed until the last weight file was sealed, and what reads waited for the origin after
    that; in truth the two may alternate, and each is shown in one piece. engine: → ready. first-token: → the first
    token, which also says that the engine was ready.
    """
    fetched = record.fetching_seconds
    if fetched is None:
        fetched = record.sealed_after if record.fetched_bytes else None
    ready, token = record.after("ready"), record.after("first-token")
    if ready is not None and token is not None:
        ready = min(ready, token)
    at = min(record.after("requested") or 0.0, 0.0)
    found = []
    borders: tuple[tuple[PhaseName, float | None], ...] = (
        ("scheduling", 0.0),
        ("fetching", fetched),
        ("loading", record.loaded_after),
        ("engine", ready),
        ("first-token", token),
    )
    for name, end in borders:
        if end is not None and end > at:
            found.append(Phase(name, at, end))
            at = end
    return tuple(found)


def length(record: ColdStart) -> float:
    """Seconds from the first to the last moment that is known."""
    found = phases(record)
    return found[-1].end - found[0].start if found else 0.0


def scale(records: Iterable[ColdStart]) -> float:
    """Seconds that a drawing of all of them should be wide; 0 where there is nothing to draw.

    All that was seen fits in. What was only marked may be longer: a mark that came late would leave nothing to be seen
    of the others.
    """
    lengths, seen = [], 0.0
    for record in records:
        if took := length(record):
            lengths.append(took)
            seen = max(seen, record.loaded_after)
    if not lengths:
        return 0.0
    return min(max(lengths), max(seen, SCALE_FACTOR * sorted(lengths)[(len(lengths) - 1) // 2]))


def late(record: ColdStart) -> dict[Moment, float]:
    """The marks ``ready`` and ``first-token`` that came LATE_SECONDS or more after the event before them, and by how
    much. The engine, or its first request, may have taken so long; or the mark was set late."""
    marked: dict[PhaseName, Moment] = {"engine": "ready", "first-token": "first-token"}
    found: dict[Moment, float] = {}
    for phase in phases(record):
        if phase.name in marked and phase.seconds >= LATE_SECONDS:
            moment = marked[phase.name]
            if record.after(moment) != phase.end:
                moment = "first-token"  # there is no ``ready``, or it came after the token
            found[moment] = phase.seconds
    return found


def as_plain(record: ColdStart) -> dict[str, Any]:
    """The record for `--json`: with RFC 3339 times, its phases, and which marks were ``late``."""
    found: dict[str, Any] = msgspec.to_builtins(record)
    for name in ("started", "requested", "ready", "first_token"):
        at = found.pop(f"{name}_ns")
        found[name] = None if at is None else datetime.fromtimestamp(at / 1e9, UTC).isoformat(timespec="milliseconds")
    found["phases"] = [
        {"name": phase.name, "start": round(phase.start, 6), "end": round(phase.end, 6)} for phase in phases(record)
    ]
    found["late"] = list(late(record))
    return found


def with_mark(record: ColdStart, moment: Moment, at_ns: int) -> ColdStart:
    """The earliest of its kind stays: another replica's comes later, and what was told late can be told right."""
    name = {"requested": "requested_ns", "ready": "ready_ns", "first-token": "first_token_ns"}[moment]
    known = getattr(record, name)
    return msgspec.structs.replace(record, **{name: at_ns if known is None else min(known, at_ns)})


def takes_mark(record: ColdStart, moment: Moment, at_ns: int) -> bool:
    """Whether a mark of that time is about this record and not about a later or an earlier one."""
    after = (at_ns - record.started_ns) / 1e9
    if moment == "requested":
        return -PENDING_SECONDS <= after <= 0
    return 0 <= after <= MARK_SECONDS


def check_mark(moment: Moment, at_ns: int, wall_ns: int) -> None:
    """Raises UsageError for a time that a mark cannot mean, with the clock at ``wall_ns``."""
    ahead = (at_ns - wall_ns) / 1e9
    if ahead > FUTURE_SECONDS:
        raise UsageError(
            f"the time of {moment!r} lies {ahead:.0f} s ahead of the daemon's clock: name one that has passed"
        )


def surplus(records: Iterable[ColdStart], per_pipeline: int = PER_PIPELINE, overall: int = OVERALL) -> list[ColdStart]:
    """Records to delete, oldest first."""
    kept: dict[str, int] = {}
    total = 0
    expired = []
    for record in sorted(records, key=lambda found: found.started_ns, reverse=True):
        count = kept.get(record.pipeline, 0)
        if count >= per_pipeline or total >= overall:
            expired.append(record)
        else:
            kept[record.pipeline] = count + 1
            total += 1
    return expired[::-1]
