"""Hashes the files of a fetch process from the page cache, in order, behind the write position. It reports digests but
does not compare them: the daemon knows what was pinned.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.errors import InstantStartError, OutOfResources
from instantstart_fs.filler.fetch import new_buffer
from instantstart_fs.filler.fillfile import FillFile
from instantstart_fs.filler.messages import Hashed, HashFailed, Report
from instantstart_fs.system.threads import start_thread

HASH_TURN_BYTES = 64 * 1024 * 1024
"""Bytes after which a file goes to the back of the queue, so that small files do not wait behind a large one."""

DROP_LAG = 512 * 1024 * 1024
"""Bytes behind the hash position at which pages of a file without readers are dropped: by then a group commit (every
256 MiB) has written them, and only clean pages can be dropped. The rest is dropped when the file is sealed."""


class HashThreads:
    """Threads that follow the contiguous prefix of each file. ``report``: sends to the daemon, thread-safe."""

    def __init__(self, report: Callable[[Report], None]) -> None:
        self._report = report
        self._queue: queue.SimpleQueue[FillFile] = queue.SimpleQueue()

    def start(self, threads: int) -> None:
        """Start ``threads`` threads, or as many as a limit of pids allows. Raises OutOfResources if that is none."""
        for number in range(threads):
            try:
                start_thread(self._run)
            except OutOfResources:
                if not number:
                    raise
                break  # those that run do the work

    def schedule(self, file: FillFile) -> None:
        """Queue ``file`` if its prefix has grown beyond what is hashed and no thread has it."""
        with file.lock:
            if file.hasher is None or file.closed or file.hashing:
                return
            if file.present.prefix_bytes <= file.hashed and file.size > 0:
                return
            file.hashing = True
            file.users += 1
        self._queue.put(file)

    def _run(self) -> None:
        buffer = new_buffer()
        while True:
            file = self._queue.get()
            try:
                finished = self._hash_prefix(file, buffer)
            except Exception as error:
                if not isinstance(error, InstantStartError):
                    error = InstantStartError(f"{type(error).__name__}: {error}")
                self._report(HashFailed(file.number, error.code, error.message))
                finished = False
                with file.lock:
                    file.hasher = None
            if finished and file.hasher is not None:
                self._report(Hashed(file.number, file.hasher.hexdigest()))
                with file.lock:
                    file.hasher = None
            with file.lock:
                file.hashing = False
            file.leave()
            self.schedule(file)

    def _hash_prefix(self, file: FillFile, buffer: memoryview) -> bool:
        """Hash the new part of the prefix; True at the file's end. At most one thread per file."""
        hasher = file.hasher
        assert hasher is not None
        stop = file.hashed + HASH_TURN_BYTES
        while True:
            with file.lock:
                if file.closed:
                    return False
                available = file.present.prefix_bytes
            if available <= file.hashed:
                return file.hashed == file.size
            if file.hashed >= stop:
                return False
            while file.hashed < min(available, stop) and not file.closed:
                piece = ByteRange(file.hashed, min(file.hashed + len(buffer), available))
                part = buffer[: piece.length]
                file.blob.pread_into(piece.start, part)
                hasher.update(part)
                file.hashed = piece.stop
            if not file.keep_pages and file.hashed - file.dropped >= DROP_LAG + HASH_TURN_BYTES:
                file.blob.drop_pages(file.dropped, file.hashed - DROP_LAG)
                file.dropped = file.hashed - DROP_LAG
