"""Reads a generation from its manifest and the index's records. It changes nothing, and may run in a thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from instantstart_fs.catalog.gc_control import gc_paused
from instantstart_fs.catalog.model import Generation, OpenOrigin, Pipeline, UnloadedGeneration
from instantstart_fs.errors import InstantStartError, NoSuchEntry, OutOfResources, StoreDamaged, StoreLost
from instantstart_fs.filler.target import FileState
from instantstart_fs.index.environment import Index
from instantstart_fs.store.blobstore import BlobStore

PATIENCE_TRIES, PATIENCE_SECONDS = 20, 0.25


class GenerationReader:
    """Reads generations from store and index. ``read_whole``: how many it has read so far."""

    def __init__(self, store: BlobStore, index: Index, open_origin: OpenOrigin) -> None:
        self._store = store
        self._index = index
        self._open_origin = open_origin
        self.read_whole = 0

    def read_patiently(self, unloaded: UnloadedGeneration) -> Generation:
        """Call ``read_unloaded``, and repeat it for some seconds while descriptors or memory are short."""
        for _ in range(PATIENCE_TRIES):
            try:
                return self.read_unloaded(unloaded)
            except OutOfResources:
                time.sleep(PATIENCE_SECONDS)
        return self.read_unloaded(unloaded)

    def read_unloaded(self, unloaded: UnloadedGeneration) -> Generation:
        """Read the generation that ``unloaded`` stands for, with its counts. Blocks, and may run in a thread: it
        changes nothing. Raises InstantStartError."""
        with gc_paused(unloaded.file_count):
            generation = self.read(unloaded.pipeline, unloaded.number)
            with _ended_unless_done(generation):
                for file in generation.files:
                    if file.bitmap:
                        # No record says what it takes.
                        where = (unloaded.pipeline.id, unloaded.number, file.entry.path)
                        if (blob := self._store.existing_blob(*where)) is not None:
                            with blob:
                                generation.set_allocated(file, blob.allocated_bytes())
                generation.count_all()
            return generation

    def read(self, pipeline: Pipeline, number: int) -> Generation:
        """Build a generation from its manifest and records. Blocks; changes nothing. Raises StoreError."""
        self.read_whole += 1
        try:
            return self._decode_generation(pipeline, number)
        except InstantStartError:
            raise
        except Exception as error:
            # A record that says what cannot be, in whatever way, is its pipeline's error and nobody else's.
            raise StoreDamaged(
                f"{pipeline.id}: what is recorded of generation {number} cannot be read ({type(error).__name__}: "
                f"{error}); run `instantstart fsck`"
            ) from error

    def _decode_generation(self, pipeline: Pipeline, number: int) -> Generation:
        try:
            manifest = self._store.metadata.load_manifest(pipeline.id, number)
        except NoSuchEntry as error:
            raise StoreLost(
                f"{pipeline.id}: its manifest is gone; `instantstart update {pipeline.id}` resolves it anew"
            ) from error
        if not pipeline.learned_read:
            # An earlier version, or fsck without an index, wrote nothing of it there.
            pipeline.learned = self._store.metadata.load_learned(pipeline.id)
            pipeline.learned_read = True
        record = self._index.read(lambda txn: txn.get_generation(pipeline.id, number))
        if record is None:
            raise StoreDamaged(
                f"{pipeline.id}: the index has no record of generation {number}; run `instantstart fsck`"
            )
        files = self._index.read(lambda txn: dict(txn.files(pipeline.id, number)))
        generation = Generation(pipeline, manifest, record.nodeid_base, self._open_origin)
        generation.block = self._store.block_size
        generation.set_absent()
        with _ended_unless_done(generation):
            for index, state in files.items():
                file = generation.files[index]
                file.state = FileState(state.state)
                file.incarnation = state.incarnation
                file.bitmap = state.bitmap
                if file.bitmap:
                    file.chunk_map()  # raises for one of another length
                generation.set_allocated(file, state.allocated)
                # With an incarnation and no nodeid: died between the poisoning and the record of its new one.
                file.nodeid = state.nodeid or (0 if state.incarnation else file.nodeid)
        generation.invalidate_counts()
        return generation


@contextmanager
def _ended_unless_done(generation: Generation) -> Iterator[None]:
    try:
        yield
    except BaseException:
        generation.end()
        raise
