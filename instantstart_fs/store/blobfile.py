"""BlobFile: one sparse file of the store and its seal record. It knows nothing about presence (the index does) and
takes no locks.

It owns one descriptor. Reads and writes are positional, so threads may share it; the caller of ``close`` must know that
no thread is inside a call, since the number of a closed descriptor is soon another file's.

What a crash leaves: bytes are durable after ``datasync``, which also makes the file's directory entry durable the
first time; a seal record exists only if every byte before it was fsynced, because the record is an xattr of the very
inode and is set after the first fsync (fsync file, setxattr, fsync file, fsync directory). Many files are sealed in one
go, step by step for all of them (``seal_all``): the journal is then written once a step, and not once a file and step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self

import msgspec

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.errors import InstantStartError, StoreDamaged, StoreUnsupported
from instantstart_fs.store.layout import FORMAT, SEAL_XATTR
from instantstart_fs.store.os_errors import translate, translated
from instantstart_fs.system.libc import LIBC

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2
LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
LIBC.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class SealRecord(msgspec.Struct, frozen=True):
    """The record on a file itself that says that it is whole.

    ``digest``: ``str(Digest)`` that was computed over the stored bytes, None where the origin offers none. ``state``:
    "sealed" (proven) or "unverified". ``sealed_at_ns``: wall clock. ``size`` in bytes.
    """

    size: int
    state: Literal["sealed", "unverified"]
    digest: str | None = None
    sealed_at_ns: int = 0
    v: int = FORMAT
    proof: str | msgspec.UnsetType = msgspec.UNSET
    """The source of the digest, if this host did not hash the file itself: "region:<host>"."""


_SEAL_DECODER = msgspec.json.Decoder(SealRecord)


class BlobFile:
    """An open file of the store. Made by BlobStore; a context manager.

    ``size``: bytes. ``created``: this open made it (or found it without any byte of its length), so whatever the index
    says about its presence is wrong and must be dropped. ``writable``: opened by ``BlobStore.blob``. ``directory``:
    what files of one directory have in common, None = not known.
    """

    __slots__ = (
        "_entry_durable",
        "_inode",
        "_sync_entry",
        "created",
        "directory",
        "fd",
        "name",
        "path",
        "size",
        "writable",
    )

    def __init__(
        self,
        fd: int,
        size: int,
        name: str,
        *,
        writable: bool,
        created: bool,
        sync_entry: Callable[[], None],
        directory: Hashable = None,
    ) -> None:
        self.fd = fd
        self.size = size
        self.name = name
        self.writable = writable
        self.created = created
        self.directory = directory
        self.path: str | None = None
        """The file's path; None until it is first looked up."""
        self._inode: tuple[int, int] | None = None
        self._sync_entry = sync_entry
        self._entry_durable = False

    def is_at(self, found: os.stat_result) -> bool:
        """Whether ``found`` is this very file. Only the first call asks the kernel."""
        if self._inode is None:
            own = os.fstat(self.fd)
            self._inode = own.st_dev, own.st_ino
        return (found.st_dev, found.st_ino) == self._inode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BlobFile {self.name!r} fd={self.fd} size={self.size}>"

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes from ``offset``, fewer than ``length`` only at the end of the file. Holes read as zeros: ask the
        index first. Raises StoreDamaged."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """``pread`` into ``buffer``; the number of bytes, short only at the end of the file."""
        wanted = min(len(buffer), self.size - offset)
        done, again = 0, True
        while done < wanted:
            try:
                count = os.preadv(self.fd, [buffer[done:wanted]], offset + done)
            except OSError as error:
                if error.errno == errno.EIO and again:
                    again = False  # a disk that stumbled says it once
                    continue
                raise translate(error, f"read {self.name}") from error
            if count == 0:
                raise StoreDamaged(f"{self.name} ends at byte {offset + done} of {self.size}: it was cut short")
            done += count
        return max(done, 0)

    def read_past_cache(self) -> Callable[[int, memoryview], int]:
        """A function (offset, buffer) → bytes read, short only at the end, that leaves the page cache as it is: by
        O_DIRECT, so offset and buffer must be multiples of 4 KiB and page-aligned. From now on all reads of this
        BlobFile go past the cache: open one for it alone. Where the filesystem has no O_DIRECT (tmpfs), plain reads."""
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_DIRECT)

        def read(offset: int, buffer: memoryview) -> int:
            wanted, done, again = min(len(buffer), self.size - offset), 0, True
            while done < wanted:
                try:
                    # The whole buffer, also where the file ends within it: O_DIRECT wants whole blocks.
                    count = os.preadv(self.fd, [buffer[done:]], offset + done)
                except OSError as error:
                    if error.errno == errno.EIO and again:
                        again = False
                        continue
                    raise translate(error, f"read {self.name}") from error
                if count == 0 or (done + count < wanted and count % 512):
                    raise StoreDamaged(
                        f"{self.name} ends at byte {offset + done + count} of {self.size}: it was cut short"
                    )
                done += count
            return max(wanted, 0)

        return read

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data`` at ``offset``. Raises StoreFull, StoreReadOnly, StoreDamaged."""
        view = memoryview(data)
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{self.name}: bytes {offset}+{len(view)} lie outside its {self.size} bytes")
        with translated(f"write {self.name}"):
            while view:
                count = os.pwrite(self.fd, view, offset)
                view = view[count:]
                offset += count

    def reserve(self, byte_range: ByteRange) -> None:
        """Allocate blocks for ``byte_range``, so that writing there cannot meet a full disk. Raises StoreFull.

        By fallocate(2) itself: glibc's posix_fallocate writes to every block where the filesystem cannot (ZFS), racing
        with the bytes that arrive. There it does nothing, and a full disk is met by pwrite.
        """
        if byte_range.length <= 0:
            return
        while LIBC.fallocate64(self.fd, _FALLOC_FL_KEEP_SIZE, byte_range.start, byte_range.length) != 0:
            number = ctypes.get_errno()
            if number == errno.EOPNOTSUPP:
                return
            if number != errno.EINTR:
                raise translate(
                    OSError(number, os.strerror(number)), f"reserve {byte_range.length} bytes of {self.name}"
                )

    def datasync(self) -> None:
        """Make the data, the file's length and, the first time, its directory entry durable (also of a file made
        earlier: a killed daemon may not have synced it)."""
        with translated(f"sync {self.name}"):
            os.fdatasync(self.fd)
            if not self._entry_durable:
                self.sync_entry()

    def start_writing(self, part: ByteRange | None = None) -> None:
        """Start writing dirty pages, all or those of ``part``, to the disk, for the fsync that follows. Waits only
        where the disk's queue is full. Never fails."""
        start, length = (part.start, part.length) if part is not None else (0, 0)
        LIBC.sync_file_range(self.fd, start, length, _SYNC_FILE_RANGE_WRITE)

    def sync_entry(self) -> None:
        """Make its directory entry durable. Raises OSError."""
        self._sync_entry()
        self._entry_durable = True

    def entry_is_durable(self) -> None:
        """Note that its directory was synced since the file was made."""
        self._entry_durable = True

    def seal(self, record: SealRecord, *, atime_ns: int | None = None, mtime_ns: int | None = None) -> None:
        """Make the whole file durable, then record that on it. ``atime_ns``, ``mtime_ns``: set these times as well.

        Only for a file whose every byte is written and, unless ``record.state`` is "unverified", proven.
        """
        for error in seal_all([Seal(self, record, atime_ns, mtime_ns)]).values():
            raise error

    def seal_record(self) -> SealRecord | None:
        """The record on the file; None if it has none. Raises StoreDamaged if it cannot be understood."""
        raw = read_seal(self.fd, self.name)
        if raw is None:
            return None
        try:
            record = _SEAL_DECODER.decode(raw)
        except msgspec.MsgspecError as error:
            raise StoreDamaged(f"the seal record of {self.name} cannot be read: {error}") from error
        if record.v > FORMAT:
            raise StoreUnsupported(f"the seal record of {self.name} was written by a newer version ({record.v})")
        return record

    def drop_pages(self, start: int = 0, stop: int = 0) -> None:
        """Drop these bytes (``stop`` 0: up to the end) from the page cache, as far as they are clean and not mapped.
        Never fails."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, start, max(stop - start, 0), os.POSIX_FADV_DONTNEED)

    def unseal(self) -> None:
        """Remove the record, durably: the bytes may change afterwards. No effect without a record."""
        with translated(f"unseal {self.name}"):
            try:
                os.removexattr(self.fd, SEAL_XATTR)
            except OSError as error:
                if error.errno == errno.ENODATA:
                    return
                raise
            os.fsync(self.fd)

    def allocated_bytes(self) -> int:
        """Return the bytes of disk that the file takes (512 × st_blocks)."""
        with translated(f"stat {self.name}"):
            return os.fstat(self.fd).st_blocks * 512


class Seal(NamedTuple):
    """The arguments of ``BlobFile.seal`` for one file."""

    blob: BlobFile
    record: SealRecord
    atime_ns: int | None = None
    mtime_ns: int | None = None


def seal_all(seals: Sequence[Seal]) -> dict[BlobFile, InstantStartError]:
    """``BlobFile.seal`` for all of these, each with the same guarantees; the errors of those that failed.

    Step by step for all: what one file's fsync has written to the journal, the next one's need not. Each directory is
    synced once.
    """
    failed: dict[BlobFile, InstantStartError] = {}

    def each(step: Callable[[Seal], None]) -> None:
        for seal in seals:
            if seal.blob not in failed:
                try:
                    with translated(f"seal {seal.blob.name}"):
                        step(seal)
                except InstantStartError as error:
                    failed[seal.blob] = error

    for blob, record, _, _ in seals:
        if record.size != blob.size:
            raise ValueError(f"{blob.name}: a record of {record.size} bytes cannot seal {blob.size}")
    if len(seals) > 1:
        each(lambda seal: seal.blob.start_writing())
    each(lambda seal: os.fsync(seal.blob.fd))
    each(_write_record)
    each(lambda seal: os.fsync(seal.blob.fd))
    synced: set[Hashable] = set()

    def sync_entry(seal: Seal) -> None:
        directory = seal.blob.directory
        if directory is None or directory not in synced:
            seal.blob.sync_entry()
            synced.add(directory)
        else:
            seal.blob.entry_is_durable()

    each(sync_entry)
    return failed


def _write_record(seal: Seal) -> None:
    fd = seal.blob.fd
    os.setxattr(fd, SEAL_XATTR, msgspec.json.encode(seal.record))
    if seal.atime_ns is not None or seal.mtime_ns is not None:
        status = os.fstat(fd)
        times = (
            status.st_atime_ns if seal.atime_ns is None else seal.atime_ns,
            status.st_mtime_ns if seal.mtime_ns is None else seal.mtime_ns,
        )
        os.utime(fd, ns=times)


def punch_hole(fd: int, byte_range: ByteRange) -> None:
    """Free the blocks of ``byte_range``; it reads as zeros. No effect where the filesystem cannot. Raises OSError."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    # To the end of the last block, which fallocate may have set aside whole.
    length = -(-byte_range.length // 4096) * 4096
    while LIBC.fallocate64(fd, mode, byte_range.start, length) != 0:
        number = ctypes.get_errno()
        if number == errno.EOPNOTSUPP:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def read_seal(fd: int, name: str) -> bytes | None:
    """The raw seal record; None if there is none."""
    try:
        return os.getxattr(fd, SEAL_XATTR)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise translate(error, f"read the seal record of {name}") from error
