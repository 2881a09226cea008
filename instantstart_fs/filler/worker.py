"""The fetch process: ``python -m instantstart_fs.filler.worker SOCKET_FD LOCK_FD PAUSE_FD SETTINGS``.

Spawned by filler/pool.py, never forked from the daemon's threads; it holds the store's workers lock (``LOCK_FD``) for
as long as it lives, and ends with its socket: on EOF it leaves by ``os._exit`` at once, whatever its threads wait for
(there is no PDEATHSIG: that follows a thread). SIGINT is the daemon's affair.

One thread reads orders; a thread per running fetch, reused, each with one buffer; a few hashing threads follow the
contiguous prefix of each file behind its write head, out of the page cache. It decides nothing: a failed fetch is
reported and forgotten. Nothing here imports trio, and awscrt only where a digest needs it (a worker stays under
120 MiB).
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from instantstart_fs.config.descriptors import raise_file_limit
from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.errors import InstantStartError, OriginMisbehaved
from instantstart_fs.filler.fetch import Abandoned, Fetcher, new_buffer
from instantstart_fs.filler.messages import (
    FULL_PACKET,
    MAX_MESSAGE,
    MOST_DESCRIPTORS,
    PAUSE,
    PAUSE_SIZE,
    Arrived,
    Closed,
    CloseFile,
    Failed,
    Fetch,
    Hashed,
    HashFailed,
    OpenFile,
    Order,
    Ping,
    Pong,
    Progress,
    Ready,
    Report,
    SetLocation,
    Stop,
    Streamed,
    Urge,
    Waits,
    WorkerSettings,
    decode_orders,
    encode,
    packet,
)
from instantstart_fs.origins.base import Location
from instantstart_fs.store.blobfile import BlobFile

IDLE_THREAD_SECONDS = 20.0
"""An idle fetching thread gives its buffer back after this."""
PROGRESS_SECONDS = 1.0
PAUSE_STEP = 0.002
HASH_TURN_BYTES = 64 * 1024 * 1024
"""After so much, a file goes to the back of the queue, so that small files are not held up behind a large one."""

DROP_LAG = 512 * 1024 * 1024
"""Pages of a file that nobody reads are dropped so far behind its hashing: by then a group commit (every 256 MiB) has
written them, and only clean pages can be dropped. What is left goes when the file is sealed."""


class _File:
    """A file being filled. ``lock`` guards every field below it; ``idle`` is set while no thread writes into it."""

    def __init__(self, order: OpenFile, fd: int) -> None:
        self.number = order.file
        self.digest = order.digest
        self.size = order.size
        self.blob = BlobFile(fd, order.size, order.name, writable=True, created=False, sync_entry=_nothing)
        self.present = ChunkMap(order.size, order.chunk_size, order.present)
        self.location: Location | None = None
        self.lock = threading.Condition()
        self.closed = False
        self.users = 0
        """Threads that use the descriptor: fetches and a hashing pass."""
        self.writers = 0
        self.streamer: _Work | None = None
        """The request that takes all of the file, from a server that ignores ranges."""
        self.hashing = False
        self.hashed = 0
        self.keep_pages = True
        self._kept: set[int] = set()
        self.dropped = 0
        """Offset up to which pages were dropped, by the hashing thread."""
        self.hasher = new_hasher(order.digest, order.size) if order.digest is not None else None

    def enter(self) -> None:
        with self.lock:
            if self.closed:
                raise Abandoned
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.closed and not self.users:
                self.blob.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[BlobFile]:
        """Nobody is told that the file is closed meanwhile. Raises Abandoned when it is."""
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

    def keep(self, chunk: int) -> None:
        """A fetch of it was stopped: if it had just come it may be hashed, and must not be written again."""
        with self.lock:
            if chunk in self.present:
                self._kept.add(chunk)

    def kept(self, chunk: int) -> bool:
        """Whether it is here although its arrival was not heard of."""
        with self.lock:
            if chunk not in self._kept:
                return False
            self._kept.discard(chunk)
            return True

    def close(self) -> None:
        """Returns when nobody writes any more and the file is let go, so that unlinking it frees its space."""
        with self.lock:
            self.closed = True
            while self.writers:
                self.lock.wait()
            if not self.users:
                self.blob.close()
            else:
                # A thread may be stuck in recv for the whole time-out: it keeps a number, not the file.
                nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                os.dup2(nothing, self.blob.fd, inheritable=False)
                os.close(nothing)


class _Waits(Exception):
    """Another request takes the whole file: nothing is to be fetched for this one."""


class _Work:
    """One fetch: the Sink that its bytes go through."""

    def __init__(self, worker: Worker, file: _File, order: Fetch) -> None:
        self._worker = worker
        self._file = file
        self._order = order
        self.host = ""
        self.took_whole = False
        self.demand = order.demand
        self.thread: int | None = None
        """Which one fetches it, as long as one does."""
        self.stopped = False
        self._writing = False
        self.last_byte = time.monotonic()
        self._reported = self.last_byte
        self._count = 0

    def stop(self) -> None:
        """Returns when nothing of it is written any more."""
        with self._file.lock:
            self.stopped = True
            while self._writing:
                self._file.lock.wait()

    @property
    def over(self) -> bool:
        return self._file.closed or self.stopped

    def before_read(self) -> None:
        if self.over:
            raise Abandoned
        if not self.demand:
            self._worker.wait_pause(self)
            self.last_byte = time.monotonic()

    def write(self, data: memoryview, offset: int) -> None:
        with self._file.writing() as blob:
            with self._file.lock:
                if self.stopped:
                    raise Abandoned
                self._writing = True
            try:
                blob.pwrite(offset, data)
            finally:
                with self._file.lock:
                    self._writing = False
                    self._file.lock.notify_all()

    def progress(self, count: int) -> None:
        self.last_byte = now = time.monotonic()
        self._count += count
        if now - self._reported >= PROGRESS_SECONDS:
            self._worker.report(Progress(self._order.request, self._count))
            self._reported, self._count = now, 0

    def take_whole(self) -> _Whole:
        """The first request of the file that learns of it takes it; the others wait, which costs no connection."""
        with self._file.lock:
            if self._file.closed:
                raise Abandoned
            if self._file.streamer not in (None, self) or self._order.chunk in self._file.present:
                raise _Waits  # a stream that has ended since brought it: it is asked for again, and is there
            self._file.streamer = self
        self.took_whole = True
        self._worker.whole.add(self.host)
        return _Whole(self._worker, self._file, self._order, self)


class _Whole:
    """The Sink of a whole file from a server that ignores ranges: each chunk that is not here yet is kept."""

    def __init__(self, worker: Worker, file: _File, order: Fetch, work: _Work) -> None:
        self._worker = worker
        self._file = file
        self._order = order
        self.before_read = work.before_read
        self.progress = work.progress

    def write(self, data: memoryview, offset: int) -> None:
        file, present = self._file, self._file.present
        while data:
            chunk = offset // present.chunk_size
            place = present.byte_range(chunk)
            piece = data[: place.stop - offset]
            with file.writing() as blob:
                if chunk not in present:
                    if offset == place.start:
                        blob.reserve(place)
                    blob.pwrite(offset, piece)
            data, offset = data[len(piece) :], offset + len(piece)
            if offset == place.stop:
                self._whole_chunk(chunk)

    def _whole_chunk(self, chunk: int) -> None:
        file = self._file
        with file.lock:
            if file.closed:
                raise Abandoned
            fresh = chunk not in file.present
            file.present.add(chunk)
        if fresh:
            self._worker.report(Streamed(self._order.request, chunk))
            self._worker.schedule_hash(file)

    def take_whole(self) -> None:
        return None


class Worker:
    def __init__(self, connection: socket.socket, pause: mmap.mmap, settings: WorkerSettings) -> None:
        self._connection = connection
        self._pause = pause
        self._settings = settings
        self._fetcher = Fetcher(settings)
        self._files: dict[int, _File] = {}
        self.whole: set[str] = set()
        """Hosts that ignored ranges."""
        self._reporting = threading.Lock()
        self._reports: list[bytes] = []
        self._sends = False
        """Whether a thread is sending reports: it takes those of the others along."""
        self._fetches: queue.SimpleQueue[tuple[_File, Fetch, _Work]] = queue.SimpleQueue()
        self._running: dict[int, _Work] = {}
        """By request; those too that wait for their thread."""
        self._idle = 0
        """Threads that wait for a fetch, less the fetches that wait for a thread that could not be started."""
        self._threads = 0
        self._idle_lock = threading.Lock()
        self._to_hash: queue.SimpleQueue[_File] = queue.SimpleQueue()

    def run(self) -> None:
        """Read orders until the daemon is gone."""
        for _ in range(self._settings.hash_threads):
            threading.Thread(target=self._hash_forever, daemon=True).start()
        # One that stays: under a limit of pids there may be no other when it is wanted.
        threading.Thread(target=self._fetch_forever, daemon=True).start()
        self._idle = self._threads = 1
        self.report(Ready(os.getpid()))
        descriptor_space = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
        while True:
            received, ancillary, flags, _ = self._connection.recvmsg(
                MAX_MESSAGE, descriptor_space, socket.MSG_CMSG_CLOEXEC
            )
            if not received:
                return
            descriptors = array.array("i")
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise RuntimeError("an order was cut short")
            numbers = iter(descriptors)
            for order in decode_orders(received):
                self._obey(order, numbers)

    def _obey(self, what: Order, descriptors: Iterator[int]) -> None:
        match what:
            case OpenFile() as order:
                file = self._files[order.file] = _File(order, next(descriptors))
                self.schedule_hash(file)
            case SetLocation(file=number, location=location):
                if number in self._files:
                    self._files[number].location = location
            case Fetch() as order:
                if order.file in self._files:
                    self._files[order.file].keep_pages = order.keep_pages
                self._start(self._files[order.file], order)
            case Stop(request=number) as order:
                work = self._running.get(number)
                if work is not None:
                    work.stop()
                    if work.thread is not None:
                        self._fetcher.interrupt(work.thread)
                if order.file in self._files:
                    self._files[order.file].keep(order.chunk)
            case Urge(request=number):
                work = self._running.get(number)
                if work is not None:
                    work.demand = True
            case CloseFile(file=number):
                closing = self._files.pop(number, None)
                if closing is not None:
                    closing.close()
                self.report(Closed(number))
            case Ping(number=number):
                self.report(Pong(number))

    def report(self, message: Report) -> None:
        """What other threads report while one is sending goes with its next packet."""
        encoded = encode(message)
        with self._reporting:
            self._reports.append(encoded)
            if self._sends:
                return
            self._sends = True
        while True:
            with self._reporting:
                if not self._reports:
                    self._sends = False
                    return
                count, size = 0, 0
                while count < len(self._reports) and size < FULL_PACKET:
                    size += len(self._reports[count])
                    count += 1
                going, self._reports = self._reports[:count], self._reports[count:]
            try:
                self._connection.send(packet(going))
            except OSError:
                os._exit(0)  # the daemon is gone

    def wait_pause(self, work: _Work) -> None:
        """Leave the socket unread while a demand has the line, at most ``pause_limit`` seconds at a time."""
        started = time.monotonic()
        until = min(PAUSE.unpack_from(self._pause)[0], started + self._settings.pause_limit)
        while time.monotonic() < until and not work.demand:
            if work.over:
                raise Abandoned
            time.sleep(PAUSE_STEP)
            until = min(PAUSE.unpack_from(self._pause)[0], started + self._settings.pause_limit)

    # -- fetching ------------------------------------------------------------------------------------------------

    def _start(self, file: _File, order: Fetch) -> None:
        with self._idle_lock:
            if self._idle > 0:
                self._idle -= 1
                spawn = False
            else:
                spawn = True
        work = self._running[order.request] = _Work(self, file, order)
        self._fetches.put((file, order, work))
        if not spawn:
            return
        try:
            threading.Thread(target=self._fetch_forever, daemon=True).start()
        except RuntimeError:  # a limit of pids: whoever of the others is through first takes it
            with self._idle_lock:
                self._idle -= 1
            return
        with self._idle_lock:
            self._threads += 1

    def _fetch_forever(self) -> None:
        file, order, work = self._fetches.get()
        buffer = new_buffer()
        while True:
            work.thread = threading.get_ident()
            try:
                self._fetch(file, order, work, buffer)
            finally:
                work.thread = None
                self._running.pop(order.request, None)
            del file, order, work
            with self._idle_lock:
                self._idle += 1
            try:
                file, order, work = self._fetches.get(timeout=IDLE_THREAD_SECONDS)
            except queue.Empty:
                with self._idle_lock:
                    if self._idle > 0 and self._threads > 1:
                        self._idle -= 1
                        self._threads -= 1
                        return
                del buffer
                file, order, work = self._fetches.get()  # just promised to somebody, or the last that is left
                buffer = new_buffer()

    def _fetch(self, file: _File, order: Fetch, work: _Work, buffer: memoryview) -> None:
        try:
            file.enter()
        except Abandoned:
            return
        try:
            if file.kept(order.chunk):
                self.report(Arrived(order.request))
                return
            location = file.location
            if location is None:
                raise OriginMisbehaved("no location is known")
            work.host = urlsplit(location.url).netloc
            with file.lock:
                if file.streamer is not None:
                    raise _Waits
                if work.host in self.whole:  # it ignored ranges before: not each chunk has to learn of that
                    file.streamer = work
            wanted = file.present.byte_range(order.chunk)
            with file.writing() as blob:
                blob.reserve(wanted)
            try:
                answered = self._fetcher.fetch(location, wanted, file.size, buffer, work)
                if file.streamer is work and not work.took_whole:
                    self.whole.discard(work.host)  # it has changed its mind
            finally:
                if file.streamer is work:
                    file.streamer = None
            with file.lock:
                if file.closed or work.stopped:
                    raise Abandoned
                file.present.add(order.chunk)
            self.report(Arrived(order.request, answered))
            self.schedule_hash(file)
        except Abandoned:
            pass
        except _Waits:
            self.report(Waits(order.request))
        except InstantStartError as error:
            if work.stopped:
                return
            silent = time.monotonic() - work.last_byte
            self.report(Failed(order.request, error.code, error.message, error.retry_after, silent, error.fault))
        except Exception as error:  # a fault of ours in one fetch must not end the others
            unforeseen = OriginMisbehaved(f"the fetch failed: {type(error).__name__}: {error}")
            self.report(Failed(order.request, unforeseen.code, unforeseen.message))
        finally:
            file.leave()

    # -- hashing -------------------------------------------------------------------------------------------------

    def schedule_hash(self, file: _File) -> None:
        """Hash on, if there is something in order and nobody is at it."""
        with file.lock:
            if file.hasher is None or file.closed or file.hashing:
                return
            if file.present.prefix_bytes <= file.hashed and file.size > 0:
                return
            file.hashing = True
            file.users += 1
        self._to_hash.put(file)

    def _hash_forever(self) -> None:
        buffer = new_buffer()
        while True:
            file = self._to_hash.get()
            try:
                finished = self._hash_on(file, buffer)
            except InstantStartError as error:
                self.report(HashFailed(file.number, error.code, error.message))
                finished = False
                with file.lock:
                    file.hasher = None
            except Exception as error:
                self.report(HashFailed(file.number, InstantStartError.code, f"{type(error).__name__}: {error}"))
                finished = False
                with file.lock:
                    file.hasher = None
            if finished and file.hasher is not None:
                self.report(Hashed(file.number, file.hasher.hexdigest()))
                with file.lock:
                    file.hasher = None
            with file.lock:
                file.hashing = False
            file.leave()
            self.schedule_hash(file)

    def _hash_on(self, file: _File, buffer: memoryview) -> bool:
        """Hash what lies in order; True if that was the file's end. Only one thread at a time per file."""
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


def _nothing() -> None:
    """Directory entries are the daemon's to make durable."""


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket_fd, lock_fd, pause_fd = (int(argument) for argument in arguments[:3])
    settings = msgspec.json.decode(arguments[3], type=WorkerSettings)
    for fd in (socket_fd, lock_fd, pause_fd):
        os.set_inheritable(fd, False)
    raise_file_limit()
    connection = socket.socket(fileno=socket_fd)
    pause = mmap.mmap(pause_fd, PAUSE_SIZE, prot=mmap.PROT_READ)
    try:
        Worker(connection, pause, settings).run()
    except ConnectionError:
        pass
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Not sys.exit: that would wait for threads that are stuck in recv.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
