"""Backoff and Breaker."""

from __future__ import annotations

from instantstart_fs.core.retry import MAX_RETRY_AFTER, Backoff, Breaker, believed_retry_after


def test_backoff_doubles_up_to_its_cap_with_jitter_between_half_and_whole() -> None:
    backoff = Backoff(base=0.25, cap=4.0)
    assert [backoff.delay(failures, 1.0) for failures in (1, 2, 3, 5, 6, 1000)] == [0.25, 0.5, 1.0, 4.0, 4.0, 4.0]
    assert backoff.delay(3, 0.0) == 0.5
    assert backoff.delay(0, 1.0) == 0.25


def test_retry_after_is_believed_up_to_ten_minutes() -> None:
    assert believed_retry_after(None) is None
    assert believed_retry_after(-3.0) == 0.0
    assert believed_retry_after(7.0) == 7.0
    assert believed_retry_after(1e9) == MAX_RETRY_AFTER


def test_breaker_opens_after_failures_in_a_row_over_the_grace_time() -> None:
    breaker = Breaker()
    assert [breaker.failed(now) for now in (0.0, 1.0, 2.0, 4.0)] == [False] * 4
    assert breaker.closed and breaker.limit(4.0) is None
    assert breaker.failed(5.0)
    assert breaker.limit(5.0) == 0
    assert breaker.state(5.9) == "open"
    assert breaker.limit(6.0) == 1


def test_a_burst_of_resets_does_not_open_it() -> None:
    breaker = Breaker()
    assert not any(breaker.failed(10.0 + step / 1000) for step in range(64))
    assert breaker.closed


def test_any_success_ends_the_streak() -> None:
    breaker = Breaker()
    for now in range(0, 100, 2):
        assert not breaker.failed(float(now))
        assert not breaker.failed(now + 0.5)
        breaker.succeeded()


def test_two_failures_over_the_window_suffice() -> None:
    breaker = Breaker()
    assert not breaker.failed(0.0)
    assert breaker.failed(10.0)


def test_silence_counts_as_time_of_failure() -> None:
    breaker = Breaker()
    assert not breaker.failed(15.0, silent=15.0)
    assert breaker.failed(15.0, silent=15.0), "two fetches were silent for 15 s: a black hole"


def test_failed_probes_double_the_wait_up_to_a_minute() -> None:
    breaker = Breaker()
    breaker.failed(0.0)
    assert breaker.failed(10.0)
    waits = []
    for _ in range(8):
        probe = breaker.probe_at
        assert probe is not None
        assert not breaker.failed(probe - 0.1), "a straggler from before changes nothing"
        assert breaker.probe_at == probe
        assert breaker.failed(probe)
        assert breaker.probe_at is not None
        waits.append(breaker.probe_at - probe)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert breaker.succeeded()
    assert not breaker.succeeded()
    assert breaker.closed and breaker.probe_at is None and breaker.limit(0.0) is None
