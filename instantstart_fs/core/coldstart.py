"""The cold-start record: what happened between a pipeline's first open and its engine being fed. Pure.

Events come in with their time; records come out. A record begins with the first open of a weight file while none is
live, and stays live until the pipeline has been quiet: QUIET_SECONDS with no weight file open, or HELD_QUIET_SECONDS
with one (an engine that keeps its files mapped), or MAX_SECONDS in all. Opening, reading, waiting, fetching, staging
and closing are no quiet. So a replica that starts within half a minute after another's load belongs to the same record.

What a filesystem cannot see (the request that made the replica start, the engine being ready, the first token) is told
by ``mark``. Two clocks: ``now`` is monotonic seconds, for durations; ``wall_ns`` says when, and places the marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import msgspec

from instantstart_fs.core.status import PipelineState

QUIET_SECONDS = 30.0
HELD_QUIET_SECONDS = 600.0
MAX_SECONDS = 7200.0
PENDING_SECONDS = 1800.0
"""How long a ``requested`` waits for the open that it led to."""
MARK_SECONDS = 3600.0
"""How long after its begin a record takes ``ready`` and ``first-token``."""
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

    @property
    def live(self) -> bool:
        return self.ended_after is None and not self.interrupted

    @property
    def loaded_after(self) -> float:
        """Seconds from the first open to the last sign that weights were being loaded."""
        return max(self.sealed_after or 0.0, self.staged_after or 0.0, self.opened_after or 0.0, self.read_after or 0.0)

    def after(self, moment: Moment) -> float | None:
        """When that mark came, in seconds after the first open: negative for ``requested``. None without it."""
        at = {"requested": self.requested_ns, "ready": self.ready_ns, "first-token": self.first_token_ns}[moment]
        return None if at is None else (at - self.started_ns) / 1e9


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

    scheduling: requested → first open. fetching: → the last weight file sealed (nothing was fetched: none). loading: →
    the last weight file opened, staged or read. engine: → ready. first-token: → the first token.
    """
    fetched = record.sealed_after if record.fetched_bytes else None
    at = min(record.after("requested") or 0.0, 0.0)
    found = []
    borders: tuple[tuple[PhaseName, float | None], ...] = (
        ("scheduling", 0.0),
        ("fetching", fetched),
        ("loading", record.loaded_after),
        ("engine", record.after("ready")),
        ("first-token", record.after("first-token")),
    )
    for name, end in borders:
        if end is not None and end > at:
            found.append(Phase(name, at, end))
            at = end
    return tuple(found)


def as_plain(record: ColdStart) -> dict[str, Any]:
    """For `--json`: the record with RFC 3339 times, and its phases."""
    found: dict[str, Any] = msgspec.to_builtins(record)
    for name in ("started", "requested", "ready", "first_token"):
        at = found.pop(f"{name}_ns")
        found[name] = None if at is None else datetime.fromtimestamp(at / 1e9, UTC).isoformat(timespec="milliseconds")
    found["phases"] = [
        {"name": phase.name, "start": round(phase.start, 6), "end": round(phase.end, 6)} for phase in phases(record)
    ]
    return found


def with_mark(record: ColdStart, moment: Moment, at_ns: int) -> ColdStart:
    """The first one of its kind stays: another replica's comes later."""
    match moment:
        case "requested" if record.requested_ns is None:
            return msgspec.structs.replace(record, requested_ns=at_ns)
        case "ready" if record.ready_ns is None:
            return msgspec.structs.replace(record, ready_ns=at_ns)
        case "first-token" if record.first_token_ns is None:
            return msgspec.structs.replace(record, first_token_ns=at_ns)
        case _:
            return record


def takes_mark(record: ColdStart, moment: Moment, at_ns: int) -> bool:
    """Whether a mark of that time is about this record and not about a later or an earlier one."""
    after = (at_ns - record.started_ns) / 1e9
    if moment == "requested":
        return -PENDING_SECONDS <= after <= 0
    return 0 <= after <= MARK_SECONDS


def surplus(records: Iterable[ColdStart], per_pipeline: int = PER_PIPELINE, overall: int = OVERALL) -> list[ColdStart]:
    """What to forget, oldest first."""
    kept: dict[str, int] = {}
    total = 0
    gone = []
    for record in sorted(records, key=lambda found: found.started_ns, reverse=True):
        count = kept.get(record.pipeline, 0)
        if count >= per_pipeline or total >= overall:
            gone.append(record)
        else:
            kept[record.pipeline] = count + 1
            total += 1
    return gone[::-1]


class Facts(msgspec.Struct, frozen=True):
    """A pipeline's load set when a cold start begins."""

    state: PipelineState
    cached_bytes: int
    total_bytes: int
    weight_files: int


class _Live:
    """A record that is being written. Numbers only, since a read adds to it."""

    __slots__ = ("began", "daemon_bytes", "fetched_bytes", "last", "opened", "read_at", "record", "staged_bytes")

    def __init__(self, record: ColdStart, now: float) -> None:
        self.record = record
        self.began = now
        self.last = now
        self.opened: set[str] = set()
        self.daemon_bytes = 0
        self.fetched_bytes = 0
        self.staged_bytes = 0
        self.read_at: float | None = None

    def set(self, **changes: object) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)

    def seen(self) -> ColdStart:
        return msgspec.structs.replace(
            self.record,
            daemon_bytes=self.daemon_bytes,
            fetched_bytes=self.fetched_bytes,
            staged_bytes=self.staged_bytes,
            read_after=None if self.read_at is None else round(self.read_at - self.began, 6),
        )


class Tracker:
    """Events → records, for all pipelines. ``take_changed`` gives those that are to be written down.

    Every event is cheap, and nothing but a few words for a pipeline that is not starting.
    """

    def __init__(self) -> None:
        self._live: dict[str, _Live] = {}
        self._held: dict[str, int] = {}
        self._requested: dict[str, int] = {}
        self._changed: dict[tuple[str, int], ColdStart] = {}

    @property
    def changed(self) -> bool:
        return bool(self._changed)

    def starting(self, pipeline: str) -> ColdStart | None:
        """The record that is live, as it stands."""
        live = self._live.get(pipeline)
        return None if live is None else live.seen()

    def begins(self, pipeline: str) -> bool:
        """Whether an open now begins a record (so that its Facts are worth asking for)."""
        return pipeline not in self._live

    def opened(
        self, pipeline: str, file: str, *, size: int, passthrough: bool, now: float, wall_ns: int, facts: Facts | None
    ) -> None:
        """A weight file was opened. ``facts`` may be None unless ``begins``."""
        self._held[pipeline] = self._held.get(pipeline, 0) + 1
        live = self._live.get(pipeline)
        if live is None:
            if facts is None:
                return
            record = ColdStart(
                pipeline=pipeline,
                started_ns=wall_ns,
                state=facts.state,
                cached_bytes=facts.cached_bytes,
                total_bytes=facts.total_bytes,
                weight_files=facts.weight_files,
                requested_ns=self._take_requested(pipeline, wall_ns),
            )
            live = self._live[pipeline] = _Live(record, now)
        live.last = now
        if file not in live.opened:
            live.opened.add(file)
            live.set(
                opened_files=len(live.opened),
                opened_after=round(now - live.began, 6),
                passthrough_bytes=live.record.passthrough_bytes + (size if passthrough else 0),
            )
            self._note(live)

    def _take_requested(self, pipeline: str, wall_ns: int) -> int | None:
        at = self._requested.pop(pipeline, None)
        return at if at is not None and 0 <= wall_ns - at <= PENDING_SECONDS * 1e9 else None

    def closed(self, pipeline: str, now: float) -> None:
        """A weight file was closed."""
        held = self._held.get(pipeline, 0) - 1
        if held > 0:
            self._held[pipeline] = held
        else:
            self._held.pop(pipeline, None)
        live = self._live.get(pipeline)
        if live is not None:
            live.last = now

    def read(self, pipeline: str, count: int, now: float) -> None:
        """The daemon answered a READ with ``count`` bytes."""
        live = self._live.get(pipeline)
        if live is not None:
            live.daemon_bytes += count
            live.last = live.read_at = now

    def waited(self, pipeline: str, file: str, seconds: float, now: float, *, failed: bool = False) -> None:
        """A read waited for bytes that were not here."""
        live = self._live.get(pipeline)
        if live is None:
            return
        live.last = now
        slowest = seconds > live.record.slowest_wait
        live.set(
            waits=live.record.waits + 1,
            errors=live.record.errors + failed,
            slowest_wait=round(seconds, 6) if slowest else live.record.slowest_wait,
            slowest_file=file if slowest else live.record.slowest_file,
        )

    def fetched(self, pipeline: str, count: int, now: float) -> None:
        live = self._live.get(pipeline)
        if live is not None:
            live.fetched_bytes += count
            live.last = now

    def sealed(self, pipeline: str, now: float) -> None:
        """A weight file is complete."""
        live = self._live.get(pipeline)
        if live is not None:
            live.last = now
            live.set(sealed_after=round(now - live.began, 6))
            self._note(live)

    def staged(self, pipeline: str, count: int, now: float, *, file_done: bool) -> None:
        """``count`` bytes of a weight file came into the page cache; with ``file_done`` it is whole there."""
        live = self._live.get(pipeline)
        if live is not None:
            live.staged_bytes += count
            live.last = now
            if file_done:
                live.set(staged_after=round(now - live.began, 6))

    def mark(self, pipeline: str, moment: Moment, at_ns: int, latest: ColdStart | None) -> ColdStart | None:
        """The record that takes the mark, with it, to be written down; None when a ``requested`` waits for the next
        one, or nothing takes it (``takes_mark``). ``latest``: the pipeline's last record when none is live."""
        live = self._live.get(pipeline)
        found = live.record if live is not None else latest
        fits = found is not None and takes_mark(found, moment, at_ns)
        if found is not None and fits and (moment != "requested" or found.requested_ns is None):
            marked = with_mark(found, moment, at_ns)
            if live is not None:
                live.record = marked
                self._note(live)
                return live.seen()
            self._changed[pipeline, marked.started_ns] = marked
            return marked
        if moment == "requested":
            self._requested[pipeline] = at_ns
            while len(self._requested) > OVERALL:
                del self._requested[next(iter(self._requested))]
        return None

    def forget(self, pipeline: str) -> None:
        """It was removed."""
        for table in (self._live, self._held, self._requested):
            table.pop(pipeline, None)
        self._changed = {key: record for key, record in self._changed.items() if key[0] != pipeline}

    def tick(self, now: float) -> float:
        """End what has been quiet for long enough; when to look again (inf: not before something begins)."""
        next_look = math.inf
        for pipeline, live in list(self._live.items()):
            quiet = HELD_QUIET_SECONDS if pipeline in self._held else QUIET_SECONDS
            end = min(live.last + quiet, live.began + MAX_SECONDS)
            if now >= end:
                live.set(ended_after=round(live.last - live.began, 6))
                self._note(live)
                del self._live[pipeline]
            else:
                next_look = min(next_look, end)
        return next_look

    def _note(self, live: _Live) -> None:
        record = live.seen()
        self._changed[record.pipeline, record.started_ns] = record

    def note_live(self) -> None:
        """Have every live record written down as it stands: the daemon ends."""
        for live in self._live.values():
            self._note(live)

    def take_changed(self) -> Sequence[ColdStart]:
        """What has begun, ended or been marked since the last call, and every live record that was noted before."""
        changed, self._changed = self._changed, {}
        return list(changed.values())
