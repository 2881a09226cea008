"""The pool of fetch processes: spawns, watches and replaces them, and passes messages both ways. It knows nothing about
files or chunks.

It owns the sockets, the lock descriptors given to workers and the shared pause page. Reports go to ``on_report``, a
death to ``on_death``, both on the trio thread; their owner gives the work of a dead worker to another.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import socket as stdlib_socket
import subprocess
import sys
from collections.abc import Callable

import msgspec
import trio

from instantstart_fs.core.retry import Backoff
from instantstart_fs.errors import FetchWorkersFailed, InstantStartError
from instantstart_fs.filler.messages import (
    FULL_PACKET,
    MOST_DESCRIPTORS,
    PAUSE,
    PAUSE_SIZE,
    Order,
    Ping,
    Ready,
    Report,
    WorkerSettings,
    decode_reports,
    encode,
    packet,
)
from instantstart_fs.ipc.children import spawn_module
from instantstart_fs.ipc.supervised import reap, send_packet
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.os_errors import translated

log = logging.getLogger(__name__)

WORKER = "instantstart_fs.filler.worker"
PING_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""A worker that answers no ping for this long is killed. Long, since pwrite may wait for a disk for tens of seconds."""
READY_SECONDS = 30.0
GOODBYE_SECONDS = 3.0
START_SECONDS = 100.0
"""Seconds for the first worker to be ready. One that hangs is killed after READY_SECONDS, and another one tries: a
machine that is merely slow has three tries. Less than the unit's TimeoutStartSec, so that it is said what was wrong."""
START_DEATHS = 8
"""In a row of each place, without any worker that was ever ready: after about 10 s it is no want of the moment."""
MAX_REPORT = 64 * 1024


class Worker:
    """A running fetch process. ``files``: the file numbers it has open; ``in_flight``: its running fetches."""

    def __init__(self, process: subprocess.Popen[bytes], connection: trio.socket.SocketType) -> None:
        self.process = process
        self.connection = connection
        self.files: set[int] = set()
        self.in_flight = 0
        self.alive = False
        self.last_heard = trio.current_time()
        self._next: tuple[bytes, int] | None = None
        """Taken out of the outbox already, for the next packet."""
        self._outbox_send, self.outbox = trio.open_memory_channel[tuple[bytes, int]](math.inf)

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, order: Order, fd: int | None = None) -> None:
        """Queue an order, with a copy of ``fd``. Never waits; it is lost if the worker dies.

        Raises:
            OutOfResources: The daemon is out of descriptors; nothing is queued.
        """
        with translated("hand a file to a fetch worker"):
            copy = os.dup(fd) if fd is not None else -1
        self._outbox_send.send_nowait((encode(order), copy))

    async def next_packet(self) -> tuple[list[bytes], list[int]]:
        """Wait for orders; as many as fit in one packet, and their descriptors. A larger one goes alone."""
        orders: list[bytes] = []
        fds: list[int] = []
        size = 0
        while True:
            try:
                order, fd = self._next or (self.outbox.receive_nowait() if orders else await self.outbox.receive())
            except trio.WouldBlock:
                return orders, fds
            self._next = None
            size += len(order)
            if orders and (size > FULL_PACKET or len(fds) == MOST_DESCRIPTORS):
                self._next = order, fd
                return orders, fds
            orders.append(order)
            if fd >= 0:
                fds.append(fd)

    def kill(self) -> None:
        """Kill the process; its socket then ends."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def drop_outbox(self) -> None:
        """Close the descriptors of orders that were not sent."""
        if self._next is not None and self._next[1] >= 0:
            os.close(self._next[1])
        self._next = None
        while True:
            try:
                _, fd = self.outbox.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                return
            if fd >= 0:
                os.close(fd)


class WorkerPool:
    """``count`` fetch processes of one store. ``on_report``, ``on_death``: see above."""

    def __init__(
        self,
        store: BlobStore,
        count: int,
        settings: WorkerSettings,
        on_report: Callable[[Worker, Report], None],
        on_death: Callable[[Worker], None],
    ) -> None:
        self._store = store
        self._count = max(count, 1)
        self._settings = settings
        self._on_report = on_report
        self._on_death = on_death
        self._backoff = Backoff(base=0.1, cap=10.0)
        self.workers: list[Worker] = []
        self.deaths = 0
        self._last_end = "none has ended"
        self._ever_ready = False
        self._decided = trio.Event()
        """A worker is ready, or too many have died before one was."""
        self._arrival = trio.Event()
        self._pause_fd = os.memfd_create("instantstart-pause", os.MFD_CLOEXEC)
        os.ftruncate(self._pause_fd, PAUSE_SIZE)
        self._pause = mmap.mmap(self._pause_fd, PAUSE_SIZE)

    async def run(self, *, needed: bool = True, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the workers running until cancelled; then end them. ``started`` when the first one is ready.

        Raises FetchWorkersFailed when none gets ready. Not ``needed``: that is logged, and tried for ever.
        """
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._count):
                    nursery.start_soon(self._keep)
                with trio.move_on_after(START_SECONDS):
                    await self._decided.wait()
                if not self._ever_ready:
                    error = FetchWorkersFailed(self._why_none())
                    if needed:
                        raise error
                    log.error("%s; what is cached is served, the rest waits", error.message)
                task_status.started()
        finally:
            self._pause.close()
            os.close(self._pause_fd)

    def choose(self) -> Worker | None:
        """The least loaded worker; None while none is ready."""
        return min(self.workers, key=lambda worker: (worker.in_flight, len(worker.files)), default=None)

    async def wait_worker(self) -> Worker:
        """Wait for a worker and ``choose`` one. It may wait for ever while none can be started: give it a deadline."""
        while True:
            worker = self.choose()
            if worker is not None:
                return worker
            await self._arrival.wait()

    def pause_background_until(self, moment: float) -> None:
        """Let background fetches leave their sockets unread until that time.monotonic()."""
        PAUSE.pack_into(self._pause, 0, moment)

    # -- inside --------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        failures = 0
        while True:
            started = trio.current_time()
            try:
                await self._serve_one()
            except (OSError, InstantStartError) as error:
                log.error("a fetch worker cannot be started: %s", error)
                self._last_end = f"the last one could not be started: {error}"
            self.deaths += 1
            if self.deaths >= START_DEATHS * self._count:
                self._decided.set()
            failures = failures + 1 if trio.current_time() - started < 10.0 else 1
            await trio.sleep(self._backoff.delay(failures, 0.5))

    async def _serve_one(self) -> None:
        worker = await self._spawn()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, worker)
                nursery.start_soon(self._watch, worker)
                await self._read(worker)
                nursery.cancel_scope.cancel()
        finally:
            known = worker.alive
            worker.alive = False
            if worker in self.workers:
                self.workers.remove(worker)
            worker.connection.close()  # the worker leaves on EOF
            worker.drop_outbox()
            with trio.CancelScope(shield=True):
                await reap(worker.process, "fetch worker", GOODBYE_SECONDS)
            if known:
                self._on_death(worker)
        self._last_end = f"the last one with status {worker.process.returncode}"
        log.warning(
            "the fetch worker %d ended (status %s); another one takes over", worker.pid, worker.process.returncode
        )

    def _why_none(self) -> str:
        probe = f"{sys.executable} -c 'import {WORKER}'"
        if not self.deaths:
            return f"no fetch worker was ready within {START_SECONDS:g} s: is this machine overloaded? Try `{probe}`"
        return (
            f"no fetch worker starts: {self.deaths} have ended before they were ready, {self._last_end}; the log has "
            f"what they said. Try `{probe}`: if that fails, install instantstart-fs again"
        )

    async def _spawn(self) -> Worker:
        ours, theirs = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET)
        try:
            # Space for the bitmap of any file, and for many small orders at once.
            ours.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, 4 * 1024 * 1024)
            with theirs:
                lock_fd = await trio.to_thread.run_sync(self._store.worker_lock_fd)
                try:
                    with trio.CancelScope(shield=True):
                        process = await trio.to_thread.run_sync(self._popen, theirs.fileno(), lock_fd)
                finally:
                    os.close(lock_fd)
            return Worker(process, trio.socket.from_stdlib_socket(ours))
        except BaseException:
            ours.close()
            raise

    def _popen(self, socket_fd: int, lock_fd: int) -> subprocess.Popen[bytes]:
        return spawn_module(
            WORKER,
            str(socket_fd),
            str(lock_fd),
            str(self._pause_fd),
            msgspec.json.encode(self._settings).decode(),
            pass_fds=(socket_fd, lock_fd, self._pause_fd),
            defaults={"MALLOC_ARENA_MAX": "2"},
            process_group=0,
        )

    async def _read(self, worker: Worker) -> None:
        while True:
            try:
                received = await worker.connection.recv(MAX_REPORT)
            except OSError:
                return
            if not received:
                return
            worker.last_heard = trio.current_time()
            try:
                reports = decode_reports(received)
            except msgspec.MsgspecError as error:
                log.error("the fetch worker %d reports what cannot be read (%s); it is killed", worker.pid, error)
                worker.kill()
                return
            for report in reports:
                if isinstance(report, Ready):
                    worker.alive = self._ever_ready = True
                    self._decided.set()
                    self.workers.append(worker)
                    arrival, self._arrival = self._arrival, trio.Event()
                    arrival.set()
                else:
                    self._on_report(worker, report)

    async def _write(self, worker: Worker) -> None:
        while True:
            orders, fds = await worker.next_packet()
            try:
                await send_packet(worker.connection, packet(orders), fds)
            except OSError:
                return  # it is dying: the reader sees the end
            finally:
                for fd in fds:
                    os.close(fd)

    async def _watch(self, worker: Worker) -> None:
        number = 0
        while True:
            await trio.sleep(PING_SECONDS)
            limit = SILENCE_SECONDS if worker.alive else READY_SECONDS
            if trio.current_time() - worker.last_heard > limit:
                log.error("the fetch worker %d does not answer; it is killed", worker.pid)
                worker.kill()
                return
            number += 1
            worker.send(Ping(number))
