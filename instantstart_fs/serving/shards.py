"""The weight files of a generation for staging (mount/staging.py): their load order and their descriptors."""

from __future__ import annotations

import functools

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Generation
from instantstart_fs.core import staging
from instantstart_fs.errors import StoreDamaged
from instantstart_fs.filler.target import FileKey
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.open_notifications import OpenListener
from instantstart_fs.telemetry.telemetry import Telemetry

MAX_INDEX_JSON = 64 * 1024 * 1024
"""The largest index.json that is read, in bytes. A model of 100,000 tensors has one of 10 MB. A larger one is not used
for ordering."""


class Shards:
    """Shows the staging which shards pipelines have. Use it on the trio thread."""

    def __init__(self, catalog: Catalog, open_files: OpenFiles, telemetry: Telemetry) -> None:
        self._catalog = catalog
        self._open_files = open_files
        self.staged = telemetry.staged

    def notify_opens(self, listener: OpenListener) -> None:
        """Report opens to ``listener`` from now on, and at once those that are open already."""
        self._open_files.notify(listener, self._catalog.pipelines.values())

    def shards(self, pipeline: str, generation: int) -> tuple[staging.Shard, ...]:
        """The weight files of that generation's load set in the natural order of their names, as they are now; empty
        when it is gone."""
        found = self._generation(pipeline, generation)
        return found.shards() if found is not None else ()

    async def load_order(self, pipeline: str, generation: int) -> tuple[int, ...]:
        """File indices of its shards in the order in which an engine reads them. Raises StoreError."""
        found = self._generation(pipeline, generation)
        if found is None:
            return ()
        shards = found.shards()
        indexes: dict[str, bytes] = {}
        if staging.needs_index(shards):
            for file in found.files:
                if file.entry.path.endswith(".index.json") and file.complete and file.size <= MAX_INDEX_JSON:
                    read = functools.partial(self._read_stored, pipeline, generation, file.entry.path)
                    indexes[file.entry.path] = await trio.to_thread.run_sync(read)
        return tuple(shard.index for shard in staging.in_load_order(shards, indexes))

    def open_stored(self, key: FileKey) -> int:
        """A read-only descriptor of the store's own complete file, the caller's to close. It does not count as an open.
        Raises StoreError."""
        file = self._catalog.file(key)
        if file is None or not file.passthrough_eligible:
            raise StoreDamaged(f"{key.pipeline}: file {key.index} is not complete any more")
        return self._open_files.duplicate(file)

    def _generation(self, pipeline: str, number: int) -> Generation | None:
        found = self._catalog.pipelines.get(pipeline)
        generations = found.generations() if found is not None else ()
        return next((generation for generation in generations if generation.number == number), None)

    def _read_stored(self, pipeline: str, generation: int, path: str) -> bytes:
        blob = self._catalog.store.existing_blob(pipeline, generation, path)
        if blob is None:
            return b""
        with blob:
            return blob.pread(0, blob.size)
