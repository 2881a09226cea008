"""The rack level of a region: which host of a rack takes a chunk group from the tier, so that it crosses the rack's
uplink once; in which order a host goes through a file then; the tickets by which its neighbours ask it; when a
neighbour is no longer asked. Pure: time is a parameter.

Owners follow from the names of the rack's living hosts alone (core/rendezvous.py). Two hosts that know of different
ones disagree about some owners: that costs a chunk's second way over the uplink, and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from instantstart_fs.core import rendezvous
from instantstart_fs.core.retry import Breaker

TICKET_SECONDS = 60.0
"""A ticket is good for so long, by the clock of the tier's storage, which all hosts tell from their own records."""
MOST_TICKET_SECONDS = 2 * TICKET_SECONDS
"""One that would be good for longer is refused: clocks that are told so differ by some seconds."""
WAIT_SECONDS, READER_WAIT_SECONDS = 3.0, 0.3
"""How long an owner that fills the file may wait for a chunk that it has not got; the second where a reader waits."""
SILENT_SECONDS, READER_SILENT_SECONDS = 5.0, 1.0
"""Without a byte from a neighbour, before the tier is asked; more than it may wait."""
SLOWEST_SECONDS, READER_SLOWEST_SECONDS = 20.0, 3.0
"""For a whole chunk."""
IDLE_SECONDS = 10.0
"""How long a neighbour that has nothing of a pipeline is not asked for it."""
WRONG_SECONDS = 600.0
"""How long one that gave wrong bytes is not asked for anything."""
PROBE_SECONDS = 6.0
"""Between two requests to a neighbour that failed and may be well again."""
MOST_NEIGHBOURS_ASKED = 2
"""For one chunk; then the tier is."""
LEAST_BYTES = 1 << 20
"""Chunks smaller than this come from the tier: the way over a neighbour would take longer than it spares."""

_PATH = re.compile(r"/rack/v1/([0-9a-f]{32})/([0-9a-f]{32})/([0-9a-f]{8})\?wait=([0-9]{1,5})&sealed=([01])\Z")
_TICKET = re.compile(r"Rack ([0-9]{1,12})\.([0-9a-f]{64})\Z")


# -- owners ------------------------------------------------------------------------------------------------------------


def owner(pin: str, group: int, hosts: Collection[str]) -> str:
    """Which of ``hosts`` (at least one) takes this group of the file ``pin`` from the tier."""
    return max(hosts, key=lambda host: (rendezvous.score(host, f"{pin}/{group}"), host))


def walk(me: str, pin: str, groups: Iterable[int], hosts: Collection[str]) -> list[int]:
    """``groups`` in the order in which this host takes them: its own ones, then those of the next host by name, and so
    on round the rack. Hosts that begin together ask different neighbours at any time, and for what those have."""
    ring = sorted({*hosts, me})
    turn = {host: (place - ring.index(me)) % len(ring) for place, host in enumerate(ring)}
    return sorted(groups, key=lambda group: (turn[owner(pin, group, ring)], group))


def give_up_at(began: float, last_byte: float, *, demanded: bool) -> float:
    """When a neighbour has been too slow with a chunk; the times are of one clock."""
    if demanded:
        return min(last_byte + READER_SILENT_SECONDS, began + READER_SLOWEST_SECONDS)
    return min(last_byte + SILENT_SECONDS, began + SLOWEST_SECONDS)


# -- requests ----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A chunk that a neighbour asks for. ``wait``: seconds that it may be waited for; ``sealed``: the neighbour knows
    its digest from the region's seal."""

    slot: str
    pin: str
    chunk: int
    wait: float
    sealed: bool


def path_of(asked: Asked) -> str:
    """The request's target."""
    wait = min(max(int(asked.wait * 1000), 0), 99_999)
    return f"/rack/v1/{asked.slot}/{asked.pin}/{asked.chunk:08x}?wait={wait}&sealed={int(asked.sealed)}"


def asked_by(path: str) -> Asked | None:
    """What a request's target asks for; None where it is anything but what ``path_of`` makes."""
    match = _PATH.match(path)
    if match is None:
        return None
    wait = min(int(match[4]) / 1000, WAIT_SECONDS)
    return Asked(match[1], match[2], int(match[3], 16), wait, match[5] == "1")


def make_ticket(key: bytes, host: str, asked: Asked, now: float) -> str:
    """The Authorization by which ``host`` is asked for this chunk. ``now``: the storage's clock."""
    expires = int(now + TICKET_SECONDS)
    return f"Rack {expires}.{_mac(key, host, asked, expires)}"


def is_ticket(key: bytes, host: str, asked: Asked, ticket: str, now: float) -> bool:
    """Whether somebody with the region's key has made it, for this host and this chunk, and it is still good."""
    match = _TICKET.match(ticket)
    if match is None:
        return False
    expires = int(match[1])
    genuine = hmac.compare_digest(match[2], _mac(key, host, asked, expires))
    return genuine and now < expires <= now + MOST_TICKET_SECONDS


def _mac(key: bytes, host: str, asked: Asked, expires: int) -> str:
    said = f"{host}\0{asked.slot}\0{asked.pin}\0{asked.chunk}\0{expires}"
    return hmac.new(key, said.encode(), hashlib.sha256).hexdigest()


# -- neighbours --------------------------------------------------------------------------------------------------------


class _Standing:
    """How one neighbour fares."""

    def __init__(self) -> None:
        self.breaker = Breaker(threshold=2, grace=0.0, window=1.0, first=5.0, cap=300.0)
        self.alone_until = -math.inf
        self.probed = -math.inf
        self.idle: dict[str, float] = {}
        """By slot, until when it has nothing of it."""


class Neighbours:
    """Those of a rack, as ``me`` fares with them. Times are seconds of one clock."""

    def __init__(self, me: str) -> None:
        self.me = me
        self._standing: dict[str, _Standing] = {}

    @property
    def names(self) -> list[str]:
        return list(self._standing)

    def live(self, hosts: Iterable[str]) -> None:
        """These of the rack live now; what is known of those that stay is kept."""
        self._standing = {host: self._standing.get(host) or _Standing() for host in hosts if host != self.me}

    def owner(self, slot: str, pin: str, group: int, now: float) -> str | None:
        """The neighbour to ask for this group; None: the tier, since this host owns it."""
        hosts = [host for host, standing in self._standing.items() if _may_be_asked(standing, slot, now)]
        found = owner(pin, group, [self.me, *hosts])
        if found == self.me:
            return None
        standing = self._standing[found]
        if not standing.breaker.closed:
            standing.probed = now
        return found

    def gave(self, host: str) -> None:
        """It gave a chunk."""
        standing = self._standing.get(host)
        if standing is not None:
            standing.breaker.succeeded()

    def has_nothing(self, host: str, slot: str, now: float) -> None:
        """It holds and fills nothing of that pipeline."""
        standing = self._standing.get(host)
        if standing is not None:
            standing.breaker.succeeded()
            standing.idle = {name: until for name, until in standing.idle.items() if until > now}
            standing.idle[slot] = now + IDLE_SECONDS

    def failed(self, host: str, now: float) -> bool:
        """It was silent, slow, refused, or died. True if it is left alone from now on."""
        standing = self._standing.get(host)
        return standing is not None and standing.breaker.failed(now, 1.0)

    def lied(self, host: str, now: float) -> None:
        """It gave wrong bytes."""
        standing = self._standing.get(host)
        if standing is not None:
            standing.alone_until = now + WRONG_SECONDS


def _may_be_asked(standing: _Standing, slot: str, now: float) -> bool:
    if now < standing.alone_until or standing.idle.get(slot, -math.inf) > now:
        return False
    state = standing.breaker.state(now)
    return state == "closed" or (state == "half-open" and now - standing.probed >= PROBE_SECONDS)
