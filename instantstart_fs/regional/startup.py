"""Startup caches in a tier: what one host's engine compiled, for the others of the region.

    v1/<slot>/<key>/s/<number>      who saved what: a record with a MAC, which names a pack; the highest number counts
    v1/<slot>/<pack>/c/<chunk>      the pack, in the form in which a file lies in a tier (regional/records.py)
    v1/<slot>/<pack>/seal

``key`` stands for all that compiled code depends on, ``pack`` for that and the bytes' SHA-256: what is there is never
written again, so that hosts that save at once never mix. Somebody without the region's key can make a start a cold one,
and nothing else: record, seal and each chunk are bound to it, to the slot, the key and the length.

Blocks, each call at most as long as the storage's own limits; trusts no object.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping

import msgspec

from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.core.startuppack import MAX_BYTES
from instantstart_fs.errors import DigestMismatch, OriginNotFound
from instantstart_fs.regional import records
from instantstart_fs.regional.keys import RegionKey, keyed_digest
from instantstart_fs.regional.records import Forged
from instantstart_fs.regional.store import TierStore

CHUNK = 4 * 1024 * 1024
MOST_VERSIONS = 16
"""The most versions of one key. Their host alone keeps the saves beyond."""
LOOKED_AT = 3
"""Records of one key that are read, the newest first, while those before were not written with the region's key."""
NAME = re.compile(r"s/([0-9a-f]{4})\Z")


class Entry(msgspec.Struct, frozen=True):
    """One version. ``record`` is without its key, which the entry's name stands for: a command's words do not belong in
    a bucket."""

    record: StartupRecord
    by: str


class Place:
    """The startup caches of one key in one slot."""

    def __init__(self, store: TierStore, key: RegionKey, slot: str, identity: Mapping[str, str]) -> None:
        self._store = store
        self._key = key
        self._slot = slot
        self._text = msgspec.json.encode(sorted(identity.items())).decode()
        self._name = key.startup(slot, self._text)

    def latest(self) -> Entry | None:
        """Return the version that was saved last with the region's key. Raises OriginError, or Forged where only others
        were found."""
        problem: Forged | None = None
        for number in sorted(self._numbers(), reverse=True)[:LOOKED_AT]:
            name = self._record_name(number)
            try:
                return unpack_entry(self._key, name, self._store.get(name, records.MOST_RECORD))
            except OriginNotFound:
                pass
            except Forged as error:
                problem = error
        if problem is not None:
            raise problem
        return None

    def _numbers(self) -> list[int]:
        start = f"v1/{self._slot}/{self._name}/s/"
        found = (NAME.search(stored.name) for stored in self._store.list(start, MOST_VERSIONS))
        return [int(match[1], 16) for match in found if match is not None]

    def _record_name(self, number: int) -> str:
        return f"v1/{self._slot}/{self._name}/s/{number:04x}"

    def _pack_name(self, digest: str) -> str:
        return self._key.startup(self._slot, self._text, digest)

    def read(self, record: StartupRecord) -> Iterator[bytes]:
        """Yield the pack piece by piece, each proven. Raises OriginError, Forged."""
        pin = self._pack_name(record.digest)
        name = records.seal_name(self._slot, pin)
        raw = self._store.get(name, records.most_seal(record.size, CHUNK))
        seal = records.unpack_seal(self._key, name, raw, record.size, CHUNK)
        for chunk in range(-(-record.size // CHUNK)):
            length = min(CHUNK, record.size - chunk * CHUNK)
            where = records.chunk_name(self._slot, pin, chunk)
            body = self._store.get(where, length + records.HEADER)[records.HEADER :]
            digest = seal.digests[chunk * records.HEADER : (chunk + 1) * records.HEADER]
            if len(body) != length or keyed_digest(self._key.chunk_key(pin, chunk, length), body) != digest:
                raise Forged(f"{where}: not what the region's seal says")
            yield body

    def save(self, record: StartupRecord, read: Callable[[int, int], bytes], by: str, at: float) -> bool:
        """Save a version, whose pack ``read`` (count, offset) gives. Returns whether it was new. Raises OriginError, or
        DigestMismatch where the pack is not what the record says."""
        numbers = self._numbers()
        if numbers and self._is_there(max(numbers), record):
            return False
        number = max(numbers, default=-1) + 1
        if number >= MOST_VERSIONS or record.size > MAX_BYTES:
            return False
        self._put_pack(record, read, by, at)
        while number < MOST_VERSIONS:
            name = self._record_name(number)
            entry = Entry(msgspec.structs.replace(record, number=number, key={}, view=""), by)
            if self._store.put_new(name, records.pack(self._key, KIND, name, entry)):
                return True
            if self._is_there(number, record):
                return False
            number += 1
        return False

    def _is_there(self, number: int, record: StartupRecord) -> bool:
        name = self._record_name(number)
        try:
            found = unpack_entry(self._key, name, self._store.get(name, records.MOST_RECORD))
        except (OriginNotFound, Forged):
            return False
        return found.record.digest == record.digest

    def _put_pack(self, record: StartupRecord, read: Callable[[int, int], bytes], by: str, at: float) -> None:
        pin = self._pack_name(record.digest)
        whole, digests = hashlib.sha256(), bytearray()
        for chunk in range(-(-record.size // CHUNK)):
            length = min(CHUNK, record.size - chunk * CHUNK)
            body = read(length, chunk * CHUNK)
            if len(body) != length:
                raise DigestMismatch("the startup cache is shorter than it was")
            whole.update(body)
            digest = keyed_digest(self._key.chunk_key(pin, chunk, length), body)
            digests += digest
            self._store.put(records.chunk_name(self._slot, pin, chunk), digest + body)
        if whole.hexdigest() != record.digest:
            raise DigestMismatch("the startup cache is not what was saved")
        name = records.seal_name(self._slot, pin)
        shown = f"startup cache ({record.engine or 'engine unknown'})"
        seal = records.Seal(record.size, CHUNK, bytes(digests), f"sha256:{record.digest}", by, at, shown)
        self._store.put(name, records.pack(self._key, "seal", name, seal))


KIND = "startup"


def unpack_entry(key: RegionKey, name: str, data: bytes) -> Entry:
    """Raises Forged."""
    return records.unpack(key, KIND, name, data, Entry)


def identity_of(key: Mapping[str, str], files: str) -> dict[str, str]:
    """Return what a key means on all hosts. Each host numbers generations for itself, so ``files`` (a digest of what
    the pipeline holds) takes the number's place."""
    return {**key, "generation": files}
