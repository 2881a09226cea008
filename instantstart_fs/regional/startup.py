"""Startup caches in a tier: what one host's engine compiled, for the others of the region.

    v1/<slot>/startup/<key>/<name>     who saved what: a record with a MAC, which names a pack; the newest counts
    v1/<slot>/<pack>/c/<chunk>         the pack, in the form in which a file lies in a tier (regional/records.py)
    v1/<slot>/<pack>/seal

``key`` stands for all that compiled code depends on, ``pack`` for that and the bytes' SHA-256, so that hosts that save
at once never mix. ``name`` is LAST minus the version's number, in hexadecimal: storages list names in order, so the
newest come first, however many older ones nobody may delete.

Whoever lacks the region's key can make a start a cold one, and nothing else: record, seal and each chunk are bound to
it, to the slot, the key and the length. A record whose pack is damaged or gone hides no older one, and the next save of
the same bytes mends it. Who finds it damaged deletes it, if it may.

Blocks, each call at most as long as the storage's own limits; trusts no object.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Collection, Generator, Iterator, Mapping

import msgspec

from instantstart_fs.core.startupcache import KEPT_PER_KEY, StartupRecord
from instantstart_fs.core.startuppack import MAX_BYTES
from instantstart_fs.errors import (
    DigestMismatch,
    OriginError,
    OriginMisbehaved,
    OriginNotFound,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.regional import records
from instantstart_fs.regional.keys import RegionKey, keyed_digest
from instantstart_fs.regional.records import Forged
from instantstart_fs.regional.store import Stored, TierStore

CHUNK = 4 * 1024 * 1024
KEPT = 64
"""The versions of one slot, of all keys, that a save leaves. Those that were written longest ago go."""
LOOKED_AT = 3
"""Records of one key that are read, the newest first."""
LAST = 0xFFFFFFFF
MOST_OF_KEY, MOST_OF_SLOT = 256, 8192
"""Records that a listing shows at most, of a key the newest: whoever may write to the bucket can put any number
there."""
TRIES = 16
"""Numbers that are tried where other hosts save at the same time."""
SPREAD = 4096
"""Numbers after the newest, of which a save draws one: storage that cannot say who of two was first, or says it of
both, keeps two that are saved at the same instant but for one time in so many. A slot has numbers for two million
saves."""
KIND = "startup"
NAME = re.compile(r"v1/[0-9a-f]{32}/startup/([0-9a-f]{32})/([0-9a-f]{8})\Z")


class Entry(msgspec.Struct, frozen=True):
    """One version. ``record`` is without its key, which the entry's name stands for: a command's words do not belong in
    a bucket. ``pack`` is the name of its bytes."""

    record: StartupRecord
    by: str
    pack: str


class Piece(msgspec.Struct, frozen=True):
    """The part of a pack that is needed next. ``digests`` of the chunks before it, which the tier has, and ``whole``,
    a running SHA-256 of their bytes: a later try goes on from there."""

    at: int
    length: int
    digests: bytes
    whole: hashlib._Hash


class Place:
    """The startup caches of one key in one slot."""

    def __init__(self, store: TierStore, key: RegionKey, slot: str, identity: Mapping[str, str]) -> None:
        self._store = store
        self._key = key
        self._slot = slot
        self._text = msgspec.json.encode(sorted(identity.items())).decode()
        self.name = key.startup(slot, self._text)

    def entries(self) -> list[Entry]:
        """Return the versions that were saved last with the region's key, the newest first. Raises OriginError, or
        Forged where only others were found."""
        found, problem = [], None
        for number in self._numbers()[:LOOKED_AT]:
            entry = self._entry(number)
            if isinstance(entry, Entry):
                found.append(entry)
            problem = entry if isinstance(entry, Forged) else problem
        if problem is not None and not found:
            raise problem
        return found

    def _entry(self, number: int) -> Entry | Forged | None:
        return _read_entry(self._store, self._key, self._record_name(number))

    def _numbers(self) -> list[int]:
        """The highest first; MOST_OF_KEY at most."""
        listed = self._store.list(f"v1/{self._slot}/startup/{self.name}/", MOST_OF_KEY)
        found = (NAME.match(stored.name) for stored in listed)
        return sorted((LAST - int(match[2], 16) for match in found if match is not None), reverse=True)

    def _record_name(self, number: int) -> str:
        return f"v1/{self._slot}/startup/{self.name}/{LAST - number:08x}"

    def _pack_name(self, digest: str) -> str:
        return self._key.startup(self._slot, self._text, digest)

    def read(self, record: StartupRecord) -> Iterator[bytes]:
        """Yield the pack piece by piece, each proven. Raises OriginError, Forged."""
        seal = self._seal(record)
        for chunk in range(_chunks(record)):
            yield self._chunk(record, seal, chunk)

    def _chunk(self, record: StartupRecord, seal: records.Seal, chunk: int) -> bytes:
        """Raises OriginError, Forged."""
        pin, length = self._pack_name(record.digest), _length(record, chunk)
        where = records.chunk_name(self._slot, pin, chunk)
        body = self._get(where, length + records.HEADER)[records.HEADER :]
        digest = seal.digests[chunk * records.HEADER : (chunk + 1) * records.HEADER]
        if len(body) != length or keyed_digest(self._key.chunk_key(pin, chunk, length), body) != digest:
            raise Forged(f"{where}: not what the region's seal says")
        return body

    def _seal(self, record: StartupRecord) -> records.Seal:
        """Raises OriginError, Forged."""
        name = records.seal_name(self._slot, self._pack_name(record.digest))
        raw = self._get(name, records.most_seal(record.size, CHUNK))
        return records.unpack_seal(self._key, name, raw, record.size, CHUNK)

    def _get(self, name: str, most: int) -> bytes:
        try:
            return self._store.get(name, most)
        except OriginMisbehaved as error:  # more bytes than it may have
            raise Forged(error.message) from error

    def discard(self, record: StartupRecord, chunk: int) -> bool:
        """Delete a version whose pack was found wrong at that chunk, unless it proves right when it is read again: then
        the way here was wrong. Returns whether it was deleted. Raises OriginError, also where this host may not.

        It gives nobody a right: who can make it wrong has taken the version from all hosts already."""
        try:
            self._chunk(record, self._seal(record), chunk)
            return False
        except Forged:
            pass
        found = False
        for number in self._numbers()[:LOOKED_AT]:
            entry = self._entry(number)
            if isinstance(entry, Entry) and entry.record.digest == record.digest:
                _delete(self._store, self._key, self._slot, self._record_name(number), kept=())
                found = True
        return found

    def saving(
        self, record: StartupRecord, by: str, at: float, *, since: Piece | None = None, mend: bool = False
    ) -> Generator[Piece, bytes, bool]:
        """Save a version: yields which piece of its pack is needed, and takes its bytes. Returns whether it had to be
        written. Raises OriginError, or DigestMismatch where the pack is not what the record says.

        ``since``: what a try before this one needed last; what it had put is not put again. ``mend``: what is there of
        it was found wrong: sizes tell nothing."""
        if record.size > MAX_BYTES:
            return False
        numbers, newest = self._numbers(), None
        for number in numbers[:LOOKED_AT]:
            newest = self._entry(number)
            if isinstance(newest, Entry):
                break
            if newest is not None:  # nobody's: it would be in the way of the next number
                with contextlib.suppress(OriginError):
                    self._store.delete(self._record_name(number))
                    numbers.remove(number)
        is_newest = isinstance(newest, Entry) and newest.record.digest == record.digest
        if is_newest and not mend and self._is_whole(record):
            return False
        yield from self._put_pack(record, by, at, since)
        return is_newest or self._put_record(record, by, max(numbers, default=-1))

    def _put_record(self, record: StartupRecord, by: str, last: int) -> bool:
        """``last``: the number of the newest one before the pack was put. Raises OriginUnavailable where each number
        that follows is taken."""
        name = ""
        for _ in range(TRIES):
            numbers = self._numbers()
            there = [self._entry(number) for number in numbers[:LOOKED_AT] if number > last]
            if any(isinstance(entry, Entry) and entry.record.digest == record.digest for entry in there):
                return False
            number = max(numbers, default=-1) + 1 + secrets.randbelow(SPREAD)
            name, data = self._packed(record, by, min(number, LAST))
            if self._put_new(name, data):
                return True
        raise OriginUnavailable(
            f"{name}: an object is in the way of a newer record, {TRIES} times; if it stays, delete it"
        )

    def _put_new(self, name: str, data: bytes) -> bool:
        """Whether this host wrote it."""
        try:
            return self._store.put_new(name, data)
        except OriginUnsupported:
            self._store.put(name, data)
            return self._store.get(name, records.MOST_RECORD) == data

    def _packed(self, record: StartupRecord, by: str, number: int) -> tuple[str, bytes]:
        name = self._record_name(number)
        kept = msgspec.structs.replace(record, number=number, key={}, view="")
        return name, records.pack(self._key, KIND, name, Entry(kept, by, self._pack_name(record.digest)))

    def _is_whole(self, record: StartupRecord) -> bool:
        """Whether the seal of its pack is there, and every chunk, by its size."""
        try:
            self._seal(record)
        except (OriginNotFound, Forged):
            return False
        return self._has(record, _chunks(record))

    def _has(self, record: StartupRecord, count: int) -> bool:
        """Whether the first ``count`` chunks of its pack are there, by their sizes."""
        pin = self._pack_name(record.digest)
        listed = self._store.list(f"{records.directory(self._slot, pin)}c/", _chunks(record) + 1)
        sizes = {stored.name: stored.size for stored in listed}
        return all(
            sizes.get(records.chunk_name(self._slot, pin, chunk)) == _length(record, chunk) + records.HEADER
            for chunk in range(count)
        )

    def _put_pack(
        self, record: StartupRecord, by: str, at: float, since: Piece | None
    ) -> Generator[Piece, bytes, None]:
        pin = self._pack_name(record.digest)
        whole, digests = hashlib.sha256(), bytearray()
        if since is not None and self._has(record, since.at // CHUNK):
            whole, digests = since.whole.copy(), bytearray(since.digests)
        for chunk in range(len(digests) // records.HEADER, _chunks(record)):
            length = _length(record, chunk)
            body = yield Piece(chunk * CHUNK, length, bytes(digests), whole.copy())
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

    def tidy(self) -> None:
        """Delete older versions of this key, and of the slot what is too much. Raises OriginError. After each save
        of a host that may delete."""
        _tidy(self._store, self._key, self._slot)

    def remove(self) -> int:
        """Delete all versions of this key; how many there were. Raises OriginError. Of very many, also of what only
        others put there, the newest MOST_OF_SLOT."""
        count = 0
        while count < MOST_OF_SLOT and (numbers := self._numbers()):
            for number in numbers:
                _delete(self._store, self._key, self._slot, self._record_name(number), kept=())
            count += len(numbers)
        return count


def _chunks(record: StartupRecord) -> int:
    return -(-record.size // CHUNK)


def _length(record: StartupRecord, chunk: int) -> int:
    return min(CHUNK, record.size - chunk * CHUNK)


def _tidy(store: TierStore, key: RegionKey, slot: str) -> None:
    """By the storage's own clock: no two hosts' clocks are compared."""
    of_key: dict[str, list[Stored]] = {}
    for stored in store.list(f"v1/{slot}/startup/", MOST_OF_SLOT):
        if (match := NAME.match(stored.name)) is not None:
            of_key.setdefault(match[1], []).append(stored)
    kept: list[Stored] = []
    for found in of_key.values():
        kept += sorted(found, key=lambda stored: stored.name)[:KEPT_PER_KEY]
    kept = sorted(kept, key=lambda stored: stored.modified)[-KEPT:]
    names = {stored.name for stored in kept}
    for found in of_key.values():
        going = [stored.name for stored in found if stored.name not in names]
        if not going:
            continue
        left = [_read_entry(store, key, stored.name) for stored in found if stored.name in names]
        packs = {entry.pack for entry in left if isinstance(entry, Entry)}
        for name in going:
            _delete(store, key, slot, name, kept=packs)


def _delete(store: TierStore, key: RegionKey, slot: str, name: str, *, kept: Collection[str]) -> None:
    """A record and its pack, unless that is one of ``kept``; the record first, then the seal: what is half gone is not
    found."""
    entry = _read_entry(store, key, name)
    store.delete(name)
    if isinstance(entry, Entry) and entry.pack not in kept:
        store.delete(records.seal_name(slot, entry.pack))
        for stored in list(store.list(records.directory(slot, entry.pack), -(-MAX_BYTES // CHUNK) + 1)):
            store.delete(stored.name)


def _read_entry(store: TierStore, key: RegionKey, name: str) -> Entry | Forged | None:
    """None where there is nothing any more. Raises OriginError."""
    try:
        return unpack_entry(key, name, store.get(name, records.MOST_RECORD))
    except OriginNotFound:
        return None
    except OriginMisbehaved as error:
        return Forged(error.message)
    except Forged as error:
        return error


def unpack_entry(key: RegionKey, name: str, data: bytes) -> Entry:
    """Raises Forged."""
    return records.unpack(key, KIND, name, data, Entry)


def identity_of(key: Mapping[str, str], files: str, user: str) -> dict[str, str]:
    """Return what a key means on all hosts. Each host numbers generations and users for itself, so ``files`` (a digest
    of what the pipeline holds) and ``user`` (as the configuration names the owner) take the numbers' places."""
    return {**key, "generation": files, "owner": user}
