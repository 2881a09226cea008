"""Which files are open here: their descriptors, how many hold them, and which generations are in use.

A descriptor outlives the opens for a while, since opening and registering it anew was half of the time of an open. It
never outlives the incarnation: nobody could open that again, and its deleted bytes would stay on the disk.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator

import trio

from instantstart_fs.errors import NoSuchEntry, StoreDamaged, StoreError
from instantstart_fs.library.shelf import Shelf
from instantstart_fs.library.state import CachedFile, Generation, counts_as_request
from instantstart_fs.library.watching import Nobody, Watcher
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.locks import used_elsewhere

IDLE_READERS = 256
"""Descriptors of files that were open a while ago: the shards of some pipelines, and a quarter of the least limit of
open files (1024) that a daemon may be given."""


class OpenFiles:
    """Owned by the Library; on the trio thread, but for ``read_blocking``."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._drained = trio.open_memory_channel[Generation](math.inf)
        self._idle: OrderedDict[CachedFile, None] = OrderedDict()
        """Complete files that nobody has open, whose descriptor is kept. The least recently used comes first."""
        self.closing: Callable[[int], None] | None = None
        """See view.View.use_passthrough."""
        self.watcher: Watcher = Nobody()
        shelf.retire = self._retire

    @property
    def drained_generations(self) -> trio.MemoryReceiveChannel[Generation]:
        """Superseded generations whose last handle has just been released."""
        return self._drained[1]

    # -- holding -------------------------------------------------------------------------------------------------

    def hold(self, file: CachedFile) -> None:
        """One more has it open."""
        self._idle.pop(file, None)
        file.handles += 1
        file.generation.handles += 1
        if file.handles == 1 and _watched(file):
            self.watcher.opened(file.key)

    def keep_for_holders(self, generation: Generation) -> None:
        """Before its names go: whoever has a complete file open can read it to the end by our own descriptor."""
        if generation.handles:
            for file in generation.files:
                if file.handles and file.complete and file.gone is None:
                    with contextlib.suppress(StoreError):
                        self.reader(file)

    def let_go(self, file: CachedFile) -> None:
        """One less."""
        file.handles -= 1
        if file.handles == 0 and _watched(file):
            self.watcher.released(file.key)
        self._settle_reader(file)
        self._let_go(file.generation)

    def watch(self, watcher: Watcher) -> None:
        """Tell it of opens from now on, and at once of what is open already."""
        self.watcher = watcher
        for pipeline in self._shelf.pipelines.values():
            for generation in pipeline.outlines():
                if isinstance(generation, Generation) and generation.handles:
                    for file in generation.files:
                        if file.handles and _watched(file):
                            watcher.opened(file.key)

    def tell_drained(self) -> None:
        """Of superseded generations that nobody held when they were loaded, or no longer."""
        for pipeline in self._shelf.pipelines.values():
            for generation in pipeline.draining:
                if not generation.handles:
                    self._drained[0].send_nowait(generation)

    def _settle_reader(self, file: CachedFile) -> None:
        """Keep the descriptor of a file that nobody has open for the next one, if there may be a next one."""
        if file.handles or file.reader is None:
            return
        generation = file.generation
        if file.passable and generation is generation.pipeline.outline and not generation.pipeline.removed:
            self._keep_idle(file)
        else:
            self.close_reader(file)

    def _keep_idle(self, file: CachedFile) -> None:
        self._idle[file] = None
        self._idle.move_to_end(file)
        if len(self._idle) > IDLE_READERS:
            oldest, _ = self._idle.popitem(last=False)
            self.close_reader(oldest)

    def _retire(self, file: CachedFile) -> None:
        """Nobody will open it again: an idle descriptor would keep its deleted bytes on the disk."""
        self.watcher.retired(file.key)
        if not file.handles:
            self.close_reader(file)

    def close_reader(self, file: CachedFile) -> None:
        self._idle.pop(file, None)
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
            self._let_go(generation)

    def _let_go(self, generation: Generation) -> None:
        generation.handles -= 1
        if generation.handles == 0 and generation is not generation.pipeline.outline:
            self._drained[0].send_nowait(generation)

    # -- descriptors ---------------------------------------------------------------------------------------------

    def backing(self, file: CachedFile) -> int:
        """The descriptor that the kernel is to read. Raises NoSuchEntry, StoreDamaged."""
        if not file.passable:
            raise NoSuchEntry(f"{file.entry.path}: is not complete any more")
        fd = self.reader(file)
        found = os.fstat(fd)
        if found.st_size != file.size or not found.st_nlink:
            raise StoreDamaged(
                f"{file.entry.path}: the store's file has {found.st_size} bytes of {file.size}, {found.st_nlink} names"
            )
        return fd

    def duplicate(self, file: CachedFile) -> int:
        """Another descriptor of the same description, the caller's to close: whoever has it does not count as somebody
        who has the file open. Raises StoreDamaged."""
        fd = os.dup(self.reader(file))
        self._settle_reader(file)
        return fd

    def used_elsewhere(self, file: CachedFile) -> bool:
        """Whether somebody has the store's file open or mapped, past this daemon. True, too, while that cannot be
        asked: without a descriptor to spare, say."""
        if file.reader is not None:
            return used_elsewhere(file.reader.fd)
        generation = file.generation
        try:
            blob = self._shelf.store.existing_blob(generation.pipeline.id, generation.number, file.entry.path)
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

    def read_blocking(self, file: CachedFile, offset: int, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self.reader(file), [view[done:]], offset + done)
                if count == 0:
                    raise StoreDamaged(f"{file.entry.path}: the store's file is shorter than the manifest says")
                done += count
        except OSError as error:
            raise StoreDamaged(f"{file.entry.path}: cannot be read from the store: {error.strerror}") from error

    def reader(self, file: CachedFile) -> int:
        if file.reader is None:
            generation = file.generation
            blob = self._shelf.store.existing_blob(generation.pipeline.id, generation.number, file.entry.path)
            if blob is None:
                raise StoreDamaged(f"{file.entry.path}: missing from the store; run `instantstart verify`")
            try:
                if file.complete and not _sealed_as(blob, file):
                    # The index is wrong about it (what was never written reads as zeros), or it was exchanged.
                    raise StoreDamaged(f"{file.entry.path}: the store's file is not the one that was sealed")
                _join(blob, file)
            except BaseException:
                blob.close()
                raise
            file.reader = blob
        return file.reader.fd


def _sealed_as(blob: BlobFile, file: CachedFile) -> bool:
    """Whether it has a seal, and that of this file."""
    seal, digest = blob.seal_record(), file.entry.file.digest
    if seal is None or (seal.size, blob.size) != (file.size, file.size):
        return False
    return seal.digest is None or digest is None or seal.digest == str(digest)


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
