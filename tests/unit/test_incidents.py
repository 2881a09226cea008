"""One event that many notice is said once, and counted."""

from __future__ import annotations

from instantstart_fs.core.incidents import QUIET_SECONDS, REMIND_SECONDS, Incident


def test_it_is_said_once_and_then_from_time_to_time() -> None:
    incident = Incident(0.0)
    said = [now for now in range(1000) if incident.noticed(float(now))]
    assert said == [0, REMIND_SECONDS, 3 * REMIND_SECONDS, 7 * REMIND_SECONDS, 15 * REMIND_SECONDS]
    assert incident.count == 1000


def test_its_end_is_said_where_more_was_noticed_than_said() -> None:
    incident = Incident(0.0)
    incident.noticed(0.0)
    assert not incident.over(1.0)
    incident.noticed(2.0)
    assert incident.over(3.0)
    assert not incident.over(4.0)


def test_what_comes_and_goes_is_one_event() -> None:
    incident = Incident(0.0)
    lines = 0
    for step in range(50):
        lines += incident.noticed(float(step))
        lines += incident.over(step + 0.5)
    assert lines == 2


def test_what_comes_back_after_a_while_is_another() -> None:
    incident = Incident(0.0)
    incident.noticed(0.0)
    incident.noticed(0.1)
    incident.over(1.0)
    assert not incident.ended(1.0) and incident.ended(1.0 + QUIET_SECONDS)
    assert incident.noticed(1.0 + QUIET_SECONDS) and incident.count == 1
