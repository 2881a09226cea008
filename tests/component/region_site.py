"""A region's tier in a directory, and the daemon's parts that ask it, in this process and without a daemon."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from instantstart_fs.core.manifest import Digest, FileEntry, ManifestFile
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.region_claims import Claims
from instantstart_fs.filler.region_follow import Follow, Place, RegionSettings, Tiers
from instantstart_fs.filler.region_reads import TierReads
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.keys import RegionKey, keyed_digest
from instantstart_fs.regional.records import Seal, chunk_name, pack, seal_name

KEY = RegionKey(b"k" * 32)
CHUNK = 64 * 1024


class Source:
    """An origin that is asked for nothing but whether it may be read. ``answers``: what it says, one after the other;
    the last one again and again."""

    key = OriginKey("file", "", "")

    def __init__(self, *answers: Exception | None, before: Callable[[], object] = lambda: None) -> None:
        self._answers = list(answers) or [None]
        self._before = before
        self.asked = 0

    def check(self) -> None:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self._before()
        if answer is not None:
            raise answer

    def resolve(self) -> Any:
        raise AssertionError

    def locate(self, file: ManifestFile) -> Location:
        raise AssertionError


class Routes:
    """What filler/regional.py would do, noted."""

    def __init__(self) -> None:
        self.applied: list[Follow] = []
        self.off: list[Follow] = []
        self.errors: list[InstantStartError] = []
        self.blamed: list[int] = []
        """Which tier, of each error."""

    def apply(self, follow: Follow) -> None:
        self.applied.append(follow)

    def turn_off(self, follow: Follow) -> None:
        follow.state, follow.own_left = "off", True
        self.off.append(follow)

    leave_own = go_upstream = turn_off

    def tier_failed(self, source: int, error: InstantStartError) -> None:
        self.errors.append(error)
        self.blamed.append(source)


class RegionSite:
    """``slots``: of each pipeline, now. ``store``: another one than the directory's own. ``upstream``: other tiers,
    of the same key."""

    def __init__(
        self,
        directory: Path,
        store: DirectoryStore | None = None,
        upstream: tuple[DirectoryStore, ...] = (),
        **settings: Any,
    ) -> None:
        self.store = store or DirectoryStore(str(directory))
        stores = (self.store, *upstream)
        self.settings = RegionSettings("here", KEY, stores, (KEY,) * len(stores), **settings)
        self.slots: dict[str, str] = {}
        self.tiers = Tiers(self.settings)
        self.routes = Routes()
        self.putting = 0
        """Chunks of any pipeline that are soon in the tier."""
        self.claims = Claims(self.settings, self.tiers, self.routes, lambda: 1, lambda pipeline: self.putting)
        self.reads = TierReads(self.tiers, self.claims, self.routes, self.places)

    def places(self, pipeline: str, entry: FileEntry, chunk_size: int) -> list[Place]:
        slot = self.slots.get(pipeline)
        if slot is None:
            return []
        return [Place(slot, KEY.pin(slot, entry.path, entry.file, chunk_size))] * len(self.settings.stores)

    def seal(self, pipeline: str, data: bytes, path: str = "model.bin", source: int = 0) -> FileEntry:
        """Put a file into a tier, as a host of its region would."""
        entry = entry_of(data, path)
        slot, pin = self.places(pipeline, entry, CHUNK)[source]
        store = self.settings.stores[source]
        digests = []
        for chunk, start in enumerate(range(0, len(data), CHUNK)):
            piece = data[start : start + CHUNK]
            digests.append(keyed_digest(KEY.chunk_key(pin, chunk, len(piece)), memoryview(piece)))
            store.put(chunk_name(slot, pin, chunk), digests[-1] + piece)
        name = seal_name(slot, pin)
        seal = Seal(len(data), CHUNK, b"".join(digests), "sha256", "there", 0.0)
        store.put(name, pack(KEY, "seal", name, seal))
        return entry


def entry_of(data: bytes, path: str = "model.bin") -> FileEntry:
    digest = Digest("sha256", hashlib.sha256(data).hexdigest())
    return FileEntry(0, 0, path, ManifestFile(path, len(data), path, digest=digest))


@asynccontextmanager
async def region(directory: Path, store: DirectoryStore | None = None, **settings: Any) -> AsyncIterator[RegionSite]:
    site = RegionSite(directory, store, **settings)
    async with trio.open_nursery() as nursery:
        site.tiers.nursery = nursery
        try:
            yield site
        finally:
            site.tiers.nursery = None
            nursery.cancel_scope.cancel()
