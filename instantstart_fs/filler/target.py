"""FillTarget: the live state of one file that is not (yet) sealed. Owned by the filler, shared with the library.

The library makes one per unsealed file that somebody wants, at most one per FileKey and incarnation; the filler fills
it; readers wait on it. It lives on the trio thread alone.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import trio

from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.manifest import FileEntry
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
    """Which file: pipeline id, generation number, index in the manifest."""

    pipeline: str
    generation: int
    index: int


class FillTarget:
    """One file being filled.

    ``present``: what readers may be served (in memory). ``durable``: what a crash cannot take (already committed).
    ``state``: absent | filling | sealed | unverified | poisoned. ``error``: the last failure, None while all is well;
    ``failed`` says that it is final for this incarnation (origin changed, refused, cancelled …) and readers must stop
    waiting. ``failed_at``: trio.current_time() of that; a later demand may try again (``Filler.demand``).
    ``broken``: set while the origin's breaker is open; readers that would wait fail at once, though the file has not
    failed. ``deadline_extended_to``: trio.current_time() until which a Retry-After excuses the lack of progress.
    ``allocated``: bytes of disk that it took when it was sealed.
    """

    __slots__ = (
        "_waiters",
        "allocated",
        "blob",
        "broken",
        "deadline_extended_to",
        "durable",
        "entry",
        "error",
        "failed",
        "failed_at",
        "has_reader",
        "incarnation",
        "key",
        "last_progress",
        "open_blob",
        "origin",
        "present",
        "serve_unsealed",
        "state",
    )

    def __init__(
        self,
        key: FileKey,
        entry: FileEntry,
        incarnation: int,
        present: ChunkMap,
        origin: Origin,
        open_blob: Callable[[], BlobFile],
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
        self.allocated = 0
        self.has_reader: Callable[[], bool] = lambda: True
        """Whether somebody has its pipeline open: then its pages stay in the page cache after they were hashed."""
        self._waiters: set[trio.Event] = set()

    def readable(self, wanted: ByteRange) -> bool:
        """Whether these bytes may be served now: sealed, or present, not poisoned and allowed to be served unsealed."""
        if self.state in COMPLETE:
            return True
        return self.serve_unsealed and self.state is not FileState.POISONED and self.present.holds(wanted)

    def wake(self) -> None:
        """Wake every waiter to look again. Called by the filler after each change."""
        waiters, self._waiters = self._waiters, set()
        for event in waiters:
            event.set()

    async def wait_readable(self, wanted: ByteRange, no_progress: float) -> None:
        """Return once ``readable(wanted)``.

        Raises the target's error when it has failed for good, OriginBroken at once while the origin's breaker is open
        (the file has not failed: a later read may succeed), and ReadDeadline after ``no_progress`` seconds in which
        no chunk of this file arrived (a Retry-After extends that, as the filler decides). Cancellation is safe.
        """
        started = trio.current_time()
        while not self.readable(wanted):
            if self.failed:
                raise self.error or ReadDeadline(f"{self.entry.path}: the fill failed")
            if self.broken is not None:
                raise self.broken
            limit = max(max(started, self.last_progress) + no_progress, self.deadline_extended_to)
            if trio.current_time() >= limit:
                reason = f" ({self.error.message})" if self.error else ""
                raise ReadDeadline(f"{self.entry.path}: no progress for {no_progress:g} s{reason}")
            event = trio.Event()
            self._waiters.add(event)
            try:
                with trio.move_on_at(limit):
                    await event.wait()
            finally:
                self._waiters.discard(event)
