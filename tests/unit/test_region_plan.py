"""core/region.py: who pulls what, how long anybody waits, what a claim is worth over time."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantstart_fs.core.claims import (
    CLAIM_STALL,
    CLAIM_TTL,
    LEAST_STILL,
    MOST_UNREADABLE,
    RENEW_SECONDS,
    WATCH_SECONDS,
    Claim,
    ClaimBudget,
    ClaimMark,
    ClaimState,
    OwnClaim,
    Take,
    looking_period,
    starting_delay,
)
from instantstart_fs.core.patience import (
    BACKGROUND_DEADLINE,
    CHUNK_DEADLINE,
    CHUNK_SLOWEST,
    FIRST_PATIENCE,
    LEAST_PATIENCE,
    MOST_PATIENCE,
    TICK_COUNTS,
    FairClock,
    Patience,
    give_up_at,
)
from instantstart_fs.core.region import GROUP_CHUNKS, MOST_LIVE, WAIT, WHOLE_PATIENCE, PullPlan, order

ROOM = 2 * GROUP_CHUNKS


def plan(chunks: int = 4 * GROUP_CHUNKS, host: str = "a", **more: int) -> PullPlan:
    made = PullPlan(host, "pin", [False] * chunks, Patience(), **more)
    made.background = True
    return made


class Tier:
    """The records and chunks of one file, as every host sees them at once. ``late``: when a put is there."""

    def __init__(self) -> None:
        self.chunks: set[int] = set()
        self.claims: dict[tuple[int, int], ClaimMark] = {}
        self.stamps: dict[int, float] = {}
        self.putting: list[tuple[float, PullPlan, int]] = []

    def put(self, host: PullPlan, chunk: int, when: float) -> None:
        self.putting.append((when, host, chunk))

    def at(self, now: float) -> None:
        """What is put by now is there."""
        done = [one for one in self.putting if one[0] <= now]
        self.putting = [one for one in self.putting if one[0] > now]
        for _, host, chunk in done:
            self.chunks.add(chunk)
            host.progressed()

    def is_putting(self, host: PullPlan, group: int) -> bool:
        return any(who is host and chunk // GROUP_CHUNKS == group for _, who, chunk in self.putting)

    def listing(self) -> tuple[set[int], dict[int, int]]:
        epochs: dict[int, int] = {}
        for group, epoch in self.claims:
            epochs[group] = max(epoch, epochs.get(group, 0))
        return set(self.chunks), epochs


def turn(
    tier: Tier,
    host: PullPlan,
    now: float,
    pulled: list[tuple[str, int]],
    *,
    most: int = 2,
    late: float = 0,
    budget: int | None = None,
) -> None:
    """What a host does in one step of time: look, claim, renew, fetch at most ``most`` chunks. ``late``: seconds until
    what it puts is there. ``budget``: None = ROOM less what it holds."""
    tier.at(now)
    host.listed(*tier.listing(), now, tier.stamps)
    for take in host.watches(8, now):
        mark = tier.claims.get((take.group, take.epoch))
        if mark is None:
            host.vanished(take.group, take.epoch)
        else:
            host.seen(take.group, take.epoch, mark, now)
    for take in host.next_claims(ROOM - host.holding if budget is None else budget, now):
        if (take.group, take.epoch) in tier.claims:
            host.lost(take.group, now)
        else:
            host.won(take.group, now)
            tier.claims[take.group, take.epoch] = host.mark(take.group)
            tier.stamps[take.group] = now
    for renewal in host.renewals(now):
        tier.claims[renewal.group, renewal.epoch] = renewal.mark
        tier.stamps[renewal.group] = now
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
            tier.put(host, chunk, now + late)
        host.came(chunk)
    tier.at(now)
    for group, epoch, whole in host.held():
        if whole and not tier.is_putting(host, group):
            host.released(group)
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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 20), hosts=st.integers(2, 6))
def test_on_a_machine_that_is_busy_each_chunk_is_pulled_once_all_the_same(seed: int, hosts: int) -> None:
    """Everybody's turns come late, what is put comes later still: nobody looks dead by that."""
    chance, tier, pulled = random.Random(seed), Tier(), []
    plans = [plan(48, f"host{number}") for number in range(hosts)]
    now = 0.0
    while not all(one.complete for one in plans):
        chance.shuffle(plans)
        for one in plans:
            turn(tier, one, now, pulled, late=chance.uniform(0, 20))
        now += chance.choice((0.5, 3.0, 12.0))
        assert now < 3600
    assert sorted(chunk for _, chunk in pulled) == list(range(48))


def test_a_claim_is_held_and_renewed_until_what_was_pulled_under_it_is_in_the_tier() -> None:
    """Else others would see neither claim nor chunk while the put is under way, and pull it again."""
    one = plan(GROUP_CHUNKS)
    one.next_claims(ROOM, 0.0)
    one.won(0, 0.0)
    for chunk in range(GROUP_CHUNKS):
        one.came(chunk)
    assert one.complete
    assert one.held() == [(0, 0, True)]
    assert [renewal.group for renewal in one.renewals(RENEW_SECONDS)] == [0]
    before = one.mark(0).done
    one.progressed()
    assert one.mark(0).done == before + 1, "what is being put is progress, too"
    one.released(0)
    assert one.held() == one.renewals(99.0) == []


def see_each(claim: Claim, mark: ClaimMark, start: float, until: float, step: float = WATCH_SECONDS) -> float:
    """Look at it again and again; when the last look was."""
    now = start
    while now + step <= until:
        now += step
        claim.look(now)
        claim.see(mark, now)
    return now


def test_a_claim_lives_while_its_record_changes() -> None:
    claim, now = Claim(0, 100.0), 100.0
    for beat in range(10):
        now += 5.0
        claim.look(now)
        claim.see(ClaimMark("b", beat, beat), now)
        assert not claim.dead(now + 5.0)
    last = see_each(claim, ClaimMark("b", 9, 9), now, now + CLAIM_TTL - 0.1)
    assert not claim.dead(last)
    last = see_each(claim, ClaimMark("b", 9, 9), last, now + CLAIM_TTL + WATCH_SECONDS)
    assert claim.dead(last)


def test_death_needs_several_looks_and_on_a_slow_machine_more_time() -> None:
    claim = Claim(0, 0.0)
    claim.see(ClaimMark("b", 1, 1), 0.0)
    for looks in range(1, LEAST_STILL + 1):
        now = 10.0 * looks
        claim.see(ClaimMark("b", 1, 1), now)
        assert claim.dead(now) == (looks == LEAST_STILL)
    assert not claim.dead(30.0, lag=8.0)


def test_a_listing_that_shows_it_renewed_saves_the_look() -> None:
    one = plan(GROUP_CHUNKS)
    one.listed([], {0: 0}, 0.0, {0: 1000.0})
    assert one.watches(9, 0.0) == [Take(0, 0)], "once, to see that it is one"
    one.seen(0, 0, ClaimMark("b", 1, 1), 0.0)
    for step in range(1, 9):
        one.listed([], {0: 0}, step * 1.0, {0: 1000.0 + step})
        assert one.watches(9, step * 1.0) == []
    for now in (11.0, 12.5, 13.0, 15.5, 18.0):
        one.listed([], {0: 0}, now, {0: 1008.0})
        for take in one.watches(9, now):
            one.seen(take.group, take.epoch, ClaimMark("b", 5, 1), now)
    assert one.next_claims(ROOM, 18.0) == [Take(0, 1)], "it is not renewed any more"


def test_listings_that_are_old_kill_nobody() -> None:
    claim = Claim(0, 0.0)
    claim.listed(1000.0, 0.0)
    for beat in range(20):
        now = 2.0 * beat
        claim.listed(1000.0, now)
        claim.see(ClaimMark("b", beat, beat), now)
        assert not claim.dead(now)


def test_a_claim_that_nobody_looked_at_is_not_dead() -> None:
    """Hosts that have a thousand claims to look at come to each every ten seconds: its owner renews it meanwhile."""
    one = plan(GROUP_CHUNKS)
    one.listed([], {0: 0}, 0.0)
    assert one.next_claims(ROOM, 10 * CLAIM_TTL) == [], "it was never looked at: look first"
    assert one.watches(9, 10 * CLAIM_TTL) == [Take(0, 0)]
    assert one.next_claims(ROOM, 10 * CLAIM_TTL) == [], "it was asked for, and not read yet"
    late = 13 * CLAIM_TTL
    one.seen(0, 0, ClaimMark("b", 1, 1), late)
    assert one.watches(9, late + CLAIM_TTL) == [Take(0, 0)]
    one.seen(0, 0, ClaimMark("b", 7, 5), late + CLAIM_TTL)
    assert one.next_claims(ROOM, late + CLAIM_TTL) == []


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


@pytest.mark.parametrize(
    "records",
    [
        [ClaimMark("a/1", 1, 5), ClaimMark("b/2", 1, 3)],
        [ClaimMark("a/1", 1, 5), ClaimMark("a/1", 2, 7)],
        [ClaimMark("a/1", 1, 5), ClaimMark("a/1", 2, 7), ClaimMark("b/2", 1, 3), ClaimMark("b/2", 2, 9)],
        [ClaimMark("a/1", 1, 5)],
    ],
)
@pytest.mark.parametrize("stamped", [False, True])
def test_old_records_that_somebody_puts_there_in_turn_keep_no_claim_alive(
    records: list[ClaimMark], stamped: bool
) -> None:
    """Who can write to the bucket and lacks the key has only those. Else nobody would take the group over, ever."""
    claim, now, looks = Claim(0, 0.0), 0.0, 0
    while not claim.dead(now, 0.1):
        now += 0.5
        if stamped:
            claim.listed(1000.0 + now, now)
        if claim.due(now):
            claim.look(now)
            claim.see(records[looks % len(records)], now)
            looks += 1
        assert now < 3 * CLAIM_STALL


def test_a_claim_that_passes_from_host_to_host_lives_with_each() -> None:
    """Who gives up removes its claim, and another makes one of the same name; or the same host does, later."""
    claim, now = Claim(0, 0.0), 0.0
    for host in ("a/1", "b/2", "c/3"):
        own = OwnClaim(0, now)
        for step in range(20):
            now += RENEW_SECONDS
            claim.see(ClaimMark(host, own.beat + step, step), now)
            assert not claim.dead(now)
    again = OwnClaim(0, now)
    assert again.beat >= own.beat + 19


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
    assert one.next_patience() == 10.0 + FIRST_PATIENCE
    assert one.take_moves(10.0 + FIRST_PATIENCE) == [(3, one.origin)]
    assert one.route(4) == WAIT


def test_a_file_that_readers_need_whole_waits_for_no_claim_that_brings_nothing() -> None:
    """Its bytes may not be served before it is proven: what another host claimed and is stuck with holds all up."""
    plan = PullPlan("a", "pin", [False] * 16, Patience())
    plan.listed([], {0: 0, 1: 0}, 0.0)
    plan.demand([0], 0.0)
    plan.demand_whole(0.0)
    assert plan.next_patience() == 1.0
    assert plan.take_moves(1.0) == [(0, plan.origin)]
    plan.came(0)
    assert plan.has_readers and plan.next_patience() == WHOLE_PATIENCE
    assert plan.take_moves(9.0) == [] and plan.next_patience() == 9.0 + WHOLE_PATIENCE, "something came"
    assert plan.take_moves(18.9) == []
    assert plan.take_moves(19.0) == [(chunk, plan.origin) for chunk in range(1, 16)]
    plan.undemand_whole()
    assert not plan.has_readers and plan.next_patience() == math.inf


def test_who_needs_some_of_a_file_waits_for_claims_of_the_rest() -> None:
    plan = PullPlan("a", "pin", [False] * 16, Patience())
    plan.listed([], {0: 0, 1: 0}, 0.0)
    plan.demand([0], 0.0)
    assert plan.take_moves(100.0) == [(0, plan.origin)] and plan.route(1) == WAIT


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


def test_chunks_of_a_tier_that_is_left_wait_for_what_upstream_tiers_say() -> None:
    one = plan(GROUP_CHUNKS, upstream=2)
    one.sealed(0)
    assert dict(one.take_moves(0.0)) == dict.fromkeys(range(GROUP_CHUNKS), 0)
    one.demand([3], 0.0)
    one.leave_own(asking=True)
    assert one.take_moves(0.0) == [] and one.next_patience() == FIRST_PATIENCE
    assert one.take_moves(FIRST_PATIENCE) == [(3, one.origin)], "no reader waits longer for that than for a claim"
    one.sealed(2)
    one.sealed(0)  # too late
    one.asked_upstream()
    assert dict(one.take_moves(1.0)) == {chunk: 2 for chunk in range(GROUP_CHUNKS) if chunk != 3}
    assert one.next_claims(ROOM, 1.0) == []


def test_what_no_upstream_tier_has_of_a_tier_that_is_left_comes_from_the_origin() -> None:
    one = plan(GROUP_CHUNKS, upstream=1)
    one.listed([1], {}, 0.0)
    one.leave_own(asking=False)
    assert dict(one.take_moves(0.0)) == dict.fromkeys(range(GROUP_CHUNKS), one.origin)


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
    now = 0.0
    while not (takes := one.next_claims(ROOM, now)):
        one.watches(1000, now)  # none of which can be read
        now += 1.0
        assert now < 2 * CLAIM_TTL
    assert [take.epoch for take in takes] == [1, 1]


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
    assert give_up_at(10.0, 10.0, demanded=False) == 10.0 + BACKGROUND_DEADLINE
    assert give_up_at(10.0, 99.0, demanded=False) == 10.0 + CHUNK_SLOWEST


def test_what_a_host_slept_through_is_not_the_tiers_silence() -> None:
    clock = FairClock(100.0)
    assert clock.look(100.05) == pytest.approx(0.05)
    assert clock.look(160.0) == pytest.approx(0.05 + TICK_COUNTS)
    assert clock.look(159.0) == clock.time


def test_a_tier_that_is_slow_with_what_nobody_waits_for_is_asked_once_more() -> None:
    one = plan(GROUP_CHUNKS)
    one.sealed()
    one.take_moves(0.0)
    assert one.slow(3, 0)
    assert one.route(3) == 0
    assert not one.slow(3, 0)
    assert one.route(3) == one.origin
    one.demand([4], 0.0)
    assert not one.slow(4, 0), "a reader waits"
    assert one.route(4) == one.origin


def test_hosts_that_start_together_leave_room_for_one_another() -> None:
    budget = ClaimBudget(8, 32)
    assert budget.left(0) == 8
    for now in range(5):
        budget.looked(now, others=1)
        budget.claimed(now)
    assert budget.left(8) == 0


def test_a_host_alone_has_more_in_hand_as_it_gets_on() -> None:
    """Who has not done half of what it has gets no more of it: the origin is slow, or others ask it as well."""
    alone = ClaimBudget(8, 32)
    for now in range(5):
        alone.looked(now, others=0)
    alone.claimed(5)
    assert alone.left(0) == 8
    alone.claimed(5)
    assert alone.left(0) == 16
    alone.claimed(5.1)
    alone.claimed(5.1)
    assert alone.left(0) == 16, "not so soon: others may show up"
    alone.claimed(5.3)
    assert alone.left(0) == 32
    for now in range(6, 10):
        alone.claimed(now)
    assert alone.left(0) == alone.left(0, putting=100) == 32
    alone.looked(10, others=1)
    assert alone.left(8) == alone.left(0, putting=8) == 0
    alone.looked(11, others=0)
    alone.claimed(11)
    assert alone.left(0) == 8
    alone.claimed(11)
    assert alone.left(0) == 16


def test_a_host_among_others_has_at_most_a_group_and_a_half_in_hand() -> None:
    """What it has in hand when it dies is pulled twice. It claims again before it has nothing to pull."""
    budget, one, now = ClaimBudget(GROUP_CHUNKS, 4 * GROUP_CHUNKS), plan(20 * GROUP_CHUNKS), 0.0
    in_hand: list[int] = []
    for _ in range(10 * GROUP_CHUNKS):
        budget.looked(now, others=1)
        for take in one.next_claims(budget.due(one.holding), now):
            one.won(take.group, now)
        in_hand.append(one.holding)
        one.came(next(chunk for chunk in range(one.chunks) if one.route(chunk) == one.origin))
        now += 0.1
    assert max(in_hand) == GROUP_CHUNKS * 3 // 2
    assert min(in_hand) > GROUP_CHUNKS // 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_a_small_pipeline_is_shared_by_all_hosts(seed: int) -> None:
    chance, tier, pulled = random.Random(seed), Tier(), []
    plans = [plan(16 * GROUP_CHUNKS, f"host{number}") for number in range(4)]
    rooms = {one.host: ClaimBudget(GROUP_CHUNKS, 2 * ROOM) for one in plans}
    now = 0.0
    while not all(one.complete for one in plans):
        chance.shuffle(plans)
        for one in plans:
            rooms[one.host].looked(now, others=one.others(now))
            turn(tier, one, now, pulled, budget=rooms[one.host].due(one.holding))
            rooms[one.host].claimed(now)
        now += 0.25
        assert now < 600
    shares = [sum(host == one.host for host, _ in pulled) for one in plans]
    assert min(shares) >= 2 * GROUP_CHUNKS, shares


def test_many_hosts_start_and_look_less_often() -> None:
    assert starting_delay(1, 0.9) == 0.0
    assert starting_delay(64, 1.0) > 1.0
    assert starting_delay(100_000, 1.0) == 2.0
    assert looking_period(10, 0.5) == 0.5
    assert 1000 / looking_period(1000, 0.5) <= 100 * 1.01
    assert looking_period(10**6, 0.5) == 10.0
