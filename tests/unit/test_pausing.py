"""Demands have the line for themselves, and not for ever."""

from __future__ import annotations

from instantstart_fs.filler.pausing import PAUSE_SAVED, PAUSE_SHARE, Pausing


def test_one_demand_has_the_line_as_long_as_it_needs() -> None:
    pausing = Pausing(2.0)
    assert pausing.pause(100.0) == 102.0
    pausing.end(100.5)
    assert pausing.pause(200.0) == 202.0


def test_demands_without_end_have_it_for_their_share() -> None:
    pausing = Pausing(2.0)
    paused, until, now = 0.0, 0.0, 100.0
    while now < 200.0:
        paused += max(min(until, now) - (now - 0.25), 0.0)
        until = pausing.pause(now)
        now += 0.25
    assert paused <= 100 * PAUSE_SHARE + PAUSE_SAVED
    assert paused >= 100 * PAUSE_SHARE * 0.6
