"""BlobStore: the slots of all pipelines on one local filesystem. It opens the store and opens, shares and deletes
files; it knows nothing about presence or requests.

It owns everything below its root but ``index/`` and ``nodeids``: the directory tree (store/tree.py, which says what a
crash can leave) and the slots' own files (store/metadata.py). Synchronous and blocking: callers choose the threads, and
make sure that nobody writes into a generation while it is deleted.

The order towards the index is the caller's: **index first, then delete**. A crash in between then leaves bytes without
a record (refilled over, or found by fsck), never a record without its bytes. As a second line of defence ``blob`` says
``created``.

It never follows a symbolic link below its root and never opens a file with a name elsewhere: what is in a slot is that
slot's alone, or StoreDamaged. Generations of one pipeline may share a complete file under one path
(store/shared_files.py).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
import stat
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Self

from instantstart_fs.config import descriptors
from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.names import validate_pipeline_id
from instantstart_fs.errors import NoSuchEntry, StoreDamaged, StoreLost, StoreUnsupported
from instantstart_fs.store import filesystem, locks
from instantstart_fs.store.blobfile import BlobFile, punch_hole, read_seal
from instantstart_fs.store.layout import BIND, DIRECTORY_MODE, FILE_MODE, FILES, IDENTITY, SLOTS, TRASH, Layout
from instantstart_fs.store.metadata import SlotMetadata
from instantstart_fs.store.os_errors import translate, translated
from instantstart_fs.store.shared_files import blob_place, check_shared, stat_blob
from instantstart_fs.store.tree import DIRECTORY_FLAGS, StoreTree, check_own, shown

log = logging.getLogger(__name__)

_NOT_SHARED = frozenset({errno.ENOENT, errno.EEXIST, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP})
"""Deleted meanwhile, or the filesystem allows no more names: the file is fetched again, then."""


class Proof(NamedTuple):
    """The claims that a complete file's seal must make: its bytes, and the manifest's digest (None: the origin offers
    none)."""

    size: int
    digest: str | None


class BlobStore:
    """Made by ``open``; a context manager. Thread-safe, but for deletion against use of the same generation."""

    def __init__(self, layout: Layout, lock_fd: int, tree: StoreTree, warnings: tuple[str, ...]) -> None:
        self.layout = layout
        self.root = layout.root
        self.warnings = warnings
        self._lock_fd = lock_fd
        self.tree = tree
        self.metadata = SlotMetadata(tree)
        self._view_fd = -1
        self._view_tried = False
        self.identity = ""
        """Random, made with the store; "" while there is no space to store one."""
        self.identity_is_new = False
        """Whether this process made the identity."""
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, root: str, *, lock_deadline: float = 10.0) -> BlobStore:
        """Open the store at ``root``, made if it is not there, and lock it for this process.

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
                with contextlib.suppress(OSError):  # for later, when there may be no space
                    os.mkdir(BIND, DIRECTORY_MODE, dir_fd=root_fd)
                os.fsync(root_fd)
                slots_fd = os.open(SLOTS, DIRECTORY_FLAGS, dir_fd=root_fd)
                undo.callback(os.close, slots_fd)
                trash_fd = os.open(TRASH, DIRECTORY_FLAGS, dir_fd=root_fd)
                undo.callback(os.close, trash_fd)
            tree = StoreTree(os.dup(slots_fd), os.dup(trash_fd), layout.trash)
            store = cls(layout, os.dup(lock_fd), tree, (warning,) if warning else ())
        try:
            store.tree.empty_trash()
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
        """Store the identity, durably, if there is space."""
        temporary = self.tree.unique_name()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, FILE_MODE, dir_fd=self.tree.trash_fd), "w", encoding="ascii") as file:
                file.write(f"{identity}\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, os.path.join(self.root, IDENTITY), src_dir_fd=self.tree.trash_fd)
        except OSError as error:
            log.warning("the store's identity is not noted: %s", error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self.tree.trash_fd)
            return
        self.identity = identity

    def close(self) -> None:
        """Close and unlock the store. Idempotent. Open BlobFiles stay usable but must not be written any more."""
        self.tree.close()
        for name in ("_view_fd", "_lock_fd"):
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
        """The filesystem's allocation unit, bytes."""
        return self.space().f_frsize

    def space(self) -> os.statvfs_result:
        """statvfs of its filesystem, also where its directory is gone. Raises StoreError."""
        with translated(f"look at {self.root}"):
            return os.fstatvfs(self.tree.slots_fd)

    # -- files -----------------------------------------------------------------------------------------------------

    def blob(self, pipeline: str, generation: int, path: str, size: int) -> BlobFile:
        """Open a file of ``size`` bytes for filling; makes it, sparse, if it is not there.

        ``BlobFile.created`` says whether it did: then no byte of it is present, whatever the index says. A seal record
        on it is taken away, since its bytes may now change: read sealed files by ``existing_blob``. Raises StoreDamaged
        for what the daemon did not make (a link, a directory, another size), StoreFull, StoreReadOnly.
        """
        directory, name = blob_place(pipeline, generation, path)
        where = f"{pipeline}/{generation}/{path}"
        with translated(f"open {where}"):
            parent = self.tree.walk(directory, create=True)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = descriptors.held(os.open(name, flags, FILE_MODE, dir_fd=parent))
            finally:
                os.close(parent)
            try:
                status = os.fstat(fd)
                check_own(status, where)
                created = status.st_size == 0 and size > 0
                if created:
                    os.ftruncate(fd, size)
                elif status.st_size != size:
                    raise StoreLost(f"{where} has {status.st_size} bytes in the store and should have {size}")
                blob = self._blob_file(fd, size, directory, where, writable=True, created=created)
                if read_seal(fd, where) is not None:
                    blob.unseal()
            except BaseException:
                os.close(fd)
                raise
        return blob

    def fresh_blob(self, pipeline: str, generation: int, path: str, size: int) -> BlobFile:
        """Return ``blob``, after removing anything else that is in its place or in that of a directory on the way. The
        store is the daemon's alone, and a foreign file would keep this one from ever being fetched."""
        try:
            return self.blob(pipeline, generation, path, size)
        except StoreLost as error:
            # Nothing in the way any more: another file's fill, which met the same, has removed it.
            if self._clear_way(pipeline, generation, path):
                log.warning("%s; it was removed, the file is fetched anew", error.message, extra={"pipeline": pipeline})
            return self.blob(pipeline, generation, path, size)

    def _clear_way(self, pipeline: str, generation: int, path: str) -> bool:
        """Remove a file of the slot, of any type, or the first component above it that is no directory, durably;
        whether there was one. Raises StoreError (a mount point, say, is not removed)."""
        directory, name = blob_place(pipeline, generation, path)
        with translated(f"clear {shown((*directory, name))}"):
            if self.tree.delete_obstacle(directory):
                return True
            try:
                parent = self.tree.walk(directory)
            except NoSuchEntry:
                return False
            try:
                os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                return False
            finally:
                os.close(parent)
        self.tree.delete((*directory, name))
        return True

    def survey(self, pipeline: str, generation: int) -> dict[str, int]:
        """The regular files of a generation, by path, with their sizes. Raises StoreError."""
        found: dict[str, int] = {}
        with translated(f"look at {shown((pipeline, str(generation)))}"):
            try:
                root = self.tree.walk((validate_pipeline_id(pipeline), str(generation), FILES))
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
        """Open the same file once more for reading, whether or not it still has a name. Raises StoreError."""
        with translated(f"open {blob.name}"):
            fd = _open_for_reading(f"/proc/self/fd/{blob.fd}", None, follow=True)
        return BlobFile(fd, blob.size, blob.name, writable=False, created=False, sync_entry=lambda: None)

    def existing_blob(self, pipeline: str, generation: int, path: str) -> BlobFile | None:
        """Open a file for reading; None if it is not there. Raises StoreDamaged as ``blob`` does."""
        return self._existing_blob(pipeline, generation, path, self.tree.slots_fd)

    def handed_blob(self, pipeline: str, generation: int, path: str) -> BlobFile | None:
        """``existing_blob`` for descriptors that leave this process, through a read-only view: a file may belong to its
        reader (binds show files with their owner), who could make it writable again by fchmod. Raises StoreUnsupported
        for such a file where the system cannot make that view."""
        view = self._view()
        blob = self._existing_blob(pipeline, generation, path, self.tree.slots_fd if view is None else view)
        if blob is not None and view is None and os.fstat(blob.fd).st_uid != os.geteuid():
            blob.close()
            raise StoreUnsupported(f"{path} belongs to its reader, and is handed over from Linux 5.12 on only")
        return blob

    def _view(self) -> int | None:
        with self._mutex:
            if not self._view_tried:
                self._view_tried = True
                with contextlib.suppress(OSError):
                    self._view_fd = filesystem.readonly_view(self.tree.slots_fd)
            return self._view_fd if self._view_fd >= 0 else None

    def _existing_blob(self, pipeline: str, generation: int, path: str, root: int) -> BlobFile | None:
        directory, name = blob_place(pipeline, generation, path)
        where = f"{pipeline}/{generation}/{path}"
        with translated(f"open {where}"):
            try:
                parent = self.tree.walk(directory, root=root)
            except NoSuchEntry:
                return None
            try:
                fd = _open_for_reading(name, parent)
            except FileNotFoundError:
                return None
            finally:
                os.close(parent)
            try:
                status = check_shared(self.tree, fd, pipeline, path, where)
            except BaseException:
                os.close(fd)
                raise
        return self._blob_file(fd, status.st_size, directory, where, writable=False, created=False)

    def _blob_file(
        self, fd: int, size: int, directory: tuple[str, ...], where: str, *, writable: bool, created: bool
    ) -> BlobFile:
        def sync_entry() -> None:
            parent = self.tree.walk(directory, create=True)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

        return BlobFile(fd, size, where, writable=writable, created=created, sync_entry=sync_entry, directory=directory)

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
            (source, name), (target, _) = blob_place(pipeline, old, path), blob_place(pipeline, new, path)
            with translated(f"share {pipeline}/{old}/{path}"):
                here = self.tree.walk(source)
                try:
                    there = self.tree.walk(target, create=True)
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
            with translated(f"sync {shown(directory)}"):
                fd = self.tree.walk(directory)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        return given

    def shared(self, pipeline: str, one: int, other: int, path: str) -> bool:
        """Whether both generations share that file."""
        found = [stat_blob(self.tree, pipeline, generation, path) for generation in (one, other)]
        return found[0] is not None and found[0] == found[1]

    # -- deletion --------------------------------------------------------------------------------------------------

    def delete_blob(self, pipeline: str, generation: int, path: str) -> None:
        """Delete a file, or anything in its place, durably; open descriptors keep it. No effect if it is not there."""
        directory, name = blob_place(pipeline, generation, path)
        with translated(f"delete {pipeline}/{generation}/{path}"):
            try:
                parent = self.tree.walk(directory)
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
        self.tree.delete((*directory, name))

    def delete_generation(self, pipeline: str, generation: int) -> None:
        """Remove a generation with all that it holds. No effect if it is not there."""
        self.tree.delete((validate_pipeline_id(pipeline), str(generation)))

    def empty_generation(self, pipeline: str, generation: int) -> None:
        """Remove a generation's files and keep its manifest (eviction). No effect if there are none."""
        self.tree.delete((validate_pipeline_id(pipeline), str(generation), FILES))

    def trim(self, pipeline: str, generation: int, keep: Mapping[str, ChunkMap | None]) -> dict[str, int]:
        """Free, after a crash, what the index does not know. Nothing may be filling.

        Args:
            pipeline: Its id.
            generation: Its generation.
            keep: Paths to keep, with their durable chunks; None for complete files, which are not touched. Other
                files, and the space of other chunks, are freed.

        Returns:
            Bytes of disk that each partial file takes then.
        """
        found: dict[str, int] = {}
        with translated(f"look at {shown((pipeline, str(generation)))}"):
            try:
                root = self.tree.walk((validate_pipeline_id(pipeline), str(generation), FILES))
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
        self.tree.delete((validate_pipeline_id(pipeline),))

    def delete_entry(self, *components: str) -> None:
        """Delete the entry at slots/``components``, of any type (for fsck: one that belongs to no pipeline)."""
        self.tree.delete(components)


def _punch(name: str, directory: int, present: ChunkMap) -> int:
    """Free the blocks of absent chunks; bytes of disk that the file takes then. Foreign files are left alone."""
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return 0  # a link or a device: an open for filling reports it
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == present.size:
            for chunk in present.missing():
                punch_hole(fd, present.byte_range(chunk))
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def _open_for_reading(name: str, parent: int | None, *, follow: bool = False) -> int:
    """Open without touching st_atime: a read by the daemon is no access, and bound files show their own st_atime in `ls
    -lu`."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=parent)
    except PermissionError:  # another's file, and no CAP_FOWNER
        return os.open(name, flags, dir_fd=parent)
