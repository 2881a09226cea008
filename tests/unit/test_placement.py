"""What a heartbeat says, packed; for how long it counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core import placement
from instantstart_fs.core.placement import Holding

SIZES = st.integers(0, 2**64 - 1)
HOLDINGS = st.lists(
    st.builds(
        Holding,
        st.binary(min_size=16, max_size=16).map(bytes.hex),
        st.binary(min_size=4, max_size=4).map(bytes.hex),
        st.sampled_from(["cold", "filling", "partial", "warm", "unverified", "error"]),
        SIZES,
        SIZES,
    ),
    unique_by=lambda holding: holding.slot,
)


@given(HOLDINGS)
def test_what_is_packed_is_found(holdings: list[Holding]) -> None:
    entries = placement.pack(holdings)
    assert placement.is_packed(entries)
    assert sorted(placement.holdings(entries), key=lambda one: one.slot) == sorted(holdings, key=lambda one: one.slot)
    for holding in holdings:
        assert placement.find(entries, holding.slot) == holding
    for slot in ("00" * 16, "80" * 16, "ff" * 16):
        assert (placement.find(entries, slot) is None) == all(holding.slot != slot for holding in holdings)


def test_a_heartbeat_is_bounded_and_keeps_the_first() -> None:
    many = [Holding(f"{number:032x}", "00000000", "warm", 1, 1) for number in range(placement.MOST_HOLDINGS + 5)]
    entries = placement.pack(many)
    assert len(entries) == placement.MOST_HOLDINGS * placement.ENTRY_BYTES
    assert placement.find(entries, many[0].slot) and not placement.find(entries, many[-1].slot)
    assert not placement.is_packed(entries + entries[: placement.ENTRY_BYTES])
    assert not placement.is_packed(entries[:-1])


def test_percent_is_whole_only_when_all_is_there() -> None:
    def percent(cached: int, total: int) -> int:
        return placement.percent(Holding("00" * 16, "00" * 4, "partial", cached, total))

    assert [percent(0, 10), percent(5, 10), percent(999_999, 1_000_000), percent(10, 10), percent(0, 0)] == [
        0,
        50,
        99,
        100,
        0,
    ]


def test_a_large_region_asks_its_tier_no_more_than_a_middling_one() -> None:
    for hosts in (1, 10, 1000, 10_000, 20_000):
        assert hosts / placement.beat_period(hosts) <= 34
        pages = -(-hosts // 1000)
        assert hosts / placement.count_period(hosts) * pages <= max(1000 / 30, 10 * pages)
        assert placement.expiry(hosts) > 2 * placement.beat_period(hosts) * (1 + placement.JITTER)
    assert placement.beat_period(1000) == placement.BEAT_SECONDS


def test_a_heartbeat_of_ones_own_name_that_lives_may_be_another_hosts() -> None:
    living = placement.expiry(1)
    others = {"one": 1000.0, "two": 1090.0}
    assert placement.namesakes(others, 1100.0, 1) == ["two", "one"]
    assert placement.namesakes(others, 1001.0 + living, 1) == ["two"], "one has gone"
