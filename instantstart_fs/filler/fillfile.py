"""A file that a fetch process fills, and the sinks that write fetched bytes into it. It opens no connection and does
not decide what is fetched.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.filler.fetch import Abandoned
from instantstart_fs.filler.messages import Fetch, OpenFile, Progress, Report, Streamed
from instantstart_fs.origins.base import Location
from instantstart_fs.store.blobfile import BlobFile

PROGRESS_SECONDS = 1.0


class Process(Protocol):
    """The part of its process that a fetch uses. Thread-safe."""

    def report(self, message: Report) -> None:
        """Send ``message`` to the daemon."""
        ...

    def wait_pause(self, work: FetchSink) -> None:
        """Wait while background fetches are paused for a demand. May raise Abandoned."""
        ...

    def chunk_written(self, file: FillFile) -> None:
        """A chunk of ``file`` became present: hash on, if it continues the prefix."""
        ...

    def ignores_ranges(self, host: str) -> None:
        """``host`` answered a range request with the whole file."""
        ...


class FillFile:
    """A file being filled. ``lock`` guards every field below it."""

    def __init__(self, order: OpenFile, fd: int) -> None:
        self.number = order.file
        self.digest = order.digest
        self.size = order.size
        self.blob = BlobFile(fd, order.size, order.name, writable=True, created=False, sync_entry=_no_sync)
        self.present = ChunkMap(order.size, order.chunk_size, order.present)
        self.location: Location | None = None
        self.lock = threading.Condition()
        self.closed = False
        self.users = 0
        """Threads that use the descriptor: fetches and a hash pass."""
        self.writers = 0
        self.streamer: FetchSink | None = None
        """The fetch that takes the whole file, from a server that ignores ranges."""
        self.owners: dict[int, FetchSink] = {}
        """Who writes a chunk, from the first byte until it is present or given up: one that comes from two sources at
        once is of one of them."""
        self.hashing = False
        self.hashed = 0
        self.keep_pages = True
        self._unreported: set[int] = set()
        self.dropped = 0
        """Offset up to which the hash thread has dropped pages."""
        self.hasher = new_hasher(order.digest, order.size) if order.digest is not None else None

    def enter(self) -> None:
        """Keep the descriptor open until ``leave``. Raises Abandoned if the file is closed."""
        with self.lock:
            if self.closed:
                raise Abandoned
            self.users += 1

    def leave(self) -> None:
        """Release the descriptor; the last one closes a closed file."""
        with self.lock:
            self.users -= 1
            if self.closed and not self.users:
                self.blob.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[BlobFile]:
        """Hold back ``close`` during the block. Raises Abandoned if the file is closed."""
        with self.lock:
            if self.closed:
                raise Abandoned
            self.writers += 1
        try:
            yield self.blob
        finally:
            with self.lock:
                self.writers -= 1
                self.lock.notify_all()

    def note_unreported(self, chunk: int) -> None:
        """Remember a chunk whose fetch was stopped just as it became present: its bytes may be hashed already and must
        not be written again."""
        with self.lock:
            if chunk in self.present:
                self._unreported.add(chunk)

    def take_unreported(self, chunk: int) -> bool:
        """Whether ``chunk`` is present and the daemon does not know it yet. Only the first call returns True."""
        with self.lock:
            if chunk not in self._unreported:
                return False
            self._unreported.discard(chunk)
            return True

    def disown(self, owner: FetchSink) -> None:
        """It writes nothing more."""
        with self.lock:
            for chunk in [chunk for chunk, mine in self.owners.items() if mine is owner]:
                del self.owners[chunk]
            self.lock.notify_all()

    def close(self) -> None:
        """Wait until nobody writes and give up the file, so that unlinking it frees its space."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()
            while self.writers:
                self.lock.wait()
            if not self.users:
                self.blob.close()
            else:
                # A thread may be in recv for the whole time-out: it keeps the descriptor number, but not the file.
                nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                os.dup2(nothing, self.blob.fd, inheritable=False)
                os.close(nothing)


class WaitsForStream(Exception):
    """Raised when another request takes the whole file: this one needs to fetch nothing."""


class CameOtherwise(Exception):
    """The chunk is present already, and was reported: another request brought it. Nothing is written over it."""


class FetchSink:
    """The sink (filler/fetch.py) of one fetch: writes the chunk, reports progress, stops on request."""

    def __init__(self, process: Process, file: FillFile, order: Fetch) -> None:
        self._process = process
        self._file = file
        self._order = order
        self.host = ""
        self.took_whole = False
        self.demand = order.demand
        self.thread: int | None = None
        """Identity of the thread that runs this fetch, while one does."""
        self.stopped = False
        self._writing = False
        self.last_byte = time.monotonic()
        self._reported = self.last_byte
        self._count = 0

    def stop(self) -> None:
        """Stop the fetch; on return nothing of it is written any more."""
        with self._file.lock:
            self.stopped = True
            self._file.lock.notify_all()
            while self._writing:
                self._file.lock.wait()
        self._file.disown(self)

    @property
    def over(self) -> bool:
        return self._file.closed or self.stopped

    def before_read(self) -> None:
        if self.over:
            raise Abandoned
        if not self.demand:
            self._process.wait_pause(self)
            self.last_byte = time.monotonic()

    def write(self, data: memoryview, offset: int) -> None:
        """Raises CameOtherwise, StoreError, Abandoned."""
        self._own()
        self.write_owned(data, offset)

    def _own(self) -> None:
        """Wait while another request writes the chunk: the daemon's deadlines go on meanwhile."""
        file, chunk = self._file, self._order.chunk
        with file.lock:
            while file.owners.get(chunk, self) is not self:
                if self.over:
                    raise Abandoned
                file.lock.wait()
            if chunk in file.present:
                raise CameOtherwise
            if not self.over:
                file.owners[chunk] = self

    def write_owned(self, data: memoryview, offset: int, reserve: ByteRange | None = None) -> None:
        """Write into a chunk of this request's own, after reserving the space of ``reserve``."""
        with self._file.writing() as blob:
            with self._file.lock:
                if self.stopped:
                    raise Abandoned
                self._writing = True
            try:
                if reserve is not None:
                    blob.reserve(reserve)
                blob.pwrite(offset, data)
            finally:
                with self._file.lock:
                    self._writing = False
                    self._file.lock.notify_all()

    def progress(self, count: int) -> None:
        self.last_byte = now = time.monotonic()
        self._count += count
        if now - self._reported >= PROGRESS_SECONDS:
            self._process.report(Progress(self._order.request, self._count))
            self._reported, self._count = now, 0

    def take_whole(self) -> WholeFileSink:
        """Take the whole file if no other request of the file does; the others wait, without a connection."""
        with self._file.lock:
            if self._file.closed:
                raise Abandoned
            if self._file.streamer not in (None, self) or self._order.chunk in self._file.present:
                raise WaitsForStream  # an earlier stream brought this chunk: it is requested again, and is present then
            self._file.streamer = self
        self.took_whole = True
        self._process.ignores_ranges(self.host)
        return WholeFileSink(self._process, self._file, self._order, self)


class WholeFileSink:
    """The sink of a whole file from a server that ignores ranges: keeps each chunk that is neither present nor being
    written by another request. ``fetch``: the request's own sink."""

    def __init__(self, process: Process, file: FillFile, order: Fetch, fetch: FetchSink) -> None:
        self._process = process
        self._file = file
        self._order = order
        self._fetch = fetch
        self.before_read = fetch.before_read
        self.progress = fetch.progress

    def write(self, data: memoryview, offset: int) -> None:
        file, present = self._file, self._file.present
        while data:
            chunk = offset // present.chunk_size
            place = present.byte_range(chunk)
            piece = data[: place.stop - offset]
            begins = offset == place.start
            with file.lock:
                if file.closed or self._fetch.stopped:
                    raise Abandoned
                if begins and chunk not in present:
                    file.owners.setdefault(chunk, self._fetch)
                mine = file.owners.get(chunk) is self._fetch
            if mine:
                self._fetch.write_owned(piece, offset, place if begins else None)
            data, offset = data[len(piece) :], offset + len(piece)
            if mine and offset == place.stop:
                self._chunk_complete(chunk)

    def _chunk_complete(self, chunk: int) -> None:
        file = self._file
        with file.lock:
            if file.closed or file.owners.get(chunk) is not self._fetch:
                raise Abandoned
            file.present.add(chunk)
        self._process.report(Streamed(self._order.request, chunk))
        file.disown(self._fetch)  # who waits to write it reports after this one
        self._process.chunk_written(file)

    def take_whole(self) -> None:
        return None


def _no_sync() -> None:
    """The daemon, not the worker, makes directory entries durable."""
