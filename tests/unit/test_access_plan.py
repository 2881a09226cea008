"""What the answers of an origin mean, and when it is asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core import access
from instantstart_fs.core.access import Access, after, asks_somebody, due_in, judge, worst
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InstantStartError,
    OriginBroken,
    OriginHidden,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
)

S = 10**9
DAY = 86400.0
REFUSED, OUTAGE = AccessRefused("no"), OriginUnavailable("down")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "allowed"),
        (AccessRefused("403"), "refused"),
        (OriginHidden("private, or gone"), "refused"),
        (CredentialsUnusable("the token file cannot be read"), "unknown"),
        (OriginNotFound("no such revision"), "unknown"),
        (OriginUnavailable("down"), "unknown"),
        (OriginThrottled("later"), "unknown"),
        (OriginBroken("open"), "unknown"),
        (InstantStartError("?"), "unknown"),
    ],
)
def test_what_an_answer_says(error: InstantStartError | None, outcome: str) -> None:
    assert judge(error) == outcome


def test_of_several_sources_a_refusal_speaks_for_all() -> None:
    assert worst([]) is None
    assert worst([None, OUTAGE]) is OUTAGE
    assert worst([OUTAGE, REFUSED, None]) is REFUSED


def test_a_plain_directory_has_nobody_to_ask() -> None:
    assert not asks_somebody(["file:///data"])
    assert asks_somebody(["file:///data", "hf://org/repo"])


def test_a_refusal_counts_when_it_is_said_again() -> None:
    once = after(after(Access(), None, 10 * S), REFUSED, 20 * S)
    assert (once.verdict, once.refusals, once.since_ns) == ("allowed", 1, 20 * S)
    assert due_in(once, "p", DAY, 20 * S) == access.CONFIRM_SECONDS
    twice = after(once, REFUSED, 90 * S)
    assert (twice.verdict, twice.since_ns, twice.code) == ("refused", 20 * S, "access-refused")
    assert due_in(twice, "p", DAY, 90 * S) == access.REFUSED_SECONDS
    assert after(twice, None, 100 * S) == Access(checked_at_ns=100 * S, tried_at_ns=100 * S)


def test_no_answer_changes_no_verdict_and_is_asked_for_again_soon() -> None:
    for before in (Access(), after(Access(), None, S), after(after(Access(), REFUSED, S), REFUSED, 100 * S)):
        found = after(before, OUTAGE, 200 * S)
        assert found.verdict == before.verdict
        assert found.checked_at_ns == before.checked_at_ns
        assert due_in(found, "p", DAY, 200 * S) == access.FIRST_RETRY
        assert due_in(after(found, OUTAGE, 300 * S), "p", DAY, 300 * S) == 2 * access.FIRST_RETRY


def test_an_outage_between_two_refusals_does_not_make_up_for_one() -> None:
    found = after(after(after(Access(), None, S), REFUSED, 2 * S), OUTAGE, 3 * S)
    assert found.verdict == "allowed"
    assert after(found, REFUSED, 4 * S).verdict == "refused"
    assert after(after(found, None, 4 * S), REFUSED, 5 * S).verdict == "allowed"


def test_what_was_never_asked_or_lies_ahead_is_due() -> None:
    assert due_in(Access(), "p", DAY, 5 * S) == 0.0
    assert due_in(after(Access(), None, 50 * S), "p", DAY, 5 * S) == 0.0, "the clock was set back"


def test_those_that_began_together_drift_apart() -> None:
    found = after(Access(), None, S)
    waits = {due_in(found, f"p{number}", DAY, S) for number in range(50)}
    assert len(waits) == 50
    assert min(waits) >= 0.9 * DAY - 1 and max(waits) <= DAY


@given(
    st.lists(st.sampled_from([None, REFUSED, OUTAGE, CredentialsUnusable("x"), OriginHidden("x")]), max_size=30),
    st.floats(1.0, 90 * DAY),
)
def test_asked_when_due_on_a_fake_clock(answers: list[InstantStartError | None], period: float) -> None:
    """However it answers, it is asked again within the period; it is refused only after two refusals that nothing but
    silence separates, at least CONFIRM_SECONDS (or the period) apart; one yes ends it."""
    found, now, said, said_at = Access(), 1_000_000.0, 0, 0.0
    for error in answers:
        wait = due_in(found, "p", period, int(now * S))
        assert 0.0 <= wait <= period
        now += wait
        assert due_in(found, "p", period, int(now * S) + 1000) == 0.0
        found = after(found, error, int(now * S))
        outcome = judge(error)
        if outcome == "allowed":
            said = 0
        elif outcome == "refused":
            if said == 1:
                assert now - said_at >= min(access.CONFIRM_SECONDS, period) - 1e-3
            said, said_at = said + 1, now
        assert (found.verdict == "refused") == (said >= 2)
        assert found.code == ("" if error is None else error.code)
        now += 0.5
