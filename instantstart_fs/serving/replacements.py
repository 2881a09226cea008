"""Fetches files again whose bytes were wrong or lost, once a new incarnation is in their place."""

from __future__ import annotations

import functools

import msgspec
import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import CachedFile
from instantstart_fs.catalog.slots import is_present
from instantstart_fs.errors import InstantStartError
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.serving.fill_events import FillEventHandler
from instantstart_fs.serving.reads import Reads


async def run_replacements(catalog: Catalog, fill_events: FillEventHandler, reads: Reads) -> None:
    """Write the nodeids of new incarnations to the index, then fetch the wanted ones again. Until cancelled."""
    async with trio.open_nursery() as nursery:
        async for file, wanted, exposure in fill_events.replaced:
            if exposure is not None:
                nursery.start_soon(fill_events.log_exposure, exposure)
            generation = file.generation
            try:
                # An eviction may have come first: then the record is another incarnation's. Index operations run in the
                # order of their calls, so one that comes later has the last word.
                if is_present(catalog, file):
                    await catalog.index.write(functools.partial(_record_nodeid, file))
                    if wanted:
                        await reads.start_fill(generation, first=file)
                    await catalog.nodeids.top_up()
            except InstantStartError as error:
                if is_present(catalog, file):  # else nobody misses it
                    reads.end_idle_fill(generation)
                    fill_events.set_failure(generation.pipeline, error, final=True)
            del file, generation  # the next may be long in coming


def _record_nodeid(file: CachedFile, txn: WriteTxn) -> None:
    """Write the nodeid alone into the file's record, which may say more by now: it may be filling."""
    key = file.key
    if file.generation.pipeline.removed or file.stale_error is not None:
        return
    record = txn.get_file(key.pipeline, key.generation, key.index) or FileRecord("absent", file.incarnation)
    txn.put_file(key.pipeline, key.generation, key.index, msgspec.structs.replace(record, nodeid=file.nodeid))
