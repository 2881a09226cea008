"""Which hosts of a region hold a pipeline: what a host's heartbeat says, packed, and for how long it counts. Pure.

A host tells of a pipeline in ENTRY_BYTES, sorted by slot, so that a reader of a thousand hosts keeps them as they came
and finds one slot in each by bisection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from instantstart_fs.core.status import PipelineState

BEAT_SECONDS = 30.0
"""Seconds between two heartbeats of a host, in a region of up to 1,000 hosts. In a larger one each host beats less
often, so that the region together beats as often."""
BEAT_HOSTS = 1000
COUNT_HOSTS = 10
"""Hosts that list the others in one second, together, at most: a listing of 10,000 costs the tier ten requests."""
JITTER = 0.2
MISSED_BEATS = 3
MOST_HOLDINGS = 2000
"""Pipelines in one heartbeat: those requested last."""

_ENTRY = struct.Struct(">16s4sBQQ")
ENTRY_BYTES = _ENTRY.size
_STATES: tuple[PipelineState, ...] = ("cold", "filling", "partial", "warm", "unverified", "error")


class Holding(msgspec.Struct, frozen=True):
    """The part of a pipeline that a host has. ``slot``: 32 hex digits; ``revision``: 8, of what it is pinned to; bytes
    of the load set."""

    slot: str
    revision: str
    state: PipelineState
    cached_bytes: int
    total_bytes: int


class HostHolding(msgspec.Struct, frozen=True):
    """A host and what it has of one pipeline, as `regional status` and `/v1/placement` show it. ``percent`` is 100 only
    when all is there; ``current``: it is pinned to what the asking host is pinned to, None where that knows nothing;
    ``last_seen``: RFC 3339; ``age``: seconds since then, by the storage's clock."""

    host: str
    state: PipelineState
    percent: int
    cached_bytes: int
    total_bytes: int
    current: bool | None
    last_seen: str
    age: float


class Placement(msgspec.Struct, frozen=True):
    """Where a pipeline is. ``hosts`` hold some of it. ``live_hosts`` counts those of the region; ``unread`` counts
    hosts that have not been read yet, of which the next answer may know more. ``as_of`` is RFC 3339, by the
    storage's clock."""

    pipeline: str
    hosts: tuple[HostHolding, ...]
    live_hosts: int
    unread: int
    as_of: str


def namesakes(heartbeats: Mapping[str, float], now: float, hosts: int) -> list[str]:
    """Return those of the heartbeats (name → written by the storage's clock, all of this host's own name, none of them
    its present one) that another host may have written: they live. The newest first."""
    found = [(written, name) for name, written in heartbeats.items() if now - written <= expiry(hosts)]
    return [name for _, name in sorted(found, reverse=True)]


def beat_period(hosts: int) -> float:
    """Seconds between two heartbeats of one of ``hosts``."""
    return BEAT_SECONDS * max(1.0, hosts / BEAT_HOSTS)


def count_period(hosts: int) -> float:
    """Seconds between two listings of the others by one of ``hosts``."""
    return max(beat_period(hosts), hosts / COUNT_HOSTS)


def expiry(hosts: int) -> float:
    """Seconds without a heartbeat after which one of ``hosts`` is gone."""
    return MISSED_BEATS * (1 + JITTER) * beat_period(hosts)


def pack(holdings: Iterable[Holding]) -> bytes:
    """Pack the first MOST_HOLDINGS of them. The caller puts first what matters most."""
    chosen = [one for one, _ in zip(holdings, range(MOST_HOLDINGS), strict=False)]
    return b"".join(
        sorted(
            _ENTRY.pack(
                bytes.fromhex(one.slot),
                bytes.fromhex(one.revision),
                _STATES.index(one.state),
                min(one.cached_bytes, 2**64 - 1),
                min(one.total_bytes, 2**64 - 1),
            )
            for one in chosen
        )
    )


def is_packed(entries: bytes) -> bool:
    """Whether these bytes can be what ``pack`` makes."""
    return len(entries) % ENTRY_BYTES == 0 and len(entries) <= MOST_HOLDINGS * ENTRY_BYTES


def find(entries: bytes, slot: str) -> Holding | None:
    """Return what is packed of that slot."""
    wanted = bytes.fromhex(slot)
    low, high = 0, len(entries) // ENTRY_BYTES
    while low < high:
        middle = (low + high) // 2
        if entries[middle * ENTRY_BYTES : middle * ENTRY_BYTES + 16] < wanted:
            low = middle + 1
        else:
            high = middle
    if entries[low * ENTRY_BYTES : low * ENTRY_BYTES + 16] != wanted:
        return None
    return _unpacked(*_ENTRY.unpack_from(entries, low * ENTRY_BYTES))


def holdings(entries: bytes) -> Iterator[Holding]:
    """Yield all that is packed."""
    return (_unpacked(*fields) for fields in _ENTRY.iter_unpack(entries))


def _unpacked(slot: bytes, revision: bytes, state: int, cached: int, total: int) -> Holding:
    return Holding(slot.hex(), revision.hex(), _STATES[state] if state < len(_STATES) else "error", cached, total)


def percent(holding: Holding) -> int:
    """100 only when all of it is there."""
    if holding.total_bytes <= 0 or holding.cached_bytes >= holding.total_bytes:
        return 100 if holding.state in ("warm", "unverified") or holding.total_bytes > 0 else 0
    return min(99, holding.cached_bytes * 100 // holding.total_bytes)
