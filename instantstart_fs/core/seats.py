"""Decides how many connections there may be, and which idle one is closed for a new one. Pure: time is a parameter;
control and web have the connections.

Each connection has a seat, which counts for its share: a uid, say. A connection at work keeps its seat; an idle one is
closed when another needs the seat. So idle connections keep nobody out, however many there are and however many shares
they count for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

Refusal = Literal["share", "all"]
"""The reason why there is no seat: all of one's own share are at work, or all there are."""


class Seat:
    """A place for a connection. ``idle_since``: None while at work. ``given_up``: another connection has it now."""

    __slots__ = ("given_up", "idle_since", "share")

    def __init__(self, share: Hashable, now: float) -> None:
        self.share = share
        self.idle_since: float | None = now
        self.given_up = False

    def at_work(self) -> None:
        self.idle_since = None

    def idle(self, now: float) -> None:
        self.idle_since = now


class Seats:
    """Seconds of any clock that never goes back."""

    def __init__(self) -> None:
        self._taken: dict[Hashable, dict[Seat, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def taken(self, share: Hashable) -> int:
        return len(self._taken.get(share, ()))

    def enter(self, share: Hashable, now: float, *, each: int, total: int) -> tuple[Seat | Refusal, Seat | None]:
        """A seat, idle at first, or why there is none; and the seat that was given up for it.

        ``each``: seats of one share; ``total``: of all. Beyond the first the longest idle one of the same share gives
        way; beyond the second that of the share that has most seats, and an idle one.
        """
        refusal: Refusal | None = None
        leaves: Seat | None = None
        if self.taken(share) >= each:
            leaves, refusal = self._longest_idle(share), "share"
        elif self._count >= total:
            largest = sorted(self._taken, key=self.taken, reverse=True)
            found = (self._longest_idle(other) for other in largest)
            leaves, refusal = next((seat for seat in found if seat is not None), None), "all"
        if leaves is not None:
            leaves.given_up = True
            self._remove(leaves)
        elif refusal is not None:
            return refusal, None
        seat = Seat(share, now)
        self._taken.setdefault(share, {})[seat] = None
        self._count += 1
        return seat, leaves

    def leave(self, seat: Seat) -> None:
        """Release the seat at the end of the connection, whether it was given up or not."""
        if not seat.given_up:
            self._remove(seat)

    def _remove(self, seat: Seat) -> None:
        seats = self._taken[seat.share]
        del seats[seat]
        self._count -= 1
        if not seats:
            del self._taken[seat.share]

    def _longest_idle(self, share: Hashable) -> Seat | None:
        idle = [(seat.idle_since, seat) for seat in self._taken.get(share, ()) if seat.idle_since is not None]
        return min(idle, key=lambda one: one[0], default=(0.0, None))[1]
