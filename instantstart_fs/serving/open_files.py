"""Keeps the open files: their descriptors, the number of their opens, and which generations are in use. It also reads.

A descriptor is kept for a while after the last close: opening and registering it anew took half of the time of an open.
It is closed when its incarnation is replaced. Nobody can open that again, and its deleted bytes would stay on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import trio

from instantstart_fs.catalog.model import CachedFile, Generation, Pipeline, counts_as_request
from instantstart_fs.config import descriptors
from instantstart_fs.errors import NoSuchEntry, OutOfResources, StoreDamaged, StoreError, StoreLost
from instantstart_fs.serving.open_notifications import NullListener, OpenListener
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.locks import used_elsewhere
from instantstart_fs.store.os_errors import translate, translated

IDLE_READERS = 256
"""Idle descriptors that are kept: enough for the shards of some pipelines, and a quarter of the least limit of open
files (1024) that a daemon may be given."""
GIVE_UP = 16
"""Idle descriptors that are closed at once when one is needed."""


class OpenFiles:
    """Owned by the Library; on the trio thread, but for ``read_blocking``."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._drained = trio.open_memory_channel[Generation](math.inf)
        self._idle: OrderedDict[CachedFile, None] = OrderedDict()
        """Complete files that nobody has open, whose descriptor is kept. The least recently used comes first."""
        self._most_idle = min(IDLE_READERS, descriptors.limit() // 4)
        self._before_close: Callable[[int], None] = lambda nodeid: None
        self._listener: OpenListener = NullListener()
        self._stale: dict[CachedFile, list[BlobFile]] = {}
        """Descriptors of what the store has lost since, while somebody may be inside a read of them."""

    @property
    def drained_generations(self) -> trio.MemoryReceiveChannel[Generation]:
        """Superseded generations whose last handle has just been released."""
        return self._drained[1]

    @property
    def listener(self) -> OpenListener:
        """The listener that is told of opens, releases, seals and retirements (``notify``)."""
        return self._listener

    def before_close(self, callback: Callable[[int], None] | None) -> None:
        """Call ``callback`` with a file's passthrough nodeid before its descriptor is closed; None ends that.

        The mount gives it, once the kernel has agreed to passthrough (vfs.Vfs.use_passthrough).
        """
        self._before_close = callback or (lambda nodeid: None)

    # -- use ---------------------------------------------------------------------------------------------------

    def acquire(self, file: CachedFile) -> None:
        """Count an open of the file."""
        self._idle.pop(file, None)
        file.handles += 1
        file.generation.handles += 1
        if file.handles == 1 and _watched(file):
            self._listener.opened(file.key)

    def keep_readers_open(self, generation: Generation) -> None:
        """Open each complete file that readers have open, before its name is deleted: they read it to the end."""
        if generation.handles:
            for file in generation.files:
                if file.handles and file.complete and file.stale_error is None:
                    with contextlib.suppress(StoreError):
                        self.reader(file)

    def release(self, file: CachedFile) -> None:
        """Count a close of the file."""
        file.handles -= 1
        if file.handles == 0 and _watched(file):
            self._listener.released(file.key)
        self._keep_or_close_reader(file)
        self._release_generation(file.generation)

    def notify(self, listener: OpenListener, pipelines: Iterable[Pipeline]) -> None:
        """Report opens to the listener from now on, and at once those that there are."""
        self._listener = listener
        for pipeline in pipelines:
            for generation in pipeline.heads():
                if isinstance(generation, Generation) and generation.handles:
                    for file in generation.files:
                        if file.handles and _watched(file):
                            listener.opened(file.key)

    def queue_drained(self, pipelines: Iterable[Pipeline]) -> None:
        """Queue the superseded generations that are not in use for deletion."""
        for pipeline in pipelines:
            for generation in pipeline.draining:
                if not generation.handles:
                    self._drained[0].send_nowait(generation)

    def _keep_or_close_reader(self, file: CachedFile) -> None:
        """Keep the descriptor of a closed file for its next open, if there may be one; else close it."""
        if file.handles:
            return
        if file.reader is None or file in self._stale:
            self.close_reader(file)
            return
        generation = file.generation
        if file.passthrough_eligible and generation is generation.pipeline.head and not generation.pipeline.removed:
            self._keep_idle(file)
        else:
            self.close_reader(file)

    def _keep_idle(self, file: CachedFile) -> None:
        self._idle[file] = None
        self._idle.move_to_end(file)
        if len(self._idle) > self._most_idle:
            oldest, _ = self._idle.popitem(last=False)
            self.close_reader(oldest)

    def retire(self, file: CachedFile) -> None:
        """Close the idle descriptor of a replaced file, which would keep its deleted bytes on the disk."""
        self._listener.retired(file.key)
        if not file.handles:
            self.close_reader(file)

    def close_reader(self, file: CachedFile) -> None:
        self._idle.pop(file, None)
        for stale in self._stale.pop(file, ()):
            stale.close()
        if file.reader is not None:
            self._before_close(file.passthrough_nodeid)
            file.reader.close()
            file.reader = None

    @contextlib.contextmanager
    def using(self, generation: Generation) -> Iterator[None]:
        """Keep the generation from being evicted or deleted inside the block, as if a file of it were open."""
        generation.handles += 1
        try:
            yield
        finally:
            self._release_generation(generation)

    def _release_generation(self, generation: Generation) -> None:
        generation.handles -= 1
        if generation.handles == 0 and generation is not generation.pipeline.head:
            self._drained[0].send_nowait(generation)

    # -- descriptors ---------------------------------------------------------------------------------------------

    def backing(self, file: CachedFile) -> int:
        """Return the descriptor for the kernel to read from (passthrough). Raises NoSuchEntry, StoreDamaged."""
        if not file.passthrough_eligible:
            raise NoSuchEntry(f"{file.entry.path} is not complete any more")
        return self.check(file)

    def check(self, file: CachedFile) -> int:
        """Return the descriptor of a complete file after a check that the store still has it. Raises StoreError."""
        fd, blob = self.reader(file), file.reader
        assert blob is not None
        if blob.path is None:
            generation = file.generation
            blob.path = self._store.layout.blob(generation.pipeline.id, generation.number, file.entry.path)
        try:
            # A kept descriptor is right whatever became of its name; the next start finds only the name. At each open,
            # so one system call.
            there = os.stat(blob.path, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreLost(f"{file.entry.path} is missing from the store") from None
        except OSError as error:
            raise translate(error, f"look at {file.entry.path}") from error
        if not blob.is_at(there):
            raise StoreLost(f"{file.entry.path}: something else lies in its place in the store")
        if there.st_size != file.size:
            raise StoreLost(f"{file.entry.path}: the store's file has {there.st_size} bytes of {file.size}")
        return fd

    def duplicate(self, file: CachedFile) -> int:
        """Return a duplicate of the file's descriptor for reading ahead; the caller closes it.

        It does not count as an open of the file. Raises StoreDamaged, OutOfResources."""
        kept = file.reader is not None
        try:
            with translated(f"open {file.entry.path}"):
                return descriptors.held(os.dup(self.reader(file)), spare=True)
        finally:
            if file.handles and not kept:
                self.close_reader(file)  # its readers read the bind mount, and need none of ours
            else:
                self._keep_or_close_reader(file)

    def used_elsewhere(self, file: CachedFile) -> bool:
        """Whether a process other than this daemon has the store's file open or mapped. Also True while that cannot be
        asked, for want of a descriptor, say."""
        if file.reader is not None:
            return used_elsewhere(file.reader.fd)
        generation = file.generation
        try:
            blob = self._store.existing_blob(generation.pipeline.id, generation.number, file.entry.path)
        except StoreDamaged:
            return False
        except StoreError:
            return True
        if blob is None:
            return False
        with blob:
            return used_elsewhere(blob.fd)

    def read_cached(self, file: CachedFile, offset: int, view: memoryview) -> int:
        """Read into ``view`` what the page cache has; return the bytes read, 0 if the read would block."""
        try:
            return os.preadv(self.reader(file), [view], offset, os.RWF_NOWAIT)
        except OSError:
            # EAGAIN: not cached. EOPNOTSUPP: this filesystem knows no RWF_NOWAIT. What is really wrong, the blocking
            # read meets again.
            return 0

    @staticmethod
    def read_blocking(file: CachedFile, fd: int, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``fd``, the file's ``reader``. Blocks. Raises StoreDamaged, OutOfResources."""
        done, again = 0, True
        while done < len(view):
            try:
                count = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EIO and again:
                    again = False  # a path to the disk that failed over, a bus that was reset: damage says it twice
                    continue
                raise translate(error, f"read {file.entry.path}") from error
            if count == 0:
                raise StoreLost(f"{file.entry.path}: the store's file is shorter than the manifest says")
            done += count

    def reader(self, file: CachedFile) -> int:
        """Return the file's descriptor. It may be closed at the caller's next ``await``. Raises StoreError."""
        if file.reader is not None and not file.complete and self._filled_elsewhere(file):
            # The store lost the file under a fill that has begun anew. Others may be inside a read of the old one.
            self._stale.setdefault(file, []).append(file.reader)
            file.reader = None
        if file.reader is None:
            file.reader = self._within_reserve(file)
        return file.reader.fd

    def _within_reserve(self, file: CachedFile) -> BlobFile:
        """Make sure that a descriptor may be opened for a reader, closing idle ones first. Raises OutOfResources where
        the rest is reserved for the daemon's own work."""
        while True:
            try:
                blob = self._open_reader(file)
            except OutOfResources:
                if not self._give_up_idle():
                    raise
                continue
            if descriptors.may_be_held(blob.fd):
                return blob
            blob.close()
            if not self._give_up_idle():
                raise _too_many(file)

    def check_descriptors(self, file: CachedFile) -> None:
        """Raise OutOfResources at the open of a file that is not complete, if there is no descriptor for reading it
        later."""
        while file.reader is None and not descriptors.may_hold_another():
            if not self._give_up_idle():
                raise _too_many(file)

    def _give_up_idle(self) -> bool:
        """Close some idle descriptors; False if there are none."""
        there_are = bool(self._idle)
        for oldest in list(itertools.islice(self._idle, GIVE_UP)):
            self.close_reader(oldest)
        return there_are

    def _open_reader(self, file: CachedFile) -> BlobFile:
        store, generation = self._store, file.generation
        where = (generation.pipeline.id, generation.number, file.entry.path)
        if file.complete:
            blob = store.open_sealed(*where, file.proof)
        elif (filled := _filled(file)) is not None:
            # Whatever became of its name: what is filled is what is read.
            return store.again(filled)
        elif (found := store.existing_blob(*where)) is not None:
            blob = found
        else:
            raise StoreLost(f"{file.entry.path} is missing from the store")
        try:
            _join(blob, file)
        except BaseException:
            blob.close()
            raise
        return blob

    @staticmethod
    def _filled_elsewhere(file: CachedFile) -> bool:
        filled = _filled(file)
        return filled is not None and file.reader is not None and not os.path.sameopenfile(filled.fd, file.reader.fd)

    def sealed(self, file: CachedFile) -> None:
        """Note that the file is complete. Call it while its target still names the store's file that was filled."""
        if file.reader is not None and self._filled_elsewhere(file):
            self._stale.setdefault(file, []).append(file.reader)
            file.reader = None


def _too_many(file: CachedFile) -> OutOfResources:
    return OutOfResources(
        f"{file.entry.path}: too many files are open: the daemon may have {descriptors.limit()} descriptors, and "
        f"{descriptors.reserve()} of them are its own; raise LimitNOFILE= (ulimit -n)"
    )


def _filled(file: CachedFile) -> BlobFile | None:
    """Return the open store's file that is being filled, if any."""
    blob = file.target.blob if file.target is not None else None
    return blob if blob is not None and blob.fd >= 0 else None


def _join(blob: BlobFile, file: CachedFile) -> None:
    """Share one open file description between generations that an update let share the file. With two, each would make
    the other look like use by another process."""
    pipeline = file.generation.pipeline
    if not pipeline.draining:
        return
    for generation in pipeline.generations():
        twin = _at(generation, file.entry.path) if generation is not file.generation else None
        if twin is not None and twin.reader is not None and os.path.sameopenfile(twin.reader.fd, blob.fd):
            os.dup2(twin.reader.fd, blob.fd, inheritable=False)
            return


def _at(generation: Generation, path: str) -> CachedFile | None:
    """Find the generation's file of that path by its tree: a walk over all files would stop the loop at each open."""
    tree, node = generation.tree, 0
    for name in path.split("/"):
        child = tree.child(node, name)
        if child is None:
            return None
        node = child
    index = tree.nodes[node].file
    return generation.files[index] if index >= 0 else None


def _watched(file: CachedFile) -> bool:
    return counts_as_request(file) and file.generation.in_load_set(file.entry.index)
