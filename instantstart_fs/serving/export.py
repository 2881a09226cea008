"""Handing a pipeline's weight files over to a process that reads them itself: read-only descriptors of complete files.

The receiver never has the store's permissions: what it gets are descriptors that this process opened. A cold pipeline
is filled, and each file goes over as it is sealed; the next one wanted is demanded, which puts it ahead of background
work. Meanwhile the generation counts as open, and the caller holds a lease.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

import trio

from instantstart_fs.catalog.model import CachedFile, Generation
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.weights import WeightSet, scheduled, weight_entries, weight_set
from instantstart_fs.errors import InstantStartError, StoreDamaged
from instantstart_fs.serving.reads import Reads
from instantstart_fs.store.blobstore import BlobStore


class Handover:
    """Of one generation to one receiver, in the order of ``scheduled`` for its ``deadlines``, as far as what is there
    allows. ``weights``: what will be handed over, in load order."""

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

    @property
    def finished(self) -> bool:
        """Whether every file has been handed over."""
        return not self._pending

    async def next_files(self, limit: int, timeout: float) -> list[tuple[str, list[int]]]:
        """(path, descriptors) of at most ``limit`` more complete files; empty when none became complete within
        ``timeout`` seconds. The descriptors are the caller's to close: the file, and, where its filesystem allows it,
        the same opened O_DIRECT.

        Raises what keeps a file from ever being complete, ReadDeadline without progress of the file that is fetched.
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

    async def _wait(self, file: CachedFile, timeout: float) -> None:
        pipeline = self._generation.pipeline
        target = await self._reads.target(file)
        if target is None:
            return
        whole = ByteRange(0, file.size)
        self._reads.filler.demand(target, whole)
        with trio.move_on_after(timeout):
            await target.wait_readable(whole, self._read_deadline)
            # All is there; what is left is the proof.
            if not file.complete and file.stale_error is None:
                await pipeline.wait_changed(timeout)
        failure = pipeline.failure
        if failure is not None and failure.final and not failure.recalled:
            raise failure.error

    def _open(self, file: CachedFile) -> list[int]:
        """Blocks. Raises StoreDamaged when the file is not what its record says."""
        generation = self._generation
        with self._store.open_sealed(
            generation.pipeline.id, generation.number, file.entry.path, file.proof, handed=True
        ) as blob:
            # Descriptions of their own: the receiver may change flags and readahead of what it gets.
            place = f"/proc/self/fd/{blob.fd}"
            try:
                descriptors = [os.open(place, os.O_RDONLY | os.O_CLOEXEC)]
            except OSError as error:
                raise InstantStartError(f"{file.entry.path} cannot be opened: {error.strerror}") from error
            with contextlib.suppress(OSError):  # this filesystem has no direct reads: the receiver does without
                descriptors.append(os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
            return descriptors


def close_all(handed: list[tuple[str, list[int]]]) -> None:
    for _, descriptors in handed:
        for descriptor in descriptors:
            os.close(descriptor)
