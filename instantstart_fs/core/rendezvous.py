"""Rendezvous hashing: assigns each thing to one of many hosts, so that all agree without messages. Pure.

Each pair of a host and a thing has a score; the host with the highest one owns the thing. When a host comes or goes,
only what it owns changes hands. One score serves every level (region, rack): with one score for each, owners would wait
for one another in a circle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable


def score(host: str, thing: str) -> int:
    """64 bits, alike on every machine and in every version."""
    name = host.encode()
    seed = len(name).to_bytes(4, "little") + name + thing.encode()
    return int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "little")


def ranked(thing: str, hosts: Collection[str], most: int | None = None) -> list[str]:
    """Hosts by their claim on ``thing``, its owner first; at most ``most``."""
    return sorted(hosts, key=lambda host: (-score(host, thing), host))[:most]


def order(host: str, things: Iterable[str]) -> list[str]:
    """``things`` as this host goes through them: what it most likely owns comes first, so that hosts that begin
    together begin with different ones."""
    return sorted(things, key=lambda thing: (-score(host, thing), thing))
