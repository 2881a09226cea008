"""Opens the index for the daemon, and rebuilds it from the slots if it is lost. The slots are the truth.

An index is lost if it is missing or empty, cannot be read, or belongs to another store (each store has an identity,
which its index names). The old one is moved aside. Nothing is removed from slots. Partly filled files are fetched
again, since a sparse file does not tell which bytes were written. What only the index knew is lost: times of requests
(so nothing is evicted for ``rest`` seconds, as after a clock that was set), partial files, cold starts.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from instantstart_fs.errors import StoreDamaged
from instantstart_fs.index.environment import Index
from instantstart_fs.index.nodeids import HighWater
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.os_errors import translated

if TYPE_CHECKING:
    from instantstart_fs.upkeep.fsck import FsckProgress

log = logging.getLogger(__name__)

AGAIN_SECONDS = 0.5
TOLD_SECONDS = 5.0


def open_index(store: BlobStore, *, rest: float, told: Callable[[str], None] = lambda line: None) -> Index:
    """Open the index of ``store``, rebuilt if it was lost. Blocks for some milliseconds, or a minute to rebuild a
    million files; ``told`` gets a line every few seconds then. Raises StoreError."""
    began = time.monotonic()
    reason, index = _open(store)
    if index is not None and reason is None:
        return index
    if index is None:
        _move_aside(store, reason or "")
        _keep_nodeids_apart(store)
        index = Index.open(store.layout.index, nodeids_path=store.layout.nodeids)
    try:
        _rebuild(store, index, reason or "", rest, told, began)
    except BaseException:
        index.close()
        raise
    return index


def _open(store: BlobStore) -> tuple[str | None, Index | None]:
    """Return why the index is to be rebuilt (None: it is not), and the index (None: it cannot be used)."""
    slots = store.tree.list_directory()
    if not os.path.exists(os.path.join(store.layout.index, "data.mdb")):
        _keep_nodeids_apart(store, slots)
    for again in (True, False):
        try:
            index = Index.open(store.layout.index, nodeids_path=store.layout.nodeids)
            try:
                return _judge(store, index, slots)
            except BaseException:
                index.close()
                raise
        except StoreDamaged as error:
            if not again:
                return error.message, None
            time.sleep(AGAIN_SECONDS)  # a disk that stumbled says it once
    raise AssertionError


def _judge(store: BlobStore, index: Index, slots: list[str]) -> tuple[str | None, Index | None]:
    known = index.read(lambda txn: {record.spec.id for record in txn.pipelines()})
    identity = index.read(lambda txn: txn.store_identity())
    if not known and any(store.metadata.has_pipeline(name) for name in slots):
        return "it is empty, and pipelines lie in the store", index
    if identity is None or store.identity_is_new:
        foreign = bool(known) and bool(slots) and known.isdisjoint(slots)
    else:
        foreign = bool(known) and identity != store.identity
    if foreign:
        index.close()
        return "it is the index of another store", None
    if identity is None and store.identity:
        index.write_sync(lambda txn: txn.put_store_identity(store.identity))
    elif identity is not None and store.identity_is_new:
        store.take_identity(identity)
    return None, index


def _move_aside(store: BlobStore, reason: str) -> None:
    place = store.layout.index
    with translated(f"move {place} aside"):
        for earlier in glob.glob(glob.escape(place) + ".damaged-*"):
            shutil.rmtree(earlier)
        moved = f"{place}.damaged-{time.time_ns()}"
        os.rename(place, moved)
    log.error("the index cannot be used (%s): it was moved to %s", reason, moved)


def _keep_nodeids_apart(store: BlobStore, slots: list[str] | None = None) -> None:
    """Begin with nodeids far beyond any that the kernel may remember: their file may be lost with the index."""
    place = store.layout.nodeids
    if slots == []:
        return
    with contextlib.suppress(OSError, ValueError), open(place, "rb") as file:
        int(file.read(32))
        return
    HighWater(place).set(int(time.time()) << 20)


def _rebuild(
    store: BlobStore, index: Index, reason: str, rest: float, told: Callable[[str], None], began: float
) -> None:
    from instantstart_fs.upkeep.fsck import rebuild

    log.warning("the index is made anew from what lies in the store: %s", reason)
    last = began

    def report(progress: FsckProgress) -> None:
        nonlocal last
        if time.monotonic() >= last + TOLD_SECONDS:
            last = time.monotonic()
            told(f"making the index anew: {progress.pipeline}")

    found = rebuild(store, index, report, rest=rest)
    for problem in found.problems[:20]:
        log.warning("%s", problem)
    log.warning(
        "the index was made anew in %.1f s: %d pipelines, %d complete files; partial ones are fetched again, and "
        "nothing is evicted for %.0f h",
        time.monotonic() - began,
        found.pipelines,
        found.sealed + found.unverified,
        rest / 3600,
    )
