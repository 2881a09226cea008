"""Heartbeats of a region's hosts: one object for each host, that says which pipelines it holds. Blocks.

    v1/hosts/<host>.<content>    HostRecord, with a MAC over the name and the body

Its name ends with a digest of what it says, so a reader reads each state of a host once and learns the rest from a
listing: a host that only goes on living costs it nothing. Age is the storage's own clock, told by that listing. Who can
write to the bucket and has no key can put an old record of a host again, and so have it shown for longer than it lives
(docs/SECURITY.md); of what a host holds nobody believes more than that: fetching does not ask.
"""

from __future__ import annotations

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
READERS = 16
READ_SECONDS = 8.0
"""Seconds for one look. What it did not read is read by the next one."""
_NAME = re.compile(r"v1/hosts/([0-9a-f]{32})\.([0-9a-f]{16})\Z")


class HostRecord(msgspec.Struct, frozen=True):
    """What one host holds. ``entries`` come from core.placement.pack; ``left_out`` counts the pipelines beyond
    those. ``life``: tells the process that wrote it from another that calls itself the same host."""

    host: str
    entries: bytes
    left_out: int = 0
    life: str = ""


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


def newest(heartbeats: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    """Return the newest heartbeat of each host, by the digest of its name."""
    found: dict[str, Stored] = {}
    for host, stored in heartbeats:
        if host not in found or found[host].modified < stored.modified:
            found[host] = stored
    return found


def written_by_another(store: TierStore, key: RegionKey, name: str, life: str) -> bool:
    """Whether this heartbeat of the host's own name was written in another life than ``life``. Raises
    InstantStartError."""
    try:
        return unpack_heartbeat(key, name, store.get(name, MOST_HEARTBEAT)).life != life
    except (Forged, OriginMisbehaved, OriginNotFound):
        return False


def living(found: dict[str, Stored], now: float) -> dict[str, Stored]:
    """Return the hosts that were heard of lately. ``now`` is the storage's clock."""
    most = placement.expiry(len(found))
    return {host: stored for host, stored in found.items() if now - stored.modified <= most}


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
        found = newest(listed(self._store))
        if now is None:
            now = max((stored.modified for stored in found.values()), default=0.0)
        alive = living(found, now)
        wanted = {stored.name for stored in alive.values()}
        records = {name: record for name, record in self._records.items() if name in wanted}
        held = sum(len(record.entries) for record in records.values() if record is not None)
        end = time.monotonic() + READ_SECONDS

        def read(name: str) -> tuple[str, HostRecord | None] | None:
            if time.monotonic() > end:
                return None
            try:
                return name, unpack_heartbeat(self._key, name, self._store.get(name, MOST_HEARTBEAT))
            except (Forged, OriginMisbehaved):
                return name, None
            except OriginNotFound:  # it said something new meanwhile
                return None

        failed: InstantStartError | None = None
        with ThreadPoolExecutor(READERS) as pool:
            for future in [pool.submit(read, name) for name in sorted(wanted - records.keys())]:
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
        if failed is not None and not records:
            raise failed
        with self._lock:
            self._records, self._alive = records, alive
        unread = sum(records.get(stored.name) is None for stored in alive.values())
        return Look(len(alive), unread, now)

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
