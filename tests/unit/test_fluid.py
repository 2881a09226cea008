"""The simulated network shares out what there is, and never more."""

from __future__ import annotations

import random

import numpy
import pytest

from bench.fluid import MOST_RESOURCES, Fluid


def ends(fluid: Fluid, flows: list[tuple[float, tuple[int, ...]]]) -> list[float]:
    found = [0.0] * len(flows)

    def told(number: int) -> None:
        found[number] = fluid.now

    for number, (size, through) in enumerate(flows):
        fluid.start(size, through, lambda number=number: told(number))  # type: ignore[misc]
    fluid.run()
    return found


def test_flows_share_what_they_pass_through() -> None:
    assert ends(Fluid([10.0]), [(100.0, (0,)), (100.0, (0,))]) == pytest.approx([20.0, 20.0])
    # The second goes on alone once the first has ended.
    assert ends(Fluid([10.0]), [(50.0, (0,)), (100.0, (0,))]) == pytest.approx([10.0, 15.0])
    # What a flow cannot use where it is held up is the others'.
    assert ends(Fluid([10.0, 2.0]), [(20.0, (0, 1)), (80.0, (0,))]) == pytest.approx([10.0, 10.0], rel=0.02)


def test_nothing_carries_more_than_it_can() -> None:
    chance = random.Random(1)
    fluid = Fluid([chance.uniform(1, 10) for _ in range(30)])
    rows = [chance.sample(range(30), 4) + [30] * (MOST_RESOURCES - 4) for _ in range(200)]
    through = numpy.array(rows).T
    rates = fluid.rates(through)
    load = numpy.bincount(through.ravel(), numpy.tile(rates, MOST_RESOURCES), minlength=31)[:30]
    assert (load <= fluid.capacities[:30] * 1.001).all()
    assert (rates > 0).all()
    # Each is held up somewhere: a resource that it passes through is nearly full.
    full = load > 0.9 * fluid.capacities[:30]
    assert numpy.mean([full[row[:4]].any() for row in rows]) > 0.9


def test_times_come_in_order_and_an_ended_flow_is_not_told() -> None:
    fluid = Fluid([1.0])
    seen: list[tuple[str, float]] = []
    flow = fluid.start(100.0, (0,), lambda: seen.append(("never", fluid.now)))
    fluid.start(3.0, (0,), lambda: seen.append(("flow", fluid.now)))
    fluid.after(2.0, lambda: fluid.cancel(flow))
    fluid.after(1.0, lambda: seen.append(("timer", fluid.now)))
    fluid.run()
    assert seen == [("timer", 1.0), ("flow", pytest.approx(4.0))]
    assert fluid.carried[0] == pytest.approx(4.0)
