"""The fill plan's decisions, one by one. Generated histories are in tests/model."""

from __future__ import annotations

import time

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.fillqueue import Request


def chunk_map(chunks: int) -> ChunkMap:
    return ChunkMap(chunks, 1)


def started(plan: FillPlan[str], now: float = 0.0) -> list[tuple[str, int, bool]]:
    return [(request.key, request.chunk, request.demand) for request in plan.next_requests(now)]


def land(plan: FillPlan[str], key: str, present: ChunkMap, *chunks: int) -> None:
    for chunk in chunks:
        present.add(chunk)
        plan.arrived(key, chunk)


def test_background_fills_in_the_given_order_up_to_the_pool() -> None:
    plan: FillPlan[str] = FillPlan(3)
    maps = {name: chunk_map(2) for name in "ab"}
    for name in "ab":
        plan.add(name, "p", "o", maps[name])
    plan.set_background("p", ["b", "a"])
    assert started(plan) == [("b", 0, False), ("b", 1, False), ("a", 0, False)]
    assert started(plan) == []
    land(plan, "b", maps["b"], 0)
    assert started(plan) == [("a", 1, False)]
    land(plan, "b", maps["b"], 1)
    land(plan, "a", maps["a"], 0, 1)
    assert started(plan) == [] and plan.in_flight("o") == 0 and plan.queued() == 0


def test_demand_goes_ahead_of_background_and_may_exceed_the_pool() -> None:
    plan: FillPlan[str] = FillPlan(2, headroom=1)
    present = chunk_map(100)
    plan.add("a", "p", "o", present)
    plan.set_background("p", ["a"])
    assert started(plan) == [("a", 0, False), ("a", 1, False)]
    assert plan.demand("a", [99])
    assert started(plan) == [("a", 99, True)]
    plan.demand("a", [50])
    assert started(plan) == [], "the headroom is used up"
    land(plan, "a", present, 0)
    assert started(plan) == [("a", 50, True)], "a free place goes to demand"
    land(plan, "a", present, 1)
    assert started(plan) == [], "and background waits until the pool has room again"


def test_background_goes_on_behind_the_demanded_chunk_and_round_the_end() -> None:
    plan: FillPlan[str] = FillPlan(1, headroom=0)
    present = chunk_map(4)
    plan.add("a", "p", "o", present)
    plan.demand("a", [2])
    plan.set_background("p", ["a"])
    seen = []
    while requests := started(plan):
        ((_, chunk, _),) = requests
        seen.append(chunk)
        land(plan, "a", present, chunk)
    assert seen == [2, 3, 0, 1]


def test_the_demanded_file_goes_first_whatever_the_order_says() -> None:
    plan: FillPlan[str] = FillPlan(1, headroom=0)
    maps = {name: chunk_map(2) for name in "abc"}
    for name in "abc":
        plan.add(name, "p", "o", maps[name])
    plan.demand("c", [0])
    plan.set_background("p", ["a", "b", "c"])
    seen = []
    while requests := started(plan):
        ((key, chunk, _),) = requests
        seen.append((key, chunk))
        land(plan, key, maps[key], chunk)
    assert seen == [("c", 0), ("c", 1), ("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_a_demand_while_it_fills_moves_its_file_to_the_front() -> None:
    plan: FillPlan[str] = FillPlan(1, headroom=0)
    maps = {name: chunk_map(3) for name in "ab"}
    for name in "ab":
        plan.add(name, "p", "o", maps[name])
    plan.set_background("p", ["a", "b"])
    assert started(plan) == [("a", 0, False)]
    plan.demand("b", [1])
    land(plan, "a", maps["a"], 0)
    assert started(plan) == [("b", 1, True)]
    land(plan, "b", maps["b"], 1)
    assert started(plan) == [("b", 2, False)]


def test_single_flight() -> None:
    plan: FillPlan[str] = FillPlan(4)
    present = chunk_map(4)
    plan.add("a", "p", "o", present)
    plan.demand("a", [1, 1])
    plan.demand("a", [1])
    assert started(plan) == [("a", 1, True)]
    assert not plan.demand("a", [1])
    assert started(plan) == []
    land(plan, "a", present, 1)
    assert not plan.demand("a", [1])
    assert started(plan) == []


def test_fair_share_between_pipelines() -> None:
    plan: FillPlan[str] = FillPlan(4)
    maps = {name: chunk_map(100) for name in "ab"}
    plan.add("a", "p", "o", maps["a"])
    plan.set_background("p", ["a"])
    assert [key for key, _, _ in started(plan)] == ["a"] * 4
    plan.add("b", "q", "o", maps["b"])
    plan.set_background("q", ["b"])
    for chunk in range(4):
        land(plan, "a", maps["a"], chunk)
    assert sorted(key for key, _, _ in started(plan)) == ["a", "a", "b", "b"]


def test_pools_are_apart() -> None:
    plan: FillPlan[str] = FillPlan(2)
    plan.add("a", "p", "dead", chunk_map(100))
    plan.add("b", "q", "well", chunk_map(100))
    plan.set_background("p", ["a"])
    plan.set_background("q", ["b"])
    assert sorted(key for key, _, _ in started(plan)) == ["a", "a", "b", "b"]
    plan.set_limit("dead", 0)
    plan.failed("a", 0)
    plan.failed("a", 1)
    assert started(plan) == []
    plan.set_limit("dead", 1)
    assert started(plan) == [("a", 0, False)], "one probe"


def test_a_failure_holds_the_file_and_its_chunk_comes_first_again() -> None:
    plan: FillPlan[str] = FillPlan(1, headroom=0)
    maps = {name: chunk_map(3) for name in "ab"}
    for name in "ab":
        plan.add(name, "p", "o", maps[name])
    plan.set_background("p", ["a", "b"])
    assert started(plan) == [("a", 0, False)]
    plan.failed("a", 0, held_until=10.0)
    assert plan.next_time(0.0) == 10.0
    assert started(plan) == [("b", 0, False)], "the others of the pipeline go on"
    land(plan, "b", maps["b"], 0)
    assert started(plan, 10.0) == [("a", 0, False)]


def test_a_failed_demand_stays_a_demand() -> None:
    plan: FillPlan[str] = FillPlan(1, headroom=0)
    plan.add("a", "p", "o", chunk_map(9))
    plan.set_background("p", ["a"])
    assert started(plan) == [("a", 0, False)]
    plan.demand("a", [0])
    plan.failed("a", 0)
    assert started(plan) == [("a", 0, True)]


def test_every_demand_outlives_a_failed_flight() -> None:
    plan: FillPlan[str] = FillPlan(3, 1)
    present = chunk_map(5)
    plan.add("a", "p", "o", present)
    plan.set_background("p", ["a"])
    assert started(plan) == [("a", 0, False), ("a", 1, False), ("a", 2, False)]
    plan.demand("a", [0])
    plan.demand("a", [1])
    plan.set_background("p", [])
    for _ in range(3):
        for chunk in (0, 1, 2):
            plan.failed("a", chunk)
        assert started(plan) == [("a", 0, True), ("a", 1, True)], "both, and what nobody waits for is not asked again"
    land(plan, "a", present, 0, 1)
    assert started(plan) == []


def test_demands_outlive_a_move_a_hold_and_lost_bytes() -> None:
    plan: FillPlan[str] = FillPlan(3, 1)
    present = chunk_map(5)
    plan.add("a", "p", "tier", present)
    plan.set_background("p", ["a"])
    assert len(started(plan)) == 3
    plan.demand("a", [0, 1])
    plan.set_background("p", [])
    plan.move("a", "origin")
    plan.failed("a", 0, held_until=5.0)
    plan.failed("a", 1)
    plan.refill("a")
    assert started(plan, 4.9) == []
    assert plan.next_time(4.9) == 5.0
    assert started(plan, 5.0) == [("a", 0, True), ("a", 1, True)]


def test_what_nobody_waits_for_any_more_is_not_asked_for_again() -> None:
    plan: FillPlan[str] = FillPlan(1, 0)
    plan.add("a", "p", "o", chunk_map(5))
    plan.demand("a", [0, 1])
    assert started(plan) == [("a", 0, True)]
    plan.undemand("a", [0, 1])
    plan.failed("a", 0)
    assert started(plan) == [] and plan.queued() == 0
    plan.undemand("gone", [0])


def test_a_wait_for_the_whole_file_outlives_the_background_order() -> None:
    plan: FillPlan[str] = FillPlan(2, 0)
    maps = {name: chunk_map(2) for name in "ab"}
    for name in "ab":
        plan.add(name, "p", "o", maps[name])
    plan.demand_whole("a")
    plan.set_background("p", ["b"])
    assert started(plan) == [("a", 0, False), ("a", 1, False)], "and it stays in front"
    plan.undemand_whole("a")
    plan.set_background("p", ["b"])
    plan.failed("a", 0)
    plan.failed("a", 1)
    assert started(plan) == [("b", 0, False), ("b", 1, False)]


def test_retry_after_holds_the_origin() -> None:
    plan: FillPlan[str] = FillPlan(1)
    plan.add("a", "p", "o", chunk_map(9))
    plan.demand("a", [3])
    plan.hold_origin("o", 7.0)
    assert started(plan, 6.9) == []
    assert plan.next_time(6.9) == 7.0
    assert started(plan, 7.0) == [("a", 3, True)]


def test_removal_gives_places_back_and_late_news_is_ignored() -> None:
    plan: FillPlan[str] = FillPlan(1, headroom=0)
    plan.add("a", "p", "o", chunk_map(9))
    plan.set_background("p", ["a"])
    assert len(started(plan)) == 1
    plan.remove("a")
    plan.remove("a")
    plan.arrived("a", 0)
    plan.failed("a", 0)
    assert plan.in_flight("o") == 0 and "a" not in plan and plan.next_time(0.0) is None


def test_moving_to_the_next_source() -> None:
    plan: FillPlan[str] = FillPlan(2)
    present = chunk_map(3)
    plan.add("a", "p", "tier", present)
    plan.demand("a", [0, 1])
    assert len(started(plan)) == 2
    plan.move("a", "origin")
    plan.failed("a", 0)
    assert started(plan) == [("a", 0, True)]
    assert (plan.in_flight("tier"), plan.in_flight("origin")) == (1, 1)
    land(plan, "a", present, 1)
    assert plan.in_flight("tier") == 0


def test_lost_chunks_are_asked_for_again() -> None:
    plan: FillPlan[str] = FillPlan(8)
    present = chunk_map(3)
    plan.add("a", "p", "o", present)
    plan.set_background("p", ["a"])
    started(plan)
    land(plan, "a", present, 0, 1, 2)
    present.discard(1)
    plan.refill("a")
    assert started(plan) == [("a", 1, False)]


def test_without_background() -> None:
    plan: FillPlan[str] = FillPlan(8)
    plan.add("a", "p", "o", chunk_map(3))
    plan.set_background("p", ["a"])
    plan.demand("a", [2])
    assert plan.next_requests(0.0, background=False) == [Request("a", 2, True)]


def test_a_terabyte_costs_next_to_nothing() -> None:
    plan: FillPlan[str] = FillPlan(16)
    chunks = 125_000
    present = ChunkMap(chunks * 8, 8)
    plan.add("a", "p", "o", present)
    plan.set_background("p", ["a"])
    begun = time.perf_counter()
    fetched = 0
    while requests := plan.next_requests(0.0):
        for request in requests:
            present.add(request.chunk)
            plan.arrived(request.key, request.chunk)
            fetched += 1
    assert fetched == chunks
    assert time.perf_counter() - begun < 20, "a decision takes about 10 µs; quadratic would take minutes"


def test_one_pipeline_leaves_room_for_another() -> None:
    plan: FillPlan[str] = FillPlan(16, headroom=4)
    plan.add("a", "p", "o", chunk_map(8000))
    plan.demand("a", range(8000))
    assert len(started(plan)) == 18
    plan.add("b", "q", "o", chunk_map(9))
    plan.demand("b", [3])
    assert started(plan) == [("b", 3, True)]


def test_a_pipeline_with_nothing_in_flight_is_filled_although_others_have_demands_without_end() -> None:
    plan: FillPlan[str] = FillPlan(4, headroom=0)
    present = chunk_map(1000)
    plan.add("a", "p", "o", present)
    plan.demand("a", range(1000))
    assert [key for key, _, _ in started(plan)] == ["a"] * 4
    plan.add("b", "q", "o", chunk_map(9))
    plan.set_background("q", ["b"])
    seen = []
    for chunk in range(4):
        land(plan, "a", present, chunk)
        seen += [key for key, _, _ in started(plan)]
    assert seen.count("b") == 1, "one at a time"


def test_slow_requests_give_way_to_who_has_less_than_a_share_and_to_nobody_else() -> None:
    plan: FillPlan[str] = FillPlan(4, headroom=0)
    plan.add("a", "p", "o", chunk_map(100))
    plan.demand("a", range(100))
    assert len(started(plan)) == 4
    assert plan.preempt(60.0) == [], "nobody waits"
    plan.add("b", "q", "o", chunk_map(9))
    plan.demand("b", range(3))
    plan.progressed("a", 0, 1 << 20, 59.0)
    plan.progressed("a", 1, 1 << 20, 60.0)
    assert started(plan, 60.0) == []
    assert [(request.key, request.chunk) for request in plan.preempt(60.0)] == [("a", 2), ("a", 3)]
    assert started(plan, 60.0) == [("b", 0, True), ("b", 1, True)], "half of it each, however many wait"
    assert plan.preempt(70.0) == []


def test_a_slow_file_has_one_request_in_flight_until_it_proves_good() -> None:
    plan: FillPlan[str] = FillPlan(4, headroom=0)
    present = chunk_map(100)
    plan.add("a", "p", "o", present)
    plan.demand("a", range(100))
    assert len(started(plan)) == 4
    for chunk in range(4):
        plan.failed("a", chunk, suspect=True)
    assert started(plan) == [("a", 4, True)]
    assert started(plan) == []
    land(plan, "a", present, 4)
    assert len(started(plan)) == 4


def test_who_gives_way_is_given_more_time_the_next_time() -> None:
    plan: FillPlan[str] = FillPlan(2, headroom=0)
    for key, pipeline in (("a", "p"), ("b", "q"), ("c", "r")):
        plan.add(key, pipeline, "o", chunk_map(9))
        plan.demand(key, [0])
    # Everybody is slow to begin: the only request of a pipeline gives way late, and later each time.
    since = {key: 0.0 for key, _, _ in started(plan)}
    lasted: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for tick in range(1, 200):
        now = tick / 2
        for request in plan.preempt(now):
            lasted[request.key].append(now - since[request.key])
        since.update({key: now for key, _, _ in started(plan, now)})
    assert [times[:2] for times in lasted.values()] == [[8.0, 16.0], [8.5, 16.0], [8.0, 16.0]]


def test_a_pause_is_not_held_against_a_background_request() -> None:
    plan: FillPlan[str] = FillPlan(2, headroom=0)
    plan.add("a", "p", "o", chunk_map(9))
    plan.set_background("p", ["a"])
    assert len(started(plan)) == 2
    plan.add("b", "q", "o", chunk_map(9))
    plan.demand("b", [0])
    plan.pause(10.0)
    assert plan.preempt(11.9) == []
    assert plan.next_time(11.0) == 12.0
    assert len(plan.preempt(12.0)) == 1


def test_the_breaker_of_one_pipeline_stops_that_pipeline() -> None:
    plan: FillPlan[str] = FillPlan(4, headroom=0)
    plan.set_limit("o", 0, "p")
    for key, pipeline in (("a", "p"), ("b", "q")):
        plan.add(key, pipeline, "o", chunk_map(2))
        plan.demand(key, [0, 1])
    assert started(plan) == [("b", 0, True), ("b", 1, True)]
    plan.set_limit("o", 1, "p")
    assert started(plan) == [("a", 0, True)]
    plan.set_limit("o", None, "p")
    assert started(plan) == [("a", 1, True)]
