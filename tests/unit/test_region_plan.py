"""core/region.py: who pulls what, how long anybody waits, what a claim is worth over time."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from instantstart_fs.core.region import (
    CHUNK_DEADLINE,
    CHUNK_SLOWEST,
    CLAIM_STALL,
    CLAIM_TTL,
    FIRST_PATIENCE,
    GROUP_CHUNKS,
    LEAST_PATIENCE,
    MOST_LIVE,
    MOST_PATIENCE,
    MOST_UNREADABLE,
    RENEW_SECONDS,
    WAIT,
    Claim,
    ClaimMark,
    ClaimState,
    Patience,
    PullPlan,
    Take,
    give_up_at,
    order,
)

ROOM = 2 * GROUP_CHUNKS


def plan(chunks: int = 4 * GROUP_CHUNKS, host: str = "a", **more: int) -> PullPlan:
    made = PullPlan(host, "pin", [False] * chunks, Patience(), **more)
    made.background = True
    return made


class Tier:
    """The records and chunks of one file, as every host sees them at once."""

    def __init__(self) -> None:
        self.chunks: set[int] = set()
        self.claims: dict[tuple[int, int], ClaimMark] = {}

    def listing(self) -> tuple[set[int], dict[int, int]]:
        epochs: dict[int, int] = {}
        for group, epoch in self.claims:
            epochs[group] = max(epoch, epochs.get(group, 0))
        return set(self.chunks), epochs


def turn(tier: Tier, host: PullPlan, now: float, pulled: list[tuple[str, int]], most: int = 2) -> None:
    """What a host does in one step of time: look, claim, renew, fetch at most ``most`` chunks."""
    host.listed(*tier.listing(), now)
    for take in host.watches(8, now):
        mark = tier.claims.get((take.group, take.epoch))
        if mark is None:
            host.vanished(take.group, take.epoch)
        else:
            host.seen(take.group, take.epoch, mark, now)
    for take in host.next_claims(ROOM - host.holding, now):
        if (take.group, take.epoch) in tier.claims:
            host.lost(take.group, now)
        else:
            host.won(take.group, now)
            tier.claims[take.group, take.epoch] = host.mark(take.group)
    for renewal in host.renewals(now):
        tier.claims[renewal.group, renewal.epoch] = renewal.mark
    host.take_moves(now)
    taken = 0
    for chunk in range(host.chunks):
        route = host.route(chunk)
        if route == WAIT:
            continue
        if route == host.origin:
            if taken >= most:
                continue
            taken += 1
            pulled.append((host.host, chunk))
            tier.chunks.add(chunk)
        host.came(chunk)
    for group, epoch in host.take_finished():
        tier.claims.pop((group, epoch), None)


def test_every_host_walks_all_groups_in_an_order_of_its_own() -> None:
    orders = [order(f"host{number}", "pin", 40) for number in range(8)]
    assert all(sorted(one) == list(range(40)) for one in orders)
    assert len({one[0] for one in orders}) > 4
    assert order("host0", "pin", 40) == orders[0]
    assert order("host0", "other", 40) != orders[0]


@settings(max_examples=40, deadline=None)
@given(hosts=st.integers(1, 12), chunks=st.integers(1, 120), seed=st.integers(0, 1 << 20))
def test_hosts_that_start_together_pull_each_chunk_once(hosts: int, chunks: int, seed: int) -> None:
    chance, tier, pulled = random.Random(seed), Tier(), []
    plans = [plan(chunks, f"host{number}") for number in range(hosts)]
    now = 0.0
    while not all(one.complete for one in plans):
        chance.shuffle(plans)
        for one in plans:
            turn(tier, one, now, pulled)
        now += 0.5
        assert now < 600
    assert sorted(chunk for _, chunk in pulled) == list(range(chunks))
    assert tier.claims == {}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 20), deaths=st.integers(1, 5))
def test_what_dead_hosts_had_claimed_is_taken_over(seed: int, deaths: int) -> None:
    chance, tier, pulled = random.Random(seed), Tier(), []
    plans = [plan(100, f"host{number}") for number in range(6)]
    now = 0.0
    while not all(one.complete for one in plans):
        for one in plans:
            turn(tier, one, now, pulled, most=1)
        if deaths and chance.random() < 0.3:
            deaths -= 1
            plans.remove(chance.choice(plans))
        now += 0.5
        assert now < 600, "nobody took it over"
    # A chunk in hand when its host died is pulled once more; here each is in the tier at once.
    assert sorted(chunk for _, chunk in pulled) == list(range(100))


def test_a_claim_lives_while_its_record_changes() -> None:
    claim = Claim(0, 100.0)
    assert not claim.dead(100.0 + CLAIM_TTL - 0.1)
    assert claim.dead(100.0 + CLAIM_TTL)
    now = 100.0
    for beat in range(10):
        now += 5.0
        claim.see(ClaimMark("b", beat, beat), now)
        assert not claim.dead(now + 5.0)
    claim.see(ClaimMark("b", 9, 9), now + CLAIM_TTL)
    assert claim.dead(now + CLAIM_TTL)


def test_a_claim_that_nobody_looked_at_is_not_dead() -> None:
    """Hosts that have a thousand claims to look at come to each every ten seconds: its owner renews it meanwhile."""
    one = plan(GROUP_CHUNKS)
    one.listed([], {0: 0}, 0.0)
    assert one.watches(9, 0.5) == [Take(0, 0)]
    one.seen(0, 0, ClaimMark("b", 1, 1), 0.6)
    late = 3 * CLAIM_TTL
    assert one.next_claims(ROOM, late) == []
    assert one.watches(9, late) == [Take(0, 0)]
    assert one.next_claims(ROOM, late) == [], "it was asked for, and not read yet"
    one.seen(0, 0, ClaimMark("b", 7, 5), late + 0.1)
    assert one.next_claims(ROOM, late + 0.1) == []
    one.watches(9, late + CLAIM_TTL + 1)
    one.seen(0, 0, ClaimMark("b", 7, 5), late + CLAIM_TTL + 1)
    assert one.next_claims(ROOM, late + CLAIM_TTL + 1) == [Take(0, 1)]


def test_a_record_that_cannot_be_read_any_more_dies() -> None:
    one = plan(GROUP_CHUNKS)
    one.listed([], {0: 0}, 0.0)
    one.seen(0, 0, ClaimMark("b", 1, 1), 0.0)
    now, tries = 1.0, 0
    while not one.next_claims(ROOM, now):
        tries += len(one.watches(9, now))
        now += 0.5
        assert now < 3 * CLAIM_TTL
    assert tries == MOST_UNREADABLE


def test_an_owner_that_renews_and_brings_nothing_is_stuck() -> None:
    claim, now = Claim(0, 0.0), 0.0
    while now < CLAIM_STALL - RENEW_SECONDS:
        now += RENEW_SECONDS
        claim.see(ClaimMark("b", int(now), 0), now)
        assert not claim.dead(now)
    claim.see(ClaimMark("b", 99, 0), CLAIM_STALL + 3)
    assert claim.dead(CLAIM_STALL + 3)


def test_a_readers_chunk_waits_as_long_as_a_fetch_takes() -> None:
    one = plan()
    one.listed([], {0: 0}, 0.0)
    one.demand([3], 10.0)
    assert one.take_moves(10.0 + FIRST_PATIENCE - 0.01) == []
    assert one.next_time(10.0) <= 10.0 + FIRST_PATIENCE
    assert one.take_moves(10.0 + FIRST_PATIENCE) == [(3, one.origin)]
    assert one.route(4) == WAIT


def test_patience_stays_within_its_bounds() -> None:
    patience = Patience()
    patience.took(0.001)
    assert patience.seconds == LEAST_PATIENCE
    for _ in range(50):
        patience.took(60.0)
    assert patience.seconds == MOST_PATIENCE


def test_what_a_reader_waits_for_is_claimed_first() -> None:
    one = plan(chunks=20 * GROUP_CHUNKS)
    first = order("a", "pin", 20)[0]
    wanted = (first + 7) % 20
    one.demand([wanted * GROUP_CHUNKS + 2], 0.0)
    assert next(take.group for take in one.next_claims(ROOM, 0.0)) == wanted


def test_without_background_only_readers_groups_are_claimed() -> None:
    one = plan(chunks=20 * GROUP_CHUNKS)
    one.background = False
    assert one.next_claims(ROOM, 0.0) == []
    one.demand([0], 0.0)
    assert [take.group for take in one.next_claims(ROOM, 0.0)] == [0]


def test_a_won_group_is_pulled_and_what_the_tier_has_of_it_is_taken() -> None:
    one = plan(GROUP_CHUNKS)
    one.listed([0, 1], {}, 0.0)
    assert one.next_claims(ROOM, 0.0)[0].group == 0
    one.won(0, 0.0)
    routes = dict(one.take_moves(0.0))
    assert [routes[chunk] for chunk in range(GROUP_CHUNKS)] == [0, 0] + [one.origin] * (GROUP_CHUNKS - 2)


def test_what_a_tier_does_not_give_goes_to_the_next_source_chunk_by_chunk() -> None:
    one = plan(GROUP_CHUNKS, upstream=2)
    one.sealed(0)
    one.sealed(2)
    assert dict(one.take_moves(0.0)) == dict.fromkeys(range(GROUP_CHUNKS), 0)
    one.failed(5, 0)
    assert one.take_moves(0.0) == [(5, 2)]  # source 1 has nothing
    one.failed(5, 2)
    assert one.take_moves(0.0) == [(5, one.origin)]
    assert one.route(4) == 0


def test_a_chunk_that_the_tier_failed_is_not_asked_of_it_again_by_a_listing() -> None:
    one = plan(GROUP_CHUNKS)
    one.listed([5], {}, 0.0)
    one.failed(5, 0)
    one.take_moves(0.0)
    one.listed([5], {}, 1.0)
    assert one.take_moves(1.0) == []
    assert one.route(5) == one.origin


def test_a_tier_that_is_given_up_sends_everything_to_the_origin() -> None:
    one = plan()
    one.listed([1], {2: 0}, 0.0)
    one.give_up()
    assert dict(one.take_moves(0.0)) == dict.fromkeys(range(one.chunks), one.origin)
    assert one.next_claims(ROOM, 0.0) == []


def test_a_tier_without_conditional_writes_makes_everybody_pull() -> None:
    one = plan(GROUP_CHUNKS)
    one.next_claims(ROOM, 0.0)
    one.unclaimed(0)
    assert one.state(0) is ClaimState.ADVISORY
    assert dict(one.take_moves(0.0)) == dict.fromkeys(range(GROUP_CHUNKS), one.origin)


def test_thousands_of_claims_of_nobody_hold_up_no_reader_and_die() -> None:
    one = plan(1000 * GROUP_CHUNKS)
    one.listed([], dict.fromkeys(range(1000), 0), 0.0)
    assert one.next_claims(ROOM, 0.0) == []
    one.demand([0], 0.0)
    assert one.take_moves(MOST_PATIENCE) == [(0, one.origin)]
    assert [take.epoch for take in one.next_claims(ROOM, CLAIM_TTL)] == [1, 1]


def test_a_claim_that_nobody_of_the_region_wrote_is_nobodys() -> None:
    one = plan(GROUP_CHUNKS)
    one.listed([], {0: 0xFFFF}, 0.0)
    assert one.watches(1, 0.0)
    one.forged(0, 0xFFFF)
    assert dict(one.take_moves(0.0)) == dict.fromkeys(range(GROUP_CHUNKS), one.origin)
    one.listed([], {0: 0xFFFF}, 1.0)
    assert one.state(0) is ClaimState.ADVISORY


def test_a_listing_that_names_what_is_gone_makes_nobody_wait_for_ever() -> None:
    one, now = plan(GROUP_CHUNKS), 0.0
    while one.route(0) == WAIT:
        one.listed([], {0: 0}, now)
        for take in one.watches(1, now):
            one.vanished(take.group, take.epoch)
        one.take_moves(now)
        now += 1.0
        assert now < 20


def test_a_region_pulls_a_file_with_so_many_claims_at_most() -> None:
    one = plan(100 * GROUP_CHUNKS)
    one.listed([], dict.fromkeys(range(MOST_LIVE), 0), 0.0)
    assert one.next_claims(1000, 0.0) == []


def test_claims_of_groups_that_do_not_exist_are_nothing() -> None:
    one = plan(GROUP_CHUNKS)
    one.listed([-1, GROUP_CHUNKS, 10**9], {-1: 0, 1: 0, 10**9: 3}, 0.0)
    assert one.watches(10, 0.0) == []
    assert one.take_moves(0.0) == []


def test_a_lost_chunk_is_fetched_again() -> None:
    one = plan(GROUP_CHUNKS)
    one.sealed()
    one.take_moves(0.0)
    one.came(2)
    one.left(2)
    assert one.take_moves(0.0) == [(2, 0)]


def test_a_fetch_from_a_tier_is_given_up_in_bounded_time() -> None:
    assert give_up_at(10.0, 10.0, demanded=True) == 10.0 + CHUNK_DEADLINE
    assert give_up_at(10.0, 11.9, demanded=True) == 11.9 + CHUNK_DEADLINE
    assert give_up_at(10.0, 99.0, demanded=True) == 10.0 + 2 * CHUNK_DEADLINE
    assert give_up_at(10.0, 99.0, demanded=False) == 10.0 + CHUNK_SLOWEST
