"""Hands a pipeline's weight files over to a process that reads them itself, as read-only descriptors of complete files.

The receiver needs no permissions on the store: this process opens the files. A cold pipeline is filled, and each file
is handed over as it is sealed. A receiver that asks for a stream gets it earlier, with news of the ranges that it can
read. The next file is fetched ahead of background work. Meanwhile the generation counts as open, and the caller holds a
lease.

Bytes of a stream that are not proven yet may be loaded, but not used before the file is complete: see
docs/decisions/prefetch-reading.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import trio

from instantstart_fs.catalog.model import CachedFile, Generation
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.weights import WeightSet, scheduled, weight_entries, weight_set
from instantstart_fs.errors import InstantStartError, StoreDamaged
from instantstart_fs.filler.target import FillTarget
from instantstart_fs.serving.reads import Reads
from instantstart_fs.store.blobstore import BlobStore

COALESCE_SECONDS = 0.02
"""Chunks that come within this time are told of together."""
MOST_STREAMED = 64
"""Files that are told of before they are complete: the next ones in load order."""
MOST_RANGES = 2000


class FilePart(NamedTuple):
    """News of a file. ``descriptors``: the receiver's to close, empty where it has them; ``ranges``: [start, end) that
    can be read since the last news; ``complete``: all is there and proven; ``again``: what was read before is void."""

    path: str
    descriptors: list[int]
    ranges: tuple[tuple[int, int], ...]
    complete: bool
    again: bool


class _Told:
    """The part of an incomplete file that the receiver knows already."""

    def __init__(self, target: FillTarget, inode: tuple[int, int]) -> None:
        self.target = target
        self.inode = inode
        self.losses = target.losses
        self.count = 0
        self.chunks = bytearray(target.present.chunks)


class Handover:
    """The hand-over of one generation to one receiver, in the order of ``scheduled`` for its ``deadlines`` as far as
    present files allow. ``weights``: what will be handed over, in load order."""

    def __init__(
        self,
        reads: Reads,
        store: BlobStore,
        generation: Generation,
        read_deadline: float,
        deadlines: Mapping[str, float],
    ) -> None:
        self.weights: WeightSet = weight_set(generation.manifest, generation.known)
        self._reads = reads
        self._store = store
        self._generation = generation
        self._read_deadline = read_deadline
        entries = weight_entries(generation.manifest.files, generation.known)
        indices = {entry.path: entry.index for entry in entries}
        self._pending = [indices[file.path] for file in scheduled(self.weights, deadlines)]
        self._told: dict[int, _Told] = {}
        self._whole_only: set[int] = set() if reads.filler.may_stream else set(self._pending)
        """Files that are handed over once they are complete."""

    @property
    def finished(self) -> bool:
        """Whether every file has been handed over."""
        return not self._pending

    async def next_files(self, limit: int, timeout: float) -> list[tuple[str, list[int]]]:
        """Return (path, descriptors) of at most ``limit`` more complete files; none if none became complete within
        ``timeout`` seconds. The caller closes the descriptors: the file, and the same opened O_DIRECT if its
        filesystem allows that.

        Raises InstantStartError if a file cannot become complete, ReadDeadline if the fetched file makes no progress.
        """
        files = self._generation.files
        ready = [index for index in self._pending if files[index].complete][:limit]
        if not ready and self._pending:
            await self._wait(files[self._pending[0]], timeout)
            return []
        handed = []
        try:
            for index in ready:
                file = files[index]
                try:
                    descriptors = await trio.to_thread.run_sync(self._open, file)
                except StoreDamaged as error:
                    # As a read would: drop it, fetch it again; it comes when it is complete once more.
                    await self._reads.replace_damaged(file, error, wanted=True, found_by="open")
                    continue
                handed.append((file.entry.path, descriptors))
                self._pending.remove(index)
        except BaseException:
            close_all(handed)
            raise
        return handed

    async def next_parts(self, limit: int, timeout: float) -> Sequence[FilePart]:
        """Return what ``next_files`` does, and news of files that are not complete: at most ``limit`` with
        descriptors."""
        parts: list[FilePart] = []
        try:
            await self._look(parts, limit)
            if not parts and self._pending:
                await self._wait_news(timeout)
                await self._look(parts, limit)
        except BaseException:
            close_all([(part.path, part.descriptors) for part in parts])
            raise
        return parts

    async def _look(self, parts: list[FilePart], limit: int) -> None:
        files = self._generation.files
        for index in self._pending[:MOST_STREAMED]:
            file, told = files[index], self._told.get(index)
            if sum(bool(part.descriptors) for part in parts) >= limit:
                return
            if file.complete:
                try:
                    descriptors = await trio.to_thread.run_sync(self._open, file)
                except StoreDamaged as error:
                    await self._reads.replace_damaged(file, error, wanted=True, found_by="open")
                    continue
                parts.append(self._completed(file, told, descriptors))
                self._pending.remove(index)
                self._told.pop(index, None)
            elif (part := await self._news(index, file, told)) is not None:
                parts.append(part)

    def _completed(self, file: CachedFile, told: _Told | None, descriptors: list[int]) -> FilePart:
        path, whole = file.entry.path, ((0, file.size),)
        if told is None:
            return FilePart(path, descriptors, whole, complete=True, again=False)
        same = told.inode == _inode(descriptors[0]) and told.target.incarnation == file.incarnation
        if not same or told.losses != told.target.losses:
            return FilePart(path, descriptors, whole, complete=True, again=True)
        close_all([(path, descriptors)])
        left = tuple(_ranges(told.target, (chunk for chunk, known in enumerate(told.chunks) if not known)))
        return FilePart(path, [], left, complete=True, again=False)

    async def _news(self, index: int, file: CachedFile, told: _Told | None) -> FilePart | None:
        target, path = file.target, file.entry.path
        if told is not None and (target is not told.target or told.losses != told.target.losses):
            del self._told[index]  # another incarnation, or bytes that a failed sync may have lost
            return FilePart(path, [], (), complete=False, again=True)
        if target is None or target.blob is None or target.failed or index in self._whole_only:
            return None
        descriptors: list[int] = []
        if told is None:
            if not target.present.count:
                return None
            descriptors = await trio.to_thread.run_sync(self._open_unsealed, file)
            if not descriptors:
                self._whole_only.add(index)
                return None
            if file.target is not target or target.blob is None:
                close_all([(path, descriptors)])
                return None
            told = self._told[index] = _Told(target, _inode(descriptors[0]))
            if told.inode != _inode(target.blob.fd):
                del self._told[index]
                close_all([(path, descriptors)])
                return None
        if not descriptors and told.count == target.present.count:
            return None
        fresh = [chunk for chunk in range(target.present.chunks) if chunk in target.present and not told.chunks[chunk]]
        for chunk in fresh[:MOST_RANGES]:
            told.chunks[chunk] = 1
            told.count += 1
        ranges = tuple(_ranges(target, iter(fresh[:MOST_RANGES])))
        return FilePart(path, descriptors, ranges, complete=False, again=False)

    def _open_unsealed(self, file: CachedFile) -> list[int]:
        """Open an incomplete file for the receiver. Blocks. Returns nothing if it may be handed over only when it is
        complete."""
        generation = self._generation
        try:
            blob = self._store.handed_blob(generation.pipeline.id, generation.number, file.entry.path)
        except InstantStartError:
            return []
        if blob is None:
            return []
        try:
            return _again(blob.fd)
        except OSError:
            return []
        finally:
            blob.close()

    async def _wait_news(self, timeout: float) -> None:
        """Wait until bytes came, a file is complete, or one failed; about ``timeout`` seconds at most."""
        files = self._generation.files
        first = await self._reads.target(files[self._pending[0]])
        if first is None:
            return
        self._reads.filler.want(first)
        targets = [target for index in self._pending[:MOST_STREAMED] if (target := files[index].target) is not None]
        event = trio.Event()
        for target in targets:
            target.watch(event)
        try:
            with trio.move_on_after(0 if first.failed or first.broken is not None else timeout):
                await event.wait()
                await trio.sleep(COALESCE_SECONDS)
        finally:
            for target in targets:
                target.unwatch(event)
        if not event.is_set():  # why not?
            await self._wait(files[self._pending[0]], timeout)

    async def _wait(self, file: CachedFile, timeout: float) -> None:
        pipeline = self._generation.pipeline
        target = await self._reads.target(file)
        if target is None:
            return
        whole = ByteRange(0, file.size)
        self._reads.filler.want(target)
        with trio.move_on_after(timeout):
            await target.wait_readable(whole, self._read_deadline)
            # All is there; what is left is the proof.
            if not file.complete and file.stale_error is None:
                await pipeline.wait_changed(timeout)
        failure = pipeline.failure
        if failure is not None and failure.final and not failure.recalled:
            raise failure.error

    def _open(self, file: CachedFile) -> list[int]:
        """Open a complete file for the receiver. Blocks. Raises StoreDamaged if the file is not what its record
        says."""
        generation = self._generation
        with self._store.open_sealed(
            generation.pipeline.id, generation.number, file.entry.path, file.proof, handed=True
        ) as blob:
            try:
                return _again(blob.fd)
            except OSError as error:
                raise InstantStartError(f"{file.entry.path} cannot be opened: {error.strerror}") from error


def _again(fd: int) -> list[int]:
    """Descriptions of their own: the receiver may change flags and readahead of what it gets. Raises OSError."""
    place = f"/proc/self/fd/{fd}"
    descriptors = [os.open(place, os.O_RDONLY | os.O_CLOEXEC)]
    with contextlib.suppress(OSError):  # this filesystem has no direct reads: the receiver does without
        descriptors.append(os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    return descriptors


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _ranges(target: FillTarget, chunks: Iterator[int]) -> Iterator[tuple[int, int]]:
    """The bytes of these chunks, ascending; neighbours as one."""
    start = end = -1
    for chunk in chunks:
        place = target.present.byte_range(chunk)
        if place.start != end:
            if end >= 0:
                yield start, end
            start = place.start
        end = place.stop
    if end >= 0:
        yield start, end


def close_all(handed: list[tuple[str, list[int]]]) -> None:
    for _, descriptors in handed:
        for descriptor in descriptors:
            os.close(descriptor)
