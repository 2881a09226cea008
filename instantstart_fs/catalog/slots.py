"""What has to hold in a slot before bytes come into it, and what a crash left there.

A fill asks here before its first byte: the file still counts, index and slot say nothing that would not be so.
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
"""Between two looks whether the slot of what is being filled is whole."""


def trim(catalog: Catalog, generation: Generation) -> None:
    """Give back what a crash left of files whose record does not speak of it. Blocks; nobody may be filling. Raises
    StoreError."""
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


def check_present(catalog: Catalog, file: CachedFile) -> None:
    """Raises why nobody may fill it any more: it is gone, or what it belongs to is."""
    pipeline = file.generation.pipeline
    if file.stale_error is not None:
        raise file.stale_error
    if pipeline.removed:
        raise FillCancelled(f"{pipeline.id}: the pipeline was removed")
    if catalog.file(file.key) is not file:
        raise FillCancelled(f"{pipeline.id}: the pipeline was evicted or updated meanwhile")


async def prepare_filling(catalog: Catalog, file: CachedFile) -> None:
    """Before bytes of it may come: the index says nothing of it that would not be so. Raises StoreError, and what
    ``check_present`` raises: what it writes would be another's that has the same name."""
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
    """What its slot says of itself, where somebody removed that under the daemon: the next start has need of it.
    Raises StoreError."""
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
    """Blocks."""
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
