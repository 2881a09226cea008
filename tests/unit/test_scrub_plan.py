"""When which pipeline is scrubbed, and when that rests."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.scrub import Activity, IdleDetector, ScrubCandidate, ScrubProgress, next_pass, overdue

DAY = 86400.0


def test_the_longest_unproven_pipeline_comes_first() -> None:
    accounts = [
        ScrubCandidate("new", 1, 9 * DAY),
        ScrubCandidate("old", 1, 2 * DAY),
        ScrubCandidate("older", 1, 1 * DAY),
    ]
    assert next_pass(accounts, 5 * DAY, 10 * DAY) == ("older", 0.0)
    assert next_pass(accounts[:2], 5 * DAY, 10 * DAY) == ("old", 0.0)
    assert next_pass(accounts[:1], 5 * DAY, 10 * DAY) == (None, 4 * DAY)


def test_what_holds_nothing_is_never_due() -> None:
    assert next_pass([ScrubCandidate("cold", 0, 0.0)], DAY, 100 * DAY) == (None, math.inf)
    assert next_pass([], DAY, 100 * DAY) == (None, math.inf)
    assert overdue([ScrubCandidate("cold", 0, 0.0)], DAY, 100 * DAY) == 0.0


def test_a_time_that_has_not_come_proves_nothing() -> None:
    """The wall clock was ahead when it was noted, or is behind now."""
    assert next_pass([ScrubCandidate("p", 1, 20 * DAY)], 5 * DAY, 10 * DAY) == ("p", 0.0)


def test_how_late_the_latest_is() -> None:
    assert overdue([ScrubCandidate("a", 1, 0.0), ScrubCandidate("b", 1, 3 * DAY)], 5 * DAY, 6 * DAY) == DAY
    assert overdue([ScrubCandidate("a", 1, 2 * DAY)], 5 * DAY, 6 * DAY) == 0.0


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(0, 100), min_size=1, max_size=8),
    st.floats(0.5, 50),
    st.floats(0.01, 3),
)
def test_nobody_waits_longer_than_the_period_and_one_round(
    proven: dict[str, float], period: float, each: float
) -> None:
    """A fake clock goes on with every pass: whoever is due is read after everybody else's pass at the latest."""
    now, proven = 100.0, dict(proven)
    for _ in range(40):
        accounts = [ScrubCandidate(name, 1, at) for name, at in proven.items()]
        due, wait = next_pass(accounts, period, now)
        if due is None:
            assert wait > 0
            now += wait
            continue
        assert now - proven[due] >= period * (1 - 1e-9)
        assert proven[due] == min(proven.values())
        proven[due] = now
        now += each
    bound = max(100.0, period) + (len(proven) + 1) * each
    assert overdue([ScrubCandidate(name, 1, at) for name, at in proven.items()], period, now) <= bound


def test_a_pass_goes_on_in_its_generation_and_begins_anew_in_another() -> None:
    first = ScrubProgress().begun(3, 100).done(7)
    assert first.under_way and first.begun(3, 200) == first
    assert first.begun(4, 200) == ScrubProgress(0, 200, 4, 0)
    assert first.finished() == ScrubProgress(proven_at_ns=100)
    assert first.finished().begun(3, 300) == ScrubProgress(100, 300, 3, 0)


def test_it_rests_while_anybody_wants_anything_and_for_a_while_after() -> None:
    quiet = IdleDetector(30.0)
    assert quiet.observe(Activity(5, busy=False), 0.0) == 0.0, "what happened before it looked is no demand"
    assert quiet.observe(Activity(6, busy=False), 10.0) == 30.0
    assert quiet.observe(Activity(6, busy=False), 25.0) == 15.0
    assert quiet.observe(Activity(6, busy=True), 39.0) == 30.0
    assert quiet.observe(Activity(6, busy=False), 68.0) == 1.0
    assert quiet.observe(Activity(6, busy=False), 69.0) == 0.0
    assert IdleDetector(30.0).observe(Activity(0, busy=True), 0.0) == 30.0
