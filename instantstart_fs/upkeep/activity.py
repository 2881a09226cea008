"""Measures how busy the daemon is, for work that runs only while it is idle (core/scrub.py)."""

from __future__ import annotations

from instantstart_fs.core.scrub import Activity
from instantstart_fs.filler.scheduler import Filler
from instantstart_fs.serving.leases import Leases
from instantstart_fs.telemetry.telemetry import Telemetry


class ActivityMeter:
    """Measures how busy readers are. The kernel's own reads of complete files show in their opens alone. Use it on the
    trio thread."""

    def __init__(self, telemetry: Telemetry, filler: Filler, leases: Leases) -> None:
        self._telemetry = telemetry
        self._filler = filler
        self._leases = leases

    def now(self) -> Activity:
        totals, fills = self._telemetry.totals, self._filler.statistics()
        events = totals.opens.total() + totals.reads + totals.staged_bytes + fills.fetched_bytes
        return Activity(events, busy=fills.in_flight > 0 or self._leases.any_prefetch())
