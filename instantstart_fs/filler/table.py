"""The table of files that are being filled: how one enters the plan and how it leaves it. It sends nothing and judges
no failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.delivery import Delivery
from instantstart_fs.filler.events import FillEvents
from instantstart_fs.filler.fill import Fill
from instantstart_fs.filler.target import FileKey, FillTarget, TargetOwner


class Tier(Protocol):
    """A regional tier as the table knows it: it is told of files that are filled, to serve chunks of them
    (filler/regional.py)."""

    def enter(self, fill: Fill) -> None: ...
    def keys(self, key: FileKey) -> tuple[FileKey, ...]: ...
    def demand(self, key: FileKey, chunks: Iterable[int], *, whole: bool = False) -> None: ...
    def undemand(self, key: FileKey, chunks: list[int], *, whole: bool) -> None: ...
    def leave(self, key: FileKey) -> None: ...
    def reread(self, key: FileKey) -> None: ...


class FillTable(TargetOwner):
    """Owner of every FillTarget that is not complete. On the trio thread.

    ``wakeup``: set it when the plan may have something new to send.
    """

    def __init__(self, plan: FillPlan[FileKey], delivery: Delivery, events: FillEvents) -> None:
        self._plan = plan
        self._delivery = delivery
        self._events = events
        self.fills: dict[FileKey, Fill] = {}
        self.regional: Tier | None = None
        self.background: dict[str, set[FileKey]] = {}
        """Pipeline → the files that are filled in the background. A pipeline without any has no entry."""
        self.last_arrival: dict[str, float] = {}
        """Pipeline → trio.current_time() when something last came for it."""
        self.wakeup = trio.Event()

    def find(self, target: FillTarget) -> Fill | None:
        """The fill of this very target; None if there is none, or another incarnation's."""
        fill = self.fills.get(target.key)
        return fill if fill is not None and fill.target is target else None

    def of_pipeline(self, pipeline: str) -> list[Fill]:
        """The fills of one pipeline. O(files)."""
        return [fill for key, fill in self.fills.items() if key.pipeline == pipeline]

    def enter(self, fill: Fill) -> None:
        """Put a fill into the table and the plan."""
        target = fill.target
        self.fills[target.key] = fill
        self._plan.add(target.key, target.key.pipeline, fill.source.key, target.present)
        target.owner = self
        if self.regional is not None and fill.regional:
            self.regional.enter(fill)

    def leave(self, fill: Fill) -> None:
        """Forget a fill: its requests are given up and its worker closes the file. Calling it again has no effect."""
        if fill.done:
            return
        fill.done = True
        fill.target.owner = None
        key = fill.target.key
        del self.fills[key]
        self._plan.remove(key)
        if self.regional is not None:
            self.regional.leave(key)
        pending = self.background.get(key.pipeline)
        if pending is not None:
            pending.discard(key)
            if not pending:
                del self.background[key.pipeline]
        for request in list(fill.requests):
            self._delivery.finish(request)
        fill.unsent.clear()
        self._delivery.close_in_worker(fill)
        self.wakeup.set()

    def fail(self, fill: Fill, error: InstantStartError) -> None:
        """End a fill: its target has failed."""
        target = fill.target
        self.leave(fill)
        target.fail(error)
        self._events.target_failed(target, error)

    def demand_again(self, target: FillTarget) -> None:
        """Put back what readers wait for, after present bytes were lost."""
        wanted = [chunk for chunk in target.waiting if chunk not in target.present]
        self._plan.demand(target.key, wanted)
        if self.regional is not None:
            self.regional.reread(target.key)
            self.regional.demand(target.key, wanted)

    def stream_ended(self, fill: Fill) -> None:
        """Request chunks again once the last request is over of which one took the whole file."""
        if fill.streaming and not any(request.worker is not None for request in fill.requests):
            fill.streaming = False
            self._plan.release(fill.target.key)
            self._plan.hold(fill.target.key, fill.held_until)

    def keys(self, key: FileKey) -> tuple[FileKey, ...]:
        """The plan's entries of a file: one, or two where a region is asked before its origin."""
        return (key,) if self.regional is None else self.regional.keys(key)

    # -- what targets ask of their owner ---------------------------------------------------------------------------

    def unwaited(self, target: FillTarget, chunks: list[int]) -> None:
        """Withdraw the demands for chunks that no reader waits for any more."""
        if self.find(target) is None:
            return
        self._plan.undemand(target.key, chunks)
        if self.regional is not None:
            self.regional.undemand(target.key, chunks, whole=not target.waiting)
        if not target.waiting:
            for key in self.keys(target.key):
                self._plan.undemand_whole(key)

    def queue_moved(self, target: FillTarget) -> float:
        """Return when something last came for the queue that an unsent chunk of ``target`` is in: its pipeline's, or
        its own file's while that is held back."""
        fill = self.fills.get(target.key)
        if fill is None or fill.failures:
            return target.last_progress
        return max(target.last_progress, self.last_arrival.get(target.key.pipeline, -math.inf))
