"""Proves that a tier's storage can do what a region needs, by a round trip and a race for one new object; that a key is
its region's, by a record there; and that no other host has this one's name. For `doctor`. Blocks."""

from __future__ import annotations

import contextlib
import random
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

from instantstart_fs.errors import (
    InstantStartError,
    OriginMisbehaved,
    OriginNotFound,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.regional import heartbeats, hygiene, records
from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.regional.store import TierStore

WRITERS = 8
MOST_BEATS, MOST_READ = 32, 8
"""Heartbeats and seals that are read to prove a key. Somebody without the key may have put some of them there."""
MOST_LISTED = 20_000
"""The most names in which a seal is looked for. A file of 140 GB has 17,000 chunks before its seal."""


class Finding(NamedTuple):
    """What `doctor` shows."""

    outcome: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


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


class KeyProof(NamedTuple):
    """What the records of a tier say of a key. ``holds``: whether there is any object; ``read``: records that were
    read; ``proven``: whether one of them was made with the key."""

    holds: bool
    read: int
    proven: bool


def prove_key(store: TierStore, key: RegionKey, host: str = "") -> KeyProof:
    """Read heartbeats and seals until one was made with the key. ``host``: whose own records prove nothing. Raises
    InstantStartError."""
    own = key.host(host) if host else ""
    beats = [stored.name for digest, stored in heartbeats.listed(store) if digest != own]
    read = 0
    for name in _some(beats, MOST_BEATS):
        try:
            data = store.get(name, heartbeats.MOST_HEARTBEAT)
            read += 1
            heartbeats.unpack_heartbeat(key, name, data)
            return KeyProof(True, read, True)
        except (records.Forged, OriginMisbehaved, OriginNotFound):
            continue
    names = [stored.name for stored in store.list("v1/", MOST_LISTED)]
    for name in _some([name for name in names if name.endswith("/seal")], MOST_READ):
        try:
            data = store.get(name, hygiene.MOST_SEAL)
            read += 1
            if records.unpack_any_seal(key, name, data).by != (host or None):
                return KeyProof(True, read, True)
            read -= 1
        except (records.Forged, OriginMisbehaved, OriginNotFound):
            continue
    return KeyProof(bool(names), read, False)


def _some(names: list[str], most: int) -> list[str]:
    """At random: whoever has no key chooses which names come first, and not which are read."""
    return random.sample(names, min(most, len(names)))


def upstream_finding(store: TierStore, key: RegionKey) -> Finding:
    """Say whether another region's tier can be read, and whether this is its key. Nothing is written there. Raises
    InstantStartError."""
    proof = prove_key(store, key)
    if proof.proven:
        return Finding("ok", "can be read, and what is sealed there verifies with this key")
    if proof.read:
        advice = "name that region's key as this upstream's key_file; until then nothing there is believed"
        return Finding("fail", f"none of {proof.read} records there was made with this key", advice)
    if proof.holds:
        return Finding("ok", "can be read; nothing is sealed there yet, so its key is not proven")
    return Finding("ok", "can be read and is empty, so its key is not proven (is its prefix the other region's?)")


def own_finding(store: TierStore, key: RegionKey, host: str, warning: str | None) -> Finding:
    """Say whether this host can use its region's tier. ``warning``: what its daemon warns of, "" = of nothing, None =
    none runs. Raises InstantStartError."""
    found = probe(store)
    if found.winners != 1:
        advice = (
            "hosts may pull a chunk more than once; nothing else suffers. SeaweedFS from 4.17, Ceph, MinIO, AWS and R2 "
            "do it"
        )
        return Finding("warn", f"of {WRITERS} writers of one new object {found.winners} won", advice)
    proof = prove_key(store, key, host)
    if proof.read and not proof.proven:
        advice = (
            "copy the region's key_file from another host; until then this one shares nothing with them. "
            "If every host says so, somebody without the key writes to the bucket"
        )
        return Finding("warn", f"none of {proof.read} records there of other hosts was made with this key", advice)
    if warning:
        return Finding("warn", warning, "rename one of them, and restart its daemon")
    if warning is None and (age := heard_of(store, key, host)) is not None:
        advice = "give each host a name of its own ([regional] host), unless this one's daemon was stopped just now"
        return Finding("warn", f"a host of this name was heard of {age:.0f} s ago, and no daemon runs here", advice)
    off = f"; this clock is {-found.skew:+.0f} s off, requests are signed by the tier's" if found.skew else ""
    return Finding("ok", f"reads, writes, and lets one writer win{off}")


def heard_of(store: TierStore, key: RegionKey, host: str) -> float | None:
    """Return the seconds since a living host of this name was heard of, by what was made with the key. Raises
    InstantStartError."""
    own = key.host(host)
    found = heartbeats.by_host(heartbeats.listed(store))
    if own not in found:
        return None
    now = hygiene.now_of(store)
    for stored in heartbeats.living(found, now).get(own, ()):
        if heartbeats.read(store, key, stored.name) is not None:
            return max(0.0, now - stored.modified)
    return None
