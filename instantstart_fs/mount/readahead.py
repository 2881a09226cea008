"""The staging process: reads files into the page cache. ``python -m instantstart_fs.mount.readahead SOCKET_FD THREADS``

It calls readahead(2) and does nothing else: it never writes, opens nothing, and imports little but the standard
library, so that it starts in a moment. Spawned by mount/staging.py; a process of its own, so that its threads share no
interpreter lock with the daemon (docs/decisions/staging.md). It ends with its socket (there is no PDEATHSIG: that
follows a thread).

Packets on the SOCK_SEQPACKET socket, both ways, are ``PACKET``: a kind, a job's number, a count of bytes.

    STAGE   → with a descriptor (SCM_RIGHTS): read its first so many bytes ahead, after the jobs before it
    DROP    → forget that job; what is under way ends with its block
    STAGED  ← so many more bytes of it are in the page cache
    DONE    ← nothing more is done for that job; its descriptor is closed. Each job gets exactly one
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable

from instantstart_fs.ipc import fd_passing

PACKET = struct.Struct("<BQQ")
STAGE, DROP, STAGED, DONE = 1, 2, 3, 4

BLOCK = 8 * 1024 * 1024
"""Bytes that one thread has in flight. Four such blocks keep a fast disk busy, and an engine's own fault waits behind
32 MiB at most."""
REPORT_BYTES = 128 * 1024 * 1024
_LEAST_STEP = 128 * 1024

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.readahead.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_size_t)
_LIBC.readahead.restype = ctypes.c_ssize_t


class _Job:
    def __init__(self, number: int, fd: int, length: int) -> None:
        self.number = number
        self.fd = fd
        self.length = length
        self.next = 0
        """Offset of the first byte that no thread has taken."""
        self.users = 0
        self.dropped = False
        self.unreported = 0
        self.step = readahead_step(os.fstat(fd).st_dev)


class ReadAheadThreads:
    """Threads that work through jobs, one after the other, block by block. ``report``: (kind, job, bytes), from any
    thread. Raises OSError where not one thread can be started."""

    def __init__(self, threads: int, report: Callable[[int, int, int], None]) -> None:
        self._report = report
        self._jobs: collections.OrderedDict[int, _Job] = collections.OrderedDict()
        self._changed = threading.Condition()
        self._buffers = threading.local()
        for number in range(threads):
            try:
                threading.Thread(target=self._work, name=f"readahead-{number}", daemon=True).start()
            except RuntimeError:  # pids.max is reached: those that run do the work
                if not number:
                    raise OSError(errno.EAGAIN, "no thread can be started") from None
                break

    def stage(self, number: int, fd: int, length: int) -> None:
        """Takes ``fd`` over."""
        job = _Job(number, fd, length)
        with self._changed:
            self._jobs[number] = job
            self._changed.notify_all()

    def drop(self, number: int) -> None:
        with self._changed:
            job = self._jobs.get(number)
            if job is None:
                return
            job.dropped = True
            job.next = job.length
            if not job.users:
                self._end(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                job = self._next()
                while job is None:
                    self._changed.wait()
                    job = self._next()
                start = job.next
                job.next = stop = min(start + BLOCK, job.length)
                job.users += 1
            brought = 0
            with contextlib.suppress(OSError):  # a bad sector is the engine's to meet, not ours to hide or to tell
                brought = read_ahead(job.fd, start, stop, job.step)
            with self._changed:
                job.users -= 1
                job.unreported += brought
                if job.next >= job.length and not job.users:
                    self._end(job)
                elif job.unreported >= REPORT_BYTES:
                    self._report(STAGED, job.number, job.unreported)
                    job.unreported = 0

    def _next(self) -> _Job | None:
        return next((job for job in self._jobs.values() if job.next < job.length), None)

    def _end(self, job: _Job) -> None:
        del self._jobs[job.number]
        os.close(job.fd)
        if job.unreported:
            self._report(STAGED, job.number, job.unreported)
        self._report(DONE, job.number, 0)


def read_ahead(fd: int, start: int, stop: int, step: int) -> int:
    """Have the bytes read into the page cache and wait for the last of them; how many. Raises OSError.

    readahead(2) only queues; without the wait, four threads would queue a whole shard before the disk has begun, and
    the engine's own faults would wait behind it.
    """
    offset = start
    while offset < stop:
        count = min(step, stop - offset)
        if _LIBC.readahead(fd, offset, count) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        offset += count
    os.pread(fd, 1, stop - 1)
    return stop - start


def readahead_step(device: int) -> int:
    """The most bytes that one readahead(2) takes on that st_dev: the kernel cuts it, without a word, to the larger
    of the device's largest request and its read_ahead_kb (mm/readahead.c, force_page_cache_ra)."""
    found = _LEAST_STEP
    place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{place}/queue", f"{place}/../queue"):
        for name in ("max_sectors_kb", "read_ahead_kb"):
            with contextlib.suppress(OSError, ValueError), open(f"{queue}/{name}", encoding="ascii") as file:
                found = max(found, int(file.read()) * 1024)
    return min(found, BLOCK)


def serve(connection: socket.socket, threads: int) -> None:
    """Obey orders until the other end is closed."""

    def report(kind: int, number: int, count: int) -> None:
        try:
            connection.send(PACKET.pack(kind, number, count))
        except OSError:
            os._exit(0)

    pool = ReadAheadThreads(threads, report)
    while True:
        packet, descriptors, _ = fd_passing.receive(connection, PACKET.size, 1)
        if not packet:
            return
        kind, number, count = PACKET.unpack(packet)
        if kind == STAGE and descriptors:
            pool.stage(number, descriptors[0], count)
        elif kind == STAGE:
            report(DONE, number, 0)  # out of descriptors: staging is a favour
        elif kind == DROP:
            pool.drop(number)


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon's affair
    fd, threads = (int(argument) for argument in arguments)
    os.set_inheritable(fd, False)
    with contextlib.suppress(OSError):
        serve(socket.socket(fileno=fd), threads)
    os._exit(0)  # not sys.exit: that would wait for a thread that waits for the disk


if __name__ == "__main__":
    main(sys.argv[1:])
