"""Reading sealed bytes again: the page cache stays as it is, the pace is kept, wrong bytes are found."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.upkeep.rehash import Pace

MIB = 1024 * 1024
_LIBC = ctypes.CDLL(None, use_errno=True)


def cached_pages(path: Path) -> int:
    """Of the file's pages, how many the page cache holds (mincore)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        _LIBC.mmap.restype = ctypes.c_void_p
        _LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        assert address != ctypes.c_void_p(-1).value
        pages = -(-size // 4096)
        vector = (ctypes.c_ubyte * pages)()
        try:
            assert _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) == 0
        finally:
            _LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(entry & 1 for entry in vector)


@pytest.mark.parametrize("kept", [0, 300], ids=["none cached", "some cached"])
def test_reading_past_the_cache_leaves_it_as_it_was(tmp_path: Path, kept: int) -> None:
    size = 5 * MIB + 4321
    data = os.urandom(size)
    with BlobStore.open(str(tmp_path / "store")) as store:
        with store.blob("p", 1, "x.bin", size) as blob:
            blob.pwrite(0, data)
            blob.datasync()
            os.posix_fadvise(blob.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        path = tmp_path / "store/slots/p/1/files/x.bin"
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for page in range(kept):
                os.pread(file.fileno(), 1, page * 4096)
        before = cached_pages(path)
        if before != kept:
            pytest.skip(f"this filesystem cached {before} pages where {kept} were read")
        blob = store.existing_blob("p", 1, "x.bin")
        assert blob is not None
        with blob:
            read, buffer, found = blob.read_past_cache(), mmap.mmap(-1, MIB), bytearray()
            while len(found) < size:
                count = read(len(found), memoryview(buffer))
                found += buffer[:count]
        assert bytes(found) == data
        assert cached_pages(path) == kept


async def test_the_pace_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    pace, began = Pace(10 * MIB), trio.current_time()
    for _ in range(20):
        await pace.wait(MIB)
    assert trio.current_time() - began == pytest.approx(2.0)
    unlimited, began = Pace(None), trio.current_time()
    await unlimited.wait(1 << 40)
    assert trio.current_time() == began
