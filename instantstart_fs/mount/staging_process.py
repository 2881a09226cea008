"""Runs the process that reads ahead (readahead.py): starts it, sends it jobs, starts it again. It decides no job."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket as stdlib_socket
import subprocess
from collections.abc import Callable

import trio

from instantstart_fs.core.retry import Backoff
from instantstart_fs.ipc.children import spawn_module
from instantstart_fs.ipc.supervised import reap, send_packet
from instantstart_fs.mount import readahead

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 3.0
"""Seconds for the process to end by itself before it is killed."""


class StagingProcess:
    """``readahead.py`` in a process: started with ``run``, started again when it ends before us."""

    def __init__(self, threads: int, report: Callable[[int, int, int], None]) -> None:
        self._threads = threads
        self._report = report
        self._jobs: set[int] = set()
        self._outbox: trio.MemorySendChannel[tuple[bytes, int]] | None = None
        self._backoff = Backoff(base=0.1, cap=30.0)

    def stage(self, job: int, fd: int, length: int) -> None:
        self._jobs.add(job)
        if self._outbox is None:
            os.close(fd)
            self._lose(job)
            return
        self._outbox.send_nowait((readahead.PACKET.pack(readahead.STAGE, job, length), fd))

    def drop(self, job: int) -> None:
        if self._outbox is not None:
            self._outbox.send_nowait((readahead.PACKET.pack(readahead.DROP, job, 0), -1))

    def _lose(self, job: int) -> None:
        self._jobs.discard(job)
        self._report(readahead.DONE, job, 0)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep it running until cancelled; then end it. A daemon without it serves all the same."""
        failures = 0
        while True:
            began = trio.current_time()
            try:
                await self._serve_one(task_status if failures == 0 else trio.TASK_STATUS_IGNORED)
                log.warning("the staging process ended; another one takes over")
            except OSError as error:
                log.error("the staging process cannot be started: %s", error)
                if failures == 0:
                    task_status.started()
            failures = failures + 1 if trio.current_time() - began < 30.0 else 1
            await trio.sleep(self._backoff.delay(failures, 0.5))

    async def _serve_one(self, task_status: trio.TaskStatus[None]) -> None:
        ours, theirs = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_SEQPACKET)
        try:
            with theirs:
                process = await trio.to_thread.run_sync(self._popen, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        connection = trio.socket.from_stdlib_socket(ours)
        send, receive = trio.open_memory_channel[tuple[bytes, int]](math.inf)
        self._outbox = send
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, connection, receive)
                task_status.started()
                await self._read(connection)
                nursery.cancel_scope.cancel()
        finally:
            self._outbox = None
            connection.close()  # it leaves on EOF
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    _, fd = receive.receive_nowait()
                    if fd >= 0:
                        os.close(fd)
            for job in list(self._jobs):
                self._lose(job)
            with trio.CancelScope(shield=True):
                await reap(process, "staging process", GOODBYE_SECONDS)

    def _popen(self, fd: int) -> subprocess.Popen[bytes]:
        return spawn_module(
            "instantstart_fs.mount.readahead", str(fd), str(self._threads), pass_fds=(fd,), process_group=0
        )

    async def _read(self, connection: trio.socket.SocketType) -> None:
        while True:
            try:
                packet = await connection.recv(readahead.PACKET.size)
            except OSError:
                return
            if not packet:
                return
            kind, job, count = readahead.PACKET.unpack(packet)
            if kind == readahead.DONE:
                self._jobs.discard(job)
            self._report(kind, job, count)

    async def _write(
        self, connection: trio.socket.SocketType, outbox: trio.MemoryReceiveChannel[tuple[bytes, int]]
    ) -> None:
        async for packet, fd in outbox:
            try:
                await send_packet(connection, packet, [fd] if fd >= 0 else [])
            except OSError:
                return  # it is dying: the reader sees the end
            finally:
                if fd >= 0:
                    os.close(fd)
