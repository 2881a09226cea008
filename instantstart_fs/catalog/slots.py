"""Prepares slots for fills, and removes what a crash left in them.

Before its first byte a fill makes sure here that the file is still wanted, and that index and slot claim nothing false.
"""

from __future__ import annotations

import functools
import logging

import msgspec
import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import CachedFile, Generation
from instantstart_fs.errors import FillCancelled, StoreLost
from instantstart_fs.filler.target import FileState
from instantstart_fs.index.transactions import WriteTxn

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Seconds between two checks that the slot of a running fill is whole."""


def trim(catalog: Catalog, generation: Generation) -> None:
    """Delete bytes that a crash left and no file record mentions. Blocks; no fill may run. Raises StoreError."""
    if all(file.complete for file in generation.files):
        return
    keep = {
        file.entry.path: None if file.complete else file.chunk_map()
        for file in generation.files
        if file.complete or file.bitmap
    }
    taken = catalog.store.trim(generation.pipeline.id, generation.number, keep)
    for file in generation.files:
        if not file.complete and file.entry.path in taken:
            generation.set_allocated(file, taken[file.entry.path])
    generation.invalidate_counts()


def is_present(catalog: Catalog, file: CachedFile) -> bool:
    """Whether the file, its generation and its pipeline are still there: where not, ``check_present`` says why."""
    return file.stale_error is None and not file.generation.pipeline.removed and catalog.file(file.key) is file


def check_present(catalog: Catalog, file: CachedFile) -> None:
    """Raise InstantStartError if the file, its generation or its pipeline is not there any more."""
    pipeline = file.generation.pipeline
    if file.stale_error is not None:
        raise file.stale_error
    if pipeline.removed:
        raise FillCancelled(f"{pipeline.id}: the pipeline was removed")
    if catalog.file(file.key) is not file:
        raise FillCancelled(f"{pipeline.id}: the pipeline was evicted or updated meanwhile")


async def prepare_filling(catalog: Catalog, file: CachedFile) -> None:
    """Make index and slot ready for the file's first bytes. Raises StoreError, and what ``check_present`` raises, since
    the file's name may belong to another pipeline by now."""
    generation = file.generation
    with generation.pipeline.changing():
        check_present(catalog, file)
        await catalog.invalidate_summary(generation.pipeline)
        check_present(catalog, file)
        if generation.suspect or trio.current_time() >= generation.checked_at + LOOK_SECONDS:
            await _restore_slot(catalog, generation)
            check_present(catalog, file)
        if (forget := generation.owed_index_write) is not None:
            await catalog.index.write(forget, patience=catalog.index.commit_deadline)
            generation.owed_index_write = None
        if (lost := file.bitmap) and not await trio.to_thread.run_sync(_is_there, catalog, file):
            check_present(catalog, file)
            # A new file in its place, and a kill before its first commit: the old record would vouch for its holes.
            forget = functools.partial(_forget_bitmap, file, lost)
            await catalog.index.write(forget, patience=catalog.index.commit_deadline)
            if file.bitmap == lost and file.target is None:
                file.bitmap = b""
                generation.set_allocated(file, 0)
                generation.invalidate_counts()


async def _restore_slot(catalog: Catalog, generation: Generation) -> None:
    """Write pipeline.json and manifest.json again if somebody removed them: the next start needs them. Raises
    StoreError."""
    generation.suspect, generation.checked_at = False, trio.current_time()
    pipeline = generation.pipeline
    restored = await trio.to_thread.run_sync(
        catalog.store.metadata.restore_slot, pipeline.spec, pipeline.created_at_ns, generation.manifest
    )
    if restored:
        log.warning("its description was removed from the store, and is restored", extra={"pipeline": pipeline.id})
        if pipeline.removed and pipeline.id not in catalog.pipelines:
            await trio.to_thread.run_sync(catalog.store.delete_pipeline, pipeline.id)


def _is_there(catalog: Catalog, file: CachedFile) -> bool:
    """Return whether the store has the file. Blocks."""
    try:
        blob = catalog.store.existing_blob(*file.triple[:2], file.entry.path)
    except StoreLost:
        return False  # something else is; the next fill removes that
    if blob is None:
        return False
    with blob:
        return blob.size == file.size


def _forget_bitmap(file: CachedFile, lost: bytes, txn: WriteTxn) -> None:
    record = txn.get_file(*file.triple)
    if record is not None and record.incarnation == file.incarnation and record.bitmap == lost:
        txn.put_file(*file.triple, msgspec.structs.replace(record, state=FileState.ABSENT.value, bitmap=b""))
