"""Plans: every byte once, balanced, ranks to their devices; and the schedule, by simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.weights import WeightFile, WeightSet, may_read
from instantstart_fs.errors import BadWeights, UsageError
from instantstart_fs.prefetch.layout import FileLayout, TensorLayout
from instantstart_fs.prefetch.plan import BLOCK, EXTENT, Plan, admit, plan

GIB = 1 << 30


def weights(*files: tuple[str, str, int]) -> WeightSet:
    return WeightSet("p", 1, tuple(WeightFile(path, model, size) for path, model, size in files))


@given(
    st.lists(
        st.tuples(st.integers(0, 40 * 1024 * 1024), st.sampled_from(["asr", "llm", "tts"])), min_size=1, max_size=9
    ),
    st.integers(1, 4),
)
def test_every_byte_is_planned_exactly_once(sizes: list[tuple[int, str]], devices: int) -> None:
    files = [(f"{model}/{number}.safetensors", model, size) for number, (size, model) in enumerate(sizes)]
    made = plan(weights(*files), None, [f"cuda:{number}" for number in range(devices)])
    bound: dict[str, list[tuple[int, int]]] = {}
    for device in made.devices:
        for file in device.files:
            assert file.path not in bound
            bound[file.path] = list(file.extents)
    assert set(bound) == {path for path, _, _ in files}
    for path, _, size in files:
        position = 0
        for start, end in bound[path]:
            assert start == position and start % BLOCK == 0 and 0 < end - start <= EXTENT
            position = end
        assert position == size


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_no_device_gets_more_than_a_file_above_its_share(sizes: list[int], devices: int) -> None:
    files = [(f"{number}.safetensors", "", size) for number, size in enumerate(sizes)]
    made = plan(weights(*files), None, [f"cuda:{number}" for number in range(devices)])
    assert max(device.bytes for device in made.devices) <= sum(sizes) / devices + max(sizes)
    assert made.how == "balanced"


def test_a_sharded_state_goes_to_its_ranks() -> None:
    files = [(f"model-rank-{rank}-part-{part}.safetensors", "", 10 + rank) for rank in range(4) for part in range(2)]
    four = plan(weights(*files), None, [f"cuda:{number}" for number in range(4)])
    assert [{file.rank for file in device.files} for device in four.devices] == [{0}, {1}, {2}, {3}]
    assert four.how == "sharded_state"
    two = plan(weights(*files), None, ["cuda:0", "cuda:1"], 4)
    assert [{file.rank for file in device.files} for device in two.devices] == [{0, 1}, {2, 3}]
    with pytest.raises(UsageError, match="saved for tensor parallel size 4"):
        plan(weights(*files), None, ["cuda:0", "cuda:1"])
    with pytest.raises(UsageError, match="beside"):
        plan(weights(*files, ("model.safetensors", "", 5)), None, ["cuda:0"], 4)


@pytest.mark.parametrize("devices", [[], ["cuda"], ["tpu:0"], ["cuda:x"], ["cuda:0", "cuda:0"]])
def test_impossible_devices(devices: list[str]) -> None:
    with pytest.raises(UsageError):
        plan(weights(("a.safetensors", "", 1)), None, devices)


def test_nothing_to_stage_is_said() -> None:
    with pytest.raises(UsageError, match="no weight files"):
        plan(weights(), None, ["cpu"])


def test_layouts_must_fit_their_files() -> None:
    layout = FileLayout(10, 8, (TensorLayout("w", "U8", (2,), 8, 10),))
    with pytest.raises(BadWeights, match="10 bytes and the manifest of 11"):
        plan(weights(("a.safetensors", "", 11)), {"a.safetensors": layout}, ["cpu"])
    both = weights(("a.safetensors", "", 10), ("b.safetensors", "", 10))
    with pytest.raises(BadWeights, match=r"w is in a\.safetensors and in b\.safetensors"):
        plan(both, {"a.safetensors": layout, "b.safetensors": layout}, ["cpu"])
    ranks = weights(("model-rank-0-part-0.safetensors", "", 10), ("model-rank-1-part-0.safetensors", "", 10))
    plan(ranks, {file.path: layout for file in ranks.files}, ["cpu", "cpu:1"])
    with pytest.raises(BadWeights, match="no weight file"):
        plan(both, {"c.safetensors": layout}, ["cpu"])


def simulated(made: Plan, disk: float, device: float) -> dict[str, float]:
    """Model → seconds until ready: each device takes its files in order; the disk shares its bandwidth evenly among the
    devices that have work, none takes more than ``device`` bytes a second."""
    queues = [[[file.model, float(file.size)] for file in dev.files if file.size] for dev in made.devices]
    now, ready = 0.0, dict.fromkeys(made.models, 0.0)
    while any(queues):
        busy = [queue for queue in queues if queue]
        rate = min(device, disk / len(busy))
        step = min(queue[0][1] for queue in busy) / rate  # type: ignore[operator]
        now += step
        for queue in busy:
            queue[0][1] -= rate * step  # type: ignore[operator]
            if queue[0][1] <= 1e-3:  # type: ignore[operator]
                ready[str(queue.pop(0)[0])] = now
    return ready


VOICE = weights(
    *[(f"llm/model-{number}.safetensors", "llm", 4 * GIB) for number in range(4)],
    ("asr/model.safetensors", "asr", 3 * GIB),
    ("tts/model.safetensors", "tts", GIB),
    ("tts/vocoder.bin", "tts", GIB // 4),
)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("deadlines", [None, {"llm": 1.0}, {"asr": 1.0, "tts": 2.0}])
def test_all_models_are_ready_within_reading_their_bytes_once(devices: int, deadlines: dict[str, float] | None) -> None:
    made = plan(VOICE, None, [f"cuda:{number}" for number in range(devices)], deadlines=deadlines)
    ready = simulated(made, 7e9, 25e9)
    assert max(ready.values()) <= 1.1 * VOICE.total_bytes / 7e9


def test_the_earliest_deadline_goes_first_and_then_the_smallest() -> None:
    assert plan(VOICE, None, ["cuda:0"]).models == ("tts", "asr", "llm")
    urgent = plan(VOICE, None, ["cuda:0"], deadlines={"llm": 3.0})
    assert urgent.models == ("llm", "tts", "asr")
    ready = simulated(urgent, 7e9, 25e9)
    assert ready["llm"] == pytest.approx(16 * GIB / 7e9)
    with pytest.raises(UsageError, match="no model 'nlu'"):
        plan(VOICE, None, ["cuda:0"], deadlines={"nlu": 1.0})


def test_several_devices_take_as_long_as_the_slowest_not_the_sum() -> None:
    files = [(f"{number}.safetensors", "", 2 * GIB) for number in range(8)]
    one = simulated(plan(weights(*files), None, ["cuda:0"]), disk=100e9, device=10e9)
    four = simulated(plan(weights(*files), None, [f"cuda:{k}" for k in range(4)]), disk=100e9, device=10e9)
    assert four[""] == pytest.approx(one[""] / 4)


def test_models_are_admitted_in_schedule_order_against_every_device() -> None:
    made = plan(VOICE, None, ["cuda:0"])
    assert admit(made, {"cuda:0": 21 * GIB}) == ()
    assert admit(made, {"cuda:0": 10 * GIB}) == ("llm",)
    assert admit(made, {"cuda:0": GIB}) == ("tts", "asr", "llm")
    assert made.without(["llm"]).total_bytes == 3 * GIB + GIB + GIB // 4


@pytest.mark.parametrize(
    ("uid", "groups", "mode", "may"),
    [
        (0, [], 0o000, True),
        (7, [], 0o500, True),
        (7, [8], 0o050, False),  # the owner's class counts, not the group's
        (9, [8], 0o050, True),
        (9, [8], 0o505, False),
        (9, [3], 0o550, False),
        (9, [3], 0o555, True),
        (9, [3], 0o554, False),  # it could not enter the directory
    ],
)
def test_who_may_read_is_what_the_kernel_would_say(uid: int, groups: list[int], mode: int, may: bool) -> None:
    assert may_read(uid, groups, owner=7, group=8, mode=mode) is may


def test_a_deadline_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="deadline of 'llm' is no number"):
        plan(weights(("a.safetensors", "llm", 1)), None, ["cpu"], deadlines={"llm": float("nan")})
