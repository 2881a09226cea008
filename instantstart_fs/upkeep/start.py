"""Cleans up at start what a crash left in the store: superseded generations, and bytes that no record speaks of."""

from __future__ import annotations

import functools
import logging

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.slots import trim
from instantstart_fs.errors import InstantStartError
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.layout import generation_number

log = logging.getLogger(__name__)


def remove_superseded(catalog: Catalog) -> None:
    """Delete what an update, an eviction or a fill left when the daemon died. Blocks; call it before anything is
    filled. A pipeline with a current summary (catalog/residency.py) is clean, and skipped."""
    store, index = catalog.store, catalog.index
    for pipeline in catalog.dirty_at_start:
        current = pipeline.current
        if current is None:
            continue
        kept = {generation.number for generation in pipeline.generations()}
        try:
            for name in store.tree.list_directory(pipeline.id):
                number = generation_number(name)
                if number is not None and number not in kept:
                    store.delete_generation(pipeline.id, number)
                    index.write_sync(
                        functools.partial(_forget_generation, pipeline.id, number), patience=index.commit_deadline
                    )
            trim(catalog, current)
        except InstantStartError as error:
            pipeline.leftovers = True
            # One slot that cannot be cleaned must not keep the others from being served.
            log.error("what it left behind stays: %s", error.message, extra={"pipeline": pipeline.id})


def _forget_generation(pipeline: str, number: int, txn: WriteTxn) -> None:
    txn.delete_generation(pipeline, number)
