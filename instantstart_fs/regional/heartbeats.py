"""Heartbeats of a region's hosts: one object for each host, that says which pipelines it holds. Blocks.

    v1/hosts/<host>.<content>    HostRecord, with a MAC over the name and the body

Its name ends with a digest of what it says, so a reader reads each state of a host once and learns the rest from a
listing: a host that only goes on living costs it nothing. Age is the storage's own clock, told by that listing. Who can
write to the bucket and has no key can put an old record of a host again, and so have it shown for longer than it lives
(docs/SECURITY.md); of what a host holds nobody believes more than that: fetching does not ask. What nobody with the key
has written hides no host: the newest of its objects that can be read counts.
"""

from __future__ import annotations

import heapq
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec

from instantstart_fs.core import placement
from instantstart_fs.core.placement import Holding, HostHolding
from instantstart_fs.errors import InstantStartError, OriginMisbehaved, OriginNotFound, OriginUnavailable
from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.regional.records import MAC, Forged, pack, unpack
from instantstart_fs.regional.store import Stored, TierStore

DIRECTORY = "v1/hosts/"
MOST_HOSTS = 20_000
"""The most names of hosts that are listed."""
MOST_HELD = 64 << 20
"""The most bytes of heartbeats that a reader keeps. A thousand hosts with a thousand pipelines each take 37 MB."""
MOST_HEARTBEAT = MAC + placement.MOST_HOLDINGS * placement.ENTRY_BYTES + 4096
TRIED = 4
"""Objects of one host that are looked at, the newest first, until one can be read."""
AHEAD_SECONDS = 3600.0
"""A time that is further ahead of the storage's clock tells nothing: on a share anybody may set one."""
READERS = 16
READ_SECONDS = 8.0
"""Seconds for one look. What it did not read is read by the next one."""
_NAME = re.compile(r"v1/hosts/([0-9a-f]{32})\.([0-9a-f]{16})\Z")


class HostRecord(msgspec.Struct, frozen=True):
    """What one host holds. ``entries`` come from core.placement.pack; ``left_out`` counts the pipelines beyond
    those. ``life``: tells the process that wrote it from another that calls itself the same host; ``met``: the lives of
    such others that it has heard of. What is put again by somebody without the key is of the past, and so names no life
    that began since."""

    host: str
    entries: bytes
    left_out: int = 0
    life: str = ""
    met: tuple[str, ...] = ()


def object_of(key: RegionKey, record: HostRecord) -> tuple[str, bytes]:
    """Return the record's name and bytes."""
    name = f"{DIRECTORY}{key.host(record.host)}.{key.content(record)}"
    return name, pack(key, "host", name, record)


def unpack_heartbeat(key: RegionKey, name: str, data: bytes) -> HostRecord:
    """Raises Forged."""
    record = unpack(key, "host", name, data, HostRecord)
    if not placement.is_packed(record.entries) or not name.startswith(f"{DIRECTORY}{key.host(record.host)}."):
        raise Forged(f"{name}: no heartbeat")
    return record


def listed(store: TierStore) -> list[tuple[str, Stored]]:
    """Return all heartbeats, each with the digest of its host's name. Raises InstantStartError."""
    matched = ((_NAME.match(stored.name), stored) for stored in store.list(DIRECTORY, MOST_HOSTS))
    return [(match[1], stored) for match, stored in matched if match is not None]


def by_host(heartbeats: Iterable[tuple[str, Stored]]) -> dict[str, list[Stored]]:
    """Return the heartbeats of each host, by the digest of its name: the newest TRIED, in that order."""
    found: dict[str, list[Stored]] = {}
    for host, stored in heartbeats:
        found.setdefault(host, []).append(stored)
    return {host: heapq.nlargest(TRIED, some, key=lambda one: one.modified) for host, some in found.items()}


def newest(found: dict[str, list[Stored]]) -> float:
    """Return when the last heartbeat of all was written: the storage's clock, where nothing tells it better."""
    return max((some[0].modified for some in found.values()), default=0.0)


def read(store: TierStore, key: RegionKey, name: str) -> HostRecord | None:
    """Return what a heartbeat says, None where it is none or there is none any more. Raises InstantStartError."""
    try:
        return unpack_heartbeat(key, name, store.get(name, MOST_HEARTBEAT))
    except (Forged, OriginMisbehaved, OriginNotFound):
        return None


def living(found: dict[str, list[Stored]], now: float) -> dict[str, list[Stored]]:
    """Return what was written lately, of the hosts of which there is any. ``now`` is the storage's clock."""
    most = placement.expiry(len(found))
    lately = {
        host: [one for one in some if -AHEAD_SECONDS <= now - one.modified <= most] for host, some in found.items()
    }
    return {host: some for host, some in lately.items() if some}


class Look(msgspec.Struct, frozen=True):
    """What one look found. ``hosts`` are those that live; ``unread`` counts those that were not read yet or cannot be
    read; ``now`` is the storage's clock."""

    hosts: int
    unread: int
    now: float


class HeartbeatReader:
    """Reads what the hosts say, each record once. Thread-safe; a second look at the same time is refused."""

    def __init__(self, store: TierStore, key: RegionKey) -> None:
        self._store = store
        self._key = key
        self._looking = threading.Lock()
        self._lock = threading.Lock()
        """Guards what is known. Nobody holds it while waiting for the tier."""
        self._records: dict[str, HostRecord | None] = {}
        """Object → its record; None where it holds none."""
        self._alive: dict[str, Stored] = {}

    def look(self, now: float | None = None) -> Look:
        """Read what is new. ``now`` is the storage's clock; None takes the time of the newest heartbeat. Raises
        InstantStartError."""
        if not self._looking.acquire(blocking=False):  # its thread was given up, and hangs
            raise OriginUnavailable("the regional tier has not answered the last look at it yet")
        try:
            return self._look(now)
        finally:
            self._looking.release()

    def _look(self, now: float | None) -> Look:
        found = by_host(listed(self._store))
        if now is None:
            now = newest(found)
        alive = living(found, now)
        wanted = {stored.name for some in alive.values() for stored in some}
        records = {name: record for name, record in self._records.items() if name in wanted}
        failed = self._read(alive, records)
        if failed is not None and not records:
            raise failed
        chosen = {host: _readable(some, records) or some[0] for host, some in alive.items()}
        with self._lock:
            self._records, self._alive = records, chosen
        unread = sum(records.get(stored.name) is None for stored in chosen.values())
        return Look(len(alive), unread, now)

    def _read(self, alive: dict[str, list[Stored]], records: dict[str, HostRecord | None]) -> InstantStartError | None:
        """Read of each host the newest that can be read, for READ_SECONDS. Returns an error that came."""
        end = time.monotonic() + READ_SECONDS

        def one(name: str) -> tuple[str, HostRecord | None] | None:
            if time.monotonic() > end:
                return None
            try:
                return name, unpack_heartbeat(self._key, name, self._store.get(name, MOST_HEARTBEAT))
            except (Forged, OriginMisbehaved):
                return name, None
            except OriginNotFound:  # it said something new meanwhile
                return None

        held = sum(len(record.entries) for record in records.values() if record is not None)
        asked = set[str]()
        while True:
            first = (_readable(some, records) for some in alive.values())
            names = {stored.name for stored in first if stored is not None} - records.keys() - asked
            if not names or time.monotonic() > end:
                return None
            asked |= names
            failed: InstantStartError | None = None
            with ThreadPoolExecutor(READERS) as pool:
                for future in [pool.submit(one, name) for name in sorted(names)]:
                    try:
                        got = future.result()
                    except InstantStartError as error:
                        failed, got = error, None
                    if got is None:
                        continue
                    held += len(got[1].entries) if got[1] is not None else 0
                    if held > MOST_HELD:
                        break
                    records[got[0]] = got[1]
                pool.shutdown(cancel_futures=True)
            if failed is not None or held > MOST_HELD:
                return failed

    def holding(self, slot: str, now: float, revision: str | None = None) -> list[HostHolding]:
        """Return the hosts that hold some of the pipeline, as of the last look: complete ones first, then by name.
        ``revision`` is what the asking host is pinned to."""
        with self._lock:
            pairs = [(self._records.get(stored.name), stored.modified) for stored in self._alive.values()]
        found = []
        for record, modified in pairs:
            if record is not None and (held := placement.find(record.entries, slot)) is not None:
                found.append(_shown(record.host, held, modified, now, revision))
        return sorted(found, key=lambda one: (-one.percent, one.host))

    def filling(self) -> set[str]:
        """Return the slots that some host fills now. They are in use."""
        with self._lock:
            records = [self._records.get(stored.name) for stored in self._alive.values()]
        return {
            held.slot
            for record in records
            if record is not None
            for held in placement.holdings(record.entries)
            if held.state == "filling"
        }


def _readable(some: Iterable[Stored], records: dict[str, HostRecord | None]) -> Stored | None:
    """The first of a host's objects that can be read, as far as is known."""
    return next((one for one in some if records.get(one.name, one) is not None), None)


def _shown(host: str, held: Holding, modified: float, now: float, revision: str | None) -> HostHolding:
    return HostHolding(
        host=host,
        state=held.state,
        percent=placement.percent(held),
        cached_bytes=held.cached_bytes,
        total_bytes=held.total_bytes,
        current=None if revision is None else held.revision == revision,
        last_seen=datetime.fromtimestamp(modified, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        age=round(max(now - modified, 0.0), 1),
    )
