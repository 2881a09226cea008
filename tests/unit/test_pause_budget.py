"""Demands have the line for themselves, and not for ever."""

from __future__ import annotations

from instantstart_fs.filler.pause_budget import PAUSE_SAVED, PAUSE_SHARE, PauseBudget


def test_one_demand_has_the_line_as_long_as_it_needs() -> None:
    budget = PauseBudget(2.0)
    assert budget.pause(100.0) == 102.0
    budget.end(100.5)
    assert budget.pause(200.0) == 202.0


def test_demands_without_end_have_it_for_their_share() -> None:
    budget = PauseBudget(2.0)
    paused, until, now = 0.0, 0.0, 100.0
    while now < 200.0:
        paused += max(min(until, now) - (now - 0.25), 0.0)
        until = budget.pause(now)
        now += 0.25
    assert paused <= 100 * PAUSE_SHARE + PAUSE_SAVED
    assert paused >= 100 * PAUSE_SHARE * 0.6
