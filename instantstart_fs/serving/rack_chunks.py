"""Finds the chunks that neighbours in the rack ask for: in files that are filled here, and in complete ones.

It opens nothing by a name that came over the network: a slot and a pin are looked up among those of this host's own
pipelines. A pipeline that is hidden here, since its source refuses its credentials, is given to nobody.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.config import descriptors
from instantstart_fs.core.rack import Asked
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.region_follow import Follow
from instantstart_fs.filler.region_rack import RackLevel
from instantstart_fs.filler.target import FileState
from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.serving.open_files import OpenFiles

LOOK_SECONDS = 0.25
"""Between two looks for a chunk, though nothing of its file has changed: its digest may have become known."""
MOST_FILES = 64
"""Generations whose pins are kept."""


class Part(NamedTuple):
    """Where a chunk lies. ``fd``: the receiver's to close; ``digest``: b"" = not known, and not needed."""

    fd: int
    offset: int
    length: int
    digest: bytes


class NotYet(Exception):
    """It is being filled here, and has not come in time."""


class RackChunks:
    """On the trio thread."""

    def __init__(self, catalog: Catalog, open_files: OpenFiles, level: RackLevel, key: RegionKey) -> None:
        self._catalog = catalog
        self._open_files = open_files
        self._level = level
        self._key = key
        self._slots: dict[str, str] = {}
        """Pipelines by slot, as of the last look."""
        self._pins: dict[tuple[str, int, int], dict[str, int]] = {}
        """By pipeline, generation and when that was pinned: the file's index by pin."""
        self._looking = trio.Lock()

    async def find(self, asked: Asked) -> Part | None:
        """The chunk; None where this host neither has nor fills it. Raises NotYet, StoreError and OSError."""
        follow = self._level.followed(asked.slot, asked.pin)
        if follow is not None:
            pipeline = self._catalog.pipelines.get(follow.key.pipeline)
            if pipeline is None or pipeline.hidden is not None:
                return None
            part = await self._filled(follow, asked)
            if part is not None:
                return part
        return await self._complete(asked)

    async def _filled(self, follow: Follow, asked: Asked) -> Part | None:
        target, chunk, until = follow.target, asked.chunk, trio.current_time() + asked.wait
        if chunk >= target.present.chunks:
            return None
        self._level.owe(follow, chunk)
        while not (follow.over() or target.failed or target.state is FileState.POISONED):
            digest = follow.digests.get(chunk, b"")
            if not digest and (seal := follow.seals.get(0)) is not None:
                digest = seal.digests[32 * chunk : 32 * (chunk + 1)]
            blob = target.blob
            if chunk in target.present and (digest or asked.sealed) and blob is not None and blob.fd >= 0:
                place = target.present.byte_range(chunk)
                return Part(descriptors.held(os.dup(blob.fd), spare=True), place.start, place.length, digest)
            if trio.current_time() >= until:
                raise NotYet
            changed = trio.Event()
            target.watch(changed)
            try:
                with trio.move_on_at(min(until, trio.current_time() + LOOK_SECONDS)):
                    await changed.wait()
            finally:
                target.unwatch(changed)
        return None

    async def _complete(self, asked: Asked) -> Part | None:
        digest = self._level.digest(asked.pin, asked.chunk)
        if not (digest or asked.sealed):  # it is nowhere but in the tier's seal
            return None
        pipeline = self._pipeline(asked.slot)
        if pipeline is None or pipeline.hidden is not None:
            return None
        try:
            generation = await self._catalog.ensure_loaded(pipeline)
        except InstantStartError:
            return None
        if generation is None:
            return None
        index = (await self._pins_of(generation, asked.slot)).get(asked.pin)
        if index is None or pipeline.hidden is not None or pipeline.removed:
            return None
        file, size = generation.files[index], generation.manifest.chunk_size
        offset = asked.chunk * size
        if not file.complete or file.stale_error is not None or offset >= file.size:
            return None
        return Part(self._open_files.duplicate(file), offset, min(size, file.size - offset), digest)

    def _pipeline(self, slot: str) -> Pipeline | None:
        """The pipeline of that slot."""
        found = self._catalog.pipelines.get(self._slots.get(slot, ""))
        if found is None or self._key.slot(found.spec) != slot:
            self._slots = {self._key.slot(one.spec): name for name, one in self._catalog.pipelines.items()}
            found = self._catalog.pipelines.get(self._slots.get(slot, ""))
        return found

    async def _pins_of(self, generation: Generation, slot: str) -> dict[str, int]:
        name = (generation.pipeline.id, generation.number, generation.resolved_at_ns)
        async with self._looking:
            if name not in self._pins:
                manifest, key = generation.manifest, self._key

                def pins() -> dict[str, int]:  # a hundred thousand files take most of a second
                    return {
                        key.pin(slot, entry.path, entry.file, manifest.chunk_size): entry.index
                        for entry in manifest.files
                    }

                found = await trio.to_thread.run_sync(pins)
                while len(self._pins) >= MOST_FILES:
                    del self._pins[next(iter(self._pins))]
                self._pins[name] = found
            return self._pins[name]
