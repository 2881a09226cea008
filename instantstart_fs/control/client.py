"""The blocking client of the daemon: what the command line uses. `from instantstart_fs import Client` adds what this
machine does itself (``client.py``).

It is quick to import and needs msgspec alone. What may be asked is in ``calls.py``; this sends and waits. A connection
carries one request at a time. A client keeps the connections that it made, and makes one more where all are in use, so
that several threads may share it. One that the daemon has closed meanwhile (it restarted) is replaced.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self, TypeVar, Unpack

from instantstart_fs.config.places import find_socket
from instantstart_fs.control import calls, protocol
from instantstart_fs.control.calls import ANSWER_DEADLINE, CONNECT_DEADLINE, NAMES_DEADLINE, Call, Finished, Refused
from instantstart_fs.control.client_connection import Connection
from instantstart_fs.control.specification import Options
from instantstart_fs.core.coldstart import ColdStart, Moment
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.core.status import OriginCheck, PipelineStatus
from instantstart_fs.core.weights import WeightSet
from instantstart_fs.errors import ControlError, ControlProtocolError, InstantStartError, PipelineNotFound

_T = TypeVar("_T")
MAX_IDLE = 4
"""Connections that are kept idle for the next request."""


class Lease:
    """A lease on a pipeline: nothing of it is evicted. It ends with ``close``, the ``with`` block, its client, or the
    process; and when the daemon ends, or an administrator takes it away."""

    def __init__(self, pipeline: str, connection: Connection, over: Callable[[Connection], None]) -> None:
        self.pipeline = pipeline
        self._connection = connection
        self._over = over

    def wait_ended(self, timeout: float) -> bool:
        """Return whether it has ended, or does within ``timeout`` seconds."""
        return self._connection.wait_ended(timeout)

    def wait_disconnected(self) -> None:
        """Wait until it has ended, however long that takes: for a thread of its own."""
        self._connection.wait_ended(None)
        self.close()

    def close(self) -> None:
        """End the lease. Any thread may call it, any number of times."""
        self._over(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OpenedWeights(Lease):
    """A pipeline's weight files under a lease. ``weights``: what there will be; ``files`` has to follow."""

    def __init__(
        self, pipeline: str, connection: Connection, over: Callable[[Connection], None], weights: WeightSet
    ) -> None:
        super().__init__(pipeline, connection, over)
        self.weights = weights

    def files(self) -> Iterator[tuple[str, list[int]]]:
        """Yield (path, descriptors) of each file, as it is complete: open for reading, and, if its filesystem can, the
        same opened O_DIRECT. The caller closes them. Raises what keeps a file from coming."""
        for part, descriptors in self.parts():
            yield part.path, descriptors

    def parts(self) -> Iterator[tuple[protocol.Part, list[int]]]:
        """Yield news of the files as they come, with the descriptors (as of ``files``), for an ``open`` with
        ``stream``. Raises what keeps a file from coming."""
        while True:
            match self._connection.receive(ANSWER_DEADLINE):
                case protocol.Parts(parts):
                    for part in parts:
                        yield part, self._take_descriptors(part.descriptors)
                case protocol.Handed(files):
                    for file in files:
                        if not file.descriptors:
                            raise ControlProtocolError("a file came without a descriptor; use the same release of both")
                        part = protocol.Part(file.path, file.descriptors, complete=True)
                        yield part, self._take_descriptors(file.descriptors)
                case protocol.Failed() as failed:
                    raise failed.error()
                case protocol.Done():
                    return
                case _:
                    pass

    def _take_descriptors(self, count: int) -> list[int]:
        waiting = self._connection.descriptors
        if len(waiting) < count:
            raise ControlProtocolError("a file came without its descriptor: this process may not open more (ulimit -n)")
        return [waiting.popleft() for _ in range(count)]


class Client:
    """The daemon at ``path`` (default: ``find_socket()``). A context manager; threads may share it. A process that was
    forked may use its copy, with connections of its own; leases stay the parent's.

    Every method raises errors of ControlError's family for the connection, and those that the daemon raised. It has
    more than 25 public methods, because each request of the protocol has one.
    """

    def __init__(self, path: str | None = None, *, deadline: float = CONNECT_DEADLINE) -> None:
        """``deadline``: seconds to be accepted. Raises DaemonUnreachable, PermissionRefused."""
        self.path = find_socket(path)
        self._deadline = deadline
        self._lock = threading.Lock()
        self._closed = False
        self._connections: set[Connection] = set()
        self._held: set[Connection] = set()
        """The connections that leases hold."""
        self._idle: list[Connection] = []
        _clients.add(self)
        self._idle.append(self._connect())

    def close(self) -> None:
        """Close all connections; leases end. Any thread may call it. A thread that waits for an answer gets
        DaemonUnreachable."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            held, self._held = self._held, set()
            for connection in self._connections:
                connection.shut()  # the thread that waits for an answer closes it
        for connection in (*idle, *held):
            self._drop(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def peer_pid(self) -> int:
        """The daemon's process as the kernel numbers it for this one; 0 where it lies in another pid namespace."""
        with self._idle_one() as connection:
            return connection.peer_pid()

    def wait_ended(self, timeout: float) -> bool:
        """Whether the daemon ended the connection, whose process ``peer_pid`` was, within ``timeout`` seconds."""
        with self._idle_one() as connection:
            return connection.wait_ended(timeout)

    @contextlib.contextmanager
    def _idle_one(self) -> Iterator[Connection]:
        """Return a connection that waits for a request, even if the daemon has ended it."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._connect()
        try:
            yield connection
        finally:
            self._give_back(connection)

    # -- requests --------------------------------------------------------------------------------------------------

    def ping(self) -> protocol.DaemonInfo:
        """Return what the daemon says of itself."""
        return self._ask(calls.ping())

    def add(
        self, pipeline: str | PipelineSpec, source: str | None = None, *, warm: bool = False, **options: Unpack[Options]
    ) -> PipelineStatus:
        """Pin ``source`` (whatever `instantstart add` takes) and show it under the mount. ``warm``: start filling at
        once. A PipelineSpec may stand for name, source and options. Raises PipelineExists, OriginError, UsageError."""
        return self._ask(calls.add(pipeline, source, options, warm))

    def update(self, pipeline: str) -> PipelineStatus:
        """Resolve the source again, and switch if it changed."""
        return self._ask(calls.update(pipeline))

    def remove(self, pipeline: str, *, force: bool = False) -> list[str]:
        """Remove a pipeline. ``force``: leases are ended rather than in the way. Returns who still has files of it
        open, in words."""
        return self._ask(calls.remove(pipeline, force))

    def evict(self, pipeline: str, *, force: bool = False) -> list[str]:
        """Evict a pipeline. ``force``: leases and opens are not in the way. Returns who still has files of it open, in
        words."""
        return self._ask(calls.evict(pipeline, force))

    def set_pinned(self, pipeline: str, pinned: bool) -> None:
        """Pin or unpin a pipeline. A pinned one is never evicted."""
        self._ask(calls.set_pinned(pipeline, pinned))

    def touch(self, pipeline: str) -> None:
        """Count as a request, so that the pipeline stays hot."""
        self._ask(calls.touch(pipeline))

    def mark(self, pipeline: str, moment: Moment, at_ns: int | None = None) -> None:
        """Mark a moment of a cold start. ``at_ns``: wall clock, None for the moment when the daemon gets it."""
        self._ask(calls.mark(pipeline, moment, at_ns))

    def startup_caches(self, pipeline: str) -> list[StartupRecord]:
        """Return the pipeline's startup caches, newest first."""
        return self._ask(calls.startup_caches(pipeline))

    def startup_verify(self, pipeline: str) -> protocol.StartupVerified:
        """Read startup caches again. Damaged ones are deleted."""
        return self._ask(calls.startup_verify(pipeline))

    def startup_remove(self, pipeline: str, numbers: Sequence[int] = ()) -> int:
        """Remove these versions, or all. Returns how many there were."""
        return self._ask(calls.startup_remove(pipeline, numbers))

    def cold_starts(self, pipeline: str) -> list[ColdStart]:
        """Return the pipeline's cold starts, newest first."""
        return self._ask(calls.cold_starts(pipeline))

    def pipelines(self) -> list[PipelineStatus]:
        """Return the pipelines that this user owns, or all; without files."""
        return self._ask(calls.pipelines())

    def region_state(self, pipeline: str, *, check: bool = False) -> protocol.RegionState:
        """Return how far the regional tier has the pipeline. ``check``: the tier is asked what it holds."""
        return self._ask(calls.region_state(pipeline, check))

    def names(self, prefix: str = "", *, deadline: float = ANSWER_DEADLINE) -> list[str]:
        """Return the ids that begin with ``prefix``, of the pipelines that this user owns or may read."""
        return self._ask(calls.names(prefix, deadline))

    def specs(self) -> list[PipelineSpec]:
        """Return what the pipelines were added with."""
        return self._ask(calls.specs())

    def status(self, pipeline: str, *, brief: bool = False) -> PipelineStatus:
        """Return a pipeline's status. ``brief``: with ``listed`` in place of ``files``, of which there may be a hundred
        thousand."""
        return self._ask(calls.status(pipeline, brief))

    def warm(self, pipeline: str, *, everything: bool = False) -> PipelineStatus:
        """Start filling. Returns the status at once."""
        return self._ask(calls.warm(pipeline, everything, wait=False))

    def include(self, pipeline: str, globs: Sequence[str]) -> None:
        """Add the files that these globs match to the load set, from now on."""
        self._ask(calls.include(pipeline, globs))

    def wait_warm(
        self,
        pipeline: str,
        *,
        everything: bool = False,
        progress: Callable[[PipelineStatus], None] | None = None,
        timeout: float | None = None,
    ) -> PipelineStatus:
        """Start filling and wait until all is there; raises what made the fill fail. ``progress`` is called at least
        every second. ``timeout``: seconds for the whole, then WaitDeadline; the fill goes on. Without one the daemon's
        own patience holds: 15 minutes without a byte, and silence means that it is gone."""

        def on_progress(message: protocol.Progress) -> None:
            if progress is not None:
                progress(calls.progress_status(message))

        return self._ask(calls.warm(pipeline, everything, wait=True), on_progress, timeout)

    def check_access(self, pipeline: str, *, token_file: str | None = None) -> list[str]:
        """The sources, when all of them may be fetched with the pipeline's own credentials, or with the hub token in
        ``token_file``, which the daemon reads; else raises why not."""
        return self._ask(calls.check_access(pipeline, token_file))

    def check_origins(self) -> list[OriginCheck]:
        """Return what the daemon itself gets from the origins of the pipelines that this user owns, or of all."""
        return self._ask(calls.check_origins())

    def verify(
        self,
        pipeline: str,
        progress: Callable[[int, int], None] | None = None,
        *,
        rate: float | None = None,
        timeout: float | None = None,
    ) -> protocol.VerifyResult:
        """Verify a pipeline's files. ``progress`` gets (bytes done, bytes in all); ``rate`` is in bytes a second at
        most; ``timeout`` is as of wait_warm."""

        def on_progress(message: protocol.Progress) -> None:
            if progress is not None:
                progress(message.done_bytes, message.total_bytes)

        return self._ask(calls.verify(pipeline, rate), on_progress, timeout)

    def lease(self, pipeline: str) -> Lease:
        """Take a lease. It lasts until it is closed: ``with client.lease(…):``."""
        connection = self._take()
        try:
            self._result(self._exchange(connection, calls.lease(pipeline), None, None), pipeline)
            lease = Lease(pipeline, self._hold(connection), self._drop)
        except BaseException:
            self._drop(connection)
            raise
        return lease

    def open(
        self, pipeline: str, deadlines: Mapping[str, float] | None = None, *, stream: bool = False
    ) -> OpenedWeights:
        """Ask for the pipeline's weight files, under a lease; a cold pipeline is filled. ``deadlines``: model →
        seconds, see core.weights.schedule. With ``stream`` its ``parts`` have to follow, else its ``files``. Raises
        UsageError for a deadline that is no number."""
        call = calls.open_weights(pipeline, deadlines, stream)
        connection = self._take()
        try:
            connection.send(call.request, ANSWER_DEADLINE)
            message = connection.receive(ANSWER_DEADLINE)
            if isinstance(message, protocol.Opening):
                return OpenedWeights(pipeline, self._hold(connection), self._drop, message.weights)
            found = calls.outcome(call, message)
            if isinstance(found, Refused):
                self._result(found, pipeline)
            raise ControlProtocolError("the daemon answered something else; use the same release of both")
        except BaseException:
            self._drop(connection)
            raise

    # -- the exchange ----------------------------------------------------------------------------------------------

    def _ask(
        self,
        call: Call[_T],
        on_progress: Callable[[protocol.Progress], None] | None = None,
        timeout: float | None = None,
    ) -> _T:
        connection = self._take()
        try:
            found = self._exchange(connection, call, on_progress, timeout)
        except BaseException:
            self._drop(connection)  # its answer may still come, and would be taken for the next one's
            raise
        self._give_back(connection)
        return self._result(found, calls.wanted(call))

    @staticmethod
    def _exchange(
        connection: Connection,
        call: Call[_T],
        on_progress: Callable[[protocol.Progress], None] | None,
        timeout: float | None,
    ) -> Finished[_T] | Refused:
        end = None if timeout is None else time.monotonic() + timeout
        connection.send(call.request, call.deadline)
        while True:
            wait = calls.silence(call.deadline, end, time.monotonic())
            try:
                found = calls.outcome(call, connection.receive(wait))
            except InstantStartError:
                if end is not None and time.monotonic() >= end:
                    raise calls.expired() from None
                raise
            if not isinstance(found, protocol.Progress):
                return found
            if on_progress is not None:
                on_progress(found)

    def _result(self, found: Finished[_T] | Refused, pipeline: str) -> _T:
        if not isinstance(found, Refused):
            return found.value
        if isinstance(found.error, PipelineNotFound) and pipeline:
            raise with_advice(self, found.error, pipeline)
        raise found.error

    def _connect(self) -> Connection:
        connection = Connection(self.path, self._deadline)
        with self._lock:
            self._connections.add(connection)
            if not self._closed:
                return connection
        self._drop(connection)
        raise ControlError(f"{self.path}: this client is closed")

    def _check_open(self) -> None:
        """Raises ControlError once ``close`` was called."""
        if self._closed:
            raise ControlError(f"{self.path}: this client is closed")

    def _take(self) -> Connection:
        """Return an idle connection, or a new one."""
        while True:
            with self._lock:
                self._check_open()
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connect()
            if connection.is_quiet():
                return connection
            self._drop(connection)

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return
        self._drop(connection)

    def _hold(self, connection: Connection) -> Connection:
        with self._lock:
            if not self._closed:
                self._held.add(connection)
                return connection
        raise ControlError(f"{self.path}: this client is closed")

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
            self._held.discard(connection)
        connection.close()

    def _forked(self) -> None:
        """Forget locks and connections in the child: another thread may have held the lock, and idle connections are
        the parent's."""
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for connection in idle:
            self._drop(connection)


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _forked() -> None:
    for client in list(_clients):
        client._forked()


os.register_at_fork(after_in_child=_forked)


def with_advice(client: Client, error: PipelineNotFound, pipeline: str) -> PipelineNotFound:
    """Return the error with the name that may have been meant, as far as the daemon tells names."""
    known: list[str] = []
    with contextlib.suppress(InstantStartError, OSError, ValueError):
        known += client.names(calls.beginning(pipeline), deadline=NAMES_DEADLINE)
        known += client.names(deadline=NAMES_DEADLINE)
    return calls.with_advice(error, pipeline, sorted({*known}))
