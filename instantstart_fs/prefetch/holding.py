"""Weights that are held for engines: a socket that says what there is, hands it over and lets it go.

JSON lines over a unix socket of mode 0600 in a directory of mode 0700; only the same user and root are answered (by
SO_PEERCRED), nothing is unpickled, and no message is longer than MAX_LINE. Requests, each answered by one line:

    {"op": "status"}                                → HoldStatus
    {"op": "manifest"}                              → HoldManifest
    {"op": "take", "path": …, "timeout": 60.0}      → Taken; on the CPU with the file's memfd beside it (SCM_RIGHTS)
    {"op": "release-file", "path": …}               → Ok: the asker is done with it; freed once all ranks are
    {"op": "release"}                               → Ok: the hold ends

An engine is one connection that takes. As many as there are ranks are served, others are refused; one that goes away
before anything was freed makes room for another. When all files are freed the hold has served its purpose and ends.

What goes wrong is answered by Refused. ``Holder`` is the serving side, ``HoldClient`` the asking one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from typing import NamedTuple, Self, TypeVar

import msgspec

from instantstart_fs.config import unixsocket
from instantstart_fs.config.places import make_run_directory, run_directory
from instantstart_fs.config.unixsocket import peer_of
from instantstart_fs.core.names import validate_pipeline_id
from instantstart_fs.errors import InstantStartError, PermissionRefused, PrefetchError, from_code
from instantstart_fs.prefetch.layout import FileLayout
from instantstart_fs.prefetch.messages import IpcHandle
from instantstart_fs.prefetch.stager import Stage

MAX_LINE = 128 * 1024 * 1024
"""Bytes of an answer: the layouts of a checkpoint with a million tensors."""
MAX_REQUEST = 64 * 1024
MAX_CONNECTIONS = 64
ANSWER_DEADLINE = 20.0
"""Seconds for an answer beyond what a request itself allows."""
BACKLOG = 128
_SUFFIX = ".sock"
_T = TypeVar("_T")


class _Request(msgspec.Struct, frozen=True, tag_field="op", forbid_unknown_fields=True):
    pass


class AskStatus(_Request, frozen=True, tag="status"):
    pass


class AskManifest(_Request, frozen=True, tag="manifest"):
    pass


class Take(_Request, frozen=True, tag="take"):
    """``timeout``: seconds to wait for the file to be in place."""

    path: str
    timeout: float = 60.0


class ReleaseFile(_Request, frozen=True, tag="release-file"):
    path: str


class ReleaseAll(_Request, frozen=True, tag="release"):
    pass


class HeldDevice(msgspec.Struct, frozen=True):
    """Bytes and seconds, as stager.DeviceReport."""

    device: str
    backend: str
    bytes: int
    total: int
    cached: int
    disk: int
    seconds: float
    done: bool


class HoldStatus(msgspec.Struct, frozen=True, tag="status"):
    """``seconds_left``: until the hold ends by itself, null for no limit. ``files``: held, or still on their way."""

    pipeline: str
    generation: int
    pid: int
    devices: tuple[HeldDevice, ...]
    files: int
    seconds_left: float | None


class HeldFile(msgspec.Struct, frozen=True):
    """``layout`` null: no safetensors file, or not read yet (``ready`` says which). ``digest``: as the mount shows it,
    null where the origin offers none. ``device``: the holder's name for it; ``place``: everybody's (tensors.place_of).
    """

    path: str
    model: str
    size: int
    device: str
    place: str
    rank: int | None
    ready: bool
    layout: FileLayout | None
    digest: str | None = None


class HoldManifest(msgspec.Struct, frozen=True, tag="manifest"):
    """``how``: as plan.Plan. ``files`` that can be taken; ``freed``: how many cannot any more. ``ranks``: as many
    engines are to take them; ``engines``: so many have begun."""

    pipeline: str
    generation: int
    how: str
    files: tuple[HeldFile, ...]
    freed: int = 0
    ranks: int = 1
    engines: int = 0


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """``handle``: for CUDA, to be opened once; null on the CPU, where a descriptor is beside the message."""

    path: str
    size: int
    device: str
    layout: FileLayout | None
    handle: IpcHandle | None


class Ok(msgspec.Struct, frozen=True, tag="ok"):
    pass


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    code: str
    message: str


Answer = HoldStatus | HoldManifest | Taken | Ok | Refused
_requests = msgspec.json.Decoder(AskStatus | AskManifest | Take | ReleaseFile | ReleaseAll)
_answers = msgspec.json.Decoder(HoldStatus | HoldManifest | Taken | Ok | Refused)


def hold_socket(pipeline: str) -> str:
    """Where this user's hold of that pipeline answers: below $INSTANTSTART_PREFETCH_DIR, else the run directory.
    Raises InvalidName."""
    validate_pipeline_id(pipeline)
    return os.path.join(_directory(), f"{pipeline}{_SUFFIX}")


def held_pipelines() -> list[str]:
    """Ids of what is held there, sorted. What a killed holder left behind is none. Raises PrefetchError when it cannot
    look."""
    try:
        names = sorted(name for name in os.listdir(_directory()) if name.endswith(_SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PrefetchError(f"{_directory()}: holds cannot be looked for: {error.strerror}") from error
    return [name.removesuffix(_SUFFIX) for name in names if unixsocket.answers(os.path.join(_directory(), name))]


def _directory() -> str:
    return os.environ.get("INSTANTSTART_PREFETCH_DIR") or os.path.join(run_directory(), "prefetch")


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
        self._path = path
        self._ends_at = None if limit is None else time.monotonic() + limit
        self._released = threading.Event()
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
        """How the hold ended; empty while it goes on."""
        if self._released.is_set():
            return "released"
        return "its time is up, released" if self.seconds_left == 0.0 else ""

    def close(self) -> None:
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
        try:
            with connection, contextlib.suppress(OSError):
                uid = peer_of(connection).uid
                if uid not in (0, os.geteuid()):
                    _send(connection, Refused(PermissionRefused.code, f"uid {uid} may not take these weights"), None)
                    return
                reader = _Lines(connection, MAX_REQUEST)
                while (line := reader.next()) is not None:
                    connection.settimeout(ANSWER_DEADLINE)
                    answer, fd = self._answer(line, connection)
                    try:
                        _send(connection, answer, fd)
                    finally:
                        if fd is not None:
                            os.close(fd)
                    connection.settimeout(None)
        finally:
            self._connections.release()
            with self._lock:
                if not self._freed:
                    self._engines.discard(connection)
                    for engines in self._done_with.values():
                        engines.discard(connection)

    def _answer(self, line: bytes, asker: socket.socket) -> tuple[Answer, int | None]:
        try:
            match _requests.decode(line):
                case AskStatus():
                    return self._status(), None
                case AskManifest():
                    return self._manifest(), None
                case Take(path, timeout):
                    self._admit(asker)
                    return self._take(path, timeout)
                case ReleaseFile(path):
                    self._let_go(path, asker)
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

    def _let_go(self, path: str, asker: socket.socket) -> None:
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
            self._released.set()

    def _take(self, path: str, timeout: float) -> tuple[Answer, int | None]:
        self._stage.wait_file(path, min(max(timeout, 0.0), 3600.0))
        exported = self._stage.export(path)
        device = self._stage.plan.device_of(path) or ""
        return Taken(path, exported.size, device, exported.layout, exported.handle), exported.fd


class TakenFile(NamedTuple):
    """``fd``: the memfd of a CPU device, the caller's to close (tensors.from_memory of its mapping); ``handle``: for
    tensors.from_ipc."""

    path: str
    size: int
    device: str
    layout: FileLayout | None
    fd: int | None
    handle: IpcHandle | None


class HoldClient:
    """A connection to the hold of ``pipeline`` (or at ``path``); a context manager; not for several threads.

    Raises PrefetchError when nobody holds it, or the hold ends, and what the other side refused."""

    def __init__(self, pipeline: str, path: str | None = None) -> None:
        self._path = path or hold_socket(pipeline)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            unixsocket.connect(self._socket, self._path, ANSWER_DEADLINE)
            self._socket.settimeout(ANSWER_DEADLINE)
            owner = peer_of(self._socket).uid
        except TimeoutError as error:
            self._socket.close()
            raise PrefetchError(
                f"{pipeline}: its holder is busy, it accepted nobody else within {ANSWER_DEADLINE:g} s; try again"
            ) from error
        except OSError as error:
            self._socket.close()
            raise PrefetchError(
                f"{pipeline}: nobody holds it here ({self._path}: {error.strerror or error})"
            ) from error
        if owner not in (0, os.geteuid()):
            # Weights from somebody else's memory could be anything.
            self._socket.close()
            raise PermissionRefused(f"{pipeline} is held by uid {owner}")
        self._reader = _Lines(self._socket, MAX_LINE, descriptors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._reader.close()

    def status(self) -> HoldStatus:
        return self._ask(AskStatus(), HoldStatus)

    def manifest(self) -> HoldManifest:
        return self._ask(AskManifest(), HoldManifest)

    def take(self, path: str, timeout: float = 60.0) -> TakenFile:
        """Wait until the file is in place, at most ``timeout`` seconds, and open it."""
        taken = self._ask(Take(path, timeout), Taken, timeout)
        fd = self._reader.take_descriptor() if taken.handle is None else None
        if taken.handle is None and fd is None:
            raise PrefetchError(f"{path} came without its memory: this process may not open more files (ulimit -n)")
        return TakenFile(taken.path, taken.size, taken.device, taken.layout, fd, taken.handle)

    def release_file(self, path: str) -> None:
        """This engine is done with it."""
        self._ask(ReleaseFile(path), Ok)

    def release(self) -> None:
        """End the hold."""
        self._ask(ReleaseAll(), Ok)

    def wait_ended(self, timeout: float) -> None:
        """Until the holder has gone, within ``timeout`` seconds. Raises PrefetchError."""
        self._socket.settimeout(timeout)
        try:
            while self._socket.recv(4096):
                pass
        except TimeoutError as error:
            raise PrefetchError(f"{self._path} was released and is still there after {timeout:.0f} s") from error
        except OSError:
            return  # reset: it is gone

    def _ask(self, request: msgspec.Struct, kind: type[_T], more: float = 0.0) -> _T:
        self._socket.settimeout(ANSWER_DEADLINE + more)
        try:
            with contextlib.suppress(BrokenPipeError):  # refused and closed already: why is there to be read
                self._socket.sendall(msgspec.json.encode(request) + b"\n")
            line = self._reader.next()
            if line is None:
                raise PrefetchError(f"{self._path}: the hold has ended")
            answer = _answers.decode(line)
        except ConnectionResetError as error:
            raise PrefetchError(f"{self._path}: the hold has ended") from error
        except TimeoutError as error:
            raise PrefetchError(f"{self._path}: no answer within {ANSWER_DEADLINE + more:g} s") from error
        except (OSError, msgspec.DecodeError) as error:
            raise PrefetchError(f"{self._path}: {error}") from error
        if isinstance(answer, Refused):
            raise from_code(answer.code, answer.message)
        if not isinstance(answer, kind):
            raise PrefetchError(f"{self._path}: the holder answered something else; use the same release of both")
        return answer


class _Lines:
    """Lines, and with ``descriptors`` those that came beside them; else the kernel drops them."""

    def __init__(self, connection: socket.socket, limit: int, *, descriptors: bool = False) -> None:
        self._socket = connection
        self._limit = limit
        self._most = int(descriptors)
        self._pending = bytearray()
        self._descriptors: list[int] = []

    def next(self) -> bytes | None:
        """None at the end. Raises OSError, and PrefetchError for a line beyond the limit."""
        while (end := self._pending.find(b"\n")) < 0:
            if len(self._pending) > self._limit:
                raise OSError(f"a message of more than {self._limit} bytes")
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 20, self._most, socket.MSG_CMSG_CLOEXEC)
            self._descriptors += descriptors
            if not data:
                self.close()
                return None
            self._pending += data
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def take_descriptor(self) -> int | None:
        return self._descriptors.pop(0) if self._descriptors else None

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def _send(connection: socket.socket, answer: Answer, fd: int | None) -> None:
    line = memoryview(msgspec.json.encode(answer) + b"\n")
    sent = socket.send_fds(connection, [line], [fd]) if fd is not None else 0
    connection.sendall(line[sent:])


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
            name = os.path.basename(path).removesuffix(_SUFFIX)
            raise PrefetchError(f"{name} is held already; `instantstart prefetch release {name}` ends that") from error
        raise PrefetchError(f"{path}: cannot listen there: {error.strerror or error}") from error
