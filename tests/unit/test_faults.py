"""Which failures are asked about again, and how often."""

from __future__ import annotations

import itertools

import pytest

from instantstart_fs.core.faults import Fault, Streak
from instantstart_fs.errors import (
    LocationExpired,
    OriginIncompatible,
    OriginMisbehaved,
    OriginThrottled,
    OriginUnavailable,
)


@pytest.mark.parametrize("fault", list(Fault))
def test_a_misbehaviour_of_one_kind_in_a_row_is_final_at_last(fault: Fault) -> None:
    streak = Streak()
    for _ in range(20):
        final = streak.failed(OriginMisbehaved("http://host/x: so it is", fault=fault))
        if final is not None:
            break
    assert type(final) is OriginIncompatible and final.fault == fault
    assert "http://host/x: so it is" in final.message and "`warm`" in final.message


def test_kinds_are_counted_apart_and_bytes_end_a_row() -> None:
    streak = Streak()
    for _ in range(4):
        assert streak.failed(OriginMisbehaved("x", fault=Fault.RANGE)) is None
        assert streak.failed(OriginMisbehaved("x", fault=Fault.ENCODED)) is None
    streak.answered()
    for _ in range(20):
        assert streak.failed(OriginMisbehaved("x", fault=Fault.RANGE)) is None
        streak.answered()


def test_a_server_that_misbehaves_in_ever_other_ways_is_given_up_too() -> None:
    streak = Streak()
    kinds = itertools.cycle([Fault.RANGE, Fault.CUT, Fault.ANSWER])
    found = [streak.failed(OriginMisbehaved("x", fault=next(kinds))) for _ in range(12)]
    assert found[:11] == [None] * 11
    assert isinstance(found[11], OriginIncompatible) and "12th answer" in found[11].message


@pytest.mark.parametrize("error", [OriginUnavailable, OriginThrottled, LocationExpired])
def test_an_origin_that_is_down_or_busy_is_never_given_up(error: type[OriginUnavailable]) -> None:
    streak = Streak()
    assert all(streak.failed(error("x")) is None for _ in range(1000))


def test_what_will_never_do_is_final_at_once() -> None:
    error = OriginIncompatible("x")
    assert Streak().failed(error) is error


def test_a_misbehaviour_that_nobody_named_is_one() -> None:
    streak = Streak()
    found = [streak.failed(OriginMisbehaved("x", fault=fault)) for fault in ("", "answer", "new", "", "")]
    assert found[:4] == [None] * 4 and found[4] is not None
