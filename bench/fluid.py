"""A fluid model of a network: transfers share what they pass through, and each goes as fast as its narrowest share.

A *resource* is a capacity in bytes a second (a link's one direction, a disk, a server). A *flow* is a number of bytes
that pass through up to six of them at once. Rates come close to max-min fairness: what a flow cannot use where it is
held up is shared out again among the others (``ROUNDS`` times; more would change a few per cent). There are no packets,
no slow start and no loss.

Time goes in steps, each as long as it takes the next hundredth of all flows to end (at least one), so that ten thousand
hosts are simulated in minutes; flows that end within one step end together, which costs a rate a few per cent at most.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import numpy.typing

MOST_RESOURCES = 6
ROUNDS = 4
TOGETHER = 0.01
"""Of all flows: how many may end in one step."""
UNLIMITED = 1e15


class Fluid:
    """``now``: seconds. ``carried``: bytes by resource. Who is told of an end, or of a time, is called from ``run``."""

    def __init__(self, capacities: Sequence[float]) -> None:
        self.now = 0.0
        self.steps = 0
        self.capacities = numpy.array([*capacities, UNLIMITED])
        self.carried = numpy.zeros(len(self.capacities))
        self._nothing = len(capacities)
        self._size = 0
        self._left: numpy.typing.NDArray[numpy.float64] = numpy.zeros(0)
        self._through: numpy.typing.NDArray[numpy.int32] = numpy.zeros((MOST_RESOURCES, 0), dtype=numpy.int32)
        self._told: list[Callable[[], None] | None] = []
        self._free: list[int] = []
        self._grow(1024)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def _grow(self, size: int) -> None:
        more = size - self._size
        self._left = numpy.concatenate([self._left, numpy.zeros(more)])
        columns = numpy.full((MOST_RESOURCES, more), self._nothing, dtype=numpy.int32)
        self._through = numpy.concatenate([self._through, columns], axis=1)
        self._told.extend([None] * more)
        self._free.extend(range(size - 1, self._size - 1, -1))
        self._size = size

    def start(self, size: float, through: Sequence[int], told: Callable[[], None]) -> int:
        """Begin; ``told`` is called at its end. Its number, for ``cancel``."""
        if not self._free:
            self._grow(2 * self._size)
        flow = self._free.pop()
        self._left[flow] = max(size, 1.0)
        self._through[: len(through), flow] = through
        self._through[len(through) :, flow] = self._nothing
        self._told[flow] = told
        return flow

    def cancel(self, flow: int) -> None:
        """It ends without being told."""
        self._told[flow] = None
        self._left[flow] = 0.0
        self._free.append(flow)

    def at(self, when: float, told: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), told))

    def after(self, seconds: float, told: Callable[[], None]) -> None:
        self.at(self.now + seconds, told)

    def run(self, until: float = math.inf, *, done: Callable[[], bool] = lambda: False) -> None:
        """Until ``done()``, or that time, or nothing is left to happen."""
        while not done() and self.now < until:
            timer = self._timers[0][0] if self._timers else math.inf
            if timer <= self.now:
                while self._timers and self._timers[0][0] <= self.now:
                    heapq.heappop(self._timers)[2]()
                continue
            active = numpy.flatnonzero(self._left > 0)
            limit = min(timer, until)
            if len(active) == 0:
                if limit == math.inf:
                    return
                self.now = limit
                continue
            self._step(active, limit)

    def _step(self, active: numpy.typing.NDArray[numpy.int64], limit: float) -> None:
        self.steps += 1
        through, left = self._through[:, active], self._left[active]
        rates = self.rates(through)
        with numpy.errstate(divide="ignore"):
            ends = left / rates
        together = max(0, math.ceil(TOGETHER * len(active)) - 1)
        seconds = float(numpy.partition(ends, together)[together])
        seconds = min(seconds, limit - self.now)
        moved = numpy.minimum(rates * seconds, left)
        left -= moved
        over = left < 1.0
        left[over] = 0.0
        self._left[active] = left
        self.carried += numpy.bincount(
            through.ravel(), numpy.tile(moved, MOST_RESOURCES), minlength=len(self.capacities)
        )
        self.now += seconds
        ended: list[int] = active[over].tolist()
        told = [self._told[flow] for flow in ended]
        for flow in ended:
            self._told[flow] = None
            self._free.append(flow)
        for each in told:
            if each is not None:
                each()

    def rates(self, through: numpy.typing.NDArray[numpy.int32]) -> numpy.typing.NDArray[Any]:
        """Bytes a second of flows, each through a column of resources. No resource carries more than its capacity."""
        free = self.capacities.copy()
        rates = numpy.zeros(through.shape[1])
        waiting = numpy.arange(through.shape[1])
        for _ in range(ROUNDS):
            users = numpy.bincount(through.ravel(), minlength=len(free))
            users[self._nothing] = 0
            share = numpy.where(users > 0, free / numpy.maximum(users, 1), UNLIMITED)
            gain = share[through].min(axis=0)
            rates[waiting] += gain
            free -= numpy.bincount(through.ravel(), numpy.tile(gain, MOST_RESOURCES), minlength=len(free))
            free = numpy.maximum(free, 0.0)
            free[self._nothing] = UNLIMITED
            # who passes through a full resource gets no more
            going = ~(free < 1e-3 * self.capacities)[through].any(axis=0)
            if not going.any():
                break
            waiting, through = waiting[going], through[:, going]
        return rates
