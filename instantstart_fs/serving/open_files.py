"""Which files are open here: their descriptors, how many hold them, and which generations are in use.

A descriptor outlives the opens for a while, since opening and registering it anew was half of the time of an open. It
never outlives the incarnation: nobody could open that again, and its deleted bytes would stay on the disk.
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
"""Descriptors of files that were open a while ago: the shards of some pipelines, and a quarter of the least limit of
open files (1024) that a daemon may be given."""
GIVE_UP = 16
"""Of these, so many at once, when a descriptor is wanted."""


class OpenFiles:
    """Owned by the Library; on the trio thread, but for ``read_blocking``."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._drained = trio.open_memory_channel[Generation](math.inf)
        self._idle: OrderedDict[CachedFile, None] = OrderedDict()
        """Complete files that nobody has open, whose descriptor is kept. The least recently used comes first."""
        self._most_idle = min(IDLE_READERS, descriptors.limit() // 4)
        self.closing: Callable[[int], None] | None = None
        """See vfs.Vfs.use_passthrough."""
        self.listener: OpenListener = NullListener()
        self._stale: dict[CachedFile, list[BlobFile]] = {}
        """Descriptors of what the store has lost since, while somebody may be inside a read of them."""

    @property
    def drained_generations(self) -> trio.MemoryReceiveChannel[Generation]:
        """Superseded generations whose last handle has just been released."""
        return self._drained[1]

    # -- holding -------------------------------------------------------------------------------------------------

    def acquire(self, file: CachedFile) -> None:
        """One more has it open."""
        self._idle.pop(file, None)
        file.handles += 1
        file.generation.handles += 1
        if file.handles == 1 and _watched(file):
            self.listener.opened(file.key)

    def keep_readers_open(self, generation: Generation) -> None:
        """Before its names go: whoever has a complete file open can read it to the end by our own descriptor."""
        if generation.handles:
            for file in generation.files:
                if file.handles and file.complete and file.stale_error is None:
                    with contextlib.suppress(StoreError):
                        self.reader(file)

    def release(self, file: CachedFile) -> None:
        """One less."""
        file.handles -= 1
        if file.handles == 0 and _watched(file):
            self.listener.released(file.key)
        self._keep_or_close_reader(file)
        self._release_generation(file.generation)

    def notify(self, listener: OpenListener, pipelines: Iterable[Pipeline]) -> None:
        """Tell it of opens from now on, and at once of what is open already."""
        self.listener = listener
        for pipeline in pipelines:
            for generation in pipeline.heads():
                if isinstance(generation, Generation) and generation.handles:
                    for file in generation.files:
                        if file.handles and _watched(file):
                            listener.opened(file.key)

    def queue_drained(self, pipelines: Iterable[Pipeline]) -> None:
        """Of superseded generations that nobody held when they were loaded, or no longer."""
        for pipeline in pipelines:
            for generation in pipeline.draining:
                if not generation.handles:
                    self._drained[0].send_nowait(generation)

    def _keep_or_close_reader(self, file: CachedFile) -> None:
        """Keep the descriptor of a file that nobody has open for the next one, if there may be a next one."""
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
        """Nobody will open it again: an idle descriptor would keep its deleted bytes on the disk."""
        self.listener.retired(file.key)
        if not file.handles:
            self.close_reader(file)

    def close_reader(self, file: CachedFile) -> None:
        self._idle.pop(file, None)
        for stale in self._stale.pop(file, ()):
            stale.close()
        if file.reader is not None:
            if self.closing is not None:
                self.closing(file.passthrough_nodeid)
            file.reader.close()
            file.reader = None

    @contextlib.contextmanager
    def using(self, generation: Generation) -> Iterator[None]:
        """Meanwhile nothing of the generation is evicted or deleted, as if a file of it were open."""
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
        """The descriptor that the kernel is to read. Raises NoSuchEntry, StoreDamaged."""
        if not file.passthrough_eligible:
            raise NoSuchEntry(f"{file.entry.path} is not complete any more")
        return self.check(file)

    def check(self, file: CachedFile) -> int:
        """The descriptor of a complete file, which the store still has. Raises StoreDamaged, StoreError."""
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
        """Another descriptor of the same description, the caller's to close, to read the file ahead: whoever has it
        does not count as somebody who has the file open. Raises StoreDamaged, OutOfResources."""
        kept = file.reader is not None
        try:
            with translated(f"open {file.entry.path}"):
                return descriptors.held(os.dup(self.reader(file)), spare=True)
        finally:
            if file.handles and not kept:
                self.close_reader(file)  # whoever has it open reads what is bound, and needs none of ours
            else:
                self._keep_or_close_reader(file)

    def used_elsewhere(self, file: CachedFile) -> bool:
        """Whether somebody has the store's file open or mapped, past this daemon. True, too, while that cannot be
        asked: without a descriptor to spare, say."""
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
        """As many bytes as the page cache has at once; 0 when it would block."""
        try:
            return os.preadv(self.reader(file), [view], offset, os.RWF_NOWAIT)
        except OSError:
            # EAGAIN: not cached. EOPNOTSUPP: this filesystem knows no RWF_NOWAIT. What is really wrong, the blocking
            # read meets again.
            return 0

    @staticmethod
    def read_blocking(file: CachedFile, fd: int, offset: int, view: memoryview) -> None:
        """``fd``: its ``reader``, which whoever has it open keeps. In a thread. Raises StoreDamaged, OutOfResources."""
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
        """Its descriptor, for as long as nothing is awaited. Raises StoreError."""
        if file.reader is not None and not file.complete and self._filled_elsewhere(file):
            # The store lost the file under a fill that has begun anew. Others may be inside a read of the old one.
            self._stale.setdefault(file, []).append(file.reader)
            file.reader = None
        if file.reader is None:
            file.reader = self._within_reserve(file)
        return file.reader.fd

    def _within_reserve(self, file: CachedFile) -> BlobFile:
        """Those that nobody has open give theirs up first. Raises OutOfResources: more must not be opened for readers,
        or the daemon could do nothing else any more."""
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
        """Of a file that is not complete: what reading it takes is refused at its open, and not waited for in a read.
        Raises OutOfResources."""
        while file.reader is None and not descriptors.may_hold_another():
            if not self._give_up_idle():
                raise _too_many(file)

    def _give_up_idle(self) -> bool:
        """Some of those whose descriptor is kept without need; False: there are none."""
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
        """It is complete from now on; while its target still says which file of the store was filled."""
        if file.reader is not None and self._filled_elsewhere(file):
            self._stale.setdefault(file, []).append(file.reader)
            file.reader = None


def _too_many(file: CachedFile) -> OutOfResources:
    return OutOfResources(
        f"{file.entry.path}: too many files are open: the daemon may have {descriptors.limit()} descriptors, and "
        f"{descriptors.reserve()} of them are its own; raise LimitNOFILE= (ulimit -n)"
    )


def _filled(file: CachedFile) -> BlobFile | None:
    """The store's file that is being filled, open."""
    blob = file.target.blob if file.target is not None else None
    return blob if blob is not None and blob.fd >= 0 else None


def _join(blob: BlobFile, file: CachedFile) -> None:
    """A file that an update kept is open here by one description for all generations: by two, each would look used."""
    pipeline = file.generation.pipeline
    if not pipeline.draining:
        return
    for generation in pipeline.generations():
        twin = _at(generation, file.entry.path) if generation is not file.generation else None
        if twin is not None and twin.reader is not None and os.path.sameopenfile(twin.reader.fd, blob.fd):
            os.dup2(twin.reader.fd, blob.fd, inheritable=False)
            return


def _at(generation: Generation, path: str) -> CachedFile | None:
    """Its file of that path, by the tree: a walk over a hundred thousand files would stop everybody at each open."""
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
