"""FillTarget: the live state of one file that is not sealed yet, which the library creates, the filler fills and
readers wait on. It fetches nothing and decides nothing.

The library makes one per unsealed file that somebody wants, at most one per FileKey and incarnation. It lives on the
trio thread alone.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio

from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.retry import MAX_RETRY_AFTER, REPEAT_SECONDS, Effort
from instantstart_fs.errors import InstantStartError, OriginBroken, ReadDeadline

if TYPE_CHECKING:
    from instantstart_fs.origins.base import Origin
    from instantstart_fs.store.blobfile import BlobFile


class FileState(enum.StrEnum):
    ABSENT = "absent"
    FILLING = "filling"
    SEALED = "sealed"
    UNVERIFIED = "unverified"
    POISONED = "poisoned"


COMPLETE = frozenset({FileState.SEALED, FileState.UNVERIFIED})


class FileKey(msgspec.Struct, frozen=True, order=True):
    """A file: pipeline id, generation number, index in the manifest."""

    pipeline: str
    generation: int
    index: int


LiveFile = tuple[FileKey, "Origin"]
"""A file of one life of its pipeline. One that is removed and added again under its name counts its generations from 1
again, so what is kept of its bytes, addresses and errors is kept by the Origin as well: each life opens its own."""

EXACT_CHUNKS = 64
"""A wait for more chunks than this goes by the progress of the whole file, since it is checked at each arrival."""


class TargetOwner(Protocol):
    """The filler's table, which is told that nobody waits any more (filler/table.py)."""

    def unwaited(self, target: FillTarget, chunks: list[int]) -> None:
        """Note that no reader waits for these chunks any more, although they did not arrive."""
        ...

    def queue_moved(self, target: FillTarget) -> float:
        """trio.current_time() when something last came for the queue that an unsent chunk of ``target`` is in."""
        ...


def _always() -> bool:
    return True


class FillTarget:
    """One file being filled.

    ``present``: what readers may be served (in memory). ``durable``: what a crash cannot take (already committed).
    ``state``: absent | filling | sealed | unverified | poisoned. ``error``: the last failure, None while all is well;
    ``failed`` says that it is final for this incarnation (origin changed, refused, cancelled …) and readers must stop
    waiting. ``failed_at``: trio.current_time() of that; a later demand may try again (``Filler.demand``).
    ``broken``: set while a breaker of the origin is open; readers that would wait fail at once, though the file has not
    failed. ``deadline_extended_to``: trio.current_time() until which a Retry-After excuses the lack of progress.
    ``waiting``: how many readers wait for each chunk. ``efforts``: what was undertaken for each absent chunk.
    ``owner``: who fills it; None while nobody does, so that no cycle keeps a finished target in memory.
    ``has_reader``: whether its pipeline is open; then its pages stay in the page cache after hashing.
    ``allocated``: bytes of disk that it took when it was sealed.
    """

    __slots__ = (
        "_gave_up",
        "_waiters",
        "allocated",
        "blob",
        "broken",
        "deadline_extended_to",
        "durable",
        "efforts",
        "entry",
        "error",
        "failed",
        "failed_at",
        "has_reader",
        "incarnation",
        "key",
        "last_progress",
        "losses",
        "open_blob",
        "origin",
        "owner",
        "present",
        "proven_by",
        "serve_unsealed",
        "state",
        "verified",
        "waiting",
    )

    def __init__(
        self,
        key: FileKey,
        entry: FileEntry,
        incarnation: int,
        present: ChunkMap,
        origin: Origin,
        open_blob: Callable[[], BlobFile],
        *,
        has_reader: Callable[[], bool] = _always,
    ) -> None:
        self.key = key
        self.entry = entry
        self.incarnation = incarnation
        self.present = present
        self.durable = ChunkMap(present.size, present.chunk_size, present.to_bytes())
        self.origin = origin
        self.open_blob = open_blob
        self.blob: BlobFile | None = None
        self.state = FileState.FILLING if present.count else FileState.ABSENT
        self.error: InstantStartError | None = None
        self.failed = False
        self.failed_at = 0.0
        self.broken: OriginBroken | None = None
        self.last_progress = trio.current_time()
        self.deadline_extended_to = 0.0
        self.serve_unsealed = True
        self.verified: set[int] = set()
        """Chunks that are what a region's seal says: proven, though the file is not sealed here."""
        self.proven_by = ""
        """The source of the proof, if it is not this host's own hash: the region's seal."""
        self.losses = 0
        """How often chunks that had been present were lost."""
        self.allocated = 0
        self.has_reader = has_reader
        self.owner: TargetOwner | None = None
        self.waiting: dict[int, int] = {}
        self.efforts: dict[int, Effort] = {}
        self._waiters: set[trio.Event] = set()
        self._gave_up: dict[int, tuple[float, ReadDeadline]] = {}
        """Chunk → the last wait that ended without it, of the last REPEAT_SECONDS."""

    def fail(self, error: InstantStartError) -> None:
        """Mark this incarnation as failed for good and wake its readers."""
        self.error, self.failed, self.failed_at = error, True, trio.current_time()
        self.wake()

    def readable(self, wanted: ByteRange) -> bool:
        """Whether these bytes may be served now: sealed, or present, not poisoned and allowed to be served unsealed, or
        each of their chunks proven."""
        if self.state in COMPLETE:
            return True
        if self.state is FileState.POISONED or not self.present.holds(wanted):
            return False
        return self.serve_unsealed or self.verified.issuperset(self.present.chunks_of(wanted))

    def wake(self) -> None:
        """Wake every waiter to check again. Called after each change."""
        waiters, self._waiters = self._waiters, set()
        for event in waiters:
            event.set()

    def watch(self, event: trio.Event) -> None:
        """Set ``event`` at the next change. Call ``unwatch`` afterwards."""
        self._waiters.add(event)

    def unwatch(self, event: trio.Event) -> None:
        self._waiters.discard(event)

    async def wait_readable(self, wanted: ByteRange, no_progress: float, since: float | None = None) -> None:
        """Return once ``readable(wanted)``. Cancellation is safe.

        Args:
            wanted: The bytes that the reader needs.
            no_progress: Seconds without progress of these bytes after which the wait ends. A Retry-After extends it, as
                the filler decides, by MAX_RETRY_AFTER at most.
            since: trio.current_time() since which the reader waits; None = now.

        Raises:
            OriginBroken: At once, while a breaker of the origin is open. The file has not failed: a later read may
                succeed.
            ReadDeadline: ``no_progress`` is over. It is repeated at once for reads of the same chunk within
                REPEAT_SECONDS, since the kernel asks again for a page whose readahead failed.
            InstantStartError: The target has failed for good.
        """
        since = trio.current_time() if since is None else since
        if self.readable(wanted):
            return
        if not self.failed and self.broken is None:
            self._repeat(wanted)
        chunks = list(self.present.chunks_of(wanted))
        for chunk in chunks:
            self.waiting[chunk] = self.waiting.get(chunk, 0) + 1
        done = False
        try:
            while not self.readable(wanted):
                if self.failed:
                    raise (self.error or ReadDeadline(f"{self.entry.path}: the fill failed")).with_traceback(None)
                if self.broken is not None:
                    done = True  # it stays asked for: nothing else would find out that the origin is back
                    raise self.broken.with_traceback(None)  # one for all: it must not keep every reader's frames
                excused = min(self.deadline_extended_to, since + MAX_RETRY_AFTER + no_progress)
                limit = max(max(since, self._moved(wanted)) + no_progress, excused)
                if trio.current_time() >= limit:
                    raise self._give_up(wanted, no_progress)
                event = trio.Event()
                self._waiters.add(event)
                try:
                    with trio.move_on_at(limit):
                        await event.wait()
                finally:
                    self._waiters.discard(event)
            done = True
        finally:
            self._leave(chunks, done=done)

    def _missing(self, wanted: ByteRange) -> Iterator[int]:
        return (chunk for chunk in self.present.chunks_of(wanted) if chunk not in self.present)

    def _moved(self, wanted: ByteRange) -> float:
        """Return when a chunk that is waited for last advanced."""
        if not self.serve_unsealed or len(self.present.chunks_of(wanted)) > EXACT_CHUNKS:
            return self.last_progress
        times = [
            effort.moved if (effort := self.efforts.get(chunk)) is not None else self._queue_moved()
            for chunk in self._missing(wanted)
        ]
        return max(times, default=self.last_progress)

    def _queue_moved(self) -> float:
        return self.owner.queue_moved(self) if self.owner is not None else -math.inf

    def _repeat(self, wanted: ByteRange) -> None:
        """Raise the error of a wait that has just ended without these bytes."""
        if not self._gave_up:
            return
        self._forget_old()
        for chunk in self._missing(wanted):
            when, error = self._gave_up.get(chunk, (math.inf, None))
            effort = self.efforts.get(chunk)
            if error is not None and (effort is None or effort.moved <= when):
                raise error.with_traceback(None)

    def _give_up(self, wanted: ByteRange, no_progress: float) -> ReadDeadline:
        reason = f" ({self.error.message})" if self.error else ""
        error = ReadDeadline(f"{self.entry.path}: no progress for {no_progress:g} s{reason}")
        now = trio.current_time()
        self._forget_old()
        for chunk in self._missing(wanted):
            self._gave_up.setdefault(chunk, (now, error))
        return error

    def _forget_old(self) -> None:
        since = trio.current_time() - REPEAT_SECONDS
        self._gave_up = {chunk: what for chunk, what in self._gave_up.items() if what[0] > since}

    def _leave(self, chunks: list[int], *, done: bool) -> None:
        unwaited = []
        for chunk in chunks:
            self.waiting[chunk] -= 1
            if not self.waiting[chunk]:
                del self.waiting[chunk]
                unwaited.append(chunk)
        if unwaited and not done and self.owner is not None:
            self.owner.unwaited(self, unwaited)
