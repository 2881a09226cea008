"""Where the hosts of a rack answer their neighbours: one small object for each host. Blocks.

    v1/racks/<rack>/<host>.<content>     RackRecord, with a MAC over the name and the body

A listing of one rack names its living hosts; each state of a host is read once. Age is the storage's own clock, which a
host tells from its own record: tickets expire by that clock, so that no two hosts' clocks are compared.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from instantstart_fs.core import placement
from instantstart_fs.core.addresses import split_address
from instantstart_fs.errors import OriginMisbehaved, OriginNotFound
from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.regional.records import MAC, Forged, pack, unpack
from instantstart_fs.regional.store import Stored, TierStore

DIRECTORY = "v1/racks/"
MOST_HOSTS = 256
"""The most hosts of one rack."""
MOST_RECORD = MAC + 1024
_NAME = re.compile(r"([0-9a-f]{32})\.[0-9a-f]{16}\Z")


class RackRecord(msgspec.Struct, frozen=True):
    """Where one host answers. ``address`` is an IP address and a port."""

    host: str
    rack: str
    address: str


class Rack(NamedTuple):
    """The living hosts of a rack, this one included, by name with their addresses. ``clock`` is the storage's, as this
    host's own record tells it; None while that is not listed."""

    hosts: dict[str, str]
    clock: float | None


def object_of(key: RegionKey, record: RackRecord) -> tuple[str, bytes]:
    """Return the record's name and bytes."""
    name = f"{DIRECTORY}{key.rack(record.rack)}/{key.host(record.host)}.{key.content(record)}"
    return name, pack(key, "rack", name, record)


def unpack_record(key: RegionKey, name: str, data: bytes) -> RackRecord:
    """Raises Forged."""
    record = unpack(key, "rack", name, data, RackRecord)
    if name != object_of(key, record)[0] or split_address(record.address) is None:
        raise Forged(f"{name}: no host of a rack")
    return record


class RackReader:
    """Reads the rack's records, each once. Thread-safe: a call that hung may go on beside the next one."""

    def __init__(self, store: TierStore, key: RegionKey, rack: str) -> None:
        self._store = store
        self._key = key
        self._prefix = f"{DIRECTORY}{key.rack(rack)}/"
        self._records: dict[str, RackRecord | None] = {}
        """Object → its record; None where it holds none."""

    def read(self, own: str, now: float | None = None) -> Rack:
        """Return who lives in the rack. ``own`` is this host's object, ``now`` the storage's clock where it is known
        otherwise. Raises InstantStartError."""
        newest: dict[str, Stored] = {}
        for stored in self._store.list(self._prefix, 2 * MOST_HOSTS):
            match = _NAME.match(stored.name.removeprefix(self._prefix))
            known = newest.get(match[1]) if match is not None else None
            # This host knows which of its own is the newest: storage tells seconds, and it may have moved within one.
            if match is not None and (
                known is None or stored.name == own or (known.name != own and known.modified < stored.modified)
            ):
                newest[match[1]] = stored
        clock = next((one.modified for one in newest.values() if one.name == own), None)
        if now is None:
            now = clock if clock is not None else max((one.modified for one in newest.values()), default=0.0)
        most = placement.expiry(len(newest))
        wanted = [one.name for one in newest.values() if now - one.modified <= most][:MOST_HOSTS]
        records = {name: record for name, record in self._records.items() if name in wanted}
        for name in wanted:
            if name not in records:
                try:
                    records[name] = unpack_record(self._key, name, self._store.get(name, MOST_RECORD))
                except (Forged, OriginMisbehaved):
                    records[name] = None
                except OriginNotFound:  # it says something new by now
                    continue
        self._records = records
        return Rack({record.host: record.address for record in records.values() if record is not None}, clock)
