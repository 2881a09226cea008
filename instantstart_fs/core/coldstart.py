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
"""Seconds that a ``requested`` waits for the open that it led to."""
MARK_SECONDS = 3600.0
"""Seconds after its begin in which a record takes ``ready`` and ``first-token``."""
FUTURE_SECONDS = 60.0
"""Seconds by which a mark's time may be ahead of this machine's clock: it was read from another machine's."""
LATE_SECONDS = 600.0
"""A ``ready`` or ``first-token`` so long after what went before it is called late."""
SCALE_FACTOR = 3.0
"""The most usual cold starts that a drawing's scale stretches to, for the sake of what was only marked and not seen."""
PER_PIPELINE = 100
OVERALL = 5000
"""Records kept: of one pipeline, and of all; the oldest go first."""

Moment = Literal["requested", "ready", "first-token"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
PhaseName = Literal[
    "scheduling", "restore", "import", "fetching", "loading", "compile", "capture", "warm-up", "engine", "first-token"
]


PHASES: tuple[PhaseName, ...] = get_args(PhaseName)


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """One cold start. ``…_after``: seconds after the first open, None while it has not happened. Sizes in bytes.

    ``state``, ``cached_bytes``, ``total_bytes``, ``weight_files``: of the load set at the first open. ``daemon_bytes``:
    what READ requests were answered with; ``passthrough_bytes``: the sizes of the files opened in passthrough, whose
    reads nobody sees. ``sealed_after``, ``staged_after``, ``opened_after``: when the last weight file was sealed,
    staged, opened for the first time. ``interrupted``: the daemon ended meanwhile. ``…_ns``: wall clock, from ``mark``.

    ``uncached_bytes``: came straight from the origin to their reader, and were not kept. ``waited_after``: the end of
    the last wait for bytes that were not here; ``waited_seconds``: the time in which at least one read so waited.
    ``start``: the id of a start by `instantstart run`, "" for one that only its opens told of. Of such a start
    ``started_ns`` is its own begin, and the seconds count from there; ``first_open_after``: of a weight file;
    ``restore_seconds``: putting a startup cache in place, with what came of it in ``restored``; ``command_after``: the
    command was begun; ``engine_phases``: what the engine's log says, seconds; ``exit_status``: of the command, where
    it ended before it was ready.
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
    start: str = ""
    first_open_after: float | None = None
    restore_seconds: float | None = None
    restored: str = ""
    command_after: float | None = None
    engine_phases: dict[str, float] = {}
    exit_status: int | None = None

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

    scheduling: requested → first open, or → the begin of `run`; then, of a start by `run`, restore and import: → first
    open. fetching and loading: → the last weight file opened, staged or read. Of that time, fetching is what passed
    until the last weight file was sealed, and what reads waited for the origin after that; in truth the two may
    alternate, and each is shown in one piece. engine: → ready; what the engine's own log says of that is taken out of
    it, as compile, capture and warm-up. first-token: → the first token, which also says that the engine was ready.
    """
    ready, token = record.after("ready"), record.after("first-token")
    if ready is not None and token is not None:
        ready = min(ready, token)
    begun = record.first_open_after if record.start else 0.0
    fetched = record.fetching_seconds
    if fetched is None:
        fetched = record.sealed_after if record.fetched_bytes else None
    loaded: float | None = record.loaded_after
    if record.start:
        loaded = None if begun is None else record.loaded_after
        fetched = None if begun is None or not record.fetched_bytes else max(fetched or 0.0, begun)
    at = min(record.after("requested") or 0.0, 0.0)
    found: list[Phase] = []
    borders: tuple[tuple[PhaseName, float | None], ...] = (
        ("scheduling", 0.0),
        ("restore", record.command_after),
        ("import", begun if record.start else None),
        ("fetching", fetched),
        ("loading", loaded),
        ("engine", ready),
        ("first-token", token),
    )
    for name, end in borders:
        if end is not None and end > at:
            found += _engine(record, at, end) if name == "engine" else [Phase(name, at, end)]
            at = end
    return tuple(found)


_TOLD: tuple[PhaseName, ...] = ("compile", "capture", "warm-up")


def _engine(record: ColdStart, start: float, end: float) -> list[Phase]:
    """Split the time from loaded to ready by the phases in the engine's log. Phases that overlap are cut."""
    found: list[Phase] = []
    at = start
    for name in _TOLD:
        seconds = min(record.engine_phases.get(name, 0.0), end - at)
        if seconds > 0:
            found.append(Phase(name, at, at + seconds))
            at += seconds
    if end > at:
        found.append(Phase("engine", at, end))
    return found


class Spread(msgspec.Struct, frozen=True):
    """The spread of a pipeline's last starts: seconds after which so many of a hundred were over; ``count``: the number
    of starts."""

    count: int
    p50: float
    p95: float
    p99: float


class PipelineSpread(msgspec.Struct, frozen=True):
    """The spreads of a pipeline. ``total``: of its whole starts; ``advice``: which phase to attack."""

    pipeline: str
    total: Spread
    advice: str


def spread(values: Iterable[float]) -> Spread | None:
    """Return percentiles by nearest rank: each is the time of a real start."""
    found = sorted(values)
    if not found:
        return None

    def at(percent: int) -> float:
        return round(found[max(0, -(-len(found) * percent // 100) - 1)], 6)

    return Spread(len(found), at(50), at(95), at(99))


def spreads(records: Iterable[ColdStart]) -> dict[str, Spread]:
    """Return the spread of ended records: of "total", and of each phase that any of them has."""
    seconds: dict[str, list[float]] = {}
    for record in records:
        if record.live or record.interrupted:
            continue
        for phase in phases(record):
            seconds.setdefault(phase.name, []).append(phase.seconds)
        if took := length(record):
            seconds.setdefault("total", []).append(took)
    return {name: found for name, values in seconds.items() if (found := spread(values)) is not None}


MEANINGS: dict[str, str] = {
    "scheduling": "requested → first open, or the begin of `run`",
    "restore": "the daemon was asked, a startup cache put in place, → the command",
    "import": "the command → first open of a weight file",
    "fetching": "until the last weight file was sealed, and reads that waited for the origin",
    "loading": "the rest, → last weight file opened, staged or read",
    "compile": "as the engine's log says",
    "capture": "as the engine's log says",
    "warm-up": "as the engine's log says",
    "engine": "the rest, → ready",
    "first-token": "→ first token",
}
"""The meaning of each phase, for people."""

ATTACK: dict[str, str] = {
    "scheduling": "the scheduler and the image, before `run` begins: keep a replica's node and image at hand",
    "restore": "the startup cache's size (`instantstart startup-cache ls`), or a daemon that is slow to answer",
    "import": "the interpreter and its imports: nothing here makes them faster; a smaller environment does",
    "fetching": "the origin's rate: `instantstart warm` before the start, or a region's tier",
    "loading": "disk to memory: `run --prefetch`, or more memory for the page cache",
    "compile": "the startup cache: `instantstart startup-cache explain` says why there was none",
    "capture": "graph capture: fewer sizes (the engine's own option)",
    "warm-up": "the engine's profiling run: its own options",
    "engine": "the engine's own initialisation",
    "first-token": "the first request: `run --probe` sends it before traffic comes",
}
"""Advice against each phase, in a few words."""


def attack(records: Iterable[ColdStart]) -> str:
    """Return one line that names the phase which takes most of the usual start, and what helps; "" if nothing is
    known."""
    found = spreads(records)
    total = found.pop("total", None)
    if total is None or not found or not total.p50:
        return ""
    name = max(found, key=lambda phase: (found[phase].p50 * found[phase].count, phase))
    share = min(100, round(100 * found[name].p50 / total.p50))
    return f"{name} takes {share} % of the usual start: {ATTACK[name]}"


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
    """Check that a mark can mean the time ``at_ns``, with the clock at ``wall_ns``. Raises UsageError."""
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
