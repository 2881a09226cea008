"""Startup caches on disk, in their pipeline's slot:

    slots/<pipeline>/startup/<number>/record.json     core.startupcache.StartupRecord: the seal
    slots/<pipeline>/startup/<number>/pack            core.startuppack

A version is made in the trash, synced, and renamed into place whole: what a crash leaves is in the trash, which the
next start empties. It is never changed afterwards. Blocks; callers choose the threads, and see to it that the slot is
not deleted meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import time

import msgspec

from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.core.startuppack import BadPack, read_index
from instantstart_fs.errors import StoreDamaged, StoreFull, StoreLost
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.layout import DIRECTORY_MODE, FILE_MODE, STARTUP, generation_number
from instantstart_fs.store.os_errors import translated

FORMAT = 1
RECORD = "record.json"
PACK = "pack"
_BLOCK = 1024 * 1024
_MAX_RECORD = 16 * 1024 * 1024


class _RecordFile(msgspec.Struct, frozen=True):
    format: int
    record: StartupRecord


class IncomingPack:
    """A pack that is being written, in the trash. Its owner calls ``commit`` or ``drop``."""

    def __init__(self, store: BlobStore, size: int) -> None:
        self.size = size
        self.received = 0
        self._store = store
        self._hasher = hashlib.sha256()
        self._directory = os.path.join(store.layout.trash, f"{time.time_ns()}-{os.getpid()}-startup")
        with translated("begin a startup cache"):
            os.mkdir(self._directory, DIRECTORY_MODE)
            try:
                self._fd = os.open(
                    os.path.join(self._directory, PACK), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE
                )
            except OSError:  # no descriptor left, say
                os.rmdir(self._directory)
                raise

    def write(self, data: bytes) -> None:
        """Append ``data``. Raises StoreFull for more bytes than were announced, StoreError."""
        self.received += len(data)
        if self.received > self.size:
            raise StoreFull(f"a startup cache of {self.size} bytes was announced, and more came")
        self._hasher.update(data)
        view = memoryview(data)
        with translated("write a startup cache"):
            while view:
                view = view[os.write(self._fd, view) :]

    @property
    def digest(self) -> str:
        return self._hasher.hexdigest()

    def commit(self, pipeline: str, record: StartupRecord) -> None:
        """Make it version ``record.number``, durably. Raises StoreError."""
        with translated(f"keep a startup cache of {pipeline}"):
            os.fsync(self._fd)
            name = os.path.join(self._directory, RECORD)
            with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE), "wb") as file:
                file.write(msgspec.json.encode(_RecordFile(FORMAT, record)))
                file.flush()
                os.fsync(file.fileno())
            _sync(self._directory)
            parent = os.path.join(self._store.layout.pipeline(pipeline), STARTUP)
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, DIRECTORY_MODE)
                _sync(os.path.dirname(parent))
            if not stat.S_ISDIR(os.lstat(parent).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), parent)
            os.rename(self._directory, os.path.join(parent, str(record.number)))
            _sync(parent)
        os.close(self._fd)
        self._fd = -1

    def drop(self) -> None:
        """Delete the pack. Does nothing after ``commit``."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        for name in (PACK, RECORD):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._directory, name))
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def numbers(store: BlobStore, pipeline: str) -> list[int]:
    """The versions that are there, whole or not, ascending. Raises StoreError."""
    found = (generation_number(name) for name in store.tree.list_directory(pipeline, STARTUP))
    return sorted(number for number in found if number is not None)


def load(store: BlobStore, pipeline: str, number: int) -> StartupRecord:
    """Read the record of a version. Raises StoreDamaged if the record, or the size of its pack, is not what was
    saved."""
    directory = os.path.join(store.layout.pipeline(pipeline), STARTUP, str(number))
    shown = f"startup cache {number} of {pipeline}"
    with translated(f"read {shown}"):
        try:
            with open(_open(os.path.join(directory, RECORD)), "rb") as file:
                raw = file.read(_MAX_RECORD)
            size = os.stat(os.path.join(directory, PACK), follow_symlinks=False).st_size
        except FileNotFoundError as error:
            raise StoreLost(f"{shown} is not whole") from error
    try:
        found = msgspec.json.decode(raw, type=_RecordFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreDamaged(f"{shown} cannot be read: {error}") from error
    if found.format != FORMAT or found.record.number != number:
        raise StoreDamaged(f"{shown} is another's, or of another format ({found.format})")
    if size != found.record.size:
        raise StoreDamaged(f"{shown} has {size} bytes and should have {found.record.size}")
    return found.record


def open_pack(store: BlobStore, pipeline: str, record: StartupRecord) -> int:
    """A read-only descriptor, which is the caller's. Raises StoreDamaged where it is not the file that was saved."""
    shown = f"startup cache {record.number} of {pipeline}"
    with translated(f"open {shown}"):
        fd = _open(os.path.join(store.layout.pipeline(pipeline), STARTUP, str(record.number), PACK))
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size != record.size:
                raise StoreLost(f"{shown} is not the file that was saved")
        except BaseException:
            os.close(fd)
            raise
    return fd


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def problem(store: BlobStore, pipeline: str, record: StartupRecord) -> str | None:
    """Read it again: why its bytes are not those that were saved; None if they are. Raises StoreError for a want of
    the moment."""
    try:
        fd = open_pack(store, pipeline, record)
    except StoreDamaged as error:
        return error.message
    hasher = hashlib.sha256()
    with translated(f"read startup cache {record.number} of {pipeline}"), open(fd, "rb") as file:
        while data := file.read(_BLOCK):
            hasher.update(data)
        if hasher.hexdigest() != record.digest:
            return "its bytes are not those that were saved"
        try:
            read_index(lambda count, at: os.pread(fd, count, at), record.size)
        except BadPack as error:
            return f"no start can use it: {error}"
    return None


def taken(record: StartupRecord) -> int:
    """Return the most bytes of disk that a version takes: its pack, its record, a directory."""
    return -(-record.size // 4096) * 4096 + 3 * 4096
