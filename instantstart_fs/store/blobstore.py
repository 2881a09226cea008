"""BlobStore: the slots of all pipelines on one local filesystem.

Owns everything below its root but ``index/`` and ``nodeids``. It knows names, manifests and files, and nothing about
presence or requests. Synchronous and blocking: callers choose the threads, and see to it that nobody writes into a
generation while it is deleted.

What a crash can leave, at any syscall:
- writes: a file in trash/ (written and fsynced there, then renamed into place), which the next open removes;
- deletions: a tree in trash/ (renamed there whole, then removed), which the next open removes;
- directories: an entry that is not durable yet, made durable by the next process that walks over it, before anything
  that relies on it is.

The order towards the index is the caller's: **index first, then delete**. A crash in between then leaves bytes that
nobody speaks of (refilled over, or found by fsck), never an index that speaks of bytes that are gone. Against that
case, too: ``blob`` says ``created``.

Never follows a symbolic link below its root and never opens a file with a name elsewhere: what lies under a slot is
that slot's alone, or StoreDamaged. Generations of one pipeline may share a complete file (``share``), under one path;
what several share is never opened for filling.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import msgspec

from instantstart_fs.config import descriptors
from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.learned import Learned
from instantstart_fs.core.manifest import Manifest, PipelineSpec
from instantstart_fs.core.names import validate_origin_path, validate_pipeline_id
from instantstart_fs.errors import NoSuchEntry, StoreDamaged, StoreLost, StoreUnsupported
from instantstart_fs.store import filesystem, locks, slices
from instantstart_fs.store.blobfile import BlobFile, punch_hole, read_seal
from instantstart_fs.store.filesystem import StoreUsage
from instantstart_fs.store.layout import (
    BIND,
    DIRECTORY_MODE,
    FILE_MODE,
    FILES,
    FORMAT,
    IDENTITY,
    LEARNED_FILE,
    MANIFEST_FILE,
    PIPELINE_FILE,
    SLOTS,
    TRASH,
    Layout,
    generation_number,
)
from instantstart_fs.store.translate import translate, translated

log = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_SHARED = frozenset({errno.ENOENT, errno.EEXIST, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP})
"""Dropped meanwhile, or the filesystem has no more names for it: it is fetched again, then."""

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)
"""What decoding JSON raises; the second for a byte that is not UTF-8."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Proof(NamedTuple):
    """What the seal of a complete file must say: bytes, and the manifest's digest (None: the origin offers none)."""

    size: int
    digest: str | None


class _PipelineFile(msgspec.Struct, frozen=True):
    """pipeline.json"""

    format: int
    created_at_ns: int
    pipeline: PipelineSpec


class _LearnedFile(msgspec.Struct, frozen=True):
    """learned.json"""

    format: int
    learned: Learned


class _ManifestFile(msgspec.Struct, frozen=True):
    """manifest.json"""

    format: int
    manifest: Manifest


class _Format(msgspec.Struct, frozen=True):
    format: int


REMOVED = "its directory was removed under the daemon; restart the daemon, which makes it anew, then `update` or `add`"


class BlobStore:
    """Made by ``open``; a context manager. Thread-safe, but for deletion against use of the same generation."""

    def __init__(self, layout: Layout, lock_fd: int, slots_fd: int, trash_fd: int, warnings: tuple[str, ...]) -> None:
        self.layout = layout
        self.root = layout.root
        self.warnings = warnings
        self._lock_fd = lock_fd
        self._slots_fd = slots_fd
        self._trash_fd = trash_fd
        self._view_fd = -1
        self._view_tried = False
        self.identity = ""
        """Random, made with the store; "" while there is no room to note one."""
        self.identity_is_new = False
        """Whether this process made it."""
        self._unique = itertools.count()
        self._mutex = threading.Lock()
        self._deleting: dict[str, tuple[str, ...]] = {}
        """What is being removed from the trash: its name there → where it lay below slots/."""
        self._durable: set[tuple[str, ...]] = set()
        """Directories (components below slots/) whose entries this process has made durable."""

    @classmethod
    def open(cls, root: str, *, lock_deadline: float = 10.0) -> BlobStore:
        """Open the store at ``root`` and take it for this process; makes it if it is not there.

        Waits up to ``lock_deadline`` seconds for the orphaned workers of an earlier daemon. Raises StoreLocked,
        StoreUnsupported (the filesystem cannot do), StoreReadOnly, StoreDamaged, StoreError.
        """
        root = os.path.abspath(root)
        layout = Layout(root)
        with contextlib.ExitStack() as undo:
            with translated(f"open the store {root}"):
                os.makedirs(root, DIRECTORY_MODE, exist_ok=True)
                root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                undo.callback(os.close, root_fd)
            warning = filesystem.judge(filesystem.filesystem_type(root_fd), root)
            lock_fd = locks.lock_store(layout.lock, root)
            undo.callback(os.close, lock_fd)
            filesystem.probe_xattrs(lock_fd, root)
            locks.wait_for_workers(layout.workers_lock, root, lock_deadline)
            with translated(f"open the store {root}"):
                for name in (SLOTS, TRASH):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, DIRECTORY_MODE, dir_fd=root_fd)
                with contextlib.suppress(OSError):  # for later, when there may be no room
                    os.mkdir(BIND, DIRECTORY_MODE, dir_fd=root_fd)
                os.fsync(root_fd)
                slots_fd = os.open(SLOTS, _DIRECTORY, dir_fd=root_fd)
                undo.callback(os.close, slots_fd)
                trash_fd = os.open(TRASH, _DIRECTORY, dir_fd=root_fd)
                undo.callback(os.close, trash_fd)
            store = cls(layout, os.dup(lock_fd), os.dup(slots_fd), os.dup(trash_fd), (warning,) if warning else ())
        try:
            store._empty_trash()
            store._identify()
        except BaseException:
            store.close()
            raise
        return store

    def _identify(self) -> None:
        try:
            with open(os.path.join(self.root, IDENTITY), encoding="ascii", errors="replace") as file:
                self.identity = file.read(64).strip()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise translate(error, f"read the identity of {self.root}") from error
        if not self.identity:
            self.identity_is_new = True
            self.take_identity(secrets.token_hex(16))

    def take_identity(self, identity: str) -> None:
        """Note it, durably, if there is room."""
        temporary = self._unique_name()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, FILE_MODE, dir_fd=self._trash_fd), "w", encoding="ascii") as file:
                file.write(f"{identity}\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, os.path.join(self.root, IDENTITY), src_dir_fd=self._trash_fd)
        except OSError as error:
            log.warning("the store's identity is not noted: %s", error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._trash_fd)
            return
        self.identity = identity

    def close(self) -> None:
        """Give the store up. Idempotent. Open BlobFiles stay usable but must not be written any more."""
        for name in ("_view_fd", "_trash_fd", "_slots_fd", "_lock_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def worker_lock_fd(self) -> int:
        """A fresh descriptor that holds ``workers.lock`` shared: pass it to one worker, then close this copy."""
        return locks.share_with_worker(self.layout.workers_lock)

    @functools.cached_property
    def block_size(self) -> int:
        """In what the filesystem allocates, bytes."""
        return self.space().f_frsize

    def space(self) -> os.statvfs_result:
        """Of its filesystem; also where its directory is gone. Raises StoreError."""
        with translated(f"look at {self.root}"):
            return os.fstatvfs(self._slots_fd)

    def removed(self) -> bool:
        """Whether somebody removed slots/, or the whole store, under the daemon: nothing can be written until the next
        start makes it anew."""
        try:
            return os.fstat(self._slots_fd).st_nlink == 0
        except OSError:
            return False

    def usage(self) -> StoreUsage:
        """Capacity, and what the slots take. Walks every file (seconds for a million): call it rarely."""
        return filesystem.usage_of(self.root, self.layout.slots)

    # -- pipelines and manifests ---------------------------------------------------------------------------------

    def write_pipeline(self, spec: PipelineSpec, *, created_at_ns: int | None = None) -> None:
        """Store ``spec``, atomically and durably. Without ``created_at_ns`` an earlier one's stays, else it is now."""
        validate_pipeline_id(spec.id)
        if created_at_ns is None:
            try:
                created_at_ns = self.pipeline_created_at(spec.id)
            except (NoSuchEntry, StoreDamaged):
                created_at_ns = time.time_ns()
        self._write((spec.id,), PIPELINE_FILE, msgspec.json.encode(_PipelineFile(FORMAT, created_at_ns, spec)))

    def write_learned(self, pipeline: str, learned: Learned) -> None:
        """Store what was learned of a pipeline, atomically and durably."""
        validate_pipeline_id(pipeline)
        self._write((pipeline,), LEARNED_FILE, msgspec.json.encode(_LearnedFile(FORMAT, learned)))

    def load_learned(self, pipeline: str) -> Learned:
        """Nothing where there is none, or where it cannot be read: it is learned again."""
        validate_pipeline_id(pipeline)
        try:
            return _decode(self._read((pipeline,), LEARNED_FILE), _LearnedFile, f"{pipeline}/{LEARNED_FILE}").learned
        except (NoSuchEntry, StoreDamaged, StoreUnsupported):
            return Learned()

    def write_manifest(self, manifest: Manifest) -> None:
        """Store ``manifest`` under its pipeline and generation, atomically and durably. Names were validated before."""
        validate_pipeline_id(manifest.pipeline)
        where = (manifest.pipeline, str(manifest.generation))
        frame = msgspec.json.encode(_ManifestFile(FORMAT, msgspec.structs.replace(manifest, models=())))
        self._write(where, MANIFEST_FILE, slices.encode(frame, manifest.models))

    def load_manifest(self, pipeline: str, generation: int) -> Manifest:
        """Raises NoSuchEntry if there is none, StoreDamaged if it cannot be read or is another generation's."""
        validate_pipeline_id(pipeline)
        left, out = slices.cut(self._read((pipeline, str(generation)), MANIFEST_FILE))
        shown = f"{pipeline}/{generation}/{MANIFEST_FILE}"
        manifest = _decode(left, _ManifestFile, shown).manifest
        try:
            manifest = slices.put_back(manifest, out)
        except _UNREADABLE as error:
            raise StoreDamaged(f"{shown} cannot be read: {error}") from error
        if (manifest.pipeline, manifest.generation) != (pipeline, generation):
            raise StoreDamaged(
                f"{pipeline}/{generation}/{MANIFEST_FILE} is that of {manifest.pipeline}/{manifest.generation}"
            )
        return manifest

    def load_pipeline(self, pipeline: str) -> PipelineSpec:
        """Raises NoSuchEntry if there is none, StoreDamaged if it cannot be read or is another pipeline's."""
        return self._load_pipeline(pipeline).pipeline

    def pipeline_created_at(self, pipeline: str) -> int:
        """Nanoseconds of the wall clock. Raises like ``load_pipeline``."""
        return self._load_pipeline(pipeline).created_at_ns

    def _load_pipeline(self, pipeline: str) -> _PipelineFile:
        validate_pipeline_id(pipeline)
        stored = _decode(self._read((pipeline,), PIPELINE_FILE), _PipelineFile, f"{pipeline}/{PIPELINE_FILE}")
        if stored.pipeline.id != pipeline:
            raise StoreDamaged(f"{pipeline}/{PIPELINE_FILE} is that of {stored.pipeline.id}")
        return stored

    def pipelines(self) -> list[str]:
        """The ids that have a pipeline.json, sorted."""
        return [name for name in self.list_directory() if self.has_pipeline(name)]

    def has_pipeline(self, name: str) -> bool:
        """Whether that entry of slots/ is a slot: it has a pipeline.json."""
        return PIPELINE_FILE in self.list_directory(name)

    def generations(self, pipeline: str) -> list[int]:
        """The generations of ``pipeline`` that have a manifest, ascending."""
        validate_pipeline_id(pipeline)
        numbers = (generation_number(name) for name in self.list_directory(pipeline))
        found = (number for number in numbers if number is not None)
        return sorted(number for number in found if MANIFEST_FILE in self.list_directory(pipeline, str(number)))

    def list_directory(self, *components: str) -> list[str]:
        """The names below slots/``components``, sorted; none if it is no directory or not there. Raises StoreError:
        what cannot be read now is not empty."""
        try:
            with translated(f"list {_shown(components)}"):
                fd = self._walk(components)
                try:
                    return sorted(os.listdir(fd))
                finally:
                    os.close(fd)
        except (NoSuchEntry, StoreLost):
            return []

    # -- files -----------------------------------------------------------------------------------------------------

    def blob(self, pipeline: str, generation: int, path: str, size: int) -> BlobFile:
        """Open a file of ``size`` bytes for filling; makes it, sparse, if it is not there.

        ``BlobFile.created`` says whether it did: then no byte of it is present, whatever the index says. A seal record
        on it is taken away, since its bytes may now change: read sealed files by ``existing_blob``. Raises StoreDamaged
        for what the daemon did not make (a link, a directory, another size), StoreFull, StoreReadOnly.
        """
        directory, name = self._blob_place(pipeline, generation, path)
        shown = f"{pipeline}/{generation}/{path}"
        with translated(f"open {shown}"):
            parent = self._walk(directory, create=True)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = descriptors.held(os.open(name, flags, FILE_MODE, dir_fd=parent))
            finally:
                os.close(parent)
            try:
                status = os.fstat(fd)
                _check_ours(status, shown)
                created = status.st_size == 0 and size > 0
                if created:
                    os.ftruncate(fd, size)
                elif status.st_size != size:
                    raise StoreLost(f"{shown} has {status.st_size} bytes in the store and should have {size}")
                blob = self._blob_file(fd, size, directory, shown, writable=True, created=created)
                if read_seal(fd, shown) is not None:
                    blob.unseal()
            except BaseException:
                os.close(fd)
                raise
        return blob

    def fresh_blob(self, pipeline: str, generation: int, path: str, size: int) -> BlobFile:
        """``blob``, once whatever else lies in its place, or in that of a directory on the way, is out of the way: the
        store is the daemon's alone, and what it cannot use would otherwise keep the file from ever being fetched."""
        try:
            return self.blob(pipeline, generation, path, size)
        except StoreLost as error:
            if not self.clear_way(pipeline, generation, path):
                raise
            log.warning("%s; it was removed, the file is fetched anew", error.message, extra={"pipeline": pipeline})
            return self.blob(pipeline, generation, path, size)

    def clear_way(self, pipeline: str, generation: int, path: str) -> bool:
        """Remove a file of the slot, whatever it is, and the first component above it that is no directory, durably.
        Whether there was any. Raises StoreError (a mount point, say, is not removed)."""
        directory, name = self._blob_place(pipeline, generation, path)
        with translated(f"clear {_shown((*directory, name))}"):
            for depth in range(1, len(directory) + 1):
                if self._is_obstacle(directory[:depth]):
                    self._delete(directory[:depth])
                    return True
            try:
                parent = self._walk(directory)
            except NoSuchEntry:
                return False
            try:
                os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                return False
            finally:
                os.close(parent)
        self._delete((*directory, name))
        return True

    def _is_obstacle(self, components: tuple[str, ...]) -> bool:
        """Whether something lies there that is no directory. Raises OSError."""
        try:
            parent = self._walk(components[:-1])
        except NoSuchEntry:
            return False
        try:
            return not stat.S_ISDIR(os.stat(components[-1], dir_fd=parent, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False
        finally:
            os.close(parent)

    def restore_slot(self, spec: PipelineSpec, created_at_ns: int, manifest: Manifest) -> bool:
        """Write what a slot says of itself again where somebody removed it or put something else there; whether that
        was so. Raises StoreError."""
        written = False
        for directory, name in (((spec.id,), PIPELINE_FILE), ((spec.id, str(manifest.generation)), MANIFEST_FILE)):
            if self._is_file(directory, name):
                continue
            with translated(f"clear {_shown((*directory, name))}"):
                for depth in range(1, len(directory) + 1):
                    if self._is_obstacle(directory[:depth]):
                        self._delete(directory[:depth])
            self._delete((*directory, name))
            if name == PIPELINE_FILE:
                self.write_pipeline(spec, created_at_ns=created_at_ns)
            else:
                self.write_manifest(manifest)
            written = True
        return written

    def _is_file(self, directory: tuple[str, ...], name: str) -> bool:
        with translated(f"look at {_shown((*directory, name))}"):
            try:
                parent = self._walk(directory)
            except (NoSuchEntry, NotADirectoryError):
                return False
            try:
                return stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                return False
            finally:
                os.close(parent)

    def survey(self, pipeline: str, generation: int) -> dict[str, int]:
        """The regular files of a generation, by path, with their sizes. Raises StoreError."""
        found: dict[str, int] = {}
        with translated(f"look at {_shown((pipeline, str(generation)))}"):
            try:
                root = self._walk((validate_pipeline_id(pipeline), str(generation), FILES))
            except (NoSuchEntry, NotADirectoryError):
                return found
            try:
                for directory, _, names, fd in os.fwalk(".", dir_fd=root, follow_symlinks=False):
                    prefix = "" if directory == "." else directory[2:] + "/"
                    for name in names:
                        with contextlib.suppress(FileNotFoundError):
                            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                            if stat.S_ISREG(status.st_mode):
                                found[prefix + name] = status.st_size
            finally:
                os.close(root)
        return found

    def open_sealed(self, pipeline: str, generation: int, path: str, proof: Proof, *, handed: bool = False) -> BlobFile:
        """Open a complete file for reading: the one check of whether it is the one that was sealed, for everybody who
        reads one (by size, by its seal, and by the seal's digest). ``handed``: see ``handed_blob``.

        Raises StoreLost where it is not, StoreDamaged for what cannot be read, StoreError.
        """
        blob = (self.handed_blob if handed else self.existing_blob)(pipeline, generation, path)
        if blob is None:
            raise StoreLost(f"{path} is missing from the store")
        try:
            if blob.size != proof.size:
                raise StoreLost(f"{path}: the store's file has {blob.size} bytes and should have {proof.size}")
            seal = blob.seal_record()
            if seal is None or (seal.size, seal.digest) != proof:
                # The index is wrong about it (what was never written reads as zeros), or it was exchanged.
                raise StoreLost(f"{path}: the store's file is not the one that was sealed")
        except BaseException:
            blob.close()
            raise
        return blob

    @staticmethod
    def again(blob: BlobFile) -> BlobFile:
        """The same file opened once more, for reading, whether or not it still has a name. Raises StoreError."""
        with translated(f"open {blob.name}"):
            fd = _open_for_reading(f"/proc/self/fd/{blob.fd}", None, follow=True)
        return BlobFile(fd, blob.size, blob.name, writable=False, created=False, sync_entry=lambda: None)

    def existing_blob(self, pipeline: str, generation: int, path: str) -> BlobFile | None:
        """Open a file for reading; None if it is not there. Raises StoreDamaged as ``blob`` does."""
        return self._existing_blob(pipeline, generation, path, self._slots_fd)

    def handed_blob(self, pipeline: str, generation: int, path: str) -> BlobFile | None:
        """The same for descriptors that leave this process: through a read-only view, since a file may belong to
        whoever gets it (binds show files with their owner), who could make it writable again by fchmod. Raises
        StoreUnsupported for such a file where the system cannot make that view."""
        view = self._view()
        blob = self._existing_blob(pipeline, generation, path, self._slots_fd if view is None else view)
        if blob is not None and view is None and os.fstat(blob.fd).st_uid != os.geteuid():
            blob.close()
            raise StoreUnsupported(f"{path} belongs to its reader, and is handed over from Linux 5.12 on only")
        return blob

    def _view(self) -> int | None:
        with self._mutex:
            if not self._view_tried:
                self._view_tried = True
                with contextlib.suppress(OSError):
                    self._view_fd = filesystem.readonly_view(self._slots_fd)
            return self._view_fd if self._view_fd >= 0 else None

    def _existing_blob(self, pipeline: str, generation: int, path: str, root: int) -> BlobFile | None:
        directory, name = self._blob_place(pipeline, generation, path)
        shown = f"{pipeline}/{generation}/{path}"
        with translated(f"open {shown}"):
            try:
                parent = self._walk(directory, root=root)
            except NoSuchEntry:
                return None
            try:
                fd = _open_for_reading(name, parent)
            except FileNotFoundError:
                return None
            finally:
                os.close(parent)
            try:
                status = self._check_slots_own(fd, pipeline, path, shown)
            except BaseException:
                os.close(fd)
                raise
        return self._blob_file(fd, status.st_size, directory, shown, writable=False, created=False)

    def _blob_file(
        self, fd: int, size: int, directory: tuple[str, ...], shown: str, *, writable: bool, created: bool
    ) -> BlobFile:
        def sync_entry() -> None:
            parent = self._walk(directory, create=True)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

        return BlobFile(fd, size, shown, writable=writable, created=created, sync_entry=sync_entry, directory=directory)

    def share(self, pipeline: str, old: int, new: int, paths: Mapping[str, Proof]) -> dict[str, int]:
        """Give complete files of generation ``old`` to ``new`` too, under the same paths: one file, a name in each.

        Those that were given, durably, with the bytes of disk that each takes. Left out is what is not the file that
        was sealed. Raises StoreFull, StoreReadOnly, StoreDamaged.
        """
        given: dict[str, int] = {}
        touched: set[tuple[str, ...]] = set()
        for path, proof in paths.items():
            try:
                with self.open_sealed(pipeline, old, path, proof) as blob:
                    allocated = blob.allocated_bytes()
            except StoreDamaged:
                continue  # its next reader finds out
            (source, name), (target, _) = self._blob_place(pipeline, old, path), self._blob_place(pipeline, new, path)
            with translated(f"share {pipeline}/{old}/{path}"):
                here = self._walk(source)
                try:
                    there = self._walk(target, create=True)
                    try:
                        os.link(name, name, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)
                    except OSError as error:
                        if error.errno in _NOT_SHARED:
                            continue
                        raise
                    finally:
                        os.close(there)
                finally:
                    os.close(here)
            given[path] = allocated
            touched.add(target)
        for directory in touched:
            with translated(f"sync {_shown(directory)}"):
                fd = self._walk(directory)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        return given

    def shared(self, pipeline: str, one: int, other: int, path: str) -> bool:
        """Whether that file of both generations is one on disk."""
        found = [self._stat_blob(pipeline, generation, path) for generation in (one, other)]
        return found[0] is not None and found[0] == found[1]

    def _stat_blob(self, pipeline: str, generation: int, path: str) -> tuple[int, int] | None:
        """(device, inode) of what lies there. Raises StoreError where that cannot be known: a want of descriptors must
        not make a file that generations share look as if a stranger had linked it."""
        directory, name = self._blob_place(pipeline, generation, path)
        with translated(f"look at {pipeline}/{generation}/{path}"):
            try:
                parent = self._walk(directory)
            except (NoSuchEntry, NotADirectoryError):
                return None
            try:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                return None
            finally:
                os.close(parent)
        return status.st_dev, status.st_ino

    def _check_slots_own(self, fd: int, pipeline: str, path: str, shown: str) -> os.stat_result:
        """Like ``_check_ours``; names that it has in other generations of its pipeline are its own, too, also while
        they are being deleted."""
        status = os.fstat(fd)
        while True:
            own = self._own_names(status, pipeline, path) if status.st_nlink > 1 else 1
            again = os.fstat(fd)
            if own >= status.st_nlink or again.st_nlink >= status.st_nlink:
                _check_ours(status, shown, own)
                return status
            status = again  # one was deleted while we counted

    def _own_names(self, status: os.stat_result, pipeline: str, path: str) -> int:
        inode = status.st_dev, status.st_ino
        numbers = [number for name in self.list_directory(pipeline) if (number := generation_number(name)) is not None]
        count = sum(self._stat_blob(pipeline, number, path) == inode for number in numbers)
        # After the slots: what goes from there to the trash meanwhile is counted twice, and never missed.
        with self._mutex:
            deleting = list(self._deleting.items())
        for name, components in deleting:
            if components[0] == pipeline and len(components) >= 2:
                below = "/".join([name, *((FILES,) if len(components) == 2 else ()), path])
                with contextlib.suppress(OSError):
                    found = os.stat(below, dir_fd=self._trash_fd, follow_symlinks=False)
                    count += (found.st_dev, found.st_ino) == inode
        return count

    # -- deletion --------------------------------------------------------------------------------------------------

    def delete_blob(self, pipeline: str, generation: int, path: str) -> None:
        """Unlink a file, or whatever lies in its place, durably; those who hold it open keep it. No effect if it is not
        there."""
        directory, name = self._blob_place(pipeline, generation, path)
        with translated(f"delete {pipeline}/{generation}/{path}"):
            try:
                parent = self._walk(directory)
            except (NoSuchEntry, NotADirectoryError):
                return
            try:
                os.unlink(name, dir_fd=parent)
                os.fsync(parent)
                return
            except FileNotFoundError:
                return
            except IsADirectoryError:
                pass  # not ours: it goes as a tree
            finally:
                os.close(parent)
        self._delete((*directory, name))

    def delete_generation(self, pipeline: str, generation: int) -> None:
        """Remove a generation with all that it holds. No effect if it is not there."""
        self._delete((validate_pipeline_id(pipeline), str(generation)))

    def empty_generation(self, pipeline: str, generation: int) -> None:
        """Remove a generation's files and keep its manifest (eviction). No effect if there are none."""
        self._delete((validate_pipeline_id(pipeline), str(generation), FILES))

    def trim(self, pipeline: str, generation: int, keep: Mapping[str, ChunkMap | None]) -> dict[str, int]:
        """After a crash: give back what the index does not speak of. ``keep``: the paths that it does, with their
        durable chunks, None for complete ones, which are not touched; everything else goes: files, and the space of
        other chunks. Returns what the partial ones take then, in bytes of disk. Nobody may be filling."""
        found: dict[str, int] = {}
        with translated(f"look at {_shown((pipeline, str(generation)))}"):
            try:
                root = self._walk((validate_pipeline_id(pipeline), str(generation), FILES))
            except NoSuchEntry:
                return found
            try:
                for directory, _, names, fd in os.fwalk(".", dir_fd=root, follow_symlinks=False):
                    prefix = "" if directory == "." else directory[2:] + "/"
                    for name in names:
                        path = prefix + name
                        if path not in keep:
                            os.unlink(name, dir_fd=fd)
                        elif (chunks := keep[path]) is not None:
                            found[path] = _punch(name, fd, chunks)
            finally:
                os.close(root)
        return found

    def delete_pipeline(self, pipeline: str) -> None:
        """Remove a pipeline's slot with all that it holds. No effect if it is not there."""
        self._delete((validate_pipeline_id(pipeline),))

    def delete_entry(self, *components: str) -> None:
        """Remove whatever lies at slots/``components`` (for fsck: what no pipeline speaks of)."""
        self._delete(components)

    def _delete(self, components: tuple[str, ...]) -> None:
        trashed = self._unique_name()
        with translated(f"delete {_shown(components)}"):
            try:
                parent = self._walk(components[:-1])
            except NoSuchEntry:
                return
            with self._mutex:
                self._deleting[trashed] = components
            try:
                try:
                    os.rename(components[-1], trashed, src_dir_fd=parent, dst_dir_fd=self._trash_fd)
                    os.fsync(parent)
                    os.fsync(self._trash_fd)
                except FileNotFoundError:
                    return
                finally:
                    os.close(parent)
                with self._mutex:
                    length = len(components)
                    self._durable = {known for known in self._durable if known[:length] != components}
                self._remove_trashed(trashed)
            finally:
                with self._mutex:
                    del self._deleting[trashed]

    def _empty_trash(self) -> None:
        with translated(f"empty {self.layout.trash}"):
            for name in os.listdir(self._trash_fd):
                self._remove_trashed(name)

    def _remove_trashed(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._trash_fd)
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=self._trash_fd)

    # -- the walk --------------------------------------------------------------------------------------------------

    def _blob_place(self, pipeline: str, generation: int, path: str) -> tuple[tuple[str, ...], str]:
        validate_pipeline_id(pipeline)
        *directories, name = validate_origin_path(path).split("/")
        return (pipeline, str(generation), FILES, *directories), name

    def _walk(self, components: Sequence[str], *, create: bool = False, root: int | None = None) -> int:
        """A descriptor of the directory slots/``components``. No component may be a symbolic link (ENOTDIR).

        ``root``: instead of slots/. ``create``: makes what is missing, and each entry durable in its parent, once per
        process. Raises NoSuchEntry if it is not there (without ``create``), OSError.
        """
        fd = os.dup(self._slots_fd if root is None else root)
        try:
            for depth, name in enumerate(components, 1):
                if create and (walked := tuple(components[:depth])) not in self._durable:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, DIRECTORY_MODE, dir_fd=fd)
                    os.fsync(fd)
                    with self._mutex:
                        self._durable.add(walked)
                try:
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                except FileNotFoundError:
                    if not create:
                        raise
                    self._make_again(tuple(components[:depth]), fd)
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        except FileNotFoundError as error:
            os.close(fd)
            why = f": {REMOVED}" if self.removed() else ""
            raise NoSuchEntry(f"{_shown(components)} is not in the store{why}") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _make_again(self, components: tuple[str, ...], parent: int) -> None:
        """A directory that was durable, and that somebody removed under the daemon. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(components[-1], DIRECTORY_MODE, dir_fd=parent)
        os.fsync(parent)
        with self._mutex:
            length = len(components)
            self._durable = {known for known in self._durable if known[:length] != components}
            self._durable.add(components)

    def _unique_name(self) -> str:
        return f"{time.time_ns()}-{os.getpid()}-{next(self._unique)}"

    def _write(self, directory: tuple[str, ...], name: str, data: bytes) -> None:
        temporary = self._unique_name()
        with translated(f"write {_shown((*directory, name))}"):
            parent = self._walk(directory, create=True)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(temporary, flags, FILE_MODE, dir_fd=self._trash_fd), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, name, src_dir_fd=self._trash_fd, dst_dir_fd=parent)
                os.fsync(parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._trash_fd)
                raise
            finally:
                os.close(parent)

    def _read(self, directory: tuple[str, ...], name: str) -> bytes:
        shown = _shown((*directory, name))
        try:
            return self._read_once(directory, name, shown)
        except StoreDamaged as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EIO:
                raise
        return self._read_once(directory, name, shown)  # a disk that stumbled says it once

    def _read_once(self, directory: tuple[str, ...], name: str, shown: str) -> bytes:
        with translated(f"read {shown}"):
            parent = self._walk(directory)
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            except FileNotFoundError as error:
                raise NoSuchEntry(f"{shown} is not in the store") from error
            finally:
                os.close(parent)
            with open(fd, "rb") as file:
                _check_ours(os.fstat(fd), shown)
                return file.read()


def _punch(name: str, directory: int, present: ChunkMap) -> int:
    """Free the blocks of absent chunks; bytes of disk that the file takes then. What is not ours is left alone."""
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return 0  # a link or a device: whoever opens it for filling says so
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == present.size:
            for chunk in present.missing():
                punch_hole(fd, present.byte_range(chunk))
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def _shown(components: Sequence[str]) -> str:
    return "/".join((SLOTS, *components))


def _check_ours(status: os.stat_result, shown: str, names: int = 1) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise StoreLost(f"{shown} is not a regular file: the daemon did not put it there")
    if status.st_nlink > names:
        raise StoreLost(f"{shown} has {status.st_nlink} names: somebody linked a file into or out of the store")
    if status.st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown)


def _decode(raw: bytes, kind: type[T], shown: str) -> T:
    try:
        version = msgspec.json.decode(raw, type=_Format).format
        if version > FORMAT:
            raise StoreUnsupported(
                f"{shown} has format {version}, this version reads up to {FORMAT}: it was written by a newer version"
            )
        return msgspec.json.decode(raw, type=kind)
    except _UNREADABLE as error:
        raise StoreDamaged(f"{shown} cannot be read: {error}") from error


def _open_for_reading(name: str, parent: int | None, *, follow: bool = False) -> int:
    """What the daemon reads is nobody's access: where a file is bound, its own st_atime is what `ls -lu` shows."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=parent)
    except PermissionError:  # another's file, and no CAP_FOWNER
        return os.open(name, flags, dir_fd=parent)
