from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.errors import StoreDamaged, StoreFull, StoreUnsupported
from instantstart_fs.store.blobfile import BlobFile, SealRecord
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.layout import SEAL_XATTR

SIZE = 1 << 20


@pytest.fixture
def blob(store: BlobStore) -> Iterator[BlobFile]:
    with store.blob("p", 1, "sub dir/wäight.bin", SIZE) as blob:
        yield blob


def test_a_new_file_is_sparse_and_reads_back_what_was_written(blob: BlobFile) -> None:
    assert blob.created
    assert blob.allocated_bytes() < SIZE
    blob.pwrite(SIZE - 5, b"hello")
    assert blob.pread(SIZE - 5, 100) == b"hello"
    assert blob.pread(SIZE, 1) == b""
    assert blob.pread(0, 4) == b"\0\0\0\0"
    buffer = bytearray(8)
    assert blob.pread_into(SIZE - 5, memoryview(buffer)) == 5
    assert buffer == b"hello\0\0\0"


def test_nothing_is_written_outside_the_file(blob: BlobFile) -> None:
    for offset in (-1, SIZE - 2):
        with pytest.raises(ValueError, match="outside"):
            blob.pwrite(offset, b"abc")
    assert os.fstat(blob.fd).st_size == SIZE


def test_reserve_allocates_and_keeps_size_and_bytes(blob: BlobFile) -> None:
    blob.pwrite(4096, b"kept")
    blob.reserve(ByteRange(0, 65536))
    assert 65536 <= blob.allocated_bytes() < SIZE
    assert blob.pread(4096, 4) == b"kept"
    blob.reserve(ByteRange(7, 7))
    assert os.fstat(blob.fd).st_size == SIZE


def test_a_file_cut_short_is_damage_and_not_zeros(blob: BlobFile) -> None:
    os.truncate(blob.fd, 10)
    with pytest.raises(StoreDamaged, match="cut short"):
        blob.pread(0, 100)


def test_the_seal_survives_reopening_and_sets_the_times(store: BlobStore, blob: BlobFile) -> None:
    assert blob.seal_record() is None
    record = SealRecord(SIZE, "sealed", "sha256:00", 17)
    blob.seal(record, atime_ns=5, mtime_ns=1_700_000_000_123_456_789)
    again = store.existing_blob("p", 1, "sub dir/wäight.bin")
    assert again is not None
    with again:
        assert again.seal_record() == record
        assert os.fstat(again.fd).st_mtime_ns == 1_700_000_000_123_456_789
        assert os.fstat(again.fd).st_atime_ns == 5


def test_opening_for_filling_breaks_the_seal(store: BlobStore, blob: BlobFile) -> None:
    blob.seal(SealRecord(SIZE, "unverified"))
    with store.blob("p", 1, "sub dir/wäight.bin", SIZE) as again:
        assert not again.created
        assert again.seal_record() is None


def test_a_seal_of_another_size_is_refused(blob: BlobFile) -> None:
    with pytest.raises(ValueError, match="cannot seal"):
        blob.seal(SealRecord(SIZE - 1, "sealed", "sha256:00"))


@pytest.mark.parametrize("raw", [b"", b"nonsense", b'{"size":"x"}', b"\xff\xfe"])
def test_a_seal_that_cannot_be_read_is_damage(blob: BlobFile, raw: bytes) -> None:
    os.setxattr(blob.fd, SEAL_XATTR, raw)
    with pytest.raises(StoreDamaged, match="seal record"):
        blob.seal_record()


def test_a_seal_of_a_newer_version_is_refused(blob: BlobFile) -> None:
    os.setxattr(blob.fd, SEAL_XATTR, b'{"size":1,"state":"sealed","v":2}')
    with pytest.raises(StoreUnsupported, match="newer"):
        blob.seal_record()


def test_the_seal_comes_after_the_bytes_and_before_the_directory(
    store: BlobStore, blob: BlobFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that makes the record true after a power cut, whichever call is the last one."""
    calls: list[str] = []
    real_fsync, real_setxattr = os.fsync, os.setxattr

    def fsync(fd: int) -> None:
        calls.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real_fsync(fd)

    def setxattr(fd: int, name: str, value: bytes) -> None:
        calls.append("setxattr")
        real_setxattr(fd, name, value)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "setxattr", setxattr)
    blob.seal(SealRecord(SIZE, "unverified"))
    assert calls == ["fsync wäight.bin", "setxattr", "fsync wäight.bin", "fsync sub dir"]


def test_the_first_datasync_makes_the_entry_durable_even_of_a_file_found(
    store: BlobStore, blob: BlobFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real_fsync(fd)

    with store.blob("p", 1, "sub dir/wäight.bin", SIZE) as found:
        assert not found.created
        monkeypatch.setattr(os, "fsync", fsync)
        found.datasync()
        assert synced == ["sub dir"]
        found.datasync()
        assert synced == ["sub dir"]


def test_a_full_disk_is_met_by_reserve(small_ext4: Path) -> None:
    with BlobStore.open(str(small_ext4 / "store")) as store, store.blob("p", 1, "big", 64 << 20) as blob:
        with pytest.raises(StoreFull, match="no space"):
            blob.reserve(ByteRange(0, 64 << 20))
        blob.pwrite(0, b"what fits")
        with pytest.raises(StoreFull, match="no space"):
            blob.pwrite(4096, bytes(48 << 20))
        assert blob.pread(0, 9) == b"what fits"
