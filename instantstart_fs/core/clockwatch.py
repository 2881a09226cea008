"""Detects that the wall clock was set, also across restarts: stored request times are then wrong for a while. Pure:
both clocks are parameters.
"""

from __future__ import annotations

import math

import msgspec

JUMP = 3600.0
"""Seconds: a wall clock that moves this far against CLOCK_BOOTTIME was set; drift is less (design rule 9)."""


class ClockState(msgspec.Struct, frozen=True, array_like=True):
    """The clocks as the next daemon needs them: both at one moment, seconds; the boot that the second one counts from;
    and for how many seconds from then on eviction is suspended."""

    boot_id: str
    wall: float
    boot: float
    rest: float = 0.0


class ClockWatch:
    """Watches for a wall clock that was set: eviction is then suspended for ``keep_hot`` seconds, in which every
    pipeline in use is requested again. Small steps and slewing go unnoticed.

    ``known``: the clocks as an earlier daemon saved them, in boot ``boot_id``. After a reboot it is unknown for how
    long the machine was off: the rest of a suspension starts again, and only a wall clock that went back was surely
    set.
    """

    def __init__(self, keep_hot: float, boot_id: str = "", known: ClockState | None = None) -> None:
        self._keep_hot = keep_hot
        self._boot_id = boot_id
        self._known = known
        self._offset: float | None = None
        self._until = -math.inf

    def observe(self, wall: float, boot: float) -> bool:
        """Take both clocks, read at one moment, seconds. True if the wall clock jumped since the last call."""
        went_back = self._resume(wall, boot)
        offset = wall - boot
        jumped = went_back or (self._offset is not None and abs(offset - self._offset) > JUMP)
        self._offset = offset
        if jumped:
            self._until = boot + self._keep_hot
        return jumped

    def _resume(self, wall: float, boot: float) -> bool:
        """Continue from ``known``; whether the wall clock went back while the machine was off."""
        known, self._known = self._known, None
        if known is None:
            return False
        same = known.boot_id == self._boot_id and known.boot <= boot
        if known.rest > 0:
            self._until = (known.boot if same else boot) + min(known.rest, self._keep_hot)
        if same:
            self._offset = known.wall - known.boot
        return not same and known.wall - wall > JUMP

    def suspended(self, boot: float) -> bool:
        """Whether eviction is suspended now."""
        return boot < self._until

    def state(self, wall: float, boot: float) -> ClockState:
        """The clocks for the next daemon, after ``observe`` of the same moment."""
        return ClockState(self._boot_id, wall, boot, max(0.0, self._until - boot))
