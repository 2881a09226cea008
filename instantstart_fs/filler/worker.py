"""The fetch process: ``python -m instantstart_fs.filler.worker SOCKET_FD LOCK_FD PAUSE_FD SETTINGS``. It carries out
orders and decides nothing: a failed fetch is reported and forgotten. Spawned by filler/pool.py, never forked from the
daemon's threads. It holds the store's workers lock (``LOCK_FD``) for its whole life and ends with its socket: on EOF it
calls ``os._exit`` at once, whatever its threads wait for (PR_SET_PDEATHSIG is of no use: it follows a thread). It
ignores SIGINT, which the daemon handles.

One thread reads orders; each running fetch has a thread, reused, with one buffer; a few threads hash
(filler/hash_threads.py). Nothing here imports trio, and awscrt only where a digest needs it (a worker stays
under 120 MiB).
"""

from __future__ import annotations

import contextlib
import importlib
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
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.errors import InstantStartError, OriginMisbehaved, OutOfResources
from instantstart_fs.filler.fetch import Abandoned, Fetcher, new_buffer
from instantstart_fs.filler.fillfile import CameOtherwise, FetchSink, FillFile, WaitsForStream
from instantstart_fs.filler.hash_threads import HashThreads
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
    OpenFile,
    Order,
    Piece,
    Ping,
    Pong,
    Ready,
    Report,
    SetLocation,
    Stop,
    Urge,
    Waits,
    WorkerSettings,
    decode_orders,
    encode,
    packet,
)
from instantstart_fs.ipc import fd_passing
from instantstart_fs.system.threads import start_thread

IDLE_THREAD_SECONDS = 20.0
"""An idle fetching thread gives its buffer back after this."""
PAUSE_STEP = 0.002
LEAST_WRITING = 1024 * 1024
"""Bytes for which writing to the disk is begun before the group commit asks for it."""


class Worker:
    """The process: its socket, its files and its fetching threads."""

    def __init__(self, connection: socket.socket, pause: mmap.mmap, settings: WorkerSettings) -> None:
        self._connection = connection
        self._pause = pause
        self._settings = settings
        self._fetcher = Fetcher(settings)
        self._files: dict[int, FillFile] = {}
        self._ignoring: set[str] = set()
        """Hosts that ignored ranges."""
        self._reporting = threading.Lock()
        self._reports: list[bytes] = []
        self._sends = False
        """Whether a thread is sending reports: it also sends those that other threads add."""
        self._fetches: queue.SimpleQueue[tuple[FillFile, Fetch, FetchSink]] = queue.SimpleQueue()
        self._running: dict[int, FetchSink] = {}
        """By request, including those that wait for a thread."""
        self._idle = 0
        """Threads that wait for a fetch, minus fetches whose thread could not be started."""
        self._threads = 0
        self._idle_lock = threading.Lock()
        self._hashing = HashThreads(self.report)

    def start(self) -> None:
        """Start the threads that it cannot do without. Raises OutOfResources where a limit of pids allows none."""
        self._hashing.start(self._settings.hash_threads)
        # One thread from the start: under a pid limit none may be available later.
        start_thread(self._fetch_forever)
        self._idle = self._threads = 1

    def run(self) -> None:
        """Carry out orders until the daemon closes the socket."""
        self.report(Ready(os.getpid()))
        self._prepare()
        while True:
            received, descriptors, flags = fd_passing.receive(self._connection, MAX_MESSAGE, MOST_DESCRIPTORS)
            if not received:
                return
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise RuntimeError("an order was cut short")
            numbers = iter(descriptors)
            for order in decode_orders(received):
                self._obey(order, numbers)

    def _prepare(self) -> None:
        """Import what the first fetch would. A daemon waits for the first worker to be ready, so not before it is.
        What cannot be imported is said by the fetches that need it."""
        names = ["encodings.idna"]  # by each first look at a host's name
        if self._settings.region:
            names += ["instantstart_fs.filler.pieces", "instantstart_fs.regional.keys"]
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    def _obey(self, what: Order, descriptors: Iterator[int]) -> None:
        match what:
            case OpenFile() as order:
                file = self._files[order.file] = FillFile(order, next(descriptors))
                self._hashing.schedule(file)
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
                    self._files[order.file].note_unreported(order.chunk)
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
        """Send ``message``. While one thread sends, messages of others go into its next packet."""
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

    def wait_pause(self, work: FetchSink) -> None:
        """Leave the socket unread while a demand has the bandwidth, at most ``pause_limit`` seconds at a time."""
        started = time.monotonic()
        until = min(PAUSE.unpack_from(self._pause)[0], started + self._settings.pause_limit)
        while time.monotonic() < until and not work.demand:
            if work.over:
                raise Abandoned
            time.sleep(PAUSE_STEP)
            until = min(PAUSE.unpack_from(self._pause)[0], started + self._settings.pause_limit)

    def chunk_written(self, file: FillFile) -> None:
        """Hash on, if the chunk continues the prefix."""
        self._hashing.schedule(file)

    def ignores_ranges(self, host: str) -> None:
        """Remember that ``host`` answered a range request with the whole file."""
        self._ignoring.add(host)

    # -- fetching ------------------------------------------------------------------------------------------------

    def _start(self, file: FillFile, order: Fetch) -> None:
        with self._idle_lock:
            if self._idle > 0:
                self._idle -= 1
                spawn = False
            else:
                spawn = True
        work = self._running[order.request] = FetchSink(self, file, order)
        self._fetches.put((file, order, work))
        if not spawn:
            return
        try:
            start_thread(self._fetch_forever)
        except OutOfResources:  # the next thread that is free takes it
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
                # A fetch was just assigned to this thread, or it is the last thread.
                file, order, work = self._fetches.get()
                buffer = new_buffer()

    def _fetch(self, file: FillFile, order: Fetch, work: FetchSink, buffer: memoryview) -> None:
        try:
            file.enter()
        except Abandoned:
            return
        try:
            if file.take_unreported(order.chunk):
                self.report(Arrived(order.request))
                return
            if order.piece is not None:
                self._fetch_piece(file, order, order.piece, work, buffer)
                return
            location = file.location
            if location is None:
                raise OriginMisbehaved("no location is known")
            work.host = urlsplit(location.url).netloc
            with file.lock:
                if file.streamer is not None:
                    raise WaitsForStream
                if work.host in self._ignoring:  # it ignored ranges before: not every chunk needs to find out
                    file.streamer = work
            wanted = file.present.byte_range(order.chunk)
            with file.writing() as blob:
                blob.reserve(wanted)
            try:
                answered = self._fetcher.fetch(location, wanted, file.size, buffer, work)
                if file.streamer is work and not work.took_whole:
                    self._ignoring.discard(work.host)  # it honours ranges now
            finally:
                if file.streamer is work:
                    file.streamer = None
            with file.lock:
                if file.closed or work.stopped:
                    raise Abandoned
                file.present.add(order.chunk)
            self.report(Arrived(order.request, answered))
            self._go_on(file, wanted)
        except Abandoned:
            pass
        except CameOtherwise:
            self.report(Arrived(order.request))
        except WaitsForStream:
            self.report(Waits(order.request))
        except InstantStartError as error:
            if work.stopped:
                return
            silent = time.monotonic() - work.last_byte
            self.report(Failed(order.request, error.code, error.message, error.retry_after, silent, error.fault))
        except Exception as error:  # a bug in one fetch must not end the others
            unforeseen = OriginMisbehaved(f"the fetch failed: {type(error).__name__}: {error}")
            self.report(Failed(order.request, unforeseen.code, unforeseen.message))
        finally:
            file.disown(work)
            file.leave()

    def _fetch_piece(self, file: FillFile, order: Fetch, piece: Piece, work: FetchSink, buffer: memoryview) -> None:
        from instantstart_fs.filler.pieces import fetch_piece  # late: only a region needs it

        wanted = file.present.byte_range(order.chunk)
        with file.writing() as blob:
            blob.reserve(wanted)
        digest, answered = fetch_piece(self._fetcher, piece, wanted, buffer, work)
        with file.lock:
            if file.closed or work.stopped:
                raise Abandoned
            file.present.add(order.chunk)
        self.report(Arrived(order.request, answered, digest))
        self._go_on(file, wanted)

    def _go_on(self, file: FillFile, came: ByteRange) -> None:
        """Hash on, and let the disk begin with what came: the group commit then waits for little."""
        self._hashing.schedule(file)
        if came.length >= LEAST_WRITING:
            file.blob.start_writing(came)


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
        worker = Worker(connection, pause, settings)
        worker.start()
        worker.run()
    except ConnectionError:
        pass
    except OutOfResources as error:  # the daemon tries again, later and later
        print(f"fetch worker: {error.message}", file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Not sys.exit, which waits for threads that are in recv.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
