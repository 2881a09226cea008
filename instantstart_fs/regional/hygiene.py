"""What lies in a tier, is it still right, and what may go: for `instantstart regional`. Blocks; trusts no object.

What is deleted under a host that reads it costs that host a fetch from its next source, and nothing else. Age is told
by the storage's own clock, from a listing: no clock of two machines is compared.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator

import msgspec

from instantstart_fs.errors import InstantStartError, OriginNotFound
from instantstart_fs.regional import records
from instantstart_fs.regional.keys import DIGEST_BYTES, RegionKey, keyed_digest
from instantstart_fs.regional.startup import NAME as STARTUP
from instantstart_fs.regional.startup import unpack_entry
from instantstart_fs.regional.store import TierStore

MOST = 20_000_000
"""Objects of a tier that are looked at."""
MOST_CHUNK = (1 << 30) + records.HEADER
CLAIM_SECONDS = 3600.0
"""A claim that was not renewed for so long is nobody's."""
_SLOT = re.compile(r"v1/([0-9a-f]{32})/(.+)\Z", re.S)

Said = Callable[[str], None]


class SlotSummary(msgspec.Struct):
    """``used``: the storage's clock, seconds, when something of it was last written or used."""

    slot: str
    pipeline: str = ""
    files: int = 0
    sealed: int = 0
    chunks: int = 0
    claims: int = 0
    bytes: int = 0
    used: float = 0.0


class Verified(msgspec.Struct):
    """``damaged``: names of what is not what the region's seal says; it was deleted."""

    chunks: int = 0
    bytes: int = 0
    damaged: list[str] = []


class Collected(msgspec.Struct):
    slots: int = 0
    claims: int = 0
    objects: int = 0
    bytes: int = 0


def summaries(store: TierStore, names: dict[str, str]) -> list[SlotSummary]:
    """Every slot, the one used last first. ``names``: pipeline by slot, as far as they are known here."""
    found: dict[str, SlotSummary] = {}
    pins: dict[str, set[str]] = {}
    for stored in store.list("v1/", MOST):
        match = _SLOT.match(stored.name)
        if match is None:
            continue
        slot, rest = match[1], match[2]
        summary = found.setdefault(slot, SlotSummary(slot, names.get(slot, "")))
        summary.bytes += stored.size
        summary.used = max(summary.used, stored.modified)
        pin, _, what = rest.partition("/")
        if pin == "used" or what.startswith("s/"):
            continue
        pins.setdefault(slot, set()).add(pin)
        summary.sealed += what == "seal"
        summary.chunks += what.startswith("c/")
        summary.claims += what.startswith("k/")
    for slot, summary in found.items():
        summary.files = len(pins.get(slot, ()))
    return sorted(found.values(), key=lambda summary: -summary.used)


def now_of(store: TierStore) -> float:
    """The storage's clock: of an object that is written for it. Raises InstantStartError."""
    name = f"v1/probe/{secrets.token_hex(8)}"
    store.put(name, b"")
    try:
        for stored in store.list(name, 1):
            return stored.modified
    finally:
        store.delete(name)
    raise OriginNotFound("what was just written is not listed")


def remove(store: TierStore, slot: str) -> Collected:
    """Everything of a slot, the seals first."""
    found = list(store.list(f"v1/{slot}/", MOST))
    found.sort(key=lambda stored: not stored.name.endswith("/seal"))
    for stored in found:
        store.delete(stored.name)
    return Collected(int(bool(found)), 0, len(found), sum(stored.size for stored in found))


def collect(store: TierStore, keep_hot: float, kept: Iterable[str] = (), said: Said = lambda text: None) -> Collected:
    """Remove slots of which nothing was written or used for ``keep_hot`` seconds but those ``kept``, and dead claims of
    the others."""
    now, total, kept = now_of(store), Collected(), set(kept)
    for summary in summaries(store, {}):
        if now - summary.used > keep_hot and summary.slot not in kept:
            gone = remove(store, summary.slot)
            total.slots += 1
            total.objects += gone.objects
            total.bytes += gone.bytes
            said(f"{summary.slot}: removed")
        elif summary.claims:
            for stored in store.list(f"v1/{summary.slot}/", MOST):
                if "/k/" in stored.name and now - stored.modified > CLAIM_SECONDS:
                    store.delete(stored.name)
                    total.claims += 1
    return total


def verify(store: TierStore, key: RegionKey, slot: str, said: Said = lambda text: None) -> Verified:
    """Read every sealed file of a slot again; what is wrong is deleted, so that the next host brings it anew."""
    result = Verified()
    for name in [stored.name for stored in store.list(f"v1/{slot}/", MOST) if STARTUP.search(stored.name)]:
        try:
            unpack_entry(key, name, store.get(name, records.MOST_RECORD))
        except (records.Forged, InstantStartError):
            result.damaged.append(name)
            store.delete(name)
    for name in [stored.name for stored in store.list(f"v1/{slot}/", MOST) if stored.name.endswith("/seal")]:
        pin = name.split("/")[2]
        try:
            seal = records.unpack_any_seal(key, name, store.get(name, records.MOST_RECORD + (16 << 20)))
        except (records.Forged, InstantStartError):
            result.damaged.append(name)
            store.delete(name)
            continue
        for chunk, digest in enumerate(_digests(seal.digests)):
            length = min(seal.chunk_size, seal.size - chunk * seal.chunk_size)
            where = records.chunk_name(slot, pin, chunk)
            try:
                data = store.get(where, min(length + records.HEADER, MOST_CHUNK))
            except InstantStartError:
                data = b""
            result.chunks += 1
            result.bytes += len(data)
            body = memoryview(data)[records.HEADER :]
            if len(body) != length or keyed_digest(key.chunk_key(pin, chunk, length), body) != digest:
                result.damaged.append(where)
                store.delete(where)
                said(f"{where}: not what the seal says")
    return result


def _digests(digests: bytes) -> Iterator[bytes]:
    return (digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
