"""The token bucket, against its definition: never more than burst + rate × time, and never slower than that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.ratelimit import Bucket


def test_a_rest_gives_the_burst_back_and_no_more() -> None:
    bucket = Bucket(10.0, 3.0, 100.0)
    assert [bucket.take(100.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.1, 0.2]
    assert [bucket.take(1000.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.1]


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(1.0, 1.0, 10.0)
    assert bucket.take(10.0) == 0.0
    assert bucket.take(5.0) == 1.0
    assert bucket.take(10.0) == 2.0


@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=200))
def test_never_faster_than_agreed(pauses: list[float]) -> None:
    """Whoever waits as told: in every window that begins with the first token, at most burst + rate × its length."""
    rate, burst, now = 5.0, 4.0, 0.0
    bucket = Bucket(rate, burst, now)
    for count, pause in enumerate(pauses, 1):
        now += pause
        used_at = now + bucket.take(now)
        assert count <= burst + rate * used_at + 1e-6
