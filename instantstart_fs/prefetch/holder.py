"""Holds a Stage's weights for engines, which take them file by file over a unix socket: the serving side.

Only the same user and root are answered (by SO_PEERCRED). An engine is one connection that takes. As many as there are
ranks are served, others are refused; one that goes away before anything was freed leaves its place to another. When all
files are freed the hold has served its purpose and ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from typing import Self

import msgspec

from instantstart_fs.config import unixsocket
from instantstart_fs.config.places import make_run_directory, run_directory
from instantstart_fs.config.unixsocket import peer_of
from instantstart_fs.errors import InstantStartError, PermissionRefused, PrefetchError
from instantstart_fs.prefetch.hold_protocol import (
    ANSWER_DEADLINE,
    BACKLOG,
    MAX_CONNECTIONS,
    MAX_REQUEST,
    SUFFIX,
    Answer,
    AskManifest,
    AskStatus,
    HeldDevice,
    HeldFile,
    HoldManifest,
    HoldStatus,
    LineReader,
    Ok,
    Refused,
    ReleaseAll,
    ReleaseFile,
    Take,
    Taken,
    requests,
    send_answer,
)
from instantstart_fs.prefetch.staged import Exported
from instantstart_fs.prefetch.stager import Stage

LOOK_INTERVAL = 1.0
"""Seconds between two looks at whether the hold has ended, while the end of an engine's process is waited for."""
SO_PEERPIDFD = 77
"""The socket option's number (socket(7)). Python has no name for it."""
RETURN_DEADLINE = 10.0
"""Seconds that engines get to close the memory of files that they are done with, before the hold ends without them."""


class Holder:
    """Serves ``stage`` on ``path`` from threads of its own; a context manager. ``limit``: seconds until it ends;
    ``ranks``: engines that take the weights before they are freed.

    Raises PrefetchError when another hold answers there, or the socket cannot be made."""

    def __init__(self, stage: Stage, path: str, limit: float | None = None, *, ranks: int = 1) -> None:
        self._stage = stage
        self._ranks = max(1, ranks)
        self._lock = threading.Lock()
        self._engines: set[socket.socket] = set()
        self._done_with: dict[str, set[socket.socket]] = {}
        self._freed: set[str] = set()
        self._lent: dict[socket.socket, list[Exported]] = {}
        """Device memory that an engine was given, which it counts down itself for as long as it lives."""
        self._closed = threading.Event()
        self._path = path
        self._ends_at = None if limit is None else time.monotonic() + limit
        self._released = threading.Event()
        self._all_freed = threading.Event()
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._listener = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="holder", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_released(self, timeout: float) -> bool:
        """Whether somebody ended the hold within ``timeout`` seconds."""
        return self._released.wait(timeout)

    @property
    def seconds_left(self) -> float | None:
        return None if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    @property
    def over(self) -> str:
        """Return how the hold ended; empty while it goes on."""
        if self._released.is_set():
            return "released"
        return "its time is up, released" if self.seconds_left == 0.0 else ""

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self._thread.join(5.0)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if not self._connections.acquire(blocking=False):
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="hold-client", daemon=True).start()
            except RuntimeError:  # a limit of pids: the client sees that it is gone, and may ask again
                connection.close()
                self._connections.release()

    def _serve(self, connection: socket.socket) -> None:
        process: int | None = None
        try:
            with connection, contextlib.suppress(OSError):
                process = process_of(connection)
                uid = peer_of(connection).uid
                if uid not in (0, os.geteuid()):
                    send_answer(
                        connection, Refused(PermissionRefused.code, f"uid {uid} may not take these weights"), None
                    )
                    return
                reader = LineReader(connection, MAX_REQUEST)
                while (line := reader.next()) is not None:
                    connection.settimeout(ANSWER_DEADLINE)
                    answer, fd = self._answer(line, connection)
                    try:
                        send_answer(connection, answer, fd)
                    finally:
                        if fd is not None:
                            os.close(fd)
                    if self._all_freed.is_set():
                        # After the answer. An engine may still refer to the last file, whose memory ends with the hold.
                        self._stage.wait_returned(RETURN_DEADLINE)
                        self._released.set()
                    connection.settimeout(None)
        finally:
            self._connections.release()
            with self._lock:
                if not self._freed:
                    self._engines.discard(connection)
                    for engines in self._done_with.values():
                        engines.discard(connection)
                lent = self._lent.pop(connection, [])
            if process is not None:
                self._take_back(process, lent)

    def _take_back(self, process: int, lent: list[Exported]) -> None:
        """Once the process has ended, count down what it was given. One that has closed its connection and lives may
        use that memory still, and counts down itself."""
        try:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            while lent and not self._closed.is_set():
                if poll.poll(LOOK_INTERVAL * 1000):
                    for exported in lent:
                        self._stage.abandoned(exported)
                    return
        finally:
            os.close(process)

    def _answer(self, line: bytes, asker: socket.socket) -> tuple[Answer, int | None]:
        try:
            match requests.decode(line):
                case AskStatus():
                    return self._status(), None
                case AskManifest():
                    return self._manifest(), None
                case Take(path, timeout):
                    self._admit(asker)
                    return self._take(path, timeout, asker)
                case ReleaseFile(path):
                    self._release_file(path, asker)
                case ReleaseAll():
                    self._released.set()
            return Ok(), None
        except InstantStartError as error:
            return Refused(error.code, error.message), None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return Refused(PrefetchError.code, f"not a request: {error}"), None

    def _status(self) -> HoldStatus:
        plan, stage = self._stage.plan, self._stage
        devices = tuple(
            HeldDevice(
                report.device,
                report.backend,
                report.bytes,
                report.total,
                report.cached,
                report.disk,
                round(report.seconds, 3),
                report.done,
            )
            for report in stage.progress()
        )
        return HoldStatus(plan.pipeline, plan.generation, os.getpid(), devices, len(stage.paths), self.seconds_left)

    def _manifest(self) -> HoldManifest:
        plan = self._stage.plan
        there = frozenset(self._stage.paths)
        digests = {file.path: file.digest for file in self._stage.weights.files}
        files = tuple(
            HeldFile(
                file.path,
                file.model,
                file.size,
                device.device,
                self._stage.place(device.device),
                file.rank,
                self._stage.is_ready(file.path),
                self._stage.layout(file.path),
                digests.get(file.path),
            )
            for device in plan.devices
            for file in device.files
            if file.path in there
        )
        with self._lock:
            freed, engines = len(self._freed), len(self._engines)
        return HoldManifest(plan.pipeline, plan.generation, plan.how, files, freed, self._ranks, engines)

    def _admit(self, asker: socket.socket) -> None:
        with self._lock:
            if asker not in self._engines and len(self._engines) >= self._ranks:
                raise PrefetchError(
                    f"{self._stage.plan.pipeline}: {self._ranks} engine(s) took these weights already "
                    "(hold them with --tensor-parallel N for N of them)"
                )
            self._engines.add(asker)

    def _release_file(self, path: str, asker: socket.socket) -> None:
        with self._lock:
            if asker not in self._engines:
                raise PrefetchError(f"{path} was not taken by this engine")
            done = self._done_with.setdefault(path, set())
            done.add(asker)
            if len(done) < self._ranks:
                return
        self._stage.release(path)
        with self._lock:
            self._freed.add(path)
        if not self._stage.paths:
            self._all_freed.set()

    def _take(self, path: str, timeout: float, asker: socket.socket) -> tuple[Answer, int | None]:
        self._stage.wait_file(path, min(max(timeout, 0.0), 3600.0))
        exported = self._stage.export(path)
        if exported.handle is not None:
            with self._lock:
                self._lent.setdefault(asker, []).append(exported)
        device = self._stage.plan.device_of(path) or ""
        return Taken(path, exported.size, device, exported.layout, exported.handle), exported.fd


def process_of(connection: socket.socket) -> int | None:
    """A pidfd of the other end, the caller's to close; None where it cannot be had."""
    try:
        return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4), "little", signed=True)
    except OSError:  # before Linux 6.5
        pid = peer_of(connection).pid
    try:
        return os.pidfd_open(pid) if pid > 0 else None  # 0: of a namespace that is not seen from here
    except OSError:
        return None


def _listen(path: str) -> socket.socket:
    directory = os.path.dirname(path)
    try:
        if os.path.isdir(directory) and os.stat(directory).st_uid != os.geteuid():
            raise PrefetchError(f"{directory} belongs to somebody else")
        if os.path.dirname(directory) == run_directory():
            make_run_directory(run_directory())  # the daemon's socket lies there, too
        return unixsocket.listen(path, mode=0o600, directory_mode=0o700, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            name = os.path.basename(path).removesuffix(SUFFIX)
            raise PrefetchError(f"{name} is held already; `instantstart prefetch release {name}` ends that") from error
        raise PrefetchError(f"{path}: cannot listen there: {error.strerror or error}") from error
