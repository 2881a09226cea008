"""Opens each chunk of a file where its plan says, and leaves tiers that fail, chunk by chunk, file by file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.region import WAIT
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.delivery import Delivery
from instantstart_fs.filler.region_follow import Follow, Tiers
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.target import FileKey

if TYPE_CHECKING:
    from instantstart_fs.filler.region_rack import RackLevel


class FileRoutes:
    """What claims, answers and failures of tiers change. On the trio thread. ``follows``: the files that are filled;
    ``ask_again`` has the tiers asked about a file (filler/region_claims.py)."""

    def __init__(
        self, tiers: Tiers, plan: FillPlan[FileKey], table: FillTable, delivery: Delivery, rack: RackLevel | None
    ) -> None:
        self.follows: dict[FileKey, Follow] = {}
        self.ask_again: Callable[[Follow], None] = lambda follow: None
        self._tiers = tiers
        self._plan = plan
        self._table = table
        self._delivery = delivery
        self.rack = rack

    def apply(self, follow: Follow) -> None:
        """Open each chunk at the source that its plan says."""
        if follow.ended:
            return
        later: list[int] = []
        for chunk, source in follow.pull.take_moves(trio.current_time()):
            if source == WAIT:
                continue
            if source == 0 and self.rack is not None and self.rack.takes_turns(follow, chunk):
                later.append(chunk)
                continue
            if source < len(self._tiers.sources):
                self._plan.open(follow.tier_key, chunk)
            else:
                self._plan.shut(follow.tier_key, [chunk])
                self._plan.open(follow.key, chunk)
                follow.line.ahead.discard(chunk)
        if self.rack is not None:
            self.rack.line_up(follow, later)
        self._table.wakeup.set()

    def tier_failed(self, source: int, error: InstantStartError) -> None:
        """Leave that tier alone for a while where it fails too often."""
        if self._tiers.sources[source].failed(error):
            for follow in list(self.follows.values()):
                if source == 0:
                    self.leave_own(follow)
                elif follow.state != "off" and source in follow.seals:
                    follow.pull.without(source)
                    self._stop_flights(follow, source)

    def turn_off(self, follow: Follow) -> None:
        """Ask the tiers for nothing more of this file."""
        if follow.state == "off":
            return
        follow.state, follow.own_left = "off", True
        follow.pull.give_up()
        self._stop_flights(follow)
        follow.changed.set()

    def leave_own(self, follow: Follow) -> None:
        """Ask the region's own tier for nothing more of this file; upstream tiers are, where one may be."""
        if follow.own_left:
            return
        if not self._tiers.upstream_answers:
            self.turn_off(follow)
            return
        follow.own_left = True
        was = follow.state
        follow.pull.leave_own(asking=was in ("fresh", "waiting", "asking", "sealed"))
        self._stop_flights(follow, 0)
        follow.changed.set()
        if was == "sealed":  # no upstream tier was asked
            self.ask_again(follow)
        elif was in ("parked", "followed", "pulled"):
            self.go_upstream(follow)

    def go_upstream(self, follow: Follow) -> None:
        """The own tier was left, and it is known what upstream tiers have of the file."""
        if not any(source for source in follow.seals):
            self.turn_off(follow)
            return
        follow.state = "upstream"
        follow.pull.asked_upstream()
        self.apply(follow)

    def _stop_flights(self, follow: Follow, source: int | None = None) -> None:
        """Stop the file's requests: those to this tier, or all of them."""
        for chunk in [chunk for chunk, flight in follow.flights.items() if source in (None, flight[2])]:
            self._delivery.stop(follow.fill, chunk)
            del follow.flights[chunk]
            self._plan.failed(follow.tier_key, chunk)
        self.apply(follow)
