"""The eviction plan."""

from __future__ import annotations

import msgspec
import pytest

from instantstart_fs.core.eviction import Budget, Candidate, is_hot, plan

BUDGET = Budget(capacity=1000, low=0.5, high=0.9)
OLD = Candidate("old", 200, 10.0)
NEWER = Candidate("newer", 200, 20.0)
NEWEST = Candidate("newest", 200, 30.0)
ALL = [NEWEST, OLD, NEWER]


def test_nothing_is_evicted_up_to_the_high_watermark() -> None:
    assert plan(900, BUDGET, ALL, 100.0) == ()


def test_least_recent_first_down_to_the_low_watermark_and_no_further() -> None:
    assert plan(901, BUDGET, ALL, 100.0) == ("old", "newer", "newest")
    assert plan(901, BUDGET, [*ALL, Candidate("new", 200, 40.0)], 100.0) == ("old", "newer", "newest")
    assert plan(901, Budget(1000, 0.8, 0.9), ALL, 100.0) == ("old",)


@pytest.mark.parametrize("shield", ["hot", "pinned", "open", "leased"])
def test_never_one_that_is_shielded(shield: str) -> None:
    shielded = msgspec.structs.replace(OLD, **{shield: True})
    assert plan(1000, BUDGET, [shielded, NEWER], 100.0) == ("newer",)
    assert plan(1000, BUDGET, [shielded], 100.0) == ()


def test_a_pipeline_without_bytes_is_not_chosen() -> None:
    assert plan(1000, BUDGET, [Candidate("empty", 0, 1.0)], 100.0) == ()


def test_needed_bytes_count_as_used() -> None:
    assert plan(850, BUDGET, ALL, 100.0) == ()
    assert plan(850, BUDGET, ALL, 100.0, needed=100)[0] == "old"


def test_a_request_from_the_future_counts_as_now() -> None:
    future = Candidate("future", 200, 1e12)
    assert plan(950, Budget(1000, 0.7, 0.9), [future, NEWEST], 100.0) == ("newest", "future")
    assert is_hot(1e12, 48.0, 100.0)
    assert not is_hot(10.0, 48.0, 100.0)
    assert is_hot(53.0, 48.0, 100.0)
