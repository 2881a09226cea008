"""What lies in a tier, is it still right, and what may go: for `instantstart regional`. Blocks; trusts no object.

What is deleted under a host that reads it costs that host a fetch from its next source, and nothing else. Age is told
by the storage's own clock, from a listing: no clock of two machines is compared.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from instantstart_fs.errors import OriginMisbehaved, OriginNotFound
from instantstart_fs.regional import records
from instantstart_fs.regional.keys import DIGEST_BYTES, RegionKey, keyed_digest
from instantstart_fs.regional.startup import NAME as STARTUP
from instantstart_fs.regional.startup import unpack_entry
from instantstart_fs.regional.store import Stored, TierStore

MOST = 20_000_000
"""The most objects of a tier that are looked at."""
MOST_CHUNK = (1 << 30) + records.HEADER
MOST_SEAL = records.MOST_RECORD + (16 << 20)
CLAIM_SECONDS = 3600.0
"""Seconds after which a claim that nobody renewed has no owner."""
_SLOT = re.compile(r"v1/([0-9a-f]{32})/(.+)\Z", re.S)

LIVE_SECONDS = 60.0
"""Seconds within which a renewed claim has an owner that fills."""
QUIET_SECONDS = 600.0
"""Seconds after which a file to which nothing was written is filled by nobody."""
LEFT_SECONDS = 3600.0
"""Seconds after which a half-written file or a probe has no owner."""
LOST_SECONDS = 86_400.0
"""Seconds after which a host's heartbeat is removed. It counts for minutes only (core/placement.py)."""
AHEAD_SECONDS = 3600.0
"""Seconds. A time that is further ahead of the storage's clock tells nothing: on a share anybody may set one."""
MOST_LEFT = 1_000_000
DELETERS = 16
Progress = Callable[[int, int], None]
"""(bytes done, bytes altogether)"""


def _silent(done: int, size: int) -> None:
    pass


class SlotSummary(msgspec.Struct):
    """``used``: the storage's clock, seconds, when something of it was last written or used; ``claimed``: when a claim
    of it was last renewed, 0 = there is none."""

    slot: str
    pipeline: str = ""
    files: int = 0
    sealed: int = 0
    chunks: int = 0
    claims: int = 0
    bytes: int = 0
    used: float = 0.0
    claimed: float = 0.0


class Verified(msgspec.Struct):
    """``damaged``: names of what is not what the region's seal says, or not what its own digest says; it was deleted.
    ``unproven``: chunks left of files that no host has proven (yet); ``dropped``: so many of those were deleted."""

    chunks: int = 0
    bytes: int = 0
    damaged: list[str] = []
    unproven: int = 0
    dropped: int = 0


class Collected(msgspec.Struct):
    """``left``: half-written files and probes; ``hosts``: heartbeats of hosts long gone; ``kept_in_use``: slots that
    some host fills."""

    slots: int = 0
    claims: int = 0
    objects: int = 0
    bytes: int = 0
    left: int = 0
    hosts: int = 0
    kept_in_use: int = 0


def age(stored: Stored, now: float) -> float:
    """Return the seconds since the object was written, by the storage's clock. A time in the future tells nothing:
    inf."""
    return now - stored.modified if stored.modified <= now + AHEAD_SECONDS else math.inf


def summaries(store: TierStore, names: dict[str, str], now: float = math.inf) -> list[SlotSummary]:
    """Return every slot, the one used last first. ``names`` gives the pipelines of slots that are known here. ``now``
    is the storage's clock; inf: it is not known."""
    found: dict[str, SlotSummary] = {}
    pins: dict[str, set[str]] = {}
    for stored in store.list("v1/", MOST):
        match = _SLOT.match(stored.name)
        if match is None:
            continue
        slot, rest = match[1], match[2]
        summary = found.setdefault(slot, SlotSummary(slot, names.get(slot, "")))
        summary.bytes += stored.size
        told = stored.modified if stored.modified <= now + AHEAD_SECONDS else 0.0
        summary.used = max(summary.used, told)
        pin, _, what = rest.partition("/")
        if pin in ("used", "startup"):
            continue
        pins.setdefault(slot, set()).add(pin)
        summary.sealed += what == "seal"
        summary.chunks += what.startswith("c/")
        if what.startswith("k/"):
            summary.claims += 1
            summary.claimed = max(summary.claimed, told)
    for slot, summary in found.items():
        summary.files = len(pins.get(slot, ()))
    return sorted(found.values(), key=lambda summary: -summary.used)


def now_of(store: TierStore) -> float:
    """Return the storage's clock, from an object that is written for this. Raises InstantStartError."""
    name = f"v1/probe/{secrets.token_hex(8)}"
    store.put(name, b"")
    try:
        for stored in store.list(name, 1):
            return stored.modified
    finally:
        store.delete(name)
    raise OriginNotFound("what was just written is not listed")


def remove(store: TierStore, slot: str, progress: Progress = _silent) -> Collected:
    """Delete everything of a slot. The seals go first, so that nothing half deleted has a seal."""
    found = list(store.list(f"v1/{slot}/", MOST))
    size = sum(stored.size for stored in found)
    seals = [stored for stored in found if stored.name.endswith("/seal")]
    others = [stored for stored in found if not stored.name.endswith("/seal")]
    done = 0
    with ThreadPoolExecutor(DELETERS) as pool:
        for some in (seals, others):
            for stored, _ in zip(some, pool.map(lambda one: store.delete(one.name), some), strict=True):
                done += stored.size
                progress(done, size)
    return Collected(slots=int(bool(found)), objects=len(found), bytes=size)


class Rules(msgspec.Struct, frozen=True):
    """What may go. ``keep_hot``: seconds since something of a slot was last written or used within which it stays.
    ``capacity``: bytes that the tier may hold, None = whatever is not hot goes; with it slots go only above ``high``
    of it, those used longest ago first, until ``low`` of it. ``filling``: slots that hosts fill right now, as their
    heartbeats say."""

    keep_hot: float
    capacity: int | None = None
    low: float = 0.85
    high: float = 0.95
    filling: frozenset[str] = frozenset()


def chosen(found: Iterable[SlotSummary], rules: Rules, now: float) -> list[SlotSummary]:
    """Return the slots to remove, in order. Pure. A slot is in use if it has a live claim or a host fills it."""
    slots = sorted(found, key=lambda summary: summary.used)
    held = sum(summary.bytes for summary in slots)
    if rules.capacity is not None and held <= rules.high * rules.capacity:
        return []
    going: list[SlotSummary] = []
    for summary in slots:
        if rules.capacity is not None and held <= rules.low * rules.capacity:
            break
        in_use = summary.slot in rules.filling or now - summary.claimed <= LIVE_SECONDS
        if not in_use and now - summary.used > rules.keep_hot:
            going.append(summary)
            held -= summary.bytes
    return going


def collect(store: TierStore, rules: Rules, progress: Progress = _silent) -> Collected:
    """Remove what ``chosen`` says, dead claims, what interrupted writers left, and heartbeats of hosts long gone.

    A host may begin to fill a slot meanwhile: each is looked at again before it goes. What goes under a host all the
    same costs it a fetch from its origin, whose bytes it puts back.
    """
    now, total = now_of(store), Collected()
    found = summaries(store, {}, now)
    going = chosen(found, rules, now)
    size = sum(summary.bytes for summary in going)
    total.kept_in_use = sum(summary.slot in rules.filling or now - summary.claimed <= LIVE_SECONDS for summary in found)
    done = 0
    for summary in going:
        if _written_since(store, summary, now):
            total.kept_in_use += 1
            continue
        removed = remove(store, summary.slot, lambda some, _, before=done: progress(before + some, size))  # type: ignore[misc]
        done += removed.bytes
        total.slots += 1
        total.objects += removed.objects
        total.bytes += removed.bytes
    removed_slots = {summary.slot for summary in going}
    for summary in found:
        if summary.claims and summary.slot not in removed_slots:
            for stored in store.list(f"v1/{summary.slot}/", MOST):
                if "/k/" in stored.name and age(stored, now) > CLAIM_SECONDS:
                    store.delete(stored.name)
                    total.claims += 1
    for stored in (*store.list("v1/probe/", MOST_LEFT), *store.interrupted(MOST_LEFT)):
        if age(stored, now) > LEFT_SECONDS:
            store.delete(stored.name)
            total.left += 1
    for stored in (*store.list("v1/hosts/", MOST_LEFT), *store.list("v1/racks/", MOST_LEFT)):
        if age(stored, now) > LOST_SECONDS:
            store.delete(stored.name)
            total.hosts += 1
    return total


def _written_since(store: TierStore, summary: SlotSummary, now: float) -> bool:
    """Whether anything of the slot was written since ``now``, when it was listed."""
    written = (one for one in store.list(f"v1/{summary.slot}/", MOST) if one.modified > summary.used)
    return any(age(one, now) < math.inf for one in written)


def verify(
    store: TierStore, key: RegionKey, slot: str, progress: Progress = _silent, *, drop_unproven: bool = False
) -> Verified:
    """Read every file of a slot again; what is wrong is deleted, so that the next host brings it anew.

    Chunks of a file without a seal are proven by nobody: they may be a running fill's, or what a host had put before it
    died, or found out that its bytes are wrong. ``drop_unproven``: delete them where no host fills the file now.
    """
    result = Verified()
    found = list(store.list(f"v1/{slot}/", MOST))
    size = sum(stored.size for stored in found if "/c/" in stored.name)
    proven: set[str] = set()
    wrong: set[str] = set()
    for name in [stored.name for stored in found if stored.name.endswith("/seal")]:
        pin = name.split("/")[2]
        try:
            seal = records.unpack_any_seal(key, name, store.get(name, MOST_SEAL))
        except (records.Forged, OriginNotFound, OriginMisbehaved):
            result.damaged.append(name)
            store.delete(name)
            continue
        proven.add(pin)
        for chunk, digest in enumerate(_digests(seal.digests)):
            length = min(seal.chunk_size, seal.size - chunk * seal.chunk_size)
            where = records.chunk_name(slot, pin, chunk)
            body = _body(store, where, min(length + records.HEADER, MOST_CHUNK), result)[records.HEADER :]
            progress(result.bytes, size)
            if len(body) != length or keyed_digest(key.chunk_key(pin, chunk, length), body) != digest:
                result.damaged.append(where)
                store.delete(where)
                wrong.add(pin)
    for name in [stored.name for stored in found if STARTUP.match(stored.name)]:
        _verify_entry(store, key, slot, name, wrong, result)
    files: dict[str, list[Stored]] = {}
    for stored in found:
        pin = stored.name.split("/")[2]
        if pin not in proven and _chunk_of(stored.name) is not None:
            files.setdefault(pin, []).append(stored)
    now = now_of(store) if drop_unproven and files else 0.0
    for pin, objects in files.items():
        if drop_unproven:
            _drop_unproven(store, slot, pin, now, result)
        else:
            _verify_unproven(store, key, pin, objects, result, lambda: progress(result.bytes, size))
    return result


def _verify_entry(store: TierStore, key: RegionKey, slot: str, name: str, wrong: set[str], result: Verified) -> None:
    """A startup cache's record, which is worth nothing without its pack. ``wrong``: packs that lack a chunk."""
    try:
        entry = unpack_entry(key, name, store.get(name, records.MOST_RECORD))
        seal = records.seal_name(slot, entry.pack)
        # It may have been saved since the listing: its seal is looked for anew.
        if entry.pack not in wrong and records.unpack_any_seal(key, seal, store.get(seal, MOST_SEAL)):
            return
    except (records.Forged, OriginNotFound, OriginMisbehaved):
        pass
    result.damaged.append(name)
    store.delete(name)


def _verify_unproven(
    store: TierStore, key: RegionKey, pin: str, found: list[Stored], result: Verified, progress: Callable[[], None]
) -> None:
    """Check only that each chunk is what its host put. The seal that says what it should be is not there yet."""
    for stored in found:
        chunk = _chunk_of(stored.name)
        if chunk is None:
            continue
        data = _body(store, stored.name, min(stored.size, MOST_CHUNK), result)
        progress()
        digest, body = bytes(data[: records.HEADER]), data[records.HEADER :]
        if keyed_digest(key.chunk_key(pin, chunk, len(body)), body) == digest:
            result.unproven += 1
        elif data:
            result.damaged.append(stored.name)
            store.delete(stored.name)


def _drop_unproven(store: TierStore, slot: str, pin: str, now: float, result: Verified) -> None:
    """Delete the chunks, unless the file was filled or sealed in the meantime."""
    found = list(store.list(records.directory(slot, pin), MOST))
    chunks = [stored for stored in found if _chunk_of(stored.name) is not None]
    filled = any(age(one, now) <= (LIVE_SECONDS if "/k/" in one.name else QUIET_SECONDS) for one in found)
    if filled or any(one.name.endswith("/seal") for one in found):
        result.unproven += len(chunks)
        return
    for stored in chunks:
        store.delete(stored.name)
        result.dropped += 1


def _chunk_of(name: str) -> int | None:
    """Return which chunk of its file an object is."""
    what = records.listed("/".join(name.split("/")[3:]))
    return what[0] if what is not None and what[1] is None else None


def _body(store: TierStore, name: str, most: int, result: Verified) -> memoryview:
    """Return a chunk's object; empty where there is none, or a larger one.

    Raises InstantStartError where the tier fails, because a chunk that cannot be read now may be right.
    """
    try:
        data = store.get(name, most)
    except (OriginNotFound, OriginMisbehaved):
        data = b""
    result.chunks += 1
    result.bytes += len(data)
    return memoryview(data)


def _digests(digests: bytes) -> Iterator[bytes]:
    return (digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
