"""Proves that a tier's storage can do what a region needs, by a round trip and a race for one new object."""

from __future__ import annotations

import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from instantstart_fs.errors import InstantStartError, OriginMisbehaved, OriginUnavailable, OriginUnsupported
from instantstart_fs.regional.store import TierStore

WRITERS = 8


class Probe(NamedTuple):
    """The result. ``winners`` counts those of WRITERS that created one new object at once. ``skew`` is the seconds that
    the storage's clock is ahead."""

    winners: int
    skew: float


def probe(store: TierStore) -> Probe:
    """Write below ``v1/probe/`` and remove it again. Raises InstantStartError."""
    name = f"v1/probe/{secrets.token_hex(8)}"
    body = secrets.token_bytes(64)
    store.put(name, body)
    try:
        if store.get(name, 100) != body:
            raise OriginMisbehaved(f"{store.endpoint}: what was written is not what is read")
    finally:
        store.delete(name)

    def race(number: int) -> bool:
        try:
            return store.put_new(name, f"{number}".encode())
        except (OriginUnavailable, OriginUnsupported):  # losers may wait for longer than anybody should
            return False

    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            winners = sum(pool.map(race, range(WRITERS)))
    finally:
        with contextlib.suppress(InstantStartError):
            store.delete(name)
    return Probe(winners, float(getattr(store, "skew", 0.0)))
