"""Reads one extent of a file into memory: what the page cache has from there, the rest by O_DIRECT. It has no state.

Measured (docs/decisions/prefetch-reading.md): several threads of O_DIRECT reach the disk's ceiling, where page-cache
reads pay for a second copy and for the pages' allocation. What another process has just read is in the cache
though, and taking it from there is several times faster than the disk.
"""

from __future__ import annotations

import errno
import os

from instantstart_fs.errors import OutOfBudget, StoreDamaged
from instantstart_fs.prefetch.plan import BLOCK

NO_MEMORY = (errno.ENOMEM, errno.EFAULT, errno.ENOBUFS)
"""The kernel's errors when the pages to read into cannot be had."""

CACHE_STEP = 2 * 1024 * 1024
"""Bytes asked of the page cache by one call after the first page's. Each call is a turn with the GIL; each extent of
which the cache has a part costs up to so many bytes of readahead that the direct read then pays for again."""


def read_extent(
    plain: int, direct: int | None, start: int, end: int, memory: memoryview, path: str = "file"
) -> tuple[int, int]:
    """Fill ``memory`` with the bytes ``start`` to ``end``; (from the page cache, from the disk).

    ``start`` is a multiple of BLOCK, ``memory`` begins at a multiple of BLOCK and is long enough for whole blocks (what
    lies beyond ``end`` is undefined afterwards). ``direct`` None: all of it by way of the page cache, counted as disk.
    Raises StoreDamaged when the file ends early or cannot be read, OutOfBudget when the memory cannot be had.
    """
    length = end - start
    try:
        cached = _from_cache(plain, start, memory[:length]) if direct is not None else 0
        if cached >= length:
            return length, 0
        done = cached - cached % BLOCK
        if direct is not None:
            done = _by_direct(direct, start, length, done, memory)
        while done < length:
            count = os.preadv(plain, [memory[done:length]], start + done)
            if count == 0:
                raise StoreDamaged(f"{path} ends at byte {start + done}, before its size: it was cut short")
            done += count
    except OSError as error:
        if error.errno in NO_MEMORY:
            raise OutOfBudget(f"{path}: no memory left at byte {start}: {error.strerror}") from error
        raise StoreDamaged(f"{path} cannot be read at byte {start}: {error.strerror or error}") from error
    kept = min(cached - cached % BLOCK, length)
    return kept, length - kept


def _from_cache(plain: int, start: int, memory: memoryview) -> int:
    """Copy as many bytes as the page cache has from ``start`` on; how many. A miss starts readahead of all that was
    asked, so the first page alone is asked for first, and the first short answer is the last."""
    done = 0
    wanted = min(BLOCK, len(memory))
    while done < wanted:
        try:
            count = os.preadv(plain, [memory[done:wanted]], start + done, os.RWF_NOWAIT)
        except OSError:
            return done  # EAGAIN: not there. Anything else: no such feature here.
        done += count
        if done < wanted:
            return done
        wanted = min(done - done % CACHE_STEP + CACHE_STEP, len(memory))
    return done


def _by_direct(direct: int, start: int, length: int, done: int, memory: memoryview) -> int:
    """``done`` and the result: bytes in place from ``start``; it stops early where O_DIRECT does not work."""
    padded = -(-length // BLOCK) * BLOCK
    while done < length:
        try:
            count = os.preadv(direct, [memory[done:padded]], start + done)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EFAULT):
                return done  # a filesystem with another idea of alignment; memory that a device cannot write to
            raise
        done += count
        if done < length and (count < BLOCK or done % BLOCK):
            return done - done % BLOCK
    return min(done, length)
