"""The cold-start record: events on a fake clock in, records out."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.coldstart import (
    HELD_QUIET_SECONDS,
    MARK_SECONDS,
    MAX_SECONDS,
    PENDING_SECONDS,
    QUIET_SECONDS,
    ColdStart,
    Facts,
    Moment,
    Tracker,
    as_plain,
    phases,
    surplus,
)

COLD = Facts("cold", 0, 300, 2)
S = 1_000_000_000
"""One second in nanoseconds; the fake wall clock is the fake monotonic one plus EPOCH."""
EPOCH = 1_700_000_000


def at(seconds: float) -> int:
    return EPOCH * S + round(seconds * S)


def opened(tracker: Tracker, file: str, now: float, *, size: int = 100, passthrough: bool = False) -> None:
    facts = COLD if tracker.begins("p") else None
    tracker.opened("p", file, size=size, passthrough=passthrough, now=now, wall_ns=at(now), facts=facts)


def live(tracker: Tracker) -> ColdStart:
    found = tracker.starting("p")
    assert found is not None
    return found


def test_a_whole_cold_start() -> None:
    tracker = Tracker()
    opened(tracker, "a", 100.0)
    tracker.waited("p", "a", 0.25, 100.3)
    tracker.fetched("p", 100, 100.3)
    tracker.read("p", 40, 100.4)
    tracker.waited("p", "a", 1.5, 102.0)
    tracker.waited("p", "b", 0.5, 102.0, failed=True)
    tracker.sealed("p", 102.5)
    opened(tracker, "b", 103.0, passthrough=True)
    opened(tracker, "b", 103.5, passthrough=True)
    tracker.fetched("p", 200, 104.0)
    tracker.sealed("p", 104.25)
    tracker.staged("p", 90, 104.5, file_done=False)
    tracker.staged("p", 10, 105.0, file_done=True)
    for now in (106.0, 106.5, 107.0):
        tracker.closed("p", now)
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
    )
    assert not record.live
    assert tracker.starting("p") is None


def test_an_open_soon_after_belongs_to_the_same_start_and_one_after_a_quiet_time_to_another() -> None:
    tracker = Tracker()
    opened(tracker, "a", 0.0)
    tracker.closed("p", 1.0)
    tracker.tick(1.0 + QUIET_SECONDS - 1)
    opened(tracker, "a", QUIET_SECONDS)
    tracker.closed("p", QUIET_SECONDS)
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
    opened(tracker, "a", HELD_QUIET_SECONDS + 10)
    assert live(tracker).started_ns == at(HELD_QUIET_SECONDS + 10)


def test_a_record_that_is_never_quiet_ends() -> None:
    tracker = Tracker()
    opened(tracker, "a", 0.0)
    tracker.read("p", 1, MAX_SECONDS - 1)
    tracker.tick(MAX_SECONDS)
    assert tracker.starting("p") is None


def test_what_happens_to_a_pipeline_that_is_not_starting_is_no_record() -> None:
    tracker = Tracker()
    tracker.read("p", 1, 0.0)
    tracker.fetched("p", 1, 0.0)
    tracker.sealed("p", 0.0)
    tracker.closed("p", 0.0)
    assert not tracker.changed
    assert tracker.tick(1.0) == math.inf


def test_requested_waits_for_the_open_that_it_led_to() -> None:
    tracker = Tracker()
    assert tracker.mark("p", "requested", at(-20), None) is None
    opened(tracker, "a", 0.0)
    assert live(tracker).requested_ns == at(-20)
    assert live(tracker).after("requested") == -20


def test_an_old_request_is_forgotten() -> None:
    tracker = Tracker()
    tracker.mark("p", "requested", at(-PENDING_SECONDS - 1), None)
    opened(tracker, "a", 0.0)
    assert live(tracker).requested_ns is None


def test_a_request_told_late_goes_to_the_start_that_it_led_to() -> None:
    tracker = Tracker()
    opened(tracker, "a", 0.0)
    marked = tracker.mark("p", "requested", at(-2), None)
    assert marked is not None and marked.requested_ns == at(-2)
    # A later one is about the next start.
    assert tracker.mark("p", "requested", at(3), None) is None
    assert live(tracker).requested_ns == at(-2)


@pytest.mark.parametrize("moment", ["ready", "first-token"])
def test_ready_and_first_token_reach_a_record_that_has_ended(moment: Moment) -> None:
    tracker = Tracker()
    opened(tracker, "a", 0.0)
    tracker.closed("p", 0.0)
    tracker.tick(QUIET_SECONDS)
    (record,) = tracker.take_changed()
    marked = tracker.mark("p", moment, at(90), record)
    assert marked is not None and marked.after(moment) == 90
    assert list(tracker.take_changed()) == [marked]
    # The first one counts; before it began, or an hour later, it is about something else.
    again = tracker.mark("p", moment, at(95), marked)
    assert again is not None and again.after(moment) == 90
    assert tracker.mark("p", moment, at(-1), record) is None
    assert tracker.mark("p", moment, at(MARK_SECONDS + 1), record) is None


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
        marks = [record.after("ready") or 0.0, record.after("first-token") or 0.0]
        assert found[-1].end == max(0.0, record.loaded_after, *marks)


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
