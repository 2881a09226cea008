"""The cold-start record: events on a fake clock in, records out."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.coldstart import (
    LATE_SECONDS,
    MARK_SECONDS,
    PENDING_SECONDS,
    ColdStart,
    Facts,
    Moment,
    as_plain,
    check_mark,
    late,
    length,
    phases,
    scale,
    surplus,
)
from instantstart_fs.core.coldstart_tracker import (
    HELD_QUIET_SECONDS,
    MAX_LIVE,
    MAX_SECONDS,
    QUIET_SECONDS,
    Starts,
    Tracker,
)
from instantstart_fs.errors import UsageError

COLD = Facts("cold", 0, 300, 2)
S = 1_000_000_000
"""One second in nanoseconds; the fake wall clock is the fake monotonic one plus EPOCH."""
EPOCH = 1_700_000_000


def at(seconds: float) -> int:
    return EPOCH * S + round(seconds * S)


def opened(
    tracker: Tracker, file: str, now: float, *, size: int = 100, passthrough: bool = False, wall_ns: int | None = None
) -> Starts:
    facts = COLD if tracker.begins("p", now) else None
    when = at(now) if wall_ns is None else wall_ns
    return tracker.opened("p", file, size=size, passthrough=passthrough, now=now, wall_ns=when, facts=facts)


def mark(
    tracker: Tracker, moment: Moment, now: float, *known: ColdStart, told: float | None = None, wall: float = 0.0
) -> ColdStart | None:
    """``told``: with ``--at``; ``wall``: by how much the wall clock was set meanwhile."""
    at_ns = None if told is None else at(told)
    return tracker.mark("p", moment, at_ns, known, now=now, wall_ns=at(now + wall))


def wait(tracker: Tracker, starts: Starts, file: str, since: float, now: float, *, failed: bool = False) -> None:
    tracker.waiting(starts, since)
    tracker.waited(starts, file, now - since, now, failed=failed)


def live(tracker: Tracker) -> ColdStart:
    found = tracker.starting("p")
    assert found is not None
    return found


def test_a_whole_cold_start() -> None:
    tracker = Tracker()
    starts = opened(tracker, "a", 100.0)
    wait(tracker, starts, "a", 100.05, 100.3)
    tracker.fetched("p", 100, 100.3)
    tracker.read(starts, 40, 100.4)
    tracker.waiting(starts, 100.5)
    tracker.waiting(starts, 101.5)
    tracker.waited(starts, "a", 1.5, 102.0)
    tracker.waited(starts, "b", 0.5, 102.0, failed=True)
    tracker.sealed("p", 102.5)
    opens = [starts, opened(tracker, "b", 103.0, passthrough=True), opened(tracker, "b", 103.5, passthrough=True)]
    tracker.fetched("p", 200, 104.0)
    tracker.sealed("p", 104.25)
    tracker.staged("p", 90, 104.5, file_done=False)
    tracker.staged("p", 10, 105.0, file_done=True)
    for now, starts in zip((106.0, 106.5, 107.0), opens, strict=True):
        tracker.closed(starts, now)
    assert tracker.tick(107.0 + QUIET_SECONDS - 0.1) == 107.0 + QUIET_SECONDS
    assert tracker.tick(107.0 + QUIET_SECONDS) == math.inf
    (record,) = tracker.take_changed()
    assert record == ColdStart(
        pipeline="p",
        started_ns=at(100),
        state="cold",
        total_bytes=300,
        weight_files=2,
        opened_files=2,
        fetched_bytes=300,
        staged_bytes=100,
        daemon_bytes=40,
        passthrough_bytes=100,
        sealed_after=4.25,
        staged_after=5.0,
        opened_after=3.0,
        read_after=0.4,
        waits=3,
        slowest_wait=1.5,
        slowest_file="a",
        errors=1,
        ended_after=7.0,
        waited_after=2.0,
        waited_seconds=1.75,
        fetching_seconds=4.25,
    )
    assert not record.live
    assert tracker.starting("p") is None


def test_an_open_soon_after_belongs_to_the_same_start_and_one_after_a_quiet_time_to_another() -> None:
    tracker = Tracker()
    tracker.closed(opened(tracker, "a", 0.0), 1.0)
    tracker.tick(1.0 + QUIET_SECONDS - 1)
    tracker.closed(opened(tracker, "a", QUIET_SECONDS), QUIET_SECONDS)
    tracker.tick(2 * QUIET_SECONDS)
    opened(tracker, "a", 2 * QUIET_SECONDS)
    assert [record.started_ns for record in tracker.take_changed()] == [at(0), at(2 * QUIET_SECONDS)]


def test_files_held_open_keep_a_record_live_for_longer_but_not_for_ever() -> None:
    tracker = Tracker()
    opened(tracker, "a", 0.0)
    tracker.tick(HELD_QUIET_SECONDS - 1)
    assert live(tracker).live
    tracker.tick(HELD_QUIET_SECONDS)
    assert tracker.starting("p") is None
    # A second engine, while the first one holds its file: a start of its own.
    second = opened(tracker, "a", HELD_QUIET_SECONDS + 10)
    assert live(tracker).started_ns == at(HELD_QUIET_SECONDS + 10)
    # And what the first one reads on is not the second one's.
    tracker.closed(second, HELD_QUIET_SECONDS + 11)
    tracker.tick(HELD_QUIET_SECONDS + 11 + QUIET_SECONDS)
    assert tracker.starting("p") is None


def test_a_record_that_is_never_quiet_ends() -> None:
    tracker = Tracker()
    tracker.read(opened(tracker, "a", 0.0), 1, MAX_SECONDS - 1)
    tracker.tick(MAX_SECONDS)
    assert tracker.starting("p") is None


def test_what_happens_to_a_pipeline_that_is_not_starting_is_no_record() -> None:
    tracker = Tracker()
    tracker.read((), 1, 0.0)
    tracker.fetched("p", 1, 0.0)
    tracker.sealed("p", 0.0)
    tracker.closed((), 0.0)
    assert not tracker.changed
    assert tracker.tick(1.0) == math.inf


# ---------------------------------------------------------------- marks begin and end records


def start(tracker: Tracker, now: float, *, moments: tuple[Moment, ...] = ("requested", "ready", "first-token")) -> None:
    """Five seconds of an engine: requested, open and read after 1 s, closed after 3 s, ready after 4 s, a token."""
    if "requested" in moments:
        mark(tracker, "requested", now)
    starts = opened(tracker, "a", now + 1)
    wait(tracker, starts, "a", now + 1, now + 2)
    tracker.read(starts, 100, now + 2)
    tracker.closed(starts, now + 3)
    if "ready" in moments:
        mark(tracker, "ready", now + 4)
    if "first-token" in moments:
        mark(tracker, "first-token", now + 4.5)


@pytest.mark.parametrize(
    "moments", [("requested", "ready", "first-token"), ("requested", "ready"), ("requested",), ("ready", "first-token")]
)
def test_three_starts_in_a_row_are_three_records(moments: tuple[Moment, ...]) -> None:
    tracker = Tracker()
    for now in (0.0, 6.0, 12.0):
        start(tracker, now, moments=moments)
    tracker.tick(15.0 + QUIET_SECONDS)
    records = sorted(tracker.take_changed(), key=lambda record: record.started_ns)
    assert [record.started_ns for record in records] == [at(1), at(7), at(13)]
    for record in records:
        assert not record.live and record.daemon_bytes == 100 and record.waits == 1
        assert record.after("requested") == (-1 if "requested" in moments else None)
        assert record.after("ready") == (3 if "ready" in moments else None)
        assert record.after("first-token") == (3.5 if "first-token" in moments else None)
        assert record.ended_after == (3.5 if "first-token" in moments else 2)


def test_the_first_token_ends_a_record_and_what_its_engine_reads_on_is_nobodys() -> None:
    tracker = Tracker()
    first = opened(tracker, "a", 0.0)
    marked = mark(tracker, "first-token", 2.0)
    assert marked is not None and not marked.live and marked.ended_after == 2.0
    tracker.read(first, 100, 3.0)  # its weights stay mapped, and are read lazily
    second = opened(tracker, "a", 4.0)
    tracker.read(first, 100, 5.0)
    tracker.read(second, 7, 6.0)
    tracker.closed(first, 7.0)
    assert live(tracker).daemon_bytes == 7 and live(tracker).started_ns == at(4)
    assert [record.daemon_bytes for record in tracker.take_changed()] == [0, 0]


def test_two_replicas_at_once_have_a_record_each() -> None:
    tracker = Tracker()
    mark(tracker, "requested", 0.0)
    first = opened(tracker, "a", 1.0)
    mark(tracker, "requested", 2.0)
    second = opened(tracker, "a", 3.0)
    tracker.fetched("p", 50, 3.5)
    tracker.read(first, 10, 4.0)
    tracker.read(second, 20, 4.5)
    # Which of them is ready nobody says: the one that began first.
    for moment, now in (("ready", 5.0), ("ready", 6.0), ("first-token", 7.0), ("first-token", 8.0)):
        mark(tracker, moment, now)  # type: ignore[arg-type]
    one, two = sorted(tracker.take_changed(), key=lambda record: record.started_ns)
    assert [one.after(moment) for moment in ("requested", "ready", "first-token")] == [-1, 4, 6]  # type: ignore[arg-type]
    assert [two.after(moment) for moment in ("requested", "ready", "first-token")] == [-1, 3, 5]  # type: ignore[arg-type]
    assert (one.daemon_bytes, two.daemon_bytes) == (30, 20)
    assert (one.fetched_bytes, two.fetched_bytes) == (50, 50)
    assert tracker.starting("p") is None


def test_what_a_replica_that_nobody_requested_by_name_still_loads_is_no_start_of_its_own() -> None:
    """Two load at once; the first token of one ends the record that they share."""
    tracker = Tracker()
    for file, moment in (("a", 100.0), ("a", 100.5), ("b", 101.0)):
        opened(tracker, file, moment)
    mark(tracker, "first-token", 102.0)
    rest = opened(tracker, "b", 120.0)
    assert not tracker.running("p")
    tracker.read(rest, 10, 140.0)
    tracker.closed(rest, 141.0)
    assert mark(tracker, "first-token", 142.0) is not None
    assert [record.started_ns for record in tracker.take_changed()] == [at(100.0)]
    opened(tracker, "a", 143.0)  # a third one
    opened(tracker, "b", 144.0)
    assert live(tracker).started_ns == at(143.0)
    assert live(tracker).opened_files == 2


def test_a_start_after_another_has_ended_is_one_whatever_it_opens_first() -> None:
    tracker = Tracker()
    for file, moment in (("a", 100.0), ("a", 100.5), ("b", 101.0)):
        tracker.closed(opened(tracker, file, moment), moment + 0.1)
    mark(tracker, "first-token", 102.0)
    opened(tracker, "b", 103.0)
    assert live(tracker).started_ns == at(103.0)


def test_replicas_that_come_faster_than_they_load_are_bounded() -> None:
    tracker = Tracker()
    for now in range(3 * MAX_LIVE):
        mark(tracker, "requested", now)
        opened(tracker, "a", now + 0.5)
    assert len(tracker.running("p")) == MAX_LIVE
    assert len({record.started_ns for record in tracker.take_changed()}) == 3 * MAX_LIVE


def test_requested_waits_for_the_open_that_it_led_to() -> None:
    tracker = Tracker()
    assert mark(tracker, "requested", -20) is None
    opened(tracker, "a", 0.0)
    assert live(tracker).requested_ns == at(-20)
    assert live(tracker).after("requested") == -20


def test_an_old_request_is_forgotten() -> None:
    tracker = Tracker()
    mark(tracker, "requested", -PENDING_SECONDS - 1)
    opened(tracker, "a", 0.0)
    assert live(tracker).requested_ns is None
    mark(tracker, "requested", 1.0, told=-PENDING_SECONDS)
    opened(tracker, "b", 2.0)
    assert len(tracker.running("p")) == 1


def test_a_request_told_late_goes_to_the_start_that_it_led_to() -> None:
    tracker = Tracker()
    opened(tracker, "a", 0.0)
    marked = mark(tracker, "requested", 1.0, told=-2)
    assert marked is not None and marked.requested_ns == at(-2)
    again = mark(tracker, "requested", 2.0, told=-2)
    assert again is not None and again.requested_ns == at(-2)
    # A later one is about the next start.
    assert mark(tracker, "requested", 3.0) is None
    assert live(tracker).requested_ns == at(-2)


def test_marks_told_late_find_the_record_that_they_are_about() -> None:
    tracker = Tracker()
    for now in (0.0, 10.0, 20.0):
        start(tracker, now, moments=("first-token",))
    for told in (24.0, 14.0, 4.0):
        assert mark(tracker, "ready", 30.0, told=told) is not None
        assert mark(tracker, "requested", 30.0, told=told - 3.5) is not None
    records = sorted(tracker.take_changed(), key=lambda record: record.started_ns)
    assert [record.after("ready") for record in records] == [3, 3, 3]
    assert [record.after("requested") for record in records] == [-0.5, -0.5, -0.5]


def test_what_was_told_late_can_be_told_right() -> None:
    tracker = Tracker()
    tracker.closed(opened(tracker, "a", 0.0), 4.0)
    told = mark(tracker, "ready", 21 * 60.0)
    assert told is not None and late(told) == {"ready": 21 * 60.0}
    right = mark(tracker, "ready", 21 * 60.0, told=9.0)
    assert right is not None and right.after("ready") == 9 and not late(right)


def test_the_moments_out_of_order() -> None:
    tracker = Tracker()
    opened(tracker, "a", 0.0)
    mark(tracker, "first-token", 10.0)
    record = mark(tracker, "ready", 12.0)
    assert record is not None
    assert [(phase.name, phase.end) for phase in phases(record)] == [("engine", 10.0)]
    assert mark(tracker, "ready", -1.0) is None  # before anything


def test_a_wall_clock_that_is_set_displaces_no_mark() -> None:
    tracker = Tracker()
    mark(tracker, "requested", 0.0)
    starts = opened(tracker, "a", 5.0, wall_ns=at(5 - 86400))
    tracker.closed(starts, 6.0)
    assert mark(tracker, "ready", 8.0, wall=3600.0) is not None
    record = mark(tracker, "first-token", 9.0, wall=-3600.0)
    assert record is not None
    assert [record.after(moment) for moment in ("requested", "ready", "first-token")] == [-5, 3, 4]  # type: ignore[arg-type]
    # Set back to the moment of the last one: a record of its own nonetheless.
    opened(tracker, "a", 10.0, wall_ns=at(5 - 86400))
    assert len({record.started_ns for record in tracker.take_changed()}) == 2


@pytest.mark.parametrize("moment", ["ready", "first-token"])
def test_ready_and_first_token_reach_a_record_that_has_ended(moment: Moment) -> None:
    tracker = Tracker()
    tracker.closed(opened(tracker, "a", 0.0), 0.0)
    tracker.tick(QUIET_SECONDS)
    (record,) = tracker.take_changed()
    for tracker in (tracker, Tracker()):  # noqa: B020  # the other one: after a restart
        marked = mark(tracker, moment, 90.0, record)
        assert marked is not None and marked.after(moment) == 90
        assert list(tracker.take_changed()) == [marked]
        # The first one counts; before it began, or an hour later, it is about something else.
        again = mark(tracker, moment, 95.0, marked)
        assert again is not None and again.after(moment) == 90
        assert mark(tracker, moment, 100.0, record, told=-1.0) is None
        tracker.tick(MARK_SECONDS + 1)
        assert mark(tracker, moment, MARK_SECONDS + 1, record) is None


def test_a_time_that_has_not_come_is_refused() -> None:
    check_mark("ready", at(30), at(0))
    with pytest.raises(UsageError, match="ahead of the daemon's clock"):
        check_mark("ready", at(3600), at(0))


def test_a_removed_pipeline_is_forgotten_and_its_open_files_tell_nothing() -> None:
    tracker = Tracker()
    starts = opened(tracker, "a", 0.0)
    tracker.forget("p")
    tracker.read(starts, 1, 1.0)
    wait(tracker, starts, "a", 1.0, 2.0)
    tracker.closed(starts, 3.0)
    assert not tracker.changed and tracker.tick(4.0) == math.inf


# ---------------------------------------------------------------- where the time went


def test_a_partial_cold_read_was_fetching() -> None:
    tracker = Tracker()
    starts = opened(tracker, "a", 0.0)
    wait(tracker, starts, "a", 0.1, 39.3)
    tracker.fetched("p", 50, 39.3)
    tracker.read(starts, 50, 39.3)
    assert [(phase.name, round(phase.seconds, 6)) for phase in phases(live(tracker))] == [
        ("fetching", 39.2),
        ("loading", 0.1),
    ]


def test_what_came_straight_from_the_origin_was_fetching() -> None:
    tracker = Tracker()
    starts = opened(tracker, "a", 0.0)
    for now in range(10):
        wait(tracker, starts, "a", now + 0.1, now + 1.0)
        tracker.uncached(starts, 100, now + 1.0)
        tracker.read(starts, 100, now + 1.0)
    record = live(tracker)
    assert record.uncached_bytes == 1000 and record.fetched_bytes == 0
    assert [(phase.name, round(phase.seconds, 6)) for phase in phases(record)] == [("fetching", 9.0), ("loading", 1.0)]


def test_a_wait_that_goes_on_is_seen() -> None:
    tracker = Tracker()
    starts = opened(tracker, "a", 0.0)
    tracker.waiting(starts, 1.0)
    record = tracker.starting("p", 21.0)
    assert record is not None and record.fetching_seconds == 20.0 and record.loaded_after == 21.0


def test_a_record_of_an_older_version_counts_to_the_last_seal() -> None:
    record = ColdStart(pipeline="p", started_ns=1, state="cold", fetched_bytes=1, sealed_after=4.0, read_after=6.0)
    assert [(phase.name, phase.seconds) for phase in phases(record)] == [("fetching", 4.0), ("loading", 2.0)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["wait", "fail", "read", "seal", "fetch", "open"]), st.integers(0, 40), st.integers(0, 40)
        ),
        max_size=30,
    )
)
def test_phases_are_disjoint_and_their_sum_is_the_whole(events: list[tuple[str, int, int]]) -> None:
    """Against the union of intervals, computed plainly: [0, last seal] and every wait."""
    tracker = Tracker()
    starts = opened(tracker, "a", 0.0)
    waits: list[tuple[int, int]] = []
    calls: list[tuple[int, int, str]] = []
    for kind, one, other in events:
        first, last = min(one, other), max(one, other)
        if kind in ("wait", "fail"):
            waits.append((first, last))
            calls += [(first, 0, "wait"), (last, 1, kind)]
        else:
            calls.append((first, 0, kind))
    pending: list[int] = []
    seals, fetched, signs = [0], False, [0]
    for now, order, kind in sorted(calls):
        if kind == "wait" and order == 0:
            pending.append(now)
            tracker.waiting(starts, now)
            continue
        if kind != "fetch":
            signs.append(now)
        match kind:
            case "wait" | "fail":
                tracker.waited(starts, "a", now - pending.pop(0), now, failed=kind == "fail")
            case "read":
                tracker.read(starts, 1, now)
            case "seal":
                tracker.sealed("p", now)
                seals.append(now)
            case "fetch":
                tracker.fetched("p", 1, now)
                fetched = True
            case "open":
                opened(tracker, f"file at {now}", now)
    record = live(tracker)
    seconds = range(max(seals) if fetched else 0, 41)
    waited = sum(any(first <= second < last for first, last in waits) for second in seconds)
    assert record.fetching_seconds == (max(seals) if fetched else 0) + waited
    found = phases(record)
    assert all(before.end == after.start for before, after in itertools.pairwise(found))
    assert math.fsum(phase.seconds for phase in found) == pytest.approx(max(signs))
    assert {phase.name: phase.seconds for phase in found}.get("fetching", 0.0) == record.fetching_seconds


def test_a_late_mark_does_not_ruin_the_scale() -> None:
    usual = [
        ColdStart(pipeline="p", started_ns=at(n), state="warm", read_after=4.0, ready_ns=at(n + 8)) for n in (0, 60)
    ]
    told_late = ColdStart(pipeline="p", started_ns=at(200), state="warm", read_after=4.0, ready_ns=at(200 + 21 * 60))
    assert scale(usual) == 8.0
    assert scale([*usual, told_late]) == 24.0
    assert scale([told_late]) == length(told_late)  # nothing to compare with
    # What was seen is drawn in full, however long it took.
    slow = ColdStart(pipeline="p", started_ns=at(400), state="cold", read_after=900.0)
    assert scale([*usual, slow]) == 900.0
    assert late(told_late) == {"ready": 21 * 60 - 4.0} and not late(slow) and not late(usual[0])
    assert as_plain(told_late)["late"] == ["ready"]
    waiting = ColdStart(
        pipeline="p", started_ns=0, state="warm", ready_ns=S, first_token_ns=2 * S + int(LATE_SECONDS * S)
    )
    assert list(late(waiting)) == ["first-token"]


def test_phases_of_a_whole_start() -> None:
    record = ColdStart(
        pipeline="p",
        started_ns=at(0),
        state="cold",
        fetched_bytes=1,
        sealed_after=4.0,
        opened_after=3.0,
        read_after=6.0,
        requested_ns=at(-10),
        ready_ns=at(20),
        first_token_ns=at(21),
    )
    assert [(phase.name, phase.start, phase.end) for phase in phases(record)] == [
        ("scheduling", -10.0, 0.0),
        ("fetching", 0.0, 4.0),
        ("loading", 4.0, 6.0),
        ("engine", 6.0, 20.0),
        ("first-token", 20.0, 21.0),
    ]
    assert as_plain(record)["ready"] == "2023-11-14T22:13:40.000+00:00"


@given(
    st.builds(
        ColdStart,
        pipeline=st.just("p"),
        started_ns=st.just(at(0)),
        state=st.just("cold"),
        fetched_bytes=st.integers(0, 1),
        sealed_after=st.none() | st.floats(0, 100),
        staged_after=st.none() | st.floats(0, 100),
        opened_after=st.none() | st.floats(0, 100),
        read_after=st.none() | st.floats(0, 100),
        requested_ns=st.none() | st.integers(at(-100), at(100)),
        ready_ns=st.none() | st.integers(at(0), at(100)),
        first_token_ns=st.none() | st.integers(at(0), at(100)),
    )
)
def test_phases_follow_one_another_without_a_gap(record: ColdStart) -> None:
    found = phases(record)
    assert all(phase.end > phase.start for phase in found)
    assert all(before.end == after.start for before, after in itertools.pairwise(found))
    if found:
        assert found[0].start == min(record.after("requested") or 0.0, 0.0)
        token = record.after("first-token")  # whoever answers is ready, whatever a later ``ready`` says
        ended = (record.after("ready") or 0.0) if token is None else token
        assert found[-1].end == max(0.0, record.loaded_after, ended)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), unique=True, max_size=40))
def test_the_oldest_are_surplus(starts: list[tuple[str, int]]) -> None:
    records = [ColdStart(pipeline=name, started_ns=moment, state="cold") for name, moment in starts]
    gone = surplus(records, per_pipeline=4, overall=9)
    kept = [record for record in records if record not in gone]
    assert len(kept) <= 9
    for name in "abc":
        mine = sorted(record.started_ns for record in records if record.pipeline == name)
        left = sorted(record.started_ns for record in kept if record.pipeline == name)
        assert len(left) <= 4
        assert mine[len(mine) - len(left) :] == left


def test_a_record_is_written_and_read_as_it_is() -> None:
    record = ColdStart(pipeline="p", started_ns=5, state="warm", slowest_wait=0.5, ready_ns=7)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=ColdStart) == record
