"""Turns events (opens, reads, chunks) into cold-start records. Pure: events come with their time, records come out.

A record begins with the first open of a weight file while none is live, and with the first one after a ``requested``.
It is live until ``first-token``, or until the pipeline has been quiet: QUIET_SECONDS with no weight file open, or
HELD_QUIET_SECONDS with one (an engine that keeps its files mapped), or MAX_SECONDS in all. Opening, reading, waiting,
fetching, staging and closing are no quiet. So of replicas that mark nothing, one that starts within half a minute after
another's load belongs to the same record.

A start by `instantstart run` has an id, and a record of its own from its begin until it is ready (or its first token
has come, if it asks for one), whatever else starts meanwhile; its marks name it.

What a filesystem cannot see (the request that made the replica start, the engine being ready, the first token) is told
by ``mark``. Where one replica is requested while another still loads, both records are live: what is opened, fetched
and staged then counts for both, since nobody can say whose it is; reads count for the records that their open did.

Two clocks: ``now`` is monotonic seconds, for durations; ``wall_ns`` says when, and places marks that name a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from instantstart_fs.core.coldstart import (
    MARK_SECONDS,
    OVERALL,
    PENDING_SECONDS,
    PER_PIPELINE,
    ColdStart,
    Facts,
    Moment,
    takes_mark,
    with_mark,
)

QUIET_SECONDS = 30.0
HELD_QUIET_SECONDS = 600.0
MAX_SECONDS = 7200.0
SHARD_GAP_SECONDS = 1.0
"""An engine that closes one weight file before it opens the next needs less than this in between."""
MAX_LIVE = 8
"""Records of one pipeline that are live at once."""


class _Live:
    """A live record. Numbers only, since each read adds to it. An open file's handle keeps the records that it belongs
    to (``Starts``), and its reads are reported with them."""

    __slots__ = (
        "began",
        "daemon_bytes",
        "ended",
        "fetched_bytes",
        "held",
        "last",
        "opened",
        "read_at",
        "record",
        "sealed_waited",
        "staged_bytes",
        "uncached_bytes",
        "waited",
        "waited_at",
        "waiting",
        "waiting_since",
    )

    def __init__(self, record: ColdStart, now: float) -> None:
        self.record = record
        self.began = now
        self.last = now
        self.ended = False
        self.held = 0
        self.opened: dict[str, int] = {}
        """Weight file → how often it was opened."""
        self.daemon_bytes = 0
        self.fetched_bytes = 0
        self.staged_bytes = 0
        self.uncached_bytes = 0
        self.read_at: float | None = None
        self.waiting = 0
        self.waiting_since = 0.0
        self.waited = 0.0
        """Seconds in which at least one read waited, without the wait that goes on."""
        self.waited_at: float | None = None
        self.sealed_waited = 0.0
        """Of those, the ones up to the last seal."""

    def set(self, **changes: object) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)

    def waited_until(self, now: float) -> float:
        return self.waited + (max(now - self.waiting_since, 0.0) if self.waiting else 0.0)

    def seen(self, now: float) -> ColdStart:
        """Return the record as of ``now``; one that has ended does not change."""
        if self.ended:
            return self.record
        waited = self.waited_until(now)
        waited_at = now if self.waiting else self.waited_at
        sealed = self.record.sealed_after if self.fetched_bytes else None
        return msgspec.structs.replace(
            self.record,
            daemon_bytes=self.daemon_bytes,
            fetched_bytes=self.fetched_bytes,
            staged_bytes=self.staged_bytes,
            uncached_bytes=self.uncached_bytes,
            read_after=self._after(self.read_at),
            waited_after=self._after(waited_at),
            waited_seconds=round(waited, 6),
            fetching_seconds=round(waited if sealed is None else sealed + waited - self.sealed_waited, 6),
        )

    def _after(self, moment: float | None) -> float | None:
        return None if moment is None else round(moment - self.began, 6)

    def loads(self, now: float) -> bool:
        """Whether somebody may still be loading, so that another start is one beside it and not the next one."""
        if self.record.ready_ns is not None:
            return False
        if self.record.start:
            return True
        return self.held > 0 or (len(self.opened) < self.record.weight_files and now - self.last < SHARD_GAP_SECONDS)

    def time_of(self, at_ns: int | None, now: float) -> int:
        """Return ``at_ns``, or now, on this record's wall clock."""
        return self.record.started_ns + round((now - self.began) * 1e9) if at_ns is None else at_ns


Starts = tuple[_Live, ...]
"""The cold starts that an open and its reads belong to: mostly none, or one."""


class Tracker:
    """Turns events into records, for all pipelines. ``take_changed`` returns those that have to be written down.

    An event is cheap, and costs a few comparisons for a pipeline that is not starting.
    """

    def __init__(self) -> None:
        self._live: dict[str, list[_Live]] = {}
        """Oldest first, never empty."""
        self._ended: dict[str, list[_Live]] = {}
        """Oldest first: marks may still come for them."""
        self._requested: dict[str, tuple[int, float]] = {}
        """Pipeline → the time of the request, on the wall clock as it was told and on the monotonic one."""
        self._changed: dict[tuple[str, int], ColdStart] = {}

    @property
    def changed(self) -> bool:
        return bool(self._changed)

    def starting(self, pipeline: str, now: float | None = None) -> ColdStart | None:
        """The latest record that is live, as it stands (``now`` None: as it stood at its last event)."""
        running = self.running(pipeline, now)
        return running[-1] if running else None

    def running(self, pipeline: str, now: float | None = None) -> list[ColdStart]:
        """Return all live records, oldest first."""
        return [live.seen(live.last if now is None else now) for live in self._live.get(pipeline, ())]

    def begins(self, pipeline: str, now: float) -> bool:
        """Whether an open now begins a record (so that its Facts are worth asking for)."""
        return pipeline not in self._live or self._is_requested(pipeline, now)

    def _is_requested(self, pipeline: str, now: float) -> bool:
        requested = self._requested.get(pipeline)
        if requested is not None and now - requested[1] > PENDING_SECONDS:
            del self._requested[pipeline]  # it led to nothing
            return False
        return requested is not None

    def opened(
        self, pipeline: str, file: str, *, size: int, passthrough: bool, now: float, wall_ns: int, facts: Facts | None
    ) -> Starts:
        """A weight file was opened; what the reads and the close of this open belong to. ``facts`` may be None unless
        ``begins``."""
        starts: Starts = ()
        if facts is not None and self.begins(pipeline, now):
            starts = self._still_loading(pipeline, file, now)
            if not starts:
                self._begin(pipeline, facts, now, wall_ns)
        starts = starts or tuple(self._live.get(pipeline, ()))
        for live in starts:
            live.last = now
            live.held += 1
            if live.record.start and live.record.first_open_after is None and not live.ended:
                live.set(first_open_after=round(now - live.began, 6))
            live.opened[file] = live.opened.get(file, 0) + 1
            if live.opened[file] == 1 and not live.ended:
                live.set(
                    opened_files=len(live.opened),
                    opened_after=round(now - live.began, 6),
                    passthrough_bytes=live.record.passthrough_bytes + (size if passthrough else 0),
                )
                self._note(live, now)
        return starts

    def _still_loading(self, pipeline: str, file: str, now: float) -> Starts:
        """The record that has just ended with a first token, if this open is of another replica that had begun to load
        within it, and was not requested by name: another file was opened more often than this one. What is left of such
        a load is no start of its own."""
        if pipeline in self._live or self._is_requested(pipeline, now) or pipeline not in self._ended:
            return ()
        live = self._ended[pipeline][-1]
        if live.record.first_token_ns is None or live.record.requested_ns is not None:
            return ()
        quiet = QUIET_SECONDS if live.held > 0 else SHARD_GAP_SECONDS
        if now - live.last >= quiet or live.opened.get(file, 0) >= max(live.opened.values(), default=0):
            return ()
        return (live,)

    def begin_start(
        self, pipeline: str, start: str, requested_ns: int | None, *, now: float, wall_ns: int, facts: Facts
    ) -> None:
        """`run` has begun one, with this id. No effect for one that is known."""
        if self._named(pipeline, start) is None:
            if requested_ns is None:
                requested_ns = self._take_requested(pipeline, now, wall_ns)
            else:
                requested_ns = min(requested_ns, wall_ns) if wall_ns - requested_ns <= PENDING_SECONDS * 1e9 else None
            self._begin(pipeline, facts, now, wall_ns, start=start, requested_ns=requested_ns)
            self._note(self._live[pipeline][-1], now)

    def _named(self, pipeline: str, start: str) -> _Live | None:
        return next((live for live in self._in_memory(pipeline) if live.record.start == start), None)

    def report(self, pipeline: str, start: str, now: float, **changes: object) -> bool:
        """Add what `run` reports to its start's record; False if there is none. ``ended`` among the changes ends it."""
        live = self._named(pipeline, start)
        if live is None:
            return False
        ended = changes.pop("ended", False)
        live.set(**changes)
        if ended and not live.ended:
            self._end(live, now - live.began)
        else:
            self._changed[pipeline, live.record.started_ns] = live.seen(now)
        return True

    def _begin(
        self,
        pipeline: str,
        facts: Facts,
        now: float,
        wall_ns: int,
        *,
        start: str = "",
        requested_ns: int | None = None,
    ) -> None:
        for live in list(self._live.get(pipeline, ())):
            if not live.loads(now) or len(self._live[pipeline]) >= MAX_LIVE:
                self._end(live)
        known = {live.record.started_ns for table in (self._live, self._ended) for live in table.get(pipeline, ())}
        started_ns = wall_ns
        while started_ns in known:  # it is the record's name
            started_ns += 1
        record = ColdStart(
            pipeline=pipeline,
            started_ns=started_ns,
            state=facts.state,
            cached_bytes=facts.cached_bytes,
            total_bytes=facts.total_bytes,
            weight_files=facts.weight_files,
            requested_ns=requested_ns if start else self._take_requested(pipeline, now, wall_ns),
            start=start,
        )
        self._live.setdefault(pipeline, []).append(_Live(record, now))

    def _take_requested(self, pipeline: str, now: float, wall_ns: int) -> int | None:
        if not self._is_requested(pipeline, now):
            return None
        told_ns, moment = self._requested.pop(pipeline)
        at_ns = wall_ns - round((now - moment) * 1e9)
        # The two agree but for what the wall clock was set by meanwhile.
        found = told_ns if abs(told_ns - at_ns) < 10**9 else at_ns
        return found if found <= wall_ns else None

    def _end(self, live: _Live, after: float | None = None) -> None:
        """End a record, ``after`` seconds after its begin; None: with its last event."""
        live.set(ended_after=round(live.last - live.began, 6) if after is None else round(after, 6))
        live.record = live.seen(live.last)
        live.ended = True
        pipeline = live.record.pipeline
        self._changed[pipeline, live.record.started_ns] = live.record
        self._live[pipeline].remove(live)
        if not self._live[pipeline]:
            del self._live[pipeline]
        ended = self._ended.setdefault(pipeline, [])
        ended.append(live)
        del ended[:-PER_PIPELINE]

    def closed(self, starts: Starts, now: float) -> None:
        """A weight file was closed that ``opened`` gave these for."""
        for live in starts:
            live.held -= 1
            live.last = now

    def read(self, starts: Starts, count: int, now: float) -> None:
        """The daemon answered a READ with ``count`` bytes."""
        for live in starts:
            live.last = now
            if not live.ended:
                live.daemon_bytes += count
                live.read_at = now

    def waiting(self, starts: Starts, now: float) -> None:
        """A read begins to wait for bytes that are not here; ``waited`` has to follow."""
        for live in starts:
            if not live.waiting:
                live.waiting_since = now
            live.waiting += 1

    def waited(self, starts: Starts, file: str, seconds: float, now: float, *, failed: bool = False) -> None:
        """A read has waited for bytes that were not here."""
        for live in starts:
            live.waiting -= 1
            if not live.waiting:
                live.waited += max(now - live.waiting_since, 0.0)
            if live.ended:
                continue
            live.last = live.waited_at = now
            slowest = seconds > live.record.slowest_wait
            live.set(
                waits=live.record.waits + 1,
                errors=live.record.errors + failed,
                slowest_wait=round(seconds, 6) if slowest else live.record.slowest_wait,
                slowest_file=file if slowest else live.record.slowest_file,
            )

    def uncached(self, starts: Starts, count: int, now: float) -> None:
        """A read got ``count`` bytes straight from the origin, which are not kept."""
        for live in starts:
            if not live.ended:
                live.uncached_bytes += count
                live.last = now

    def fetched(self, pipeline: str, count: int, now: float) -> None:
        for live in self._live.get(pipeline, ()):
            live.fetched_bytes += count
            live.last = now

    def sealed(self, pipeline: str, now: float) -> None:
        """A weight file is complete."""
        for live in self._live.get(pipeline, ()):
            live.last = now
            live.sealed_waited = live.waited_until(now)
            live.set(sealed_after=round(now - live.began, 6))
            self._note(live, now)

    def staged(self, pipeline: str, count: int, now: float, *, file_done: bool) -> None:
        """``count`` bytes of a weight file came into the page cache; with ``file_done`` it is whole there."""
        for live in self._live.get(pipeline, ()):
            live.staged_bytes += count
            live.last = now
            if file_done:
                live.set(staged_after=round(now - live.began, 6))

    def mark(
        self,
        pipeline: str,
        moment: Moment,
        at_ns: int | None,
        known: Sequence[ColdStart],
        *,
        now: float,
        wall_ns: int,
        start: str = "",
    ) -> ColdStart | None:
        """The record that takes the mark, with it, to be written down; None when a ``requested`` waits for the next
        open, or nothing takes it (``takes_mark``). ``at_ns``: None for now. ``known``: the records of the pipeline.
        ``start``: of the one with that id."""
        found: _Live | ColdStart | None
        if start:
            live = self._named(pipeline, start)
            found = live or next((record for record in known if record.start == start), None)
            if found is None:
                return None
            mark_ns = live.time_of(at_ns, now) if live is not None else wall_ns if at_ns is None else at_ns
        elif moment == "requested":
            found, mark_ns = self._that_was_requested(pipeline, at_ns, known, now)
            if found is None:
                told_ns = wall_ns if at_ns is None else at_ns
                self._requested.pop(pipeline, None)
                self._requested[pipeline] = (told_ns, now - max(wall_ns - told_ns, 0) / 1e9)
                while len(self._requested) > OVERALL:
                    del self._requested[next(iter(self._requested))]
                return None
        else:
            found, mark_ns = self._that_is_marked(pipeline, moment, at_ns, known, now, wall_ns)
            if found is None:
                return None
        if isinstance(found, ColdStart):
            marked = with_mark(found, moment, mark_ns)
            self._changed[pipeline, marked.started_ns] = marked
            return marked
        found.record = with_mark(found.record, moment, mark_ns)
        if moment == "first-token" and not found.ended:
            self._end(found, max(found.record.after("first-token") or 0.0, 0.0))
        else:
            self._note(found, now)
        return found.seen(now)

    def _that_was_requested(
        self, pipeline: str, at_ns: int | None, known: Sequence[ColdStart], now: float
    ) -> tuple[_Live | ColdStart | None, int]:
        """The first one that began after that, if nobody said before when it was requested."""
        if at_ns is None:
            return None, 0
        begun: list[_Live | ColdStart] = [*self._in_memory(pipeline), *self._not_in_memory(pipeline, known)]
        later = [found for found in begun if takes_mark(_record(found), "requested", at_ns)]
        first = min(later, key=lambda found: _record(found).started_ns, default=None)
        if first is not None and _record(first).requested_ns not in (None, at_ns):
            return None, 0
        return first, at_ns

    def _that_is_marked(
        self,
        pipeline: str,
        moment: Moment,
        at_ns: int | None,
        known: Sequence[ColdStart],
        now: float,
        wall_ns: int,
    ) -> tuple[_Live | ColdStart | None, int]:
        """The record that a mark belongs to: of several that load at once the oldest without such a mark, else the last
        one that began before it."""
        begun = [
            (live, at)
            for live in self._in_memory(pipeline)
            if takes_mark(live.record, moment, at := live.time_of(at_ns, now))
        ]
        for live, at in begun:
            if not live.ended and (live.record.ready_ns if moment == "ready" else live.record.first_token_ns) is None:
                return live, at
        if begun:
            return max(begun, key=lambda found: found[0].began)
        at = wall_ns if at_ns is None else at_ns
        older = [record for record in self._not_in_memory(pipeline, known) if takes_mark(record, moment, at)]
        return max(older, key=lambda record: record.started_ns, default=None), at

    def _in_memory(self, pipeline: str) -> list[_Live]:
        """Oldest first."""
        found = [*self._ended.get(pipeline, ()), *self._live.get(pipeline, ())]
        return sorted(found, key=lambda live: live.began)

    def _not_in_memory(self, pipeline: str, known: Sequence[ColdStart]) -> list[ColdStart]:
        mine = {live.record.started_ns for live in self._in_memory(pipeline)}
        return [record for record in known if record.started_ns not in mine]

    def forget(self, pipeline: str) -> None:
        """Drop a pipeline that was removed."""
        for live in self._live.pop(pipeline, ()):
            live.ended = True
        self._ended.pop(pipeline, None)
        self._requested.pop(pipeline, None)
        self._changed = {key: record for key, record in self._changed.items() if key[0] != pipeline}

    def tick(self, now: float) -> float:
        """End what has been quiet for long enough; when to look again (inf: not before something begins)."""
        next_look = math.inf
        for live in [live for lives in self._live.values() for live in lives]:
            quiet = HELD_QUIET_SECONDS if live.held else QUIET_SECONDS
            if live.record.start and live.record.ready_ns is None:
                quiet = MAX_SECONDS  # it imports, or compiles, and `run` will say what became of it
            end = min(live.last + quiet, live.began + MAX_SECONDS)
            if now >= end:
                self._end(live)
            else:
                next_look = min(next_look, end)
        for pipeline, ended in list(self._ended.items()):
            ended[:] = [live for live in ended if now - live.began <= MARK_SECONDS]
            if not ended:
                del self._ended[pipeline]
        return next_look

    def _note(self, live: _Live, now: float) -> None:
        record = live.seen(now)
        self._changed[record.pipeline, record.started_ns] = record

    def note_live(self, now: float) -> None:
        """Have every live record written down as it stands: the daemon ends."""
        for lives in self._live.values():
            for live in lives:
                self._note(live, now)

    def untaken(self, pipeline: str) -> list[ColdStart]:
        """Return the records that ``take_changed`` will give of this pipeline."""
        return [record for (name, _), record in self._changed.items() if name == pipeline]

    def take_changed(self) -> Sequence[ColdStart]:
        """Records that began, ended or were marked since the last call, and every live one that was saved before."""
        changed, self._changed = self._changed, {}
        return list(changed.values())


def _record(found: _Live | ColdStart) -> ColdStart:
    return found if isinstance(found, ColdStart) else found.record
