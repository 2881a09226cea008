"""Reads a complete file again and compares its digest, block by block, at a given pace, past the page cache.

The pages that engines have cached stay, and nothing new is cached: verifying a store of terabytes flushes nobody.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable

import trio

from instantstart_fs.catalog.model import CachedFile
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.core.ratelimit import Bucket
from instantstart_fs.errors import DigestMismatch, InstantStartError, StoreDamaged
from instantstart_fs.store.blobstore import BlobStore

BLOCK = 4 * 1024 * 1024
"""Bytes of one read: 1 ms of a fast disk. The rate is counted in such blocks."""


class Pace:
    """Limits reading to ``rate`` bytes a second; None: as fast as the disk."""

    def __init__(self, rate: float | None) -> None:
        self._bucket = Bucket(rate, 0.0, trio.current_time()) if rate else None

    async def wait(self, count: int) -> None:
        """Return when ``count`` more bytes may be read."""
        if self._bucket is not None:
            await trio.sleep(self._bucket.take(trio.current_time(), count))


async def rehash(
    store: BlobStore,
    file: CachedFile,
    ready: Callable[[int], Awaitable[object]],
    on_read: Callable[[int], object],
) -> InstantStartError | None:
    """Return what is wrong with the store's bytes; None if they are those that were sealed. A file without a digest is
    right if all of it can be read.

    Args:
        store: The store.
        file: The file, which is complete.
        ready: Returns when so many bytes more may be read (``Pace.wait``, say), or raises.
        on_read: Is called with the bytes of each block, on the trio thread."""
    digest, generation = file.entry.file.digest, file.generation
    buffer = mmap.mmap(-1, BLOCK)
    try:
        blob = await trio.to_thread.run_sync(
            store.open_sealed, generation.pipeline.id, generation.number, file.entry.path, file.proof
        )
        with blob:
            hasher = new_hasher(digest, file.size) if digest is not None else None
            read = blob.read_past_cache()

            def block(offset: int) -> int:
                count = read(offset, memoryview(buffer))
                if hasher is not None:
                    hasher.update(memoryview(buffer)[:count])
                return count

            offset = 0
            while offset < file.size:
                await ready(min(BLOCK, file.size - offset))
                count = await trio.to_thread.run_sync(block, offset)
                offset += count
                on_read(count)
            if hasher is not None and digest is not None and hasher.hexdigest() != digest.value:
                return DigestMismatch(f"{file.entry.path}: the store's bytes are not those that were sealed")
    except StoreDamaged as error:
        return error
    return None
