"""What is staged, when and how much: core/staging.py."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.staging import Shard, Window, in_load_order, plan_window, staging_budget, start_time

FOUR = [Shard(index, f"model-0000{index}-of-00004.safetensors", 100, True) for index in (1, 2, 3, 4)]


def plan(shards: list[Shard] = FOUR, **more: object) -> Window:
    arguments = {"opened": {1}, "last_opened": 1, "done": set(), "staged": {}, "budget": 1000, **more}
    return plan_window(shards, **arguments)  # type: ignore[arg-type]


def test_the_budget_is_the_least_of_all_limits() -> None:
    assert staging_budget(1000, 500, []) == 500
    assert staging_budget(1000, 5000, []) == 1000
    assert staging_budget(1000, 500, [10_000, 300]) == 240
    assert staging_budget(1000, 500, [0, 300]) == 0


def test_the_second_file_starts_it_at_once_and_a_first_one_after_a_second() -> None:
    assert start_time({1}, None) is None
    assert start_time({1}, 10.0) == 11.0
    assert start_time({1, 2}, None) == -math.inf


def test_everything_from_the_first_open_shard_on_in_order() -> None:
    assert plan().stage == ((1, 100), (2, 100), (3, 100), (4, 100))
    assert plan(opened={3}, last_opened=3).stage == ((3, 100), (4, 100))
    assert plan(opened={1, 2, 3, 4}, last_opened=4).stage[0] == (1, 100)


def test_the_budget_ends_the_window_before_a_whole_shard_and_a_release_moves_it() -> None:
    assert plan(budget=250).stage == ((1, 100), (2, 100))
    assert plan(budget=250, staged={1: 100, 2: 100}).stage == ()
    moved = plan(budget=250, opened={2}, last_opened=2, done={1}, staged={2: 100})
    assert moved.stage == ((3, 100),)


def test_between_two_shards_nothing_is_open_and_nothing_is_staged_twice() -> None:
    assert plan(opened=set(), last_opened=1, done={1}, staged={2: 100}).stage == ((3, 100), (4, 100))


def test_what_the_engine_went_past_frees_its_budget() -> None:
    jumped = plan(budget=250, opened={3}, last_opened=3, staged={1: 100, 2: 100})
    assert jumped == Window(((3, 100), (4, 100)), (1, 2))


def test_shards_that_are_not_there_yet_are_left_out() -> None:
    filling = [*FOUR[:1], Shard(2, "model-00002-of-00004.safetensors", 100, False), *FOUR[2:]]
    assert plan(filling).stage == ((1, 100), (3, 100), (4, 100))


def test_a_shard_larger_than_the_whole_budget_is_staged_in_part() -> None:
    assert plan([Shard(1, "model.safetensors", 1000, True)], budget=300).stage == ((1, 300),)
    assert plan([Shard(1, "model.safetensors", 1000, True)], budget=0).stage == ()


sizes = st.lists(st.integers(0, 50), min_size=1, max_size=8)
subset = st.sets(st.integers(0, 7))


@given(sizes, subset, subset, st.sets(st.integers(0, 7)), st.integers(0, 120), st.integers(0, 7))
def test_the_budget_is_kept_whatever_is_opened(
    lengths: list[int], opened: set[int], done: set[int], staged: set[int], budget: int, last: int
) -> None:
    shards = [Shard(index, f"{index}.safetensors", size, True) for index, size in enumerate(lengths)]
    here = {index: lengths[index] for index in staged if index < len(lengths)}
    window = plan_window(shards, opened=opened, last_opened=last, done=done, staged=here, budget=budget)
    kept = sum(length for index, length in here.items() if index not in window.drop)
    assert not window.stage or kept + sum(length for _, length in window.stage) <= budget
    order = [index for index, _ in window.stage]
    assert order == sorted(order)
    assert not set(order) & (done | here.keys())
    first = min((index for index in opened if index < len(lengths)), default=0)
    assert all(index >= first for index in order)


def index_of(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor.{k}": name for k, name in enumerate(names)}}).encode()


def test_numbered_shards_go_by_number_whatever_the_index_names_first() -> None:
    content = index_of(FOUR[3].path, FOUR[0].path, FOUR[1].path, FOUR[2].path)
    assert in_load_order(FOUR, {"model.safetensors.index.json": content}) == tuple(FOUR)


def test_other_shards_come_as_their_index_names_them() -> None:
    names = ["asr/decoder.safetensors", "asr/encoder.safetensors", "llm/b.safetensors", "llm/unnamed.safetensors"]
    shards = [Shard(index, name, 1, True) for index, name in enumerate(names)]
    indexes = {
        "asr/model.safetensors.index.json": index_of("encoder.safetensors", "decoder.safetensors"),
        "llm/model.safetensors.index.json": index_of("b.safetensors", "missing.safetensors"),
    }
    assert [shard.index for shard in in_load_order(shards, indexes)] == [1, 0, 2, 3]


@given(st.binary(max_size=60) | st.sampled_from([b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}']))
def test_an_index_that_is_none_changes_nothing(content: bytes) -> None:
    shards = [Shard(0, "b.safetensors", 1, True), Shard(1, "c.safetensors", 1, True)]
    assert in_load_order(shards, {"model.safetensors.index.json": content}) == tuple(shards)
